"""Fields: what the samplers descend, x [B, H, W, C] → f [B, H, W, C], f = ∇E.

A field is a pytree whose leaves are parameters, labels and guidance scales. So the samplers take it as an argument:
one compilation serves every set of weights. In code of your own, pass it the same way:

    jax.jit(lambda field, x: field(x))(field, x)      # weights are arguments: compiled once for all of them
    jax.jit(field)(x)                                 # works too, but the weights become constants of the program
"""

from collections.abc import Callable, Sequence
from typing import Any, overload

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from eqm_jax.equilibrium import energy, meshes, noise_level
from eqm_jax.equilibrium.objective import per_sample
from eqm_jax.equilibrium.pytrees import (
  TWO_RESULTS,
  FieldFn,
  Model,
  Params,
  Scalar,
  ShortRepr,
  as_pytree,
  check_labels,
  is_traced,
)

__all__ = [
  "BoundField",
  "ComposedField",
  "Field",
  "GuidedField",
  "as_pytree",
  "check_labels",
  "compose",
  "field",
  "guided",
  "with_labels",
]


@flax.struct.dataclass(eq=False, repr=False)
class Field(ShortRepr):
  """f(x | labels) of a network, or of the gradient of its energy, guided or not. Made by `field`."""

  params: Any
  guidance: jax.Array | None  # None: no guidance, and no null half in the batch
  guidance_interval: jax.Array | None  # [2]: guide only while ‖f‖ lies between
  model: Any = flax.struct.field(pytree_node=False)
  guidance_channels: tuple[int, ...] | None = flax.struct.field(pytree_node=False)
  form: str | None = flax.struct.field(pytree_node=False, default=None)  # of an energy; None: the network is the field
  readout: noise_level.NoiseReadout | None = None  # with one, the field returns (f, γ̂)

  def __call__(self, x: jax.Array, labels: jax.Array, gamma: jax.Array | None = None) -> Any:
    """f(x | labels), or (f, γ̂ [B]) with a read-out; labels [B], or [B, K] for K conditions at once.

    `gamma` [B] is for a flow-matching network, which takes the time.
    """
    axes = meshes.spec_of(x)
    specs = axes if self.readout is None else (axes, PartitionSpec(*axes[:1]))
    return meshes.call(Field._evaluate, (self, x, labels, gamma), like=x, out_specs=specs)

  def _evaluate(self, x, labels, gamma):
    more = () if gamma is None else (gamma,)
    if self.guidance is None:
      return self._unguided(x, labels, *more)
    labels_BxK = labels.reshape(len(labels), -1)
    K = labels_BxK.shape[1]
    # One batch of K conditional parts and the null part: one pass uses the matrix units better than several.
    all_labels = [*labels_BxK.T, jnp.full(len(labels), self.model.num_classes, labels.dtype)]
    repeated = [jnp.concatenate([part] * (K + 1)) for part in (x, *more)]
    f = self._unguided(repeated[0], jnp.concatenate(all_labels), *repeated[1:])
    f, level = f if self.readout is not None else (f, None)
    *f_conditional, f_null = jnp.split(f, K + 1)
    scale = self.guidance if K > 1 or not self.guidance.ndim else self.guidance[:, None]
    scale_BxK = jnp.broadcast_to(scale, labels_BxK.shape)
    f = _guide(f_conditional, f_null, scale_BxK, self.guidance_channels, self.guidance_interval)
    return f if level is None else (f, sum(jnp.split(level, K + 1)[:K]) / K)

  def _unguided(self, x_BxHxWxC, labels_B, *gamma_B):
    if self.readout is not None:
      f, tokens = self.model.apply({"params": self.params}, x_BxHxWxC, labels_B, return_tokens=True)
      return f, self.readout(tokens)
    if self.form is None:
      return self.model.apply({"params": self.params}, x_BxHxWxC, labels_B, *gamma_B)
    return energy.gradient(self.model, self.form, self.params, x_BxHxWxC, labels_B)

  def bind(self, labels: jax.Array) -> "BoundField":
    """The field of these labels, [B] or [B, K]: x → f(x | labels).

    Raises:
      ValueError: if a label does not exist, or the guidance scale has another shape.
    """
    labels = check_labels(labels, self.model.num_classes)
    allowed = [(), labels.shape] + ([labels.shape[1:]] if labels.ndim == 2 else [])
    if self.guidance is not None and self.guidance.shape not in allowed:
      raise ValueError(f"guidance has shape {self.guidance.shape}: for labels {labels.shape} give one of {allowed}")
    if self.guidance is None and labels.ndim == 2:
      raise ValueError(f"labels {labels.shape} are several conditions a sample: give a guidance scale for them")
    return BoundField(self, labels)


@flax.struct.dataclass(eq=False, repr=False)
class BoundField(ShortRepr):
  """A field with its labels: x → f. Made by `field` with labels, and by `Field.bind`."""

  field: Callable
  labels: Any

  def __call__(self, x: jax.Array, gamma: jax.Array | None = None) -> Any:
    return self.field(x, self.labels) if gamma is None else self.field(x, self.labels, gamma)


