"""Damage that must change a checksum, and placement that must not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqm_jax.checkpoints.manager import checksums

ARRAYS = {
  "float32": np.linspace(-3, 5, 600, dtype=np.float32).reshape(20, 30),
  "bfloat16": np.asarray(jnp.linspace(-3, 5, 64, dtype=jnp.bfloat16)),
  "int32": np.arange(8, dtype=np.int32),
  "bool": np.asarray([True, False, True]),
  "scalar": np.float32(2.5),
}


def checksums_of(**arrays) -> dict[str, int]:
  return checksums({name: jnp.asarray(array) for name, array in arrays.items()})


def test_each_array_has_its_own_checksum():
  values = checksums_of(**ARRAYS)
  assert values.keys() == ARRAYS.keys() and len(set(values.values())) == len(ARRAYS)
  assert values == checksums_of(**ARRAYS)


@pytest.mark.parametrize("bit", range(32))
def test_flipped_bits_are_noticed_one_two_and_all(bit):
  array = ARRAYS["float32"]
  expected, words = checksums_of(x=array), array.view(np.uint32)
  rng = np.random.default_rng(bit)
  for count in (1, 2, 2, 2, 4, array.size):
    changed = words.copy().reshape(-1)
    changed[rng.choice(array.size, count, replace=False)] ^= np.uint32(1 << bit)
    assert checksums_of(x=changed.reshape(array.shape).view(np.float32)) != expected


def test_other_orders_and_lost_parts_are_noticed():
  array = ARRAYS["float32"]
  changed = [-array, array[::-1], np.roll(array, 1), np.zeros_like(array), array * (np.arange(20)[:, None] < 10)]
  values = [checksums_of(x=one)["x"] for one in (array, *changed)]
  assert len(set(values)) == len(values)


def test_a_checksum_does_not_depend_on_the_sharding():
  array = ARRAYS["float32"]
  mesh = jax.make_mesh((1,), ("data",))
  placed = jax.device_put(array, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
  assert checksums({"x": placed}) == checksums_of(x=array)
