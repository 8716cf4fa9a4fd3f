"""The modes of the command line, one file each, and the checks that all of them share.

A mode's file declares `MODE = Mode(...)`: what it does, what it writes, and what it needs. Declarations are read from
the text of the files, so that help and checks import neither JAX nor the mode.
"""

import ast
import dataclasses
import errno
import functools
import importlib
import os
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from eqm_jax import io

if TYPE_CHECKING:
  import ml_collections

NAMES = (
  "prepare",
  "train",
  "evaluate",
  "statistics",
  "sample",
  "denoise",
  "ood",
  "compose",
  "inpaint",
  "readout",
  "report",
  "benchmark",
  "plan",
)


@dataclasses.dataclass(frozen=True)
class Mode:
  """Declaration of a mode. In its file all arguments but `run` are literals."""

  name: str
  summary: str  # one line
  writes: str  # files, relative to the workdir where nothing else is said
  run: Callable[..., None]  # (config, workdir, **flags)
  checkpoint: str  # "needs" a model: that of --checkpoint, else the workdir's; "takes" one; or "none"
  processes: str  # "one", or "many" that share the work
  flags: tuple[str, ...] = ()  # further flags that it takes
  needs_devices: bool = True  # False: it runs in one process on any machine, whatever devices that has
  checkpoint_hint: str = ""  # with "none": what takes the place of a checkpoint

  @property
  def all_flags(self) -> tuple[str, ...]:
    """The flags that it takes besides --config and --workdir."""
    return self.flags if self.checkpoint == "none" else ("checkpoint", *self.flags)


@functools.cache
def declaration(name: str) -> Mode:
  """Declaration of a mode, read without importing its module; `run` imports it."""
  if name not in NAMES:
    raise ValueError(f"mode = {name!r} must be one of {', '.join(NAMES)}")
  tree = ast.parse(pathlib.Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8"))
  assigned = {ast.unparse(node.targets[0]): node.value for node in tree.body if isinstance(node, ast.Assign)}
  literals = {item.arg: ast.literal_eval(item.value) for item in assigned["MODE"].keywords if item.arg != "run"}
  return Mode(**literals, run=functools.partial(_import_and_run, name))


def _import_and_run(name: str, *arguments, **flags):
  importlib.import_module(f"{__name__}.{name}").MODE.run(*arguments, **flags)


def run(mode: str, config: "ml_collections.ConfigDict", workdir: str, checkpoint: str | None = None, **flags: Any):
  """Runs a mode.

  Args:
    mode: one of `NAMES`.
    config: a config of configs/.
    workdir: directory of the run.
    checkpoint: model to use instead of the workdir's, for modes that need or take one.
    **flags: further flags of the mode, as its declaration names them. A flag that is None or False counts as absent.

  Raises:
    ValueError: before any work, if the flags, the config or the data do not fit.
    FloatingPointError: if training diverges.
    OSError: if a file cannot be written.
  """
  declared = declaration(mode)
  flags = {name: value for name, value in {"checkpoint": checkpoint, **flags}.items() if value not in (None, False)}
  for name, value in flags.items():
    _check_flag(declared, name, value)
  if not workdir or "://" in workdir:
    raise ValueError(f"--workdir={workdir} must be a directory: give one; of a bucket, where that is mounted")
  _expand_home(config)
  flags = {name: _expanded(value) for name, value in flags.items()}
  workdir = os.path.abspath(_expanded(workdir))
  if declared.checkpoint != "none":  # the others check this, or write elsewhere
    model = "" if "checkpoint" in flags else f", with --checkpoint={workdir} for the model in this one"
    io.check_writable(workdir, f"choose another --workdir{model}")
  if declared.needs_devices:
    _check_processes_and_devices(declared)
  try:
    declared.run(config, workdir, **flags)
  except OSError as error:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
      raise
    remedy = "make room, and start again; what is complete stays"
    raise OSError(f"{error.filename or workdir}: cannot be written ({error.strerror}): {remedy}") from error


def table() -> str:
  """Table of all modes: name, summary, files written."""
  import tabulate

  rows = [(mode.name, mode.summary, mode.writes) for mode in map(declaration, NAMES)]
  return tabulate.tabulate(rows, ("mode", "does", "writes"), tablefmt="simple_grid", maxcolwidths=[None, 46, 46])


def _check_flag(mode: Mode, name: str, value: Any):
  if name in mode.all_flags:
    return
  given = f"--{name}" if value is True else f"--{name}={value}"
  takers = ", ".join(f"--mode={other}" for other in NAMES if name in declaration(other).all_flags)
  if name == "checkpoint" and mode.checkpoint_hint:
    raise ValueError(f"{given}: --mode={mode.name} takes no checkpoint: {mode.checkpoint_hint}. It is for {takers}")
  raise ValueError(f"{given}: --mode={mode.name} has no such flag: leave it out. It is for {takers or 'no mode'}")


def _expand_home(section: "ml_collections.ConfigDict"):
  """Puts the home directory in place of the `~` that values of a config begin with, which are paths."""
  for name, value in section.items():
    if hasattr(value, "items"):
      _expand_home(value)
    elif (expanded := _expanded(value)) != value:
      section[name] = expanded


def _expanded(value: Any) -> Any:
  if isinstance(value, list | tuple):
    return type(value)(map(_expanded, value))
  return os.path.expanduser(value) if isinstance(value, str) else value


def _check_processes_and_devices(mode: Mode):
  from eqm_jax import distributed

  distributed.check_devices()
  _, processes = distributed.process_index_and_count()
  if processes > 1 and mode.processes == "one":
    raise ValueError(
      f"--mode={mode.name} runs in one process, not in {processes}: start it once, with "
      "--num_processes=1. Several share the work of "
      + ", ".join(f"--mode={other}" for other in NAMES if declaration(other).processes == "many")
    )
