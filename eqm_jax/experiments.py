"""Configs by name: where their files are, their variants, and changes of their values.

A name is that of a file of configs/, with or without `.py`, or a path. A local file wins over the one that is installed
with the package: NAME.py or configs/NAME.py in the working directory.
"""

import difflib
import inspect
import os
import pathlib
import runpy
from typing import Any

import ml_collections
from ml_collections import config_dict

SECTION = (dict, ml_collections.ConfigDict)
FREE = ("options", "samplers", "claims")  # sections with keys of any name: a dict replaces them


class UnknownKeyError(AttributeError, ValueError):
  """A key that a config does not have."""


class Config(ml_collections.ConfigDict):
  """A ConfigDict that is locked, and refuses in one line what its keys do not take.

  A dict that is assigned to a section changes the keys that it names, and leaves the others.
  """

  def __setitem__(self, key: str, value: Any):
    if self.is_locked:
      _assign(self, key, value)
    else:
      super().__setitem__(key, value)

  def __repr__(self) -> str:  # a notebook shows it; that of ConfigDict has the insides of references
    return str(self)


def config(name: str, *variants: str, **overrides: Any) -> ml_collections.ConfigDict:
  """The config of an experiment, locked: a key that it does not have is refused, with the nearest one.

  Args:
    name: of a file of configs/, such as "digits", or a path; with a variant after a colon as on the command line,
      "digits:smoke".
    *variants: of that file, applied in this order.
    **overrides: values by key, **{"train.steps": 500}; a dict for a section changes the keys that it names, and
      replaces data.options and samplers, whose keys are free.

  Raises:
    ValueError: if there is no such file, variant or key, or a value does not fit its key.
  """
  path, variant = _split(find(name))
  loaded = _strict(load(path, ",".join(filter(None, [variant, *variants]))))
  for key, value in overrides.items():
    set_value(loaded, key, value)
  return loaded


def find(name: str) -> str:
  """Path of a config's file, and its variant: "digits:smoke" → "/.../configs/digits.py:smoke".

  Raises:
    ValueError: naming the configs that there are, if this is none.
  """
  given, variant = _split(name)
  path = os.path.normpath(os.path.expanduser(given))
  path += "" if path.endswith(".py") else ".py"
  folder, file = os.path.split(path)
  local = [path] if folder else [path, os.path.join("configs", file)]
  installed = [os.path.join(directory(), file)] if folder in ("", "configs") else []
  for candidate in local + installed:
    if os.path.isfile(candidate) and "get_config" in pathlib.Path(candidate).read_text(encoding="utf-8"):
      return os.path.abspath(candidate) + (f":{variant}" if variant else "")
  reason = "has no function get_config" if os.path.isfile(path) else "there is no such file"
  raise ValueError(f"config {given!r}: {reason}: give a path, or one that comes with the package: {', '.join(names())}")


def names() -> list[str]:
  """The experiments that are installed with the package."""
  return sorted(path.stem for path in pathlib.Path(directory()).glob("*.py") if path.stem != "base")


def directory() -> str:
  """The directory of the installed configs; in a checkout, its configs/."""
  package = pathlib.Path(__file__).parent
  return str(next(path for path in (package / "configs", package.parent / "configs") if (path / "base.py").is_file()))


def set_value(config: ml_collections.ConfigDict, key: str, value: Any):
  """Sets `key`, such as "train.steps".

  Raises:
    ValueError: with the whole key, if it does not exist or does not take the value.
  """
  *sections, name = key.split(".")
  holder, path = config, ""
  for part in sections:
    if part not in holder:
      raise UnknownKeyError(unknown_key(part, holder, path))
    holder, path = holder[part], f"{path}.{part}".lstrip(".")
    if not isinstance(holder, SECTION):
      raise UnknownKeyError(f"{path} is no section, but {holder!r}: it has no keys")
  _assign(holder, name, value, path)


def _assign(section: ml_collections.ConfigDict, key: str, value: Any, path: str = ""):
  """Sets a key of a section by the rules of `Config`; errors name `path`, that of the section, if it is known."""
  if key not in section:
    raise UnknownKeyError(unknown_key(key, section, path))
  current, whole = section[key], f"{path}.{key}".lstrip(".")
  if isinstance(current, SECTION) and not isinstance(value, SECTION):
    raise ValueError(f"{whole} = {value!r} must be a dict: it is a section")
  if isinstance(current, SECTION) and key not in FREE:
    for name, one in value.items():
      _assign(current, name, one, whole)
    return
  if value is None and not takes_none(section, key):
    raise ValueError(f"{whole} = None must be a value: configs/base.py has its choices")
  try:
    ml_collections.ConfigDict.__setitem__(section, key, _strict(value) if isinstance(value, SECTION) else value)
  except TypeError as error:
    raise ValueError(f"{whole} = {value!r} must be of type {section.get_type(key).__name__}") from error


def unknown_key(key: str, section: dict | ml_collections.ConfigDict, path: str) -> str:
  """Message about a key that a section of a config lacks."""
  nearest = difflib.get_close_matches(key, list(section), 1)
  remedy = f"did you mean {nearest[0]!r}? It has" if nearest else "it has"
  whole = "; to change the keys themselves, set it whole, to a dict" if path.split(".")[-1] in FREE else ""
  return f"{path or 'this section of the config'} has no key {key!r}: {remedy} {', '.join(section)}{whole}"


def takes_none(section: ml_collections.ConfigDict, key: str) -> bool:
  """Whether None is one of the values of a key: in configs/base.py those are references."""
  return isinstance(dict(section.items(preserve_field_references=True))[key], config_dict.FieldReference)


def _split(name: str) -> tuple[str, str]:
  """The file and the variant of "FILE:VARIANT"; the file may begin with a drive."""
  drive, rest = os.path.splitdrive(name)
  file, _, variant = rest.partition(":")
  return drive + file, variant


def load(path: str, variant: str) -> ml_collections.ConfigDict:
  """The config of a file, as its `get_config` makes it; `variant` is "" for that without one."""
  get_config = runpy.run_path(path)["get_config"]
  if variant and not inspect.signature(get_config).parameters:
    raise ValueError(f"{path} has no variants, but {variant!r} is asked for: leave it out")
  return get_config(variant) if variant else get_config()


def _strict(section: dict | ml_collections.ConfigDict) -> Config:
  """A locked copy of a section, all sections in it included."""
  copy = Config()
  references = {"preserve_field_references": True} if isinstance(section, ml_collections.ConfigDict) else {}
  for key, value in section.items(**references):
    copy[key] = _strict(value) if isinstance(value, SECTION) else value
  return copy.lock()
