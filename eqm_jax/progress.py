"""Progress of long work: a bar in a terminal or a notebook, elsewhere a line of the log every 20 seconds."""

import contextlib
import datetime
import logging
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any

import tqdm

INTERVAL = 20.0  # seconds between two lines of a log

log = logging.getLogger(__name__)


def in_notebook() -> bool:
  """Whether a notebook's kernel runs this process."""
  ipython = sys.modules.get("IPython")
  return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


class _Bar(tqdm.tqdm):
  monitor_interval = 0  # or a thread of tqdm's would stay when all bars are gone


class LineHandler(logging.Handler):
  """Writes lines of a log with their time, above the bars that are shown."""

  def __init__(self, stream: IO[str]):
    super().__init__()
    self._stream = stream
    self.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))

  def emit(self, record: logging.LogRecord):
    try:
      _Bar.write(self.format(record), file=self._stream)
      self._stream.flush()
    except Exception:  # as handlers of the standard library do: nobody may read the log any more
      self.handleError(record)


class Heartbeat:
  """Calls a function in a thread whenever nothing has been reported for `INTERVAL` seconds, until it is closed."""

  def __init__(self, report: Callable[[], None]):
    self._report, self._closed, self._last = report, threading.Event(), time.monotonic()
    self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
    self._thread.start()

  def reset(self):
    """Counts the seconds from now: something else has been reported."""
    self._last = time.monotonic()

  def close(self):
    self._closed.set()
    self._thread.join()

  def _run(self):
    while not self._closed.wait(max(0.0, self._last + INTERVAL - time.monotonic())):
      if time.monotonic() >= self._last + INTERVAL:
        self.reset()
        self._report()


@contextlib.contextmanager
def waiting(description: str) -> Iterator[None]:
  """Logs for how long the block has been running, every `INTERVAL` seconds: for work that cannot be counted."""
  begin = time.monotonic()
  heartbeat = Heartbeat(lambda: log.info("%s: %s so far", description, duration(time.monotonic() - begin)))
  try:
    yield
  finally:
    heartbeat.close()


class Progress:
  """Counts units of work, as `tqdm.tqdm` does: `with Progress(total=..., desc=..., unit=...) as bar: bar.update(n)`.

  It may also wrap an iterable: `for item in Progress(items, desc=..., unit=...)`. `disable` shows nothing.
  """

  def __init__(
    self,
    iterable: Iterable | None = None,
    *,
    total: int | None = None,
    desc: str = "",
    unit: str = "image",
    disable: bool = False,
  ):
    self._iterable = iterable
    self._total = len(iterable) if total is None and hasattr(iterable, "__len__") else total
    self._desc, self._unit, self._count, self._postfix = desc, unit, 0, ""
    self._begin = time.monotonic()
    self._bar = bar(disable, total=self._total, desc=desc, unit=unit)
    self._heartbeat = Heartbeat(self._log) if self._bar.disable and not disable else None

  def update(self, count: int = 1):
    """Counts that many more units as done."""
    self._count += count
    self._bar.update(count)

  def set_postfix(self, *, refresh: bool = False, **values: Any):
    """Shows values after the progress, from the next update on or, with `refresh`, at once in a terminal."""
    self._postfix = ", ".join(f"{name}={value}" for name, value in values.items())
    self._bar.set_postfix_str(self._postfix, refresh=refresh)

  def close(self):
    self._bar.close()
    if self._heartbeat:
      self._heartbeat.close()
      if time.monotonic() - self._begin >= INTERVAL:
        self._log()

  def __enter__(self) -> "Progress":
    return self

  def __exit__(self, *error):
    self.close()

  def __iter__(self) -> Iterator:
    with self:
      for item in self._iterable:
        yield item
        self.update()

  def _log(self):
    log.info("%s", self._line(time.monotonic() - self._begin))

  def _line(self, seconds: float) -> str:
    done = f"{self._desc}: {self._count}" + (f"/{self._total}" if self._total is not None else "")
    parts = [f"{done} {self._unit}"]
    if self._count:
      rate = self._count / seconds
      parts.append(f"{rate:.4g} {self._unit}/s")
      if self._total is not None:
        parts.append(f"{duration((self._total - self._count) / rate)} left")
    else:
      parts.append(f"{duration(seconds)} so far")
    if self._postfix:
      parts.append(self._postfix)
    return "  ".join(parts)


def bar(disable: bool, **options: Any) -> tqdm.tqdm:
  """Makes a bar of tqdm, which a terminal shows, and a notebook, as a widget where it has them."""
  if not in_notebook():
    return _Bar(disable=disable or None, **options)  # None: if no terminal
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", tqdm.TqdmWarning)  # about widgets: without them it is a line of text
    import tqdm.auto as tqdm_auto

    return tqdm_auto.tqdm(disable=disable, **options)


def duration(seconds: float) -> str:
  """Seconds as "1:02:03"."""
  return str(datetime.timedelta(seconds=round(seconds)))
