"""The attention kernel, run step by step on the CPU, against XLA's form; and how a form is chosen."""

import functools
import json
import logging
import textwrap
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import run_python
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from eqm_jax.networks import attention
from eqm_jax.networks.dit import REMAT_POLICIES, DiT

LABELS = jnp.asarray([0, 3])
TPU, GPU = AbstractDevice("TPU v6 lite", 1, "tpu"), AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
INTERPRET = "pallas_interpret"
PREPARED = dict(qk_norm=True, rope=True)  # queries and keys are, before attention


def arrays(B: int, T: int, H: int, K: int, dtype: str = "float32"):
  """A qkv product, and directions of it and of the result."""
  keys = jax.random.split(jax.random.key(T + K), 3)
  shapes = (B, T, 3, H, K), (B, T, 3, H, K), (B, T, H, K)
  return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes)]


def compare(found, expected, tolerance) -> list[float]:
  """The largest difference of each array, over its largest number."""
  differences = []
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert a.dtype == b.dtype and a.shape == b.shape
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())
    differences.append(np.abs(a - b).max() / np.abs(b).max())
  return differences


@functools.partial(jax.jit, static_argnums=0)
def values_and_gradients(form, qkv, g):
  mixed, pull_back = jax.vjp(lambda qkv: attention.attend(qkv, qkv.shape[3], form, training=True), qkv)
  return mixed, pull_back(g)[0]


@pytest.mark.parametrize(
  "B, T, H, K, dtype",
  [
    (2, 16, 2, 8, "float32"),
    (1, 9, 3, 5, "float32"),  # no side is a multiple of anything
    (2, 1, 1, 4, "float32"),
    (1, 288, 2, 8, "float32"),  # 96 queries at a time
    (2, 16, 2, 72, "bfloat16"),
    (2, 20, 3, 64, "bfloat16"),
    pytest.param(1, 250, 2, 20, "float32", marks=pytest.mark.slow),
    pytest.param(2, 256, 12, 64, "float32", marks=pytest.mark.slow),  # B/2
    pytest.param(2, 256, 12, 64, "bfloat16", marks=pytest.mark.slow),
    pytest.param(2, 256, 16, 72, "float32", marks=pytest.mark.slow),  # XL/2
    pytest.param(2, 256, 16, 72, "bfloat16", marks=pytest.mark.slow),
    pytest.param(1, 1024, 4, 64, "float32", marks=pytest.mark.slow),  # some heads at 512×512
    pytest.param(1, 1024, 4, 72, "bfloat16", marks=pytest.mark.slow),
  ],
)
def test_values_and_gradients_are_those_of_xla(B, T, H, K, dtype):
  qkv, _, g = arrays(B, T, H, K, dtype)
  found, expected = (values_and_gradients(form, qkv, g) for form in (INTERPRET, "xla"))
  values, gradients = compare(found, expected, 3e-6 if dtype == "float32" else 1e-2)
  print(f"\n| {B} | {T} | {H} × {K} | {dtype} | {values:.1e} | {gradients:.1e} |")


def test_bfloat16_is_as_near_to_the_exact_result_as_xla():
  qkv, _, g = arrays(2, 16, 2, 72, "bfloat16")
  exact = values_and_gradients("xla", qkv.astype(jnp.float32), g.astype(jnp.float32))
  errors = [
    [float(jnp.abs(a - b).mean()) for a, b in zip(values_and_gradients(form, qkv, g), exact)]
    for form in (INTERPRET, "xla")
  ]
  assert np.all(np.asarray(errors[0]) < 1.2 * np.asarray(errors[1]))


def test_large_logits_do_not_overflow():
  qkv, _, g = arrays(1, 16, 1, 8)
  found, expected = (values_and_gradients(form, 100 * qkv, g) for form in (INTERPRET, "xla"))
  compare(found, expected, 1e-2)  # softmax is nearly one-hot: gradients are differences of large numbers


