"""Which weights of a file are taken: names that wrappers lengthen, other keys, several sets, several files."""

import collections
import json
import logging

import numpy as np
import pytest

from eqm_jax.checkpoints import inert, safetensors_file, state_dicts, torch_pickle

ANCHOR = "embed.proj.weight"
NAMES = (ANCHOR, "blocks.0.attn.weight", "blocks.1.attn.weight")


def state(value=0.0, prefix="", within="") -> dict[str, np.ndarray]:
  """Small weights, in names with a prefix, and with a wrapper around each block."""
  names = [name.replace("blocks.0.", f"blocks.0.{within}").replace("blocks.1.", f"blocks.1.{within}") for name in NAMES]
  return {prefix + name: np.full(2, value, np.float32) for name in names}


def chosen(contents, weights="ema") -> float:
  one = state_dicts.choose(state_dicts.find(contents, ANCHOR), weights, "a.pt")
  assert set(NAMES) <= set(one.tensors)
  return float(one.tensors[ANCHOR][0])


@pytest.mark.parametrize(
  "prefix",
  [
    *("", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module.", "_forward_module."),
    *("_fsdp_wrapped_module.", "_fsdp_wrapped_module._orig_mod.", "model.", "net.", "model._orig_mod.module.net."),
  ],
)
@pytest.mark.parametrize("within", ["", "_orig_mod.", "_checkpoint_wrapped_module._fsdp_wrapped_module."])
def test_wrappers_in_any_nesting_are_taken_off(prefix, within):
  weights = state(1, prefix, within) | {"n_averaged": np.int64(3)}
  assert chosen({"ema": weights, "model": state(2)}) == 1
  assert chosen(weights) == chosen(weights, "model") == 1


def test_a_wrapped_layer_of_the_first_name_is_found():
  weights = state(1)
  weights["embed._orig_mod.proj.weight"] = weights.pop(ANCHOR)
  assert chosen({"model": weights}, "model") == 1


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "net", "module", "generator", "G_ema", "averaged"])
def test_the_only_candidate_is_taken_and_told(key, caplog):
  optimizer = {"state": {0: {"exp_avg": np.zeros(2)}}, "param_groups": [{"params": [0]}]}
  assert chosen({key: state(1), "optimizer": optimizer, "epoch": 3}) == 1
  assert (f"took the ones under '{key}'" in caplog.text) == (key != "module")  # which is a bare state dict


@pytest.mark.parametrize(
  "keys, expected",
  [
    (("model", "ema"), (1, 0)),
    (("net", "ema"), (1, 0)),
    (("state_dict", "ema_state_dict"), (1, 0)),
    (("model.student", "model.ema"), (1, 0)),
    (("ema.online_model", "ema.ema_model"), (1, 0)),  # ema-pytorch
    (("state_dict.net", "state_dict.net_averaged"), (1, 0)),
  ],
)
@pytest.mark.parametrize("flat", [True, False])
def test_the_average_and_the_model_are_told_apart(keys, expected, flat):
  contents = {}
  for value, key in enumerate(keys):
    first, _, second = key.partition(".")
    if flat:
      contents |= state(value, f"{key}.")
    elif second:
      contents.setdefault(first, {}).update(state(value, f"{second}.module."))
    else:
      contents[key] = collections.OrderedDict(state(value))
  assert (chosen(contents, "ema"), chosen(contents, "model")) == expected
  assert [chosen(contents, key) for key in keys] == [0, 1]


def test_several_candidates_are_listed():
  contents = {"a": state(1), "b": {"c": state(2)}, "d": [state(3)]}
  with pytest.raises(ValueError, match=r"a.pt: .* only 'ema' could mean; it has 'a', 'b.c', 'd.0': give one of"):
    chosen(contents)
  assert chosen(contents, "b.c") == 2 and chosen(contents, "d.0") == 3
  with pytest.raises(ValueError, match="'best' could mean; it has 'model'"):
    chosen(state(1), "best")


def test_weights_of_other_networks_in_the_same_dict_are_left_out():
  (one,) = state_dicts.find({"state_dict": state(1, "model.") | {"vae.conv.weight": np.zeros(3)}}, ANCHOR)
  assert set(one.tensors) == set(NAMES) and one.title == "state_dict.model"


def test_tables_of_something_else_by_the_same_names_are_no_weights():
  """DeepSpeed keeps the shapes of all parameters beside them."""
  size = inert.stand_in("torch", "Size", {})
  shapes = {name: size.__new__(size, (2,)) for name in NAMES}
  assert chosen({"module": state(1), "param_shapes": [shapes]}) == 1


def test_the_same_weights_may_be_there_twice():
  weights = state(1)
  assert chosen({"model": weights, "ema": weights}) == 1


def test_objects_that_contain_themselves_end():
  contents = {"ema": state(1), "list": []}
  contents["list"].append(contents)
  assert chosen(contents) == 1


def test_settings_are_found_where_scripts_keep_them():
  for key in ("args", "config", "hyper_parameters"):
    assert state_dicts.arguments({key: {"num_heads": 3}}) == {"num_heads": 3}
  assert state_dicts.arguments({"args": {"lr": 1}, "config": {"lr": 2, "seed": 3}}) == {"lr": 1, "seed": 3}
  assert state_dicts.arguments([1]) == state_dicts.arguments({"args": None}) == {}


def test_weights_in_several_files_are_read_by_their_index(tmp_path):
  weights, parts = state(1, "model."), {}
  for number, name in enumerate(weights):
    parts[name] = f"model-{number}.safetensors"
    safetensors_file.write(tmp_path / parts[name], {name: weights[name]}, {})
  index = tmp_path / "model.safetensors.index.json"
  index.write_text(json.dumps({"metadata": {}, "weight_map": parts}))
  assert state_dicts.in_directory(str(tmp_path)) == str(index)
  assert chosen(state_dicts.read(index)) == 1
  (tmp_path / "model-1.safetensors").unlink()
  with pytest.raises(ValueError, match="index.json: its file model-1.safetensors is missing: put all 3 beside it"):
    state_dicts.read(index)
  index.write_text("{}")
  with pytest.raises(ValueError, match="index.json: not the index of a model"):
    state_dicts.read(index)


def test_formats_are_told_by_content(tmp_path, caplog):
  safetensors_file.write(tmp_path / "a.pt", state(1), {"num_heads": 3, "uncond": True})
  torch_pickle.write(tmp_path / "b.safetensors", {"ema": state(1)}, {"num_heads": 3})
  with caplog.at_level(logging.INFO):
    for name in ("a.pt", "b.safetensors"):
      contents = state_dicts.read(tmp_path / name)
      (one,) = state_dicts.find(contents, ANCHOR)
      np.testing.assert_array_equal(state_dicts.as_array(one.tensors[ANCHOR]), [1, 1])
      assert state_dicts.arguments(contents)["num_heads"] == 3
