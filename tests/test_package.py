"""The package as it is installed: its metadata, the source distribution, the program, and the weights it brings."""

import fnmatch
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

import jax
import numpy as np
import pytest
from conftest import ROOT

import eqm_jax
from eqm_jax.checkpoints import pretrained

METADATA = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LISTED = [line.split() for line in (ROOT / "MANIFEST.in").read_text(encoding="utf-8").splitlines() if line]
FILES = {"pyproject.toml", "setup.py", "MANIFEST.in"}  # always in a source distribution
FILES |= {name for word, *names in LISTED if word == "include" for name in names}
FOLDERS = {name for word, *names in LISTED if word == "graft" for name in names}


def test_the_citation_is_of_this_version_and_of_the_paper():
  citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
  assert re.search(r"^version: (.+)$", citation, re.MULTILINE)[1] == eqm_jax.__version__
  assert METADATA["project"]["urls"]["Paper"] in citation
  assert citation.count("authors:") == 2


def test_the_source_distribution_has_all_that_git_tracks():
  listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
  if listed.returncode:
    pytest.skip("no git repository")
  assert [path for path in listed.stdout.splitlines() if not {path, path.split("/")[0]} & (FILES | FOLDERS)] == []
  assert all((ROOT / name).exists() for name in FILES | FOLDERS)


def test_weights_and_types_are_installed():
  patterns = METADATA["tool"]["setuptools"]["package-data"]["eqm_jax"]
  files = [path for path in (ROOT / "eqm_jax").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
  names = [str(path.relative_to(ROOT / "eqm_jax")) for path in files if path.suffix != ".py"]
  assert "weights/digits/config.json" in names and "weights/README.md" in names
  assert [name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns)] == []


@pytest.fixture
def load_digits(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  return lambda: eqm_jax.load("digits")


def test_the_shipped_digits_are_of_their_config_and_small(load_digits):
  loaded = load_digits()
  model = eqm_jax.config("digits").model.to_dict()
  assert loaded.config == {**loaded.config, **model}
  assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params)} == {np.dtype(np.float32)}
  files = [path for path in (pretrained.SHIPPED / "digits").rglob("*") if path.is_file()]
  assert sum(path.stat().st_size for path in files) < 4e6
  assert not any(b"/work" in path.read_bytes() or b"/home" in path.read_bytes() for path in files)


def test_the_shipped_digits_descend_to_their_classes(load_digits):
  """By the nearest mean of the real digits, which is right for nine in ten of them."""
  import sklearn.datasets

  real, classes = sklearn.datasets.load_digits(return_X_y=True)
  means = np.stack([real[classes == label].mean(0) for label in range(10)]) / 8 - 1
  labels = np.arange(10)
  result = eqm_jax.descend(
    load_digits().field(labels),
    eqm_jax.start_noise(jax.random.key(0), labels, (8, 8, 1)),
    step_size=0.02,
    max_nfe=60,
  )
  distances = np.linalg.norm(np.asarray(result.x).reshape(10, 1, 64) - means, axis=-1)
  assert (distances.argmin(1) == labels).mean() > 0.8


def test_a_local_path_wins_over_shipped_weights(load_digits):
  loaded = load_digits()
  half = jax.tree.map(lambda leaf: leaf / 2, loaded.params)
  eqm_jax.save_pretrained("digits", loaded.model, half)
  np.testing.assert_array_equal(load_digits().params["final_out"]["bias"], half["final_out"]["bias"])
  shutil.rmtree("digits")
  os.mkdir("digits")
  with pytest.raises(ValueError, match=r"digits: no such model: .* weights of the package \(digits\) where no local"):
    load_digits()


@pytest.mark.parametrize("name", ["", "digit", "README.md", "./digits", "../weights/digits", "digits/params"])
def test_only_names_of_shipped_weights_are_found_in_the_package(load_digits, name):
  with pytest.raises(ValueError, match="no such model"):
    eqm_jax.load(name)


# ---------------------------------------------------------------- as users install it

