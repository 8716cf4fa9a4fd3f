"""Softmax attention in the form that suits the device: a fused kernel on TPUs, cuDNN's on GPUs, else XLA's.

On a mesh each device runs the kernel (`attention_kernel`, or cuDNN's) on its own samples and heads, in a `shard_map`.
In training a kernel has a backward pass of its own and no forward-mode derivative; otherwise its derivatives, of every
kind and order, are those of XLA's form.

The kernel for TPUs needs to know how the arrays are split while the program is traced. Training knows; samplers and
fields do where x is an array (`equilibrium.meshes`). Within a `jax.jit` of your own, on a machine of several TPU chips,
say so with `jax.sharding.use_abstract_mesh(mesh.abstract_mesh)` around the call; otherwise XLA's form is used.
"""

import functools
import logging
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, PartitionSpec

FORMS = ("auto", "xla", "pallas", "pallas_interpret", "cudnn")
KERNELS = ("pallas", "pallas_interpret")
DEVICES = {"pallas": "tpu", "cudnn": "gpu"}  # platforms that a form runs on; the others run anywhere
CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"  # name of JAX's operation for cuDNN's forward pass
OPERAND, RESULT = "attention_operand", "attention_result"  # around the kernel: names for rematerialisation
# Mesh axes that activations are sharded over: along samples, the first one over slices, and within a layer.
SLICES, SPLITS_PARAMETERS, WITHIN_LAYER = "dcn_data", "fsdp", "tensor"
SAMPLES = (SLICES, "data", SPLITS_PARAMETERS)

log = logging.getLogger(__name__)


def attend(
  qkv: jax.Array, num_heads: int, form: str, training: bool = False, prepare: Callable | None = None
) -> jax.Array:
  """Softmax attention of query, key and value of all heads.

  Args:
    qkv: the output of the qkv product: [B, T, 3·H·K], or [B, T, 3, H, K] where a mesh splits the heads.
    num_heads: H.
    form: one of FORMS. Those of kernels fall back to "xla" for shapes that these do not take.
    training: allows a backward pass that has no forward-mode derivative.
    prepare: applied to `qkv` first, such as `query_key.prepare`. The backward pass computes it again.

  Returns:
    [B, T, H·K], or [B, T, H, K].
  """
  check(form)
  B, T = qkv.shape[:2]
  shape = B, T, 3, num_heads, math.prod(qkv.shape[2:]) // (3 * num_heads)
  form = resolve(jax.ShapeDtypeStruct(shape, qkv.dtype), form)
  if form in KERNELS:
    qkv = checkpoint_name(qkv, OPERAND)
  if prepare:
    qkv = jax.checkpoint(prepare, prevent_cse=False)(qkv)
  if form in KERNELS:
    return checkpoint_name((_fused if training else _differentiable)(form, num_heads, qkv), RESULT)
  return (_values if training or form == "xla" else _differentiable)(form, num_heads, qkv)


def check(form: str):
  """Refuses a kernel where it does not run.

  Raises:
    ValueError: for "pallas" where the program being traced is not for a TPU, and "cudnn" where it is not for a GPU.
  """
  if platform() != DEVICES.get(form, platform()):
    interpreted = ", or 'pallas_interpret' to run the kernel step by step on any device" if form == "pallas" else ""
    raise ValueError(
      f"model.attention = {form!r} is a kernel for {DEVICES[form].upper()}s, but this program is for a {platform()}: "
      f"set model.attention = 'auto'{interpreted}"
    )


def resolve(qkv, form: str) -> str:
  """The form that is used, where this is traced, for the shape [B, T, 3, H, K] and type of `qkv`."""
  automatic = form == "auto"
  if automatic:
    kernels = {device: kernel for kernel, device in DEVICES.items()} if qkv.dtype == jnp.bfloat16 else {}
    form = kernels.get(platform(), "xla")
  if form == "xla":
    return form
  reason = _unfit_cudnn(qkv) if form == "cudnn" else _unfit(qkv, form, automatic)
  if reason:
    _log_once(f"attention: {'cuDNN' if form == 'cudnn' else 'the kernel'} does not take {reason}; XLA's form is used")
  return "xla" if reason else form


def platform() -> str:
  """The platform that the program being traced is for: that of the context's mesh, else the process's own."""
  device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None) or jax.config.jax_default_device
  return device if isinstance(device, str) else getattr(device, "platform", jax.default_backend())


def _unfit_mesh(B: int, H: int) -> str:
  """What of B samples and H heads each device cannot take its part of; "" if it can."""
  mesh, sizes = jax.sharding.get_abstract_mesh(), _split_axes()
  if AxisType.Explicit in mesh.axis_types or set(sizes) - {*SAMPLES, WITHIN_LAYER}:
    return f"a mesh of axes {mesh.axis_names} with types {mesh.axis_types}"
  samples, heads = math.prod(sizes.get(axis, 1) for axis in SAMPLES), sizes.get(WITHIN_LAYER, 1)
  return f"{B} samples of {H} heads on {samples} by {heads} devices" if B % samples or H % heads else ""


