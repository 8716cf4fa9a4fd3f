"""Explicit energies, EqM-E: the field is the gradient of a scalar that the network gives.

    dot      E(x) = x·f(x)
    l2       E(x) = ½‖f(x)‖²
    scalar   E(x) = what a network with a scalar head answers

    L = ‖∇ₓE(x_γ) − (ε − x)·c(γ)‖²            (EqM paper, section 3.3)

f is the raw answer of the network, which is then not the field: sampling follows ∇ₓE.
The paper writes −½‖f‖² for l2; descended, that has no lowest point, and the released
code descends +½‖f‖².
"""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from eqm_jax.equilibrium.labels import checked_labels

FORMS = ("dot", "l2", "scalar")


@flax.struct.dataclass
class Energy:
  """E(x | label), a function of x. Made by `energy`."""

  params: Any
  label_B: jax.Array
  model: Any = flax.struct.field(pytree_node=False)
  form: str = flax.struct.field(pytree_node=False)

  def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
    return energies(self.model, self.form, self.params, x_BxHxWxC, self.label_B)


def energy(model: Any, params: Any, label_B: jax.Array, form: str | None = None) -> Energy:
  """The energy landscape itself: x [B, H, W, C] → E [B].

  Args:
    model: the network, such as `eqm_jax.networks.dit.DiT`.
    params: its parameters.
    label_B: int labels [B]; `model.num_classes` is the null class.
    form: "dot", "l2" or "scalar"; None takes the one the model was built for.

  Raises:
    ValueError: if the model has no energy, or another form, or a label does not exist.
  """
  return Energy(params, checked_labels(label_B, model.num_classes), model, checked_form(model, form))


def is_energy(model: Any) -> bool:
  """Whether the model was built as an energy, so that its own answer is not the field."""
  return getattr(model, "energy", "none") != "none"


def checked_form(model: Any, form: str | None) -> str:
  """The form of a model's energy.

  Raises:
    ValueError: for an unknown form, one that the model cannot have, or None with a
      model that is a field and no energy.
  """
  if form is None and not is_energy(model):
    raise ValueError(
      "this model is implicit: it gives a field and no energy. Use the length of its field, ‖f‖, as a score instead; "
      "give form='dot' or 'l2' to make an energy of its answer anyway; or train one with model.energy='dot'"
    )
  if form is not None and form not in FORMS:
    raise ValueError(f"form = {form!r} is not an energy: choose one of {', '.join(FORMS)}")
  built = getattr(model, "energy", "none")
  if form is not None and built != form and (built != "none" or form == "scalar"):
    raise ValueError(f"form = {form!r}, but the model was built with energy = {built!r}: they must be the same")
  return form or built


def energies(model: Any, form: str, params: Any, x_BxHxWxC: jax.Array, label_B: jax.Array) -> jax.Array:
  """E of each sample, [B]."""
  # Not every implementation of attention has second derivatives; a model that has a choice offers this.
  model = getattr(model, "twice_differentiable", model)
  answer = model.apply({"params": params}, x_BxHxWxC, label_B)
  if form == "scalar":
    return answer
  axes = range(1, answer.ndim)
  return jnp.sum(x_BxHxWxC * answer, axis=axes) if form == "dot" else jnp.sum(answer**2, axis=axes) / 2


def gradient(model: Any, form: str, params: Any, x_BxHxWxC: jax.Array, label_B: jax.Array) -> jax.Array:
  """∇ₓE of each sample, [B, H, W, C]."""
  return jax.grad(lambda x: jnp.sum(energies(model, form, params, x, label_B)))(x_BxHxWxC)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def gradient_forward_over_reverse(model: Any, form: str, params: Any, x_BxHxWxC: jax.Array, label_B: jax.Array):
  """`gradient`, whose own derivative is taken forward over reverse.

  For any residual r, ∂/∂θ (r·∇ₓE) = d/ds ∇_θ E(x + s·r): one forward derivative along
  r of an ordinary parameter gradient, which keeps no tape of a tape.
  """
  return gradient(model, form, params, x_BxHxWxC, label_B)


def _forward(model, form, params, x, label_B):
  return gradient(model, form, params, x, label_B), (params, x, label_B)


def _backward(model, form, saved, residual):
  params, x, label_B = saved

  def slopes(x):
    return jax.grad(lambda params, x: jnp.sum(energies(model, form, params, x, label_B)), argnums=(0, 1))(params, x)

  _, (along_params, along_x) = jax.jvp(slopes, (x,), (residual,))
  return along_params, along_x, None


gradient_forward_over_reverse.defvjp(_forward, _backward)

# How the loss's parameter gradient, a second derivative of E, is computed; the report times them.
SECOND_ORDER = {"reverse_over_reverse": gradient, "forward_over_reverse": gradient_forward_over_reverse}
