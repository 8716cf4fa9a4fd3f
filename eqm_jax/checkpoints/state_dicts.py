"""The sets of weights in a checkpoint of another program, and which of them to take.

Training scripts save a state dict alone or anywhere among other objects, once or several times (an average beside the
model), and under names that each wrapper of the network has lengthened.
"""

import dataclasses
import json
import logging
import os
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from eqm_jax.checkpoints import inert, safetensors_file, torch_pickle

# Parts of names that wrappers add, at the front or around any module within: parallel and compiled networks, averages.
WRAPPERS = {"module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
AVERAGE = re.compile(r"(^|[^a-z])ema|ema($|[^a-z])|averag|swa|polyak|shadow")  # in a lower-case name
ARGUMENTS = ("args", "config", "cfg", "hparams", "hyper_parameters")  # keys of a script's own settings
INDEX = ".index.json"  # of a model in several files
IN_DIRECTORY = [
  name + suffix
  for name in ("model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin")
  for suffix in ("", INDEX)
]
PACKED = "._packed_params._packed_params"  # (weight, bias) of a layer that PyTorch has quantized
DEPTH = 6  # of nested containers

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class StateDict:
  """One set of weights."""

  title: str  # the keys that lead to it, as the file has them
  key: str  # without what wrappers add; "" for the only set of a file that is a state dict
  tensors: dict[str, Any]  # by the network's own names; without wrappers'
  attributes: dict[str, Any]  # of a network that was saved as a whole


def read(path: str | os.PathLike) -> Any:
  """The objects of a .pt or .safetensors file, or of the files that an index (`.index.json`) names.

  Raises:
    ValueError: naming the file, if one is damaged or missing.
  """
  path = os.fspath(path)
  if path.endswith(INDEX):
    return _read_parts(path)
  if not safetensors_file.is_safetensors(path):
    return torch_pickle.read(path)
  with open(path, "rb") as file:
    content = file.read()
  try:
    tensors = safetensors_file.read(content)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error
  found = safetensors_file.metadata(content)
  return {**found, **tensors, "args": {**found, **inert.attributes(found.get("args"))}}


def _read_parts(path: str) -> dict[str, Any]:
  try:
    with open(path, encoding="utf-8") as file:
      names = sorted({os.path.basename(name) for name in json.load(file)["weight_map"].values()})
  except (ValueError, LookupError, TypeError, AttributeError) as error:
    raise ValueError(f"{path}: not the index of a model in several files ({error}): fetch it again") from error
  contents: dict[str, Any] = {}
  for name in names:
    part = os.path.join(os.path.dirname(path), name)
    if not os.path.isfile(part):
      raise ValueError(f"{path}: its file {name} is missing: put all {len(names)} beside it")
    contents |= read(part)
  return contents


def in_directory(path: str) -> str | None:
  """The file in which other programs keep the weights of a directory; None if there is none."""
  return next((os.path.join(path, name) for name in IN_DIRECTORY if os.path.isfile(os.path.join(path, name))), None)


def is_tensor(value: Any) -> bool:
  if isinstance(value, inert.Array):
    return value.flat is not None
  return isinstance(value, torch_pickle.Tensor | np.ndarray)


def as_array(value: Any) -> np.ndarray:
  """The numbers of a tensor, of whichever file."""
  return value if isinstance(value, np.ndarray) else value.numpy()


def arguments(contents: Any) -> dict[str, Any]:
  """Settings that a training script recorded."""
  found = {}
  for key in ARGUMENTS:
    found = {**inert.attributes(inert.attributes(contents).get(key)), **found}
  return found


def choose(found: list[StateDict], weights: str, path: str | os.PathLike) -> StateDict:
  """One of the sets of a file.

  Args:
    found: the sets.
    weights: "ema" or "model", or the keys that lead to a set, joined by dots. Without a set of that name, the only
      average is taken for "ema", the only other one for "model", and the only one in the file for both.
    path: of the file, for messages.

  Raises:
    ValueError: if several, or none, could be meant.
  """
  possible = [one for one in found if weights in (one.title, one.key)]
  exact = bool(possible)
  if not exact and weights in ("ema", "model"):
    same = len(os.path.commonprefix([one.key.split(".") for one in found]))  # keys that all have tell nothing
    distinct = [".".join(one.key.split(".")[same:]) for one in found]
    is_average = [bool(AVERAGE.search(key.lower())) for key in distinct]
    possible = [one for one, average in zip(found, is_average) if average == (weights == "ema")] or found
  if len(possible) != 1:
    titles = ", ".join(repr(one.title or "model") for one in found)
    raise ValueError(
      f"{path}: has no weights that only {weights!r} could mean; it has {titles}: give one of these names as `weights`"
    )
  if not exact and possible[0].key:
    log.warning("%s: has no weights under %r; took the ones under %r", path, weights, possible[0].title)
  return possible[0]


def find(contents: Any, anchor: str) -> list[StateDict]:
  """All sets of weights in a file that have the tensor `anchor`, wherever they are."""
  found = []
  for keys, container, attributes in _containers(contents, (), frozenset()):
    prefixes = {prefix for prefix in (_prefix(name, anchor) for name in container) if prefix is not None}
    for prefix in sorted(prefixes):
      longer = tuple(other for other in prefixes if other != prefix and other.startswith(prefix))
      tensors = {
        _unwrapped(name.removeprefix(prefix)): value
        for name, value in container.items()
        if name.startswith(prefix) and not (longer and name.startswith(longer))
      }
      title = ".".join((*keys, prefix.rstrip("."))).strip(".")
      found.append(StateDict(title, _unwrapped(title), tensors, attributes))
  # Tables of shapes or types have the weights' names, too. Parts of sharded tensors are left for the error.
  return [one for one in found if is_tensor(one.tensors[anchor])] or found


def _containers(value: Any, keys: tuple[str, ...], parents: frozenset) -> Iterator[tuple[tuple[str, ...], dict, dict]]:
  """Of each container with tensors: the keys that lead to it, {name: tensor or unknown object}, and attributes."""
  if len(keys) > DEPTH or id(value) in parents:
    return
  attributes = inert.attributes(value)
  if "_modules" in attributes:  # a network saved as a whole
    attributes = _within_wrappers(attributes)
    yield keys, dict(_module_tensors(attributes, "")), attributes
    return
  items = dict(enumerate(value)) if isinstance(value, list | tuple) else attributes
  tensors = {}
  for name, item in items.items():
    if isinstance(name, str) and (is_tensor(item) or isinstance(item, inert.Inert)):
      tensors[name] = item
    elif str(name).endswith(PACKED) and isinstance(item, tuple):
      tensors |= zip((name.replace(PACKED, end) for end in (".weight", ".bias")), item)
  if tensors:
    yield keys, tensors, {}
  for name, item in items.items():
    if isinstance(item, dict | list | tuple | inert.Inert):
      yield from _containers(item, (*keys, str(name)), parents | {id(value)})


def _within_wrappers(module: dict[str, Any]) -> dict[str, Any]:
  inner = next((child for name, child in inert.attributes(module["_modules"]).items() if name in WRAPPERS), None)
  inner = inert.attributes(inner)
  return _within_wrappers(inner) if "_modules" in inner else module


def _module_tensors(module: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
  """(name, tensor) of a pickled network and of those within."""
  for kind in ("_parameters", "_buffers"):
    for name, value in inert.attributes(module.get(kind)).items():
      if value is not None:
        yield f"{prefix}{name}", value
  for name, child in inert.attributes(module.get("_modules")).items():
    yield from _module_tensors(inert.attributes(child), f"{prefix}{name}.")


def _prefix(name: str, anchor: str) -> str | None:
  """The part of a name before `anchor`, whatever wrappers stand within; None for another name."""
  parts = name.split(".")
  for expected in reversed(anchor.split(".")):
    while parts and parts[-1] in WRAPPERS:
      parts.pop()
    if not parts or parts.pop() != expected:
      return None
  return "".join(f"{part}." for part in parts)


def _unwrapped(name: str) -> str:
  return ".".join(part for part in name.split(".") if part not in WRAPPERS)
