"""Bounds against numbers by hand, and FLOPs against the compiler's count."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqm_jax.hardware import Chip
from eqm_jax.networks import flops as flops_lib
from eqm_jax.networks.dit import REMAT_POLICIES, DiT
from eqm_jax.plan import costs

CHIP = Chip("by hand", flops=100.0, memory=1e9, memory_bandwidth=20.0, link_bandwidth=5.0, usable_memory=1e9)


@pytest.mark.parametrize(
  "flops, hbm, asynchronous, synchronous, seconds, limit",
  [
    (1000, 100, 10, 0, 10, "arithmetic"),  # 10 s, 5 s, 2 s
    (1000, 300, 10, 0, 15, "HBM"),
    (1000, 100, 100, 0, 20, "links"),
    (1000, 100, 10, 20, 14, "arithmetic"),  # and 4 s in which nothing else runs
    (1000, 100, 30, 30, 16, "links"),  # 6 s beside the 10 s, 6 s after them
  ],
)
def test_the_slowest_unit_bounds_and_synchronous_links_come_on_top(
  flops, hbm, asynchronous, synchronous, seconds, limit
):
  bound = costs.roofline(CHIP, flops, hbm, asynchronous, synchronous)
  assert (bound.seconds, bound.limit) == (seconds, limit)


def test_the_network_between_slices_is_a_unit_of_its_own():
  chip = dataclasses.replace(CHIP, dcn_bandwidth=0.5)
  bound = costs.roofline(chip, 1000, 100, 10, 20, dcn_bytes=6)
  assert (bound.dcn, bound.seconds, bound.limit) == (12, 12 + 4, "DCN")
  assert costs.roofline(CHIP, 1000, 100, 10, 20).dcn == 0


def test_the_critical_batch_computes_as_long_as_it_moves():
  # 40 bytes of HBM take 2 s, 15 of links 3 s; an image of 50 operations takes half a second.
  assert costs.critical_batch(CHIP, 50, 40, 0) == 4
  assert costs.critical_batch(CHIP, 50, 40, 15) == 6
  batch = costs.critical_batch(CHIP, 50, 40, 0)
  assert batch * 50 / CHIP.flops == 40 / CHIP.memory_bandwidth


@functools.cache
def counted(model: DiT, batch: int = 2) -> float:
  """FLOPs of a gradient, before any optimisation, for models of one block: a loop is counted once."""
  x, label = jnp.zeros((batch, *model.input_shape)), jnp.zeros(batch, jnp.int32)
  params = jax.eval_shape(model.init, jax.random.key(0), x, label)

  def loss(params, x):
    return jnp.sum(model.apply(params, x, label) ** 2)

  return jax.jit(jax.grad(loss)).lower(params, x).cost_analysis()["flops"] / batch


@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_rematerialised_flops_are_those_that_the_compiler_counts_more(remat):
  options = dict(input_size=16, channels=4, patch_size=1, width=128, depth=1, num_heads=2, num_classes=7)
  plain, model = DiT(**options), DiT(**options, remat=remat)
  more, repeated = counted(model) - counted(plain), costs.rematerialised_flops(model)
  # The compiler counts softmax, norms and activations too, which are a tenth of so narrow a block.
  assert (repeated == 0) == (remat in ("none", "dots"))
  assert 0.0 <= more - repeated < 0.15 * costs.rematerialised_flops(plain.clone(remat="full"))
  np.testing.assert_allclose(flops_lib.training(plain), counted(plain), rtol=0.15)


def test_an_evaluation_of_an_energy_is_its_gradient():
  options = dict(input_size=8, channels=4, patch_size=2, width=16, depth=1, num_heads=2, num_classes=7)
  assert flops_lib.evaluation(DiT(**options, energy="dot")) == 2 * flops_lib.evaluation(DiT(**options))
