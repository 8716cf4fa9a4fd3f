import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import run_python

from eqm_jax.checkpoints import readouts
from eqm_jax.equilibrium import sampler
from eqm_jax.equilibrium.noise_level import NoiseReadout
from eqm_jax.equilibrium.objective import Schedule
from eqm_jax.sampling import generator as generator_lib

LABELS = np.arange(13, dtype=np.int32) % 10


@dataclasses.dataclass(frozen=True)
class Bowls:
  """A model whose field is steeper for some labels, so that samples need different numbers of steps."""

  num_classes: int = 10
  input_shape: tuple[int, ...] = (8, 8, 1)
  time_input: bool = False

  def apply(self, variables, x, label, *gamma):
    return (variables["params"] + label[:, None, None, None]) * x


def generator(batch_size: int, model: Bowls = Bowls()) -> generator_lib.Generator:
  return generator_lib.Generator(model, 2.0, jax.random.key(0), batch_size, multiplier=4.0)


@pytest.fixture
def row(tiny_config):
  row = tiny_config.samplers.adaptive
  row.update(threshold=1.0, step_size=0.04, max_nfe=60)
  return row


def sample(row, batch_size, labels=LABELS):
  return generator(batch_size).samples("row", row, labels)


@pytest.mark.parametrize("batching", ["continuous", "static"])
def test_samples_depend_neither_on_the_batches_nor_on_their_number(row, batching, monkeypatch):
  row.batching = batching
  whole = sample(row, 13).result
  assert whole.x.shape == (13, 8, 8, 1)
  assert len(set(whole.nfe)) > 5, "the samples should differ in their NFE"
  noise = sampler.start_noise(jax.random.key(0), np.arange(13), (8, 8, 1))
  steepness = (2.0 + LABELS)[:, None, None, None]
  updates = (whole.nfe - 1)[:, None, None, None]
  np.testing.assert_allclose(whole.x, noise * (1 - 0.04 * steepness) ** updates, atol=1e-5)
  monkeypatch.setattr(generator_lib, "STREAM_LENGTH", 2)  # the 13 samples are streams of 10 and 3
  for count, batch_size in ((13, 5), (11, 4), (1, 50)):
    few = sample(row, batch_size, LABELS[:count])
    np.testing.assert_allclose(few.result.x, whole.x[:count], atol=1e-6)
    np.testing.assert_array_equal(few.result.nfe, whole.nfe[:count])
    assert few.seconds > 0 and few.executed_nfe >= few.result.nfe.sum()


PROGRAM = """
import sys
import jax, ml_collections, numpy as np
from conftest import load_config
from test_generator import LABELS, sample
row = load_config("digits", "smoke").samplers.adaptive
row.update(threshold=1.0, step_size=0.04, max_nfe=60)
for batching in ("continuous", "static"):
  row.batching = batching
  many = sample(row, 2).result
  assert jax.device_count() == 8 and len(many.x) == 13
  for count in (1, 2, 3, 11):
    few = sample(row, 4, LABELS[:count])
    np.testing.assert_allclose(few.result.x, many.x[:count], atol=1e-6)
    assert few.result.nfe.tolist() == many.nfe[:count].tolist() and few.executed_nfe >= few.result.nfe.sum()
"""


@pytest.mark.slow
def test_more_devices_than_samples():
  run_python("-c", PROGRAM, devices=8)


def test_places_without_a_sample_cost_no_batches(row):
  row.update(batching="static", threshold=None, max_nfe=5)
  chunks = dict(generator(4).chunks("row", row, np.arange(22) % 10, 20, [0, 1]))
  assert [len(chunks[number].result.x) for number in (0, 1)] == [20, 2]
  assert chunks[0].executed_nfe == 5 * 20 and chunks[1].executed_nfe == 5 * 4


