"""The blocks of a DiT in a form that XLA's CPU compiler turns into fast programs.

The parameters are those of `dit.Block`, and so are the numbers, to rounding. The differences:

- Weight matrices are flat, [in, out], and tokens are rows of one matrix.
- Attention runs over arrays with heads before tokens, so that its products are plain batched ones.
- In training, the backward pass is written by hand. Autodiff would keep the attention weights [B, H, T, T] and the
  outputs of norms and activations of every block; on a CPU, writing and reading them takes longer than computing them
  again. A bias's gradient is a product with ones, since XLA sums columns slowly. The price: no forward-mode derivative
  (`jax.jvp`, `jax.jacfwd`), which training does not need.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from eqm_jax.networks import query_key

EPSILON = 1e-6  # in the norms of the tokens


def blocks(
  params: Any,
  tokens_BxTxD: jax.Array,
  condition_BxD: jax.Array,
  *,
  num_heads: int,
  qk_norm: bool,
  norm: str,
  mlp: str,
  rope: bool,
  training: bool,
  unroll: int = 1,
  wrap: Callable = lambda block: block,
) -> jax.Array:
  """Tokens after all blocks, [B, T, D].

  Args:
    params: the parameters of `dit.Block`, each with a leading depth axis.
    tokens_BxTxD: the embedded patches, in the type of the products.
    condition_BxD: the embedded label and time.
    num_heads: of the attention; divides D.
    qk_norm, norm, mlp, rope: as `dit.DiT` has them.
    training: uses the backward pass that is written by hand, which has no forward-mode derivative.
    unroll: blocks per iteration of the scan over depth.
    wrap: applied to the function of one block, (tokens, parameters) → (tokens, None), such as `jax.checkpoint`.
  """
  dense = _dense if training else _dense_plain
  attend = _attend if training else _attend_plain
  modulated_norm = functools.partial(_modulated_norm, norm)
  prepare = functools.partial(query_key.prepare, num_heads, rope)

  def block(tokens, p):
    scales = (p["qk_norm"]["scale"],) if qk_norm else ()  # in their own type
    p = jax.tree.map(lambda leaf: leaf.astype(tokens.dtype), p)
    modulation = nn.silu(condition_BxD) @ p["modulation"]["kernel"] + p["modulation"]["bias"]
    shift_attention, scale_attention, gate_attention, shift_mlp, scale_mlp, gate_mlp = jnp.split(
      modulation[:, None], 6, axis=-1
    )
    qkv = dense(modulated_norm, *_flat(p["qkv"], inputs=1), tokens, shift_attention, scale_attention)
    mixed = attend(num_heads, prepare, qkv, *scales)
    tokens = tokens + gate_attention * dense(_identity, *_flat(p["attention_out"], inputs=2), mixed)

    hidden = dense(modulated_norm, *_into_mlp(p, mlp), tokens, shift_mlp, scale_mlp)
    return tokens + gate_mlp * dense(ACTIVATIONS[mlp], *_flat(p["mlp_out"], inputs=1), hidden), None

  return jax.lax.scan(wrap(block), tokens_BxTxD, params, unroll=unroll)[0]


def _flat(layer: Any, inputs: int) -> tuple[jax.Array, jax.Array]:
  """Kernel [in, out] and bias [out] of a layer whose kernel's first `inputs` axes are contracted."""
  kernel = layer["kernel"]
  return kernel.reshape(math.prod(kernel.shape[:inputs]), -1), layer["bias"].reshape(-1)


def _into_mlp(p: Any, mlp: str) -> tuple[jax.Array, jax.Array]:
  """Kernel and bias of the MLP's first layer; of SwiGLU those of value and gate, side by side."""
  if mlp == "gelu":
    return _flat(p["mlp_in"], inputs=1)
  kernels, biases = zip(*(_flat(p[name], inputs=1) for name in ("mlp_in", "mlp_gate")))
  return jnp.concatenate(kernels, axis=1), jnp.concatenate(biases)


# ---------------------------------------------------------------- activation, then dense layer


def _identity(x):
  return x


def _gelu(x):
  return nn.gelu(x, approximate=True)


def _swiglu(x):
  """Of the value and its gate, side by side."""
  value, gate = jnp.split(x, 2, axis=-1)
  return nn.silu(gate) * value


ACTIVATIONS = {"gelu": _gelu, "swiglu": _swiglu}


def _modulated_norm(norm: str, x_BxTxD, shift_Bx1xD, scale_Bx1xD):
  """LayerNorm or RMSNorm without parameters, in float32 or wider, then adaLN's shift and scale."""
  wide = x_BxTxD.astype(jnp.promote_types(x_BxTxD.dtype, jnp.float32))
  centred = wide - jnp.mean(wide, axis=-1, keepdims=True) if norm == "layer" else wide
  variance = jnp.mean(centred**2, axis=-1, keepdims=True)
  normed = (centred * jax.lax.rsqrt(variance + EPSILON)).astype(x_BxTxD.dtype)
  return normed * (1 + scale_Bx1xD) + shift_Bx1xD


def _dense_plain(activation: Callable, kernel: jax.Array, bias: jax.Array, *inputs: jax.Array) -> jax.Array:
  """activation(*inputs) · kernel + bias, over the last axis."""
  x = activation(*inputs)
  return (_rows(x) @ kernel + bias).reshape(*x.shape[:-1], -1)


# `_dense_plain` with a backward pass that keeps the inputs of the activation and computes the activation again.
_dense = jax.custom_vjp(_dense_plain, nondiff_argnums=(0,))


