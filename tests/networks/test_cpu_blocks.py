"""The blocks' form for CPUs against the form for TPUs and GPUs: one network, two programs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from eqm_jax.networks.dit import DiT

LABELS = jnp.asarray([0, 3])


MODERN = dict(qk_norm=True, norm="rms", mlp="swiglu", rope=True)


def network(dtype: str, **options):
  """A model, its parameters, samples, and a direction of the output."""
  model = DiT(8, 3, patch_size=2, width=16, depth=1, num_heads=2, num_classes=5, dtype=dtype, **options)
  wide = np.float64 if dtype == "float64" else np.float32
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((2, 8, 8, 3)), LABELS)["params"]
  params = jax.tree.map(lambda leaf: 0.3 * rng.normal(size=leaf.shape).astype(wide), shapes)
  x, along = rng.normal(size=(2, 2, 8, 8, 3)).astype(wide)
  return model, params, x, along


def derivatives(model, params, x, along, training, second=True):
  """The output, its gradients by parameters and samples, and second derivatives both ways."""

  def output(params, x):
    return model.apply({"params": params}, x, LABELS, training=training)

  def energy(params, x):
    return jnp.vdot(output(params, x), x)

  def field(params, x):
    return jax.grad(energy, argnums=1)(params, x)

  first = {
    "output": output(params, x),
    "gradients": jax.grad(lambda *at: jnp.vdot(output(*at), along), argnums=(0, 1))(params, x),
  }
  if not second:
    return first
  return first | {
    "forward over reverse": jax.jvp(functools.partial(field, params), (x,), (along,))[1],
    "reverse over reverse": jax.grad(lambda params: jnp.vdot(field(params, x), along))(params),
  }


def largest_difference(tree, expected) -> float:
  """Relative to the largest number of each array."""
  differences = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))), tree, expected)
  return max(jax.tree.leaves(differences))


@pytest.mark.parametrize(
  "training, changes, options",
  [
    (True, dict(), dict()),
    pytest.param(True, dict(remat="dots"), dict(), marks=pytest.mark.slow),
    pytest.param(False, dict(), dict(), marks=pytest.mark.slow),
    pytest.param(True, dict(), MODERN, marks=pytest.mark.slow),
    pytest.param(False, dict(), MODERN, marks=pytest.mark.slow),
    *(pytest.param(True, dict(), {name: value}, marks=pytest.mark.slow) for name, value in MODERN.items()),
  ],
)
def test_numbers_and_derivatives_are_those_of_the_other_form(training, changes, options):
  with jax.enable_x64(True):
    model, *arguments = network("float64", **options)
    compute = jax.jit(derivatives, static_argnums=(0, 4))
    expected = compute(model.clone(block="xla"), *arguments, False)
    result = compute(model.clone(block="cpu", **changes), *arguments, training)
    for name, value in expected.items():
      assert largest_difference(result[name], value) < 1e-11, name


def test_the_options_have_the_same_gradients_in_both_forms_with_rematerialisation_and_without():
  with jax.enable_x64(True):
    model, *arguments = network("float64", **MODERN)
    compute = jax.jit(derivatives, static_argnums=(0, 4, 5))
    expected = compute(model.clone(block="xla"), *arguments, False, False)
    result = compute(model.clone(block="cpu", remat="dots_no_batch"), *arguments, True, False)
    assert largest_difference(result, expected) < 1e-11


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, MODERN])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-4), ("bfloat16", 0.1)])
def test_narrower_types_agree_to_their_precision(dtype, tolerance, options):
  model, params, x, along = network(dtype, **options)

  @functools.partial(jax.jit, static_argnums=0)
  def loss_and_gradient(model, params):
    output = model.apply({"params": params}, x, LABELS, training=True)
    return output, jax.grad(lambda p: jnp.vdot(model.apply({"params": p}, x, LABELS, training=True), along))(params)

  expected = loss_and_gradient(model.clone(block="xla"), params)
  assert largest_difference(loss_and_gradient(model.clone(block="cpu"), params), expected) < tolerance


def test_a_field_has_forward_derivatives_and_a_training_step_may_not():
  model, params, x, along = network("float32")
  model = model.clone(block="cpu")
  forward = jax.jvp(lambda x: model.apply({"params": params}, x, LABELS), (x,), (along,))[1]
  assert np.all(np.isfinite(forward))
  with pytest.raises(TypeError, match="forward-mode"):
    jax.jvp(lambda x: model.apply({"params": params}, x, LABELS, training=True), (x,), (along,))


def test_the_backend_chooses_and_split_layers_keep_their_form(monkeypatch):
  model = network("float32")[0]
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  assert model.block_form == "xla"
  monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
  assert model.block_form == "cpu"
  mesh = AbstractMesh((1, 1, 1, 2), ("dcn_data", "data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 4)
  with jax.sharding.use_abstract_mesh(mesh):
    assert model.block_form == "xla" and model.clone(block="cpu").block_form == "cpu"


def test_an_unknown_form_is_refused():
  with pytest.raises(ValueError, match="model.block = 'gpu' must be one of auto, xla, cpu"):
    network("float32")[0].clone(block="gpu")
