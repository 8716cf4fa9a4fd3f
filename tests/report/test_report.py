"""The report: its verdicts, its page, and that it goes on where it was."""

import collections
import json
import logging

import numpy as np
import pytest
from conftest import load_config

from eqm_jax import modes
from eqm_jax.networks import flops
from eqm_jax.networks.dit import BLOCK_OPTIONS, DiT
from eqm_jax.report import lab, page, report
from eqm_jax.report.landscape_claims import READ_OUT
from eqm_jax.report.sampling_claims import TITLES, fastest_settings
from eqm_jax.report.training_claims import GAMMAS

CLAIM = {
  "title": "A < B", "paper": "p", "criterion": "c", "verdict": "holds", "columns": ["a"], "rows": [["1 & 2"]],
  "figures": {"a.png": "caption"}, "notes": ["note"], "numbers": {},
}  # fmt: skip


@pytest.mark.parametrize(
  "ours, theirs, verdict",
  [
    ([1.0, 1.1, 0.9], [2.0, 2.1, 1.9], "holds"),
    ([1.0, 2.0, 0.5], [1.2, 2.2, 0.6], "holds in part"),
    ([2.0, 2.1], [1.0, 1.1], "does not hold"),
    ([1.0], [1.0], "does not hold"),
    ([1.0], [9.0], "holds in part"),  # one seed has no spread to judge by
    ([1.0, 1.0], [np.inf, 2.0], "holds"),
    ([1.0, np.nan], [np.inf, 2.0], "does not hold"),
  ],
)
def test_verdicts_weigh_the_gap_against_the_spread(ours, theirs, verdict):
  assert lab.lower(ours, theirs) == verdict


def test_claims_of_several_parts():
  yes, part, no = "holds", "holds in part", "does not hold"
  assert lab.all_of([yes, yes]) == lab.some_of([yes, yes]) == yes
  assert lab.all_of([yes, no]) == lab.all_of([part, no]) == lab.some_of([no, no]) == no
  assert lab.some_of([yes, no]) == lab.all_of([yes, part]) == lab.some_of([part, part]) == part


def test_the_spread_is_that_of_a_sample():
  assert lab.spread([1.0, 2.0, 3.0]) == "2.000 ± 1.000" and lab.spread([1.0]) == "1.000 ± 0.000"


def test_the_fastest_setting_that_reaches_a_distance():
  fast, slow, slower = ("eqm", "gd", "10"), ("eqm", "gd", "50"), ("eqm", "gd", "249")
  frechet = {slower: [0.9, 2.0, 5.0], fast: [1.9, 3.0, 5.0], slow: [1.0, 2.5, 5.0]}
  seconds = {fast: 1.0, slow: 5.0, slower: 25.0}
  assert fastest_settings(frechet, seconds, np.array([1.0, 3.0, 4.0])) == [slow, fast, None]


@pytest.mark.slow
def test_seconds_to_the_distance_of_each_baseline(tmp_path):
  """Every model has as many tries, and the page tells what EqM does not reach."""
  config = small_config(("wall_clock",))
  modes.run("report", config, str(tmp_path))
  claim = json.loads((tmp_path / "report.json").read_text())["claims"]["wall_clock"]
  tries = collections.Counter(one["model"] for one in claim["numbers"]["settings"])
  assert set(tries) == set(TITLES) and len(set(tries.values())) == 1
  assert [row[1] for row in claim["rows"]] == ["flow matching", "EqM", "flow matching without time", "EqM"]
  for row, (baseline, found) in zip(claim["rows"][1::2], claim["numbers"]["baselines"].items()):
    assert all(one is not None for one in found["seconds"][baseline])
    assert ("not reached" in row[2]) == (None in found["seconds"]["eqm"])


def test_the_page_shows_every_part_escaped():
  text = page.page("t & t", "d > d", {"command": "python <x>"}, {"first": CLAIM})
  for part in ("A &lt; B", "1 &amp; 2", 'src="figures/a.png"', "caption", "note", "python &lt;x&gt;", 'href="#first"'):
    assert part in text
  for part in ("<title>t &amp; t</title>", "<h1>t &amp; t</h1>", "<p>d &gt; d</p>"):
    assert part in text
  assert "A < B" not in text


def small_config(claims=()):
  """The quick report with smaller models; `claims` are the names of others than its own."""
  config = load_config("report", "quick")
  config.model.update(width=16)
  config.train.steps = 4
  config.optimizer.warmup_steps = 1
  config.checkpoint.every = 2
  config.report.update(num_samples=20, batch_size=20, max_nfe=8, num_held_out=10)
  if claims:
    with config.unlocked():
      config.report.text.claims = {name: ("A < B", "p") for name in claims}
  return config


