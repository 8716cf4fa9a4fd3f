"""Models as files: reading whatever holds one, and writing the exported directory."""

import dataclasses
import difflib
import os
from typing import Any

from eqm_jax.convert import reference
from eqm_jax.files import read_json, write_json
from eqm_jax.networks import dit
from eqm_jax.training import checkpoint

CONFIG = "config.json"
PARAMS = "params"


@dataclasses.dataclass(frozen=True)
class Pretrained:
  """A model with its weights."""

  model: dit.DiT
  params: dict[str, Any]  # nested dict of arrays
  config: dict[str, Any]  # what the model was built with: DiT(**config) == model


def load(path: str | os.PathLike, weights: str = "ema", **overrides: Any) -> Pretrained:
  """Loads a model.

  Args:
    path: a training workdir (its newest checkpoint), a directory of
      `save_pretrained`, or a .pt file of the authors' code.
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
  else:
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
    shapes = dit.parameter_shapes(model)
    if os.path.isdir(os.path.join(path, PARAMS)):
      params = checkpoint.read_tree(os.path.join(path, PARAMS), shapes)
    else:
      params = checkpoint.restore_params(path, "ema_params" if weights == "ema" else "params", shapes)
  return Pretrained(model, params, dit.attributes(model))


def save_pretrained(path: str | os.PathLike, model: dit.DiT, params: Any):
  """Writes the exported directory: `params/`, an Orbax PyTree, and `config.json`.

  Orbax alone reads the parameters:
  `orbax.checkpoint.StandardCheckpointer().restore(path / "params")`.

  Raises:
    ValueError: if `path` exists and is not an empty directory.
  """
  path = os.fspath(path)
  if os.path.exists(path) and (not os.path.isdir(path) or os.listdir(path)):
    raise ValueError(f"{path} exists and is not empty: choose another directory, or remove it first")
  os.makedirs(path, exist_ok=True)
  checkpoint.write_tree(os.path.join(path, PARAMS), params)
  write_json(os.path.join(path, CONFIG), {"model": dit.attributes(model)})


def _check_names(attributes: dict[str, Any], where: str):
  known = [field.name for field in dit.attribute_fields()]
  for name in attributes:
    if name not in known:
      near = difflib.get_close_matches(name, known, 1)
      hint = f", did you mean {near[0]}?" if near else "."
      raise ValueError(f"{where}: {name} is not an attribute of the model{hint} Known: {', '.join(known)}")


def _required() -> list[str]:
  return [field.name for field in dit.attribute_fields() if field.default is dataclasses.MISSING]
