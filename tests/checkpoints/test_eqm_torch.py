import types

import jax
import ml_dtypes
import numpy as np
import pytest
from conftest import ROOT

import eqm_jax
from eqm_jax.checkpoints import eqm_torch as convert
from eqm_jax.checkpoints import inert, safetensors_file, torch_pickle

BROUGHT = sorted((ROOT / "tests" / "reference" / "checkpoints").iterdir())  # the network of eqm_tiny_p4
P4 = ROOT / "tests" / "reference" / "eqm_tiny_p4.pt"


def state_of(path, weights="model"):
  contents = torch_pickle.read(path)
  return contents.get(weights, contents)


def assert_same_bits(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes() and x.shape == y.shape


def test_shapes_determine_all_attributes_but_the_heads(reference):
  with pytest.raises(ValueError, match="num_heads"):
    eqm_jax.load(reference.checkpoint)
  model = eqm_jax.load(reference.checkpoint, num_heads=reference.heads).model
  config = {
    "eqm_tiny": dict(input_size=8, channels=4, patch_size=2, width=32, depth=2, num_classes=10, learn_sigma=True),
    "eqm_tiny_p4": dict(input_size=16, channels=4, patch_size=4, width=24, depth=3, num_classes=7, learn_sigma=False),
  }[reference.name]
  assert {name: getattr(model, name) for name in config} == config
  assert model.mlp_ratio == 4.0 and not model.time_input


@pytest.mark.parametrize("weights", ["model", "ema"])
def test_export_gives_the_bits_of_the_original_and_loads_to_the_same(reference, weights, tmp_path):
  pretrained = eqm_jax.load(reference.checkpoint, weights=weights, num_heads=reference.heads)
  eqm_jax.export_reference(tmp_path / "out.pt", pretrained.model, pretrained.params)
  original, written = state_of(reference.checkpoint, weights), state_of(tmp_path / "out.pt", weights)
  assert list(original) == list(written)
  for name in original:
    assert (
      original[name].numpy().tobytes() == written[name].numpy().tobytes()
      and original[name].shape == written[name].shape
    )
  again = eqm_jax.load(tmp_path / "out.pt")  # the exported arguments have the number of heads
  assert again.model == pretrained.model
  assert_same_bits(again.params, pretrained.params)


def test_export_can_add_the_second_output_half_that_the_released_scripts_expect(tmp_path, reference):
  pretrained = eqm_jax.load(reference.checkpoint, num_heads=reference.heads)
  eqm_jax.export_reference(tmp_path / "out.pt", pretrained.model, pretrained.params, learn_sigma=True)
  again = eqm_jax.load(tmp_path / "out.pt")
  assert again.model.learn_sigma
  x, y = reference.image("x", np.float32), reference.label("y")
  f, g = (p.model.apply({"params": p.params}, x, y) for p in (pretrained, again))
  np.testing.assert_allclose(f, g, rtol=1e-5, atol=1e-6)  # a wider product may be summed in another order


def test_both_sets_of_weights_are_there(reference):
  ema, model = (eqm_jax.load(reference.checkpoint, weights=w, num_heads=reference.heads) for w in ("ema", "model"))
  same = all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(ema.params), jax.tree.leaves(model.params)))
  assert same == (reference.name == "eqm_tiny_p4")  # the bare state dict has one set


def rewritten(path, out, change):
  """The checkpoint with its state dict changed."""
  state = {name: tensor.numpy() for name, tensor in state_of(path).items()}
  change(state)
  torch_pickle.write(out, {"model": state}, {})
  return out


@pytest.mark.parametrize(
  "change, text",
  [
    (lambda s: s.pop("blocks.1.attn.qkv.bias"), r"missing: \['blocks.1.attn.qkv.bias'\]"),
    (lambda s: s.update(extra=s["pos_embed"]), r"unknown: \['extra'\]"),
    (lambda s: s.update({"final_layer.linear.bias": np.zeros(3, np.float32)}), "final_layer.linear.bias has shape"),
    (lambda s: s.update(pos_embed=s["pos_embed"] + 1), "sin-cos"),
    (lambda s: s.pop("x_embedder.proj.weight"), "has no x_embedder.proj.weight"),
    (lambda s: s.update(pos_embed=s["pos_embed"][0]), "pos_embed has shape .*, but the reference's has 3 axes"),
  ],
)
def test_another_networks_state_dict_is_refused(tmp_path, reference, change, text):
  path = rewritten(reference.checkpoint, tmp_path / "other.pt", change)
  with pytest.raises(ValueError, match=text):
    eqm_jax.load(path, weights="model", num_heads=reference.heads)


