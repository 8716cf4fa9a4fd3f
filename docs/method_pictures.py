"""Draws the pictures of docs/method.md: python docs/method_pictures.py

The landscape is the exact one of two images in 64 dimensions (`eqm_jax.oracle_field`), on the line through both.
"""

import pathlib

import jax
import jax.numpy as jnp
import matplotlib.figure

import eqm_jax

HERE = pathlib.Path(__file__).parent
DIMENSION, STEP_SIZE = 64, 0.003
BLUE, ORANGE, GREEN, GREY = "#1f77b4", "#ff7f0e", "#2ca02c", "#999999"


def draw_magnitudes():
  """c(γ) of the paper's family."""
  figure = matplotlib.figure.Figure(figsize=(5.5, 3.2), layout="constrained")
  axes = figure.subplots()
  gamma = jnp.linspace(0, 1, 401)
  for kind, color in (("constant", GREY), ("linear", GREEN), ("piecewise", ORANGE), ("truncated", BLUE)):
    axes.plot(gamma, eqm_jax.magnitude(gamma, eqm_jax.Schedule(kind)), color=color, label=kind)
  axes.set(xlabel="γ (0: noise, 1: data)", ylabel="c(γ), with λ = 4", ylim=(0, None))
  axes.legend(frameon=False)
  figure.savefig(HERE / "method_magnitude.png", dpi=150)


def draw_landscape():
  """The energy and the field between two data points, and descents from noise."""
  point = jnp.ones(DIMENSION)
  field = eqm_jax.oracle_field(jnp.stack([point, -point]))
  unit = point / jnp.linalg.norm(point)
  along = jnp.linspace(-14.0, 14.0, 561)
  slope = jax.jit(field)(along[:, None] * unit) @ unit
  energy = jnp.concatenate([jnp.zeros(1), jnp.cumsum((slope[1:] + slope[:-1]) / 2 * jnp.diff(along))])

  figure = matplotlib.figure.Figure(figsize=(9, 3.2), layout="constrained")
  left, right = figure.subplots(1, 2)
  left.plot(along, energy - energy.min(), color=BLUE, label="E")
  left.plot(along, slope, color=ORANGE, label="f, its slope")
  left.axhline(0, color=GREY, linewidth=0.8)
  for side in (-1, 1):
    left.axvline(side * DIMENSION**0.5, color=GREY, linestyle=":", label="data" if side == 1 else None)
  left.set(xlabel="position on the line through two images")
  left.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=3)

  noise = jax.random.normal(jax.random.key(0), (8, DIMENSION))
  steps = range(0, 401, 4)
  options = dict(step_size=STEP_SIZE, max_nfe=400, record_at=tuple(steps), record_fn=lambda x, norm: x @ unit)
  right.plot(steps, eqm_jax.descend(field, noise, **options).record, color=BLUE, linewidth=1)
  right.set(xlabel=f"NFE, η = {STEP_SIZE}", ylabel="position on the line", title="eight descents from noise")
  figure.savefig(HERE / "method_landscape.png", dpi=150)


if __name__ == "__main__":
  draw_magnitudes()
  draw_landscape()
