import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqm_jax.equilibrium import objective
from eqm_jax.equilibrium.gamma import mean_square_magnitude
from eqm_jax.equilibrium.objective import Schedule


def test_released_magnitude_at_the_papers_points():
  gamma = jnp.asarray([0.0, 0.2, 0.5, 0.8, 0.9, 1.0])
  np.testing.assert_allclose(objective.magnitude(gamma), [4, 4, 4, 4, 2, 0], atol=1e-6)


@pytest.mark.parametrize("kind", objective.KINDS)
def test_the_pieces_are_the_magnitude(kind):
  """At the ends of the ranges of the attributes, and at random places between."""
  low, high = np.array([0.05, 0.1, 0.1, 0.0, 0.2]), np.array([0.95, 4.0, 8.0, 0.95, 3.0])
  gamma = np.linspace(0, 1, 201)
  for numbers in [low, high, *np.random.default_rng(0).uniform(low, high, (20, 5))]:
    schedule = Schedule(kind, *map(float, numbers))
    by_pieces = np.full_like(gamma, np.nan)
    for piece in schedule.pieces:
      inside = (gamma >= piece.low) & (gamma <= piece.high)
      v = piece.first + (gamma[inside] - piece.low) * piece.slope
      by_pieces[inside] = schedule.multiplier * np.maximum(v, 0) ** piece.power
    with jax.enable_x64(True):
      np.testing.assert_allclose(objective.magnitude(jnp.asarray(gamma), schedule), by_pieces, atol=1e-6)


def test_the_self_stopping_magnitude_is_the_speed_of_its_path():
  """dγ/dt of γ = 2t/(1+t_c) up to t_c, then 1−γ = (1−t)²/(1−t_c²)."""
  t, t_c, step = np.linspace(0.001, 0.999, 999), 0.9, 1e-6
  path = lambda t: np.where(t <= t_c, 2 * t / (1 + t_c), 1 - (1 - t) ** 2 / (1 - t_c**2))  # noqa: E731
  speed = (path(t + step) - path(t - step)) / (2 * step)
  with jax.enable_x64(True):
    schedule = Schedule("self_stopping", breakpoint=t_c, multiplier=1.0)
    np.testing.assert_allclose(objective.magnitude(jnp.asarray(path(t)), schedule), speed, atol=1e-5)
  np.testing.assert_allclose(path(t_c), schedule.fall)


@pytest.mark.parametrize("kind", objective.KINDS)
def test_data_are_stationary_except_for_the_constant_schedule(kind):
  at_data = objective.magnitude(jnp.ones(()), Schedule(kind))
  assert at_data == (4 if kind == "constant" else 0)


def test_piecewise_is_continuous_and_starts_at_b():
  schedule = Schedule("piecewise", a=0.6, b=3.0, multiplier=2.0)
  before, at, after = objective.magnitude(jnp.asarray([0.5999, 0.6, 0.6001]), schedule)
  np.testing.assert_allclose([before, after], [at, at], rtol=1e-3)
  assert objective.magnitude(jnp.zeros(()), schedule) == 6.0


def test_zero_network_has_the_expected_loss():
  rng = np.random.default_rng(0)
  data, noise = (jnp.asarray(rng.normal(size=(4000, 4, 4, 1)), jnp.float32) for _ in range(2))
  gamma = jnp.asarray(rng.uniform(size=4000), jnp.float32)
  loss_B = objective.equilibrium_loss(jnp.zeros_like, data, noise, gamma, Schedule())
  np.testing.assert_allclose(loss_B.mean(), 2 * mean_square_magnitude(Schedule()), rtol=0.03)


def test_time_free_flow_matching_is_equilibrium_matching_with_constant_magnitude():
  rng = np.random.default_rng(0)
  data, noise = (jnp.asarray(rng.normal(size=(5, 4, 4, 1)), jnp.float32) for _ in range(2))
  gamma = jnp.asarray(rng.uniform(size=5), jnp.float32)
  flow = objective.flow_matching_loss(jnp.sin, data, noise, gamma, time_conditional=False)
  np.testing.assert_allclose(
    flow, objective.equilibrium_loss(jnp.sin, data, noise, gamma, Schedule("constant", multiplier=1.0)), rtol=1e-6
  )
  conditional = objective.flow_matching_loss(
    lambda x, g: jnp.sin(x) + g[:, None, None, None], data, noise, gamma, time_conditional=True
  )
  assert not np.allclose(flow, conditional)


def test_dispersive_loss_is_that_of_its_formula():
  tokens = np.random.default_rng(0).normal(size=(3, 2, 5))
  z = tokens.reshape(3, 10)
  pairs = [np.exp(-np.sum((a - b) ** 2) / 10) for a in z for b in z]
  np.testing.assert_allclose(objective.dispersive_loss(jnp.asarray(tokens)), np.log(np.mean(pairs)), rtol=1e-5)


def test_dispersive_loss_of_bfloat16_is_computed_in_float32():
  tokens = jnp.asarray(1e-2 * np.random.default_rng(0).normal(size=(8, 512)) + 3.0, jnp.bfloat16)
  loss = objective.dispersive_loss(tokens)
  assert loss.dtype == jnp.float32
  np.testing.assert_allclose(loss, objective.dispersive_loss(tokens.astype(jnp.float32)), rtol=1e-6)


@pytest.mark.parametrize(
  "arguments, text",
  [
    (dict(kind="cosine"), "cosine"),
    (dict(a=1.0), "a = 1.0"),
    (dict(kind="piecewise", a=0.0), "a = 0.0"),
    (dict(kind="piecewise", b=0.0), "b = 0.0"),
    (dict(multiplier=0.0), "multiplier = 0.0"),
    (dict(kind="self_stopping", breakpoint=1.0), r"breakpoint = 1.0 must be in \[0, 1\)"),
    (dict(kind="self_stopping", breakpoint=-0.1), "breakpoint = -0.1"),
    (dict(kind="power", exponent=0.0), r"exponent = 0.0 must be in \(0, inf\)"),
  ],
)
def test_bad_schedule_is_refused(arguments, text):
  with pytest.raises(ValueError, match=text):
    Schedule(**arguments)
