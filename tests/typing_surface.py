"""Every public name, used as a user would: what mypy checks. Nothing here is run.

The annotations state what an editor should show. tests/test_project.py compares the names with `eqm_jax.__all__`.
"""

import jax
import jax.numpy as jnp

import eqm_jax
from eqm_jax.equilibrium.field import BoundField, Field


def save_and_load() -> None:
  pretrained = eqm_jax.load("runs/digits", weights="ema", dtype="float32")
  shape: tuple[int, ...] = pretrained.model.input_shape
  step: int | None = pretrained.step
  eqm_jax.save_pretrained("exported", pretrained.model, pretrained.params)
  eqm_jax.export_reference("exported.pt", pretrained.model, pretrained.params)
  print(shape, step)


def fields(noise: jax.Array, labels: jax.Array) -> jax.Array:
  pretrained = eqm_jax.load("runs/digits")
  model, params = pretrained.model, pretrained.params
  conditional = eqm_jax.field(model, params, guidance=1.5, guidance_channels=3, guidance_interval=(1.0, 8.0))
  bound = eqm_jax.field(model, params, labels, form="dot")
  loaded: BoundField = pretrained.field(labels, guidance=1.5)
  guided = eqm_jax.guided(loaded, conditional.bind(labels), 2.0, channels=[0, 1])
  composed = eqm_jax.compose([bound, guided], [0.5, 0.5])
  oracle = eqm_jax.oracle_field(noise)
  energy = eqm_jax.energy(model, params, labels, form="dot")
  energies: jax.Array = energy(noise) + pretrained.energy(labels)(noise)
  asymmetry: jax.Array = eqm_jax.asymmetry(bound, noise, jax.random.key(0))
  return composed(noise) + oracle(noise) + energies.sum() + asymmetry


def samplers(field: Field, labels: jax.Array, key: jax.Array) -> jax.Array:
  noise: jax.Array = eqm_jax.start_noise(key, jnp.arange(10), (8, 8, 1))
  bound: BoundField = field.bind(labels)
  descended: eqm_jax.Result = eqm_jax.descend(bound, noise, step_size=0.003, max_nfe=249, threshold=4.0, progress=print)
  model, params = eqm_jax.load("digits").model, eqm_jax.load("digits").params
  readout = eqm_jax.load_readout("runs/digits/readout/readout.npz", model, params)
  by_level = eqm_jax.field(model, params, labels, readout=readout)
  levelled: eqm_jax.Result = eqm_jax.descend(by_level, noise, step_size="auto", max_nfe=9, threshold=0.9, stop="gamma")
  level: jax.Array | None = levelled.gamma
  print(level)
  stream = eqm_jax.descend_stream(field, labels, key, shape=(8, 8, 1), slots=4, step_size=0.003, max_nfe=249)
  solved: eqm_jax.Result = eqm_jax.integrate(field, noise, labels, solver="heun", steps=50)
  own: eqm_jax.Result = eqm_jax.descend(lambda x: x, noise, step_size="auto", max_nfe=10, rule="nag", momentum=0.3)
  converged: jax.Array = descended.status == eqm_jax.Status.CONVERGED
  nfe: jax.Array = stream.nfe + solved.nfe + own.nfe
  return jnp.where(converged, nfe, 0)


def modes() -> None:
  config = eqm_jax.config("digits", "smoke", **{"train.steps": 500})
  config.train.steps = 400
  outcome = eqm_jax.run("train", config, "runs/digits")
  metrics: dict[str, object] = outcome.metrics
  for name, figure in outcome.figures.items():
    print(name, figure.path, metrics, outcome.workdir)


def training(data: jax.Array, noise: jax.Array, gamma: jax.Array) -> jax.Array:
  schedule = eqm_jax.Schedule(kind="truncated", a=0.8, multiplier=4.0)
  density = eqm_jax.GammaDensity(kind="consistent", floor=0.05)
  noise = eqm_jax.oracle_field(data, schedule, density=density)(noise)
  x: jax.Array = eqm_jax.corrupt(data, noise, gamma)
  c: jax.Array = eqm_jax.magnitude(gamma, schedule)
  return (noise - data) * c[:, None, None, None] + x