def test_integrators_are_rows_too(row):
  row.update(rule="dopri5", tolerance=1e-5, step_size=0.003, threshold=None)
  samples = sample(row, 5)
  noise = sampler.start_noise(jax.random.key(0), np.arange(13), (8, 8, 1))
  np.testing.assert_allclose(samples.result.x, noise * np.exp(-(2.0 + LABELS))[:, None, None, None], atol=1e-3)
  row.update(rule="euler", tolerance=None, max_nfe=50)
  assert set(sample(row, 5).result.nfe) == {50}
  row.update(rule="gd", step_size=1 / 50)
  np.testing.assert_allclose(
    sample(row, 5).result.x, noise * (1 - (2.0 + LABELS) / 50)[:, None, None, None] ** 50, atol=1e-5
  )


def test_step_size_auto(row):
  row.update(step_size="auto", threshold=None, max_nfe=20)
  noise = sampler.start_noise(jax.random.key(0), np.arange(13), (8, 8, 1))
  step = 2 / (4.0 * 20)
  expected = noise * (1 - step * (2.0 + LABELS))[:, None, None, None] ** 20
  np.testing.assert_allclose(sample(row, 13).result.x, expected, atol=1e-5)
  linear = dataclasses.replace(generator(4), auto_length=sampler.auto_length(Schedule("linear")))
  np.testing.assert_allclose(linear.step_size(row), np.log(1 / 5e-4) / (4.0 * 20), rtol=2e-3)


def test_a_threshold_relative_to_lambda(row):
  absolute = sample(row, 13).result.nfe
  row.update(relative_threshold=True, threshold=0.25)
  np.testing.assert_array_equal(sample(row, 13).result.nfe, absolute)


@dataclasses.dataclass(frozen=True)
class ReadBowls(Bowls):
  """Bowls with one token that holds ‖x‖."""

  width: int = 1
  energy: str = "none"

  def apply(self, variables, x, label, *gamma, return_tokens=False):
    norm = jnp.linalg.norm(x.reshape(len(x), 1, -1), axis=-1, keepdims=True)
    f = super().apply(variables, x, label, *gamma)
    return (f, norm) if return_tokens else f


@pytest.fixture
def read_row(row, tmp_path):
  """γ̂ = 1 − ‖x‖/8; noise of 64 numbers has a norm of about 8."""
  readout = NoiseReadout(np.asarray([-1 / 8, 0.0], np.float32), np.float32(1.0))
  readouts.save(str(tmp_path / "readout.npz"), readout, 2.0)
  row.update(stop="gamma", threshold=0.9, readout=str(tmp_path / "readout.npz"))
  return row


@pytest.mark.parametrize("batching", ["continuous", pytest.param("static", marks=pytest.mark.slow)])
def test_samples_stop_by_a_readout(read_row, batching, caplog):
  read_row.batching = batching
  result = generator(1, ReadBowls()).samples("row", read_row, LABELS).result
  noise = sampler.start_noise(jax.random.key(0), np.arange(13), (8, 8, 1)).reshape(13, -1)
  norms = np.linalg.norm(noise, axis=1)[:, None] * (1 - 0.04 * (2.0 + LABELS))[:, None] ** np.arange(60)
  reached = norms <= 8 * (1 - 0.9)
  expected = np.where(reached.any(axis=1), reached.argmax(axis=1) + 1, 60)
  assert len(set(result.nfe)) > 4
  np.testing.assert_array_equal(result.nfe, expected)
  np.testing.assert_allclose(result.gamma, 1 - norms[np.arange(13), expected - 1] / 8, atol=1e-4)
  read_row.update(threshold=0.999, max_nfe=5)
  generator(1, ReadBowls()).samples("row", read_row, LABELS)
  assert "100.0 % of the samples spent max_nfe = 5 below the threshold 0.999" in caplog.text
  assert generator_lib.stop_condition(read_row) == "γ̂ ≥ 0.999"


