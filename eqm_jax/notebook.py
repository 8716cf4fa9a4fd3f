"""Modes from Python, such as a notebook: what main.py is for the command line, without its flags.

Besides, what the notebooks of launch/ begin with: checks of the session, which come before JAX is imported, of Google
Drive and of files; and a slider.
"""

import base64
import contextlib
import dataclasses
import html
import importlib
import importlib.metadata
import io
import json
import logging
import os
import pathlib
import platform as python_platform
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ml_collections

import eqm_jax
from eqm_jax import experiments, hardware, modes, progress
from eqm_jax.io import read_json

if TYPE_CHECKING:
  from PIL import Image

RESULTS = (".json", ".jsonl", ".md", ".png", ".gif")  # suffixes of files that an outcome shows
NO_METRICS = ("config", "environment", "manifest", "settings", "wandb")  # names of .json files that hold none
MAX_EMBEDDED = 2**20  # bytes of a picture that becomes part of a notebook
MAX_SHOWN = 12  # pictures of an outcome

OLDEST_JAX = "0.10.2"  # as in pyproject.toml
LOADED_ONCE = ("jax", "jaxlib", "numpy", "flax", "ml_dtypes")  # modules that an installation does not change any more
RESTART = "restart the session (Colab: Runtime; Kaggle: Run) and run the cells from the first one again"
DRIVE = pathlib.Path("/content/drive")  # where Colab mounts Google Drive

log = logging.getLogger("eqm_jax")


@dataclasses.dataclass(frozen=True)
class Figure(os.PathLike):
  """A picture that a mode has written; a notebook shows it."""

  path: pathlib.Path

  def __fspath__(self) -> str:
    return str(self.path)

  def html(self) -> str:
    """The picture as part of a page, or its path if it is large."""
    name, data = html.escape(self.path.name), self.path.read_bytes()
    if len(data) > MAX_EMBEDDED:
      return f"<p>{html.escape(str(self.path))} ({len(data) / 2**20:.1f} MiB)</p>"
    source = f"data:{self._kind()};base64,{base64.b64encode(data).decode()}"
    return f'<figure><img src="{source}" alt="{name}"><figcaption>{name}</figcaption></figure>'

  def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
    text = {"text/plain": repr(self)}
    if self.path.suffix == ".gif":  # which not every notebook shows by itself
      return text | {"text/html": self.html()}
    return text | {self._kind(): base64.b64encode(self.path.read_bytes()).decode()}

  def _kind(self) -> str:
    return f"image/{self.path.suffix.removeprefix('.')}"


@dataclasses.dataclass(frozen=True, repr=False)
class Outcome:
  """Results of a mode; a notebook shows its tables and pictures."""

  mode: str
  workdir: pathlib.Path
  metrics: dict[str, Any]  # by file: "evaluation" is evaluation.json, "training" the last step of metrics.jsonl
  figures: dict[str, Figure]  # by path below the workdir, such as "evaluation/descent.png"
  tables: dict[str, str]  # in Markdown, by path below the workdir

  def __repr__(self) -> str:
    metrics = [f"metrics of {name}" for name in self.metrics]
    return "\n  ".join([f"{self.mode}: {self.workdir}", *metrics, *self.tables, *self.figures])

  def _repr_html_(self) -> str:
    title = f"<p><b>{self.mode}</b> {html.escape(str(self.workdir))}</p>"
    tables = [f"<pre>{html.escape(table)}</pre>" for table in self.tables.values()]
    shown = [figure.html() for figure in list(self.figures.values())[:MAX_SHOWN]]
    rest = [f"<p>figures[{html.escape(repr(name))}]</p>" for name in list(self.figures)[MAX_SHOWN:]]
    return "\n".join([title, *tables, *shown, *rest])


class NotReady(RuntimeError):
  """What a notebook needs and only its user can bring. IPython shows the message alone, in one line."""

  def _render_traceback_(self) -> list[str]:
    return [f"Not ready: {self}"]


