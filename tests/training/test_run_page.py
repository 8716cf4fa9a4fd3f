import json
import re

import jax
import numpy as np
import pytest
from conftest import in_browser, needs_browser, picture

from eqm_jax.io import write_json
from eqm_jax.training import run_page, sharding

ROW = {"rule": "gd", "eta": 0.03, "nfe": {"mean": 25.0, "q10": 20.0, "q90": 30.0}, "utilisation": 1.0}
ROW |= {"seconds": 2.0, "images_per_second": 20.0, "metrics": {"raw": {"frechet": 11.19, "frechet_error": 0.5}}}


@pytest.fixture
def workdir(tiny_config, tmp_path):
  """The files of a run of 200 steps, evaluated at every twentieth and at its end."""
  workdir = tmp_path / "run <1>"
  (workdir / "evaluation" / "steps").mkdir(parents=True)
  write_json(str(workdir / "config.json"), json.loads(tiny_config.to_json()))
  records = []
  for step in range(1, 201):
    speed = {"examples_per_second": 900.0 + step, "data_wait": 0.02} if step > 1 else {}
    records.append({"step": step, "loss": 50.0 / step, "gradient_norm": None if step == 9 else 3.0, **speed})
    if step % 20 == 0:
      records.append({"step": step - 1 if step == 40 else step, "raw/frechet": 1e3 / step, "raw/frechet_error": 0.1})
      records[-1] |= {"raw/mind": 2e3 / step, "raw/mind_samples": 40}
      picture(size=(90, 20), seed=step).save(run_page.picture_path(str(workdir), step))
  (workdir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
  weights = {"checkpoint": "of the workdir", "kind": "ema", "step": 1200}
  report = {"samples": 40, "weights": weights, "rows": {"gd": ROW}}
  report["features"] = {"raw": {"name": "raw", "real": {"samples": 1797, "frechet_between_halves": 0.287}}}
  write_json(str(workdir / "evaluation" / "evaluation.json"), report)
  for name in ("samples", "nearest"):
    picture(size=(90, 40)).save(workdir / "evaluation" / f"{name}_gd.png")
  (workdir / "evaluation" / "samples_gd.html").write_text("x")
  return workdir


def page(workdir) -> str:
  run_page.write(str(workdir))
  return (workdir / "report.html").read_text()


def test_the_page_has_curves_samples_evaluation_environment_and_config(workdir):
  run_page.write_environment(str(workdir), sharding.make_mesh(data=-1, fsdp=1, tensor=1))
  text = page(workdir)
  assert "<h1>Run run &lt;1&gt;</h1>" in text
  for part in (
    "loss: 0.25 at 200",
    "gradient norm: 3 at 200",
    "images per second: 1100 at 200",
    "raw/frechet: 5 at",
    "raw/mind: 10 at",
  ):
    assert part in text
  assert "raw/frechet_error: " not in text and "raw/mind_samples: " not in text, "errors and sizes are no curves"
  for part in ("200 of 12, of 8 images each", "1,001 images/s, 2.0% of the time waiting for data (medians)"):
    assert part in text
  for part in ("weights: ema, step 1,200.", "11.190 ± 0.500", "distance between halves of them 0.287"):
    assert part in text
  assert 'href="evaluation/samples_gd.html"' in text
  steps = [step for step in range(20, 201, 20) if step != 40]
  assert [f"step {step:,}, raw/frechet" in text for step in steps] == [True] * 9
  assert text.count("data:image/png") == 9 + 2, "one of each step, and two of the sampler"
  for part in (f"<td>{jax.__version__}</td>", "1 × cpu in 1 process", "data 1, fsdp 1, tensor 1"):
    assert part in text
  assert "&quot;num_classes&quot;: 10" in text
  assert "http" not in text.replace("https://", ""), "nothing is fetched"


def test_long_runs_show_some_of_their_pictures_the_first_and_the_last_among_them(workdir, monkeypatch):
  monkeypatch.setattr(run_page, "MAX_PICTURES", 4)
  text = page(workdir)
  captions = re.findall(r"<figcaption>step (\d+), raw/frechet [\d.]+</figcaption>", text)
  assert len(captions) == 4 and captions[0] == "20" and captions[-1] == "200"


def test_a_page_has_what_its_workdir_has(workdir):
  with open(workdir / "metrics.jsonl", "a") as file:
    file.write('{"step": 201, "lo')  # of a killed run
  assert "loss: 0.25 at 200" in page(workdir)
  (workdir / "metrics.jsonl").unlink()
  assert "<h2>Evaluation" in page(workdir) and "<h2>Curves" not in page(workdir)
  (workdir / "evaluation" / "evaluation.json").unlink()
  assert "<h2>Config" in page(workdir) and "<h2>Evaluation" not in page(workdir)
  (workdir / "config.json").unlink()
  assert "<h1>" in page(workdir)


def test_a_page_names_the_checkpoint_that_was_evaluated_in_place_of_a_step(workdir):
  path = workdir / "evaluation" / "evaluation.json"
  weights = {"checkpoint": "a<b>.pt", "kind": "ema", "step": None}
  path.write_text(json.dumps(json.loads(path.read_text()) | {"weights": weights}))
  assert "weights: ema, a&lt;b&gt;.pt." in page(workdir)


def test_a_page_that_cannot_be_written_is_a_warning(workdir, caplog):
  before = page(workdir)
  (workdir / "evaluation" / "evaluation.json").write_text("{")
  assert page(workdir) == before
  assert "report.html: not written (ValueError: " in caplog.text and "evaluation.json: not readable" in caplog.text


LOOK = """
  const charts = [...document.querySelectorAll(".chart")].map(chart => chart.getBoundingClientRect());
  document.querySelector("summary").click();
  return { charts: charts.map(box => [box.width, box.height]), config: document.querySelector("pre").clientHeight };
"""


@needs_browser
@pytest.mark.parametrize("dark, width", [(False, 1100), (True, 500)])
def test_in_a_browser_everything_is_drawn(workdir, dark, width):
  page(workdir)
  found, shot = in_browser(workdir / "report.html", LOOK, dark=dark, width=width)
  assert len(found["charts"]) == 5 and min(min(box) for box in found["charts"]) > 100 and found["config"] > 500
  pixels = np.asarray(shot, np.int32)
  background = pixels[0, 0].mean()
  assert background < 50 if dark else background > 200
  assert np.any(pixels[..., 2] > pixels[..., 0] + 80), "the curves are blue"