def test_outside_training_every_derivative_is_that_of_xla():
  qkv, along, g = arrays(1, 4, 2, 4)

  @functools.partial(jax.jit, static_argnums=0)
  def derivatives(form):
    function = functools.partial(attention.attend, num_heads=2, form=form)
    gradient = jax.grad(lambda qkv: jnp.vdot(function(qkv), g))
    twice = jax.grad(lambda qkv: jnp.vdot(gradient(qkv), along))
    return jax.jvp(function, (qkv,), (along,)), jax.jvp(gradient, (qkv,), (along,)), twice(qkv)

  compare(*map(derivatives, (INTERPRET, "xla")), 1e-5)
  with pytest.raises(TypeError, match="forward-mode"):
    jax.jvp(lambda qkv: attention.attend(qkv, 2, INTERPRET, training=True), (qkv,), (along,))


@pytest.mark.parametrize("training", [True, False])
def test_vmap_is_a_loop(training):
  qkv, _, g = arrays(6, 8, 2, 4)

  def gradient(qkv, g):
    return jax.grad(lambda qkv: jnp.vdot(attention.attend(qkv, 2, INTERPRET, training), g))(qkv)

  split = [x.reshape(3, 2, *x.shape[1:]) for x in (qkv, g)]
  compare(jax.jit(jax.vmap(gradient))(*split).reshape(qkv.shape), jax.jit(gradient)(qkv, g), 1e-6)


PROGRAM = """
  import json
  import jax, jax.numpy as jnp
  from jax.sharding import AxisType, NamedSharding, PartitionSpec
  import eqm_jax
  from eqm_jax.equilibrium import meshes
  from eqm_jax.networks import attention

  mesh = jax.make_mesh((2, 2, 1, 2), ("dcn_data", "data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 4)
  samples = ("dcn_data", "data", "fsdp")
  qkv = jax.random.normal(jax.random.key(0), (8, 16, 3, 4, 8))
  g = jax.random.normal(jax.random.key(1), (8, 16, 4, 8))
  placed = [
    jax.device_put(x, NamedSharding(mesh, PartitionSpec(samples, *(None,) * (x.ndim - 3), "tensor"))) for x in (qkv, g)
  ]

  def run(form, on_mesh, qkv, g):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh if on_mesh else jax.sharding.get_abstract_mesh()):
      mixed, pull_back = jax.vjp(lambda qkv: attention.attend(qkv, qkv.shape[3], form, training=True), qkv)
      return mixed, pull_back(g)[0]

  compiled = jax.jit(run, static_argnums=(0, 1)).lower("pallas_interpret", True, *placed).compile()
  found, expected = compiled(*placed), run("xla", False, qkv, g)
  manual = jax.shard_map(
    lambda qkv: attention.attend(qkv, 4, "pallas_interpret"),
    mesh=mesh, in_specs=PartitionSpec(mesh.axis_names), out_specs=PartitionSpec(mesh.axis_names), check_vma=False,
  )
  few = jax.jit(run, static_argnums=(0, 1))("pallas_interpret", True, qkv[:3], g[:3])
  pairs = [*zip(found, expected), (manual(qkv), expected[0]), (few[0], expected[0][:3])]

  meshes.KERNEL_PLATFORMS, seen = ("cpu",), []

  @jax.tree_util.Partial
  def field(weights, x):
    seen.append(dict(jax.sharding.get_abstract_mesh().shape))
    return weights * x

  on_mesh = NamedSharding(jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)), PartitionSpec("data"))
  weights, x = jax.device_put(jnp.ones(8), jax.devices()[1]), jnp.ones((8, 2))
  for bound, x0 in ((1.0, x), (1.0, jax.device_put(x, on_mesh)), (weights[0], x)):
    eqm_jax.descend(jax.tree_util.Partial(field, bound), x0, step_size=0.1, max_nfe=2)
  jax.jit(lambda x: eqm_jax.descend(jax.tree_util.Partial(field, 1.0), x, step_size=0.1, max_nfe=2))(x)

  kinds = ("all-gather", "all-reduce", "all-to-all", "collective-permute")
  print(json.dumps({
    "errors": [float(jnp.abs(a - b).max()) for a, b in pairs],
    "shards": [x.sharding.shard_shape(x.shape) for x in found],
    "collectives": [kind for kind in kinds if kind in compiled.as_text()],
    "seen": seen,
  }))
"""


