"""Every public callable under the transformations of JAX, with the result of the plain call."""

import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import run_python
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import eqm_jax
from eqm_jax.equilibrium.noise_level import NoiseReadout

SHAPE = (2, 1, 2)
B = 2
LABELS = jnp.array([0, 2])
KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (B, *SHAPE))


class Network(nn.Module):
  """The smallest network with labels."""

  num_classes: int = 3
  input_shape: tuple[int, ...] = SHAPE
  energy: str = "none"

  @nn.compact
  def __call__(self, x, labels, return_tokens=False):
    mixed = nn.Dense(4)(x.reshape(len(x), -1)) + nn.Embed(4, 4)(labels)
    f = x + jnp.tanh(mixed).reshape(x.shape)
    return (f, mixed.reshape(len(x), 2, 2)) if return_tokens else f


MODEL, ENERGY_MODEL = Network(), Network(energy="dot")
PARAMS = MODEL.init(jax.random.key(2), X, LABELS)["params"]
OPTIONS = dict(step_size=0.1, max_nfe=3)
READOUT = NoiseReadout(jnp.asarray([1.0, -1.0, 0.5, 0.2]), jnp.asarray(0.4))


def make(name: str):
  """A public callable by name, as a function x [B, ...] → array [B, ...]."""
  field = eqm_jax.field(MODEL, PARAMS, LABELS)
  read = eqm_jax.field(MODEL, PARAMS, LABELS, readout=READOUT)
  options = {"threshold": 1.0, "max_restarts": 1, "key": KEY, **OPTIONS}
  return {
    "field": field,
    "guided field": eqm_jax.field(MODEL, PARAMS, LABELS, guidance=2.0, guidance_interval=(0.1, 9.0)),
    "field of an energy": eqm_jax.field(ENERGY_MODEL, PARAMS, LABELS),
    "energy": eqm_jax.energy(ENERGY_MODEL, PARAMS, LABELS),
    "guided": eqm_jax.guided(field, jnp.tanh, 1.5),
    "compose": eqm_jax.compose([field, jnp.tanh], [0.5, jnp.array([1.0, 2.0])]),
    "oracle_field": eqm_jax.oracle_field(X + 1, nodes=8),
    "corrupt": lambda x: eqm_jax.corrupt(x, -x, jnp.array([0.1, 0.7])),
    "magnitude": lambda x: eqm_jax.magnitude(jax.nn.sigmoid(x)),
    "asymmetry": lambda x: eqm_jax.asymmetry(field, x, KEY, probes=2),
    "descend": lambda x: eqm_jax.descend(field, x, rule="nag", momentum=0.3, **options).x,
    "descend by gamma": lambda x: eqm_jax.descend(read, x, stop="gamma", **{**options, "threshold": 0.5}).x,
    "integrate": lambda x: eqm_jax.integrate(field, x, solver="heun", steps=2).x,
    "integrate adaptively": lambda x: eqm_jax.integrate(field, x, solver="heun", rtol=0.1, atol=0.1).x,
  }[name]


NAMES = [
  "field", "guided field", "field of an energy", "energy", "guided", "compose", "oracle_field", "corrupt", "magnitude",
  "asymmetry", "descend", "integrate", "integrate adaptively",
  pytest.param("descend by gamma", marks=pytest.mark.slow),
]  # fmt: skip
LOOPS = ["descend", "integrate", "integrate adaptively", NAMES[-1]]  # while_loops: differentiated forward only
PYTREES = ["field", "guided field", "field of an energy", "energy", "guided", "compose", "oracle_field"]


@functools.cache
def plain(name: str) -> np.ndarray:
  return np.asarray(make(name)(X))


def close(result, expected):
  np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_jit(name):
  close(jax.jit(make(name))(X), plain(name))


@pytest.mark.parametrize("name", NAMES)
def test_vmap(name):
  result = jax.jit(jax.vmap(make(name)))(jnp.stack([X, X]))
  close(result, np.stack([plain(name)] * 2))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in LOOPS])
