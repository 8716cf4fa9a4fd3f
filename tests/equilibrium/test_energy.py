"""Explicit energies: their fields are gradients, however the derivative is taken, and sampling follows them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqm_jax
from eqm_jax.equilibrium import energy, objective
from eqm_jax.networks.dit import DiT

LABELS = jnp.array([0, 1, 3])
apply = jax.jit(lambda function, x: function(x))  # fields and energies are pytrees: arguments, not constants


def model_of(form: str, **changes) -> DiT:
  return DiT(
    input_size=4, channels=2, patch_size=2, width=16, depth=2, num_heads=2, num_classes=3, energy=form, **changes
  )


def params_of(model: DiT, scale: float = 0.3):
  """Parameters away from the start, where the last layers are zero."""
  plain = model.clone(attention="xla")

  @jax.jit
  def start():
    params = plain.init(jax.random.key(0), jnp.zeros((1, 4, 4, 2)), jnp.zeros(1, jnp.int32))["params"]
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return tree.unflatten([leaf + scale * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys)])

  return start()


MODERN = dict(qk_norm=True, norm="rms", mlp="swiglu", rope=True)


@pytest.fixture(
  scope="module",
  params=[
    ("dot", {}),
    *(pytest.param((form, {}), marks=pytest.mark.slow) for form in ("l2", "scalar")),
    *(pytest.param((form, MODERN), marks=pytest.mark.slow) for form in ("dot", "l2", "scalar")),
  ],
  ids=lambda param: f"{param[0]}, modern" if param[1] else param[0],
)
def landscape(request):
  form, options = request.param
  model = model_of(form, **options)
  return model, params_of(model), jax.random.normal(jax.random.key(2), (3, 4, 4, 2))


def test_the_field_is_the_gradient_of_the_energy(landscape):
  model, params, x = landscape
  energy_fn = eqm_jax.energy(model, params, LABELS)
  assert apply(energy_fn, x).shape == (3,)
  f = apply(eqm_jax.field(model, params, LABELS), x)
  # By differences along the gradient: no derivative is trusted.
  step = 1e-3 * f / jnp.linalg.norm(f)
  rise_B = apply(energy_fn, x + step) - apply(energy_fn, x - step)
  np.testing.assert_allclose(rise_B, 2 * jnp.sum(f * step, axis=(1, 2, 3)), rtol=0.05)


def test_sampling_follows_the_gradient_and_not_the_output(landscape):
  model, params, x = landscape
  field_fn, energy_fn = (make(model, params, LABELS) for make in (eqm_jax.field, eqm_jax.energy))
  result = eqm_jax.descend(field_fn, x, step_size=1e-3, rule="gd", max_nfe=30, record_at=[1])
  np.testing.assert_allclose(result.record["x"][0], x - 1e-3 * apply(field_fn, x), atol=1e-5)
  assert np.all(apply(energy_fn, result.x) < apply(energy_fn, x))


def test_streams_and_guidance_follow_the_gradient_too(landscape):
  model, params, x = landscape
  conditional, null = (apply(eqm_jax.field(model, params, y), x) for y in (LABELS, jnp.full(3, 3)))
  guided = eqm_jax.field(model, params, guidance=2.0)
  found = jax.jit(lambda field_fn, x, label: field_fn(x, label))(guided, x, LABELS)
  np.testing.assert_allclose(found, null + 2 * (conditional - null), rtol=1e-3, atol=1e-3)


def test_both_orders_of_differentiation_agree(landscape):
  model, params, data = landscape
  noise, gamma = jax.random.normal(jax.random.key(4), data.shape), jnp.array([0.1, 0.6, 0.95])

  def loss(params, data, gradient):
    def field_fn(x):
      return gradient(model, model.energy, params, x, LABELS)

    return objective.equilibrium_loss(field_fn, data, noise, gamma, objective.Schedule()).mean()

  found = [
    jax.device_get(jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)(params, data, gradient))
    for gradient in energy.SECOND_ORDER.values()
  ]
  for one, other in zip(*map(jax.tree.leaves, found)):
    np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-3 * np.abs(one).max() + 1e-6)


def test_energies_are_conservative_and_an_implicit_field_is_not(landscape):
  model, params, x = landscape
  key = jax.random.key(5)
  assert np.all(eqm_jax.asymmetry(eqm_jax.field(model, params, LABELS), x, key) < 1e-4)
  implicit = model_of("none")
  assert np.all(eqm_jax.asymmetry(eqm_jax.field(implicit, params_of(implicit), LABELS), x, key) > 0.1)


@pytest.mark.parametrize(
  "matrix, expected", [([[0, 1], [-1, 0]], 2.0), ([[2, 1], [1, 5]], 0.0), ([[1, 1], [-1, 1]], 2**0.5)]
)
def test_asymmetry_of_known_jacobians(matrix, expected):
  field_fn = jax.tree_util.Partial(lambda a, x: x @ a.T, jnp.asarray(matrix, jnp.float32))
  found = eqm_jax.asymmetry(field_fn, jnp.ones((4, 2)), jax.random.key(0), probes=400)
  np.testing.assert_allclose(found, expected, atol=0.15)


@pytest.mark.slow
def test_an_energy_of_zero_output_cannot_learn_from_l2_alone():
  """Why l2 needs a warm start: with a zero output layer every parameter gradient is exactly 0; dot's is not."""
  x = jax.random.normal(jax.random.key(2), (3, 4, 4, 2))
  fresh = jax.jit(model_of("dot").init)(jax.random.key(0), x, LABELS)["params"]

  def loss(params, form):
    return jnp.mean((energy.gradient(model_of("none"), form, params, x, LABELS) - x) ** 2)

  gradient = jax.jit(jax.grad(loss), static_argnums=1)
  l2, dot = (jax.device_get(gradient(fresh, form)) for form in ("l2", "dot"))
  assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(l2))
  assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(dot))


