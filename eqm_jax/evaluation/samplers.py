"""From a row of a config's `samplers` to samples: descended in a stream or in lockstep, or integrated."""

import dataclasses
import logging
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import tqdm
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from eqm_jax.equilibrium import field, integrators, rules, sampler, streaming
from eqm_jax.equilibrium.labels import checked_labels
from eqm_jax.networks.dit import DiT

STREAM_LENGTH = 16  # samples per slot that one stream takes: more hide the progress, fewer idle at the end

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Batching:
  """What sampling needs besides a row."""

  mesh: Mesh  # samples are split over its data and fsdp axes, a stream over all
  batch_size: int  # samples in flight
  key: jax.Array  # sample i's random numbers depend on (key, i) alone
  multiplier: float  # λ of the field
  decode: Callable[[np.ndarray], np.ndarray] | None = None  # latents → images (uint8), where samples are latents
  autoencoder: str = ""  # that decodes: its name and sha256; "": the samples are not decoded

  @property
  def ways(self) -> int:
    """Over how many devices a batch is split."""
    return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

  def pixels(self, x: np.ndarray) -> np.ndarray:
    """What is shown of samples [N, H, W, C]: latents decoded, where there is a decoder."""
    return self.decode(np.asarray(x)) if self.decode else x

  def place(self, tree: Any) -> Any:
    """Arrays [B, ...] on the mesh, split over their first axis."""
    return jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec(("data", "fsdp"))))

  def replicate(self, tree: Any) -> Any:
    """Arrays on the mesh, whole on every device."""
    return jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec()))


@dataclasses.dataclass(frozen=True)
class Drawn:
  """Samples in the order of their labels, as numpy arrays, and what they took."""

  result: sampler.Result
  seconds: float  # compilation left out
  hardware_evaluations: int  # samples that passed through the network, idle ones included


def is_descent(row: ml_collections.ConfigDict) -> bool:
  """Whether the row descends; otherwise it integrates."""
  return row.rule in rules.RULES


def check(name: str, row: ml_collections.ConfigDict, model: DiT, batching: Batching):
  """Refuses a row that could not be drawn.

  Raises:
    ValueError: naming the row and the value.
  """
  if row.rule not in rules.RULES and row.rule not in integrators.SOLVERS:
    known = ", ".join([*rules.RULES, *integrators.SOLVERS])
    raise ValueError(f"samplers.{name}.rule = {row.rule!r} is not known: choose one of {known}")
  if model.time_input and is_descent(row):
    raise ValueError(
      f"samplers.{name}.rule = {row.rule!r} descends a field without time, but this model is told the time: "
      f"choose one of {', '.join(integrators.SOLVERS)}, or set evaluation.samples = 0"
    )
  ways = batching.mesh.size if row.streaming else batching.ways
  if batching.batch_size < 1 or batching.batch_size % ways:
    raise ValueError(
      f"batch_size = {batching.batch_size} does not divide over {ways} devices: use a multiple of {ways}"
    )
  try:
    field.conditional_field(model, {}, **guidance_of(row))
    if is_descent(row):
      sampler.checked_threshold(row.threshold, 1)
      example = jax.ShapeDtypeStruct(model.input_shape, jnp.float32)
      sampler.make_policy(**_settings(row, batching), **_numbers(row), example=example)
    else:
      integrators.check(**_integration(row, model), key=batching.key)
  except ValueError as error:
    raise ValueError(f"samplers.{name}: {error}") from error


def draw(
  name: str, row: ml_collections.ConfigDict, model: DiT, params: Any, label_N: np.ndarray, batching: Batching
) -> Drawn:
  """Draws one sample per label, with a progress bar."""
  checked_labels(label_N, model.num_classes)
  params = batching.replicate(params)
  field_fn = field.conditional_field(model, params, **guidance_of(row))
  streams = is_descent(row) and row.streaming
  if streams:
    part, size = _stream_part, batching.batch_size * STREAM_LENGTH
  else:
    part, size = _descend_part if is_descent(row) else _integrate_part, batching.batch_size
  parts = [np.arange(first, min(first + size, len(label_N))) for first in range(0, len(label_N), size)]

  def run(index_B: np.ndarray, **changes) -> tuple[sampler.Result, int]:
    changed = row.copy_and_resolve_references()
    changed.update(changes)
    return jax.device_get(part(changed, model, field_fn, label_N[index_B], index_B, batching))

  # Streams compile for each length; other parts are filled up to one.
  for index_B in {len(index_B) if streams else size: index_B for index_B in parts}.values():
    run(index_B, **_shortest(row))
  begin, done, evaluations, results = time.monotonic(), 0, 0, []
  with tqdm.tqdm(total=len(label_N), desc=name, unit="image", disable=None) as bar:
    for index_B in parts:
      results.append(run(index_B))
      done, evaluations = done + len(index_B), evaluations + int(results[-1][0].evaluations_B.sum())
      bar.set_postfix(evaluations=f"{evaluations / done:.0f}", refresh=False)
      bar.update(len(index_B))
  seconds = time.monotonic() - begin
  result = jax.tree.map(lambda *leaves: np.concatenate(leaves), *(result for result, _ in results))
  _warn(name, row, result)
  return Drawn(result, seconds, int(sum(hardware for _, hardware in results)))


def descend_row(
  row: ml_collections.ConfigDict, field_fn: Callable, noise: jax.Array, batching: Batching, **options
) -> sampler.Result:
  """One batch in lockstep; `options` go to `descend`."""
  return sampler.descend(field_fn, noise, **descent_of(row, batching), **options)


def descent_of(row: ml_collections.ConfigDict, batching: Batching) -> dict[str, Any]:
  """The row's arguments of `descend`."""
  return {**_settings(row, batching), **_numbers(row), "threshold": row.threshold}


