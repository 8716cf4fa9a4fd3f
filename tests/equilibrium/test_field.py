import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqm_jax.equilibrium import field, ode, sampler, streaming
from eqm_jax.networks.dit import DiT


class Tagger(nn.Module):
  """Returns x plus the label, so that a test sees which label was used."""

  num_classes: int = 3
  input_shape: tuple[int, ...] = (2, 2, 4)

  def __call__(self, x, label):
    return x + label[:, None, None, None]


X = jnp.zeros((2, 2, 2, 4))
LABELS = jnp.asarray([0, 2])  # the null class gives 3


@pytest.mark.parametrize("channels, guided", [(None, [1, 1, 1, 1]), (3, [1, 1, 1, 0]), ((1, 3), [0, 1, 0, 1])])
def test_guidance_moves_the_chosen_channels_away_from_the_null_output(channels, guided):
  f = field.field(Tagger(), {}, LABELS, guidance=1.5, guidance_channels=channels)(X)
  for label, output in zip(LABELS, f):
    expected = np.where(guided, 3 + 1.5 * (label - 3), label)
    np.testing.assert_allclose(output, np.broadcast_to(expected, (2, 2, 4)))


def test_guidance_scale_may_differ_between_samples():
  f = field.field(Tagger(), {}, LABELS, guidance=jnp.asarray([1.0, 0.0]))(X)
  np.testing.assert_allclose(f[:, 0, 0, 0], [0, 3])  # conditional, null


def test_guided_by_another_field_agrees_with_the_doubled_batch():
  conditional, null = (field.field(Tagger(), {}, labels) for labels in (LABELS, jnp.asarray([3, 3])))
  expected = field.field(Tagger(), {}, LABELS, guidance=2.5, guidance_channels=3)(X)
  np.testing.assert_allclose(field.guided(conditional, null, 2.5, 3)(X), expected)
  np.testing.assert_allclose(field.guided(conditional, lambda x: null(x), 2.5, 3)(X), expected)


def test_guidance_acts_only_while_the_gradient_lies_in_the_interval():
  x = jnp.stack([jnp.full((2, 2, 4), value) for value in (1.0, 5.0, 20.0)])  # norms of 4, 20, 80
  labels = jnp.zeros(3, jnp.int32)
  f = field.field(Tagger(), {}, labels, guidance=2.0, guidance_interval=(10.0, 50.0))(x)
  np.testing.assert_allclose(f[:, 0, 0, 0], [1.0, 5.0 - 3.0, 20.0])  # f_null = x + 3: guided is x − 3


def test_several_conditions_with_weights():
  labels = jnp.asarray([[0, 1], [2, 1]])
  f = field.field(Tagger(), {}, labels, guidance=jnp.asarray([1.5, -0.5]))(X)
  expected = [3 + 1.5 * (a - 3) - 0.5 * (b - 3) for a, b in ((0, 1), (2, 1))]
  np.testing.assert_allclose(f[:, 0, 0, 0], expected)
  each = field.field(Tagger(), {}, labels, guidance=jnp.asarray([[1.0, 0.0], [0.0, 1.0]]))(X)
  np.testing.assert_allclose(each[:, 0, 0, 0], [0, 1])
  # Where no channel is guided, the mean of the conditions.
  some = field.field(Tagger(), {}, labels, guidance=jnp.asarray([1.5, -0.5]), guidance_channels=1)(X)
  np.testing.assert_allclose(some[:, 0, 0, 1], [0.5, 1.5])


def test_a_field_without_labels_takes_them_with_the_call():
  free = field.field(Tagger(), {}, guidance=2.0, guidance_channels=2)
  np.testing.assert_array_equal(
    free(X, LABELS), field.field(Tagger(), {}, LABELS, guidance=2.0, guidance_channels=2)(X)
  )


def test_guidance_one_costs_no_second_half():
  model = DiT(input_size=8, channels=1, patch_size=2, width=16, depth=1, num_heads=2, num_classes=3)
  params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), jnp.zeros(1, jnp.int32))["params"]

  def flops(guidance):
    field_fn = field.field(model, params, LABELS, guidance=guidance)
    return jax.jit(lambda f, x: f(x)).lower(field_fn, jnp.zeros((2, 8, 8, 1))).compile().cost_analysis()["flops"]

  assert 1.8 < flops(1.5) / flops(1.0) < 2.1


def test_arrays_of_numpy_are_samples_too():
  f = field.field(Tagger(), {}, np.asarray(LABELS))(np.asarray(X))
  np.testing.assert_array_equal(f[:, 0, 0, 0], LABELS)


def test_samplers_bind_labels_and_refuse_what_does_not_fit():
  unbound, bound = field.field(Tagger(), {}), field.field(Tagger(), {}, LABELS)
  options = dict(step_size=0.1, max_nfe=2)
  np.testing.assert_array_equal(
    sampler.descend(unbound, X, LABELS, **options).x, sampler.descend(bound, X, **options).x
  )
  plain = sampler.descend(lambda x, labels: x + labels[:, None, None, None], X, LABELS, **options)
  np.testing.assert_allclose(plain.x, sampler.descend(bound, X, **options).x)
  integrated = ode.integrate(bound, X, solver="heun", rtol=0.1, atol=0.1)
  np.testing.assert_array_equal(integrated.x, ode.integrate(unbound, X, LABELS, solver="heun", rtol=0.1, atol=0.1).x)
  assert np.all(np.isnan(integrated.norm)) and integrated.restarts.tolist() == [0, 0]
  with pytest.raises(ValueError, match="takes labels with each call.*field.bind"):
    sampler.descend(unbound, X, **options)
  with pytest.raises(ValueError, match=r"bound to labels \(2,\): leave them out"):
    sampler.descend(bound, X, LABELS, **options)
  with pytest.raises(ValueError, match=r"0\.\.4.*0\.\.2"):
    sampler.descend(unbound, X, jnp.asarray([0, 4]), **options)
  with pytest.raises(ValueError, match="has its labels bound"):
    streaming.descend_stream(bound, LABELS, jax.random.key(0), shape=(2, 2, 4), slots=1, **options)


@pytest.mark.parametrize(
  "arguments, text",
  [
    (dict(labels=jnp.asarray([0, 4])), r"0\.\.4.*0\.\.2"),
    (dict(labels=jnp.asarray([-1, 0])), r"-1\.\.0"),
    (dict(labels=jnp.asarray([0.0, 1.0])), "float32"),
    (dict(labels=LABELS, guidance=2.0, guidance_channels=5), "4 channels"),
    (dict(labels=LABELS, guidance=jnp.ones(3)), r"\(3,\)"),
    (dict(labels=LABELS[:, None]), "several conditions"),
    (dict(labels=LABELS, guidance=2.0, guidance_interval=(3.0, 1.0)), r"guidance_interval = \(3.0, 1.0\)"),
  ],
)
def test_bad_input_is_refused(arguments, text):
  with pytest.raises(ValueError, match=text):
    field.field(Tagger(), {}, **arguments)
