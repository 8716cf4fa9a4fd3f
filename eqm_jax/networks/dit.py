"""DiT, the transformer of Equilibrium Matching, with adaLN-Zero (Peebles & Xie 2023).

    x [B, H, W, C], label [B] → f [B, H, W, C]

The blocks' parameters are stacked on a leading depth axis and the blocks run in one scan, so compile time does not grow
with depth. Without `time_input` the time embedding is that of time 0, one learned vector, as in the released code.
"""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from eqm_jax import checks
from eqm_jax.networks import attention, cpu_blocks, query_key
from eqm_jax.networks.attention import SAMPLES, SLICES, SPLITS_PARAMETERS, WITHIN_LAYER
from eqm_jax.trees import path_name

# depth, width, num_heads of the published sizes; the patch size follows the slash in a name: "XL/2".
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}


def _kernel_policy(*names: str):
  """A policy that keeps these values of the attention kernel, and the result and statistics of cuDNN's."""
  named = jax.checkpoint_policies.save_only_these_names(*names)
  return jax.checkpoint_policies.save_from_both_policies(
    named, lambda primitive, *_, **__: primitive.name == attention.CUDNN_FORWARD
  )


def _with_kernel(policy):
  """A policy that keeps what goes into the attention kernel and what comes out, too."""
  return jax.checkpoint_policies.save_from_both_policies(policy, _kernel_policy(attention.OPERAND, attention.RESULT))


