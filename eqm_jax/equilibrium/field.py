"""Fields: what the samplers descend, x [B, H, W, C] → f [B, H, W, C], f = ∇E.

A field is a pytree whose leaves are parameters, labels and guidance scales, so a
jitted sampler takes it as an argument: one compilation serves every set of
weights, and no weight is baked into the program. A model is anything with
`apply({"params": params}, x, label)`, `num_classes` and `input_shape`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np


@flax.struct.dataclass
class ImplicitField:
  """f(x) of a network with its labels bound. Made by `implicit_field`."""

  params: Any
  label_B: jax.Array
  scale: jax.Array | None
  model: Any = flax.struct.field(pytree_node=False)
  channels: tuple[int, ...] | None = flax.struct.field(pytree_node=False)

  def __call__(self, x_BxHxWxC: jax.Array, gamma_B: jax.Array | None = None) -> jax.Array:
    """f(x). `gamma_B` is for a flow-matching network, which is told the time."""
    times = () if gamma_B is None else (gamma_B,)
    if self.scale is None:
      return self.model.apply({"params": self.params}, x_BxHxWxC, self.label_B, *times)
    # One doubled batch: both halves in one pass use the matrix units better than two passes.
    null_B = jnp.full_like(self.label_B, self.model.num_classes)
    doubled = [jnp.concatenate(pair) for pair in zip((x_BxHxWxC, self.label_B, *times), (x_BxHxWxC, null_B, *times))]
    f_conditional, f_null = jnp.split(self.model.apply({"params": self.params}, *doubled), 2)
    return _guide(f_conditional, f_null, self.scale, self.channels)


def implicit_field(
  model: Any,
  params: Any,
  label_B: jax.Array,
  *,
  guidance: float | jax.Array = 1.0,
  guidance_channels: int | Sequence[int] | None = None,
) -> ImplicitField:
  """The network itself as a field: f(x) = model(x, label), optionally guided.

  Classifier-free guidance: f = f_null + s·(f_conditional − f_null) on the guided
  channels, f_conditional on the others. Guidance 1 costs one network pass, any
  other one pass of twice the batch.

  Args:
    model: the network, such as `eqm_jax.networks.dit.DiT`.
    params: its parameters.
    label_B: int labels [B]; `model.num_classes` is the null class.
    guidance: the scale s, one number or one per sample [B].
    guidance_channels: None guides all channels; n the first n of them (3 is what
      the released code does with 4 latent channels); a sequence, those.

  Raises:
    ValueError: if a label or channel does not exist, or the scale has another shape.
  """
  label_B = _checked_labels(label_B, model.num_classes)
  channels = _checked_channels(guidance_channels, model.input_shape[-1])
  guided_at_all = isinstance(guidance, jax.Array | np.ndarray) or guidance != 1.0
  scale = _checked_scale(guidance, label_B.shape) if guided_at_all else None
  return ImplicitField(params=params, label_B=label_B, scale=scale, model=model, channels=channels)


@flax.struct.dataclass
class GuidedField:
  """Guidance between two fields. Made by `guided`."""

  field_fn: Callable
  null_field_fn: Callable
  scale: jax.Array
  channels: tuple[int, ...] | None = flax.struct.field(pytree_node=False)

  def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
    return _guide(self.field_fn(x_BxHxWxC), self.null_field_fn(x_BxHxWxC), self.scale, self.channels)


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


def as_pytree(field_fn: Callable) -> Callable:
  """Wraps a plain closure so that it can pass into jit; a pytree stays as it is."""
  return jax.tree_util.Partial(field_fn) if jax.tree_util.all_leaves([field_fn]) else field_fn


def _guide(
  f_conditional: jax.Array, f_null: jax.Array, scale: jax.Array, channels: tuple[int, ...] | None
) -> jax.Array:
  scale = scale.reshape(scale.shape + (1,) * (f_null.ndim - 1 if scale.ndim else 0)).astype(f_null.dtype)
  f = f_null + scale * (f_conditional - f_null)
  if channels is None:
    return f
  _checked_channels(channels, f.shape[-1])
  is_guided = np.isin(np.arange(f.shape[-1]), channels)
  return jnp.where(is_guided, f, f_conditional)


def _checked_labels(label_B: jax.Array, num_classes: int) -> jax.Array:
  label_B = jnp.asarray(label_B)
  if label_B.ndim != 1 or not jnp.issubdtype(label_B.dtype, jnp.integer):
    raise ValueError(f"labels must be integers of shape [B], not {label_B.dtype}{list(label_B.shape)}")
  # Values of a traced array are not known; whoever traces checks before.
  if not isinstance(label_B, jax.core.Tracer) and label_B.size:
    low, high = int(label_B.min()), int(label_B.max())
    if low < 0 or high > num_classes:
      raise ValueError(
        f"labels span {low}..{high}, but the model knows 0..{num_classes - 1}, and {num_classes} for no class"
      )
  return label_B


def _checked_channels(channels: int | Sequence[int] | None, count: int) -> tuple[int, ...] | None:
  if channels is None:
    return None
  chosen = tuple(range(channels)) if isinstance(channels, int) else tuple(channels)
  if not chosen or min(chosen) < 0 or max(chosen) >= count:
    raise ValueError(f"guidance channels {channels} do not exist: the data has {count} channels, 0..{count - 1}")
  return chosen


def _checked_scale(scale: float | jax.Array, label_shape: tuple[int, ...]) -> jax.Array:
  scale = jnp.asarray(scale, jnp.float32)
  if scale.shape not in ((), label_shape):
    raise ValueError(
      f"guidance has shape {scale.shape}: give one number, or one for each of the {label_shape[0]} samples"
    )
  return scale
