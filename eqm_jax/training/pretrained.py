"""Models as files: reading whatever holds one, and writing the exported directory."""

import dataclasses
import difflib
import os
import shutil
from typing import Any

import ml_collections

from eqm_jax.convert import autoencoder as convert_autoencoder
from eqm_jax.convert import reference
from eqm_jax.data.codec import Codec
from eqm_jax.files import read_json, write_json
from eqm_jax.networks import autoencoder, dit
from eqm_jax.training import checkpoint

CONFIG = "config.json"
PARAMS = "params"


@dataclasses.dataclass(frozen=True)
class Pretrained:
  """A model with its weights."""

  model: dit.DiT
  params: dict[str, Any]  # nested dict of arrays
  config: dict[str, Any]  # what the model was built with: DiT(**config) == model
  # Of a model of latents: `name` and `sha256` of the autoencoder they are of; None for pixels, and where nobody knows.
  autoencoder: dict[str, str] | None = None
  step: int | None = None  # of the training run's checkpoint; None where the file does not tell


def load(path: str | os.PathLike, weights: str = "ema", **overrides: Any) -> Pretrained:
  """Loads a model.

  Args:
    path: a training workdir (its newest checkpoint), one of its checkpoints
      (WORKDIR/checkpoints/STEP), a directory of `save_pretrained`, or a .pt file of the authors' code.
    weights: "ema" or "model". An exported directory and a bare state dict hold one
      set, which both names give.
    **overrides: attributes of `DiT`, such as `dtype`, `unroll`, or what a .pt file
      cannot tell: `num_heads`.

  Raises:
    ValueError: if `path` is none of these, is damaged, or does not fit the overrides.
  """
  path = os.fspath(path)
  if weights not in ("ema", "model"):
    raise ValueError(f"weights = {weights!r} is neither 'ema' nor 'model'")
  _check_names(overrides, "override")
  if os.path.isfile(path):
    model, params = reference.load(path, weights, overrides)
    identity = step = None
  else:
    path, step = _split_checkpoint(path)
    config_path = os.path.join(path, CONFIG)
    if not os.path.isfile(config_path):
      raise ValueError(
        f"{path}: no such model: expected a training workdir or an exported directory (with {CONFIG}), or a .pt file"
      )
    config = read_json(config_path)
    if not isinstance(config, dict) or not set(config.get("model", ())) >= set(_required()):
      raise ValueError(f"{config_path}: not the config of a model: its section 'model' needs {', '.join(_required())}")
    _check_names(config["model"], config_path)
    model = dit.DiT(**{**config["model"], **overrides})
    identity = recorded_autoencoder(config)
    shapes = dit.parameter_shapes(model)
    if os.path.isdir(os.path.join(path, PARAMS)):
      params = checkpoint.read_tree(os.path.join(path, PARAMS), shapes)
    else:
      params, step = checkpoint.restore_params(path, "ema_params" if weights == "ema" else "params", shapes, step)
  return Pretrained(model, params, dit.attributes(model), identity, step)


def save_pretrained(path: str | os.PathLike, model: dit.DiT, params: Any, *, autoencoder: dict[str, str] | None = None):
  """Writes the exported directory: `params/`, an Orbax PyTree, and `config.json`.

  Orbax alone reads the parameters:
  `orbax.checkpoint.StandardCheckpointer().restore(path / "params")`.

  Args:
    path: a new or empty directory.
    model, params: the model.
    autoencoder: of a model of latents, `Pretrained.autoencoder`, so that nobody decodes with another one.

  Raises:
    ValueError: if `path` exists and is not an empty directory.
  """
  config = {"model": dit.attributes(model)} | ({"autoencoder": autoencoder} if autoencoder else {})
  _write(os.fspath(path), config, params)


