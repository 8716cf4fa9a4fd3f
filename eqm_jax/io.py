"""Files that are complete or absent, JSON, a lock on a workdir, and the limit of open files."""

import contextlib
import json
import logging
import os
import socket
from collections.abc import Iterator
from typing import IO, Any

import filelock

try:
  import resource
except ImportError:  # Windows
  resource = None

LOCK = ".lock"

log = logging.getLogger(__name__)


@contextlib.contextmanager
def atomic_write(path: str, mode: str = "wb") -> Iterator[IO]:
  """Opens a file that is written under another name and renamed, so that a killed process leaves no partial file."""
  with open(path + ".partial", mode, encoding=None if "b" in mode else "utf-8") as file:
    yield file
    file.flush()
    os.fsync(file.fileno())  # or a crash of the machine could leave an empty file under the final name
  os.replace(path + ".partial", path)


def write_json(path: str, content: Any):
  """Writes JSON by `atomic_write`."""
  with atomic_write(path, "w") as file:
    json.dump(content, file, indent=2, ensure_ascii=False)
    file.write("\n")


def read_json(path: str) -> Any:
  """The content of a JSON file.

  Raises:
    ValueError: naming the file, if it is not JSON.
  """
  with open(path, encoding="utf-8") as file:
    try:
      return json.load(file)
    except json.JSONDecodeError as error:
      raise ValueError(f"{path}: not readable as JSON ({error})") from error


@contextlib.contextmanager
def workdir_lock(directory: str) -> Iterator[None]:
  """Makes a directory and keeps other processes from locking it while the block runs.

  The lock is the kernel's (flock), so it ends with a killed process. Processes on other machines see it where the file
  system passes locks on (NFS, Lustre with `flock`); a mounted bucket does not. Where there are none, by the file system
  or on Windows, there is a warning.

  Raises:
    ValueError: if another process has the lock, or the directory cannot be written.
  """
  path = os.path.join(directory, LOCK)
  try:
    os.makedirs(directory, exist_ok=True)
    open(path, "a").close()
  except OSError as error:
    raise ValueError(f"{directory}: cannot be written ({error.strerror}). Choose another --workdir") from error
  if not filelock.has_fcntl:
    log.warning("%s: not locked, this system has no flock: make sure that no other run writes there", directory)
    yield
    return
  # The package's fallback for file systems without locks would outlive a killed process.
  lock = filelock.FileLock(path, timeout=0, fallback_to_soft=False, on_acquired=_write_holder)
  try:
    lock.acquire()
  except filelock.Timeout:
    with open(path, encoding="utf-8") as file:
      holder = file.read() or "unknown"
    raise ValueError(
      f"{directory}: another run is at work here ({holder}). Wait for it, stop it, or choose another --workdir"
    ) from None
  except OSError as error:
    log.warning(
      "%s: the file system has no locks (%s): make sure that no other run writes there", directory, error.strerror
    )
  try:
    yield
  finally:
    lock.release()


def check_writable(directory: str, remedy: str):
  """Refuses a directory in which nothing can be written; makes none.

  Raises:
    ValueError: with the remedy.
  """
  existing = os.path.abspath(directory)
  while not os.path.lexists(existing):
    existing = os.path.dirname(existing)
  if not os.path.isdir(existing) or not os.access(existing, os.W_OK | os.X_OK):
    raise ValueError(f"{directory}: cannot be written: {remedy}")


def _write_holder(descriptor: int):
  """Writes into a lock file who holds it, for the error of others."""
  with contextlib.suppress(OSError):  # of a full disk: the lock holds without the name
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)


def allow_open_files(count: int):
  """Raises the process's limit of open files where `count` more, which stay open, would not fit.

  Raises:
    ValueError: if the machine does not allow that.
  """
  if resource is None:
    return
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  needed = count + 256
  if soft == resource.RLIM_INFINITY or needed <= soft:
    return
  if hard != resource.RLIM_INFINITY and hard < needed:
    raise ValueError(f"{count} files of data need {needed} open files, but {hard} are allowed: raise it (ulimit -Hn)")
  resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
