"""Configs hold no dead key: each is read by the code that a run goes through."""

import contextlib
import json
import pathlib
import re
from collections.abc import Iterator

import jax
import ml_collections
import numpy as np
import pytest
from conftest import ROOT, load_config, write_build
from PIL import Image

from eqm_jax import programs
from eqm_jax.evaluation import samplers
from eqm_jax.networks import dit
from eqm_jax.report import report, runs


def write_images(directory: pathlib.Path, *, size: int, classes: int = 2, images: int = 12):
  """A folder for each class, as ImageNet has them."""
  rng = np.random.default_rng(0)
  for label in range(classes):
    (directory / f"n{label:08d}").mkdir(parents=True)
    for i in range(images):
      pixels = rng.integers(0, 256, (size, size + 3, 3)).astype(np.uint8)
      Image.fromarray(pixels).save(directory / f"n{label:08d}" / f"{i}.JPEG")


def small_imagenet(directory: pathlib.Path) -> ml_collections.ConfigDict:
  """The ImageNet config with its sizes cut, on images written here and the tiny autoencoder."""
  config = load_config("imagenet256", "XL/2")
  write_images(directory / "images", size=64)
  config.prepare.options.update(path=str(directory / "images"), size=64)
  config.prepare.images_per_shard = 10
  config.data.options.path = str(directory / "latents")
  config.autoencoder.update(path=str(ROOT / "tests" / "reference" / "vae_tiny"), batch_size=4)
  config.model.update(input_size=8, width=16, depth=2, num_heads=2, num_classes=2)
  config.mesh.fsdp = 1
  config.train.update(steps=3, batch_size=8)
  config.checkpoint.every = 2
  config.evaluation.update(samples=10, batch_size=8, features=("raw",), rows=())
  config.sample.update(count=10, batch_size=8)
  for row in config.samplers.values():
    row.max_evaluations = 4
  return config


def small_cifar10(directory: pathlib.Path) -> ml_collections.ConfigDict:
  """The CIFAR-10 config on a TFDS build of two classes, written here, at 8×8 pixels."""
  write_build(directory / "tfds")
  config = load_config("cifar10", None)
  config.data.options.update(name="tiny", path=str(directory / "tfds"), size=8)
  config.model.update(input_size=8, width=16, depth=1, num_heads=2, num_classes=2)
  config.train.update(steps=3, batch_size=8)
  config.optimizer.warmup_steps = 1
  config.evaluation.update(samples=10, batch_size=10, unit=10, features=("raw",))
  config.evaluation.during_training.update(every=3, samples=10)
  config.sample.update(count=10, batch_size=10)
  for row in config.samplers.values():
    row.max_evaluations = 4
  return config


def small_photographs(directory: pathlib.Path) -> ml_collections.ConfigDict:
  config = load_config("photographs", "smoke")
  config.prepare.options.stride = 40
  config.data.options.path = str(directory / "latents")
  config.autoencoder.path = str(directory / "autoencoder")
  config.autoencoder.batch_size = 10
  config.train.update(steps=3, batch_size=8)
  config.optimizer.warmup_steps = 1
  config.evaluation.update(samples=10, batch_size=2, unit=10)
  config.evaluation.during_training.update(every=3, samples=10)
  config.sample.update(count=10, batch_size=2)
  config.tasks.update(count=10, batch_size=10)
  config.tasks.inpaint.update(settle=2, tries=1)
  return config


def small_digits(directory: pathlib.Path) -> ml_collections.ConfigDict:
  config = load_config("digits", "smoke")
  config.model.update(width=16, depth=1, num_heads=2)
  config.train.update(steps=4, batch_size=8)
  config.optimizer.warmup_steps = 1
  config.evaluation.update(samples=10, batch_size=2, unit=10)
  config.evaluation.during_training.update(every=4, samples=10)
  config.sample.update(count=10, batch_size=2)
  config.tasks.update(count=10, batch_size=10)
  config.tasks.inpaint.update(settle=2, tries=1)
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


@contextlib.contextmanager
def dead_keys(config: ml_collections.ConfigDict) -> Iterator[list[str]]:
  """Fills the list with the keys that the code inside has not read one by one.

  What lists all keys proves nothing: to_dict and to_json are not counted, and a copy
  counts for its original.
  """
  keys, reads, dead = leaves(config), set(), []
  originals = {identity: identity for identity, _ in keys.values()}
  getitem, copy = ml_collections.ConfigDict.__getitem__, ml_collections.ConfigDict.copy_and_resolve_references
  silent = []

  def recorded(self, key):
    if not silent:
      reads.add((originals.get(id(self)), key))
    return getitem(self, key)

  def quiet(function):
    def call(self, *args, **kwargs):
      silent.append(1)
      try:
        return function(self, *args, **kwargs)
      finally:
        silent.pop()

    return call

  kept = []  # alive, so that no identity is used again

  def copied(self, *args, **kwargs):
    new = quiet(copy)(self, *args, **kwargs)
    kept.append(new)
    originals[id(new)] = originals.get(id(self))
    return new

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(ml_collections.ConfigDict, "__getitem__", recorded)
    patch.setattr(ml_collections.ConfigDict, "copy_and_resolve_references", copied)
    for name in ("to_dict", "to_json", "update", "items"):
      patch.setattr(ml_collections.ConfigDict, name, quiet(getattr(ml_collections.ConfigDict, name)))
    yield dead
  dead += [name for name, key in keys.items() if key not in reads]


