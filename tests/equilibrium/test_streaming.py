import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import run_python

from eqm_jax.equilibrium.sampler import Status, descend, start_noise
from eqm_jax.equilibrium.streaming import descend_stream

N = 120
KEY = jax.random.key(3)
# Steepness of each sample's bowl: from a few to hundreds of steps.
LABELS = jnp.asarray(np.random.default_rng(0).integers(1, 60, N))


def bowls(x, label_S):
  return (0.5 + label_S[:, None] / 4).astype(x.dtype) * x


OPTIONS = dict(step_size=0.02, max_nfe=300, threshold=0.3)
NAG, LANGEVIN = dict(rule="nag", momentum=0.3), dict(rule="langevin", temperature=1e-3)
MORE_RULES = [dict(rule="gd"), dict(rule="nesterov", momentum=0.5), dict(rule="adam"), dict(rule="lbfgs")]


@pytest.mark.parametrize(
  "slots, rule",
  [
    (1, NAG),
    (9, LANGEVIN),
    *(pytest.param(slots, rule, marks=pytest.mark.slow) for slots, rule in [(9, NAG), (1, LANGEVIN)]),
    *(pytest.param(slots, rule, marks=pytest.mark.slow) for slots in (1, 9) for rule in MORE_RULES),
  ],
  ids=lambda value: value["rule"] if isinstance(value, dict) else str(value),
)
def test_results_are_those_of_descend_whatever_the_slots(slots, rule):
  with jax.enable_x64(True):
    noise = start_noise(KEY, np.arange(N), (5,), jnp.float64)
    expected = descend(lambda x: bowls(x, LABELS), noise, key=KEY, **OPTIONS, **rule)
    assert len(set(expected.nfe.tolist())) > 5
    result = descend_stream(bowls, LABELS, KEY, shape=(5,), slots=slots, dtype=jnp.float64, **OPTIONS, **rule)
    np.testing.assert_allclose(result.x, expected.x, rtol=0, atol=1e-10)
    np.testing.assert_allclose(result.norm, expected.norm, rtol=1e-6)
    np.testing.assert_array_equal(result.nfe, expected.nfe)
    np.testing.assert_array_equal(result.status, expected.status)


@pytest.mark.parametrize("slots", [pytest.param(1, marks=pytest.mark.slow), 9])
def test_slots_stop_by_gamma_as_descend_does(slots):
  def with_level(x, label_S):
    return bowls(x, label_S), 1 - jnp.linalg.norm(x, axis=-1) / 4

  options = {**OPTIONS, "threshold": 0.8, "stop": "gamma"}
  expected = descend(lambda x: with_level(x, LABELS), start_noise(KEY, np.arange(N), (5,)), **options)
  result = descend_stream(with_level, LABELS, KEY, shape=(5,), slots=slots, **options)
  assert len(set(expected.nfe.tolist())) > 5 and Status.CONVERGED in expected.status
  np.testing.assert_array_equal(result.nfe, expected.nfe)
  for name in ("x", "norm", "gamma"):
    np.testing.assert_allclose(getattr(result, name), getattr(expected, name), atol=1e-5)