@overload
def field(model: Model, params: Params, labels: None = None, **options: Any) -> Field: ...


@overload
def field(model: Model, params: Params, labels: jax.Array, **options: Any) -> BoundField: ...


def field(
  model: Model,
  params: Params,
  labels: jax.Array | None = None,
  *,
  form: str | None = None,
  guidance: Scalar = 1.0,
  guidance_channels: int | Sequence[int] | None = None,
  guidance_interval: tuple[float, float] | None = None,
  readout: noise_level.NoiseReadout | None = None,
) -> Field | BoundField:
  """The field of a model: x → f(x | labels), or without labels (x, labels) → f(x | labels).

  The field of an implicit model is the network itself; that of an energy model is the gradient of its energy.

  Classifier-free guidance: f = f_null + s·(f_conditional − f_null) on the guided
  channels, f_conditional on the others. Guidance 1 costs one network pass, any
  other one pass of twice the batch.

  With labels [B, K] there are K conditions: f = f_null + Σ s_k·(f_k − f_null), one
  pass of K + 1 times the batch; where nothing is guided, the mean of the f_k.

  A field is a pytree. Pass it into `jax.jit` as an argument, `jax.jit(lambda field, x: field(x))`; `jax.jit(field)`
  works too, and makes the weights constants of the program. It is differentiable in x and in its parameters.

  Args:
    model: the network, such as `eqm_jax.networks.dit.DiT`: anything with `apply({"params": params}, x, labels)`,
      `num_classes` and `input_shape`. One with an attribute `energy` other than "none" is an energy.
    params: its parameters.
    labels: int labels [B], or [B, K] for K conditions; `model.num_classes` is the null class. None: the field takes
      them with each call, and `Field.bind` binds them.
    form: "dot" or "l2" reads an implicit model as this energy, and takes its gradient; of an energy model, its form
      or None.
    guidance: the scale s: one number; one per sample [B]; for K conditions [K] or
      [B, K], negative ones lead away from theirs.
    guidance_channels: None guides all channels; n the first n of them (3 is what
      the released code does with 4 latent channels); a sequence, those.
    guidance_interval: (low, high): guide only while low ≤ ‖f_conditional‖₂ ≤ high, the
      time-free counterpart of limiting guidance to an interval of noise levels
      (Kynkäänniemi et al. 2024). ‖f‖ is large far from the data and falls near it.
    readout: of `eqm_jax.load_readout`: the field returns (f, γ̂), γ̂ [B] the noise level that the network's tokens
      show, from the same pass; for `descend(..., stop="gamma")`. With guidance it is that of the conditional part, the
      mean over K conditions. The network must take `return_tokens=True`.

  Returns:
    A `BoundField` if `labels` are given, else a `Field`.

  Raises:
    ValueError: if a label or channel does not exist, the interval is empty, the scale has another shape, the
      model has no such energy, or the read-out is not of such a model.
  """
  channels = _check_channels(guidance_channels, model.input_shape[-1])
  is_plain = not isinstance(guidance, jax.Array | np.ndarray) and guidance == 1.0
  if guidance_interval is not None and not is_traced(guidance_interval):
    if not 0 <= guidance_interval[0] < guidance_interval[1]:
      raise ValueError(f"guidance_interval = {guidance_interval} must be (low, high) with 0 ≤ low < high")
  if readout is not None:
    noise_level.check_model(model, form, readout)
  unbound = Field(
    params=params,
    guidance=None if is_plain else jnp.asarray(guidance, jnp.float32),
    guidance_interval=None if is_plain or guidance_interval is None else jnp.asarray(guidance_interval, jnp.float32),
    model=model,
    guidance_channels=channels,
    form=energy.check_form(model, form) if form or energy.is_energy(model) else None,
    readout=readout,
  )
  return unbound if labels is None else unbound.bind(labels)


def with_labels(field: Callable, labels: Any = None) -> FieldFn:
  """A field as a pytree x → f, whether it takes labels or not.

  Args:
    field: x → f; or, with labels, (x, labels) → f.
    labels: None, or what the field takes: of a function of your own, any tree of arrays [B, ...].

  Raises:
    ValueError: for labels given to a field that has its own, none to one that needs them, and as `Field.bind`.
  """
  if labels is None:
    if isinstance(field, Field):
      raise ValueError("this field takes labels with each call, and there are none: give labels, or field.bind(labels)")
    return as_pytree(field)
  if isinstance(field, BoundField):
    raise ValueError(
      f"labels were given, but the field is bound to labels {np.shape(field.labels)}: "
      "leave them out, or make the field without labels"
    )
  return field.bind(labels) if isinstance(field, Field) else BoundField(as_pytree(field), labels)