def test_reverse_differentiation_through_a_checkpoint(name):
  """And forward, which must agree."""
  function, direction = make(name), jnp.cos(X)
  slope = jax.jit(jax.grad(lambda x: jnp.sum(jax.checkpoint(function)(x))))(X)
  _, change = jax.jit(lambda x, v: jax.jvp(function, (x,), (v,)))(X, direction)
  close(jnp.sum(slope * direction), jnp.sum(change))


@pytest.mark.parametrize("name", LOOPS)
def test_loops_are_differentiated_forward_only(name):
  function = make(name)
  jacobian = np.asarray(jax.jit(jax.jacfwd(function))(X))
  assert jacobian.shape == (*X.shape, *X.shape) and np.all(np.isfinite(jacobian)) and np.any(jacobian != 0)
  assert np.all(jacobian[0, ..., 1, :, :, :] == 0)  # a sample does not depend on its neighbours
  with pytest.raises((ValueError, RuntimeError), match="[Rr]everse-mode"):
    jax.grad(lambda x: jnp.sum(function(x)))(X)


@pytest.mark.parametrize("name", ["energy", "oracle_field"])
def test_hessian(name):
  hessian = jax.jit(jax.hessian(lambda x: jnp.sum(make(name)(x))))(X).reshape(X.size, X.size)
  assert np.any(hessian != 0)
  close(hessian, hessian.T)


@pytest.mark.parametrize("name", NAMES)
def test_shard_map(name):
  """A mesh of one device has all the types of a larger one, and its checks."""
  mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
  split = PartitionSpec("data")
  check_vma = "integrate" not in name  # diffrax does not track which values vary over the mesh
  mapped = jax.shard_map(make(name), mesh=mesh, in_specs=split, out_specs=split, check_vma=check_vma)
  close(jax.jit(mapped)(X), plain(name))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("integrate", "guided field")])
def test_meshes(name, kind):
  mesh = jax.make_mesh((1,), ("data",), axis_types=(kind,))
  x = jax.device_put(X, NamedSharding(mesh, PartitionSpec("data")))
  result = make(name)(x)
  close(result, plain(name))
  assert result.sharding.mesh.axis_types == (kind,)


@pytest.mark.parametrize("name", PYTREES)
def test_fields_are_functions_and_pytrees(name):
  function = make(name)
  assert hash(function) == hash(function) and function == function and function != make(name)
  assert len(repr(function)) < 500 and "\n" not in repr(function)
  close(jax.jit(lambda function, x: function(x))(function, X), plain(name))


def test_a_field_as_an_argument_is_compiled_once_for_all_weights():
  apply = jax.jit(lambda field, x: field(x))
  for scale in (1.0, 2.0):
    params = jax.tree.map(lambda leaf: scale * leaf, PARAMS)  # noqa: B023
    apply(eqm_jax.field(MODEL, params, LABELS), X)
  assert apply._cache_size() == 1


def test_a_loss_differentiates_in_the_parameters():
  def loss(params):
    return jnp.sum(eqm_jax.field(MODEL, params, LABELS)(X) ** 2)

  gradient = jax.jit(jax.grad(loss))(PARAMS)
  assert jax.tree.structure(gradient) == jax.tree.structure(PARAMS)
  assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
  "option, values, rest",
  [
    ("step_size", [0.1, 0.2], {}),
    ("threshold", [0.5, 2.0], {}),
    ("momentum", [0.2, 0.5], dict(rule="nag")),
    ("temperature", [0.1, 0.5], dict(rule="langevin", key=KEY)),
    ("multiplier", [1.0, 4.0], dict(threshold=1.0, step_size="auto")),
    ("max_nfe", [2, 3], {}),
  ],
)
def test_vmap_over_the_numbers_of_a_descent(option, values, rest):
  field = eqm_jax.field(MODEL, PARAMS, LABELS)

  def run(value):
    return eqm_jax.descend(field, X, **{**OPTIONS, **rest, option: value})

  results = jax.vmap(run)(jnp.asarray(values))
  for i, value in enumerate(values):
    close(results.x[i], run(value).x)
    np.testing.assert_array_equal(results.nfe[i], run(value).nfe)