def test_on_a_mesh_each_device_attends_over_its_samples_and_heads():
  output = json.loads(run_python("-c", textwrap.dedent(PROGRAM), devices=8).stdout)
  assert max(output["errors"]) < 1e-5  # also in a shard_map, and of three samples that no mesh divides
  assert output["shards"] == [[2, 16, 2, 8], [2, 16, 3, 2, 8]] and output["collectives"] == []
  # Where x is an array, a descent knows its devices; it does not where weights lie elsewhere, nor within a jit.
  assert output["seen"] == [{"data": 1}, {"data": 8}, {}, {}]


def kernels(jaxpr) -> list[str]:
  """The names of the kernels in a program, those inside its loops included."""
  found = []
  for equation in jaxpr.eqns:
    if equation.primitive.name == "pallas_call":
      found.append(equation.params["name"])
      continue
    for value in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr")):
      inner = getattr(value, "jaxpr", value)
      found += kernels(inner) if hasattr(inner, "eqns") else []
  return found


@pytest.mark.parametrize(
  "remat, options",
  [
    *((remat, {}) for remat in REMAT_POLICIES),
    ("full", PREPARED),
    *(pytest.param(remat, PREPARED, marks=pytest.mark.slow) for remat in REMAT_POLICIES if remat != "full"),
  ],
)
def test_under_rematerialisation_there_is_one_kernel_forward_and_one_backward(remat, options):
  sizes = dict(patch_size=2, width=16, depth=2, num_heads=2, num_classes=5)
  model = DiT(8, 3, **sizes, **options, block="xla", attention="xla")
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 8, 8, 3)).astype(np.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), x, LABELS)["params"]
  params = jax.tree.map(lambda leaf: 0.3 * rng.normal(size=leaf.shape).astype(np.float32), shapes)

  def gradient(model):
    return jax.grad(lambda params: jnp.sum(model.apply({"params": params}, x, LABELS, training=True) ** 2))

  fused = gradient(model.clone(attention=INTERPRET, remat=remat))
  assert kernels(jax.make_jaxpr(fused)(params).jaxpr) == ["forward_kernel", "backward_kernel"]
  if remat == "dots_no_batch":
    compare(jax.jit(fused)(params), jax.jit(gradient(model))(params), 1e-4)


def chosen(
  form: str, shape=(8, 256, 3, 16, 72), dtype="bfloat16", device=TPU, sizes=(2, 2, 1), kind=AxisType.Auto
) -> str:
  axes = ("dcn_data", "data", "fsdp", "tensor")[-len(sizes) :]
  mesh = AbstractMesh(sizes, axes, axis_types=(kind,) * len(axes), abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh):
    return attention.resolve(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)), form)


@pytest.mark.parametrize(
  "expected, changes",
  [
    ("pallas", dict()),
    ("pallas", dict(shape=(8, 1024, 3, 16, 72))),
    ("pallas", dict(shape=(8, 81, 3, 12, 64))),
    ("pallas", dict(sizes=(1, 2, 4))),
    ("pallas", dict(sizes=(2, 2, 2, 1))),
    ("xla", dict(dtype="float32")),
    ("xla", dict(shape=(8, 256, 3, 2, 512))),  # a head too wide
    ("xla", dict(shape=(8, 1009, 3, 16, 72))),  # a prime number of tokens
    ("xla", dict(shape=(8, 16384, 3, 16, 72))),  # more than the vector memory holds
    ("xla", dict(shape=(6, 256, 3, 16, 72))),  # samples that the devices do not divide
    ("xla", dict(shape=(4, 256, 3, 16, 72), sizes=(2, 2, 2, 1))),  # nor those of two slices
    ("xla", dict(sizes=(1, 1, 5))),  # heads likewise
    ("xla", dict(kind=AxisType.Explicit)),
    ("xla", dict(device=None)),  # a CPU
    ("xla", dict(device=GPU)),  # without cuDNN
  ],
)
def test_auto_chooses_by_device_type_and_shape(expected, changes):
  assert chosen("auto", **changes) == expected
  assert chosen("xla", **changes) == "xla"


