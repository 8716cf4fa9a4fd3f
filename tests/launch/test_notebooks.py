"""The notebooks of launch/: what they have in common, and each executed in a fresh kernel, shortened."""

import ast
import json
import re
import sys

import matplotlib.pyplot as plt
import nbformat
import notebooks
import numpy as np
import pytest
from conftest import ROOT, environment
from test_published import write_checkpoint, write_reference, write_weights

import eqm_jax

NOTEBOOKS = sorted(notebooks.LAUNCH.glob("colab_*.ipynb"))
MAX_OUTPUT, MAX_NOTEBOOK = 300_000, 1_500_000  # characters
BADGES = """\
[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/{0}/blob/main/launch/{1})
[![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://kaggle.com/kernels/welcome?src=https://github.com/{0}/blob/main/launch/{1})
[![View on GitHub](https://img.shields.io/badge/GitHub-view-181717?logo=github)](https://github.com/{0}/blob/main/launch/{1})

# """
INSTALL = r'%pip install -q "eqm_jax(\[[a-z,]+\])? @ git\+https://github\.com/{0}"( [a-z-]+)*'
INSTALL += "  # or a wheel's or a checkout's path"
CHECK = """\
import eqm_jax.notebook

eqm_jax.notebook.check()  # versions and devices; says so if the session must be restarted"""
ELSEWHERE = re.compile(r"/(?:tmp|work|root|home|usr|private|Users)/")  # paths of the machine that executed one


def imagenet256(directory) -> dict:
  """Small stand-ins for the files that a user brings, and the parameters that name them."""
  write_checkpoint(directory / "EqM.pt")
  write_reference(directory / "VIRTUAL.npz", write_weights(directory / "inception.pth"))
  return dict(
    CHECKPOINT="EqM.pt",
    AUTOENCODER=str(ROOT / "tests" / "reference" / "vae_tiny"),
    INCEPTION="inception.pth",
    REFERENCE="VIRTUAL.npz",
    RESULTS="results",
    PLATFORM="cpu",
    CLASSES=(0, 1, 2, 3),
    SAMPLES=8,
    THRESHOLD=8.0,
    IN_FLIGHT=3,
    EVALUATED=12,
    SETTINGS={"evaluation.inception.batch_size": 6, "samplers.published_xl2.max_nfe": 20},
  )


# Parameters of the shortened execution: a dict, or a function of the directory that makes it, and files in there.
SHORTENED = {
  "colab_digits": dict(STEPS=100, SAMPLES=40),
  "colab_imagenet256": imagenet256,
  "colab_applications": dict(IMAGES=3, OUTLIERS=20, TRIES=1, CELLS=9),
  "colab_other_jax": dict(NFE=20, STEPS=3, BATCH=8),
}


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
  return request.param


def outputs(notebook: nbformat.NotebookNode):
  return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def texts(notebook: nbformat.NotebookNode) -> str:
  """What a reader sees besides pictures and pages."""
  return "\n".join(
    [*(output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs(notebook))]
  )


def repository() -> str:
  """The one that all notebooks and the page about them name."""
  files = [*NOTEBOOKS, ROOT / "docs" / "notebooks.md"]
  found = {path.name: set(re.findall(r"github\.com/([\w-]+/eqm_jax)", path.read_text("utf-8"))) for path in files}
  assert len(set().union(*found.values())) == 1, found
  return found["notebooks.md"].pop()


def test_notebooks_begin_alike(path):
  notebook, named = notebooks.read(path), repository()
  nbformat.validate(notebook)
  first, install, check = notebook.cells[:3]
  assert first.source.startswith(BADGES.format(named, path.name))
  assert install.metadata.tags == ["install"] and re.fullmatch(INSTALL.format(re.escape(named)), install.source)
  assert check.source == CHECK
  (cell,) = notebooks.tagged(notebook, "parameters")
  assert notebooks.parameters(cell.source)
  assert notebook.metadata == {**notebooks.KERNEL, "language_info": {"name": "python"}}


def test_notebooks_work_in_their_process(path):
  for cell in notebooks.read(path).cells:
    if cell.cell_type == "code" and cell.source[0] != "%":
      ast.parse(cell.source)
      assert not re.search(r"subprocess|multiprocessing|os\.system|absl|^!|get_ipython", cell.source, re.MULTILINE)


