"""Models as files: loading one from a workdir, an exported directory or a .pt file, and exporting one."""

import dataclasses
import difflib
import os
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any, overload

import jax

from eqm_jax import checks
from eqm_jax.checkpoints import eqm_torch, manager, sd_vae, state_dicts
from eqm_jax.equilibrium.energy import Energy, energy
from eqm_jax.equilibrium.field import BoundField, Field, field
from eqm_jax.equilibrium.noise_level import NoiseReadout
from eqm_jax.equilibrium.pytrees import ShortRepr
from eqm_jax.io import read_json, write_json
from eqm_jax.networks import autoencoder, dit

CONFIG = "config.json"
PARAMS = "params"
SHIPPED = pathlib.Path(__file__).parents[1] / "weights"  # installed with the package: exported directories, by name


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Pretrained(ShortRepr):
  """A model with its weights."""

  model: dit.DiT
  params: dict[str, Any]  # nested dict of arrays
  config: dict[str, Any]  # what the model was built with: DiT(**config) == model
  # For a model of latents, `name` and `sha256` of their autoencoder; None for pixels, and where no file records it.
  autoencoder: dict[str, str] | None = None
  step: int | None = None  # of the training run's checkpoint; None where the file does not record it
  class_names: tuple[str, ...] | None = None  # of the labels, in their order; None where no file records them

  @overload
  def field(self, labels: None = None, guidance: float | jax.Array = 1.0, **options: Any) -> Field: ...

  @overload
  def field(self, labels: jax.Array, guidance: float | jax.Array = 1.0, **options: Any) -> BoundField: ...

  def field(
    self,
    labels: jax.Array | None = None,
    guidance: float | jax.Array = 1.0,
    *,
    form: str | None = None,
    guidance_channels: int | Sequence[int] | None = None,
    guidance_interval: tuple[float, float] | None = None,
    readout: NoiseReadout | None = None,
  ) -> Field | BoundField:
    """The field of this model: `eqm_jax.field` with its parameters."""
    return field(
      self.model,
      self.params,
      labels,
      form=form,
      guidance=guidance,
      guidance_channels=guidance_channels,
      guidance_interval=guidance_interval,
      readout=readout,
    )

  def energy(self, labels: jax.Array, form: str | None = None) -> Energy:
    """The energy of this model: `eqm_jax.energy` with its parameters."""
    return energy(self.model, self.params, labels, form)


def load(path: str | os.PathLike, weights: str = "ema", **overrides: Any) -> Pretrained:
  """Loads a model.

  Args:
    path: a training workdir (its newest checkpoint), one of its checkpoints (WORKDIR/checkpoints/STEP), a directory of
      `save_pretrained`, or a .pt or .safetensors file with the authors' network, whoever saved it; where no such path
      exists, a name of weights that come with the package: "digits".
    weights: "ema" or "model". An exported directory and a bare state dict hold one set, which both names give; of a
      file with other sets, the keys that lead to one, such as "state_dict.ema_model".
    **overrides: attributes of `DiT`, such as `dtype`, `unroll`, or `num_heads` where a .pt file lacks it.

  Raises:
    ValueError: if `path` is none of these, is damaged, or does not fit the overrides.
  """
  path = _find(os.path.expanduser(path))
  _check_names(overrides, "override")
  if file := foreign_file(path):
    model, params = eqm_torch.load(file, weights, overrides)
    return Pretrained(model, params, dit.attributes(model))
  checks.one_of("weights", weights, ("ema", "model"))
  path, step = _split_checkpoint(path)
  config = _model_config(path)
  model = dit.DiT(**{**config["model"], **overrides})
  dit.check_fits(path, dit.DiT(**config["model"]), model)
  shapes = dit.parameter_shapes(model)
  if os.path.isdir(os.path.join(path, PARAMS)):
    params = manager.read_tree(os.path.join(path, PARAMS), shapes)
  else:
    params, step = manager.restore_params(path, "ema_params" if weights == "ema" else "params", shapes, step)
  recorded = recorded_autoencoder(config), step, recorded_class_names(config)
  return Pretrained(model, params, dit.attributes(model), *recorded)


def foreign_file(path: str) -> str | None:
  """The file of another program's weights that a path is or, being no directory of this package, contains."""
  if os.path.isfile(path):
    return path
  ours = any(os.path.isdir(os.path.join(path, name)) for name in (PARAMS, manager.DIRECTORY))
  return None if ours else state_dicts.in_directory(path)


def _find(path: str) -> str:
  """The path, or the directory in the package for a name of its weights; a local path of that name wins."""
  return str(SHIPPED / path) if not os.path.exists(path) and path in shipped() else path


def shipped() -> list[str]:
  """Names of the weights that come with the package."""
  return sorted(path.parent.name for path in SHIPPED.glob(f"*/{CONFIG}"))


