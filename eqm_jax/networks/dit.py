"""DiT, the transformer of Equilibrium Matching, with adaLN-Zero (Peebles & Xie 2023).

    x [B, H, W, C], label [B] → f [B, H, W, C]

The blocks' parameters are stacked on a leading depth axis and the blocks run in one scan, so compile time does not grow
with depth. Without `time_input` the time embedding is that of time 0, one learned vector, as in the released code.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from eqm_jax import checks
from eqm_jax.networks import cpu_blocks
from eqm_jax.trees import path_name

# depth, width, num_heads of the published sizes; the patch size follows the slash in a name: "XL/2".
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}

# Intermediate values of a block that are kept for the backward pass; the others are computed again.
REMAT_POLICIES = {
  "none": None,  # all are kept: no rematerialisation
  "dots": jax.checkpoint_policies.checkpoint_dots,
  "dots_no_batch": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
  "full": jax.checkpoint_policies.nothing_saveable,
}
ATTENTION = ("xla", "cudnn")
BLOCKS = ("auto", "xla", "cpu")
ENERGIES = ("none", "dot", "l2", "scalar")
DTYPES = ("float32", "bfloat16", "float64")
# Attributes that shape the parameters; of the energies, "scalar" does.
SHAPING = ("channels", "patch_size", "width", "depth", "num_heads", "num_classes", "mlp_ratio", "learn_sigma", "energy")
TIME_FREQUENCIES = 256

# Mesh axes that activations are sharded over: along samples, and within a layer.
SAMPLES, WITHIN_LAYER = ("data", "fsdp"), "tensor"


class DiT(nn.Module):
  """The network. Its attributes are the `model` section of a config.

  Raises:
    ValueError: when built, if the attributes do not fit each other; when called, if an argument does not fit them.
  """

  input_size: int  # height and width of x
  channels: int
  patch_size: int
  width: int
  depth: int
  num_heads: int
  num_classes: int  # label num_classes is the null class
  mlp_ratio: float = 4.0
  time_input: bool = False  # takes γ as a third argument (flow matching)
  learn_sigma: bool = False  # has the second output half that the released code computes and discards
  dtype: str = "float32"  # of the matrix products; norms, softmax, parameters and output stay float32
  unroll: int = 1  # blocks per iteration of the scan
  remat: str = "none"  # one of REMAT_POLICIES
  attention: str = "xla"  # or "cudnn" (GPU, bfloat16)
  block: str = "auto"  # form of the blocks: "xla" for TPUs and GPUs, "cpu" for CPUs, "auto" chooses by the backend
  energy: str = "none"  # meaning of the output: "none", the field itself; "dot" or "l2", part of an energy;
  # "scalar", the energy itself, [B], by a head that sums over the tokens in place of the last layer

  def __post_init__(self):
    _check_attributes(self)
    super().__post_init__()

  @property
  def input_shape(self) -> tuple[int, int, int]:
    """(H, W, C) of one sample."""
    return self.input_size, self.input_size, self.channels

  @property
  def twice_differentiable(self) -> "DiT":
    """The same model with an attention that has second derivatives, unlike cuDNN's."""
    return self if self.attention == "xla" else self.clone(attention="xla")

  @property
  def block_form(self) -> str:
    """Form of the blocks where this is traced: "xla" or "cpu"."""
    if self.block != "auto":
      return self.block
    # Only `Block` has sharding constraints for layers that are split over devices; in a shard_map none is split.
    mesh = jax.sharding.get_abstract_mesh()
    split = any(size > 1 for axis, size in mesh.shape.items() if axis not in mesh.manual_axes)
    return "cpu" if jax.default_backend() == "cpu" and not split else "xla"

  @nn.compact
  def __call__(
    self,
    x_BxHxWxC: jax.Array,
    label_B: jax.Array,
    gamma_B: jax.Array | None = None,
    *,
    return_tokens: bool = False,
    training: bool = False,
  ):
    """f(x | label).

    Args:
      x_BxHxWxC: the samples.
      label_B: int, 0..num_classes; num_classes is the null class.
      gamma_B: the time, only with `time_input`: 0 at noise, 1 at data.
      return_tokens: returns the last block's activations [B, T, width] too.
      training: allows a backward pass that is faster but has no forward-mode derivative.

    Returns:
      f [B, H, W, C] in float32 (float64 if dtype is), or (f, tokens). With energy "scalar", E [B] in place of f.
    """
    self._check_arguments(x_BxHxWxC, label_B, gamma_B)
    dtype = jnp.dtype(self.dtype)
    patches_BxTxP = patchify(x_BxHxWxC, self.patch_size).astype(dtype)
    positions_TxD = jnp.asarray(position_table(self.input_size // self.patch_size, self.width), dtype)
    tokens_BxTxD = _constrain(_dense(self.width, dtype, name="patch_embed")(patches_BxTxP) + positions_TxD, SAMPLES)

    time = jnp.zeros(1) if gamma_B is None else gamma_B
    time_BxD = TimeEmbed(self.width, dtype, name="time_embed")(time)
    embed_label = nn.Embed(self.num_classes + 1, self.width, dtype=dtype, embedding_init=_normal, name="label_embed")
    condition_BxD = _constrain(time_BxD + embed_label(label_B), SAMPLES)

    # Parameters are initialised by the other form.
    if self.block_form == "cpu" and not self.is_initializing():
      tokens_BxTxD = self._cpu_blocks(tokens_BxTxD, condition_BxD, training)
    else:
      tokens_BxTxD = self._blocks(dtype)(tokens_BxTxD, condition_BxD)[0]
    output = self._output(tokens_BxTxD, condition_BxD)
    return (output, tokens_BxTxD) if return_tokens else output

  def _output(self, tokens_BxTxD, condition_BxD):
    """The last layer: f [B, H, W, C], or E [B] with energy "scalar"."""
    # It is narrow, and its output is summed over hundreds of steps: never below float32.
    wide = jnp.promote_types(self.dtype, jnp.float32)
    shift, scale = _modulation(2, self.width, wide, "final_modulation", condition_BxD)
    normed_BxTxD = _modulate(_layer_norm(tokens_BxTxD.astype(wide)), shift, scale)
    zeros = nn.initializers.zeros
    if self.energy == "scalar":
      energy_BxTx1 = nn.Dense(1, dtype=wide, kernel_init=zeros, name="energy_out")(normed_BxTxD)
      return jnp.sum(energy_BxTx1, axis=(1, 2))
    out_channels = self.channels * (2 if self.learn_sigma else 1)
    final_out = nn.Dense(self.patch_size**2 * out_channels, dtype=wide, kernel_init=zeros, name="final_out")
    return unpatchify(final_out(normed_BxTxD), self.patch_size, out_channels)[..., : self.channels]

  def _cpu_blocks(self, tokens_BxTxD, condition_BxD, training: bool):
    wrap = functools.partial(jax.checkpoint, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
    return cpu_blocks.blocks(
      self.get_variable("params", "blocks"),
      tokens_BxTxD,
      condition_BxD,
      num_heads=self.num_heads,
      training=training,
      unroll=min(self.unroll, self.depth),
      **({} if self.remat == "none" else {"wrap": wrap}),
    )

  def _blocks(self, dtype):
    """All blocks as one module, scanned over stacked parameters."""
    block = Block
    if self.remat != "none":
      # The loop separates the recomputation, so prevent_cse is not needed.
      block = nn.remat(Block, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
    stack = nn.scan(
      block,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=nn.broadcast,
      length=self.depth,
      unroll=min(self.unroll, self.depth),
    )
    return stack(self.width, self.num_heads, self.mlp_ratio, dtype, self.attention, name="blocks")

  def _check_arguments(self, x, label, gamma):
    if x.ndim != 4 or x.shape[1:] != self.input_shape:
      raise ValueError(f"x has shape {x.shape}: this model takes [B, {', '.join(map(str, self.input_shape))}] (NHWC)")
    if label.shape != x.shape[:1]:
      raise ValueError(f"labels have shape {label.shape}: give one for each of the {x.shape[0]} samples of x {x.shape}")
    if not jnp.issubdtype(label.dtype, jnp.integer):
      raise ValueError(f"labels are {label.dtype}: give integers 0..{self.num_classes}")
    # Traced arrays have no values to check: callers that compile check before. numpy keeps the check out of a trace.
    if not isinstance(label, jax.core.Tracer) and label.size:
      low, high = np.asarray(label).min(), np.asarray(label).max()
      if low < 0 or high > self.num_classes:
        raise ValueError(f"labels span {low}..{high}: this model has 0..{self.num_classes}")
    if self.time_input != (gamma is not None):
      problem = "needs a time: give gamma" if self.time_input else "takes no time: leave gamma out"
      raise ValueError(f"this model {problem} (time_input={self.time_input})")
    if gamma is not None and gamma.shape != x.shape[:1]:
      raise ValueError(f"times have shape {gamma.shape}: give one for each of the {x.shape[0]} samples")


class Block(nn.Module):
  """One adaLN-Zero transformer block, in the (carry, output) form of a scan."""

  width: int
  num_heads: int
  mlp_ratio: float
  dtype: Any
  attention: str

  @nn.compact
  def __call__(self, tokens_BxTxD, condition_BxD):
    dtype, heads = self.dtype, (self.num_heads, self.width // self.num_heads)
    modulation = _modulation(6, self.width, dtype, "modulation", condition_BxD)
    shift_attention, scale_attention, gate_attention, shift_mlp, scale_mlp, gate_mlp = modulation

    h_BxTxD = _modulate(_layer_norm(tokens_BxTxD), shift_attention, scale_attention)
    qkv_BxTx3xHxK = nn.DenseGeneral((3, *heads), dtype=dtype, kernel_init=_xavier, name="qkv")(h_BxTxD)
    qkv_BxTx3xHxK = _constrain(qkv_BxTx3xHxK, SAMPLES, None, None, WITHIN_LAYER)
    query, key, value = jnp.moveaxis(qkv_BxTx3xHxK, 2, 0)
    mixed_BxTxHxK = _attend(query, key, value, self.attention)
    h_BxTxD = nn.DenseGeneral(self.width, axis=(-2, -1), dtype=dtype, kernel_init=_xavier, name="attention_out")(
      mixed_BxTxHxK
    )
    tokens_BxTxD = _constrain(tokens_BxTxD + gate_attention * h_BxTxD, SAMPLES)

    h_BxTxD = _modulate(_layer_norm(tokens_BxTxD), shift_mlp, scale_mlp)
    h_BxTxF = nn.gelu(_dense(round(self.width * self.mlp_ratio), dtype, name="mlp_in")(h_BxTxD), approximate=True)
    h_BxTxF = _constrain(h_BxTxF, SAMPLES, None, WITHIN_LAYER)
    tokens_BxTxD = tokens_BxTxD + gate_mlp * _dense(self.width, dtype, name="mlp_out")(h_BxTxF)
    return _constrain(tokens_BxTxD, SAMPLES), None


class TimeEmbed(nn.Module):
  """Sinusoidal embedding of the time and a two-layer perceptron: [B] → [B, width]."""

  width: int
  dtype: Any

  @nn.compact
  def __call__(self, time_B):
    half = TIME_FREQUENCIES // 2
    frequencies_F = jnp.exp(-jnp.log(10_000) * jnp.arange(half) / half)
    angles_BxF = time_B[:, None] * frequencies_F
    h = jnp.concatenate([jnp.cos(angles_BxF), jnp.sin(angles_BxF)], axis=-1).astype(self.dtype)
    h = nn.Dense(self.width, dtype=self.dtype, kernel_init=_normal, name="dense_0")(h)
    return nn.Dense(self.width, dtype=self.dtype, kernel_init=_normal, name="dense_1")(nn.silu(h))


def patchify(x_BxHxWxC: jax.Array, patch: int) -> jax.Array:
  """[B, H, W, C] → [B, T, patch·patch·C], tokens row by row."""
  B, H, W, C = x_BxHxWxC.shape
  x_BxhxpxwxpxC = x_BxHxWxC.reshape(B, H // patch, patch, W // patch, patch, C)
  return x_BxhxpxwxpxC.swapaxes(2, 3).reshape(B, -1, patch * patch * C)


def unpatchify(tokens_BxTxP: jax.Array, patch: int, channels: int) -> jax.Array:
  """The inverse of `patchify` for a square image."""
  B, T, _ = tokens_BxTxP.shape
  side = round(T**0.5)
  x_BxhxwxpxpxC = tokens_BxTxP.reshape(B, side, side, patch, patch, channels)
  return x_BxhxwxpxpxC.swapaxes(2, 3).reshape(B, side * patch, side * patch, channels)


def position_table(side: int, width: int) -> np.ndarray:
  """The fixed 2-D sin-cos table, [side², width] float32: half for columns, half for rows.

  Computed in float64 and rounded once, which gives the same bits as the released code.
  """
  omega_F = 1 / 10_000 ** (np.arange(width // 4, dtype=np.float64) / (width / 4))
  angles_SxF = np.arange(side, dtype=np.float64)[:, None] * omega_F
  line_SxD = np.concatenate([np.sin(angles_SxF), np.cos(angles_SxF)], axis=1)
  columns, rows = np.tile(line_SxD, (side, 1)), np.repeat(line_SxD, side, axis=0)
  return np.concatenate([columns, rows], axis=1).astype(np.float32)


def attributes(model: DiT) -> dict[str, Any]:
  """The attributes of a model as plain values: `DiT(**attributes(model)) == model`."""
  return {field.name: getattr(model, field.name) for field in attribute_fields()}


def attribute_fields() -> list[dataclasses.Field]:
  """The attributes of DiT, without those that linen adds."""
  return [field for field in dataclasses.fields(DiT) if field.name not in ("parent", "name")]


def first_difference(saved: DiT, asked: DiT) -> tuple[str, str, Any, Any] | None:
  """How the parameters of two models differ: the attributes, in words, and one parameter with both of its shapes."""
  pairs = [(attribute, getattr(saved, attribute), getattr(asked, attribute)) for attribute in SHAPING]
  words = "; ".join(f"{attribute} is {a!r} in the file, but {b!r} is asked for" for attribute, a, b in pairs if a != b)
  if not words:
    return None
  theirs, ours = (
    {path_name(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(parameter_shapes(model))}
    for model in (saved, asked)
  )
  name = next((name for name in sorted(theirs.keys() | ours.keys()) if theirs.get(name) != ours.get(name)), None)
  return name and (words, name, theirs.get(name, "absent"), ours.get(name, "absent"))


def check_fits(where: str, saved: DiT, asked: DiT):
  """Refuses the parameters of the model `saved` for the model `asked`.

  Raises:
    ValueError: beginning with `where`, and naming the attributes in which the two differ.
  """
  difference = first_difference(saved, asked)
  if difference:
    words, name, shape, expected = difference
    raise ValueError(
      f"{where}: {words} ({name} has shape {shape}, but the model expects {expected}): ask for the file's, or give "
      "another file"
    )


def parameter_shapes(model: DiT) -> dict[str, Any]:
  """The model's parameter tree with shapes and types for leaves; nothing is computed."""
  gamma = (jnp.zeros(1),) if model.time_input else ()
  x, label = jnp.zeros((1, *model.input_shape)), jnp.zeros(1, jnp.int32)
  return jax.eval_shape(model.init, jax.random.key(0), x, label, *gamma)["params"]


def _constrain(x: jax.Array, *axes) -> jax.Array:
  """Constrains x's axes to be sharded over these of the mesh in which this is traced, and the others to be replicated.

  By itself the compiler may move activations where moving parameters is cheaper. Without a mesh nothing is constrained.
  """
  names = jax.sharding.get_abstract_mesh().axis_names
  if not {*SAMPLES, WITHIN_LAYER} <= set(names):
    return x
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))


def _attend(query, key, value, implementation: str):
  """Softmax attention over [B, T, heads, K]."""
  if query.dtype == jnp.float64:  # jax.nn rounds the softmax to float32, too coarse for a float64 check
    weights_BxHxTxS = jax.nn.softmax(jnp.einsum("BTHK,BSHK->BHTS", query, key) / query.shape[-1] ** 0.5)
    return jnp.einsum("BHTS,BSHK->BTHK", weights_BxHxTxS, value)
  return jax.nn.dot_product_attention(query, key, value, implementation=implementation)


def _modulation(count: int, width: int, dtype, name: str, condition_BxD):
  """adaLN-Zero: `count` vectors [B, 1, width] of the condition, zero when initialised."""
  zeros = nn.initializers.zeros
  out_BxND = nn.Dense(count * width, dtype=dtype, kernel_init=zeros, name=name)(nn.silu(condition_BxD))
  return jnp.split(out_BxND[:, None], count, axis=-1)


def _modulate(x, shift, scale):
  return x * (1 + scale) + shift


def _layer_norm(x):
  """LayerNorm without parameters, in float32 or wider."""
  wide = jnp.promote_types(x.dtype, jnp.float32)
  norm = nn.LayerNorm(epsilon=1e-6, use_bias=False, use_scale=False, use_fast_variance=False, dtype=wide)
  return norm(x).astype(x.dtype)


def _dense(features: int, dtype, name: str) -> nn.Dense:
  return nn.Dense(features, dtype=dtype, kernel_init=_xavier, name=name)


_xavier = nn.initializers.xavier_uniform()
_normal = nn.initializers.normal(0.02)


def _check_attributes(m: DiT):
  for name in ("input_size", "channels", "patch_size", "width", "depth", "num_heads", "unroll"):
    checks.at_least(f"model.{name}", getattr(m, name), 1)
  checks.at_least("model.num_classes", m.num_classes, 0, "0 is an unconditional model")
  if not round(m.width * m.mlp_ratio) > 0:
    raise ValueError(f"model.mlp_ratio = {m.mlp_ratio} must be positive: width · mlp_ratio units are hidden")
  for whole, part in (("input_size", "patch_size"), ("width", "num_heads")):
    if getattr(m, whole) % getattr(m, part):
      raise ValueError(
        f"model.{part} = {getattr(m, part)} does not divide model.{whole} = {getattr(m, whole)}: change one of them"
      )
  if m.width % 4:
    raise ValueError(f"model.width = {m.width} must be a multiple of 4, for the sin-cos positions")
  checks.one_of("model.remat", m.remat, REMAT_POLICIES)
  if m.remat != "none" and m.unroll >= m.depth > 1:
    raise ValueError(
      f"model.remat = {m.remat!r} has no effect where the loop over the blocks is fully unrolled: "
      f"model.unroll = {m.unroll} must be below model.depth = {m.depth}"
    )
  checks.one_of("model.attention", m.attention, ATTENTION)
  checks.one_of("model.block", m.block, BLOCKS)
  checks.one_of("model.energy", m.energy, ENERGIES)
  if m.energy != "none" and m.time_input:
    raise ValueError(f"model.energy = {m.energy!r} is a landscape without time: set model.time_input = False")
  checks.one_of("model.dtype", m.dtype, DTYPES)
