"""Configs hold no dead key: each is read by the code that a run goes through."""

import collections
import pathlib
import re

import jax
import ml_collections
import numpy as np
import pytest
from conftest import ROOT, load_config

from eqm_jax.data import sources
from eqm_jax.evaluation import evaluate
from eqm_jax.networks import dit
from eqm_jax.training import pretrained, sharding, train


def small_imagenet(directory: pathlib.Path) -> ml_collections.ConfigDict:
  """The ImageNet config with its sizes cut, on latents written here."""
  config = load_config("imagenet256", "XL/2")
  rng = np.random.default_rng(0)
  np.save(directory / "mean.npy", rng.normal(size=(24, 2, 8, 8, 4)).astype(np.float16))
  np.save(directory / "logvar.npy", rng.normal(size=(24, 2, 8, 8, 4)).astype(np.float16) - 4)
  np.save(directory / "label.npy", np.arange(24) * 40)
  config.data.options.path = str(directory)
  config.model.update(input_size=8, width=16, depth=2, num_heads=2)
  config.train.update(steps=3, batch_size=8)
  config.checkpoint.every = 2
  config.evaluation.update(samples=10, batch_size=8)
  for row in config.samplers.values():
    row.max_evaluations = 4
  return config


def small_digits(directory: pathlib.Path) -> ml_collections.ConfigDict:
  config = load_config("digits", "smoke")
  config.model.update(width=16, depth=1, num_heads=2)
  config.train.update(steps=3, batch_size=8)
  config.optimizer.warmup_steps = 1
  config.evaluation.update(samples=10, batch_size=10)
  return config


def leaves(config: ml_collections.ConfigDict, prefix: str = "") -> dict[str, tuple[int, str]]:
  """{"model.width": (identity of the section, "width")} for every key that holds no section."""
  found = {}
  for key, value in config.items():
    if isinstance(value, ml_collections.ConfigDict):
      found |= leaves(value, f"{prefix}{key}.")
    else:
      found[prefix + key] = (id(config), key)
  return found


@pytest.mark.parametrize("small", [small_digits, small_imagenet])
def test_every_key_is_read_by_a_run(small, tmp_path, monkeypatch):
  config = small(tmp_path)
  keys = leaves(config)
  reads = collections.Counter()
  original = ml_collections.ConfigDict.__getitem__

  def recorded(self, key):
    reads[id(self), key] += 1
    return original(self, key)

  monkeypatch.setattr(ml_collections.ConfigDict, "__getitem__", recorded)
  config.to_json()
  reads.clear()  # whatever lists all keys proves nothing

  workdir = str(tmp_path / "run")
  assert train.train(config, workdir)
  trained = pretrained.load(workdir, weights=config.evaluation.weights)
  source = sources.open_source(config.data.source, {**config.data.options})
  mesh = sharding.make_mesh(**config.mesh)
  report = evaluate.evaluate(config, trained.model, trained.params, source, mesh, str(tmp_path / "evaluation"))
  assert set(report["rows"]) == set(config.samplers)
  assert all(np.isfinite(row["frechet"]) for row in report["rows"].values())
  # main reads this one, before it calls the evaluation.
  dead = [name for name, key in keys.items() if not reads[key]]
  assert not dead, f"keys that nothing reads: {dead}"


def test_a_key_that_nothing_reads_would_be_found(tmp_path):
  config = small_digits(tmp_path)
  config.train.dead = 1
  assert "train.dead" in leaves(config)


@pytest.mark.parametrize("size", dit.SIZES)
@pytest.mark.parametrize("patch", [2, 4, 8])
def test_imagenet_variants_are_the_published_sizes(size, patch):
  model = dit.DiT(**load_config("imagenet256", f"{size}/{patch}").model)
  assert (model.depth, model.width, model.num_heads, model.patch_size) == (*dit.SIZES[size], patch)
  assert jax.eval_shape(lambda: None) is None and model.input_shape == (32, 32, 4)


@pytest.mark.parametrize("name, variant", [("digits", "big"), ("imagenet256", "H/14"), ("imagenet256", "XL")])
def test_unknown_variants_are_refused(name, variant):
  with pytest.raises(ValueError, match=re.escape(repr(variant))):
    load_config(name, variant)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.name)
def test_the_docstring_tells_command_hardware_and_result(path):
  text = path.read_text(encoding="utf-8")
  for word in ("Command:", f"--config=configs/{path.name}", "Hardware:", "Expected:"):
    assert word in text.split('"""')[1], word