def _dense_forward(activation, kernel, bias, *inputs):
  return _dense_plain(activation, kernel, bias, *inputs), (kernel, inputs)


def _dense_backward(activation, residuals, gradient):
  kernel, inputs = residuals
  x, pull_back = jax.vjp(activation, *inputs)
  gradient_NxF = _rows(gradient)
  ones_1xN = jnp.ones((1, len(gradient_NxF)), gradient.dtype)
  along_inputs = pull_back((gradient_NxF @ kernel.T).reshape(x.shape))
  return _rows(x).T @ gradient_NxF, (ones_1xN @ gradient_NxF)[0], *along_inputs


_dense.defvjp(_dense_forward, _dense_backward)


def _rows(x: jax.Array) -> jax.Array:
  return x.reshape(-1, x.shape[-1])


# ---------------------------------------------------------------- attention


def _attend_plain(num_heads: int, prepare: Callable, qkv_BxTx3D: jax.Array, *scales: jax.Array) -> jax.Array:
  """Softmax attention of prepare([B, T, 3·D]), whose last axis is query, key and value of all heads → [B, T, D]."""
  return _attend_forward(num_heads, prepare, qkv_BxTx3D, *scales)[0]


# `_attend_plain` with a backward pass that keeps one number per row of attention weights, and computes the weights and
# what they are computed from again.
_attend = jax.custom_vjp(_attend_plain, nondiff_argnums=(0, 1))


def _attend_forward(num_heads, prepare, qkv_BxTx3D, *scales):
  query, key, value = _split_heads(prepare(qkv_BxTx3D, *scales), num_heads, 3)
  logits_BxHxTxS = _logits(query, key)
  peak_BxHxTx1 = jax.lax.stop_gradient(jnp.max(logits_BxHxTxS, axis=-1, keepdims=True))
  weights_BxHxTxS = jnp.exp(logits_BxHxTxS - peak_BxHxTx1)
  total_BxHxTx1 = jnp.sum(weights_BxHxTxS, axis=-1, keepdims=True)
  mixed_BxHxTxK = jnp.einsum("BHTS,BHSK->BHTK", weights_BxHxTxS.astype(value.dtype), value) / total_BxHxTx1
  mixed_BxTxD = _join_heads(mixed_BxHxTxK[None].astype(value.dtype))
  return mixed_BxTxD, ((qkv_BxTx3D, *scales), mixed_BxTxD, peak_BxHxTx1 + jnp.log(total_BxHxTx1))


def _attend_backward(num_heads, prepare, residuals, gradient_BxTxD):
  inputs, mixed_BxTxD, log_total_BxHxTx1 = residuals
  qkv_BxTx3D, pull_back = jax.vjp(prepare, *inputs)
  query, key, value = _split_heads(qkv_BxTx3D, num_heads, 3)
  (gradient,) = _split_heads(gradient_BxTxD, num_heads, 1)
  (mixed,) = _split_heads(mixed_BxTxD, num_heads, 1)
  wide = log_total_BxHxTx1.dtype
  weights_BxHxTxS = jnp.exp(_logits(query, key) - log_total_BxHxTx1)

  along_weights = jnp.einsum("BHTK,BHSK->BHTS", gradient, value, preferred_element_type=wide)
  shared_BxHxTx1 = jnp.sum((gradient * mixed).astype(wide), axis=-1, keepdims=True)  # Σ_s weight·along_weights
  along_logits = (weights_BxHxTxS * (along_weights - shared_BxHxTx1)).astype(value.dtype)

  # Contracted over T: with the smaller array transposed these are plain products, which XLA computes faster.
  along_value = jnp.einsum("BHKT,BHTS->BHKS", gradient.swapaxes(2, 3), weights_BxHxTxS.astype(value.dtype))
  along_key = jnp.einsum("BHKT,BHTS->BHKS", query.swapaxes(2, 3), along_logits)
  along_query = jnp.einsum("BHTS,BHSK->BHTK", along_logits, key)
  scale = query.shape[-1] ** -0.5
  stacked = jnp.stack([along_query * scale, along_key.swapaxes(2, 3) * scale, along_value.swapaxes(2, 3)])
  return pull_back(_join_heads(stacked))


_attend.defvjp(_attend_forward, _attend_backward)


def _logits(query_BxHxTxK: jax.Array, key_BxHxSxK: jax.Array) -> jax.Array:
  """Scaled products [B, H, T, S], in float32 or wider."""
  wide = jnp.promote_types(query_BxHxTxK.dtype, jnp.float32)
  scaled = query_BxHxTxK * query_BxHxTxK.shape[-1] ** -0.5
  return jnp.einsum("BHTK,BHSK->BHTS", scaled, key_BxHxSxK, preferred_element_type=wide)


def _split_heads(x_BxTxND: jax.Array, num_heads: int, count: int) -> jax.Array:
  """[B, T, count·H·K] → [count, B, H, T, K]."""
  B, T, _ = x_BxTxND.shape
  return x_BxTxND.reshape(B, T, count, num_heads, -1).transpose(2, 0, 3, 1, 4)


def _join_heads(x_NxBxHxTxK: jax.Array) -> jax.Array:
  """The inverse of `_split_heads`: [N, B, H, T, K] → [B, T, N·H·K]."""
  count, B, H, T, K = x_NxBxHxTxK.shape
  return x_NxBxHxTxK.transpose(1, 3, 0, 2, 4).reshape(B, T, count * H * K)
