"""The files around the package: metadata, checks in CI, and tables in the README that list what is in the tree."""

import json
import pathlib
import re
import runpy
import subprocess
import sys
import tomllib

import pytest
from conftest import environment

import eqm_jax
from eqm_jax import modes

ROOT = pathlib.Path(__file__).parents[1]
METADATA = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def test_every_folder_is_installed():
  folders = {path.parent.relative_to(ROOT) for path in (ROOT / "eqm_jax").rglob("*.py")}
  names = {".".join(folder.parts) for folder in folders} | {"eqm_jax.configs"}
  assert set(METADATA["tool"]["setuptools"]["packages"]) == names


def test_the_type_checker_sees_every_public_name():
  assert "tests/typing_surface.py" in METADATA["tool"]["mypy"]["files"]
  assert "-m mypy" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
  text = (ROOT / "tests" / "typing_surface.py").read_text(encoding="utf-8")
  assert set(re.findall(r"\beqm_jax\.(\w+)", text)) - {"equilibrium", "__all__"} == set(eqm_jax.__all__)


def test_the_readme_is_short_and_lists_the_modes_and_configs():
  assert len(README.splitlines()) <= 250
  rows = re.findall(r"^\| `(\w+)`(?: \(default\))? \|", README, re.MULTILINE)
  assert set(rows) == set(modes.NAMES)
  for path in (ROOT / "configs").glob("*.py"):
    assert path.name in README


def test_the_readme_lists_the_claims_of_the_report():
  titles = runpy.run_path(str(ROOT / "configs" / "report.py"))["TITLES"]
  measured = json.loads((ROOT / "docs" / "report" / "report.json").read_text(encoding="utf-8"))["claims"]
  verdicts = [(title, measured[name]["verdict"]) for name, title in titles.items()]
  assert re.findall(r"^\| (.+) \| (holds|holds in part|does not hold) \|$", README, re.MULTILINE) == verdicts


def test_no_page_has_a_gap_to_be_filled():
  assert not [page for page in PAGES if "FILL" in page.read_text(encoding="utf-8")]


def test_the_picture_of_the_data_flow_names_what_exists():
  page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
  picture = re.search(r"```mermaid\n(.*?)```", page, re.DOTALL)[1]
  defined = set()
  for path in (ROOT / "eqm_jax").rglob("*.py"):
    names = re.findall(r"^(?:class|def) (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    defined |= {*names, *(f"{path.stem}.{name}" for name in names)}
  functions = set(re.findall(r"\b[a-z_]+\.[a-z_]+\b", picture)) - {"main.py", "manager.py", "evaluation.json"}
  classes = set(re.findall(r"\b(?:[A-Z][a-z]+)+(?=:|\"\]| --)", picture))
  assert len(functions) >= 6 and functions <= defined, functions - defined
  assert len(classes) >= 5 and classes <= defined, classes - defined


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_between_pages_lead_somewhere(page):
  for target in re.findall(r"\]\(([^)#]+)(?:#[\w-]*)?\)", page.read_text(encoding="utf-8")):
    assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_files_that_pages_name_exist(page):
  text = page.read_text(encoding="utf-8")
  for target in re.findall(r"(?:eqm_jax|configs|tests|launch|docs)/[a-z0-9_/]+\.(?:py|sh|md|yaml|sbatch)\b", text):
    assert page.name == "CHANGELOG.md" or (ROOT / target).exists(), target


@pytest.mark.slow
def test_this_side_of_the_comparison_with_pytorch_answers():
  command = [sys.executable, ROOT / "docs" / "against_pytorch.py", "--reference=.", "--sizes=S/2", "--serve=jax"]
  answers = subprocess.run(command, input="step\ndescent\n", capture_output=True, text=True, env=environment())
  assert answers.returncode == 0, answers.stderr
  assert all(float(line) > 0 for line in answers.stdout.split()) and len(answers.stdout.split()) == 2
