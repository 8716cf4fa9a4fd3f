"""JSON files that are whole or not there."""

import json
import os
from typing import Any


def write_json(path: str, content: Any):
  """Writes aside and renames, so that a killed process leaves no half a file."""
  with open(path + ".partial", "w", encoding="utf-8") as file:
    json.dump(content, file, indent=2, ensure_ascii=False)
    file.write("\n")
  os.replace(path + ".partial", path)


def read_json(path: str) -> Any:
  """Raises ValueError, naming the file, if it is not JSON."""
  with open(path, encoding="utf-8") as file:
    try:
      return json.load(file)
    except json.JSONDecodeError as error:
      raise ValueError(f"{path}: not readable as JSON ({error})") from error
