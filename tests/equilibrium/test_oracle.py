import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqm_jax.equilibrium.gamma import GammaDensity, quantile
from eqm_jax.equilibrium.objective import Schedule, corrupt, target_gradient
from eqm_jax.equilibrium.oracle import oracle_field
from eqm_jax.equilibrium.sampler import Status, descend, start_noise

apply = jax.jit(lambda field_fn, x: field_fn(x))  # the field is a pytree: its points are an argument


@pytest.mark.parametrize("d", [8, 64, 512])
def test_data_are_zeros_with_the_stiffness_of_the_schedule(d):
  points = jax.random.normal(jax.random.key(0), (5, d))
  field_fn = oracle_field(points)
  np.testing.assert_allclose(apply(field_fn, points), 0, atol=1e-5)
  direction = jax.random.normal(jax.random.key(1), (5, d)) / d**0.5
  offset = 0.01 * d**0.5 * direction
  np.testing.assert_allclose(apply(field_fn, points + offset), 20 * offset, rtol=5e-3, atol=1e-3)  # λ/(1−a) = 20


def test_midpoint_of_antipodal_points_is_a_zero_and_a_saddle():
  axis = jnp.zeros(16).at[0].set(4.0)
  field_fn = oracle_field(jnp.stack([axis, -axis]))
  middle = jnp.zeros(16)
  np.testing.assert_allclose(apply(field_fn, middle[None]), 0, atol=1e-5)
  jacobian = np.asarray(jax.jit(jax.jacobian(lambda x: field_fn(x[None])[0]))(middle))
  curvature = np.linalg.eigvalsh((jacobian + jacobian.T) / 2)
  assert curvature[0] < 0 < curvature[1]  # downhill along the axis alone
  np.testing.assert_allclose(jacobian[0, 0], curvature[0], rtol=1e-4)


@pytest.mark.parametrize(
  "schedule, density",
  [(Schedule(), GammaDensity()), (Schedule("self_stopping"), GammaDensity("logit_normal", mean=0.5))],
)
def test_it_is_the_conditional_mean_of_the_target(schedule, density):
  """Against a histogram: one dimension, two points, many draws of (x, ε, γ)."""
  points, n = jnp.asarray([[-1.0], [1.0]]), 1_000_000
  key_x, key_noise, key_gamma = jax.random.split(jax.random.key(0), 3)
  data = points[jax.random.randint(key_x, (n,), 0, 2)]
  noise, gamma = jax.random.normal(key_noise, (n, 1)), quantile(jax.random.uniform(key_gamma, (n,)), density, schedule)
  x_gamma, target = jax.device_get(
    jax.jit(lambda *drawn: (corrupt(*drawn)[:, 0], target_gradient(*drawn, schedule)[:, 0]))(data, noise, gamma)
  )
  for center in (-1.6, -0.5, 0.3, 0.8):
    near = np.abs(x_gamma - center) < 0.02
    expected = apply(oracle_field(points, schedule, density=density, nodes=20_000), jnp.asarray([[center]]))[0, 0]
    error = float(np.std(target[near]) / near.sum() ** 0.5)
    np.testing.assert_allclose(target[near].mean(), expected, atol=4 * error + 0.01)


def test_mean_stop_in_4096_dimensions_is_the_papers():
  """η = .0017, threshold 10: the ideal path of the shipped c(γ) stops after about 221 steps."""
  points = jax.random.normal(jax.random.key(0), (4, 4096))
  noise = start_noise(jax.random.key(1), np.arange(6), (4096,))
  result = descend(oracle_field(points, nodes=1500), noise, step_size=0.0017, rule="gd", max_nfe=400, threshold=10.0)
  assert result.status.tolist() == [Status.CONVERGED] * 6
  np.testing.assert_allclose(result.nfe.mean() - 1, 221, atol=3)
  distance = jnp.linalg.norm(result.x[:, None] - points[None], axis=-1).min(axis=1)
  np.testing.assert_allclose(distance, 10 / 20, rtol=0.1)  # ‖f‖ = 20·distance
