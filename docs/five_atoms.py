"""How c(γ) and the density of γ move mass between modes, without training: python docs/five_atoms.py

Prints the table of docs/options.md: descents with the exact field (`eqm_jax.oracle_field`) of five unequal atoms in the
plane, and the difference between the fraction of descents that end at each atom and its weight. The starts are
quantiles of the noise on a polar grid, so that there is next to no sampling noise.
"""

import jax.numpy as jnp
import numpy as np
import tabulate

import eqm_jax
from eqm_jax.equilibrium import sampler

ATOMS = np.array([[1.5, 0.2], [-1.2, 1.0], [0.1, -1.4], [-0.9, -0.7], [0.3, 1.5]])
WEIGHTS = np.array([5, 4, 3, 2, 1])  # in fifteenths
GRID, NFE = 32, 150  # radii and angles of the starts; steps
LENGTHS = 3  # of the trajectory, in those of step_size="auto": in the plane the field is shorter than the ideal one
CASES = {  # title: c(γ), the floor of consistent γ, the published error
  "truncated, a = .8": (eqm_jax.Schedule(), 0.02, 0.003),
  "self-stopping, t = .9": (eqm_jax.Schedule("self_stopping", breakpoint=0.9), 0.0, 0.005),
  "power, p = .8": (eqm_jax.Schedule("power", exponent=0.8), 0.0, 0.035),
  "linear": (eqm_jax.Schedule("linear"), 0.02, 0.050),
}


def starts() -> np.ndarray:
  """Points of the plane with the distribution of noise, [GRID², 2]."""
  ring, turn = np.meshgrid(np.arange(GRID), np.arange(GRID), indexing="ij")
  radius = np.sqrt(-2 * np.log1p(-(ring + 0.5) / GRID))
  angle = 2 * np.pi * (turn + 0.5 * (ring % 2)) / GRID
  return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1).reshape(-1, 2)


def errors(schedule: eqm_jax.Schedule, density: eqm_jax.GammaDensity) -> np.ndarray:
  """|fraction of descents − weight| of each atom."""
  points = jnp.asarray(np.repeat(ATOMS, WEIGHTS, axis=0), jnp.float32)
  field = eqm_jax.oracle_field(points, schedule, density=density)
  step_size = LENGTHS * sampler.auto_length(schedule) / (schedule.multiplier * NFE)
  x = np.asarray(eqm_jax.descend(field, jnp.asarray(starts(), jnp.float32), step_size=step_size, max_nfe=NFE).x)
  nearest = np.linalg.norm(x[:, None] - ATOMS, axis=-1).argmin(axis=1)
  return np.abs(np.bincount(nearest, minlength=len(ATOMS)) / len(x) - WEIGHTS / WEIGHTS.sum())


if __name__ == "__main__":
  rows = []
  for title, (schedule, floor, published) in CASES.items():
    densities = eqm_jax.GammaDensity("uniform"), eqm_jax.GammaDensity("consistent", floor=floor)
    found = [errors(schedule, density) for density in densities]
    rows.append([title, *(f"{error.mean():.3f} ({error.max():.3f})" for error in found), f"{published:.3f}"])
  columns = ["c(γ)", "uniform γ", "consistent γ", "published"]
  print(tabulate.tabulate(rows, columns, tablefmt="github", disable_numparse=True))
