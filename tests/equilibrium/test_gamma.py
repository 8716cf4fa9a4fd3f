"""Densities of γ: samples, moments, and what they do to the optimal field."""

import itertools
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT

import eqm_jax
from eqm_jax.equilibrium import gamma as gamma_lib
from eqm_jax.equilibrium.gamma import GammaDensity
from eqm_jax.equilibrium.objective import KINDS, Schedule, magnitude

SCHEDULES = [
  *(Schedule(kind, exponent=0.5) for kind in KINDS),
  Schedule("truncated", a=0.0, multiplier=1.0),
  Schedule("piecewise", a=0.3, b=0.02, multiplier=0.5),
  Schedule("self_stopping", breakpoint=0.0),
  Schedule("self_stopping", breakpoint=0.5, multiplier=2.0),
  Schedule("power", exponent=1.7),
]
DENSITIES = [
  GammaDensity(),
  GammaDensity("logit_normal"),
  GammaDensity("logit_normal", mean=1.5, deviation=0.2),
  GammaDensity("logit_normal", mean=-0.7, deviation=4.0),
  GammaDensity("consistent"),
  GammaDensity("consistent", floor=0.05),
  GammaDensity("consistent", floor=0.6),
]


def exists(density: GammaDensity, schedule: Schedule) -> bool:
  falls_fast = {"constant": False, "self_stopping": False, "power": schedule.exponent >= 1}
  return density.kind != "consistent" or density.floor > 0 or not falls_fast.get(schedule.kind, True)


PAIRS = [pair for pair in itertools.product(DENSITIES, SCHEDULES) if exists(*pair)]
# Equally spaced in logit(γ), float64: the ends of (0, 1) are resolved, where densities have poles.
LOGIT = np.linspace(-36, 36, 36_001)
GAMMA = 1 / (1 + np.exp(-LOGIT))


def cumulative(values: np.ndarray) -> np.ndarray:
  """∫ values dγ from 0 to each of GAMMA, by the trapezoidal rule."""
  slope = values / (1 + np.exp(-LOGIT)) / (1 + np.exp(LOGIT))
  return np.concatenate([[0.0], np.cumsum((slope[1:] + slope[:-1]) / 2 * np.diff(LOGIT))])


def density_of(density: GammaDensity, schedule: Schedule) -> np.ndarray:
  """The density at GAMMA."""
  with jax.enable_x64(True):
    return np.exp(np.asarray(gamma_lib.log_density(jnp.asarray(GAMMA), density, schedule)))


def test_every_density_integrates_to_one_and_gives_the_mean_square_of_every_magnitude():
  for density, schedule in PAIRS:
    p = density_of(density, schedule)
    np.testing.assert_allclose(cumulative(p)[-1], 1, rtol=1e-5, err_msg=f"{density} {schedule}")
    with jax.enable_x64(True):
      c = np.asarray(magnitude(jnp.asarray(GAMMA), schedule))
    mean_square = gamma_lib.mean_square_magnitude(schedule, density)
    np.testing.assert_allclose(mean_square, cumulative(p * c**2)[-1], rtol=1e-5, err_msg=f"{density} {schedule}")


def test_samples_have_the_density():
  """Kolmogorov's distance of 20,000 samples; by chance it exceeds 0.02 once in four million times."""
  u = jax.random.uniform(jax.random.key(0), (20_000,))
  for density, schedule in PAIRS:
    gamma = np.sort(np.asarray(gamma_lib.quantile(u, density, schedule), np.float64))
    assert gamma[0] >= 0 and gamma[-1] <= 1 and gamma_lib.quantile(u, density, schedule).dtype == u.dtype
    cdf = np.interp(gamma, GAMMA, cumulative(density_of(density, schedule)))
    rank = np.arange(len(gamma))
    distance = max(np.max(cdf - rank / len(gamma)), np.max((rank + 1) / len(gamma) - cdf))
    assert distance < 0.02, (density, schedule, distance)


def test_quantiles_invert_the_cumulative_density_in_closed_form():
  u = np.linspace(0.001, 0.999, 999)
  for density, schedule in PAIRS:
    with jax.enable_x64(True):
      gamma = np.asarray(gamma_lib.quantile(jnp.asarray(u), density, schedule))
    np.testing.assert_allclose(np.interp(gamma, GAMMA, cumulative(density_of(density, schedule))), u, atol=1e-5)


def test_uniform_gamma_is_the_uniform_number_itself():
  u = jax.random.uniform(jax.random.key(0), (5,))
  assert gamma_lib.quantile(u, GammaDensity(), Schedule("linear")) is u


@pytest.mark.parametrize("t", [0.0, 0.4, 0.9, 0.99])
def test_the_self_stopping_path_has_the_published_mean_square(t):
  """Over its own density; the path itself, γ(t), is the quantile function."""
  schedule, density = Schedule("self_stopping", breakpoint=t, multiplier=1.0), GammaDensity("consistent")
  expected = 4 * t / (1 + t) ** 2 + 4 / 3 * (1 - t) ** 3 / (1 - t**2) ** 2
  np.testing.assert_allclose(gamma_lib.mean_square_magnitude(schedule, density), expected, rtol=1e-12)
  time = np.linspace(0, 1, 101)
  path = np.where(time <= t, 2 * time / (1 + t), 1 - (1 - time) ** 2 / (1 - t**2))
  with jax.enable_x64(True):
    np.testing.assert_allclose(gamma_lib.quantile(jnp.asarray(time), density, schedule), path, atol=1e-14)