def in_batches(name: str, function: Callable, count: int, batching: Batching) -> Any:
  """Applies `function` to all of 0..count−1 in batches of one size, with a progress bar.

  Args:
    name: what the bar says.
    function: indices [B], numpy → a tree of arrays [B, ...]. The last batch is filled up
      with indices that it already has.
    count: how many.
    batching: of which the batch size is used.

  Returns:
    The tree, as numpy arrays [count, ...].
  """
  size, parts = min(batching.batch_size, count + -count % batching.ways), []
  with tqdm.tqdm(total=count, desc=name, unit="image", disable=None) as bar:
    for first in range(0, count, size):
      index = np.arange(first, min(first + size, count))
      part = jax.device_get(function(np.resize(index, size)))
      parts.append(jax.tree.map(lambda leaf, n=len(index): leaf[:n], part))
      bar.update(len(index))
  return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def _stream_part(row, model, field_fn, label_B, index_B, batching: Batching):
  slots = min(batching.batch_size, len(label_B))
  slots -= slots % batching.mesh.size
  if not slots:  # fewer samples than devices
    return _descend_part(row, model, field_fn, label_B, index_B, batching)
  result = streaming.descend_stream(
    field_fn,
    jnp.asarray(label_B),
    shape=model.input_shape,
    slots=slots,
    threshold=row.threshold,
    mesh=batching.mesh,
    first_index=int(index_B[0]),
    **_settings(row, batching),
    **_numbers(row),
  )
  plain = sampler.Result(result.x, result.evaluations_B, result.norm_B, result.status_B, result.restarts_B)
  return plain, result.hardware_evaluations


def _descend_part(row, model, field_fn, label_B, index_B, batching: Batching):
  label_B, index_B, noise, dropped = _filled_up(model, label_B, index_B, batching)
  bound = field.BoundField(field_fn, label_B)
  result = descend_row(row, bound, noise, batching, index_B=index_B)
  hardware = result.evaluations_B.max() * len(index_B)
  return jax.tree.map(lambda leaf: leaf[: len(leaf) - dropped], result), hardware


def _integrate_part(row, model, field_fn, label_B, index_B, batching: Batching):
  label_B, index_B, noise, dropped = _filled_up(model, label_B, index_B, batching)
  options = _integration(row, model)
  integrated = integrators.integrate(field_fn, noise, label_B, key=batching.key, index_B=index_B, **options)
  zeros_B = jnp.zeros(len(index_B), jnp.int32)
  unknown_B = jnp.full(len(index_B), jnp.nan)  # an integrator asks for no gradient where it ends
  result = sampler.Result(integrated.x, integrated.evaluations_B, unknown_B, integrated.status_B, zeros_B)
  hardware = integrated.evaluations_B.max() * len(index_B)
  return jax.tree.map(lambda leaf: leaf[: len(leaf) - dropped], result), hardware


def _filled_up(model: DiT, label_B, index_B, batching: Batching):
  """A batch of full size on the mesh; what fills it up is dropped afterwards."""
  dropped = batching.batch_size - len(index_B)
  fill = np.arange(batching.batch_size) % len(index_B)
  noise = sampler.start_noise(batching.key, index_B[fill], model.input_shape)
  label_B, index_B, noise = batching.place((jnp.asarray(label_B[fill]), jnp.asarray(index_B[fill]), noise))
  return label_B, index_B, noise, dropped


def guidance_of(row: ml_collections.ConfigDict) -> dict[str, Any]:
  """The row's arguments of a field."""
  return {
    "guidance": row.guidance,
    "guidance_channels": row.guidance_channels or None,
    "guidance_interval": row.guidance_interval or None,
  }


def _settings(row, batching: Batching) -> dict[str, Any]:
  return {
    "rule": row.rule,
    "step_size": row.step_size or sampler.AUTO_LENGTH / (batching.multiplier * row.max_evaluations),
    "momentum": row.momentum,
    "temperature": row.temperature,
    "key": batching.key,
    "multiplier": batching.multiplier if row.relative_threshold else 1.0,
  }


def _numbers(row) -> dict[str, int]:
  return {
    "max_evaluations": row.max_evaluations,
    "min_evaluations": row.min_evaluations,
    "max_restarts": row.max_restarts,
  }


def _integration(row, model: DiT) -> dict[str, Any]:
  """With a tolerance the solver chooses its steps, without one the budget does."""
  if row.tolerance:
    return {"solver": row.rule, "rtol": row.tolerance, "atol": row.tolerance, "timed": model.time_input}
  stages = integrators.SOLVERS[row.rule].stages
  return {"solver": row.rule, "steps": row.max_evaluations // stages, "timed": model.time_input}


def _shortest(row) -> dict[str, Any]:
  """Changes that make a descent short without another compilation."""
  return {"max_evaluations": 1, "min_evaluations": 0} if is_descent(row) else {}


def _warn(name: str, row, result: sampler.Result):
  diverged = np.mean(result.status_B == sampler.DIVERGED)
  if diverged:
    log.warning("%s: %.1f %% of the samples diverged: try a smaller step_size", name, 100 * diverged)
  spent = np.mean(result.status_B == sampler.BUDGET)
  if is_descent(row) and row.threshold and spent:
    text = "%s: %.1f %% of the samples spent max_evaluations = %d above the threshold %g"
    log.warning(text, name, 100 * spent, row.max_evaluations, row.threshold)


def balanced_labels(count: int, num_classes: int) -> np.ndarray:
  """0, 1, ... repeating; without classes, the null class."""
  return np.arange(count, dtype=np.int32) % max(1, num_classes)
