import dataclasses

import jax
import numpy as np
import pytest

from eqm_jax.equilibrium import sampler
from eqm_jax.evaluation import samplers

LABELS = np.arange(13, dtype=np.int32) % 10


@dataclasses.dataclass(frozen=True)
class Bowls:
  """A model whose field is steeper for some labels, so that samples need different numbers of steps."""

  num_classes: int = 10
  input_shape: tuple[int, ...] = (8, 8, 1)
  time_input: bool = False

  def apply(self, variables, x, label, *gamma):
    return (variables["params"] + label[:, None, None, None]) * x


def batching(batch_size: int) -> samplers.Batching:
  return samplers.Batching(batch_size, jax.random.key(0), multiplier=4.0)


@pytest.fixture
def row(tiny_config):
  row = tiny_config.samplers.adaptive
  row.update(threshold=1.0, step_size=0.04, max_evaluations=60)
  return row


def draw(row, batch_size, labels=LABELS):
  return samplers.draw("row", row, Bowls(), 2.0, labels, batching(batch_size))


@pytest.mark.parametrize("streaming", [True, False])
def test_samples_do_not_depend_on_the_batches(row, streaming):
  row.streaming = streaming
  whole, parts = draw(row, 13), draw(row, 5)
  assert whole.result.x.shape == (13, 8, 8, 1) and parts.seconds > 0
  np.testing.assert_allclose(parts.result.x, whole.result.x, atol=1e-6)
  np.testing.assert_array_equal(parts.result.evaluations_B, whole.result.evaluations_B)
  assert len(set(whole.result.evaluations_B)) > 5, "the samples should differ in their evaluations"
  noise = sampler.start_noise(jax.random.key(0), np.arange(13), (8, 8, 1))
  steepness = (2.0 + LABELS)[:, None, None, None]
  updates = (whole.result.evaluations_B - 1)[:, None, None, None]
  np.testing.assert_allclose(whole.result.x, noise * (1 - 0.04 * steepness) ** updates, atol=1e-5)
  assert parts.hardware_evaluations >= parts.result.evaluations_B.sum()


def test_places_without_a_sample_cost_no_batches(row):
  row.update(streaming=False, threshold=0.0, max_evaluations=5)
  units = dict(samplers.draw_units("row", row, Bowls(), 2.0, np.arange(22) % 10, batching(4), 20, [0, 1]))
  assert [len(units[number].result.x) for number in (0, 1)] == [20, 2]
  assert units[0].hardware_evaluations == 5 * 20 and units[1].hardware_evaluations == 5 * 4


def test_long_streams_come_in_parts(row, monkeypatch):
  whole = draw(row, 4)
  monkeypatch.setattr(samplers, "STREAM_LENGTH", 2)  # parts of 8 and 5
  parts = draw(row, 4)
  np.testing.assert_allclose(parts.result.x, whole.result.x, atol=1e-6)


def test_integrators_are_rows_too(row):
  row.update(rule="dopri5", tolerance=1e-5, step_size=0.003, threshold=0.0)
  drawn = draw(row, 5)
  noise = sampler.start_noise(jax.random.key(0), np.arange(13), (8, 8, 1))
  np.testing.assert_allclose(drawn.result.x, noise * np.exp(-(2.0 + LABELS))[:, None, None, None], atol=1e-3)
  row.update(rule="euler", tolerance=0.0, max_evaluations=50)
  assert set(draw(row, 5).result.evaluations_B) == {50}
  row.update(rule="gd", step_size=1 / 50)
  np.testing.assert_allclose(
    draw(row, 5).result.x, noise * (1 - (2.0 + LABELS) / 50)[:, None, None, None] ** 50, atol=1e-5
  )


def test_step_size_zero_is_auto(row):
  row.update(step_size=0.0, threshold=0.0, max_evaluations=20)
  noise = sampler.start_noise(jax.random.key(0), np.arange(13), (8, 8, 1))
  step = 2 / (4.0 * 20)
  expected = noise * (1 - step * (2.0 + LABELS))[:, None, None, None] ** 20
  np.testing.assert_allclose(draw(row, 13).result.x, expected, atol=1e-5)


def test_a_threshold_relative_to_lambda(row):
  absolute = draw(row, 13).result.evaluations_B
  row.update(relative_threshold=True, threshold=0.25)
  np.testing.assert_array_equal(draw(row, 13).result.evaluations_B, absolute)


def test_spent_budgets_and_divergence_are_warned_of(row, caplog):
  row.update(threshold=1e-6, max_evaluations=5)
  draw(row, 13)
  assert "100.0 % of the samples spent max_evaluations = 5 above the threshold 1e-06" in caplog.text
  row.update(step_size=1e30, max_evaluations=50)
  draw(row, 13)
  assert "100.0 % of the samples diverged" in caplog.text


@pytest.mark.parametrize(
  "changes, text",
  [
    (dict(rule="rk4"), "samplers.row.rule = 'rk4'.*gd, nag.*heun"),
    (dict(step_size=-1.0), "samplers.row: step_size = -1.0"),
    (dict(rule="gd", momentum=0.3), "samplers.row: momentum = 0.3"),
    (dict(threshold=-1.0), "samplers.row: threshold = -1.0"),
    (dict(rule="tsit5"), "samplers.row: solver 'tsit5' controls its steps"),
    (dict(rule="euler_maruyama"), "timed=True"),
    (dict(guidance=2.0, guidance_channels=3), "1 channels"),
  ],
)
def test_rows_that_cannot_be_drawn_are_refused(row, changes, text):
  row.update(changes)
  with pytest.raises(ValueError, match=text):
    samplers.check("row", row, Bowls(), batching(5))


def test_a_timed_model_takes_only_integrators(row):
  with pytest.raises(ValueError, match="descends a field without time"):
    samplers.check("row", row, Bowls(time_input=True), batching(5))
  row.update(rule="euler_maruyama", max_evaluations=10)
  samplers.check("row", row, Bowls(time_input=True), batching(5))
  drawn = samplers.draw("row", row, Bowls(time_input=True), 2.0, LABELS, batching(5))
  again = samplers.draw("row", row, Bowls(time_input=True), 2.0, LABELS, batching(13))
  np.testing.assert_allclose(drawn.result.x, again.result.x, atol=1e-5)  # the noise is the sample's, not the batch's
