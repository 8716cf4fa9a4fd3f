import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqm_jax.equilibrium.ode import integrate
from eqm_jax.equilibrium.sampler import Status, descend

X0 = jnp.asarray([[4.0, 0.0], [0.0, 1.0], [2.0, 2.0]])
RATES = jnp.asarray([1.0, 3.0, 0.5])


def decay(x, rate_B):
  """dx/dγ = −rate·x: x(1) = x(0)·exp(−rate)."""
  return rate_B[:, None] * x


def decay_in_time(x, rate_B, gamma_B):
  """dx/dγ = −rate·2γ·x has the same end."""
  return (2 * gamma_B * rate_B)[:, None] * x


EXACT = X0 * jnp.exp(-RATES)[:, None]


@pytest.mark.parametrize("steps", [7, pytest.param(100, marks=pytest.mark.slow)])
def test_euler_is_gradient_descent_with_the_step_as_its_size(steps):
  result = integrate(decay, X0, RATES, solver="euler", steps=steps)
  descended = descend(lambda x: decay(x, RATES), X0, step_size=1 / steps, rule="gd", max_nfe=steps)
  np.testing.assert_allclose(result.x, descended.x, rtol=1e-5)
  np.testing.assert_array_equal(result.nfe, descended.nfe)


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
@pytest.mark.parametrize(
  "field, time_conditional", [pytest.param(decay, False, marks=pytest.mark.slow), (decay_in_time, True)]
)
def test_fixed_steps_converge_with_their_order(solver, order, field, time_conditional):
  def error(steps):
    result = integrate(field, X0, RATES, solver=solver, steps=steps, time_conditional=time_conditional)
    assert result.nfe.tolist() == [order * steps] * 3 and result.status.tolist() == [Status.CONVERGED] * 3
    return np.abs(result.x - EXACT).max()

  with jax.enable_x64(True):
    assert 0.8 * 2**order < error(40) / error(80) < 1.3 * 2**order


@pytest.mark.parametrize(
  "solver, tolerance", [("heun", 1e-5), ("dopri5", 1e-6), pytest.param("tsit5", 1e-6, marks=pytest.mark.slow)]
)
def test_step_control_meets_its_tolerance_with_more_work_where_it_is_needed(solver, tolerance):
  loose, tight = (integrate(decay, X0, RATES, solver=solver, rtol=tol, atol=tol) for tol in (1e-2, tolerance))
  np.testing.assert_allclose(tight.x, EXACT, atol=2e-4)
  assert np.all(tight.nfe > loose.nfe)
  assert tight.nfe[1] > tight.nfe[2]  # the faster decay


def test_the_nfe_is_the_number_of_calls():
  calls = []

  def counted(x, rate_B):
    jax.debug.callback(lambda: calls.append(1), ordered=False)
    return decay(x, rate_B)

  for arguments in (dict(solver="heun", steps=5), dict(solver="euler", steps=5)):
    calls.clear()
    result = integrate(counted, X0[:1], RATES[:1], **arguments)
    jax.effects_barrier()
    assert len(calls) == result.nfe[0]


def test_a_sample_does_not_depend_on_its_neighbours():
  """But for rounding, which the step control makes larger: in float64 none of it is left at this tolerance."""
  options = dict(solver="dopri5", rtol=1e-3, atol=1e-3)
  with jax.enable_x64(True):
    x0, rates = np.asarray(X0, np.float64), np.asarray(RATES, np.float64)
    together = integrate(decay, x0, rates, **options)
    for i in range(3):
      alone = integrate(decay, x0[i : i + 1], rates[i : i + 1], **options)
      np.testing.assert_allclose(alone.x[0], together.x[i], rtol=1e-9)
      assert alone.nfe[0] == together.nfe[i]


def test_reverse_leads_back_to_the_noise():
  for time_conditional, field in ((False, decay), (True, decay_in_time)):
    image = integrate(field, X0, RATES, solver="dopri5", rtol=1e-6, atol=1e-6, time_conditional=time_conditional).x
    noise = integrate(
      field, image, RATES, solver="dopri5", rtol=1e-6, atol=1e-6, time_conditional=time_conditional, reverse=True
    ).x
    np.testing.assert_allclose(noise, X0, atol=1e-3)


@pytest.mark.slow
def test_euler_maruyama_keeps_the_marginals_of_flow_matching():
  """Data N(2, 0.5²): the exact velocity is known, and both equations must end on the data."""
  mean, deviation = 2.0, 0.5

  def flow(x, labels, gamma_B):
    gamma = gamma_B[:, None]
    variance = gamma**2 * deviation**2 + (1 - gamma) ** 2
    residual = (x - gamma * mean) / variance
    expected_data = mean + gamma * deviation**2 * residual
    expected_noise = (1 - gamma) * residual
    return expected_noise - expected_data

  x0 = jax.random.normal(jax.random.key(0), (2000, 1))
  labels = jnp.zeros(2000, jnp.int32)
  options = dict(steps=100, time_conditional=True)
  ode = integrate(flow, x0, labels, solver="euler", **options).x
  sde = integrate(flow, x0, labels, solver="euler_maruyama", key=jax.random.key(1), **options).x
  for x in (ode, sde):
    np.testing.assert_allclose([x.mean(), x.std()], [mean, deviation], atol=0.04)
  correlation = [np.corrcoef(x0[:, 0], x[:, 0])[0, 1] for x in (ode, sde)]
  assert correlation[0] > 0.99 > 0.9 > correlation[1]  # the stochastic one forgets its start
  np.testing.assert_allclose(
    integrate(flow, x0, labels, solver="euler_maruyama", key=jax.random.key(1), strength=0.0, **options).x,
    ode,
    rtol=1e-4,
  )


def test_what_goes_wrong_is_in_the_status():
  def explodes(x, rate_B):
    return -(x**3) * rate_B[:, None] * 1e3

  result = integrate(explodes, X0, RATES, solver="euler", steps=20)
  assert result.status.tolist() == [Status.DIVERGED] * 3
  result = integrate(lambda x, rate_B: jnp.sin(1e5 * x), X0, RATES, solver="heun", rtol=1e-9, atol=1e-9)
  assert Status.BUDGET in result.status.tolist()


@pytest.mark.parametrize(
  "arguments, text",
  [
    (dict(solver="rk4", steps=3), "'rk4' is not known"),
    (dict(solver="euler"), "give their number"),
    (dict(solver="euler", steps=0), "steps = 0"),
    (dict(solver="dopri5", steps=3), "give rtol and atol, not steps"),
    (dict(solver="dopri5", rtol=0.0, atol=1e-3), "rtol = 0.0"),
    (dict(solver="tsit5", rtol=1e-3, atol=-1.0), "atol = -1.0"),
    (dict(solver="heun", steps=3, rtol=1e-3), "one or the other"),
    (dict(solver="euler_maruyama", steps=3), "time_conditional=True"),
    (dict(solver="euler_maruyama", steps=3, time_conditional=True), "key="),
    (
      dict(solver="euler_maruyama", steps=3, time_conditional=True, strength=-1.0, key=jax.random.key(0)),
      "strength = -1.0",
    ),
    (dict(solver="euler", steps=3, labels=RATES[:2]), "3 samples"),
  ],
)
def test_bad_input_is_refused(arguments, text):
  with pytest.raises(ValueError, match=text):
    integrate(decay, X0, **{"labels": RATES, **arguments})
