import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from eqm_jax.networks import dit
from eqm_jax.networks.dit import DiT

TINY = dict(input_size=8, channels=3, patch_size=2, width=16, depth=3, num_heads=2, num_classes=5)
X = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
LABELS = jnp.asarray([1, 5])
MODERN = dict(qk_norm=True, norm="rms", mlp="swiglu", rope=True)


@functools.partial(jax.jit, static_argnums=0)
def output(model: DiT, params, *arguments) -> jax.Array:
  return model.apply({"params": params}, *arguments)


# Parameters as the reference counts them: with the fixed position table and the unused second output half.
PUBLISHED = {
  "S/2": 32_963_360, "B/2": 130_512_416, "L/2": 458_102_816,
  "XL/2": 675_129_632, "B/4": 130_475_648, "B/8": 130_881_536,
}  # fmt: skip


def published(name: str, **overrides) -> DiT:
  size, patch = name.split("/")
  depth, width, num_heads = dit.SIZES[size]
  sizes = dict(depth=depth, width=width, num_heads=num_heads, patch_size=int(patch))
  return DiT(**{**sizes, "input_size": 32, "channels": 4, "num_classes": 1000, **overrides})


@functools.cache
def initialised(**overrides):
  model = DiT(**{**TINY, **overrides})
  gamma = (jnp.zeros(2),) if model.time_input else ()

  @jax.jit
  def start():
    params = model.init(jax.random.key(0), X, LABELS, *gamma)["params"]
    # At the start the blocks are the identity and the output is zero: noise makes every parameter count.
    keys = jax.random.split(jax.random.key(1), len(jax.tree.leaves(params)))
    keys = jax.tree.unflatten(jax.tree.structure(params), list(keys))
    return jax.tree.map(lambda p, key: p + 0.05 * jax.random.normal(key, p.shape), params, keys)

  return model, start()


@pytest.mark.parametrize("name, expected", PUBLISHED.items())
def test_parameter_counts_are_the_published_ones(name, expected):
  model = published(name)
  counted = sum(leaf.size for leaf in jax.tree.leaves(dit.parameter_shapes(model)))
  positions = (model.input_size // model.patch_size) ** 2 * model.width
  unused_half = (model.width + 1) * model.patch_size**2 * model.channels
  assert counted + positions + unused_half == expected
  with_half = sum(leaf.size for leaf in jax.tree.leaves(dit.parameter_shapes(published(name, learn_sigma=True))))
  assert with_half + positions == expected


@pytest.mark.parametrize("size", dit.SIZES)
@pytest.mark.parametrize("patch", [2, 4, 8])
def test_every_published_size_has_the_shape_of_its_input(size, patch):
  model = published(f"{size}/{patch}")
  shapes = dit.parameter_shapes(model)
  f = jax.eval_shape(model.apply, {"params": shapes}, jnp.zeros((2, 32, 32, 4)), jnp.zeros(2, jnp.int32))
  assert f.shape == (2, 32, 32, 4) and f.dtype == jnp.float32


def test_a_new_network_returns_zero():
  model = DiT(**TINY)
  params = jax.jit(model.init)(jax.random.key(0), X, LABELS)["params"]
  np.testing.assert_array_equal(output(model, params, X, LABELS), 0)


@pytest.mark.parametrize(
  "overrides, options",
  [
    (dict(remat="full"), {}),
    (dict(remat="dots_no_batch", unroll=2), {}),
    pytest.param(dict(unroll=3), {}, marks=pytest.mark.slow),
    pytest.param(dict(remat="dots"), {}, marks=pytest.mark.slow),
    pytest.param(dict(remat="full"), MODERN, marks=pytest.mark.slow),
    pytest.param(dict(remat="dots_no_batch", unroll=2, block="xla"), MODERN, marks=pytest.mark.slow),
  ],
)
def test_unroll_and_remat_change_no_value_and_no_gradient(overrides, options):
  model, params = initialised(**options)

  def loss(model, params):
    return jnp.sum(model.apply({"params": params}, X, LABELS) ** 2)

  other = model.clone(**overrides)
  for a, b in zip(*(jax.tree.leaves(jax.jit(jax.grad(functools.partial(loss, m)))(params)) for m in (model, other))):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_remat_keeps_less_for_the_backward_pass():
  model, params = initialised()

  def saved_elements(model):
    def backward_of(params):
      return jax.vjp(lambda params: model.apply({"params": params}, X, LABELS), params)[1]

    backward = jax.eval_shape(backward_of, params)
    return sum(leaf.size for leaf in jax.tree.leaves(backward))

  none, dots, full = (saved_elements(model.clone(remat=remat)) for remat in ("none", "dots", "full"))
  assert full < dots < none


def count(model: DiT) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(dit.parameter_shapes(model)))


