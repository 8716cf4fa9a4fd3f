"""Softmax attention as one TPU kernel forward and one backward, in Pallas.

XLA writes the attention weights [heads, T, T] of every image to HBM in float32 and reads them back. These kernels keep
them in the chip's vector memory. They take the output of the qkv product as it lies in HBM, [B, T, 3·D] with query, key
and value of all heads side by side, one image a program. For one head after another, and for some of the rows at a
time, the forward kernel computes logits and their softmax in float32, and the weighted sum of the values:

    P = softmax(Q Kᵀ / √K)    out = P V

The backward kernel computes P again from the same [B, T, 3·D], which is all that is kept of the forward pass; g is the
gradient of out. It works on the transposed weights, with which all products but the last are plain ones:

    dV = Pᵀ g    dPᵀ = V gᵀ    dSᵀ = Pᵀ ∘ (dPᵀ − Σ_keys Pᵀ ∘ dPᵀ) / √K    dK = dSᵀ Q    dQ = (dSᵀ)ᵀ K
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

WHOLE, ROWS = 256, 128  # queries at a time: all of up to WHOLE, otherwise at most ROWS
LANES = 128  # to a multiple of which vector memory pads the last axis


def unfit(T: int, K: int) -> bool:
  """Whether the kernels do not take T tokens with heads of width K."""
  return K > 2 * LANES or not _rows(T)


def available() -> int:
  """Bytes of vector memory that a kernel may take, on the TPU that the program being traced is for."""
  return pltpu.get_tpu_info().vmem_capacity_bytes * 9 // 10


def vector_memory(T: int, D: int, itemsize: int) -> int:
  """Bytes of vector memory that the backward kernel takes, the larger one."""
  padded = -(-D // LANES) * LANES
  blocks = (
    2 * 7 * T * padded * itemsize
  )  # qkv, its gradient and that of the result, twice: the next image is read ahead
  return blocks + 14 * 4 * T * max(_rows(T), LANES) + 4 * 4 * T * LANES  # and what one head takes, in float32


def forward(qkv_BxTxE: jax.Array, num_heads: int, interpret: bool = False) -> jax.Array:
  """[B, T, 3·D] → [B, T, D] in the same type."""
  return _call(_forward_kernel, num_heads, (qkv_BxTxE,), qkv_BxTxE.shape[-1] // 3, interpret=interpret)


def backward(qkv_BxTxE: jax.Array, g_BxTxD: jax.Array, num_heads: int, interpret: bool = False) -> jax.Array:
  """The gradient of `forward`'s argument, from that of its result."""
  return _call(_backward_kernel, num_heads, (qkv_BxTxE, g_BxTxD), qkv_BxTxE.shape[-1], interpret=interpret)


def _call(kernel, num_heads: int, arrays: tuple[jax.Array, ...], width: int, *, interpret: bool) -> jax.Array:
  """Runs a kernel for every image of the arrays [B, T, ...] → [B, T, width]."""
  B, T, E = arrays[0].shape
  dtype = arrays[0].dtype

  def image(width: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, T, width), lambda b: (b, 0, 0))

  products = 2 if len(arrays) == 1 else 5
  moved = B * T * (width + sum(array.shape[-1] for array in arrays)) * dtype.itemsize
  cost = pl.CostEstimate(
    flops=products * 2 * B * T * T * E // 3, transcendentals=B * num_heads * T * T, bytes_accessed=moved
  )
  return pl.pallas_call(
    functools.partial(kernel, num_heads),
    grid=(B,),
    in_specs=[image(array.shape[-1]) for array in arrays],
    out_specs=image(width),
    out_shape=jax.ShapeDtypeStruct((B, T, width), dtype),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel",), vmem_limit_bytes=vector_memory(T, E // 3, dtype.itemsize)
    ),
    cost_estimate=cost,
    interpret=interpret,
    name=kernel.__name__.strip("_"),
  )(*arrays)


def _forward_kernel(num_heads: int, qkv_ref, out_ref):
  T, D = out_ref.shape
  width = D // num_heads
  for start in range(0, D, width):
    columns = pl.ds(start, width)
    key_SxK, value_SxK = qkv_ref[:, pl.ds(D + start, width)], qkv_ref[:, pl.ds(2 * D + start, width)]

    def attend(rows, _, columns=columns, key_SxK=key_SxK, value_SxK=value_SxK):
      logits_TxS = _product(qkv_ref[rows, columns], key_SxK, 1, 1) * width**-0.5
      weights_TxS = jnp.exp(logits_TxS - jnp.max(logits_TxS, axis=1, keepdims=True))
      total_Tx1 = jnp.sum(weights_TxS, axis=1, keepdims=True)
      mixed_TxK = _product(weights_TxS.astype(value_SxK.dtype), value_SxK, 1, 0) / total_Tx1
      out_ref[rows, columns] = mixed_TxK.astype(out_ref.dtype)

    _for_rows(T, attend, None)


def _backward_kernel(num_heads: int, qkv_ref, g_ref, out_ref):
  T, D = g_ref.shape
  width = D // num_heads
  for start in range(0, D, width):
    columns, key_columns, value_columns = (pl.ds(part * D + start, width) for part in range(3))
    key_SxK, value_SxK = qkv_ref[:, key_columns], qkv_ref[:, value_columns]

    def along(rows, sums, columns=columns, key_SxK=key_SxK, value_SxK=value_SxK):
      query_TxK, g_TxK = qkv_ref[rows, columns], g_ref[rows, columns]
      logits_SxT = _product(key_SxK, query_TxK, 1, 1) * width**-0.5
      weights_SxT = jnp.exp(logits_SxT - jnp.max(logits_SxT, axis=0, keepdims=True))
      weights_SxT /= jnp.sum(weights_SxT, axis=0, keepdims=True)
      along_value_SxK = _product(weights_SxT.astype(g_TxK.dtype), g_TxK, 1, 0)
      along_weights_SxT = _product(value_SxK, g_TxK, 1, 1)
      shared_1xT = jnp.sum(weights_SxT * along_weights_SxT, axis=0, keepdims=True)
      along_logits_SxT = weights_SxT * (along_weights_SxT - shared_1xT) * width**-0.5
      along_logits_SxT = along_logits_SxT.astype(query_TxK.dtype)
      out_ref[rows, columns] = _product(along_logits_SxT, key_SxK, 0, 0).astype(out_ref.dtype)
      return sums[0] + _product(along_logits_SxT, query_TxK, 1, 0), sums[1] + along_value_SxK

    zeros_SxK = jnp.zeros((T, width), jnp.float32)
    along_key_SxK, along_value_SxK = _for_rows(T, along, (zeros_SxK, zeros_SxK))
    out_ref[:, key_columns] = along_key_SxK.astype(out_ref.dtype)
    out_ref[:, value_columns] = along_value_SxK.astype(out_ref.dtype)


def _for_rows(T: int, function, state):
  """`state` after `function(rows, state)` for one part of the rows after another."""
  rows = _rows(T)
  if rows == T:
    return function(pl.ds(0, T), state)
  return jax.lax.fori_loop(
    0, T // rows, lambda i, state: function(pl.ds(pl.multiple_of(i * rows, rows), rows), state), state
  )


def _product(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
  """The product of two matrices over an axis of each, in float32."""
  return jax.lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32)


def _rows(T: int) -> int:
  """Queries at a time: of more than WHOLE the largest divisor that fills whole tiles; 0: there is none."""
  return T if T <= WHOLE else next((rows for rows in range(ROWS, 0, -16) if T % rows == 0), 0)