@pytest.mark.parametrize(
  "expected, changes",
  [
    ("cudnn", dict()),
    ("cudnn", dict(sizes=(2, 2, 1, 2))),
    ("xla", dict(dtype="float32")),
    ("xla", dict(shape=(8, 256, 3, 16, 60))),  # no multiple of 8
    ("xla", dict(shape=(8, 256, 3, 2, 512))),  # a head too wide
    ("cudnn", dict(shape=(6, 256, 3, 16, 72))),  # the devices do not divide the samples: JAX splits the kernel
    ("cudnn", dict(kind=AxisType.Explicit)),
  ],
)
def test_auto_takes_cudnn_where_it_runs(monkeypatch, expected, changes):
  monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
  assert chosen("auto", device=GPU, **changes) == expected


def test_gpus_before_ampere_have_no_kernel(monkeypatch):
  monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
  old = types.SimpleNamespace(platform="gpu", compute_capability="7.5", device_kind="Tesla T4")
  monkeypatch.setattr(jax, "local_devices", lambda: [old])
  assert chosen("auto", device=GPU) == "xla"


def test_what_the_kernel_does_not_take_is_said_once(caplog):
  caplog.set_level(logging.INFO)
  for _ in range(2):
    assert chosen("pallas", shape=(8, 257, 3, 16, 40)) == "xla"
  assert [record.message for record in caplog.records if "257" in record.message] == [
    "attention: the kernel does not take 257 tokens with heads of width 40 in bfloat16; XLA's form is used"
  ]
  for _ in range(2):
    assert chosen("auto", shape=(8, 258, 3, 16, 40), device=GPU) == "xla"
  assert [record.message for record in caplog.records if "258" in record.message] == [
    "attention: cuDNN does not take 258 tokens with heads of width 40 in bfloat16 (cuDNN is not detected.); XLA's form "
    "is used"
  ]
  for tokens, expected in ((256, ["forward_kernel"]), (257, [])):
    shape = jax.ShapeDtypeStruct((2, tokens, 3, 1, 8), jnp.float32)
    program = jax.make_jaxpr(lambda qkv: attention.attend(qkv, 1, INTERPRET, training=True))(shape)
    assert kernels(program.jaxpr) == expected


def test_devices_that_are_not_known_are_left_to_xla(monkeypatch):
  """A program that the compiler splits cannot have the kernel, and one on one chip of many looks the same."""
  monkeypatch.setattr(attention, "platform", lambda: "tpu")
  monkeypatch.setattr(jax, "device_count", lambda: 4)
  assert attention.resolve(jax.ShapeDtypeStruct((2, 16, 3, 2, 8), jnp.bfloat16), "auto") == "xla"


@pytest.mark.parametrize(
  "form, text",
  [
    ("pallas", r"'pallas' is a kernel for TPUs, but this program is for a cpu: set .* = 'auto', or 'pallas_interpret'"),
    ("cudnn", r"'cudnn' is a kernel for GPUs, but this program is for a cpu: set model.attention = 'auto'"),
  ],
)
def test_kernels_for_accelerators_are_refused_on_a_cpu(form, text):
  model = DiT(8, 3, patch_size=2, width=16, depth=1, num_heads=2, num_classes=5, attention=form)
  x = jnp.zeros((2, 8, 8, 3))
  params = jax.eval_shape(model.init, jax.random.key(0), x, LABELS)["params"]
  with pytest.raises(ValueError, match=text):
    jax.eval_shape(lambda params: model.apply({"params": params}, x, LABELS), params)
