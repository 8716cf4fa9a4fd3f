"""Files that are whole or not there, JSON among them, and many files at once."""

import contextlib
import json
import os
import resource
from collections.abc import Iterator
from typing import IO, Any


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
