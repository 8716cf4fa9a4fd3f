import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from eqm_jax.equilibrium import sampler, update_rules
from eqm_jax.equilibrium.objective import KINDS, Schedule, magnitude
from eqm_jax.equilibrium.sampler import Status, descend

X0 = jnp.asarray([[4.0, 0.0], [0.0, 1.0], [2.0, 2.0]])


def bowl(x):
  """∇ of 5‖x‖²: gradient descent multiplies x by (1 − 10η) at each step."""
  return 10 * x


def test_gd_takes_the_steps_of_its_formula():
  result = descend(bowl, X0, step_size=0.02, rule="gd", max_nfe=7)
  np.testing.assert_allclose(result.x, X0 * 0.8**7, rtol=1e-6)
  np.testing.assert_allclose(result.norm, 10 * np.linalg.norm(X0 * 0.8**6, axis=1), rtol=1e-5)
  assert result.nfe.tolist() == [7, 7, 7]
  assert result.status.tolist() == [Status.BUDGET] * 3


def test_nag_looks_ahead_along_the_last_displacement_and_updates_from_x():
  x, previous = X0, X0
  for _ in range(6):
    x, previous = x - 0.02 * bowl(x + 0.4 * (x - previous)), x
  result = descend(bowl, X0, step_size=0.02, momentum=0.4, rule="nag", max_nfe=6)
  np.testing.assert_allclose(result.x, x, rtol=1e-5)


def test_each_sample_stops_at_its_own_threshold_and_is_frozen():
  thresholds = jnp.asarray([20.0, 1.0, 5.0])
  result = descend(bowl, X0, step_size=0.02, rule="gd", max_nfe=100, threshold=thresholds)
  for x0, threshold, x, nfe, norm in zip(X0, thresholds, result.x, result.nfe, result.norm):
    alone = descend(bowl, x0[None], step_size=0.02, rule="gd", max_nfe=100, threshold=threshold)
    np.testing.assert_allclose(alone.x[0], x, rtol=1e-6)
    assert alone.nfe[0] == nfe
    assert norm <= threshold < norm / 0.8
    # The last evaluation found the gradient small and moved nothing: the norm is that of the result.
    np.testing.assert_allclose(jnp.linalg.norm(bowl(x)), norm, rtol=1e-5)
  assert result.status.tolist() == [Status.CONVERGED] * 3


def test_a_sample_that_diverges_keeps_its_last_finite_place_and_harms_no_other():
  def field_fn(x):
    return jnp.where(x[:, :1] > 3, jnp.nan, bowl(x))

  result = descend(field_fn, X0, step_size=0.02, rule="gd", max_nfe=100, threshold=1e-3)
  assert result.status.tolist() == [Status.DIVERGED, Status.CONVERGED, Status.CONVERGED]
  assert result.nfe[0] == 1
  np.testing.assert_array_equal(result.x[0], X0[0])


def test_too_large_a_step_is_reported_as_divergence():
  result = descend(bowl, X0, step_size=1e6, rule="gd", max_nfe=100)
  assert result.status.tolist() == [Status.DIVERGED] * 3
  assert np.all(np.isfinite(result.x))


def test_optax_updates_are_scaled_by_the_step_size():
  plain = descend(bowl, X0, step_size=0.02, rule="gd", max_nfe=5)
  through_optax = descend(bowl, X0, step_size=0.02, rule=optax.sgd(1.0), max_nfe=5)
  np.testing.assert_allclose(through_optax.x, plain.x, rtol=1e-6)


def test_optax_state_belongs_to_each_sample():
  rule = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1))
  together = descend(bowl, X0, step_size=1.0, rule=rule, max_nfe=200, threshold=1.0)
  for i in range(3):
    alone = descend(bowl, X0[i : i + 1], step_size=1.0, rule=rule, max_nfe=200, threshold=1.0)
    np.testing.assert_allclose(alone.x[0], together.x[i], atol=1e-6)
  assert together.status.tolist() == [Status.CONVERGED] * 3