def _unfit(qkv, form: str, automatic: bool) -> str:
  """What the kernel for TPUs does not take about an array; "" if it takes it."""
  from eqm_jax.networks import attention_kernel

  B, T, _, H, K = qkv.shape
  if automatic and jax.sharding.get_abstract_mesh().empty and jax.device_count() > 1:
    return "arrays on devices that are not known while it is traced (in the context of a mesh they are)"
  if reason := _unfit_mesh(B, H):
    return reason
  heads = _split_axes().get(WITHIN_LAYER, 1)
  if qkv.dtype not in (jnp.bfloat16, jnp.float32) or attention_kernel.unfit(T, K):
    return f"{T} tokens with heads of width {K} in {qkv.dtype}"
  needed = attention_kernel.vector_memory(T, H // heads * K, qkv.dtype.itemsize)
  if form != "pallas_interpret" and needed > attention_kernel.available():
    return f"{T} tokens of width {H // heads * K}, which need {needed / 2**20:.0f} MiB of the chip's vector memory"
  return ""


@functools.cache
def _log_once(message: str):
  log.info("%s", message)


def _unfit_cudnn(qkv) -> str:
  """What cuDNN's attention does not take about an array on these devices; "" if it takes it."""
  _, T, _, H, K = qkv.shape
  try:
    jax.eval_shape(functools.partial(_of_jax, "cudnn", H), qkv)
  except (RuntimeError, NotImplementedError, ValueError) as error:  # it is not there, or refuses the shape
    return f"{T} tokens with heads of width {K} in {qkv.dtype} ({' '.join(str(error).split())})"
  gpus = [device for device in jax.local_devices() if device.platform == "gpu"]
  old = [device.device_kind for device in gpus if float(device.compute_capability) < 8]
  return f"GPUs before Ampere, such as {old[0]}" if old else ""


def _values(form: str, num_heads: int, qkv: jax.Array) -> jax.Array:
  """Attention in one form, with the derivatives of that form."""
  if form in KERNELS:
    return _fused(form, num_heads, qkv)
  of_jax = functools.partial(_of_jax, form)
  on_each_device = form == "cudnn" and not _unfit_mesh(len(qkv), num_heads)  # in other meshes JAX splits it
  return _on_each_device(of_jax, num_heads, qkv) if on_each_device else of_jax(num_heads, qkv)


def _of_jax(form: str, num_heads: int, qkv: jax.Array) -> jax.Array:
  B, T = qkv.shape[:2]
  query, key, value = jnp.moveaxis(qkv.reshape(B, T, 3, num_heads, -1), 2, 0)
  if query.dtype == jnp.float64:  # jax.nn rounds the softmax to float32, too coarse for a float64 check
    weights_BxHxTxS = jax.nn.softmax(jnp.einsum("BTHK,BSHK->BHTS", query, key) / query.shape[-1] ** 0.5)
    mixed_BxTxHxK = jnp.einsum("BHTS,BSHK->BTHK", weights_BxHxTxS, value)
  else:
    mixed_BxTxHxK = jax.nn.dot_product_attention(query, key, value, implementation=form)
  return mixed_BxTxHxK.reshape(_result_shape(qkv))


def _result_shape(qkv) -> tuple[int, ...]:
  return (*qkv.shape[:2], qkv.shape[2] // 3) if qkv.ndim == 3 else (*qkv.shape[:2], *qkv.shape[3:])


# ---------------------------------------------------------------- the kernel


def _split_axes() -> dict[str, int]:
  """{axis: size} of the context's mesh, without those of an enclosing shard_map."""
  mesh = jax.sharding.get_abstract_mesh()
  return {axis: size for axis, size in mesh.shape.items() if axis not in mesh.manual_axes}


def _on_each_device(function, num_heads: int, *arrays: jax.Array) -> jax.Array:
  """`function(num_heads, *arrays)`, the qkv product first, on the samples and heads of each device."""
  axes = _split_axes()
  if not axes:
    return function(num_heads, *arrays)
  samples = tuple(axis for axis in SAMPLES if axis in axes)
  heads = WITHIN_LAYER if WITHIN_LAYER in axes and arrays[0].ndim == 5 else None
  local = num_heads // (axes[heads] if heads else 1)
  specs = [PartitionSpec(samples)] * 2
  if heads:
    specs = [PartitionSpec(samples, None, None, heads), PartitionSpec(samples, None, heads)]
  mapped = jax.shard_map(
    functools.partial(function, local),
    in_specs=tuple(specs[: len(arrays)]),
    out_specs=specs[0 if len(arrays) == 2 else 1],
    axis_names=set(axes),
    check_vma=False,
  )
  return mapped(*arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fused(form: str, num_heads: int, qkv: jax.Array) -> jax.Array:
  from eqm_jax.networks import attention_kernel

  def run(num_heads, qkv):
    flat = qkv.reshape(*qkv.shape[:2], -1)
    return attention_kernel.forward(flat, num_heads, form == "pallas_interpret").reshape(_result_shape(qkv))

  return _on_each_device(run, num_heads, qkv)


def _fused_forward(form, num_heads, qkv):
  return _fused(form, num_heads, qkv), qkv


def _fused_backward(form, num_heads, qkv, g):
  from eqm_jax.networks import attention_kernel

  def run(num_heads, qkv, g):
    flat = (array.reshape(*array.shape[:2], -1) for array in (qkv, g))
    return attention_kernel.backward(*flat, num_heads, form == "pallas_interpret").reshape(qkv.shape)

  return (_on_each_device(run, num_heads, qkv, g),)


_fused.defvjp(_fused_forward, _fused_backward)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _differentiable(form: str, num_heads: int, qkv: jax.Array) -> jax.Array:
  """A kernel's values with the derivatives of XLA's form."""
  return _values(form, num_heads, qkv)


@_differentiable.defjvp
def _derivative(form, num_heads, primals, tangents):
  by_xla = functools.partial(_of_jax, "xla", num_heads)
  return _differentiable(form, num_heads, *primals), jax.jvp(by_xla, primals, tangents)[1]