def load_autoencoder(path: str, **overrides: Any) -> tuple[autoencoder.Autoencoder, Any]:
  """Loads an autoencoder: a directory of `save_autoencoder`, or what `convert.autoencoder.load` reads.

  Raises:
    ValueError: if `path` is neither, or is damaged.
  """
  if not os.path.isdir(os.path.join(path, PARAMS)):
    return convert_autoencoder.load(path, **overrides)
  config_path = os.path.join(path, CONFIG)
  config = read_json(config_path)
  known = autoencoder.attributes(autoencoder.Autoencoder())
  if not isinstance(config, dict) or set(config.get("autoencoder_model", ())) != set(known):
    raise ValueError(f"{config_path}: not the config of an autoencoder")
  attributes = config["autoencoder_model"]
  attributes["block_out_channels"] = tuple(attributes["block_out_channels"])
  module = autoencoder.Autoencoder(**{**attributes, **overrides})
  return module, checkpoint.read_tree(os.path.join(path, PARAMS), autoencoder.parameter_shapes(module))


def save_autoencoder(path: str, module: autoencoder.Autoencoder, params: Any):
  """Writes a directory: `params/`, an Orbax PyTree, and `config.json`.

  Raises:
    ValueError: if `path` exists and is not an empty directory.
  """
  _write(path, {"autoencoder_model": autoencoder.attributes(module)}, params)


def open_codec(options: ml_collections.ConfigDict) -> Codec | None:
  """The autoencoder of a config's section `autoencoder`; None where its `path` is empty.

  Raises:
    ValueError: if it is not there, is damaged, or is not the one of `options.sha256`.
  """
  if not options.path:
    return None
  if options.dtype not in ("float32", "bfloat16"):
    raise ValueError(f"autoencoder.dtype = {options.dtype!r} is neither 'float32' nor 'bfloat16'")
  codec = Codec(*load_autoencoder(options.path, dtype=options.dtype), options.name, options.batch_size)
  if not options.name or options.sha256 not in ("", codec.identity["sha256"]):
    raise ValueError(
      f"{options.path} has sha256 {codec.identity['sha256']}, but autoencoder.name = {options.name!r} and "
      f"autoencoder.sha256 = {options.sha256!r}: give a name, and the sha256 or nothing"
    )
  return codec


def recorded_autoencoder(config: dict[str, Any]) -> dict[str, str] | None:
  """Which autoencoder's latents a saved config speaks of."""
  recorded = config.get("autoencoder", {})
  return {name: recorded[name] for name in ("name", "sha256")} if recorded.get("sha256") else None


def _split_checkpoint(path: str) -> tuple[str, int | None]:
  """WORKDIR/checkpoints/STEP as (WORKDIR, STEP); another path as (path, None)."""
  directory, step = os.path.split(path.rstrip("/"))
  if os.path.basename(directory) == checkpoint.DIRECTORY and step.isdigit():
    return os.path.dirname(directory), int(step)
  return path, None


def _write(path: str, config: dict[str, Any], params: Any):
  if os.path.exists(path) and (not os.path.isdir(path) or os.listdir(path)):
    raise ValueError(f"{path} exists and is not empty: choose another directory, or remove it first")
  partial = path.rstrip("/") + ".partial"  # a killed process leaves this one, not half a model
  shutil.rmtree(partial, ignore_errors=True)
  os.makedirs(partial)
  checkpoint.write_tree(os.path.join(partial, PARAMS), params)
  write_json(os.path.join(partial, CONFIG), config)
  os.replace(partial, path)


def _check_names(attributes: dict[str, Any], where: str):
  known = [field.name for field in dit.attribute_fields()]
  for name in attributes:
    if name not in known:
      near = difflib.get_close_matches(name, known, 1)
      hint = f", did you mean {near[0]}?" if near else "."
      raise ValueError(f"{where}: {name} is not an attribute of the model{hint} Known: {', '.join(known)}")


def _required() -> list[str]:
  return [field.name for field in dit.attribute_fields() if field.default is dataclasses.MISSING]
