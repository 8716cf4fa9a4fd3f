"""The documentation site: built with every link checked, and its generated pages complete."""

import importlib.util
import pathlib
import re
import subprocess
import sys

import pytest

from eqm_jax import modes

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
  if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("mkdocstrings") is None:
    pytest.skip('needs pip install -e ".[docs]"')
  directory = tmp_path_factory.mktemp("site")
  command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(directory)]
  built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
  assert built.returncode == 0, built.stderr
  return directory


def text_of(site: pathlib.Path, page: str) -> str:
  return re.sub(r"<[^>]+>", "", (site / page / "index.html").read_text(encoding="utf-8"))


def test_every_mode_has_its_part_of_the_page(site):
  text = text_of(site, "modes")
  for name in modes.NAMES:
    assert modes.declaration(name).summary in text


def test_every_config_key_is_on_the_page(site):
  text = text_of(site, "config_keys")
  keys = re.findall(r"^ +(\w+)=", (ROOT / "configs" / "base.py").read_text(encoding="utf-8"), re.MULTILINE)
  assert len(keys) > 100
  assert [key for key in keys if not re.search(rf"\b{key}\b", text)] == []


def test_every_public_name_is_on_the_page_of_the_api(site):
  import eqm_jax

  html = (site / "api" / "index.html").read_text(encoding="utf-8")
  assert [name for name in eqm_jax.__all__ if f"eqm_jax.{name}" not in html] == []


def test_no_page_asks_for_anything_from_elsewhere(site):
  for page in site.rglob("*.html"):
    html = page.read_text(encoding="utf-8")
    assert not re.findall(r'<(?:script|img|link rel="stylesheet")[^>]+(?:src|href)="https?://[^"]+"', html), page