def check(platform: str | None = None):
  """Prints the versions and devices of this session.

  Args:
    platform: "tpu", "gpu" or "cpu", if the notebook needs one.

  Raises:
    NotReady: before JAX is imported, if an older one is in the session; if there are no devices, or of another kind.
  """
  installed = {name: importlib.metadata.version(name) for name in LOADED_ONCE}
  for name in LOADED_ONCE:
    loaded = getattr(sys.modules.get(name), "__version__", installed[name])
    if _numbers(loaded) != _numbers(installed[name]):
      raise NotReady(f"{name} {loaded} is in this session, but {installed[name]} is installed: {RESTART}")
  if _numbers(installed["jax"]) < _numbers(OLDEST_JAX):
    remedy = f"run the cell with %pip install, then {RESTART}"
    raise NotReady(f"jax {installed['jax']} is installed, but {OLDEST_JAX} or newer is needed: {remedy}")
  import jax

  try:
    devices = jax.devices()
  except (RuntimeError, AssertionError) as error:
    reason = str(error).splitlines()[0] if str(error) else "it names none"
    raise NotReady(
      f"JAX finds no device ({reason}): if another notebook holds the TPU, end it; then {RESTART}"
    ) from None
  kinds = f"{len(devices)} × {devices[0].device_kind}"
  if platform not in (None, jax.default_backend()):
    remedy = f"choose another runtime with one (Colab: Runtime; Kaggle: Settings), or set PLATFORM; then {RESTART}"
    raise NotReady(f"this session has no {platform.upper()}, but {kinds}: {remedy}")
  versions = ", ".join(f"{name} {installed[name]}" for name in ("jax", "flax", "numpy"))
  print(f"eqm_jax {eqm_jax.__version__}, Python {python_platform.python_version()}, {versions}; devices: {kinds}")


def directory(path: str | os.PathLike, free_gb: float = 1.0) -> pathlib.Path:
  """A directory for results, made if it does not exist; Colab asks for Google Drive where that is not mounted yet.

  Args:
    path: of Google Drive, below /content/drive/MyDrive, or any other.
    free_gb: gigabytes that are going to be written.

  Raises:
    NotReady: if Google Drive is not mounted, or the directory cannot be written or lacks the room.
  """
  found = pathlib.Path(path).expanduser().absolute()
  _mount_drive(found)
  try:
    found.mkdir(parents=True, exist_ok=True)
    (found / ".writable").write_bytes(b"1")
    (found / ".writable").unlink()
    free = shutil.disk_usage(found).free / 1e9
  except OSError as error:
    raise NotReady(f"{found} cannot be written ({error.strerror}): make room, or choose another directory") from None
  if free < free_gb:
    remedy = "make room (Drive counts its bin, too), or choose another directory"
    raise NotReady(f"{found} has {free:.1f} GB of room, but {free_gb:g} GB are needed: {remedy}")
  return found


def check_files(origins: Mapping[str, str]):
  """Checks that files exist.

  Args:
    origins: by path, where each is from.

  Raises:
    NotReady: naming all that are missing, and their origins; or if they are on a Google Drive that is not mounted.
  """
  missing = []
  for path, origin in origins.items():
    found = pathlib.Path(path).expanduser().absolute()
    _mount_drive(found)
    if not found.exists():
      missing.append(f"{path} (from {origin})")
  if missing:
    raise NotReady(f"not there: {'; '.join(missing)}. Upload it, or correct its path in the cell of paths")


def _mount_drive(path: pathlib.Path):
  """Mounts Google Drive if a path is on it; it is asked for once."""
  if not path.is_relative_to(DRIVE) or os.path.ismount(DRIVE):
    return
  reason = "only Colab has it"
  if "google.colab" in sys.modules:
    try:
      importlib.import_module("google.colab.drive").mount(str(DRIVE))
      return
    except Exception as error:  # of several kinds, if the user declines
      reason = str(error).splitlines()[0] if str(error) else type(error).__name__
  remedy = f"run drive.mount({str(DRIVE)!r}) of google.colab, or choose another directory"
  raise NotReady(f"{path}: Google Drive is not mounted ({reason}): {remedy}")


def _numbers(version: str) -> list[int]:
  """Major, minor and patch number: 0.10.2.dev3 → [0, 10, 2]."""
  return [int(number) for number in re.findall(r"\d+", version)[:3]]