TINY = [
  "--config=digits:smoke",
  "--workdir=runs/digits",
  "--config.model.width=16",
  "--config.model.depth=1",
  "--config.model.num_heads=2",
  "--config.train.steps=4",
  "--config.train.batch_size=8",
  "--config.optimizer.warmup_steps=1",
  "--config.evaluation.num_samples=10",
  "--config.evaluation.batch_size=2",
]
FIRST_PICTURE = """
import jax, eqm_jax
field = eqm_jax.load("digits").field(jax.numpy.arange(10))
result = eqm_jax.descend(field, jax.random.normal(jax.random.key(0), (10, 8, 8, 1)), step_size=0.02, max_nfe=60)
print(eqm_jax.__file__, result.nfe.tolist())
"""


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> tuple[pathlib.Path, pathlib.Path, pathlib.Path]:
  """A copy of the tree, its source distribution, and the wheel of that, as `python -m build` makes them."""
  pytest.importorskip("build")
  directory = tmp_path_factory.mktemp("build")
  tree = directory / "tree"
  for name in FOLDERS:
    shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
  for name in FILES:
    shutil.copy(ROOT / name, tree)
  command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", tree]
  built = subprocess.run(command, cwd=directory, capture_output=True, text=True)
  assert built.returncode == 0, built.stdout + built.stderr
  (source,), (wheel,) = (directory / "dist").glob("*.tar.gz"), (directory / "dist").glob("*.whl")
  return tree, source, wheel


@pytest.fixture(scope="module")
def installed(distributions, tmp_path_factory):
  """Runs a program of an environment with the wheel, in an empty directory; dependencies are those of this one."""
  environment = tmp_path_factory.mktemp("installed") / "environment"
  subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
  (packages,) = environment.glob("lib/python*/site-packages")
  dependencies = [path for path in sys.path if path.endswith("-packages")]
  (packages / "dependencies.pth").write_text("\n".join(dependencies), encoding="utf-8")
  pip = [sys.executable, "-m", "pip", "--python", environment / "bin" / "python", "install", "--no-deps", "--no-index"]
  subprocess.run([*pip, "--ignore-installed", distributions[2]], check=True, capture_output=True)
  variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
  empty = tmp_path_factory.mktemp("empty")

  def run(program, *arguments) -> subprocess.CompletedProcess:
    command = [environment / "bin" / program, *arguments]
    return subprocess.run(command, cwd=empty, env=variables, capture_output=True, text=True, timeout=300)

  return run


@pytest.mark.slow
def test_an_installed_wheel_works_in_an_empty_directory(installed):
  finished = installed("eqm-jax", "--version")
  assert finished.stdout.startswith(f"eqm_jax {eqm_jax.__version__}, jax "), finished.stderr
  assert " --mode: <prepare|train|" in installed("eqm-jax", "--help").stdout
  assert " plan " in installed("eqm-jax", "--mode=help").stdout
  finished = installed("eqm-jax", "--config=nothere", "--workdir=runs/nothere")
  assert finished.returncode == 1 and finished.stderr.count("\n") == 1
  assert all(path.stem in finished.stderr for path in (ROOT / "configs").glob("*.py") if path.stem != "base")
  finished = installed("eqm-jax", *TINY)
  assert finished.returncode == 0, finished.stderr
  finished = installed("eqm-jax", *TINY, "--mode=sample", "--checkpoint=digits", "--config.sample.num_samples=3")
  assert finished.returncode == 0, finished.stderr
  finished = installed("python", "-c", FIRST_PICTURE)
  assert finished.returncode == 0, finished.stderr
  path, _, nfe = finished.stdout.partition(" ")
  assert "environment" in path and nfe == f"{[60] * 10}\n"


@pytest.mark.slow
def test_the_source_distribution_is_the_whole_tree(distributions, tmp_path):
  tree, source, _ = distributions
  shutil.unpack_archive(source, tmp_path, filter="data")
  (unpacked,) = tmp_path.iterdir()

  def files(root: pathlib.Path) -> set[pathlib.Path]:
    return {path.relative_to(root) for path in root.rglob("*") if path.is_file() and ".egg-info" not in str(path)}

  assert files(unpacked) == files(tree) | {pathlib.Path("PKG-INFO"), pathlib.Path("setup.cfg")}
  command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "tests/test_package.py"]
  variables = {**os.environ, "PYTHONPATH": str(unpacked)}
  finished = subprocess.run(command, cwd=unpacked, capture_output=True, text=True, env=variables)
  assert finished.returncode == 0, finished.stdout