def test_a_descent_differentiates_in_its_step_size():
  field = eqm_jax.field(MODEL, PARAMS, LABELS)
  slope = jax.jacfwd(lambda step_size: eqm_jax.descend(field, X, step_size=step_size, max_nfe=1).x)(0.1)
  close(slope, -field(X))


def test_numbers_may_be_arrays_where_all_is_traced():
  field = eqm_jax.field(MODEL, PARAMS, LABELS)
  numbers = dict(step_size=jnp.array(0.1), momentum=jnp.array(0.3), threshold=jnp.array(0.1), max_nfe=jnp.array(3))
  numbers |= dict(multiplier=jnp.array(2.0), min_nfe=jnp.array(1), max_restarts=jnp.array(0))
  descend = functools.partial(eqm_jax.descend, field, rule="nag", **numbers)
  close(jax.jit(lambda x: descend(x).x)(X), descend(X).x)


@pytest.mark.parametrize("rule", ["gd", "lbfgs"])
def test_a_traced_momentum_is_not_ignored(rule):
  with pytest.raises(ValueError, match=f"traced momentum.*rule '{rule}' takes none"):
    jax.vmap(lambda momentum: eqm_jax.descend(jnp.tanh, X, rule=rule, momentum=momentum, **OPTIONS).x)(jnp.ones(2))


def test_a_stream_is_jitted_vmapped_and_differentiated_forward():
  field = eqm_jax.field(MODEL, PARAMS)

  def run(step_size):
    options = dict(shape=SHAPE, slots=1, step_size=step_size, max_nfe=3)
    return eqm_jax.descend_stream(field, LABELS, KEY, **options).x

  expected = run(0.1)
  close(jax.jit(jax.vmap(run))(jnp.array([0.1, 0.1])), np.stack([expected] * 2))
  _, slope = jax.jit(lambda step_size: jax.jvp(run, (step_size,), (1.0,)))(0.1)
  assert np.any(slope != 0)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_stream_on_a_mesh(kind):
  mesh = jax.make_mesh((1,), ("data",), axis_types=(kind,))
  run = functools.partial(eqm_jax.descend_stream, eqm_jax.field(MODEL, PARAMS), shape=SHAPE, slots=1, **OPTIONS)
  labels = jax.device_put(LABELS, NamedSharding(mesh, PartitionSpec("data")))
  expected, result = run(LABELS, KEY), run(labels, KEY, mesh=mesh)
  close(result.x, expected.x)
  assert int(result.executed_nfe) == int(expected.executed_nfe)


def test_noise_is_jitted_and_vmapped():
  index = jnp.arange(4)
  noise = eqm_jax.start_noise(KEY, index, SHAPE)
  close(jax.jit(lambda key, index: eqm_jax.start_noise(key, index, SHAPE))(KEY, index), noise)
  close(jax.vmap(lambda key: eqm_jax.start_noise(key, index, SHAPE))(jnp.stack([KEY, KEY]))[1], noise)


def test_a_schedule_passes_into_jit():
  schedule = eqm_jax.Schedule("piecewise")
  gamma = jnp.linspace(0, 1, 5)
  close(jax.jit(eqm_jax.magnitude)(gamma, schedule), eqm_jax.magnitude(gamma, schedule))


def test_a_result_prints_shapes():
  result = eqm_jax.descend(jnp.tanh, X, record_at=[1], **OPTIONS)
  text = repr(result)
  assert text.startswith("Result(x=float32[2, 2, 1, 2], nfe=int32[2], norm=float32[2], status=int32[2]")
  assert len(text) < 300


# On four pretended devices, against one: where the samples lie, and where the parameters.
PROGRAM = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import eqm_jax
from test_transformations import ENERGY_MODEL, KEY, MODEL, OPTIONS, PARAMS, SHAPE

x = jax.random.normal(jax.random.key(1), (8, *SHAPE))
labels = jnp.arange(8) % 3
devices = jax.devices()
committed = jax.device_put(PARAMS, devices[1])
options = dict(**OPTIONS, threshold=0.5, rule="nag", momentum=0.3, record_at=(1, 2))

def run(field, x):
  return eqm_jax.descend(field, x, **options)