@pytest.fixture(scope="module")
def p4():
  """Its model, parameters and tensors."""
  pretrained = eqm_jax.load(P4, num_heads=3)
  return pretrained.model, pretrained.params, {name: tensor.numpy() for name, tensor in state_of(P4).items()}


@pytest.mark.parametrize("path", BROUGHT, ids=lambda path: path.stem)
def test_files_that_people_bring_load_to_the_same_weights(path, p4):
  loaded = eqm_jax.load(path, num_heads=3)
  model, params, _ = p4
  assert loaded.model == model
  if path.stem == "bfloat16":
    params = jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16).astype(np.float32), params)
  assert_same_bits(loaded.params, params)


TYPES = ("float16", "bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")


@pytest.mark.parametrize("kept", [True, False], ids=["stored", "cast_back"])
@pytest.mark.parametrize("name", TYPES)
def test_positions_are_compared_to_the_precision_of_the_file(p4, name, kept):
  model, params, state = p4
  dtype = np.dtype(getattr(ml_dtypes, name, name))
  rounded = {name: array.astype(dtype) for name, array in state.items()}
  rounded = rounded if kept else {name: array.astype(np.float32) for name, array in rounded.items()}
  found = convert.from_state_dict(model, rounded)
  expected = jax.tree.map(lambda leaf: leaf.astype(dtype).astype(np.float32), params)
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  noise = np.random.default_rng(0).normal(size=state[convert.POSITIONS].shape)
  learned = {**rounded, convert.POSITIONS: (state[convert.POSITIONS] + 0.3 * noise).astype(rounded["pos_embed"].dtype)}
  with pytest.raises(ValueError, match="learned positions are not supported"):
    convert.from_state_dict(model, learned)


def test_what_is_no_weight_is_left_out_or_named(p4):
  model, params, state = p4
  counters = {"n_averaged": np.int64(3), "initted": np.array([True]), "decay": np.float32(0.9999), "epoch": 3}
  assert_same_bits(convert.from_state_dict(model, {**state, **counters}), params)
  settings = inert.Inert.__new__(inert.stand_in("argparse", "Namespace", {}))
  settings.__setstate__({"shape": [3, 64, 64]})
  assert_same_bits(convert.from_state_dict(model, {**state, "args": settings}), params)
  with pytest.raises(ValueError, match=r"unknown: \['blocks.0.mlp.fc1.weight_scale'\]"):  # of 8-bit floats
    convert.from_state_dict(model, {**state, "blocks.0.mlp.fc1.weight_scale": np.array(0.5)})
  sharded = types.SimpleNamespace(shape=state["blocks.0.mlp.fc1.bias"].shape)
  with pytest.raises(ValueError, match="blocks.0.mlp.fc1.bias is a SimpleNamespace, not a whole tensor.*gather"):
    convert.from_state_dict(model, {**state, "blocks.0.mlp.fc1.bias": sharded})
  integers = state["blocks.0.mlp.fc1.bias"].astype(np.int8)
  with pytest.raises(ValueError, match="blocks.0.mlp.fc1.bias is int8, with no scale"):
    convert.from_state_dict(model, {**state, "blocks.0.mlp.fc1.bias": integers})


def test_an_average_of_what_is_trained_lacks_the_positions(p4, tmp_path):
  model, params, state = p4
  state = {name: array for name, array in state.items() if name != convert.POSITIONS}
  torch_pickle.write(tmp_path / "a.pt", {"ema": state}, {"num_heads": 3})
  with pytest.raises(ValueError, match="has no pos_embed.*pass input_size"):
    eqm_jax.load(tmp_path / "a.pt")
  loaded = eqm_jax.load(tmp_path / "a.pt", input_size=16)
  assert loaded.model == model
  assert_same_bits(loaded.params, params)


def module(name: str, children: dict, tensors: dict, **attributes) -> inert.Inert:
  """A module of PyTorch as its pickle gives it."""
  found = inert.Inert.__new__(inert.stand_in("models", name, {}))
  found.__setstate__({"_modules": children, "_parameters": tensors, "_buffers": {}, **attributes})
  return found


