"""Notebooks of launch/: shortened by their parameters, executed in a fresh kernel, and kept with small outputs.

python tests/launch/notebooks.py launch/NAME.ipynb [PARAMETER=VALUE ...] executes one in place; the parameters are those
of this execution alone, as Python writes them.
"""

import ast
import os
import pathlib
import sys
import tempfile
from typing import Any

import nbformat

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
KERNEL = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}


def read(path: pathlib.Path) -> nbformat.NotebookNode:
  return nbformat.read(path, as_version=4)


def tagged(notebook: nbformat.NotebookNode, tag: str) -> list[nbformat.NotebookNode]:
  """The cells with a tag."""
  return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def parameters(source: str) -> dict[str, ast.Assign]:
  """The assignments of a cell of parameters, by name."""
  statements = ast.parse(source).body
  assert all(isinstance(one, ast.Assign) and len(one.targets) == 1 for one in statements), "assignments alone"
  return {one.targets[0].id: one for one in statements}


def shortened(path: pathlib.Path, **values: Any) -> nbformat.NotebookNode:
  """A notebook without outputs and installation, and with other values of its parameters."""
  notebook = read(path)
  notebook.cells = [cell for cell in notebook.cells if cell not in tagged(notebook, "install")]
  cells = tagged(notebook, "parameters")
  known = {name: (cell, one) for cell in cells for name, one in parameters(cell.source).items()}
  assert set(values) <= set(known), f"{path.name} has the parameters {list(known)}"
  for cell in cells:
    lines = cell.source.splitlines()
    for name, value in values.items():
      owner, one = known[name]
      if owner is cell:
        lines[one.lineno - 1 : one.end_lineno] = [f"{name} = {value!r}"] + [""] * (one.end_lineno - one.lineno)
    cell.source = "\n".join(lines)
  for cell in notebook.cells:
    if cell.cell_type == "code":
      cell.outputs = []
  return notebook


def execute(notebook: nbformat.NotebookNode, directory: pathlib.Path, env: dict[str, str]) -> nbformat.NotebookNode:
  """Executes a notebook in a fresh kernel of this Python, in a directory; an error in a cell is raised."""
  import nbclient

  resources = {"metadata": {"path": str(directory)}}
  client = nbclient.NotebookClient(notebook, timeout=1800, kernel_name="python3", resources=resources)
  return client.execute(env=env)


def without_noise(notebook: nbformat.NotebookNode, directory: pathlib.Path) -> nbformat.NotebookNode:
  """The notebook without counts, times, bars and the directory of its execution."""
  notebook.metadata = nbformat.from_dict({**KERNEL, "language_info": {"name": "python"}})
  for cell in notebook.cells:
    cell.metadata = nbformat.from_dict({key: cell.metadata[key] for key in ("tags",) if key in cell.metadata})
    if cell.cell_type != "code":
      continue
    cell.execution_count = None
    outputs = [one for one in cell.outputs if one.get("name") != "stderr" and not _is_widget(one)]
    for output in outputs:
      if output.output_type == "execute_result":
        output.execution_count = None
      if "text" in output:
        output.text = output.text.replace(f"{directory}/", "")
      if "data" in output:
        output.data = _without_path(output.data, directory)
    cell.outputs = outputs
  return notebook


def _without_path(data: dict[str, Any], directory: pathlib.Path) -> dict[str, Any]:
  """An output by its kinds; a picture of Pillow is not kept as JPEG, too."""
  kept = {kind: value for kind, value in data.items() if not (kind == "image/jpeg" and "image/png" in data)}
  return {kind: value.replace(f"{directory}/", "") if isinstance(value, str) else value for kind, value in kept.items()}


def _is_widget(output: nbformat.NotebookNode) -> bool:
  return any("widget" in kind for kind in output.get("data", {}))


def main(path: str, *changes: str):
  """Executes a notebook, and writes its outputs into the file beside its own sources."""
  path = pathlib.Path(path)
  values = {name: ast.literal_eval(text) for name, text in (change.split("=", 1) for change in changes)}
  with tempfile.TemporaryDirectory() as directory:
    directory = pathlib.Path(directory).resolve()
    env = {**os.environ, "PLOTLY_RENDERER": "notebook_connected"}  # its program is not kept, but fetched by the reader
    done = without_noise(execute(shortened(path, **values), directory, env), directory)
  notebook = without_noise(read(path), directory)
  outputs = iter([cell.outputs for cell in done.cells if cell.cell_type == "code"])
  installs = tagged(notebook, "install")
  for cell in notebook.cells:
    if cell.cell_type == "code":
      cell.outputs = [] if cell in installs else next(outputs)
  nbformat.write(notebook, path)


if __name__ == "__main__":
  main(*sys.argv[1:])
