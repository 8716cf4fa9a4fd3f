"""Equilibrium Matching (arXiv 2510.02300) in JAX.

The public names below are imported when first used, so that `import eqm_jax`
costs nothing and starts no backend.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers; at run time `__getattr__` does the same, name by name
  from eqm_jax.checkpoints.eqm_torch import export_reference as export_reference
  from eqm_jax.checkpoints.pretrained import load as load
  from eqm_jax.checkpoints.pretrained import save_pretrained as save_pretrained
  from eqm_jax.checkpoints.readouts import load_readout as load_readout
  from eqm_jax.equilibrium.energy import asymmetry as asymmetry
  from eqm_jax.equilibrium.energy import energy as energy
  from eqm_jax.equilibrium.field import compose as compose
  from eqm_jax.equilibrium.field import field as field
  from eqm_jax.equilibrium.field import guided as guided
  from eqm_jax.equilibrium.gamma import GammaDensity as GammaDensity
  from eqm_jax.equilibrium.objective import Schedule as Schedule
  from eqm_jax.equilibrium.objective import corrupt as corrupt
  from eqm_jax.equilibrium.objective import magnitude as magnitude
  from eqm_jax.equilibrium.ode import integrate as integrate
  from eqm_jax.equilibrium.oracle import oracle_field as oracle_field
  from eqm_jax.equilibrium.sampler import Result as Result
  from eqm_jax.equilibrium.sampler import Status as Status
  from eqm_jax.equilibrium.sampler import descend as descend
  from eqm_jax.equilibrium.sampler import start_noise as start_noise
  from eqm_jax.equilibrium.streaming import descend_stream as descend_stream
  from eqm_jax.experiments import config as config
  from eqm_jax.notebook import run as run

__version__ = "0.2.0"

_HOMES = {
  "config": "experiments",
  "run": "notebook",
  "load": "checkpoints.pretrained",
  "save_pretrained": "checkpoints.pretrained",
  "load_readout": "checkpoints.readouts",
  "export_reference": "checkpoints.eqm_torch",
  "descend": "equilibrium.sampler",
  "Result": "equilibrium.sampler",
  "Status": "equilibrium.sampler",
  "start_noise": "equilibrium.sampler",
  "descend_stream": "equilibrium.streaming",
  "integrate": "equilibrium.ode",
  "field": "equilibrium.field",
  "guided": "equilibrium.field",
  "compose": "equilibrium.field",
  "energy": "equilibrium.energy",
  "asymmetry": "equilibrium.energy",
  "magnitude": "equilibrium.objective",
  "corrupt": "equilibrium.objective",
  "Schedule": "equilibrium.objective",
  "GammaDensity": "equilibrium.gamma",
  "oracle_field": "equilibrium.oracle",
}
__all__ = [  # spelled out for type checkers
  "config",
  "run",
  "load",
  "save_pretrained",
  "load_readout",
  "export_reference",
  "descend",
  "Result",
  "Status",
  "descend_stream",
  "start_noise",
  "integrate",
  "field",
  "guided",
  "compose",
  "energy",
  "asymmetry",
  "magnitude",
  "corrupt",
  "Schedule",
  "GammaDensity",
  "oracle_field",
]


if not TYPE_CHECKING:  # a type checker would take any name for a public one

  def __getattr__(name: str) -> Any:
    if name not in _HOMES:
      raise AttributeError(f"module 'eqm_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"eqm_jax.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
  return sorted([*globals(), *_HOMES])
