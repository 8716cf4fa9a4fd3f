"""The rules of the layout: arrows point down only, and the outside sees documented names."""

import ast
import inspect
import pathlib

import pytest

import eqm_jax

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "eqm_jax"
# From the top down; a module imports from its own folder and from those below it.
ORDER = [
  "main",
  "programs",
  "report",
  "plan",
  "benchmark",
  "training",
  "tasks",
  "evaluation",
  "data",
  "convert",
  "networks",
  "equilibrium",
  "devices",
  "hardware",
  "files",
]
NEVER = {
  ("networks", "equilibrium"),
  ("networks", "files"),
  ("networks", "devices"),
  ("equilibrium", "files"),
  ("equilibrium", "devices"),
}


def imported_parts(path: pathlib.Path) -> set[str]:
  """The folders or modules right below eqm_jax that a file imports."""
  parts = set()
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}: relative import"
      names = [f"{node.module}.{alias.name}" for alias in node.names]
    else:
      continue
    parts |= {name.split(".")[1] for name in names if name.startswith("eqm_jax.")}
  return parts


def part_of(path: pathlib.Path) -> str:
  return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows_point_down(path):
  part = part_of(path)
  if part == "__init__":  # names its homes as strings, and imports them when they are used
    assert not imported_parts(path)
    return
  for other in imported_parts(path):
    assert ORDER.index(other) >= ORDER.index(part), f"{part} imports {other}, which lies above it"
    assert (part, other) not in NEVER


def test_every_module_has_its_place_in_the_order():
  assert {part_of(path) for path in PACKAGE.rglob("*.py")} - {"__init__"} == set(ORDER)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.name)
def test_configs_import_nothing_from_the_package(path):
  assert not imported_parts(path) and "import eqm_jax" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", eqm_jax.__all__)
def test_public_names_are_there_and_documented(name):
  value = getattr(eqm_jax, name)
  if callable(value):
    assert inspect.getdoc(value)


def test_importing_the_package_imports_no_jax():
  import subprocess
  import sys

  subprocess.run([sys.executable, "-c", "import eqm_jax, sys; assert 'jax' not in sys.modules"], check=True, cwd=ROOT)


def test_unknown_names_are_refused():
  with pytest.raises(AttributeError, match="ascend"):
    eqm_jax.ascend  # noqa: B018


def test_main_stays_a_dispatch():
  assert len((PACKAGE / "main.py").read_text(encoding="utf-8").splitlines()) < 85


def test_ci_runs_the_commands_of_the_readme():
  readme = (ROOT / "README.md").read_text(encoding="utf-8")
  commands = [line for line in readme.splitlines() if line.startswith("python3 -m venv")]
  assert len(commands) == 2 and "eqm_jax.main" in commands[0] and "pytest" in commands[1]
  assert commands[1] in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