@dataclasses.dataclass(frozen=True, repr=False)
class Slider:
  """Pictures of which a slider shows one, by HTML alone: it needs no widgets and no kernel."""

  pictures: Sequence["Image.Image"]
  captions: Sequence[str]

  def _repr_html_(self) -> str:
    last = len(self.pictures) - 1
    shown = [
      f'<div style="display:{"block" if i == last else "none"}">'
      f'<img style="max-width:100%" src="data:image/png;base64,{_png(picture)}" alt=""><br>{html.escape(caption)}</div>'
      for i, (picture, caption) in enumerate(zip(self.pictures, self.captions, strict=True))
    ]
    script = "for (const [i, e] of [...this.parentNode.children].slice(1).entries()) "
    script += "e.style.display = i == this.value ? 'block' : 'none'"
    control = f'<input type="range" max="{last}" value="{last}" style="width:30em;display:block" oninput="{script}">'
    return f"<div>{control}{''.join(shown)}</div>"


def _png(picture: "Image.Image") -> str:
  buffer = io.BytesIO()
  picture.save(buffer, "PNG", optimize=True)
  return base64.b64encode(buffer.getvalue()).decode()


def run(
  mode: str,
  config: ml_collections.ConfigDict | str,
  workdir: str | os.PathLike,
  checkpoint: str | os.PathLike | None = None,
  **flags: Any,
) -> Outcome:
  """Runs a mode in this process, with its progress and log lines shown: "train", "evaluate", "sample", ....

  It starts no process and joins no other, and touches neither the flags of absl nor the signals and loggers of the
  caller beyond its end. An interrupted training goes on when it is called again.

  Args:
    mode: one of those that `python -m eqm_jax.main --mode=help` explains.
    config: of `eqm_jax.config`, or its name.
    workdir: directory of the run.
    checkpoint: model to use instead of the workdir's, for modes that need or take one.
    **flags: further flags of the mode, such as topology="v5e-16" of "plan".

  Raises:
    ValueError: before any work, if the flags, the config or the data do not fit.
    FloatingPointError: if training diverges.
    OSError: if a file cannot be written.
  """
  config = experiments.config(config) if isinstance(config, str) else config
  if not isinstance(config, ml_collections.ConfigDict):
    raise ValueError(f"config is a {type(config).__name__}, but must be a ConfigDict: pass eqm_jax.config('digits')")
  directory = pathlib.Path(workdir).expanduser().absolute()
  if "jax" not in sys.modules:
    hardware.use_cpu_without_accelerator()
  with _shown_lines():
    log.info("%s in %s", mode, directory)  # the imports of a mode take seconds
    before = _results(directory)
    modes.run(mode, config, os.fspath(workdir), os.fspath(checkpoint) if checkpoint else None, **flags)
  after = _results(directory)
  return _outcome(mode, directory, [path for path, written in after.items() if before.get(path) != written])


@contextlib.contextmanager
def _shown_lines() -> Iterator[None]:
  """Shows the package's lines while the block runs, unless the caller's loggers do."""
  if log.isEnabledFor(logging.INFO) and log.hasHandlers():
    yield
    return
  handler = progress.LineHandler(sys.stdout if progress.in_notebook() else sys.stderr)
  if progress.in_notebook():  # tables of parameters would push the results off the screen
    handler.addFilter(lambda record: "\n" not in record.getMessage())
  level, propagate = log.level, log.propagate
  log.addHandler(handler)
  log.setLevel(logging.INFO)
  log.propagate = False
  try:
    yield
  finally:
    log.removeHandler(handler)
    log.setLevel(level)
    log.propagate = propagate


def _results(workdir: pathlib.Path) -> dict[pathlib.Path, tuple[int, int]]:
  """Files of results in a workdir and right below it, with what changes when they are written again."""
  paths = [path for pattern in ("*", "*/*") for path in sorted(workdir.glob(pattern)) if path.suffix in RESULTS]
  return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in paths}


def _outcome(mode: str, workdir: pathlib.Path, written: list[pathlib.Path]) -> Outcome:
  metrics, figures, tables = {}, {}, {}
  for path in written:
    name = path.relative_to(workdir).as_posix()
    if path.suffix in (".png", ".gif"):
      figures[name] = Figure(path)
    elif path.suffix == ".md":
      tables[name] = path.read_text(encoding="utf-8")
    elif path.suffix == ".jsonl":
      records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
      metrics["training"] = ([record for record in records if "loss" in record] or [{}])[-1]
    elif path.stem not in NO_METRICS:
      metrics[path.stem] = read_json(str(path))
  return Outcome(mode, workdir, metrics, figures, tables)