field = eqm_jax.field(MODEL, PARAMS, labels, guidance=1.5)
expected = run(field, x)
stream = dict(shape=SHAPE, slots=4, **OPTIONS)
unbound = eqm_jax.field(MODEL, committed)
drawn = eqm_jax.descend_stream(eqm_jax.field(MODEL, PARAMS), labels, KEY, **stream)
energies = eqm_jax.energy(ENERGY_MODEL, PARAMS, labels)(x)
errors = {}

def compare(name, result, expected):
  pairs = zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True)
  errors[name] = max(float(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max()) for a, b in pairs)

for kind in (AxisType.Auto, AxisType.Explicit):
  for shape, axes in (((4,), ("data",)), ((2, 2), ("data", "model"))):
    mesh = jax.make_mesh(shape, axes, axis_types=(kind,) * len(axes))
    name = f"{kind.name} {axes}"
    placed = jax.device_put(x, NamedSharding(mesh, P("data")))
    split = jax.device_put(labels, NamedSharding(mesh, P("data")))
    replicated = jax.device_put(PARAMS, NamedSharding(mesh, P()))
    moved = eqm_jax.field(MODEL, committed, split, guidance=1.5)
    result = run(moved, placed)
    compare(f"{name}, parameters on one device", result, expected)
    assert result.x.sharding.device_set == set(devices), result.x.sharding
    assert result.x.sharding.mesh.axis_types == (kind,) * len(axes)
    compare(f"{name}, replicated", run(eqm_jax.field(MODEL, replicated, split, guidance=1.5), placed), expected)
    compare(f"{name}, jitted", jax.jit(run)(eqm_jax.field(MODEL, replicated, split, guidance=1.5), placed), expected)
    if len(axes) == 2:
      kernels = jax.tree.map(lambda leaf: P(*[None] * (leaf.ndim - 1), "model"), PARAMS)
      sharded = jax.device_put(PARAMS, jax.tree.map(lambda spec: NamedSharding(mesh, spec), kernels))
      compare(f"{name}, split", run(eqm_jax.field(MODEL, sharded, split, guidance=1.5), placed), expected)
      spread = jax.device_put(x, NamedSharding(mesh, P("data", "model")))
      compare(f"{name}, split images", run(moved, spread), expected)
    compare(f"{name}, field", moved(placed), field(x))
    compare(f"{name}, energy", eqm_jax.energy(ENERGY_MODEL, committed, split)(placed), energies)
    integrated = eqm_jax.integrate(moved, placed, solver="heun", steps=2).x
    compare(f"{name}, integrate", integrated, eqm_jax.integrate(field, x, solver="heun", steps=2).x)
    for name_of, drawn_labels in (("", labels), (", labels split", split)):
      result = eqm_jax.descend_stream(unbound, drawn_labels, KEY, mesh=mesh, **stream)
      compare(f"{name}, stream{name_of}", (result.x, result.nfe, result.status), (drawn.x, drawn.nfe, drawn.status))
    with jax.set_mesh(mesh):
      compare(f"{name}, in the context of the mesh", run(moved, placed), expected)
      result = eqm_jax.descend_stream(unbound, split, KEY, mesh=mesh, **stream)
      compare(f"{name}, stream in the context of the mesh", (result.x, result.nfe), (drawn.x, drawn.nfe))
      gradient = jax.jit(jax.grad(lambda x: jnp.sum(eqm_jax.field(MODEL, replicated, split)(x) ** 2)))(placed)
    plain = eqm_jax.field(MODEL, PARAMS, labels)
    compare(f"{name}, gradient", gradient, jax.grad(lambda x: jnp.sum(plain(x) ** 2))(x))
    local = lambda x, labels: eqm_jax.descend(eqm_jax.field(MODEL, PARAMS), x, labels, **options).x
    mapped = jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    compare(f"{name}, shard_map", mapped(placed, split), local(x, labels))
json.dump(errors, sys.stdout)
"""


@pytest.mark.slow
def test_four_devices_give_what_one_gives():
  errors = json.loads(run_python("-c", PROGRAM, devices=4).stdout)
  assert len(errors) > 30 and max(errors.values()) < 1e-5, errors