@pytest.mark.parametrize(
  "changes, params, text",
  [
    (dict(threshold=1.5), 2.0, r"samplers.row: threshold = 1.5 must be in \(0, 1\)"),
    (dict(threshold=None), 2.0, r"samplers.row: threshold = 0.0 must be in \(0, 1\)"),
    (dict(readout="/nowhere.npz"), 2.0, "samplers.row: /nowhere.npz: no such file: fit one with --mode=readout"),
    (dict(readout=None), 2.0, "samplers.row: stop = 'gamma', but readout = None: fit one with --mode=readout"),
    (dict(stop="norm"), 2.0, "samplers.row: readout = '.*readout.npz' has no effect with stop = 'norm'"),
    (dict(stop="time"), 2.0, "samplers.row: stop = 'time' must be one of norm, gamma"),
    (dict(relative_threshold=True), 2.0, "relative_threshold = True divides ‖f‖ by λ, but stop = 'gamma'"),
    (dict(rule="heun"), 2.0, "stop = 'gamma' is for rules that descend, but rule = 'heun' integrates"),
    ({}, 3.0, "samplers.row: .*readout.npz: fitted to other weights"),
  ],
)
def test_rows_with_a_readout_that_does_not_fit_are_refused(read_row, changes, params, text):
  made = dataclasses.replace(generator(5, ReadBowls()), params=params)
  made.check("row", read_row) if params == 2.0 else None
  read_row.update(changes)
  with pytest.raises(ValueError, match=text):
    made.check("row", read_row)


@pytest.mark.parametrize(
  "model, text",
  [
    (ReadBowls(width=3), "samplers.row: .*: the read-out is of a model of width 1, but this one has 3"),
    (ReadBowls(energy="dot"), "samplers.row: .*gradient of an energy"),
    (ReadBowls(time_input=True), "descends a field without time"),
  ],
)
def test_models_that_a_rows_readout_is_not_of_are_refused(read_row, model, text):
  with pytest.raises(ValueError, match=text):
    generator(5, model).check("row", read_row)


def test_spent_budgets_and_divergence_are_warned_of(row, caplog):
  row.update(threshold=1e-6, max_nfe=5)
  sample(row, 13)
  assert "100.0 % of the samples spent max_nfe = 5 above the threshold 1e-06" in caplog.text
  row.update(step_size=1e30, max_nfe=50)
  sample(row, 13)
  assert "100.0 % of the samples diverged" in caplog.text


@pytest.mark.parametrize(
  "changes, text",
  [
    (dict(rule="rk4"), "samplers.row.rule = 'rk4' must be one of gd, nag.*heun"),
    (dict(step_size=-1.0), "samplers.row: step_size = -1.0"),
    (dict(rule="gd", momentum=0.3), "samplers.row: momentum = 0.3"),
    (dict(threshold=-1.0), "samplers.row: threshold = -1.0"),
    (dict(rule="tsit5"), "samplers.row: solver 'tsit5' controls its steps"),
    (dict(rule="euler_maruyama"), "time_conditional=True"),
    (dict(guidance=2.0, guidance_channels=3), "1 channels"),
    (dict(batching="dynamic"), "samplers.row.batching = 'dynamic' must be one of continuous, static"),
  ],
)
def test_rows_that_cannot_be_sampled_are_refused(row, changes, text):
  row.update(changes)
  with pytest.raises(ValueError, match=text):
    generator(5).check("row", row)


def test_a_timed_model_takes_only_integrators(row):
  with pytest.raises(ValueError, match="descends a field without time"):
    generator(5, Bowls(time_input=True)).check("row", row)
  row.update(rule="euler_maruyama", max_nfe=10)
  generator(5, Bowls(time_input=True)).check("row", row)
  samples = generator(5, Bowls(time_input=True)).samples("row", row, LABELS)
  again = generator(13, Bowls(time_input=True)).samples("row", row, LABELS)
  np.testing.assert_allclose(samples.result.x, again.result.x, atol=1e-5)  # the noise is the sample's, not the batch's
