import jax
import numpy as np
import pytest

import eqm_jax
from eqm_jax.checkpoints import eqm_torch as convert
from eqm_jax.checkpoints import torch_pickle


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
  ],
)
def test_another_networks_state_dict_is_refused(tmp_path, reference, change, text):
  path = rewritten(reference.checkpoint, tmp_path / "other.pt", change)
  with pytest.raises(ValueError, match=text):
    eqm_jax.load(path, weights="model", num_heads=reference.heads)


def test_overrides_that_do_not_fit_are_refused(reference):
  with pytest.raises(ValueError, match="did you mean num_heads"):
    eqm_jax.load(reference.checkpoint, num_head=4)
  with pytest.raises(ValueError, match="has shape"):
    eqm_jax.load(reference.checkpoint, num_heads=reference.heads, num_classes=1000)
  with pytest.raises(ValueError, match="'best'"):
    eqm_jax.load(reference.checkpoint, weights="best")


def test_published_sizes_need_no_heads():
  assert convert._published_heads(28, 1152) == 16 and convert._published_heads(12, 384) == 6
