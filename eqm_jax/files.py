"""Files that are whole or not there, JSON among them, many files at once, and directories that one process has."""

import contextlib
import fcntl
import json
import logging
import os
import resource
import socket
from collections.abc import Iterator
from typing import IO, Any

LOCK = ".lock"

log = logging.getLogger(__name__)


@contextlib.contextmanager
def whole(path: str, mode: str = "wb") -> Iterator[IO]:
  """Opens a file that is written aside and renamed, so that a killed process leaves no half a file."""
  with open(path + ".partial", mode, encoding=None if "b" in mode else "utf-8") as file:
    yield file
    file.flush()
    os.fsync(file.fileno())  # or a crash of the machine could leave an empty file under the final name
  os.replace(path + ".partial", path)


def write_json(path: str, content: Any):
  """Writes JSON that is whole or not there."""
  with whole(path, "w") as file:
    json.dump(content, file, indent=2, ensure_ascii=False)
    file.write("\n")


def read_json(path: str) -> Any:
  """Raises ValueError, naming the file, if it is not JSON."""
  with open(path, encoding="utf-8") as file:
    try:
      return json.load(file)
    except json.JSONDecodeError as error:
      raise ValueError(f"{path}: not readable as JSON ({error})") from error


@contextlib.contextmanager
def claimed(directory: str) -> Iterator[None]:
  """Makes a directory and keeps it for this process, as long as that lives: no other may claim it.

  The lock is the kernel's, so that nothing is left of a killed process. Processes on other machines see it where the
  file system passes locks on (NFS, Lustre with `flock`); a mounted bucket does not. Where there are none, that is told.

  Raises:
    ValueError: if another process has it, or it cannot be written.
  """
  try:
    os.makedirs(directory, exist_ok=True)
    lock = open(os.path.join(directory, LOCK), "a+", encoding="utf-8")
  except OSError as error:
    raise ValueError(f"{directory}: cannot be written ({error.strerror}). Choose another --workdir") from error
  with lock as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      holder = file.read() or "unknown"
      raise ValueError(
        f"{directory}: another run is at work here ({holder}). Wait for it, stop it, or choose another --workdir"
      ) from None
    except OSError as error:
      log.warning(
        "%s: no lock can be had here (%s): see to it that no other run writes there", directory, error.strerror
      )
    with contextlib.suppress(OSError):  # of a full disk; who holds the lock is told to be helpful only
      file.truncate(0)
      file.write(f"process {os.getpid()} on {socket.gethostname()}")
      file.flush()
    yield


def allow_open_files(count: int):
  """Raises the process's limit of open files where `count` more, which stay open, would not fit.

  Raises:
    ValueError: if the machine does not allow that.
  """
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  needed = count + 256
  if soft == resource.RLIM_INFINITY or needed <= soft:
    return
  if hard != resource.RLIM_INFINITY and hard < needed:
    raise ValueError(f"{count} files of data need {needed} open files, but {hard} are allowed: raise it (ulimit -Hn)")
  resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