def directions(x, points, schedule, density):
  f = eqm_jax.oracle_field(points, schedule, density=density)(x)
  return np.asarray(f / jnp.linalg.norm(f, axis=-1, keepdims=True))


@pytest.mark.parametrize("d", [2, 24])
@pytest.mark.parametrize(
  "schedule", [Schedule("self_stopping"), Schedule("self_stopping", breakpoint=0.3), Schedule("power", exponent=0.8)]
)
def test_consistent_gamma_keeps_the_direction_of_a_constant_magnitude_everywhere(d, schedule):
  rng = np.random.default_rng(0)
  with jax.enable_x64(True):
    points = jnp.asarray(rng.normal(size=(6, d)))
    near = points + jnp.asarray(rng.normal(size=(6, d))) * np.geomspace(1e-3, 0.3, 6)[:, None]
    x = jnp.concatenate([jnp.asarray(rng.normal(size=(40, d))), near])
    constant = directions(x, points, Schedule("constant"), GammaDensity())
    consistent = directions(x, points, schedule, GammaDensity("consistent"))
    uniform = directions(x, points, schedule, GammaDensity())
  np.testing.assert_allclose(consistent, constant, atol=1e-12)
  if d == 2:  # in more dimensions one point outweighs the others
    assert np.abs(uniform - constant).max() > 1e-3, "with uniform γ it is another"


@pytest.mark.parametrize("kind", ["truncated", "linear", "piecewise"])
def test_with_a_floor_the_direction_is_kept_but_for_the_surroundings_of_the_data(kind):
  """The floor acts where 1−γ < s; a γ there has the weight e^(−(r/s − ‖x‖)²/2) at a distance r of the point x."""
  schedule, floor, rng = Schedule(kind), 0.02, np.random.default_rng(0)
  s = floor if kind == "linear" else floor * (1 - schedule.a)
  with jax.enable_x64(True):
    points = jnp.asarray(rng.normal(size=(6, 2)))
    x = jnp.asarray(rng.normal(size=(300, 2)))
    distance = jnp.linalg.norm(x[:, None] - points, axis=-1).min(axis=1)
    far = x[distance > s * (9 + jnp.linalg.norm(points, axis=-1).max())]
    assert len(far) > 100
    constant = directions(far, points, Schedule("constant"), GammaDensity())
    consistent = directions(far, points, schedule, GammaDensity("consistent", floor=floor))
  np.testing.assert_allclose(consistent, constant, atol=1e-12)


def test_with_consistent_gamma_descents_end_at_each_data_point_as_often_as_it_is_in_the_data():
  """The five atoms of docs/options.md, coarsely: with uniform γ a linear c favours some."""
  errors = runpy.run_path(str(ROOT / "docs" / "five_atoms.py"))["errors"]
  errors.__globals__.update(GRID=14, NFE=80)
  uniform, consistent = (
    errors(Schedule("linear"), density) for density in (GammaDensity(), GammaDensity("consistent", floor=0.02))
  )
  assert consistent.max() < 0.03 and uniform.max() > 0.1


@pytest.mark.parametrize(
  "arguments, text",
  [
    (dict(kind="beta"), r"gamma.kind = 'beta' must be one of uniform, logit_normal, consistent"),
    (dict(deviation=0.0), r"gamma.deviation = 0.0 must be in \(0, inf\)"),
    (dict(mean=float("nan")), "gamma.mean = nan"),
    (dict(floor=1.0), r"gamma.floor = 1.0 must be in \[0, 1\)"),
    (dict(floor=-0.1), "gamma.floor = -0.1"),
  ],
)
def test_bad_densities_are_refused(arguments, text):
  with pytest.raises(ValueError, match=text):
    GammaDensity(**arguments)


@pytest.mark.parametrize(
  "exponent, floor, share", [(0.9, 0.0, "19%"), (0.999, 0.0, "98%"), (2.0, 1e-16, "92%"), (1.0, 1e-12, "42%")]
)
def test_consistent_gamma_that_is_often_one_is_refused(exponent, floor, share):
  density = GammaDensity("consistent", floor=floor)
  with pytest.raises(ValueError, match=rf"'power' with .*gamma.floor = {floor} puts {share} of γ at 1 to rounding"):
    gamma_lib.check(density, Schedule("power", exponent=exponent))
  gamma_lib.check(GammaDensity("consistent", floor=0.05), Schedule("power", exponent=exponent))
  gamma_lib.check(GammaDensity("consistent"), Schedule("power", exponent=0.85))


@pytest.mark.parametrize(
  "schedule", [Schedule("truncated"), Schedule("linear"), Schedule("piecewise"), Schedule("power", exponent=1.0)]
)
def test_without_a_floor_consistent_gamma_needs_a_magnitude_that_falls_slowly(schedule):
  density = GammaDensity("consistent")
  for call in (
    lambda: gamma_lib.check(density, schedule),
    lambda: gamma_lib.quantile(jnp.zeros(3), density, schedule),
    lambda: gamma_lib.mean_square_magnitude(schedule, density),
    lambda: eqm_jax.oracle_field(jnp.zeros((2, 3)), schedule, density=density),
  ):
    with pytest.raises(ValueError, match=rf"floor = 0.0 must be in \(0, 1\).*{schedule.kind}.*set a floor such as"):
      call()