def test_executed_nfe_is_little_more_than_the_samples_need():
  result = descend_stream(bowls, LABELS, KEY, shape=(5,), slots=N // 8, rule="gd", **OPTIONS)
  needed = int(result.nfe.sum())
  assert needed <= int(result.executed_nfe) <= 1.10 * needed


def test_it_does_less_than_half_of_what_static_batching_does():
  slots = N // 8
  result = descend_stream(bowls, LABELS, KEY, shape=(5,), slots=slots, rule="gd", **OPTIONS)
  static = sum(int(result.nfe[i : i + slots].max()) * slots for i in range(0, N, slots))
  assert static > 2 * int(result.executed_nfe)


def test_a_large_sample_set_can_be_drawn_chunk_by_chunk():
  whole = descend_stream(bowls, LABELS, KEY, shape=(5,), slots=2, rule="gd", **OPTIONS)
  chunk = descend_stream(bowls, LABELS[50:90], KEY, shape=(5,), slots=2, rule="gd", index=np.arange(50, 90), **OPTIONS)
  np.testing.assert_allclose(chunk.x, whole.x[50:90], atol=1e-6)
  np.testing.assert_array_equal(chunk.nfe, whole.nfe[50:90])


def test_labels_may_be_any_tree():
  labels = {"steepness": LABELS, "center": jnp.linspace(-1, 1, N)}

  def field_fn(x, label):
    return bowls(x - label["center"][:, None], label["steepness"])

  result = descend_stream(field_fn, labels, KEY, shape=(3,), slots=3, rule="gd", **{**OPTIONS, "threshold": 0.01})
  done = result.status == Status.CONVERGED
  assert done.mean() > 0.5
  np.testing.assert_allclose(result.x[done], np.broadcast_to(labels["center"][:, None], (N, 3))[done], atol=0.05)


def test_one_diverging_sample_harms_no_other():
  def field_fn(x, label_S):
    return jnp.where((label_S == 0)[:, None], jnp.nan, bowls(x, label_S))

  labels = LABELS.at[jnp.asarray([3, 77])].set(0)
  result = descend_stream(field_fn, labels, KEY, shape=(5,), slots=2, rule="gd", **OPTIONS)
  expected = descend_stream(bowls, labels, KEY, shape=(5,), slots=2, rule="gd", **OPTIONS)
  bad = np.asarray(labels == 0)
  assert set(result.status[bad].tolist()) == {Status.DIVERGED} and Status.DIVERGED not in result.status[~bad].tolist()
  np.testing.assert_allclose(result.x[~bad], expected.x[~bad], atol=1e-6)
  assert np.all(np.isfinite(result.x)) and np.all(result.nfe[bad] == 1)


def test_restarts_are_counted_and_come_from_other_noise():
  def field_fn(x, label_S):  # not defined where the first number is high
    return jnp.where(x[:, :1] > 1.0, jnp.nan, bowls(x, label_S))

  plain = descend_stream(field_fn, LABELS, KEY, shape=(5,), slots=2, rule="gd", **OPTIONS)
  again = descend_stream(field_fn, LABELS, KEY, shape=(5,), slots=2, rule="gd", max_restarts=20, **OPTIONS)
  lost = np.asarray(plain.status == Status.DIVERGED)
  assert 0.05 < lost.mean() < 0.4 and Status.DIVERGED not in again.status.tolist()
  assert np.all(again.restarts[lost] >= 1) and np.all(again.restarts[~lost] == 0)
  np.testing.assert_allclose(again.x[~lost], plain.x[~lost], atol=1e-6)
  noise = start_noise(KEY, np.arange(N), (5,))
  alone = descend(lambda x: field_fn(x, LABELS), noise, rule="gd", key=KEY, max_restarts=20, **OPTIONS)
  np.testing.assert_array_equal(alone.restarts, again.restarts)
  np.testing.assert_allclose(alone.x, again.x, atol=1e-6)


def test_a_threshold_that_is_never_met_spends_the_budget():
  options = dict(OPTIONS, threshold=1e-9, max_nfe=12)
  result = descend_stream(bowls, LABELS, KEY, shape=(5,), slots=2, rule="gd", **options)
  assert set(result.status.tolist()) == {Status.BUDGET} and set(result.nfe.tolist()) == {12}


@pytest.mark.parametrize(
  "arguments, text",
  [
    (dict(slots=N + 1), f"slots = {N + 1} .*{N}"),
    (dict(slots=0), "slots = 0"),
    (dict(labels=LABELS[:0]), "at least one label"),
    (dict(labels={"a": LABELS, "b": LABELS[:3]}), r"\[3, 120\]"),
    (dict(max_restarts=-1), "max_restarts = -1"),
    (dict(step_size=0.0), "step_size = 0.0"),
  ],
)
def test_bad_input_is_refused(arguments, text):
  with pytest.raises(ValueError, match=text):
    options = {"labels": LABELS, "slots": 6, "rule": "gd", **OPTIONS, **arguments}
    descend_stream(bowls, options.pop("labels"), KEY, shape=(5,), **options)


# On 8 pretended devices, against what one device gives.
PROGRAM = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from test_streaming import KEY, LABELS, OPTIONS, bowls
from eqm_jax.equilibrium.streaming import descend_stream
from eqm_jax.training import sharding

mesh = sharding.make_mesh(4, 2, 1)
field = jax.tree_util.Partial(lambda weight, x, label: weight * bowls(x, label), jnp.ones(()))
with jax.enable_x64(True):
  out = {}
  for slots in (8, 16):
    reports = []
    r = descend_stream(field, LABELS[:117], KEY, shape=(5,), slots=slots, rule="langevin", temperature=1e-3,
                       mesh=mesh, dtype=jnp.float64, **OPTIONS, progress=reports.append)
    out[slots] = [r.x.tolist(), r.nfe.tolist(), int(r.executed_nfe), sum(reports)]
out["devices"] = jax.device_count()
options = dict(shape=(5,), slots=8, mesh=mesh, rule="gd", **OPTIONS)
loops = str(jax.make_jaxpr(lambda labels: descend_stream(field, labels, KEY, **options))(LABELS))
assert "shard_map" in loops and "while" in loops
out["collectives"] = sum(loops.count(word) for word in ("psum", "all_gather", "ppermute", "all_to_all"))
try:
  descend_stream(field, LABELS, KEY, shape=(5,), slots=12, mesh=mesh, rule="gd", **OPTIONS)
except ValueError as error:
  out["error"] = str(error)
json.dump(out, sys.stdout)
"""


@pytest.mark.slow  # an evaluation on eight devices is streamed too
def test_every_device_runs_a_queue_of_its_own_and_the_samples_are_the_same():
  output = json.loads(run_python("-c", PROGRAM, devices=8).stdout)
  assert output["devices"] == 8 and output["collectives"] == 0
  assert "slots = 12 do not divide over 8 devices" in output["error"]
  with jax.enable_x64(True):
    one = descend_stream(
      bowls, LABELS[:117], KEY, shape=(5,), slots=10, rule="langevin", temperature=1e-3, dtype=jnp.float64, **OPTIONS
    )
  for slots in ("8", "16"):
    x, nfe, executed_nfe, reported = output[slots]
    assert reported == 117
    np.testing.assert_allclose(x, one.x, rtol=0, atol=1e-10)
    np.testing.assert_array_equal(nfe, one.nfe)
    assert executed_nfe < 1.6 * sum(nfe)


def test_progress_counts_samples_that_are_done():
  reports = []
  result = descend_stream(bowls, LABELS, KEY, shape=(5,), slots=9, **OPTIONS, progress=reports.append)
  assert sum(reports) == len(result.nfe) == N and len(reports) > 10