def test_a_rule_of_the_caller_has_its_own_state_and_momentum():
  heavy_ball = update_rules.UpdateRule(
    init=jnp.zeros_like,
    lookahead=lambda x, v, settings: x,
    update=lambda x, f, v, step_size, settings, key: (
      x + settings.momentum * v - step_size * f,
      settings.momentum * v - step_size * f,
    ),
  )
  x, v = X0, jnp.zeros_like(X0)
  for _ in range(6):
    v = 0.4 * v - 0.02 * bowl(x)
    x = x + v
  result = descend(bowl, X0, step_size=0.02, momentum=0.4, rule=heavy_ball, max_nfe=6)
  np.testing.assert_allclose(result.x, x, rtol=1e-5)


def test_classical_nesterov_accumulates_its_velocity():
  x, v = X0, jnp.zeros_like(X0)
  for _ in range(6):
    v = 0.4 * v - 0.02 * bowl(x + 0.4 * v)
    x = x + v
  result = descend(bowl, X0, step_size=0.02, momentum=0.4, rule="nesterov", max_nfe=6)
  np.testing.assert_allclose(result.x, x, rtol=1e-5)
  nag = descend(bowl, X0, step_size=0.02, momentum=0.4, rule="nag", max_nfe=6)
  assert not np.allclose(nag.x, x)


def test_named_adam_is_that_of_optax():
  named = descend(bowl, X0, step_size=0.05, rule="adam", max_nfe=20)
  np.testing.assert_allclose(named.x, descend(bowl, X0, step_size=1.0, rule=optax.adam(0.05), max_nfe=20).x, rtol=1e-5)


def test_lbfgs_learns_the_curvature_of_each_sample():
  """A stiff quadratic, where gradient descent is slow."""
  stiffness = jnp.asarray([1.0, 100.0])
  stiff = jax.tree_util.Partial(lambda x: stiffness * x)
  gd = descend(stiff, X0 + 1, step_size=0.01, rule="gd", max_nfe=200, threshold=1e-3)
  lbfgs = descend(stiff, X0 + 1, step_size=0.5, rule="lbfgs", max_nfe=200, threshold=1e-3)
  assert gd.status.tolist() == [Status.BUDGET] * 3 and lbfgs.status.tolist() == [Status.CONVERGED] * 3


def test_langevin_samples_the_distribution_of_its_energy():
  """exp(−E/T) with E = 5‖x‖² is a Gaussian of variance T/10."""
  x0 = jnp.zeros((4000, 2))
  result = descend(bowl, x0, step_size=0.005, rule="langevin", temperature=2.0, max_nfe=200, key=jax.random.key(0))
  np.testing.assert_allclose(result.x.var(axis=0), 0.2, rtol=0.1)
  cold = descend(bowl, X0, step_size=0.005, rule="langevin", max_nfe=5, key=jax.random.key(0))
  np.testing.assert_allclose(cold.x, descend(bowl, X0, step_size=0.005, rule="gd", max_nfe=5).x, rtol=1e-6)


def test_a_schedule_gives_the_step_size_from_the_nfe_so_far():
  def schedule(nfe):
    return jnp.where(nfe < 2, 0.02, 0.05)

  result = descend(bowl, X0, step_size=schedule, rule="gd", max_nfe=3)
  np.testing.assert_allclose(result.x, X0 * 0.8 * 0.8 * 0.5, rtol=1e-6)