@pytest.mark.parametrize(
  "name, hidden, difference",
  [("S/2", 1024, 0), ("B/2", 2048, 0), ("L/2", 2688, -0.01), ("XL/2", 3072, 0)],
)
def test_swiglu_has_the_parameters_of_gelu(name, hidden, difference):
  """But for the rounding of its width, and for biases."""
  model = published(name)
  gated = model.clone(mlp="swiglu")
  assert gated.hidden_width == hidden
  np.testing.assert_allclose(count(gated) / count(model) - 1, difference, atol=0.005)


def test_small_widths_are_rounded_to_multiples_of_eight():
  widths = {width: DiT(**{**TINY, "width": width, "mlp": "swiglu"}).hidden_width for width in (4, 16, 128, 380, 384)}
  assert widths == {4: 8, 16: 40, 128: 344, 380: 1016, 384: 1024}


def test_of_the_options_swiglu_and_the_scales_have_parameters():
  model = DiT(**TINY)
  shapes = {name: dit.parameter_shapes(model.clone(**{name: value})) for name, value in MODERN.items()}
  plain = dit.parameter_shapes(model)
  assert shapes["norm"] == shapes["rope"] == plain
  assert shapes["qk_norm"]["blocks"].pop("qk_norm")["scale"].shape == (3, 2, 8)  # depth; query, key; a head's width
  assert shapes["qk_norm"] == plain
  assert set(shapes["mlp"]["blocks"]) == {*plain["blocks"], "mlp_gate"}


def test_every_option_changes_the_answer():
  model, rng = DiT(**{**TINY, **MODERN, "depth": 1}), np.random.default_rng(0)
  params = jax.tree.map(lambda leaf: 0.3 * rng.normal(size=leaf.shape), dit.parameter_shapes(model))
  plain = {name: getattr(DiT(**TINY), name) for name in MODERN}

  @jax.jit
  def outputs(params):
    models = {name: model.clone(**{name: value}) for name, value in plain.items()} | {"all": model}
    return {name: one.apply({"params": params}, X, LABELS) for name, one in models.items()}

  found = outputs(params)
  largest = {name: float(np.abs(f - found["all"]).max()) for name, f in found.items() if name != "all"}
  assert min(largest.values()) > 0.01, largest


def test_label_and_null_class_change_the_answer():
  model, params = initialised()
  outputs = [output(model, params, X[:1], jnp.asarray([label])) for label in (0, 1, 5)]
  assert not np.allclose(outputs[0], outputs[1]) and not np.allclose(outputs[1], outputs[2])


def test_time_is_an_input_only_where_it_is_asked_for():
  model, params = initialised(time_input=True)
  early, late = (output(model, params, X, LABELS, jnp.full(2, gamma)) for gamma in (0.1, 0.9))
  assert not np.allclose(early, late)
  # Time 0 is what a network without time input is fixed to.
  untimed = output(model.clone(time_input=False), params, X, LABELS)
  np.testing.assert_allclose(untimed, output(model, params, X, LABELS, jnp.zeros(2)), rtol=1e-5, atol=1e-6)


def test_bfloat16_products_keep_float32_parameters_and_output():
  model, params = initialised()
  half = model.clone(dtype="bfloat16")
  f = output(half, params, X, LABELS)
  assert f.dtype == jnp.float32
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(dit.parameter_shapes(half)))
  full = output(model, params, X, LABELS)
  assert 0 < np.abs(f - full).max() < 0.05 * np.abs(full).max()
  assert not np.array_equal(f, f.astype(jnp.bfloat16).astype(jnp.float32)), "the output was rounded to bfloat16"


def test_unpatchify_undoes_patchify():
  np.testing.assert_array_equal(dit.unpatchify(dit.patchify(X, 4), 4, 3), X)
  # Tokens go row by row, and inside a token rows come first, channels last.
  assert dit.patchify(X, 4)[0, 1, 3] == X[0, 0, 5, 0]


