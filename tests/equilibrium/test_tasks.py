"""Denoising, scoring, inpainting and composition, on fields with known results."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqm_jax
from eqm_jax.data import builtin
from eqm_jax.equilibrium import tasks
from eqm_jax.equilibrium.objective import Schedule

KEY = jax.random.key(0)
STEPS = dict(step_size=0.01, rule="gd", max_nfe=400)


@pytest.fixture(scope="module")
def digits():
  """Ten digits, one of each class, and the field whose valleys they are."""
  images = builtin.digits().images[:10]
  return jnp.asarray(images), eqm_jax.oracle_field(images)


def nearest(images, x):
  distance = jnp.linalg.norm(x.reshape(len(x), 1, -1) - images.reshape(1, len(images), -1), axis=-1)
  return np.asarray(distance.argmin(axis=1)), np.asarray(distance.min(axis=1))


def test_noised_is_the_corruption_of_each_sample_alone():
  image = jnp.ones((4, 2, 2, 1))
  gamma = jnp.array([0.0, 0.5, 0.9, 1.0])
  x = tasks.noised(image, gamma, KEY)
  noise = eqm_jax.start_noise(KEY, jnp.arange(4), (2, 2, 1))
  np.testing.assert_allclose(x, eqm_jax.corrupt(image, noise, gamma), atol=1e-6)
  np.testing.assert_array_equal(tasks.noised(image[2:], gamma[2:], KEY, jnp.array([2, 3])), x[2:])


def test_denoising_needs_no_noise_level(digits):
  """From γ = 0.65 and 0.8 in one batch, the oracle's descent ends on the image that was noised."""
  images, field_fn = digits
  x = tasks.noised(images, jnp.where(jnp.arange(10) % 2, 0.65, 0.8), KEY)
  result = eqm_jax.descend(field_fn, x, **STEPS)
  index, distance = nearest(images, result.x)
  assert index.tolist() == list(range(10)) and distance.max() < 0.1


def test_the_field_is_long_away_from_the_data(digits):
  images, field_fn = digits
  outliers = jax.random.uniform(KEY, images.shape, minval=-1, maxval=1)
  assert tasks.field_norm(field_fn, images).max() < 1e-2 < 5 < tasks.field_norm(field_fn, outliers).min()


@pytest.mark.parametrize("rule", ["gd", "nag"])
def test_inpainting_finds_the_image_that_fits(digits, rule):
  images, field_fn = digits
  mask = np.zeros((8, 8, 1))
  mask[:, 4:] = 1
  # What lies under the mask must not matter.
  given = jnp.where(mask > 0, 7.0, images)
  momentum = 0.3 if rule == "nag" else 0.0
  result = tasks.inpaint(field_fn, given, mask, KEY, tries=3, **{**STEPS, "rule": rule, "momentum": momentum})
  np.testing.assert_array_equal(np.where(mask > 0, 0, result.x), np.where(mask > 0, 0, images))
  index, distance = nearest(images, result.x)
  assert index.tolist() == list(range(10)) and distance.max() < 0.1


def test_inpainting_follows_a_self_stopping_magnitude(digits):
  images, _ = digits
  schedule, mask = Schedule("self_stopping"), np.zeros((8, 8, 1))
  mask[:, 4:] = 1
  field_fn = eqm_jax.oracle_field(images, schedule, density=eqm_jax.GammaDensity("consistent"))
  result = tasks.inpaint(field_fn, images, mask, KEY, schedule=schedule, tries=3, **STEPS)
  index, distance = nearest(images, result.x)
  assert index.tolist() == list(range(10)) and distance.max() < 0.2


def test_of_several_tries_the_landscape_chooses(digits):
  images, field_fn = digits
  mask = np.zeros((8, 8, 1))
  mask[:, 4:] = 1
  one, several = (tasks.inpaint(field_fn, images, mask, KEY, settle=0, tries=tries, **STEPS) for tries in (1, 4))
  assert np.all(several.norm <= one.norm) and np.all(several.nfe == 4 * one.nfe)
  np.testing.assert_allclose(several.norm, tasks.field_norm(field_fn, several.x), rtol=1e-5, atol=1e-5)
  kept = np.asarray(several.norm == one.norm)
  np.testing.assert_array_equal(several.x[kept], one.x[kept])
  assert 0 < kept.sum() < 10
  with pytest.raises(ValueError, match="tries = 0"):
    tasks.inpaint(field_fn, images, mask, KEY, tries=0, **STEPS)


