import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqm_jax.equilibrium import field
from eqm_jax.networks.dit import DiT


class Tagger(nn.Module):
  """Answers x plus the label, so that a test sees which label was used."""

  num_classes: int = 3
  input_shape: tuple[int, ...] = (2, 2, 4)

  def __call__(self, x, label):
    return x + label[:, None, None, None]


X = jnp.zeros((2, 2, 2, 4))
LABELS = jnp.asarray([0, 2])  # the null class answers 3


@pytest.mark.parametrize("channels, guided", [(None, [1, 1, 1, 1]), (3, [1, 1, 1, 0]), ((1, 3), [0, 1, 0, 1])])
def test_guidance_moves_the_chosen_channels_away_from_the_null_answer(channels, guided):
  f = field.implicit_field(Tagger(), {}, LABELS, guidance=1.5, guidance_channels=channels)(X)
  for label, answer in zip(LABELS, f):
    expected = np.where(guided, 3 + 1.5 * (label - 3), label)
    np.testing.assert_allclose(answer, np.broadcast_to(expected, (2, 2, 4)))


def test_guidance_scale_may_differ_between_samples():
  f = field.implicit_field(Tagger(), {}, LABELS, guidance=jnp.asarray([1.0, 0.0]))(X)
  np.testing.assert_allclose(f[:, 0, 0, 0], [0, 3])  # conditional, null


def test_guided_by_another_field_agrees_with_the_doubled_batch():
  conditional, null = (field.implicit_field(Tagger(), {}, labels) for labels in (LABELS, jnp.asarray([3, 3])))
  expected = field.implicit_field(Tagger(), {}, LABELS, guidance=2.5, guidance_channels=3)(X)
  np.testing.assert_allclose(field.guided(conditional, null, 2.5, 3)(X), expected)
  np.testing.assert_allclose(field.guided(conditional, lambda x: null(x), 2.5, 3)(X), expected)


def test_guidance_acts_only_while_the_gradient_lies_in_the_interval():
  x = jnp.stack([jnp.full((2, 2, 4), value) for value in (1.0, 5.0, 20.0)])  # norms of 4, 20, 80
  labels = jnp.zeros(3, jnp.int32)
  f = field.implicit_field(Tagger(), {}, labels, guidance=2.0, guidance_interval=(10.0, 50.0))(x)
  np.testing.assert_allclose(f[:, 0, 0, 0], [1.0, 5.0 - 3.0, 20.0])  # f_null = x + 3: guided is x − 3


def test_several_conditions_with_weights():
  labels = jnp.asarray([[0, 1], [2, 1]])
  f = field.implicit_field(Tagger(), {}, labels, guidance=jnp.asarray([1.5, -0.5]))(X)
  expected = [3 + 1.5 * (a - 3) - 0.5 * (b - 3) for a, b in ((0, 1), (2, 1))]
  np.testing.assert_allclose(f[:, 0, 0, 0], expected)
  each = field.implicit_field(Tagger(), {}, labels, guidance=jnp.asarray([[1.0, 0.0], [0.0, 1.0]]))(X)
  np.testing.assert_allclose(each[:, 0, 0, 0], [0, 1])
  # Where no channel is guided, the mean of the conditions.
  some = field.implicit_field(Tagger(), {}, labels, guidance=jnp.asarray([1.5, -0.5]), guidance_channels=1)(X)
  np.testing.assert_allclose(some[:, 0, 0, 1], [0.5, 1.5])


def test_a_conditional_field_takes_its_labels_with_the_call():
  free = field.conditional_field(Tagger(), {}, guidance=2.0, guidance_channels=2)
  np.testing.assert_array_equal(
    free(X, LABELS), field.implicit_field(Tagger(), {}, LABELS, guidance=2.0, guidance_channels=2)(X)
  )


def test_guidance_one_costs_no_second_half():
  model = DiT(input_size=8, channels=1, patch_size=2, width=16, depth=1, num_heads=2, num_classes=3)
  params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), jnp.zeros(1, jnp.int32))["params"]

  def flops(guidance):
    field_fn = field.implicit_field(model, params, LABELS, guidance=guidance)
    return jax.jit(lambda f, x: f(x)).lower(field_fn, jnp.zeros((2, 8, 8, 1))).compile().cost_analysis()["flops"]

  assert 1.8 < flops(1.5) / flops(1.0) < 2.1


@pytest.mark.parametrize(
  "arguments, text",
  [
    (dict(label_B=jnp.asarray([0, 4])), r"0\.\.4.*0\.\.2"),
    (dict(label_B=jnp.asarray([-1, 0])), r"-1\.\.0"),
    (dict(label_B=jnp.asarray([0.0, 1.0])), "float32"),
    (dict(label_B=LABELS, guidance=2.0, guidance_channels=5), "4 channels"),
    (dict(label_B=LABELS, guidance=jnp.ones(3)), r"\(3,\)"),
    (dict(label_B=LABELS[:, None]), "several conditions"),
    (dict(label_B=LABELS, guidance=2.0, guidance_interval=(3.0, 1.0)), r"guidance_interval = \(3.0, 1.0\)"),
  ],
)
def test_bad_input_is_refused(arguments, text):
  with pytest.raises(ValueError, match=text):
    field.implicit_field(Tagger(), {}, **arguments)
