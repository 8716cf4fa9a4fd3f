"""Explicit energies, EqM-E: the field is the gradient of a scalar that the network gives.

    dot      E(x) = x·f(x)
    l2       E(x) = ½‖f(x)‖²
    scalar   E(x) = the output of a network with a scalar head

    L = ‖∇ₓE(x_γ) − (ε − x)·c(γ)‖²            (EqM paper, section 3.3)

f is the output of the network, which is then not the field: sampling follows ∇ₓE.
The paper writes −½‖f‖² for l2; descended, that has no lowest point, and the released
code descends +½‖f‖².
"""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from eqm_jax.equilibrium import meshes
from eqm_jax.equilibrium.pytrees import TWO_RESULTS, FieldFn, Model, Params, ShortRepr, as_pytree, check_labels

FORMS = ("dot", "l2", "scalar")
PROBES = 2**32 - 5  # folded into the key of random probes, where no sample index reaches


@flax.struct.dataclass(eq=False, repr=False)
class Energy(ShortRepr):
  """E(x | labels), a function of x. Made by `energy`."""

  params: Any
  labels: jax.Array
  model: Any = flax.struct.field(pytree_node=False)
  form: str = flax.struct.field(pytree_node=False)

  def __call__(self, x: jax.Array) -> jax.Array:
    axes = meshes.spec_of(x)
    return meshes.call(Energy._evaluate, (self, x), like=x, out_specs=PartitionSpec(*axes[:1]))

  def _evaluate(self, x):
    return energies(self.model, self.form, self.params, x, self.labels)


def energy(model: Model, params: Params, labels: jax.Array, form: str | None = None) -> Energy:
  """The energy of a model as a function: x [B, H, W, C] → E [B].

  Like a field, it is a pytree: see `eqm_jax.field` for how to pass it into `jax.jit`.

  Args:
    model: the network, such as `eqm_jax.networks.dit.DiT`.
    params: its parameters.
    labels: int labels [B]; `model.num_classes` is the null class.
    form: "dot", "l2" or "scalar"; None takes the one the model was built for. An implicit model can be read as
      "dot" or "l2".

  Raises:
    ValueError: if the model has no energy, or another form, or a label does not exist.
  """
  return Energy(params, check_labels(labels, model.num_classes), model, check_form(model, form))


def is_energy(model: Model) -> bool:
  """Whether the model was built as an energy, so that its output is not the field."""
  return getattr(model, "energy", "none") != "none"


def check_form(model: Model, form: str | None) -> str:
  """The form of a model's energy.

  Raises:
    ValueError: for an unknown form, one that the model cannot have, or None with a
      model that is a field and no energy.
  """
  if form is None and not is_energy(model):
    raise ValueError(
      "this model is implicit: it gives a field and no energy. Use the length of its field, ‖f‖, as a score instead; "
      "give form='dot' or 'l2' to make an energy of its output anyway; or train one with model.energy='dot'"
    )
  if form is not None and form not in FORMS:
    raise ValueError(f"form = {form!r} is not an energy: choose one of {', '.join(FORMS)}")
  built = getattr(model, "energy", "none")
  if form is not None and built != form and (built != "none" or form == "scalar"):
    raise ValueError(
      f"form = {form!r}, but the model was built with energy = {built!r}: they must be the same; "
      "leave form out to take the model's"
    )
  return form or built


def energies(model: Model, form: str, params: Params, x_BxHxWxC: jax.Array, labels_B: jax.Array) -> jax.Array:
  """E of each sample, [B]."""
  # Not every implementation of attention has second derivatives; a model that has a choice offers this.
  model = getattr(model, "twice_differentiable", model)
  output = model.apply({"params": params}, x_BxHxWxC, labels_B)
  if form == "scalar":
    return output
  axes = range(1, output.ndim)
  return jnp.sum(x_BxHxWxC * output, axis=axes) if form == "dot" else jnp.sum(output**2, axis=axes) / 2


def gradient(model: Model, form: str, params: Params, x_BxHxWxC: jax.Array, labels_B: jax.Array) -> jax.Array:
  """∇ₓE of each sample, [B, H, W, C]."""
  return jax.grad(lambda x: jnp.sum(energies(model, form, params, x, labels_B)))(x_BxHxWxC)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def gradient_forward_over_reverse(
  model: Model, form: str, params: Params, x_BxHxWxC: jax.Array, labels_B: jax.Array
) -> jax.Array:
  """`gradient`, whose own derivative is taken forward over reverse.

  For any residual r, ∂/∂θ (r·∇ₓE) = d/ds ∇_θ E(x + s·r): one forward derivative along
  r of an ordinary parameter gradient, which keeps no tape of a tape.
  """
  return gradient(model, form, params, x_BxHxWxC, labels_B)


def _forward(model, form, params, x, labels_B):
  return gradient(model, form, params, x, labels_B), (params, x, labels_B)


def _backward(model, form, saved, residual):
  params, x, labels_B = saved

  def slopes(x):
    return jax.grad(lambda params, x: jnp.sum(energies(model, form, params, x, labels_B)), argnums=(0, 1))(params, x)

  _, (along_params, along_x) = jax.jvp(slopes, (x,), (residual,))
  return along_params, along_x, None


gradient_forward_over_reverse.defvjp(_forward, _backward)

# How the loss's parameter gradient, a second derivative of E, is computed; the report times them.
SECOND_ORDER = {"reverse_over_reverse": gradient, "forward_over_reverse": gradient_forward_over_reverse}


def asymmetry(field: FieldFn, x: jax.Array, key: jax.Array, probes: int = 16) -> jax.Array:
  """Distance of a field from a gradient: ‖J − Jᵀ‖/‖J‖ at each x, [B].

  J is the Jacobian ∂f/∂x of one sample, the norms are Frobenius'. Estimated with random
  v ~ N(0, I), E‖Av‖² = ‖A‖². 0 for the gradient of any energy, √2 for a J of
  independent random entries, 2 for a rotation.

  Args:
    field: x [B, ...] → f [B, ...], each sample on its own; it must have forward derivatives.
    x: where, [B, ...].
    key: of the probes.
    probes: their number; the relative error is about 1/√(probes·dimension).

  Raises:
    ValueError: for a field that returns (f, γ̂), as one with a read-out does.
  """
  run = functools.partial(_asymmetry, probes=probes)
  out_specs = PartitionSpec(*meshes.spec_of(x)[:1])
  return meshes.call(run, (as_pytree(field), x, key), like=x, out_specs=out_specs)


@functools.partial(jax.jit, static_argnames="probes")
def _asymmetry(field, x, key, probes):
  f, transposed = jax.vjp(field, x)
  if isinstance(f, tuple):
    raise ValueError(TWO_RESULTS)
  axes = range(1, x.ndim)

  def squares(key):
    v = meshes.vary_as(x, jax.random.normal(key, x.shape, x.dtype))
    forward, backward = jax.jvp(field, (x,), (v,))[1], transposed(v)[0]
    return jnp.sum((forward - backward) ** 2, axis=axes), jnp.sum(forward**2, axis=axes)

  difference_PxB, whole_PxB = jax.lax.map(
    squares, jax.random.split(jax.random.fold_in(key, jnp.uint32(PROBES)), probes)
  )
  whole_B = whole_PxB.mean(axis=0)
  return jnp.sqrt(difference_PxB.mean(axis=0) / jnp.where(whole_B == 0, 1, whole_B))  # of a field at rest: 0