def test_known_pixels_go_the_way_of_the_ideal_path(digits):
  """With nothing to paint, γ grows by λ·η a step, then 1−γ shrinks by λ·η/(1−a): the field's own pace."""
  images, field_fn = digits
  result = tasks.inpaint(
    field_fn, images, np.zeros((1, 1, 1)), KEY, settle=0, step_size=0.01, rule="gd", max_nfe=40,
    record_at=[0, 10, 20, 30], record_fn=lambda x, norm_B: x,
  )  # fmt: skip
  start = result.record[0]
  left = [float(jnp.linalg.norm(x - images) / jnp.linalg.norm(start - images)) for x in result.record]
  np.testing.assert_allclose(left, [1, 0.6, 0.2, 0.2 * 0.8**10], rtol=1e-3)


def test_editing_starts_from_the_image(digits):
  images, field_fn = digits
  result = tasks.inpaint(field_fn, images, np.ones((8, 8, 1)), KEY, gamma=0.7, **STEPS)
  assert nearest(images, result.x)[0].tolist() == list(range(10))


def test_composition_is_the_weighted_sum():
  fields = [lambda x: x, lambda x: jnp.ones_like(x), jax.tree_util.Partial(lambda a, x: a * x, jnp.array(3.0))]
  x = jnp.arange(6.0).reshape(3, 2)
  composed = eqm_jax.compose(fields, [0.5, -2.0, jnp.array([0.0, 1.0, 2.0])])
  expected = 0.5 * x - 2 + np.array([[0], [1], [2]]) * 3 * x
  np.testing.assert_allclose(composed(x), expected)
  np.testing.assert_allclose(jax.jit(lambda f, x: f(x))(composed, x), expected)  # a pytree


def test_a_sum_of_landscapes_is_low_where_both_are():
  """A sum of two quadratics rests at the weighted mean; a negative weight leads away from its valley."""
  fields = [lambda x: x - 1.0, lambda x: x + 1.0]
  rest = eqm_jax.descend(eqm_jax.compose(fields, [0.75, 0.25]), jnp.zeros((1, 2)), step_size=0.1, max_nfe=300)
  np.testing.assert_allclose(rest.x, 0.5, atol=1e-5)
  away = eqm_jax.descend(eqm_jax.compose(fields, [1.5, -0.5]), jnp.zeros((1, 2)), step_size=0.1, max_nfe=300)
  np.testing.assert_allclose(away.x, 2.0, atol=1e-5)


@pytest.mark.parametrize(
  "weights, message",
  [
    ([1.0], "1 weights for 2 fields"),
    ([1.0, 2.0, 3.0], "3 weights for 2 fields"),
    ([1.0, np.nan], "weight 1 = nan"),
    ([1.0, np.ones((2, 2))], r"weight 1 has shape \(2, 2\)"),
  ],
)
def test_bad_weights_are_refused(weights, message):
  with pytest.raises(ValueError, match=message):
    eqm_jax.compose([jnp.sin, jnp.cos], weights)


@pytest.mark.parametrize(
  "gamma, message", [(1.2, "gamma = 1.2"), (-0.1, "gamma = -0.1"), (np.zeros(3), r"shape \(3,\)")]
)
def test_noise_levels_outside_the_range_are_refused(gamma, message):
  with pytest.raises(ValueError, match=message):
    tasks.noised(jnp.zeros((2, 4, 4, 1)), gamma, KEY)
  with pytest.raises(ValueError, match=message):
    tasks.inpaint(jnp.sin, jnp.zeros((2, 4, 4, 1)), np.ones((4, 4, 1)), KEY, gamma=gamma, **STEPS)


@pytest.mark.parametrize(
  "mask, message", [(np.ones((5, 4, 1)), r"shape \(5, 4, 1\).*\(2, 4, 4, 1\)"), (np.full((4, 4, 1), 0.5), "0.5")]
)
def test_masks_that_do_not_fit_are_refused(mask, message):
  with pytest.raises(ValueError, match=message):
    tasks.inpaint(jnp.sin, jnp.zeros((2, 4, 4, 1)), mask, KEY, **STEPS)


def test_a_constant_schedule_is_followed_to_the_end(digits):
  """c ≡ 1, flow matching without time: known pixels arrive, and do not overshoot for good."""
  images, _ = digits
  schedule = Schedule("constant", multiplier=1.0)
  result = tasks.inpaint(
    jnp.zeros_like, images, np.zeros((1, 1, 1)), KEY, schedule=schedule, settle=0,
    step_size=0.01, rule="gd", max_nfe=99, record_at=[99],
  )  # fmt: skip
  assert float(jnp.abs(result.record["x"][0] - images).max()) < 0.1
