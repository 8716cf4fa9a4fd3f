"""Bounds against numbers by hand, and FLOPs against the compiler's count."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from eqm_jax.hardware import Chip
from eqm_jax.networks import flops as flops_lib
from eqm_jax.networks.dit import REMAT_POLICIES, DiT, parameter_shapes
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


def products(jaxpr) -> int:
  """FLOPs of the matrix products that a program executes, those of loops and kernels as often as they run."""
  total = 0
  for equation in jaxpr.eqns:
    name, settings = equation.primitive.name, equation.params
    if name == "dot_general":
      (contracted, _), _ = settings["dimension_numbers"]
      lengths = [equation.invars[0].aval.shape[axis] for axis in contracted]
      total += 2 * math.prod(lengths) * math.prod(equation.outvars[0].aval.shape)
    grid = getattr(settings.get("grid_mapping"), "grid", ())
    turns = {"scan": settings.get("length"), "pallas_call": math.prod(grid)}
    total += turns.get(name, 1) * sum(map(products, jaxprs_in_params(settings)))
  return total


@functools.cache
def counted(model: DiT, batch: int = 2) -> float:
  """FLOPs of the products of a gradient, for one sample, as it is traced."""
  x, label = jnp.zeros((batch, *model.input_shape)), jnp.zeros(batch, jnp.int32)

  def loss(params):
    return jnp.sum(model.apply({"params": params}, x, label, training=True) ** 2)

  return products(jax.make_jaxpr(jax.grad(loss))(parameter_shapes(model)).jaxpr) / batch


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_rematerialised_flops_are_those_that_are_traced_beyond_the_formula(remat, fused):
  options = dict(input_size=16, channels=4, patch_size=1, width=128, depth=2, num_heads=2, num_classes=7, block="xla")
  plain = DiT(**options, attention="xla")
  model = plain.clone(remat=remat, attention="pallas_interpret" if fused else "xla")
  repeated = costs.rematerialised_flops(model, fused)
  assert (repeated == 0) == (remat in ("none", "dots") and not fused)
  assert counted(model) - counted(plain) == repeated
  in_pairs = model.clone(depth=4, unroll=2)  # the form of the loop does not matter
  assert costs.rematerialised_flops(in_pairs, fused) == 2 * repeated
  np.testing.assert_allclose(flops_lib.training(plain), counted(plain), rtol=1e-3)  # one time embedding for the batch


def test_an_evaluation_of_an_energy_is_its_gradient():
  options = dict(input_size=8, channels=4, patch_size=2, width=16, depth=1, num_heads=2, num_classes=7)
  assert flops_lib.evaluation(DiT(**options, energy="dot")) == 2 * flops_lib.evaluation(DiT(**options))