def test_a_network_that_was_saved_as_a_whole_is_read(p4, monkeypatch):
  model, params, state = p4
  tree = {}
  for name, array in state.items():
    *path, last = name.split(".")
    node = tree
    for part in path:
      node = node.setdefault(part, {})
    node[last] = array

  def built(node, **attributes):
    children = {name: built(child) for name, child in node.items() if isinstance(child, dict)}
    tensors = {name: array for name, array in node.items() if not isinstance(array, dict)}
    return module("EqM", children, tensors | {"bias_that_is_none": None}, **attributes)

  whole = module("DistributedDataParallel", {"module": built(tree, num_heads=3, uncond=True, ebm="dot")}, {})
  monkeypatch.setattr(torch_pickle, "read", lambda path: {"model": whole})
  loaded = eqm_jax.load(P4)
  assert loaded.model == model.clone(energy="dot")
  assert_same_bits(loaded.params, params)


def test_export_writes_safetensors_by_the_suffix(reference, tmp_path):
  pretrained = eqm_jax.load(reference.checkpoint, num_heads=reference.heads)
  model = pretrained.model.clone(**({"energy": "l2"} if reference.name == "eqm_tiny" else {"time_input": True}))
  eqm_jax.export_reference(tmp_path / "out.safetensors", model, pretrained.params)
  tensors = safetensors_file.read((tmp_path / "out.safetensors").read_bytes())
  original = state_of(reference.checkpoint, "ema")
  assert set(tensors) == set(original)
  for name, tensor in original.items():
    np.testing.assert_array_equal(tensors[name], tensor.numpy(), strict=True)
  for weights in ("ema", "model"):
    again = eqm_jax.load(tmp_path / "out.safetensors", weights)  # no attribute must be passed
    assert again.model == model
    assert_same_bits(again.params, pretrained.params)


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_an_energy_that_the_authors_lack_is_not_exported(name, tmp_path, p4):
  model, params, _ = p4
  with pytest.raises(ValueError, match="no such energy"):
    eqm_jax.export_reference(tmp_path / name, model.clone(energy="scalar"), params)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", [{"qk_norm": True}, {"norm": "rms"}, {"mlp": "swiglu"}, {"rope": True}], ids=str)
def test_a_block_that_the_authors_lack_is_not_exported(option, tmp_path, p4):
  model, params, _ = p4
  ((name, value),) = option.items()
  with pytest.raises(ValueError, match=rf"model\.{name} = {value!r}: .*no such option.*save_pretrained"):
    eqm_jax.export_reference(tmp_path / "x.pt", model.clone(**option), params)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  "asked, text",
  [
    ({"width": 96, "depth": 2}, "width is 24 in the file, but 96 is asked for; depth is 3 in the file, but 2"),
    ({"num_classes": 1000}, "num_classes is 7 in the file, but 1000 is asked for .*label_embed/embedding has shape"),
    ({"patch_size": 2}, "patch_size is 4 in the file, but 2 is asked for"),
    ({"learn_sigma": True}, "learn_sigma is False in the file, but True"),
    ({"num_heads": 2}, "num_heads is 3 in the file, but 2"),
    ({"energy": "scalar"}, "energy is 'none' in the file, but 'scalar'"),
    ({"input_size": 32}, "input_size is 16 in the file, but 32"),
    ({"qk_norm": True}, "qk_norm is False in the file, but True .*blocks/qk_norm/scale has shape absent"),
    ({"mlp": "swiglu"}, "mlp is 'gelu' in the file, but 'swiglu'"),
  ],
)
def test_the_attribute_that_differs_is_named(asked, text, p4, tmp_path):
  model, params, state = p4
  torch_pickle.write(tmp_path / "a.pt", {"ema": state}, {"num_heads": 3})
  with pytest.raises(ValueError, match=rf"a\.pt: {text}"):
    eqm_jax.load(tmp_path / "a.pt", **asked)


def test_heads_that_do_not_divide_the_width_are_refused():
  with pytest.raises(ValueError, match="width is 24 in the file, which num_heads = 5 does not divide"):
    eqm_jax.load(P4, num_heads=5)


def test_overrides_that_do_not_fit_are_refused(reference):
  with pytest.raises(ValueError, match="did you mean num_heads"):
    eqm_jax.load(reference.checkpoint, num_head=4)
  with pytest.raises(ValueError, match="'best'"):
    eqm_jax.load(reference.checkpoint, weights="best")


def test_published_sizes_need_no_heads():
  assert convert._published_heads(28, 1152) == 16 and convert._published_heads(12, 384) == 6
