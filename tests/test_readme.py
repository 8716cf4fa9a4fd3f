"""Runs the Python blocks of the README and of docs/, in order, as a reader would.

A block below `<!-- not run: REASON -->` is skipped with that reason.
"""

import pathlib
import re
import shutil

import jax
import pytest

import eqm_jax
from eqm_jax.networks.dit import DiT

ROOT = pathlib.Path(__file__).parents[1]
BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>[^>]+) -->\n)?```python\n(?P<code>.*?)```", re.DOTALL)
NAMES = ("README.md", "docs/data.md", "docs/evaluation.md", "docs/transformations.md")
PAGES = {page: (ROOT / page).read_text(encoding="utf-8") for page in NAMES}


@pytest.fixture
def directory_with_files(tmp_path, monkeypatch):
  """A working directory with the files that blocks name: small ones of the same kind."""
  model = DiT(input_size=8, channels=1, patch_size=4, width=16, depth=1, num_heads=2, num_classes=10)
  params = model.init(jax.random.key(0), jax.numpy.zeros((1, 8, 8, 1)), jax.numpy.zeros(1, jax.numpy.int32))["params"]
  noisy = jax.tree.map(lambda leaf: leaf + 0.02 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), params)
  eqm_jax.save_pretrained(tmp_path / "runs" / "digits", model, noisy)
  shutil.copytree(ROOT / "tests" / "reference" / "vae_tiny", tmp_path / "data" / "sd-vae-ft-ema")
  monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run(page, directory_with_files):
  namespace = {}
  for block in BLOCK.finditer(PAGES[page]):
    if block["reason"]:
      continue
    line = PAGES[page][: block.start("code")].count("\n")
    exec(compile("\n" * line + block["code"], page, "exec"), namespace)  # errors name the line of the page
  if page == "README.md":
    assert set(namespace["result"].status.tolist()) <= set(eqm_jax.Status)
    assert namespace["stream"].x.shape == (1797, 8, 8, 1)


def test_few_blocks_are_not_run():
  found = [block["reason"] for text in PAGES.values() for block in BLOCK.finditer(text)]
  assert len(found) >= 8 and sum(reason is not None for reason in found) <= 2
  for page in (ROOT / "docs").glob("*.md"):
    assert f"docs/{page.name}" in PAGES or "```python" not in page.read_text(encoding="utf-8"), page
