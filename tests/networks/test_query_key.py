"""Normalised queries and keys, and rotary positions, before attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqm_jax.networks import query_key

SIDE, H, K = 4, 3, 8
SCALES = np.linspace(0.5, 2, 2 * K).reshape(2, K)


def qkv_of(dtype="float32", seed: int = 0) -> jax.Array:
  """A product of the samples' tokens, [B, T, 3, H, K]."""
  return jnp.asarray(np.random.default_rng(seed).normal(size=(2, SIDE**2, 3, H, K)), dtype)


prepare = jax.jit(query_key.prepare, static_argnums=(0, 1))


def test_rotated_logits_depend_on_offsets_alone():
  with jax.enable_x64(True):
    query, key = np.random.default_rng(0).normal(size=(2, K))
    qkv = jnp.asarray(np.stack([query, key, key]))[None, None, :, None]
    query, key, _ = jnp.moveaxis(prepare(1, True, jnp.tile(qkv, (1, SIDE**2, 1, 1, 1))), 2, 0)[:, 0, :, 0]
    logits_TxS = np.asarray(query @ key.T)
  rows, columns = np.divmod(np.arange(SIDE**2), SIDE)
  by_offset = {}
  for t in range(SIDE**2):
    for s in range(SIDE**2):
      by_offset.setdefault((rows[t] - rows[s], columns[t] - columns[s]), []).append(logits_TxS[t, s])
  assert len(by_offset) == (2 * SIDE - 1) ** 2
  assert max(np.ptp(values) for values in by_offset.values()) < 1e-13
  means = np.sort([values[0] for values in by_offset.values()])
  assert np.diff(means).min() > 1e-4  # and no two offsets, also of rows and columns exchanged, are alike


def test_rotation_keeps_lengths_values_and_the_first_token():
  with jax.enable_x64(True):
    before = qkv_of("float64")
    after = prepare(H, True, before)
    lengths = [np.linalg.norm(x[:, :, :2], axis=-1) for x in (before, after)]
  np.testing.assert_allclose(lengths[1], lengths[0], rtol=1e-14)
  np.testing.assert_array_equal(after[:, :, 2], before[:, :, 2])
  np.testing.assert_array_equal(after[:, 0], before[:, 0])
  assert np.abs(after[:, 1:, :2] - before[:, 1:, :2]).max() > 0.1


def test_rows_turn_one_half_of_a_head_and_columns_the_other():
  before = qkv_of()
  turned = ~np.isclose(prepare(H, True, before)[:, :, :2], before[:, :, :2], atol=1e-5).all(axis=(0, 2, 3))  # [T, K]
  right, below = turned[1], turned[SIDE]
  np.testing.assert_array_equal(right, np.repeat([False, True], K // 2))
  np.testing.assert_array_equal(below, np.repeat([True, False], K // 2))


@pytest.mark.parametrize("rope", [False, True])
def test_lengths_of_queries_and_keys_do_not_count_and_values_are_left_alone(rope):
  with jax.enable_x64(True):
    qkv, factors = qkv_of("float64"), jnp.asarray([5.0, 0.2, 1.0])[:, None, None]
    one, other = (prepare(H, rope, x, SCALES) for x in (qkv, factors * qkv))
    np.testing.assert_allclose(other, one, rtol=0, atol=1e-3)  # of a length as small as 0.1 the ε of 1e-6 remains
    mean_square = np.mean((one[:, :, :2] / (1 if rope else SCALES[:, None])) ** 2, axis=-1)
  np.testing.assert_array_equal(one[:, :, 2], qkv[:, :, 2])
  if not rope:
    np.testing.assert_allclose(mean_square, 1, rtol=1e-3)


@pytest.mark.parametrize("rope, scale", [(True, None), (False, SCALES), (True, SCALES)])
def test_both_layouts_of_the_product_and_float32_inside(rope, scale):
  run = functools.partial(prepare, H, rope)
  scale = scale if scale is None else jnp.asarray(scale, jnp.float32)
  qkv = qkv_of("bfloat16")
  split, flat = run(qkv, scale), run(qkv.reshape(2, SIDE**2, -1), scale)
  assert split.dtype == jnp.bfloat16 and flat.shape == (2, SIDE**2, 3 * H * K)
  np.testing.assert_array_equal(flat.reshape(qkv.shape), split)
  np.testing.assert_array_equal(split, run(qkv.astype(jnp.float32), scale).astype(jnp.bfloat16))


def test_a_query_of_zeros_has_a_gradient():
  gradient = jax.grad(lambda qkv: jnp.sum(prepare(H, True, qkv, jnp.ones((2, K)))))(jnp.zeros_like(qkv_of()))
  assert np.all(np.isfinite(gradient))