# Intermediate values of a block that are kept for the backward pass; the others are computed again.
REMAT_POLICIES = {
  "none": None,  # all are kept: no rematerialisation
  "dots": _with_kernel(jax.checkpoint_policies.checkpoint_dots),
  "dots_no_batch": _with_kernel(jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims),
  "full": _kernel_policy(attention.RESULT),  # and nothing else
}
BLOCKS = ("auto", "xla", "cpu")
ENERGIES = ("none", "dot", "l2", "scalar")
DTYPES = ("float32", "bfloat16", "float64")
NORMS = ("layer", "rms")
MLPS = ("gelu", "swiglu")
# Attributes that shape the parameters; of the energies, "scalar" does.
SHAPING = "channels patch_size width depth num_heads num_classes mlp_ratio learn_sigma energy qk_norm mlp".split()
BLOCK_OPTIONS = ("qk_norm", "norm", "mlp", "rope")  # of which the paper's network has none
TIME_FREQUENCIES = 256
MODULATIONS = "modulations"  # name of the operations that compute those of all blocks


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
  attention: str = "auto"  # one of attention.FORMS; "auto" chooses by the device, type and shape
  block: str = "auto"  # form of the blocks: "xla" for TPUs and GPUs, "cpu" for CPUs, "auto" chooses by the backend
  energy: str = "none"  # meaning of the output: "none", the field itself; "dot" or "l2", part of an energy;
  # "scalar", the energy itself, [B], by a head that sums over the tokens in place of the last layer
  qk_norm: bool = False  # RMSNorm of each head's query and key, with a learned scale
  norm: str = "layer"  # of the tokens, without parameters: "layer", or "rms", which subtracts no mean
  mlp: str = "gelu"  # or "swiglu", a gated one of as many parameters
  rope: bool = False  # rotates query and key by row and column, besides the fixed table of positions

  def __post_init__(self):
    _check_attributes(self)
    super().__post_init__()

  @property
  def input_shape(self) -> tuple[int, int, int]:
    """(H, W, C) of one sample."""
    return self.input_size, self.input_size, self.channels

  @property
  def twice_differentiable(self) -> "DiT":
    """The same model with an attention that has second derivatives without computing anything twice: XLA's."""
    return self if self.attention == "xla" else self.clone(attention="xla")

  @property
  def hidden_width(self) -> int:
    """Width of the hidden layer of the blocks' MLP.

    SwiGLU has three matrices in place of two, so its width is 2/3 of `mlp_ratio` · `width`: the nearest multiple of 128
    (the lanes of a TPU) from 1,024 up, of 8 below.
    """
    if self.mlp == "gelu":
      return round(self.width * self.mlp_ratio)
    exact = self.width * self.mlp_ratio * 2 / 3
    multiple = 128 if exact >= 1024 else 8
    return max(1, round(exact / multiple)) * multiple

  @property
  def block_form(self) -> str:
    """Form of the blocks where this is traced: "xla" or "cpu"."""
    if self.block != "auto":
      return self.block
    if self.attention not in ("auto", "xla"):  # the form for CPUs would not run the kernel that is asked for
      return "xla"
    # Only `Block` has sharding constraints for layers that are split over devices; in a shard_map none is split.
    mesh = jax.sharding.get_abstract_mesh()
    split = any(size > 1 for axis, size in mesh.shape.items() if axis not in mesh.manual_axes)
    return "cpu" if attention.platform() == "cpu" and not split else "xla"

  def attention_form(self, batch_size: int) -> str:
    """Form of the attention for a batch of this size where this is traced; `attention` says how it is chosen."""
    tokens, width = (self.input_size // self.patch_size) ** 2, self.width // self.num_heads
    qkv = jax.ShapeDtypeStruct((batch_size, tokens, 3, self.num_heads, width), self.dtype)
    model = self if self.energy == "none" else self.twice_differentiable
    return attention.resolve(qkv, model.attention)

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

    if self.is_initializing():
      tokens_BxTxD = self._initial_blocks(dtype)(tokens_BxTxD, condition_BxD)[0]
    else:
      blocks = self._cpu_blocks if self.block_form == "cpu" else self._blocks
      tokens_BxTxD = blocks(tokens_BxTxD, condition_BxD, training)
    output = self._output(tokens_BxTxD, condition_BxD)
    return (output, tokens_BxTxD) if return_tokens else output

  def _output(self, tokens_BxTxD, condition_BxD):
    """The last layer: f [B, H, W, C], or E [B] with energy "scalar"."""
    # It is narrow, and its output is summed over hundreds of steps: never below float32.
    wide = jnp.promote_types(self.dtype, jnp.float32)
    shift, scale = _modulation(2, self.width, wide, "final_modulation", condition_BxD)
    normed_BxTxD = _modulate(_norm(tokens_BxTxD.astype(wide), self.norm), shift, scale)
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
      **self._block_options,
      training=training,
      unroll=min(self.unroll, self.depth),
      **({} if self.remat == "none" else {"wrap": wrap}),
    )

  def _blocks(self, tokens_BxTxD, condition_BxD, training: bool):
    params, dtype = dict(self.get_variable("params", "blocks")), tokens_BxTxD.dtype
    modulation_LxBxN = _all_modulations(params.pop("modulation"), condition_BxD, dtype)
    block = Block(**self._block_attributes, dtype=dtype, attention=self.attention, training=training, parent=None)

    def one(tokens_BxTxD, layer):
      matrices, modulation_BxN = layer
      own = jax.tree.map(lambda matrix, stack: matrix.reshape(stack.shape[1:]), matrices, params)
      return block.apply({"params": own}, tokens_BxTxD, modulation_BxN=modulation_BxN)

    if self.remat != "none":
      # The loop separates the recomputation, so prevent_cse is not needed.
      one = jax.checkpoint(one, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
    layers = _as_matrices(params, dtype), modulation_LxBxN
    return jax.lax.scan(one, tokens_BxTxD, layers, unroll=min(self.unroll, self.depth))[0]

  def _initial_blocks(self, dtype):
    """All blocks as one module, whose parameters are stacked."""
    options = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "in_axes": nn.broadcast}
    stack = nn.scan(Block, length=self.depth, **options)
    return stack(**self._block_attributes, dtype=dtype, attention="xla", training=False, name="blocks")

  @property
  def _block_attributes(self) -> dict[str, Any]:
    sizes = {"width": self.width, "num_heads": self.num_heads, "hidden_width": self.hidden_width}
    return {**sizes, **self._block_options}

  @property
  def _block_options(self) -> dict[str, Any]:
    return {name: getattr(self, name) for name in BLOCK_OPTIONS}

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
  """One adaLN-Zero transformer block, in the (carry, output) form of a scan.

  Its modulation is computed here where parameters are initialised, and otherwise given.
  """

  width: int
  num_heads: int
  hidden_width: int
  qk_norm: bool
  norm: str
  mlp: str
  rope: bool
  dtype: Any
  attention: str
  training: bool

  @nn.compact
  def __call__(self, tokens_BxTxD, condition_BxD=None, modulation_BxN=None):
    dtype, heads = self.dtype, (self.num_heads, self.width // self.num_heads)
    if modulation_BxN is None:
      modulation = _modulation(6, self.width, dtype, "modulation", condition_BxD)
    else:
      modulation = jnp.split(modulation_BxN[:, None], 6, axis=-1)
    shift_attention, scale_attention, gate_attention, shift_mlp, scale_mlp, gate_mlp = modulation

    h_BxTxD = _modulate(_norm(tokens_BxTxD, self.norm), shift_attention, scale_attention)
    flat = jax.sharding.get_abstract_mesh().shape.get(WITHIN_LAYER, 1) == 1
    qkv = _Dense((self.width,), (3, *heads), dtype, flat, name="qkv")(h_BxTxD)
    if not flat:
      qkv = _constrain(qkv, SAMPLES, None, None, WITHIN_LAYER)
    mixed = attention.attend(qkv, self.num_heads, self.attention, self.training, self._prepare())
    h_BxTxD = _Dense(heads, (self.width,), dtype, flat, name="attention_out")(mixed)
    tokens_BxTxD = _constrain(tokens_BxTxD + gate_attention * h_BxTxD, SAMPLES)

    h_BxTxD = _modulate(_norm(tokens_BxTxD, self.norm), shift_mlp, scale_mlp)
    h_BxTxF = _constrain(self._hidden(h_BxTxD), SAMPLES, None, WITHIN_LAYER)
    tokens_BxTxD = tokens_BxTxD + gate_mlp * _dense(self.width, dtype, name="mlp_out")(h_BxTxF)
    return _constrain(tokens_BxTxD, SAMPLES), None

  def _prepare(self):
    """What is done to queries and keys before attention; None: nothing."""
    scale = _Scale((2, self.width // self.num_heads), name="qk_norm")() if self.qk_norm else None
    if scale is None and not self.rope:
      return None
    return functools.partial(query_key.prepare, self.num_heads, self.rope, scale_2xK=scale)

  def _hidden(self, h_BxTxD):
    """The MLP's hidden layer."""
    h_BxTxF = _dense(self.hidden_width, self.dtype, name="mlp_in")(h_BxTxD)
    if self.mlp == "gelu":
      return nn.gelu(h_BxTxF, approximate=True)
    return nn.silu(_dense(self.hidden_width, self.dtype, name="mlp_gate")(h_BxTxD)) * h_BxTxF


class _Scale(nn.Module):
  """A learned array, of ones when initialised."""

  shape: tuple[int, ...]

  @nn.compact
  def __call__(self):
    return self.param("scale", nn.initializers.ones, self.shape)


class _Dense(nn.Module):
  """A dense layer from or to the axes of heads: [..., ∏inputs] → [..., ∏outputs], or [..., *inputs] → [..., *outputs].

  Flat, heads lie side by side in memory, as the attention kernel takes them; with an axis of their own a mesh can split
  them. The parameters are the same.
  """

  inputs: tuple[int, ...]
  outputs: tuple[int, ...]
  dtype: Any
  flat: bool

  @nn.compact
  def __call__(self, x):
    matrix = math.prod(self.inputs), math.prod(self.outputs)
    kernel = self.param("kernel", lambda key, shape: _xavier(key, matrix).reshape(shape), (*self.inputs, *self.outputs))
    bias = self.param("bias", nn.initializers.zeros, self.outputs)
    kernel, bias = kernel.astype(self.dtype), bias.astype(self.dtype)
    if self.flat:
      return x @ kernel.reshape(matrix) + bias.reshape(-1)
    return jnp.tensordot(x, kernel, len(self.inputs)) + bias


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


def default_attributes() -> dict[str, Any]:
  """The attributes that need not be given, with the values that they then have."""
  fields = attribute_fields()
  return {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}


def attribute_fields() -> list[dataclasses.Field]:
  """The attributes of DiT, without those that linen adds."""
  return [field for field in dataclasses.fields(DiT) if field.name not in ("parent", "name")]


def beyond_the_paper(model: DiT) -> dict[str, Any]:
  """{attribute: value} of what the paper's blocks do not have."""
  defaults = default_attributes()
  return {name: getattr(model, name) for name in BLOCK_OPTIONS if getattr(model, name) != defaults[name]}


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
  A mesh of one slice need not have the axis of slices.
  """
  names = set(jax.sharding.get_abstract_mesh().axis_names)
  if not {*SAMPLES, WITHIN_LAYER} - {SLICES} <= names:
    return x
  present = [
    tuple(name for name in axis if name in names) if isinstance(axis, tuple) else axis if axis in names else None
    for axis in axes
  ]
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*present))


def _modulation(count: int, width: int, dtype, name: str, condition_BxD):
  """adaLN-Zero: `count` vectors [B, 1, width] of the condition, zero when initialised."""
  zeros = nn.initializers.zeros
  out_BxND = nn.Dense(count * width, dtype=dtype, kernel_init=zeros, name=name)(nn.silu(condition_BxD))
  return jnp.split(out_BxND[:, None], count, axis=-1)


@jax.named_scope(MODULATIONS)
def _all_modulations(layer, condition_BxD: jax.Array, dtype) -> jax.Array:
  """adaLN-Zero's vectors of all blocks, [L, B, 6·D].

  Their kernels are a third of the parameters, and their input is one vector a sample. So on a mesh each device computes
  a part of the outputs for all samples of its slice: then the kernels' gradients need no sum over devices but those
  of other slices. Where every device has the kernels whole, their gradients would have to be gathered instead.
  """
  kernel_LxDxN, bias_LxN = (layer[name].astype(dtype) for name in ("kernel", "bias"))
  out_LxBxN = jnp.einsum("BD,LDN->LBN", nn.silu(condition_BxD), kernel_LxDxN) + bias_LxN[:, None]
  sizes = jax.sharding.get_abstract_mesh().shape
  within_slice = tuple(axis for axis in SAMPLES if axis != SLICES)
  divides = kernel_LxDxN.shape[-1] % math.prod(sizes.get(axis, 1) for axis in within_slice) == 0
  if divides and sizes.get(SPLITS_PARAMETERS, 1) > 1:
    out_LxBxN = _constrain(out_LxBxN, None, SLICES, within_slice)
  return _constrain(out_LxBxN, None, SAMPLES)


def _as_matrices(layers, dtype):
  """The blocks' parameters with the axes of heads merged, where they are in the type of the products and not split.

  Such weights were gathered before the loop. A TPU would copy them there, to pad the width of a head to whole tiles.
  """
  kernel_LxDx3xHxK = layers["qkv"]["kernel"]
  if kernel_LxDx3xHxK.dtype != dtype or jax.sharding.get_abstract_mesh().shape.get(WITHIN_LAYER, 1) > 1:
    return layers
  L, D = kernel_LxDx3xHxK.shape[:2]
  shapes = {("qkv", "kernel"): (L, D, -1), ("qkv", "bias"): (L, -1), ("attention_out", "kernel"): (L, -1, D)}
  return {
    name: {part: leaf.reshape(shapes.get((name, part), leaf.shape)) for part, leaf in layer.items()}
    for name, layer in layers.items()
  }


def _modulate(x, shift, scale):
  return x * (1 + scale) + shift


def _norm(x, kind: str):
  """LayerNorm or RMSNorm without parameters, in float32 or wider."""
  wide = jnp.promote_types(x.dtype, jnp.float32)
  if kind == "rms":
    return nn.RMSNorm(epsilon=1e-6, use_scale=False, dtype=wide)(x).astype(x.dtype)
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
  checks.one_of("model.attention", m.attention, attention.FORMS)
  checks.one_of("model.block", m.block, BLOCKS)
  _check_block_options(m)
  checks.one_of("model.energy", m.energy, ENERGIES)
  if m.energy != "none" and m.time_input:
    raise ValueError(f"model.energy = {m.energy!r} is a landscape without time: set model.time_input = False")
  checks.one_of("model.dtype", m.dtype, DTYPES)


def _check_block_options(m: DiT):
  checks.one_of("model.norm", m.norm, NORMS)
  checks.one_of("model.mlp", m.mlp, MLPS)
  head = m.width // m.num_heads
  if m.rope and head % 4:
    raise ValueError(
      f"model.rope = True rotates pairs of numbers, half of them by row and half by column, but the heads' width is "
      f"{head} (model.width / model.num_heads): make it a multiple of 4, or set model.rope = False"
    )