@flax.struct.dataclass(eq=False, repr=False)
class GuidedField(ShortRepr):
  """Guidance between two fields. Made by `guided`."""

  field: Callable
  null_field: Callable
  guidance: jax.Array
  channels: tuple[int, ...] | None = flax.struct.field(pytree_node=False)

  def __call__(self, x: jax.Array) -> jax.Array:
    f_conditional = self.field(x)
    f_null = self.null_field(x)
    _check_channels(self.channels, f_null.shape[-1])
    scale_BxK = jnp.broadcast_to(self.guidance, len(f_null))[:, None]
    return _guide([f_conditional], f_null, scale_BxK, self.channels, None)


def guided(
  field: FieldFn, null_field: FieldFn, guidance: Scalar, channels: int | Sequence[int] | None = None
) -> GuidedField:
  """Guidance of one field by another: f_null + s·(f − f_null) on `channels`.

  For two different models, say a large one guided by a small one. With one model
  `eqm_jax.field(..., guidance=s)` is cheaper.

  Args:
    field, null_field: x [B, ..., C] → f of that shape.
    guidance: the scale s, one number or one per sample [B].
    channels: as `guidance_channels` of `eqm_jax.field`; an index is checked
      when the field is first called.
  """
  if isinstance(channels, int):
    channels = range(channels)
  channels = None if channels is None else tuple(channels)
  return GuidedField(f_alone(field), f_alone(null_field), jnp.asarray(guidance, jnp.float32), channels)


@flax.struct.dataclass(eq=False, repr=False)
class ComposedField(ShortRepr):
  """A weighted sum of fields. Made by `compose`."""

  fields: tuple[Callable, ...]
  weights: tuple[jax.Array, ...]

  def __call__(self, x: jax.Array) -> jax.Array:
    return sum(per_sample(weight, x) * field(x) for weight, field in zip(self.weights, self.fields))


def compose(fields: Sequence[FieldFn], weights: Sequence[Scalar]) -> ComposedField:
  """Sum of landscapes: f = Σ w_k·f_k, the gradient of Σ w_k·E_k (EqM paper, section 4.3).

  A sample comes to rest where the summed landscapes are low together; a negative
  weight leads away from a landscape's valleys. Weights that sum to one keep the pace of
  the descent. For labels of one model, `eqm_jax.field` with labels [B, K] takes one
  pass of the network instead of K.

  Args:
    fields: K fields, x [B, ...] → f of that shape: of several labels, models, or
      the same network with other weights.
    weights: K of them, each one number or one per sample [B].

  Raises:
    ValueError: if there are not as many weights as fields, or one is not finite.
  """
  fields, weights = tuple(fields), tuple(jnp.asarray(weight, jnp.float32) for weight in weights)
  if not fields or len(fields) != len(weights):
    raise ValueError(f"compose: {len(weights)} weights for {len(fields)} fields: give one weight for each field")
  for k, weight in enumerate(weights):
    if weight.ndim > 1:
      raise ValueError(f"compose: weight {k} has shape {weight.shape}: give one number, or one per sample [B]")
    if not is_traced(weight) and not np.all(np.isfinite(np.asarray(weight))):
      raise ValueError(f"compose: weight {k} = {weight} is not finite: give finite numbers")
  return ComposedField(tuple(map(f_alone, fields)), weights)


def f_alone(field: Callable) -> Callable:
  """A field as a pytree, for what takes f and no γ̂ beside it.

  Raises:
    ValueError: for a field that was made with a read-out.
  """
  unbound = field.field if isinstance(field, BoundField) else field
  if isinstance(unbound, Field) and unbound.readout is not None:
    raise ValueError(TWO_RESULTS)
  return as_pytree(field)


def _guide(
  f_conditional: list[jax.Array],
  f_null: jax.Array,
  scale_BxK: jax.Array,
  channels: tuple[int, ...] | None,
  interval: jax.Array | None,
) -> jax.Array:
  """f_null + Σ s_k·(f_k − f_null) where guidance acts, the mean of the f_k elsewhere."""
  scale_KxB = scale_BxK.T.astype(f_null.dtype)
  f_guided = f_null + sum(per_sample(s_B, f_null) * (f - f_null) for s_B, f in zip(scale_KxB, f_conditional))
  f_unguided = sum(f_conditional) / len(f_conditional)
  is_guided = jnp.ones((), bool)
  if channels is not None:
    is_guided = is_guided & np.isin(np.arange(f_null.shape[-1]), channels)
  if interval is not None:
    norm_B = jnp.sqrt(jnp.sum(f_unguided**2, axis=range(1, f_unguided.ndim)))
    is_guided = is_guided & per_sample((interval[0] <= norm_B) & (norm_B <= interval[1]), f_null)
  return jnp.where(is_guided, f_guided, f_unguided)


def _check_channels(channels: int | Sequence[int] | None, count: int) -> tuple[int, ...] | None:
  if channels is None:
    return None
  chosen = tuple(range(channels)) if isinstance(channels, int) else tuple(channels)
  if not chosen or min(chosen) < 0 or max(chosen) >= count:
    raise ValueError(
      f"guidance channels {channels} do not exist: the data has {count} channels, choose from 0..{count - 1}"
    )
  return chosen
