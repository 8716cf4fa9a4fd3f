"""The benchmark of a tiny network: what it measures, what it writes, what it refuses."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from conftest import load_config
from dinov2_weights import small_weights, write
from test_config_keys import dead_keys

from eqm_jax import modes
from eqm_jax.benchmark import measure, network_cases, pipeline_cases, results, suite
from eqm_jax.evaluation import features
from eqm_jax.networks import dinov2, flops
from eqm_jax.networks.dinov2 import DINOv2
from eqm_jax.networks.dit import DiT

# Cases that compile little, and the rows they give.
FEW = {
  "forward": {"forward"},
  "training step": {"training step"},
  "batching of descents": {"fixed", "static batching", "continuous batching"},
  "reading data": {"reading data"},
  "training with data": {"training with data"},
  "training, encoding online": set(),
  "checkpoint save": {"checkpoint save, blocking", "checkpoint save, total"},
  "decoder": set(),
}
MORE = {
  "evaluation": {"evaluation"},
  "guided evaluation": {"guided evaluation"},
  "EqM-E": {"EqM-E training step", "EqM-E energy gradient"},
  "Inception features": set(),
  "DINOv2 features": set(),
  "classifier features": {"classifier features"},
  "metrics": {
    "metrics: mean and covariance",
    "metrics: Fréchet distance",
    "metrics: Fréchet distance with its jackknife",
    "metrics: kernel distance",
    "metrics: MIND with its jackknife",
    "metrics: precision and recall",
    "metrics: inception score",
  },
}


def tiny():
  config = load_config("digits", "smoke")
  config.model.update(width=16, depth=1, num_heads=2)
  config.train.batch_size = 8
  config.evaluation.features = ("raw", "classifier")
  config.benchmark.update(turns=1, batch_size=10, num_samples=40, nfe=200, steps=2, read_seconds=0.05)
  config.benchmark.metrics.update(samples=40, real=40, size=8)
  return config


def fast(patch: pytest.MonkeyPatch):
  """Makes the measurements too short to mean anything."""
  patch.setattr(measure, "SHORTEST_TURN", 1e-9)
  patch.setattr(measure, "PRODUCT_SIDES", {"cpu": (32,), "other": (32,)})
  patch.setattr(pipeline_cases, "READ_BATCH", 8)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """The directory of a benchmark of FEW cases, and the keys of its config that it has not read."""
  workdir, config = tmp_path_factory.mktemp("benchmark"), tiny()
  with pytest.MonkeyPatch.context() as patch, dead_keys(config) as dead:
    fast(patch)
    patch.setattr(suite, "CASES", {name: suite.CASES[name] for name in FEW})
    modes.run("benchmark", config, str(workdir))
  return workdir / "benchmark", dead


@pytest.fixture(scope="module")
def content(finished):
  return json.loads((finished[0] / "benchmark.json").read_text())


@pytest.fixture
def nothing_runs(monkeypatch):
  """A benchmark that is refused neither compiles nor measures."""

  def fail(*args, **kwargs):
    raise AssertionError("measured before it was refused")

  monkeypatch.setattr(measure, "compile_program", fail)
  monkeypatch.setattr(measure, "timed", fail)


def check_rows(content, expected):
  """Every case has rows of positive numbers, or a reason why it has none."""
  assert set(content["rows"]) == set().union(*expected.values())
  assert set(content["skipped"]) == {name for name, rows in expected.items() if not rows}
  for name, row in content["rows"].items():
    numbers = [value for value in row.values() if isinstance(value, int | float)]
    assert all(np.isfinite(value) and value > 0 for value in numbers), name
    assert row["fastest"] <= row["seconds"] <= row["slowest"], name


def test_every_case_has_a_row_or_a_reason(content):
  check_rows(content, FEW)
  for name in ("forward", "training step"):
    assert {"compile_seconds", "program_bytes", "fraction_of_peak", "images_per_second"} <= set(content["rows"][name])
  assert FEW.keys() | MORE.keys() == suite.CASES.keys()


@pytest.mark.slow
def test_the_other_cases_have_rows_too(tmp_path, monkeypatch):
  fast(monkeypatch)
  monkeypatch.setattr(suite, "CASES", {name: suite.CASES[name] for name in MORE})
  modes.run("benchmark", tiny(), str(tmp_path))
  content = json.loads((tmp_path / "benchmark" / "benchmark.json").read_text())
  check_rows(content, MORE)
  rows, once = content["rows"], 10 * flops.forward(DiT(**tiny().model))
  assert [rows[name]["flops"] / once for name in ("evaluation", "guided evaluation")] == [1, 2]
  assert rows["EqM-E energy gradient"]["flops"] == 2 * once
  assert rows["EqM-E training step"]["flops"] == 6 * once * 8 / 10


def test_operations_are_those_counted_by_hand(content):
  tokens, width, hidden, patch = 4, 16, 64, 16  # 8×8 pixels in patches of 4×4
  block = 4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * hidden + 6 * width**2
  once = 2 * (tokens * patch * width + block + 2 * width**2 + tokens * width * patch)
  model, rows = DiT(**tiny().model), content["rows"]
  assert flops.forward(model) == flops.evaluation(model) == once
  assert flops.evaluation(model, guided=True) == flops.evaluation(model.clone(energy="dot")) == 2 * once
  assert rows["forward"]["flops"] == 10 * once
  assert rows["training step"]["flops"] == 8 * 3 * once
  assert rows["fixed"]["flops"] == 40 * 200 * once


def test_adaptive_descents_stop_where_they_should(content):
  fixed, static, continuous = (
    content["rows"][name]["details"] for name in ("fixed", "static batching", "continuous batching")
  )
  shares = np.random.default_rng(0).normal(network_cases.STOPPING_MEAN, network_cases.STOPPING_DEVIATION, 40)
  assert static["nfe"] == continuous["nfe"] == np.rint(200 * shares).mean()
  assert fixed["nfe"] == fixed["executed_nfe"] == 200 and fixed["utilisation"] == 1
  assert static["utilisation"] < 1 and continuous["utilisation"] < 1
  for details in (static, continuous):
    assert details["executed_nfe"] * details["utilisation"] == pytest.approx(details["nfe"])


def test_the_table_has_every_row_and_the_machine(finished, content):
  text = (finished[0] / "benchmark.md").read_text()
  assert content["machine"]["processor"] in text.splitlines()[0] and "GFLOP/s" in text
  table_rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")]
  for name in content["rows"]:
    assert name in table_rows
  for name in content["skipped"]:
    assert f"- {name}: left out" in text


def test_it_compares_with_an_earlier_one(finished, content, tmp_path):
  slower = json.loads(json.dumps(content))
  for row in slower["rows"].values():
    row.update({name: 2 * row[name] for name in ("seconds", "fastest", "slowest")})
  text = results.comparison(content, slower)
  assert text.count("2.000") == len(content["rows"])
  del slower["rows"]["forward"]
  assert "Only in one of them: forward" in results.comparison(content, slower)
  results.check_comparable("old.json", content, content["machine"], content["config"])


@pytest.mark.parametrize(
  "change, message",
  [
    ({"kind": "poem"}, "not the result of a benchmark"),
    ({"machine": {"processor": "abacus"}}, "processor: 'abacus' in the file.*--compare_any"),
    ({"config": {"model.width": 512}}, "model.width: 512 in the file, 16 here.*--compare_any"),
  ],
)
def test_what_is_not_comparable_is_refused(content, tmp_path, nothing_runs, change, message):
  old = json.loads(json.dumps(content))
  if "kind" in change:
    old.update(change)
  else:
    ((section, values),) = change.items()
    for path, value in values.items():
      *sections, key = path.split(".")
      place = old[section]
      for name in sections:
        place = place[name]
      place[key] = value
  (tmp_path / "old.json").write_text(json.dumps(old))
  with pytest.raises(ValueError, match=message):
    modes.run("benchmark", tiny(), str(tmp_path), compare=str(tmp_path / "old.json"))
  assert not (tmp_path / "benchmark").exists()


def test_another_config_is_compared_on_request(content, tmp_path, monkeypatch, caplog):
  fast(monkeypatch)
  monkeypatch.setattr(suite, "CASES", {"reading data": pipeline_cases.reading})
  monkeypatch.setattr(network_cases.Workspace, "step_program", measure.Program(print, 1.0, 1))  # saves its compilation
  (tmp_path / "old.json").write_text(json.dumps(content))
  config = tiny()
  config.model.width = 32
  with caplog.at_level("INFO"):
    modes.run("benchmark", config, str(tmp_path), compare=str(tmp_path / "old.json"), compare_any=True)
  assert "| reading data " in caplog.text.split("compared with")[1]


@pytest.mark.parametrize(
  "options, message",
  [
    ({"compare": "nowhere.json"}, "--compare=nowhere.json: cannot be read"),
    ({"compare_any": True}, "give the file to compare with"),
  ],
)
def test_comparing_with_nothing_is_refused(tmp_path, nothing_runs, options, message):
  with pytest.raises(ValueError, match=message):
    modes.run("benchmark", tiny(), str(tmp_path), **options)


def test_other_modes_compare_nothing(tmp_path):
  with pytest.raises(ValueError, match="--compare=old.json: --mode=sample has no such flag.* --mode=benchmark"):
    modes.run("sample", tiny(), str(tmp_path), compare="old.json")


def test_a_model_that_does_not_fit_is_refused_before_anything_runs(tmp_path, nothing_runs, monkeypatch):
  monkeypatch.setattr(measure, "available_memory", lambda devices: 2**20)
  config = load_config("imagenet256", "L/2")
  config.mesh.fsdp = 1
  with pytest.raises(ValueError, match=r"needs about [\d.]+ GiB on each device, but 0.00 GiB .* train.batch_size"):
    modes.run("benchmark", config, str(tmp_path))
  assert not (tmp_path / "benchmark").exists()


def test_the_estimate_of_memory_is_near_what_the_compiler_says(content):
  """A lower estimate, so that nothing that fits is refused."""
  program = content["rows"]["training step"]["program_bytes"]
  assert 0.3 * program < content["memory"]["estimate"] < 1.1 * program


@pytest.mark.parametrize("remat", ["dots", "dots_no_batch", "full"])
def test_rematerialisation_needs_less_memory(remat):
  options = {**tiny().model, "depth": 2, "unroll": 1}
  assert measure.activation_bytes(DiT(**{**options, "remat": remat})) < measure.activation_bytes(DiT(**options))


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"turns": 0}, "benchmark.turns = 0 must be at least 1"),
    ({"batch_size": 0}, "benchmark.batch_size = 0"),
    ({"read_seconds": 0.0}, "benchmark.read_seconds = 0.0 must be positive"),
    ({"sweeps.over": ("width",)}, "sweeps.over = 'width' must be one of batch, tokens"),
    ({"sweeps.tokens": (5,)}, "5 is no square"),
    ({"sweeps.depth": ()}, "benchmark.sweeps.depth"),
    ({"sweeps.over": ("batch",), "sweeps.batch": (10**9,)}, "benchmark.sweeps.batch, at 1000000000: .*available"),
  ],
)
def test_options_out_of_range_are_refused(tmp_path, nothing_runs, changes, message):
  config = tiny()
  config.benchmark.update_from_flattened_dict(changes)
  with pytest.raises(ValueError, match=message):
    modes.run("benchmark", config, str(tmp_path))


def test_every_key_is_read(finished):
  _, dead = finished
  assert not [key for key in dead if key.startswith("benchmark.")]


def test_sweeps_change_what_they_are_over(tmp_path):
  config = tiny()
  config.benchmark.sweeps.update(batch=(2, 4), tokens=(1, 16), depth=(1, 3), samples=(10, 20))
  w = network_cases.Workspace(config, jax.local_devices() * 5, str(tmp_path))

  def points(name, of):
    return {value: of(point) for value, point in suite._points(name, w).items()}

  assert points("batch", lambda p: (p.batch_size, p.config.train.batch_size)) == {2: (2, 2), 4: (4, 4)}
  assert points("tokens", lambda p: p.model.input_size // p.model.patch_size) == {1: 1, 16: 4}
  assert points("depth", lambda p: p.model.depth) == {1: 1, 3: 3}
  assert points("samples", lambda p: p.config.benchmark.num_samples) == {10: 10, 20: 20}
  assert points("devices", lambda p: (len(p.devices), p.batch_size)) == {1: (1, 10), 2: (2, 5), 4: (4, 2)}


@pytest.mark.parametrize("has_file", [False, True], ids=["random weights", "file"])
def test_features_of_published_networks_are_timed(tmp_path, monkeypatch, has_file):
  fast(monkeypatch)
  path = tmp_path / "weights.safetensors"
  if has_file:
    write(path, small_weights(depth=1))
  module = DINOv2(width=64, depth=1, num_heads=1, grid=3, mlp_width=72)
  small = dataclasses.replace(
    features.PUBLISHED["dinov2"], without_weights=lambda: (module, dinov2.parameter_shapes(module))
  )
  monkeypatch.setitem(features.PUBLISHED, "dinov2", small)
  config = tiny()
  config.evaluation.features = ("dinov2",)
  config.evaluation.dinov2.update(path=str(path), batch_size=2)
  (row,) = suite.CASES["DINOv2 features"](network_cases.Workspace(config, jax.local_devices(), str(tmp_path)))
  assert row.name == "DINOv2 features" and row.precision == "float32 exact" and row.images == 2
  assert row.about.endswith(str(path) if has_file else "random weights of the published shapes")
  assert row.flops > 2 * 2 * 256 * 12 * 64**2  # the products of one block


def test_a_sweep_is_a_picture():
  line = {"seconds": [1e-3, 2e-3], "fraction_of_peak": [0.5, 0.6]}
  picture = suite.picture("batch", {"x": [1, 8], "series": {"training step": line, "evaluation": line}})
  assert picture.width > 600


@pytest.mark.slow
def test_sweeps_are_measured(tmp_path, monkeypatch):
  fast(monkeypatch)
  monkeypatch.setattr(suite, "CASES", {})
  config = tiny()
  config.benchmark.sweeps.update(over=tuple(suite.SWEEPS), batch=(2, 4), tokens=(1, 4), depth=(1, 2), samples=(10, 20))
  modes.run("benchmark", config, str(tmp_path))
  content = json.loads((tmp_path / "benchmark" / "benchmark.json").read_text())
  for name in suite.SWEEPS:
    assert (tmp_path / "benchmark" / f"sweep_{name}.png").stat().st_size > 1000
    for line in content["sweeps"][name]["series"].values():
      assert len(line["seconds"]) == len(content["sweeps"][name]["x"]) and min(line["seconds"]) > 0


def test_a_timing_carries_what_is_donated(monkeypatch):
  monkeypatch.setattr(measure, "SHORTEST_TURN", 1e-9)
  step = jax.jit(lambda state, by: (state + by, state), donate_argnums=0)
  timing, (state, _) = measure.timed(step, jax.numpy.zeros(()), 1.0, turns=3, carry=True)
  assert len(timing.turns) == 3 and state == 5  # two calls to warm up