def _model_config(path: str) -> dict[str, Any]:
  """The saved config of a workdir or exported directory, with a checked section `model`."""
  config_path = os.path.join(path, CONFIG)
  if not os.path.isfile(config_path):
    raise ValueError(
      f"{path}: no such model: expected a training workdir or an exported directory (with {CONFIG}), a .pt or "
      f".safetensors file, or weights of the package ({', '.join(shipped())}) where no local path has their name"
    )
  config = read_json(config_path)
  optional = dit.default_attributes()
  required = [field.name for field in dit.attribute_fields() if field.name not in optional]
  if not isinstance(config, dict) or not set(config.get("model", ())) >= set(required):
    raise ValueError(f"{config_path}: not the config of a model: its section 'model' needs {', '.join(required)}")
  _check_names(config["model"], config_path)
  return config


def save_pretrained(
  path: str | os.PathLike,
  model: dit.DiT,
  params: Any,
  *,
  autoencoder: dict[str, str] | None = None,
  class_names: Sequence[str] | None = None,
):
  """Writes the exported directory: `params/`, an Orbax PyTree, and `config.json`.

  Orbax alone reads the parameters, on any devices, by their absolute path:
  `orbax.checkpoint.StandardCheckpointer().restore(pathlib.Path(path).absolute() / "params")`.

  Args:
    path: a new or empty directory.
    model, params: the model.
    autoencoder: of a model of latents, `Pretrained.autoencoder`, so that latents are decoded by the same one.
    class_names: `Pretrained.class_names`, shown beside labels.

  Raises:
    ValueError: if `path` exists and is not an empty directory.
  """
  config = {"model": dit.attributes(model)} | ({"autoencoder": autoencoder} if autoencoder else {})
  config |= {"data": {"class_names": class_names}} if class_names else {}
  _write(path, config, params)


def load_autoencoder(path: str, **overrides: Any) -> tuple[autoencoder.Autoencoder, Any]:
  """Loads an autoencoder: a directory of `save_autoencoder`, or a path for `checkpoints.sd_vae.load`.

  Raises:
    ValueError: if `path` is neither, or is damaged.
  """
  path = os.path.expanduser(path)
  if not os.path.isdir(os.path.join(path, PARAMS)):
    return sd_vae.load(path, **overrides)
  config_path = os.path.join(path, CONFIG)
  config = read_json(config_path)
  known = autoencoder.attributes(autoencoder.Autoencoder())
  if not isinstance(config, dict) or set(config.get("autoencoder_model", ())) != set(known):
    raise ValueError(f"{config_path}: not the config of an autoencoder: expected the attributes {', '.join(known)}")
  attributes = config["autoencoder_model"]
  attributes["block_out_channels"] = tuple(attributes["block_out_channels"])
  module = autoencoder.Autoencoder(**{**attributes, **overrides})
  return module, manager.read_tree(os.path.join(path, PARAMS), autoencoder.parameter_shapes(module))


def save_autoencoder(path: str, module: autoencoder.Autoencoder, params: Any):
  """Writes a directory: `params/`, an Orbax PyTree, and `config.json`.

  Raises:
    ValueError: if `path` exists and is not an empty directory.
  """
  _write(path, {"autoencoder_model": autoencoder.attributes(module)}, params)


def recorded_autoencoder(config: dict[str, Any]) -> dict[str, str] | None:
  """Name and SHA-256 of the autoencoder in a saved config; None without one."""
  recorded = config.get("autoencoder", {})
  return {name: recorded[name] for name in ("name", "sha256")} if recorded.get("sha256") else None


def recorded_class_names(config: dict[str, Any]) -> tuple[str, ...] | None:
  """Names of the classes in a saved config; None without them."""
  names = config.get("data", {}).get("class_names")
  return tuple(names) if names else None


def _split_checkpoint(path: str) -> tuple[str, int | None]:
  """WORKDIR/checkpoints/STEP as (WORKDIR, STEP); another path as (path, None)."""
  directory, step = os.path.split(path.rstrip("/"))
  if os.path.basename(directory) == manager.DIRECTORY and step.isdigit():
    return os.path.dirname(directory), int(step)
  return path, None


def _write(path: str | os.PathLike, config: dict[str, Any], params: Any):
  path = os.path.expanduser(path)
  if os.path.exists(path) and (not os.path.isdir(path) or os.listdir(path)):
    raise ValueError(f"{path} exists and is not empty: choose another directory, or remove it first")
  partial = path.rstrip("/") + ".partial"  # left by a killed process, in place of an incomplete model
  shutil.rmtree(partial, ignore_errors=True)
  os.makedirs(partial)
  manager.write_tree(os.path.join(partial, PARAMS), jax.device_get(params))  # Orbax ties other arrays to their devices
  write_json(os.path.join(partial, CONFIG), config)
  os.replace(partial, path)


def _check_names(attributes: dict[str, Any], where: str):
  known = [field.name for field in dit.attribute_fields()]
  for name in attributes:
    if name not in known:
      near = difflib.get_close_matches(name, known, 1)
      hint = f", did you mean {near[0]}?" if near else "."
      raise ValueError(f"{where}: {name} is not an attribute of the model{hint} Known: {', '.join(known)}")
