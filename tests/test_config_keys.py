"""Keys of the configs that code reads: found in its syntax trees, and by runs that record what they read."""

import ast
import contextlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections
import numpy as np
import pytest
from conftest import ROOT, load_config, write_build
from PIL import Image
from test_configs import base_keys

from eqm_jax import modes as modes_lib
from eqm_jax.evaluation import features
from eqm_jax.networks import dit
from eqm_jax.sampling.generator import Generator

# Sections whose keys are read as attributes of what is made with `**section`: test_configs.py compares them.
PASSED_ON = ("model.", "objective.schedule.", "objective.gamma.", "mesh.", "prepare.fit.model.")
# Names of functions' arguments that are sections. Attributes of other names do not count as keys.
SECTIONS = {"config", "options", "_options", "requested", "row"}
METHODS = set(dir(ml_collections.ConfigDict))


class Reads:
  """Keys that source code reads of a config, found in its syntax tree.

  `config.train.steps` is followed from the name `config`, also where `options = config.train` stands before. Of an
  argument that is a section, whichever, only the last key is known: `options.steps`.
  """

  def __init__(self, keys: dict[str, Any]):
    self.keys = keys
    self.paths: set[tuple[str, ...]] = set()  # from the top
    self.last: set[tuple[str, str]] = set()  # (holder, key)
    self.missing: list[str] = []  # paths that `keys` lacks

  def read(self, source: str, file: str = ""):
    tree = ast.parse(source)
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    self._names = {name for text in texts for name in text.split(".")}  # that section[name] may read
    self._scope(tree, {}, file)

  def dead(self) -> list[str]:
    """The keys that are not read."""
    return [".".join(path) for path in _leaves(self.keys) if not self._is_read(path)]

  def _is_read(self, path: tuple[str, ...]) -> bool:
    if path in self.paths or ".".join(path).startswith(PASSED_ON):
      return True
    return any((holder, path[-1]) in self.last for holder in SECTIONS | {*path[-2:-1]})

  def _scope(self, scope: ast.AST, aliases: dict[str, tuple[str, ...]], file: str):
    nodes, rest, aliases = [], list(ast.iter_child_nodes(scope)), dict(aliases)
    while rest:
      nodes.append(rest.pop())
      if not isinstance(nodes[-1], (ast.FunctionDef, ast.Lambda)):
        rest += ast.iter_child_nodes(nodes[-1])
    for target, value in (pair for node in nodes if isinstance(node, ast.Assign) for pair in _assigned(node)):
      path = self._path(_chain(value), {})
      if isinstance(target, ast.Name) and path:
        aliases[target.id] = path
    for node in nodes:
      if isinstance(node, (ast.Attribute, ast.Subscript)):
        self._access(_chain(node), isinstance(node.ctx, ast.Load), aliases, f"{file}:{node.lineno}")
      elif isinstance(node, (ast.FunctionDef, ast.Lambda)):
        own = {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)}
        self._scope(node, {name: path for name, path in aliases.items() if name not in own}, file)

  def _path(self, chain: tuple[str, ...], aliases: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    """The keys from the top that a chain of names goes through; () where it does not start at a config."""
    if chain and chain[0] in aliases:
      return aliases[chain[0]] + chain[1:]
    for i in reversed(range(len(chain) - 1)):
      if chain[i] == "config" and chain[0] != "jax" and chain[i + 1] in self.keys:
        return chain[i + 1 :]
    return ()

  def _access(self, chain: tuple[str, ...], is_load: bool, aliases: dict[str, tuple[str, ...]], where: str):
    path, section, known = self._path(chain, aliases), self.keys, []
    if not path and len(chain) > 1 and is_load and chain[0] != "jax":
      self.last.add((chain[-2], chain[-1]))
    for key in path:
      if section is None or (key in METHODS and key not in section):
        break  # of a value, or of ConfigDict
      if key not in section and key != "[]" and "*" not in section:
        self.missing.append(f"{where}: config.{'.'.join(path)}")
        return
      known.append("*" if key not in section and "*" in section else key)
      section = section.get(known[-1])
    if is_load and known[-1:] == ["[]"]:
      self.paths |= {(*known[:-1], name) for name in self._names}
    elif is_load:
      self.paths.add(tuple(known))


def _chain(node: ast.AST) -> tuple[str, ...]:
  """("config", "train", "steps") of config.train.steps and config["train"].steps; "[]" where a variable is the key."""
  if isinstance(node, ast.Name):
    return (node.id,)
  if not isinstance(node, (ast.Attribute, ast.Subscript)):
    return ()
  name = node.attr if isinstance(node, ast.Attribute) else getattr(node.slice, "value", None)
  holder = _chain(node.value)
  return (*holder, name if isinstance(name, str) else "[]") if holder else ()


def _assigned(node: ast.Assign) -> Iterator[tuple[ast.AST, ast.AST]]:
  for target in node.targets:
    if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
      yield from zip(target.elts, node.value.elts)
    else:
      yield target, node.value


def _leaves(keys: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
  for key, value in keys.items():
    if value is None and key != "*":
      yield (*path, key)
    elif value is not None:
      yield from _leaves(value, (*path, key))


def reads_of_the_package(keys: dict[str, Any]) -> Reads:
  reads = Reads(keys)
  for path in sorted((ROOT / "eqm_jax").rglob("*.py")):
    reads.read(path.read_text(encoding="utf-8"), path.name)
  return reads


def test_code_reads_every_key_of_base_and_no_other():
  reads = reads_of_the_package(base_keys())
  assert not reads.missing, "read, but not in configs/base.py"
  assert not reads.dead(), "in configs/base.py, but never read"


def test_dead_and_missing_keys_are_found_in_the_package():
  keys = base_keys()
  keys["train"]["dead"] = keys["samplers"]["*"]["dead"] = None
  del keys["train"]["steps"], keys["evaluation"]["chunk_size"]
  reads = reads_of_the_package(keys)
  assert sorted(reads.dead()) == ["samplers.*.dead", "train.dead"]
  assert any("config.train.steps" in text for text in reads.missing)


@pytest.mark.parametrize(
  "source, dead, missing",
  [
    ("config.a.x; config.a.y", [], []),
    ("config.a.x = config.a.y", ["a.x"], []),
    ("def f(config):\n  options = config.a\n  return options.x, options['y']", [], []),
    ("def f(config):\n  a, b = config.a, 1\n  return a.x, a.z", ["a.y"], [":3: config.a.z"]),
    ("def f(options):\n  return options.x, options.y", [], []),
    ("def f(image):\n  return image.x, image.y", ["a.x", "a.y"], []),
    ("def f(config):\n  return [config.a[name] for name in ('x', 'b.z')]", ["a.y"], []),
    ("config.a.items()", ["a.x", "a.y"], []),
    ("w.config.a.x, config.a.z", ["a.y"], [":1: config.a.z"]),
    ("config.a.w = 1", ["a.x", "a.y"], [":1: config.a.w"]),
    ("jax.config.a.x", ["a.x", "a.y"], []),
  ],
)
def test_keys_that_source_code_reads(source, dead, missing):
  reads = Reads({"a": {"x": None, "y": None}})
  reads.read(source)
  assert reads.dead() == dead and reads.missing == missing


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
  config.evaluation.update(num_samples=10, batch_size=8, features=("raw",), samplers=None)
  config.sample.update(num_samples=10, batch_size=8)
  for row in config.samplers.values():
    row.max_nfe = 4
  return config


def small_cifar10(directory: pathlib.Path) -> ml_collections.ConfigDict:
  """The CIFAR-10 config on a TFDS build of two classes, written here, at 8×8 pixels."""
  write_build(directory / "tfds")
  config = load_config("cifar10")
  config.data.options.update(name="tiny", path=str(directory / "tfds"), size=8)
  config.model.update(input_size=8, width=16, depth=1, num_heads=2, num_classes=2)
  config.train.update(steps=3, batch_size=8)
  config.optimizer.warmup_steps = 1
  config.evaluation.update(num_samples=10, batch_size=10, chunk_size=10, features=("raw",))
  config.evaluation.during_training.update(every=3, num_samples=10)
  config.sample.update(num_samples=10, batch_size=10)
  for row in config.samplers.values():
    row.max_nfe = 4
  return config


def small_photographs(directory: pathlib.Path) -> ml_collections.ConfigDict:
  config = load_config("photographs", "smoke")
  config.prepare.options.stride = 40
  config.data.options.path = str(directory / "latents")
  config.autoencoder.path = str(directory / "autoencoder")
  config.autoencoder.batch_size = 10
  config.train.update(steps=3, batch_size=8)
  config.optimizer.warmup_steps = 1
  config.evaluation.update(num_samples=10, batch_size=2, chunk_size=10)
  config.evaluation.during_training.update(every=3, num_samples=10)
  config.sample.update(num_samples=10, batch_size=2)
  config.tasks.update(num_images=10, batch_size=10)
  config.tasks.inpaint.update(settle=2, tries=1)
  return config


def small_digits(directory: pathlib.Path) -> ml_collections.ConfigDict:
  config = load_config("digits", "smoke")
  config.model.update(width=16, depth=1, num_heads=2)
  config.train.update(steps=4, batch_size=8)
  config.optimizer.warmup_steps = 1
  config.evaluation.update(num_samples=10, batch_size=2, chunk_size=10)
  config.evaluation.during_training.update(every=4, num_samples=10)
  config.sample.update(num_samples=10, batch_size=2)
  config.tasks.update(num_images=10, batch_size=10)
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


TASKS = ("denoise", "ood", "compose", "inpaint", "readout")


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
      modes_lib.run(mode, config, str(tmp_path / "run"))
    # A row reads the keys of its own kind: one that integrates with step control besides those that descend.
    generator = Generator(dit.DiT(**config.model), None, jax.random.key(0), 8, 4.0)
    for row in config.samplers.values():
      other = row.copy_and_resolve_references()
      other.update(rule="heun", tolerance=1e-3)
      generator.check("other", other)
  for name in features.PUBLISHED.keys() - set(config.evaluation.features):
    dead = [key for key in dead if not key.startswith(f"evaluation.{name}.")]
  if config.autoencoder.path is None:  # samples are pixels
    dead = [key for key in dead if not key.startswith("autoencoder.")]
  dead = [key for key in dead if modes == TASKS or not key.startswith("tasks.")]
  dead = [key for key in dead if not key.startswith("benchmark.")]  # tests/benchmark reads them
  assert not dead, f"keys that nothing reads: {dead}"
  evaluation = json.loads((tmp_path / "run" / "evaluation" / "evaluation.json").read_text())
  assert set(evaluation["rows"]) == set(config.evaluation.samplers or config.samplers)
  for row in evaluation["rows"].values():
    assert all(np.isfinite(found["frechet"]) for found in row["metrics"].values())


@pytest.mark.slow  # CI runs the whole report in its short form
def test_every_key_of_the_report_is_read(tmp_path):
  config = load_config("report", "quick")
  config.model.width = 16
  config.train.steps = 2
  config.optimizer.warmup_steps = 1
  config.report.update(num_samples=20, batch_size=20, num_held_out=20, max_nfe=4)
  with config.unlocked():
    config.report.text.claims = {"denoising": config.report.text.claims.denoising}
  with dead_keys(config) as dead:
    modes_lib.run("report", config, str(tmp_path))
  assert not [key for key in dead if key.startswith("report.")]


def test_a_key_that_no_run_reads_is_found():
  config = load_config("digits", "smoke")
  config.train.dead, config.samplers.gd.dead = 1, 2
  with dead_keys(config) as dead:
    config.to_json(), config.samplers.gd.to_dict()
    config.train.steps, config.samplers.gd.copy_and_resolve_references().rule  # noqa: B018
  assert {"train.dead", "samplers.gd.dead"} <= set(dead)
  assert "train.steps" not in dead and "samplers.gd.rule" not in dead