def test_attention_without_second_derivatives_is_replaced():
  """cuDNN's runs on no CPU at all, so a result shows that it was not used."""
  model = model_of("dot", attention="cudnn", dtype="bfloat16")
  params, x = params_of(model), jax.random.normal(jax.random.key(2), (3, 4, 4, 2))
  f = apply(eqm_jax.field(model, params, LABELS), x)
  np.testing.assert_array_equal(f, apply(eqm_jax.field(model.clone(attention="xla"), params, LABELS), x))


@pytest.mark.parametrize(
  "built, form, message",
  [
    ("none", None, "this model is implicit.*‖f‖.*form='dot'"),
    ("none", "cubic", "'cubic' is not an energy: choose one of dot, l2, scalar"),
    ("none", "scalar", "built with energy = 'none'"),
    ("dot", "l2", "built with energy = 'dot'"),
    ("scalar", "dot", "built with energy = 'scalar'"),
  ],
)
def test_energies_that_a_model_has_not_are_refused(built, form, message):
  model = model_of(built)
  with pytest.raises(ValueError, match=message):
    eqm_jax.energy(model, {}, LABELS, form)
  if form is not None:  # without one, the field of an implicit model is the network
    with pytest.raises(ValueError, match=message):
      eqm_jax.field(model, {}, LABELS, form=form)


def test_the_field_of_an_energy_model_is_never_its_output(landscape):
  """One constructor: what an energy model was built for decides, with its form given or not."""
  model, params, x = landscape
  f = apply(eqm_jax.field(model, params, LABELS), x)
  expected = energy.gradient(model, model.energy, params, x, LABELS)
  np.testing.assert_allclose(f, expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(f, apply(eqm_jax.field(model, params, LABELS, form=model.energy), x))


def test_an_implicit_model_can_be_read_as_an_energy():
  model = model_of("none")
  params, x = params_of(model), jax.random.normal(jax.random.key(2), (3, 4, 4, 2))
  f = apply(eqm_jax.field(model, params, LABELS, form="l2"), x)
  np.testing.assert_allclose(f, energy.gradient(model, "l2", params, x, LABELS), rtol=1e-4, atol=1e-5)
  assert not np.allclose(f, apply(eqm_jax.field(model, params, LABELS), x))


@pytest.mark.parametrize(
  "changes, message", [({"energy": "cubic"}, "energy = 'cubic'"), ({"time_input": True}, "time_input")]
)
def test_models_that_cannot_be_energies_are_refused(changes, message):
  attributes = {"energy": "dot", **changes}
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(model_of("none"), **attributes)
