"""Queries and keys between the qkv product and the attention: RMSNorm of each head, and rotary positions.

- `model.qk_norm` (Henry et al. 2020; Dehghani et al. 2023): each head's query and key are divided by their root mean
  square and multiplied by a learned scale, so that logits cannot grow without bound.
- `model.rope` (Su et al. 2021, in two dimensions): each head's query and key are rotated by angles proportional to the
  token's place, one half of the head's width by its row, the other by its column. A logit then depends on places by
  their offset alone:

      q' = R(row, column) q    k' = R(row, column) k    q'ᵀk' = qᵀ R(offset) k

Both are computed in float32 or wider.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

EPSILON = 1e-6  # added to mean squares
BASE = 10_000  # angles per token fall from 1 to almost 1 / BASE, as in the fixed sin-cos table


def prepare(num_heads: int, rope: bool, qkv: jax.Array, scale_2xK: jax.Array | None = None) -> jax.Array:
  """The qkv product with its queries and keys normalised and rotated.

  Args:
    num_heads: H.
    rope: rotates queries and keys; the tokens are then a square, row by row.
    qkv: [B, T, 3·H·K] or [B, T, 3, H, K].
    scale_2xK: normalises queries and keys to these scales, of all heads; None: no normalisation.

  Returns:
    An array of the shape and type of `qkv`.
  """
  if not rope and scale_2xK is None:
    return qkv
  B, T = qkv.shape[:2]
  qkv_BxTx3xHxK = qkv.reshape(B, T, 3, num_heads, -1)
  pair_BxTx2xHxK = qkv_BxTx3xHxK[:, :, :2].astype(jnp.promote_types(qkv.dtype, jnp.float32))
  if scale_2xK is not None:
    square_BxTx2xHx1 = jnp.mean(pair_BxTx2xHxK**2, axis=-1, keepdims=True)
    pair_BxTx2xHxK = pair_BxTx2xHxK * jax.lax.rsqrt(square_BxTx2xHx1 + EPSILON) * scale_2xK[:, None]
  if rope:
    pair_BxTx2xHxK = rotated(pair_BxTx2xHxK, math.isqrt(T))
  prepared = jnp.concatenate([pair_BxTx2xHxK.astype(qkv.dtype), qkv_BxTx3xHxK[:, :, 2:]], axis=2)
  return prepared.reshape(qkv.shape)


def rotated(x_BxTxNxHxK: jax.Array, side: int) -> jax.Array:
  """Vectors of width K = 2·2·F rotated in planes: half of them by the token's row, half by its column.

  Plane f of an axis is spanned by the numbers f and F + f of that axis's half.
  """
  angles_TxAxF = angle_table(side, x_BxTxNxHxK.shape[-1])
  cos, sin = (jnp.asarray(f(angles_TxAxF)[:, None, None], x_BxTxNxHxK.dtype) for f in (np.cos, np.sin))
  first, second = jnp.moveaxis(x_BxTxNxHxK.reshape(*x_BxTxNxHxK.shape[:-1], 2, 2, -1), -2, 0)
  turned = jnp.stack([first * cos - second * sin, first * sin + second * cos], axis=-2)
  return turned.reshape(x_BxTxNxHxK.shape)


def angle_table(side: int, width: int) -> np.ndarray:
  """Angles [side², 2, width / 4] in float64: of the row, then of the column, by frequency."""
  omega_F = 1 / BASE ** (np.arange(width // 4) / (width / 4))
  places_Tx2 = np.stack(np.divmod(np.arange(side**2), side), axis=1)
  return places_Tx2[..., None] * omega_F