@pytest.mark.slow
def test_it_goes_on_where_it_was(tmp_path, monkeypatch, caplog):
  """A claim that fails costs that claim alone: models and finished claims are kept. Texts may change."""
  asked = []

  def measured(name, fails=False):
    def claim(instruments):
      asked.append(name)
      if fails and len(asked) < 3:
        raise OSError("the disk is full")
      result = {key: value for key, value in CLAIM.items() if key not in ("title", "paper")}
      return {**result, "numbers": instruments.metrics("eqm", max_nfe=4)}

    return claim

  claims = {"first": measured("first"), "second": measured("second", fails=True)}
  monkeypatch.setattr(report, "CLAIMS", {name: report._Measurement(claim, 1) for name, claim in claims.items()})
  caplog.set_level(logging.INFO, "eqm_jax")
  with pytest.raises(OSError, match="disk is full"):
    modes.run("report", small_config(("first", "second")), str(tmp_path))
  assert "A &lt; B" in (tmp_path / "index.html").read_text()
  config = small_config(("first", "second"))
  config.report.text.title = "another title"
  modes.run("report", config, str(tmp_path))
  assert "<h1>another title</h1>" in (tmp_path / "index.html").read_text()
  assert asked == ["first", "second", "second"]
  found = json.loads((tmp_path / "report.json").read_text())["claims"]
  assert list(found) == ["first", "second"] and found["second"]["numbers"]["frechet"][0] > 0
  lines = [record.getMessage() for record in caplog.records if "to do" in record.getMessage()]
  assert lines == ["to do: 1 models, 2 claims", "to do: 0 models, 1 claims"]
  assert any("left" in record.getMessage() for record in caplog.records)
  other = small_config(("first", "second"))
  other.train.steps = 5
  with pytest.raises(ValueError, match="another config: train.steps: 4 in the workdir, 5 in this config"):
    modes.run("report", other, str(tmp_path))


@pytest.mark.slow
def test_the_noise_level_of_networks_that_hardly_learn(tmp_path, monkeypatch):
  names = ("eqm", "lambda_8", "flow_matching_untimed")
  monkeypatch.setattr(lab, "MODELS", {name: lab.MODELS[name] for name in names})
  config = small_config(("noise_level",))
  config.report.num_samples = 60
  modes.run("report", config, str(tmp_path))
  claim = json.loads((tmp_path / "report.json").read_text())["claims"]["noise_level"]
  titles = ["EqM", "untrained network", "pixel statistics", "EqM, λ = 8", "flow matching without time"]
  assert [row[0] for row in claim["rows"]] == titles and (tmp_path / "figures" / "noise_level.png").exists()
  rmse = {title: runs[0]["rmse"] for title, runs in claim["numbers"].items()}
  assert 0 < rmse["EqM"] < rmse["pixel statistics"] and claim["verdict"] in (lab.PARTLY, lab.FAILS)  # of one seed


@pytest.mark.parametrize(
  "key, value, message",
  [
    ("report.seeds", 0, "report.seeds = 0"),
    ("report.num_samples", 10, "report.num_samples = 10 must be at least 20"),
    ("report.step_size", -1.0, "step_size = -1"),
    ("report.composed_labels", (3,), r"composed_labels = \(3,\) must be two labels"),
    ("report.composed_labels", (3, 10), "composed_labels = 10 must be in"),
    ("data.options.part", "all", "data.options.part = 'all'"),
    ("objective.schedule.multiplier", 2.0, "multiplier = 2.0, but the report's claims are about 4.0"),
  ],
)
def test_bad_input_is_refused(tmp_path, key, value, message):
  config = small_config()
  config.update_from_flattened_dict({key: value})
  with pytest.raises(ValueError, match=message):
    modes.run("report", config, str(tmp_path))
  with pytest.raises(ValueError, match="trains its own models"):
    modes.run("report", config, str(tmp_path), "x.pt")


def test_other_configs_are_told_where_to_go(tmp_path):
  with pytest.raises(ValueError, match="no section 'report': use --config=configs/report.py"):
    modes.run("report", load_config("digits"), str(tmp_path))


def test_models_differ_in_what_they_are_compared_by_alone():
  """Same network, data, steps and seed for all: the changes touch the objective and what it needs."""
  config = load_config("report")
  made = lab.Models(config, "/nowhere")
  for name in lab.MODELS:
    one = made.config(name, 1)
    assert one.seed == 1 and one.data == config.data and one.optimizer == config.optimizer
    assert one.train.steps == config.train.steps
    same = {**one.model.to_dict(), "time_input": False, "energy": "none"}
    options = {option: config.model[option] for option in BLOCK_OPTIONS} if name == "modern" else {}
    assert same | options == config.model.to_dict()


def test_the_modern_block_takes_the_compute_of_the_papers():
  made = lab.Models(load_config("report", "beyond"), "/nowhere")
  plain, modern = (DiT(**made.config(name, 0).model) for name in ("eqm", "modern"))
  assert all(getattr(plain, option) != getattr(modern, option) for option in BLOCK_OPTIONS)
  np.testing.assert_allclose(flops.training(modern), flops.training(plain), rtol=0.01)


@pytest.mark.slow
def test_options_beyond_the_paper_have_a_page_with_their_own_models(tmp_path):
  config = load_config("report", "beyond,quick")
  config.train.steps = 4
  config.optimizer.warmup_steps = 1
  config.report.update(num_samples=20, batch_size=20, max_nfe=4, num_held_out=10)
  modes.run("report", config, str(tmp_path))
  claims = json.loads((tmp_path / "report.json").read_text())["claims"]
  assert set(claims) == set(config.report.text.claims)
  assert list(claims) == [name for name in report.CLAIMS if name in claims], "the order of the page"
  models = {*GAMMAS, "modern", *READ_OUT.values(), *TITLES}
  assert {path.name for path in (tmp_path / "models").iterdir()} == {f"{name}-0" for name in models}
  assert [row[:2] for row in claims["gammas"]["rows"]] == [list(pair) for pair in GAMMAS.values()]
  assert all((tmp_path / "figures" / f"{name}.png").exists() for name in claims)
  costs = claims["modern_block"]["numbers"]["costs"]
  assert costs["modern"]["flops"] == pytest.approx(costs["the paper's"]["flops"], rel=0.05)
  assert "report.py:beyond,quick --workdir=runs/beyond" in (tmp_path / "index.html").read_text()
