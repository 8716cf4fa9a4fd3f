"""Equilibrium Matching (arXiv 2510.02300) in JAX.

The public names below are imported when first used, so that `import eqm_jax`
costs nothing and starts no backend.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
  "load": "training.pretrained",
  "save_pretrained": "training.pretrained",
  "export_reference": "convert.reference",
  "descend": "equilibrium.sampler",
  "Result": "equilibrium.sampler",
  "CONVERGED": "equilibrium.sampler",
  "BUDGET": "equilibrium.sampler",
  "DIVERGED": "equilibrium.sampler",
  "descend_stream": "equilibrium.streaming",
  "start_noise": "equilibrium.sampler",
  "integrate": "equilibrium.integrators",
  "conditional_field": "equilibrium.field",
  "implicit_field": "equilibrium.field",
  "energy_field": "equilibrium.field",
  "guided": "equilibrium.field",
  "compose": "equilibrium.field",
  "energy": "equilibrium.energy",
  "asymmetry": "equilibrium.jacobian",
  "magnitude": "equilibrium.objective",
  "corrupt": "equilibrium.objective",
  "Schedule": "equilibrium.objective",
  "oracle_field": "equilibrium.oracle",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
  if name not in _HOMES:
    raise AttributeError(f"module 'eqm_jax' has no attribute {name!r}")
  return getattr(importlib.import_module(f"eqm_jax.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
  return sorted([*globals(), *_HOMES])