def test_kept_outputs_are_small_and_without_noise(path):
  text, notebook = path.read_text(encoding="utf-8"), notebooks.read(path)
  assert len(text) <= MAX_NOTEBOOK and not ELSEWHERE.search(text)
  for cell in notebook.cells:
    assert cell.get("execution_count") is None and set(cell.metadata) <= {"tags"}
  for output in outputs(notebook):
    assert output.output_type != "error" and output.get("name") != "stderr" and "widget" not in str(output)[:5000]
    assert len(json.dumps(output)) <= MAX_OUTPUT


def test_links_of_notebooks_lead_somewhere(path):
  text = "\n".join(cell.source for cell in notebooks.read(path).cells if cell.cell_type == "markdown")
  targets = re.findall(rf"https://github\.com/{re.escape(repository())}/blob/main/([^)#\s]+)", text)
  assert targets and not re.search(r"\]\((?!https://)", text), "Colab has no other files beside a notebook"
  assert [target for target in targets if not (ROOT / target).exists()] == []


def test_every_notebook_is_executed():
  assert set(SHORTENED) == {path.stem for path in NOTEBOOKS}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORTENED)
def test_notebooks_run_from_a_clean_kernel(name, tmp_path):
  values = SHORTENED[name](tmp_path) if callable(SHORTENED[name]) else SHORTENED[name]
  notebook = notebooks.shortened(notebooks.LAUNCH / f"{name}.ipynb", **values)
  env = environment(devices=2 if name == "colab_imagenet256" else 1)
  done = notebooks.without_noise(notebooks.execute(notebook, tmp_path, env), tmp_path)
  assert any("image/png" in output.get("data", {}) for output in outputs(done))
  assert f"eqm_jax {eqm_jax.__version__}" in texts(done)
  if name == "colab_imagenet256":
    assert "NFE an image needed" in texts(done) and "inception score" in texts(done)
    assert {"samples.png", "samples.npz", "evaluation"} <= {path.name for path in (tmp_path / "results").iterdir()}


@pytest.mark.parametrize("missing", [True, False])
def test_a_landscape_is_drawn_with_and_without_plotly(missing, monkeypatch):
  notebook = notebooks.read(notebooks.LAUNCH / "colab_applications.ipynb")
  (cell,) = [cell for cell in notebook.cells if "def surface(" in cell.source]
  shown = []
  monkeypatch.setattr(plt, "show", lambda: shown.append(plt.gcf()))
  if missing:
    monkeypatch.setitem(sys.modules, "plotly", None)
  else:
    plotly = pytest.importorskip("plotly.graph_objects")
    monkeypatch.setattr(plotly.Figure, "show", lambda figure: shown.append(figure))
  names = {"plt": plt, "np": np, "INTERACTIVE": True}
  exec(cell.source, names)
  line = np.linspace(0, 1, 4)
  names["surface"](line, line, np.ones((4, 4)), [np.ones((5, 3))] * 2)
  (figure,) = shown
  drawn = figure.axes[0].lines if missing else figure.data[1:]
  assert len(drawn) == 2
  plt.close("all")


def test_what_is_not_ready_is_one_line_in_a_kernel(tmp_path):
  """The cells that check a session, with an older JAX in it, then without a TPU and without the files."""
  notebook = notebooks.shortened(notebooks.LAUNCH / "colab_imagenet256.ipynb", RESULTS="results")
  check, checks = (next(cell for cell in notebook.cells if one in cell.source) for one in (".check()", "check_files"))
  (parameters,) = notebooks.tagged(notebook, "parameters")
  old = "import sys, types\nsys.modules['jax'] = types.SimpleNamespace(__version__='0.7.2')"
  sources = [old, check.source, "del sys.modules['jax']", check.source, parameters.source, checks.source]
  notebook.cells = [nbformat.v4.new_code_cell(source) for source in [*sources, "PLATFORM = 'cpu'", checks.source]]
  for cell in notebook.cells:
    cell.metadata.tags = ["raises-exception"]
  done = notebooks.execute(notebook, tmp_path, environment())
  errors = ["\n".join(output.traceback) for output in outputs(done) if output.output_type == "error"]
  assert len(errors) == 3 and all(len(error.splitlines()) == 1 for error in errors), errors
  assert "jax 0.7.2 is in this session" in errors[0] and "restart the session" in errors[0]
  assert "this session has no TPU, but 1 × cpu" in errors[1]
  assert "Google Drive is not mounted" in errors[2]