def test_auto_keeps_the_length_of_the_trajectory():
  for nfe in (10, 40):
    auto = descend(bowl, X0, step_size="auto", multiplier=4.0, rule="gd", max_nfe=nfe)
    by_hand = descend(bowl, X0, step_size=0.5 / nfe, rule="gd", max_nfe=nfe)
    np.testing.assert_allclose(auto.x, by_hand.x, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_length_of_auto_brings_the_ideal_trajectory_of_any_magnitude_to_the_data(kind):
  schedule, nfe, gamma = Schedule(kind, multiplier=3.0), 2000, jnp.zeros(())
  step_size = sampler.auto_length(schedule) / (schedule.multiplier * nfe)
  gamma = jax.lax.fori_loop(0, nfe, lambda _, gamma: gamma + step_size * magnitude(gamma, schedule), gamma)
  np.testing.assert_allclose(1 - gamma, 5e-4, atol=1e-3)


def test_the_length_of_auto_is_2_for_the_released_magnitude_and_bounded():
  assert sampler.auto_length(Schedule()) == sampler.auto_length(Schedule(multiplier=1.0)) == sampler.AUTO_LENGTH
  assert sampler.auto_length(Schedule("power", exponent=3.0)) == sampler.LONGEST


def test_the_threshold_can_be_relative_and_has_a_minimum_of_nfe():
  options = dict(step_size=0.02, rule="gd", max_nfe=100)
  absolute = descend(bowl, X0, threshold=2.0, **options)
  relative = descend(bowl, X0, threshold=0.5, multiplier=4.0, **options)
  np.testing.assert_array_equal(absolute.nfe, relative.nfe)
  late = descend(bowl, X0, threshold=2.0, min_nfe=12, **options)
  np.testing.assert_array_equal(late.nfe, np.maximum(absolute.nfe, 12))


@jax.tree_util.Partial
def bowl_with_level(x):
  """The bowl, and as γ̂ the part of ‖x‖ = 8 that is gone."""
  return bowl(x), 1 - jnp.linalg.norm(x, axis=-1) / 8


def test_a_sample_stops_where_gamma_reaches_its_own_threshold():
  thresholds = jnp.asarray([0.65, 0.9, 0.95])
  result = descend(bowl_with_level, X0, step_size=0.02, max_nfe=100, threshold=thresholds, stop="gamma")
  level = 1 - np.linalg.norm(X0, axis=1)[:, None] * 0.8 ** np.arange(100) / 8
  updates = np.argmax(level >= np.asarray(thresholds)[:, None], axis=1)
  np.testing.assert_array_equal(result.nfe, updates + 1)
  np.testing.assert_allclose(result.x, X0 * 0.8 ** updates[:, None], rtol=1e-5)
  np.testing.assert_allclose(result.gamma, level[np.arange(3), updates], rtol=1e-5)
  np.testing.assert_allclose(result.norm, 10 * np.linalg.norm(result.x, axis=1), rtol=1e-5)
  assert result.status.tolist() == [Status.CONVERGED] * 3
  late = descend(bowl_with_level, X0, step_size=0.02, max_nfe=100, threshold=thresholds, stop="gamma", min_nfe=12)
  np.testing.assert_array_equal(late.nfe, np.maximum(updates + 1, 12))
  early = descend(bowl_with_level, X0, step_size=0.02, max_nfe=4, threshold=0.99, stop="gamma")
  assert early.status.tolist() == [Status.BUDGET] * 3 and np.all(early.gamma < 0.99)


@pytest.mark.parametrize("rule", [dict(rule="gd"), dict(rule="nag", momentum=0.3)])
def test_what_samples_stop_by_does_not_change_their_steps(rule):
  by_level = descend(bowl_with_level, X0, step_size=0.02, max_nfe=9, threshold=0.999, stop="gamma", **rule)
  plain = descend(bowl, X0, step_size=0.02, max_nfe=9, **rule)
  np.testing.assert_allclose(by_level.x, plain.x, rtol=1e-6)
  assert plain.gamma is None


@pytest.mark.parametrize(
  "field_fn, arguments, text",
  [
    (bowl, dict(stop="gamma", threshold=0.9), r"needs a field that returns \(f, γ̂\), but this one returned f alone"),
    (bowl_with_level, dict(threshold=0.9), "stop = 'norm' takes f alone: pass stop='gamma'"),
    (lambda x: (bowl(x), x), dict(stop="gamma", threshold=0.9), r"γ̂ of shape \(3, 2\) for 3 samples"),
    (bowl_with_level, dict(stop="gamma"), r"threshold = 0.0 must be in \(0, 1\): with stop = 'gamma'"),
    (bowl_with_level, dict(stop="gamma", threshold=1.0), r"threshold = 1.0 must be in \(0, 1\)"),
    (bowl_with_level, dict(stop="gamma", threshold=[0.5, -0.1, 0.5]), r"threshold = \[0.5, -0.1, 0.5\] must be in"),
    (bowl_with_level, dict(stop="time", threshold=0.9), "stop = 'time' must be one of norm, gamma"),
  ],
)
def test_stops_that_do_not_fit_the_field_are_refused(field_fn, arguments, text):
  with pytest.raises(ValueError, match=text):
    descend(field_fn, X0, step_size=0.1, max_nfe=3, **arguments)


def test_recording_shows_the_trajectory_and_changes_nothing():
  options = dict(step_size=0.02, rule="gd", max_nfe=30, threshold=2.0)
  plain = descend(bowl, X0, **options)
  result = descend(bowl, X0, record_at=(0, 3, 7, 30), **options)
  np.testing.assert_allclose(result.x, plain.x, rtol=1e-6)  # two programs: to rounding
  assert plain.record is None and result.record["x"].shape == (4, *X0.shape)
  for k, x, norm in zip((0, 3, 7, 30), result.record["x"], result.record["norm"]):
    updates = np.minimum(k, plain.nfe - 1)[:, None]
    np.testing.assert_allclose(x, X0 * 0.8**updates, rtol=1e-5)
    if k == 3:
      np.testing.assert_allclose(norm, 10 * np.linalg.norm(X0 * 0.8**2, axis=1), rtol=1e-5)
  energies = descend(
    bowl, X0, record_at=range(6), record_fn=lambda x, norm: 5 * jnp.sum(x**2, axis=-1), **options
  ).record
  assert energies.shape == (6, 3) and np.all(np.diff(energies, axis=0) < 0)


@pytest.mark.parametrize("shape", [(3, 1), (3, 4), (2,)])
def test_a_field_of_another_shape_is_refused(shape):
  with pytest.raises(ValueError, match="it must be the same"):
    descend(lambda x: jnp.ones(shape), X0, step_size=0.1, max_nfe=3)


def test_weights_budget_and_threshold_are_arguments_not_constants():
  calls = []

  @jax.tree_util.Partial
  def counted(x):
    calls.append(1)
    return bowl(x)

  def traces(**arguments):
    calls.clear()
    descend(counted, X0, rule="nag", **{"momentum": 0.2, **arguments})
    return len(calls)

  assert traces(step_size=0.02, max_nfe=5) > 0
  assert traces(step_size=0.01, momentum=0.3, max_nfe=9, threshold=2.0) == 0
  field = jax.tree_util.Partial(lambda weight, x: weight * x, jnp.asarray(10.0))
  other = jax.tree_util.Partial(field.func, jnp.asarray(5.0))
  before = sampler._descend._cache_size()
  first, second = (descend(f, X0, step_size=0.02, rule="gd", max_nfe=3).x for f in (field, other))
  assert sampler._descend._cache_size() == before + 1
  assert not np.allclose(first, second)


def test_a_partial_with_arguments_of_any_kind_is_a_field():
  field_fn = functools.partial(lambda kind, x: {"bowl": bowl}[kind](x), "bowl")
  expected = descend(bowl, X0, step_size=0.02, rule="gd", max_nfe=3)
  before = sampler._descend._cache_size()
  for _ in range(2):
    result = descend(field_fn, X0, step_size=0.02, rule="gd", max_nfe=3)
    np.testing.assert_array_equal(result.x, expected.x)
  assert sampler._descend._cache_size() == before + 1


def test_state_is_float32_even_from_bfloat16():
  assert descend(bowl, X0.astype(jnp.bfloat16), step_size=0.02, max_nfe=2).x.dtype == jnp.float32


def test_start_noise_depends_on_key_and_index_alone():
  noise = sampler.start_noise(jax.random.key(3), np.arange(6), (2, 2, 1))
  some = sampler.start_noise(jax.random.key(3), np.asarray([5, 2]), (2, 2, 1))
  np.testing.assert_allclose(some, noise[jnp.asarray([5, 2])], atol=1e-6)  # other shapes: to rounding
  assert len(np.unique(noise[:, 0, 0, 0])) == 6
  assert not np.allclose(sampler.start_noise(jax.random.key(4), np.arange(6), (2, 2, 1)), noise)


@pytest.mark.parametrize(
  "arguments, text",
  [
    (dict(step_size=0.0), "step_size = 0.0"),
    (dict(step_size=-0.1), "step_size = -0.1"),
    (dict(step_size=float("nan")), "step_size = nan"),
    (dict(momentum=1.0, rule="nag"), r"momentum = 1.0 must be in \[0, 1\)"),
    (dict(momentum=-0.1, rule="nag"), r"momentum = -0.1 must be in \[0, 1\)"),
    (dict(rule="nag"), "momentum = 0 makes rule 'nag' plain gradient descent: .*rule='gd'"),
    (dict(rule="nesterov"), "momentum = 0 makes rule 'nesterov'"),
    (dict(momentum=0.3, rule="gd"), "rule 'gd' takes none"),
    (dict(rule="sgd"), "'sgd' is not known"),
    (dict(rule=0.1), "neither a name, an UpdateRule nor an optax"),
    (dict(rule=optax.lbfgs()), "such as the value of a loss"),
    (dict(rule="langevin", temperature=0.1), "key="),
    (dict(rule="langevin", temperature=-0.1, key=jax.random.key(0)), "temperature = -0.1"),
    (dict(temperature=0.1), "belongs to rule 'langevin'"),
    (dict(step_size="small"), "'small'"),
    (dict(min_nfe=4), "min_nfe = 4"),
    (dict(multiplier=0.0), "multiplier = 0.0"),
    (dict(max_restarts=1), "key="),
    (dict(record_at=[2, 1]), r"record_at = \(2, 1\)"),
    (dict(record_at=[4]), r"record_at = \(4,\)"),
    (dict(max_nfe=0), "max_nfe = 0"),
    (dict(threshold=-1.0), "threshold = -1.0"),
    (dict(threshold=jnp.ones(2)), "3 samples"),
    (dict(x0=jnp.ones((3, 2), jnp.int32)), "int32"),
  ],
)
def test_bad_input_is_refused(arguments, text):
  with pytest.raises(ValueError, match=text):
    descend(bowl, **{"x0": X0, "step_size": 0.1, "max_nfe": 3, **arguments})


def test_progress_counts_network_calls_and_compiles_once_for_all_functions():
  before = sampler._descend._cache_size()
  options = dict(step_size=0.02, max_nfe=250)
  field_fn = jax.tree_util.Partial(bowl)
  for _ in range(2):
    reports = []
    counted = descend(field_fn, X0, **options, progress=reports.append)
    assert sum(reports) == 250 and 100 <= len(reports) <= 126
  assert sampler._descend._cache_size() == before + 1
  np.testing.assert_array_equal(counted.x, descend(field_fn, X0, **options).x)

  reports = []
  stopped = descend(bowl, X0, **options, threshold=1.0, progress=reports.append)
  assert sum(reports) == stopped.nfe.max() < 250


def test_progress_is_reported_by_a_compiled_program_too():
  reports = []
  run = jax.jit(lambda x: descend(bowl, x, step_size=0.02, max_nfe=30, progress=reports.append).x)
  for count in (1, 2):
    jax.block_until_ready(run(X0))
    jax.effects_barrier()
    assert sum(reports) == 30 * count


def test_without_progress_a_descent_calls_nothing_on_the_host():
  jaxpr = str(jax.make_jaxpr(lambda x: descend(bowl, x, step_size=0.02, max_nfe=30).x)(X0))
  assert "callback" not in jaxpr and "while" in jaxpr


def test_an_error_of_a_progress_function_is_raised():
  def refuse(count):
    raise KeyError("no")

  with pytest.raises(RuntimeError, match="KeyError"):
    descend(bowl, X0, step_size=0.02, max_nfe=30, progress=refuse)
  assert descend(bowl, X0, step_size=0.02, max_nfe=30).nfe.tolist() == [30] * 3
