"""Fields: what the samplers descend, x [B, H, W, C] → f [B, H, W, C], f = ∇E.

A field is a pytree whose leaves are parameters, labels and guidance scales, so a
jitted sampler takes it as an argument: one compilation serves every set of
weights, and no weight is baked into the program. A model is anything with
`apply({"params": params}, x, label)`, `num_classes` and `input_shape`; one with an
attribute `energy` other than "none" gives an energy, whose gradient is the field.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from eqm_jax.equilibrium import energy
from eqm_jax.equilibrium.labels import checked_labels
from eqm_jax.equilibrium.objective import per_sample


@flax.struct.dataclass
class ConditionalField:
  """f(x | label) of a network or of its energy, guided or not. Made by `conditional_field`."""

  params: Any
  scale: jax.Array | None  # None: no guidance, and no null half in the batch
  interval: jax.Array | None  # [2]: guide only while ‖f‖ lies between
  model: Any = flax.struct.field(pytree_node=False)
  channels: tuple[int, ...] | None = flax.struct.field(pytree_node=False)
  form: str | None = flax.struct.field(pytree_node=False, default=None)  # of an energy; None: the network is the field

  def __call__(self, x_BxHxWxC: jax.Array, label_B: jax.Array, gamma_B: jax.Array | None = None) -> jax.Array:
    """f(x | label); labels [B], or [B, K] for K conditions at once.

    `gamma_B` is for a flow-matching network, which is told the time.
    """
    gamma = () if gamma_B is None else (gamma_B,)
    if self.scale is None:
      return self._unguided(x_BxHxWxC, label_B, *gamma)
    label_BxK = label_B.reshape(len(label_B), -1)
    K = label_BxK.shape[1]
    # One batch of K conditional parts and the null part: one pass uses the matrix units better than several.
    labels = [*label_BxK.T, jnp.full(len(label_B), self.model.num_classes, label_B.dtype)]
    repeated = [jnp.concatenate([part] * (K + 1)) for part in (x_BxHxWxC, *gamma)]
    f = self._unguided(repeated[0], jnp.concatenate(labels), *repeated[1:])
    *f_conditional, f_null = jnp.split(f, K + 1)
    scale_BxK = jnp.broadcast_to(self.scale if K > 1 or not self.scale.ndim else self.scale[:, None], label_BxK.shape)
    return _guide(f_conditional, f_null, scale_BxK, self.channels, self.interval)

  def _unguided(self, x_BxHxWxC, label_B, *gamma):
    if self.form is None:
      return self.model.apply({"params": self.params}, x_BxHxWxC, label_B, *gamma)
    return energy.gradient(self.model, self.form, self.params, x_BxHxWxC, label_B)


def conditional_field(
  model: Any,
  params: Any,
  *,
  form: str | None = None,
  guidance: float | jax.Array = 1.0,
  guidance_channels: int | Sequence[int] | None = None,
  guidance_interval: tuple[float, float] | None = None,
) -> ConditionalField:
  """The network as a field that takes its labels with each call: (x, labels) → f(x | labels).

  Classifier-free guidance: f = f_null + s·(f_conditional − f_null) on the guided
  channels, f_conditional on the others. Guidance 1 costs one network pass, any
  other one pass of twice the batch.

  With labels [B, K] there are K conditions: f = f_null + Σ s_k·(f_k − f_null), one
  pass of K + 1 times the batch; where nothing is guided, the mean of the f_k.

  Args:
    model: the network, such as `eqm_jax.networks.dit.DiT`.
    params: its parameters.
    form: follow the gradient of this energy, "dot", "l2" or "scalar"; None is what the
      model was built for, the network itself if not for an energy.
    guidance: the scale s: one number; one per sample [B]; for K conditions [K] or
      [B, K], negative ones lead away from theirs.
    guidance_channels: None guides all channels; n the first n of them (3 is what
      the released code does with 4 latent channels); a sequence, those.
    guidance_interval: (low, high): guide only while low ≤ ‖f_conditional‖₂ ≤ high, the
      time-free counterpart of limiting guidance to an interval of noise levels
      (Kynkäänniemi et al. 2024). ‖f‖ is large far from the data and falls near it.

  Raises:
    ValueError: if a channel does not exist, the interval is empty, or the model has
      no such energy.
  """
  channels = _checked_channels(guidance_channels, model.input_shape[-1])
  plain = not isinstance(guidance, jax.Array | np.ndarray) and guidance == 1.0
  if guidance_interval is not None and not 0 <= guidance_interval[0] < guidance_interval[1]:
    raise ValueError(f"guidance_interval = {guidance_interval} must be (low, high) with 0 ≤ low < high")
  return ConditionalField(
    params=params,
    scale=None if plain else jnp.asarray(guidance, jnp.float32),
    interval=None if plain or guidance_interval is None else jnp.asarray(guidance_interval, jnp.float32),
    model=model,
    channels=channels,
    form=energy.checked_form(model, form) if form or energy.is_energy(model) else None,
  )


@flax.struct.dataclass
class BoundField:
  """A conditional field with its labels bound. Made by `implicit_field` and `energy_field`."""

  conditional: ConditionalField
  label_B: jax.Array

  def __call__(self, x_BxHxWxC: jax.Array, gamma_B: jax.Array | None = None) -> jax.Array:
    return self.conditional(x_BxHxWxC, self.label_B, gamma_B)


def implicit_field(
  model: Any,
  params: Any,
  label_B: jax.Array,
  *,
  guidance: float | jax.Array = 1.0,
  guidance_channels: int | Sequence[int] | None = None,
  guidance_interval: tuple[float, float] | None = None,
) -> BoundField:
  """The network itself as a field: f(x) = model(x, label), optionally guided.

  Args:
    label_B: int labels [B], or [B, K] for K conditions; `model.num_classes` is the
      null class.

  The other arguments are those of `conditional_field`.

  Raises:
    ValueError: if a label or channel does not exist, the scale has another shape, or
      the model is an energy, whose own answer is not the field.
  """
  if energy.is_energy(model):
    raise ValueError(
      f"this model was trained as an energy ({model.energy!r}): its gradient is the field, not its answer. "
      "Use energy_field or conditional_field"
    )
  field_fn = conditional_field(
    model, params, guidance=guidance, guidance_channels=guidance_channels, guidance_interval=guidance_interval
  )
  return bound(field_fn, label_B)


def energy_field(
  model: Any,
  params: Any,
  label_B: jax.Array,
  form: str | None = None,
  *,
  guidance: float | jax.Array = 1.0,
  guidance_channels: int | Sequence[int] | None = None,
  guidance_interval: tuple[float, float] | None = None,
) -> BoundField:
  """The gradient of an explicit energy as a field: f(x) = ∇ₓE(x | label), EqM-E.

  Args:
    form: "dot", "l2" or "scalar" (`eqm_jax.energy` says what they are); None takes
      the one the model was built for. An implicit model can be read as "dot" or "l2".

  The other arguments are those of `implicit_field`.

  Raises:
    ValueError: as `implicit_field`, and if the model has no such energy.
  """
  field_fn = conditional_field(
    model,
    params,
    form=energy.checked_form(model, form),
    guidance=guidance,
    guidance_channels=guidance_channels,
    guidance_interval=guidance_interval,
  )
  return bound(field_fn, label_B)


def bound(field_fn: ConditionalField, label_B: jax.Array) -> BoundField:
  """Binds labels [B] or [B, K] to a conditional field.

  Raises:
    ValueError: if a label does not exist, or the guidance scale has another shape.
  """
  label_B = checked_labels(label_B, field_fn.model.num_classes)
  allowed = [(), label_B.shape] + ([label_B.shape[1:]] if label_B.ndim == 2 else [])
  if field_fn.scale is not None and field_fn.scale.shape not in allowed:
    raise ValueError(f"guidance has shape {field_fn.scale.shape}: for labels {label_B.shape} give one of {allowed}")
  if field_fn.scale is None and label_B.ndim == 2:
    raise ValueError(f"labels {label_B.shape} are several conditions a sample: give a guidance scale for them")
  return BoundField(field_fn, label_B)


@flax.struct.dataclass
class GuidedField:
  """Guidance between two fields. Made by `guided`."""

  field_fn: Callable
  null_field_fn: Callable
  scale: jax.Array
  channels: tuple[int, ...] | None = flax.struct.field(pytree_node=False)

  def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
    f_conditional, f_null = self.field_fn(x_BxHxWxC), self.null_field_fn(x_BxHxWxC)
    _checked_channels(self.channels, f_null.shape[-1])
    scale_BxK = jnp.broadcast_to(self.scale, len(f_null))[:, None]
    return _guide([f_conditional], f_null, scale_BxK, self.channels, None)


def guided(
  field_fn: Callable, null_field_fn: Callable, scale: float | jax.Array, channels: int | Sequence[int] | None = None
) -> GuidedField:
  """Guides one field by another: f_null + scale·(f − f_null) on `channels`.

  For two different models, say a large one guided by a small one. With one model
  `implicit_field(..., guidance=scale)` is cheaper.

  Args:
    field_fn, null_field_fn: x [B, ..., C] → f of that shape.
    scale: one number or one per sample [B].
    channels: as `guidance_channels` of `implicit_field`; an index is checked
      when the field is first called.
  """
  if isinstance(channels, int):
    channels = range(channels)
  channels = None if channels is None else tuple(channels)
  return GuidedField(as_pytree(field_fn), as_pytree(null_field_fn), jnp.asarray(scale, jnp.float32), channels)


@flax.struct.dataclass
class ComposedField:
  """A weighted sum of fields. Made by `compose`."""

  field_fns: tuple[Callable, ...]
  weight_K: tuple[jax.Array, ...]

  def __call__(self, x: jax.Array) -> jax.Array:
    return sum(per_sample(weight, x) * field_fn(x) for weight, field_fn in zip(self.weight_K, self.field_fns))


def compose(field_fns: Sequence[Callable], weights: Sequence[float | jax.Array]) -> ComposedField:
  """Adds landscapes: f = Σ w_k·f_k, the gradient of Σ w_k·E_k (EqM paper, section 4.3).

  A sample comes to rest where the summed landscapes are low together; a negative
  weight leads away from a landscape's valleys. Weights that sum to one keep the pace of
  the descent. For labels of one model, `implicit_field` with labels [B, K] takes one
  pass of the network instead of K.

  Args:
    field_fns: K fields, x [B, ...] → f of that shape: of several labels, models, or
      the same network with other weights.
    weights: K of them, each one number or one per sample [B].

  Raises:
    ValueError: if there are not as many weights as fields, or one is not finite.
  """
  field_fns, weights = tuple(field_fns), tuple(jnp.asarray(weight, jnp.float32) for weight in weights)
  if not field_fns or len(field_fns) != len(weights):
    raise ValueError(f"compose: {len(weights)} weights for {len(field_fns)} fields: give one weight for each field")
  for k, weight in enumerate(weights):
    if weight.ndim > 1:
      raise ValueError(f"compose: weight {k} has shape {weight.shape}: give one number, or one per sample [B]")
    if not isinstance(weight, jax.core.Tracer) and not np.all(np.isfinite(np.asarray(weight))):
      raise ValueError(f"compose: weight {k} = {weight} is not finite")
  return ComposedField(tuple(map(as_pytree, field_fns)), weights)


def as_pytree(field_fn: Callable) -> Callable:
  """Wraps a plain function so that it can pass into jit; a pytree stays as it is."""
  if not jax.tree_util.all_leaves([field_fn]):
    return field_fn
  # jax would take the arguments of a functools.partial for leaves, and they need not be arrays.
  return jax.tree_util.Partial(field_fn.__call__ if isinstance(field_fn, functools.partial) else field_fn)


def _guide(
  f_conditional: list[jax.Array],
  f_null: jax.Array,
  scale_BxK: jax.Array,
  channels: tuple[int, ...] | None,
  interval: jax.Array | None,
) -> jax.Array:
  """f_null + Σ s_k·(f_k − f_null) where guidance acts, the mean of the f_k elsewhere."""
  scale_KxB = scale_BxK.T.astype(f_null.dtype)
  guided = f_null + sum(per_sample(s_B, f_null) * (f - f_null) for s_B, f in zip(scale_KxB, f_conditional))
  unguided = sum(f_conditional) / len(f_conditional)
  acts = jnp.ones((), bool)
  if channels is not None:
    acts = acts & np.isin(np.arange(f_null.shape[-1]), channels)
  if interval is not None:
    norm_B = jnp.sqrt(jnp.sum(unguided**2, axis=range(1, unguided.ndim)))
    acts = acts & per_sample((interval[0] <= norm_B) & (norm_B <= interval[1]), f_null)
  return jnp.where(acts, guided, unguided)


def _checked_channels(channels: int | Sequence[int] | None, count: int) -> tuple[int, ...] | None:
  if channels is None:
    return None
  chosen = tuple(range(channels)) if isinstance(channels, int) else tuple(channels)
  if not chosen or min(chosen) < 0 or max(chosen) >= count:
    raise ValueError(f"guidance channels {channels} do not exist: the data has {count} channels, 0..{count - 1}")
  return chosen
