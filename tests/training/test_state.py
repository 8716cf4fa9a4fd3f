import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import load_config

from eqm_jax.networks.dit import DiT
from eqm_jax.training import state as state_lib


def optimizer_config(**changes):
  config = load_config("digits", "smoke").optimizer
  config.update(changes)
  return config


@pytest.mark.parametrize(
  "schedule, expected",
  [("constant", [0, 0.5, 1, 1, 1]), ("cosine", [0, 0.5, 1, 0.5, 0])],
)
def test_schedules(schedule, expected):
  config = optimizer_config(learning_rate=1.0, warmup_steps=10, schedule=schedule)
  rate = state_lib.learning_rate_schedule(config, 30)
  np.testing.assert_allclose([rate(step) for step in (0, 5, 10, 20, 30)], expected, atol=1e-6)


def test_no_warm_up_starts_at_the_peak():
  config = optimizer_config(learning_rate=2.0, warmup_steps=0, schedule="constant")
  assert state_lib.learning_rate_schedule(config, 30)(0) == 2.0


@pytest.mark.parametrize("clip_norm, expected", [(None, 100.0), (1.0, 1.0)])
def test_clipping_bounds_the_global_norm(clip_norm, expected):
  # With b1 = 0 the first moment is the gradient that AdamW gets.
  optimizer = state_lib.make_optimizer(optimizer_config(clip_norm=clip_norm, b1=0.0), 30)
  params = {"a": jnp.zeros(2), "b": jnp.zeros(1)}
  _, opt_state = optimizer.update(
    {"a": jnp.asarray([60.0, 0.0]), "b": jnp.asarray([80.0])}, optimizer.init(params), params
  )
  moments = jax.tree_util.tree_leaves_with_path(opt_state)
  mu = [leaf for path, leaf in moments if ".mu" in jax.tree_util.keystr(path)]
  np.testing.assert_allclose(np.sqrt(sum(np.sum(leaf**2) for leaf in mu)), expected, rtol=1e-5)


def test_the_average_starts_at_the_weights_and_follows_them():
  model = DiT(input_size=4, channels=1, patch_size=2, width=8, depth=1, num_heads=1, num_classes=2)
  optimizer = state_lib.make_optimizer(optimizer_config(warmup_steps=0, learning_rate=0.1), 30)
  state = jax.jit(lambda: state_lib.init_state(model, optimizer, 0))()
  jax.tree.map(np.testing.assert_array_equal, state.params, state.ema_params)
  gradient = jax.tree.map(np.ones_like, state.params)
  after = jax.jit(lambda state: state_lib.update(state, gradient, optimizer, ema_decay=0.9))(state)
  state, after = jax.device_get((state, after))
  for start, now, average in zip(*(jax.tree.leaves(tree) for tree in (state.params, after.params, after.ema_params))):
    np.testing.assert_allclose(average, 0.9 * start + 0.1 * now, rtol=1e-5, atol=1e-7)
    assert not np.allclose(start, now)
  assert after.step == 1


def test_the_seed_fixes_the_start():
  model = DiT(input_size=4, channels=1, patch_size=2, width=8, depth=1, num_heads=1, num_classes=2)
  optimizer = state_lib.make_optimizer(optimizer_config(), 30)
  start = jax.jit(lambda seed: state_lib.init_state(model, optimizer, seed).params["label_embed"]["embedding"])
  first, again, other = map(start, (0, 0, 1))
  np.testing.assert_array_equal(first, again)
  assert not np.allclose(first, other)
