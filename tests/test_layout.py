"""Rules of the layout: arrows point down only, functions are small, and the public names are documented."""

import ast
import inspect
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

import eqm_jax

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "eqm_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
# From the top down; a module imports from its own folder and from those below it.
ORDER = [
  "__main__",
  "main",
  "notebook",
  "modes",
  "report",
  "plan",
  "benchmark",
  "training",
  "evaluation",
  "sampling",
  "data",
  "checkpoints",
  "networks",
  "equilibrium",
  "pages",
  "plotting",
  "distributed",
  "launchers",
  "progress",
  "hardware",
  "process",
  "checks",
  "experiments",
  "io",
  "trees",
]
LEAVES = ("report", "plan", "benchmark")  # imported by the mode of the same name only
NEVER = {
  ("networks", "equilibrium"),
  ("networks", "io"),
  ("networks", "distributed"),
  ("equilibrium", "io"),
  ("equilibrium", "distributed"),
}
MAX_LINES = 60  # of a function, its docstring included
MAX_POSITIONAL = 5  # parameters of a function below modes/, without `self`
# Functions above a limit, with the reason. A function that no longer is leaves the list.
LONG = {
  "equilibrium/field.py:field": "28 lines; the rest documents its public arguments",
  "equilibrium/sampler.py:descend": "37 lines; the rest documents its public arguments",
  "equilibrium/streaming.py:descend_stream": "45 lines; the rest documents its public arguments",
  "equilibrium/tasks.py:inpaint": "30 lines; the rest documents its public arguments",
  "training/train.py:train": "the story of a training, in one place",
}
MANY_POSITIONAL = {
  f"equilibrium/update_rules.py:{name}": "the one signature of update rules: x, f, state, step size, settings, key"
  for name in ("_gd", "_nag", "_nesterov", "_langevin", "_preconditioned", "_optax")
}


def imported_parts(path: pathlib.Path, statements: list[ast.stmt] | None = None) -> set[str]:
  """The folders or modules right below eqm_jax that a file, or some of its statements, imports."""
  tree = ast.parse(path.read_text(encoding="utf-8"))
  parts = set()
  for node in (node for statement in statements or tree.body for node in ast.walk(statement)):
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


def functions() -> Iterator[tuple[str, ast.FunctionDef, bool]]:
  """("file:function", its definition, whether it is a method) of all functions of the package."""
  for path in FILES:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    methods = {id(item) for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for item in node.body}
    for node in ast.walk(tree):
      if isinstance(node, ast.FunctionDef):
        yield f"{path.relative_to(PACKAGE)}:{node.name}", node, id(node) in methods


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows_point_down(path):
  part = part_of(path)
  if part == "__init__":  # imports its names when they are used; editors and type checkers see them at once
    body = ast.parse(path.read_text(encoding="utf-8")).body
    unguarded = [node for node in body if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")]
    assert not imported_parts(path, unguarded)
    return
  for other in imported_parts(path):
    assert ORDER.index(other) >= ORDER.index(part), f"{part} imports {other}, which lies above it"
    assert (part, other) not in NEVER
    if other in LEAVES and part != other:
      assert path == PACKAGE / "modes" / f"{other}.py", f"{other} is a leaf: only its mode imports it"


def test_every_module_has_its_place_in_the_order():
  assert {part_of(path) for path in FILES} - {"__init__"} == set(ORDER)


def test_functions_are_short():
  long = {name: node.end_lineno - node.lineno + 1 for name, node, _ in functions()}
  long = {name: lines for name, lines in long.items() if lines > MAX_LINES}
  assert long.keys() == LONG.keys(), long


def test_functions_below_the_modes_take_few_positional_parameters():
  many = {}
  for name, node, is_method in functions():
    static = any(ast.unparse(decorator) == "staticmethod" for decorator in node.decorator_list)
    count = len(node.args.posonlyargs) + len(node.args.args) - (is_method and not static)
    if count > MAX_POSITIONAL and not name.startswith(("main.py", "modes/")):
      many[name] = count
  assert many.keys() == MANY_POSITIONAL.keys(), many


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.name)
def test_configs_import_nothing_from_the_package(path):
  assert not imported_parts(path) and "import eqm_jax" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", eqm_jax.__all__)
def test_public_names_exist_and_are_documented(name):
  value = getattr(eqm_jax, name)
  if callable(value):
    assert inspect.getdoc(value)


IMPORTS = """
import importlib, sys
SLOW = {"jax", "flax.linen", "orbax", "grain", "scipy", "sklearn", "diffrax", "matplotlib"}

def loaded():
  return SLOW & set(sys.modules)

import eqm_jax
assert not loaded(), loaded()
eqm_jax.config("digits"), eqm_jax.run
assert not loaded(), loaded()
eqm_jax.descend, eqm_jax.field, eqm_jax.descend_stream, eqm_jax.integrate
assert loaded() <= {"jax", "flax.linen"}, loaded()
for name in importlib.import_module("eqm_jax.modes").NAMES:
  importlib.import_module(f"eqm_jax.modes.{name}")
assert not loaded() & {"scipy", "sklearn", "diffrax", "matplotlib"}, loaded()
"""


def test_imports_take_what_they_use():
  subprocess.run([sys.executable, "-c", IMPORTS], check=True, cwd=ROOT)


def test_unknown_names_are_refused():
  with pytest.raises(AttributeError, match="ascend"):
    eqm_jax.ascend  # noqa: B018


def test_main_has_flags_only():
  tree = ast.parse((PACKAGE / "main.py").read_text(encoding="utf-8"))
  assert sum(node.end_lineno - node.lineno + 1 for node in tree.body if isinstance(node, ast.FunctionDef)) < 80
  below = {"distributed", "experiments", "hardware", "modes", "process", "progress"}
  assert imported_parts(PACKAGE / "main.py") == below


def test_ci_runs_the_commands_of_the_readme():
  readme = (ROOT / "README.md").read_text(encoding="utf-8")
  commands = [line for line in readme.splitlines() if line.startswith("python3 -m venv")]
  assert len(commands) == 2 and "eqm_jax.main" in commands[0] and "pytest" in commands[1]
  assert commands[1] in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
