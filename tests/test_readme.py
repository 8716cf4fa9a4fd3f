"""Runs the Python blocks of the README and of docs/, in order, as a reader would, and the commands of the recipes.

A block of Python below `<!-- not run: REASON -->` is skipped with that reason. A command below
`<!-- shortened: FLAGS -->` is run in this process, with those flags added.
"""

import ast
import pathlib
import re
import shlex
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

import eqm_jax
from eqm_jax.networks.dit import DiT

ROOT = pathlib.Path(__file__).parents[1]
BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>[^>]+) -->\n)?```python\n(?P<code>.*?)```", re.DOTALL)
COMMAND = re.compile(r"<!-- shortened: (?P<flags>[^>]*)-->\n```\n(?P<command>.*?)```", re.DOTALL)
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in FILES}
PAGES = {page: text for page, text in TEXTS.items() if BLOCK.search(text)}
COMMANDS = {
  f"{page}:{text[: match.start()].count(chr(10)) + 1}": match
  for page, text in TEXTS.items()
  for match in COMMAND.finditer(text)
}


@pytest.fixture
def directory_with_files(tmp_path, monkeypatch):
  """A working directory with the files that blocks name: small ones of the same kind."""
  model = DiT(input_size=8, channels=1, patch_size=4, width=16, depth=1, num_heads=2, num_classes=10)
  params = model.init(jax.random.key(0), jax.numpy.zeros((1, 8, 8, 1)), jax.numpy.zeros(1, jax.numpy.int32))["params"]
  noisy = jax.tree.map(lambda leaf: leaf + 0.02 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), params)
  for path in ("runs/digits", "digits"):  # the latter wins over the weights of the package
    eqm_jax.save_pretrained(tmp_path / path, model, noisy)
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
    assert namespace["outcome"].metrics["samples"]["samples"] == 20
    assert "samples/samples.png" in namespace["outcome"].figures


def test_few_blocks_are_not_run():
  found = [block["reason"] for text in PAGES.values() for block in BLOCK.finditer(text)]
  assert len(found) >= 15 and sum(reason is not None for reason in found) <= 5


@pytest.mark.slow
@pytest.mark.parametrize("where", COMMANDS)
def test_commands_run(where, directory_with_files):
  for name in ("cat", "dog"):
    path = pathlib.Path("images", name)
    path.mkdir(parents=True)
    for i in range(6):
      pixels = np.random.default_rng(i).integers(0, 255, (20, 24, 3), np.uint8)
      Image.fromarray(pixels).save(path / f"{i}.png")
  words = shlex.split(COMMANDS[where]["command"].replace("\\\n", " "))
  assert words[:3] == ["python", "-m", "eqm_jax.main"]
  flags = dict(word.removeprefix("--").split("=", 1) for word in [*words[3:], *shlex.split(COMMANDS[where]["flags"])])
  name, _, variant = flags.pop("config").partition(":")
  overrides = {key.removeprefix("config."): flags.pop(key) for key in list(flags) if key.startswith("config.")}
  config = eqm_jax.config(name, *[variant] * bool(variant), **{key: _value(text) for key, text in overrides.items()})
  outcome = eqm_jax.run(flags.pop("mode", "train"), config, flags.pop("workdir"), **flags)
  assert outcome.figures


def _value(text: str):
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text