TASKS = ("denoise", "ood", "compose", "inpaint")


@pytest.mark.parametrize(
  "small, modes",
  [
    pytest.param(small_photographs, ("denoise", "inpaint"), id="photographs", marks=pytest.mark.slow),
    pytest.param(small_digits, (), id="digits", marks=pytest.mark.slow),
    pytest.param(small_digits, TASKS, id="digits, tasks", marks=pytest.mark.slow),
    pytest.param(small_imagenet, (), id="imagenet256", marks=pytest.mark.slow),
    pytest.param(small_cifar10, (), id="cifar10", marks=pytest.mark.slow),
  ],
)
def test_every_key_is_read_by_a_run(small, modes, tmp_path):
  config = small(tmp_path)
  with dead_keys(config) as dead:
    for mode in ("train", "sample", *modes):
      programs.run(mode, config, str(tmp_path / "run"), None)
    # A row reads the keys of its own kind: one that integrates with step control besides those that descend.
    model = dit.DiT(**config.model)
    batching = samplers.Batching(8, jax.random.key(0), 4.0)
    for row in config.samplers.values():
      other = row.copy_and_resolve_references()
      other.update(rule="heun", tolerance=1e-3)
      samplers.check("other", other, model, batching)
  if "inception" not in config.evaluation.features:
    dead = [key for key in dead if not key.startswith("evaluation.inception.")]
  if config.autoencoder.path == "":  # samples are pixels
    dead = [key for key in dead if not key.startswith("autoencoder.")]
  dead = [key for key in dead if modes == TASKS or not key.startswith("tasks.")]
  dead = [key for key in dead if not key.startswith("benchmark.")]  # tests/benchmark reads them
  assert not dead, f"keys that nothing reads: {dead}"
  report = json.loads((tmp_path / "run" / "evaluation" / "evaluation.json").read_text())
  assert set(report["rows"]) == set(config.evaluation.rows or config.samplers)
  for row in report["rows"].values():
    assert all(np.isfinite(found["frechet"]) for found in row["scores"].values())


@pytest.mark.slow  # CI runs the whole report in its short form
def test_every_key_of_the_report_is_read(tmp_path, monkeypatch):
  monkeypatch.setattr(runs, "CHANGES", {name: runs.CHANGES[name] for name in ("eqm", "flow_matching")})
  monkeypatch.setattr(report, "CLAIMS", {"denoising": report.CLAIMS["denoising"]})
  config = load_config("report", "quick")
  config.model.width = 16
  config.train.steps = 2
  config.optimizer.warmup_steps = 1
  config.report.update(samples=20, batch_size=20, held_out=20, evaluations=4)
  with dead_keys(config) as dead:
    programs.run("report", config, str(tmp_path), None)
  assert not [key for key in dead if key.startswith("report.")]


@pytest.mark.parametrize(
  "name, variant",
  [
    ("imagenet256", "XL/2"),
    ("imagenet256", "B/4-online"),
    ("imagenet256", "S/8-tfds"),
    ("imagenet512", "XL/2"),
    ("imagenet512", "XL/2-online"),
    ("toy2d", "two_moons"),
    ("mnist", ""),
    ("mnist", "28"),
    ("cifar10", None),
    ("photographs", ""),
    ("photographs", "online"),
  ],
)
def test_configs_have_the_keys_of_the_digits(name, variant):
  """So what is read of one is read of all; samplers, what the source takes and what is prepared are their own."""
  own = ("data.options.", "samplers.", "prepare.")
  ours, theirs = (set(leaves(load_config(*which))) for which in ((name, variant), ("digits", "")))
  assert {key for key in ours ^ theirs if not key.startswith(own)} == set()


def test_a_key_that_nothing_reads_is_found():
  config = load_config("digits", "smoke")
  config.train.dead, config.samplers.gd.dead = 1, 2
  with dead_keys(config) as dead:
    config.to_json(), config.samplers.gd.to_dict()
    config.train.steps, config.samplers.gd.copy_and_resolve_references().rule  # noqa: B018
  assert {"train.dead", "samplers.gd.dead"} <= set(dead)
  assert "train.steps" not in dead and "samplers.gd.rule" not in dead


@pytest.mark.parametrize("size", dit.SIZES)
@pytest.mark.parametrize("patch", [2, 4, 8])
def test_imagenet_variants_are_the_published_sizes(size, patch):
  model = dit.DiT(**load_config("imagenet256", f"{size}/{patch}").model)
  assert (model.depth, model.width, model.num_heads, model.patch_size) == (*dit.SIZES[size], patch)
  assert model.input_shape == (32, 32, 4)


@pytest.mark.parametrize(
  "name, variant",
  [
    ("digits", "big"),
    ("imagenet256", "H/14"),
    ("imagenet256", "XL"),
    ("imagenet256", "B/2-offline"),
    ("mnist", "14"),
    ("photographs", "large"),
    ("toy2d", "three_moons"),
    ("toy2d", "two_moons-big"),
    ("report", "long"),
  ],
)
def test_unknown_variants_are_refused(name, variant):
  with pytest.raises(ValueError, match=re.escape(repr(variant))):
    load_config(name, variant)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.name)
def test_the_docstring_tells_command_hardware_and_result(path):
  text = path.read_text(encoding="utf-8")
  for word in ("Command:", f"--config=configs/{path.name}", "Hardware:", "Expected:"):
    assert word in text.split('"""')[1], word
