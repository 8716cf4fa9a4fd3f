"""Slices and a config for the tests of plans."""

import os

import ml_collections
import pytest
from conftest import load_config

from eqm_jax.plan import topology

pytest.importorskip("libtpu", reason="there is one for Linux on x86 only")

for name, value in topology.ENVIRONMENT.items():  # several workers compile at the same time
  os.environ.setdefault(name, value)


@pytest.fixture(scope="module", autouse=True)
def flags_that_libtpu_knows():
  """XLA's flags without those of the CPU: libtpu reads them too, and ends the process for an unknown one."""
  known = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith("--xla_cpu")]
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("XLA_FLAGS", " ".join(known))
    yield


def open_slice(name: str) -> topology.Topology:
  return topology.open_topologies(name)[0]


def small() -> ml_collections.ConfigDict:
  """EqM-S/2 with its sizes cut until it compiles in seconds; its mesh splits the state over all chips."""
  config = load_config("imagenet256", "S/2")
  config.model.update(input_size=8, width=256, depth=2, num_heads=2, num_classes=15)
  config.train.batch_size = 64
  config.mesh.update(data=1, fsdp=-1)
  config.evaluation.update(batch_size=8, chunk_size=8)
  config.autoencoder.path = None
  config.samplers.published_b2.batching = "static"
  return config