def test_attributes_rebuild_the_model():
  model = DiT(**TINY, remat="dots")
  assert DiT(**dit.attributes(model)) == model


@pytest.mark.parametrize(
  "overrides, text",
  [
    (dict(patch_size=3), "patch_size = 3 does not divide model.input_size = 8"),
    (dict(num_heads=3), "num_heads = 3 does not divide model.width = 16"),
    (dict(width=18, num_heads=2), "width = 18"),
    (dict(depth=0), "depth = 0"),
    (dict(mlp_ratio=0.0), "mlp_ratio = 0.0"),
    (dict(remat="full", unroll=3), "model.unroll = 3 must be below model.depth = 3"),
    (dict(remat="some"), "'some'.*none, dots"),
    (dict(attention="flash"), "'flash'"),
    (dict(dtype="float16"), "'float16'"),
    (dict(norm="batch"), "model.norm = 'batch' must be one of layer, rms"),
    (dict(mlp="relu"), "model.mlp = 'relu' must be one of gelu, swiglu"),
    (dict(width=24, num_heads=4, rope=True), "the heads' width is 6 .*: make it a multiple of 4, or set model.rope"),
  ],
)
def test_attributes_that_do_not_fit_are_refused(overrides, text):
  with pytest.raises(ValueError, match=text):
    DiT(**{**TINY, **overrides})


@pytest.mark.parametrize(
  "x, label, gamma, text",
  [
    (X[..., :1], LABELS, None, r"\(2, 8, 8, 1\).*8, 8, 3"),
    (X[:, :6, :6], LABELS, None, r"\(2, 6, 6, 3\)"),
    (X, LABELS[:1], None, r"\(1,\).*2 samples"),
    (X, LABELS.astype(jnp.float32), None, "float32"),
    (X, LABELS + 1, None, r"2\.\.6: this model has 0\.\.5"),
    (X, LABELS - 2, None, r"-1\.\.3"),
    (X, LABELS, jnp.zeros(2), "takes no time: leave gamma out .time_input=False"),
  ],
)
def test_arguments_that_do_not_fit_are_refused(x, label, gamma, text):
  model, params = initialised()
  with pytest.raises(ValueError, match=text):
    model.apply({"params": params}, x, label, gamma)


def test_a_timed_network_asks_for_its_time():
  model, params = initialised(time_input=True)
  with pytest.raises(ValueError, match="needs a time"):
    model.apply({"params": params}, X, LABELS)


def constraints(jaxpr) -> set[tuple]:
  """The partition specs that a program asks for, those inside its loops included."""
  found = set()
  for equation in jaxpr.eqns:
    if equation.primitive.name == "sharding_constraint":
      found.add(tuple(equation.params["sharding"].spec))
    for value in equation.params.values():
      if hasattr(value, "jaxpr"):
        found |= constraints(value.jaxpr)
  return found


def test_in_a_mesh_activations_are_spread_over_samples_heads_and_hidden_units():
  model = DiT(input_size=4, channels=1, patch_size=2, width=8, depth=2, num_heads=2, num_classes=3)
  arguments = jnp.zeros((4, 4, 4, 1)), jnp.zeros(4, jnp.int32)
  params = jax.jit(model.init)(jax.random.key(0), *arguments)

  def program(*arguments):  # a new one each time: a trace is kept
    return model.apply(params, *arguments)

  assert constraints(jax.make_jaxpr(program)(*arguments).jaxpr) == set()
  samples = ("dcn_data", "data", "fsdp")
  mesh = AbstractMesh((2, 2, 2, 2), (*samples, "tensor"), axis_types=(AxisType.Auto,) * 4)
  with jax.sharding.use_abstract_mesh(mesh):
    found = constraints(jax.make_jaxpr(lambda *a: program(*a))(*arguments).jaxpr)
  modulations = {(None, "dcn_data", ("data", "fsdp")), (None, samples)}  # by their outputs, then by samples
  assert found == {(samples,), (samples, None, None, "tensor"), (samples, None, "tensor")} | modulations
  one_slice = AbstractMesh((2, 2, 2), (*samples[1:], "tensor"), axis_types=(AxisType.Auto,) * 3)
  with jax.sharding.use_abstract_mesh(one_slice):
    found = constraints(jax.make_jaxpr(lambda *a: program(*a))(*arguments).jaxpr)
  assert (samples[1:], None, "tensor") in found and (None, None, samples[1:]) in found
