"""From a row of a config's `samplers` to samples: descended in a stream or in lockstep, or integrated."""

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import tqdm

from eqm_jax import devices
from eqm_jax.equilibrium import field, integrators, rules, sampler, streaming
from eqm_jax.equilibrium.labels import checked_labels
from eqm_jax.networks.dit import DiT

STREAM_LENGTH = 16  # samples per slot that one stream takes: more hide the progress, fewer idle at the end

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Batching:
  """What sampling needs besides a row. Samples are split over all devices of this process."""

  batch_size: int  # samples in flight on each device
  key: jax.Array  # sample i's random numbers depend on (key, i) alone
  multiplier: float  # λ of the field
  decode: Callable[[np.ndarray], np.ndarray] | None = None  # latents → images (uint8), where samples are latents
  autoencoder: str = ""  # that decodes: its name and sha256; "": the samples are not decoded
  decoder_dtype: str = ""  # of its convolutions
  image_shape: tuple[int, int, int] | None = None  # of what it makes of a sample

  @property
  def ways(self) -> int:
    """Over how many devices samples are split."""
    return jax.local_device_count()

  def pixels(self, x: np.ndarray) -> np.ndarray:
    """What is shown of samples [N, H, W, C]: latents decoded, where there is a decoder."""
    return self.decode(np.asarray(x)) if self.decode else x

  def place(self, tree: Any) -> Any:
    """Arrays [B, ...] on the devices, split over their first axis."""
    return devices.split(tree)


@dataclasses.dataclass(frozen=True)
class Drawn:
  """Samples in the order of their labels, as numpy arrays, and what they took."""

  result: sampler.Result
  seconds: float  # compilation left out
  hardware_evaluations: float  # samples that passed through the network, idle ones included


def is_descent(row: ml_collections.ConfigDict) -> bool:
  """Whether the row descends; otherwise it integrates."""
  return row.rule in rules.RULES


def is_streamed(row: ml_collections.ConfigDict) -> bool:
  """Whether the row is drawn by continuous batching: where all samples stop together, it would have nothing to do."""
  return bool(is_descent(row) and row.streaming and (row.threshold or row.max_restarts))


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
  if batching.batch_size < 1:
    raise ValueError(f"batch_size = {batching.batch_size} must be at least 1")
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
  streams = is_streamed(row)
  size = min(batching.batch_size * (STREAM_LENGTH if streams else 1), -(-len(label_N) // batching.ways))
  units = draw_units(name, row, model, params, label_N, batching, size, range(-(-len(label_N) // size)))
  drawn = joined(unit for _, unit in units)
  warn(name, row, drawn.result)
  return drawn


def draw_units(
  name: str,
  row: ml_collections.ConfigDict,
  model: DiT,
  params: Any,
  label_N: np.ndarray,
  batching: Batching,
  size: int,
  numbers: Sequence[int],
) -> Iterator[tuple[int, Drawn]]:
  """Draws some units of a series of samples, with a progress bar.

  Unit u holds the samples u·size to (u + 1)·size − 1, the last one what is left. One device draws a whole unit, in
  a program whose shapes depend on `size` and the batch size alone: the bits of a sample do not
  depend on how many devices there are, and not on which units are drawn together.

  Args:
    name: what the bar says.
    row, model, params: what is drawn from.
    label_N: of the whole series.
    batching: how.
    size: samples in a unit.
    numbers: the units wanted.

  Yields:
    The number of a unit, and what was drawn. Units that were drawn at the same time share the time.
  """
  checked_labels(label_N, model.num_classes)
  field_fn = field.conditional_field(model, devices.replicate(params), **guidance_of(row))
  streams = is_streamed(row)
  part = _stream_round if streams else _lockstep_round

  def run(index_DxU: np.ndarray, **changes) -> tuple[sampler.Result, int]:
    changed = row.copy_and_resolve_references()
    changed.update(changes)
    return part(changed, model, field_fn, label_N, index_DxU, batching)

  ways = batching.ways
  rounds = [numbers[i : i + ways] for i in range(0, len(numbers), ways)]
  if rounds:  # compiles: all rounds have one shape
    shortest = _round(rounds[0], size, len(label_N), ways)[:, : None if streams else batching.batch_size]
    run(shortest, **({"max_evaluations": 1, "min_evaluations": 0} if is_descent(row) else {}))
  total = sum(len(label_N[number * size : (number + 1) * size]) for number in numbers)
  evaluations, done = 0, 0
  with tqdm.tqdm(total=total, desc=name, unit="image", disable=None) as bar:
    for together in rounds:
      index_DxU = _round(together, size, len(label_N), ways)
      present_D = [int(present) for present in np.sum(index_DxU >= 0, axis=1)]
      begin = time.monotonic()
      result_DxU, hardware = run(index_DxU)
      seconds = time.monotonic() - begin
      units = []
      for device, number in enumerate(together):
        count = present_D[device]
        own = jax.tree.map(lambda leaf, d=device, n=count: leaf[d, :n], result_DxU)
        share = count / sum(present_D)
        units.append((number, Drawn(own, seconds * share, hardware * share)))
      done += sum(present_D)
      evaluations += sum(drawn.result.evaluations_B.sum() for _, drawn in units)
      bar.set_postfix(evaluations=f"{evaluations / done:.0f}", refresh=False)
      bar.update(sum(present_D))
      yield from units


def joined(parts: Iterator[Drawn]) -> Drawn:
  """Units in their order as one series."""
  parts = list(parts)
  result = jax.tree.map(lambda *leaves: np.concatenate(leaves), *(part.result for part in parts))
  return Drawn(result, sum(part.seconds for part in parts), sum(part.hardware_evaluations for part in parts))


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
  size, parts = min(batching.batch_size * batching.ways, count + -count % batching.ways), []
  with tqdm.tqdm(total=count, desc=name, unit="image", disable=None) as bar:
    for first in range(0, count, size):
      index = np.arange(first, min(first + size, count))
      part = jax.device_get(function(np.resize(index, size)))
      parts.append(jax.tree.map(lambda leaf, n=len(index): leaf[:n], part))
      bar.update(len(index))
  return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def _round(numbers: Sequence[int], size: int, count: int, ways: int) -> np.ndarray:
  """The samples that the devices draw at one time, [D, U], −1 where there is none."""
  index_DxU = np.full((ways, size), -1, np.int32)
  for device, number in enumerate(numbers):
    index = np.arange(number * size, min((number + 1) * size, count))
    index_DxU[device, : len(index)] = index
  return index_DxU


def _stream_round(row, model, field_fn, label_N, index_DxU: np.ndarray, batching: Batching):
  """One queue on each device; → a `Result` of arrays [D, U, ...], and the evaluations that the hardware did."""
  result = streaming.descend_stream(
    field_fn,
    jnp.asarray(label_N[np.maximum(index_DxU, 0).reshape(-1)]),
    shape=model.input_shape,
    slots=min(batching.batch_size, index_DxU.shape[1]) * batching.ways,
    threshold=row.threshold,
    mesh=devices.local_mesh(),
    index_N=index_DxU.reshape(-1),
    **_settings(row, batching),
    **_numbers(row),
  )
  plain = sampler.Result(result.x, result.evaluations_B, result.norm_B, result.status_B, result.restarts_B)
  plain, hardware = jax.device_get((plain, result.hardware_evaluations))
  return jax.tree.map(lambda leaf: leaf.reshape(*index_DxU.shape, *leaf.shape[1:]), plain), int(hardware)


def _lockstep_round(row, model, field_fn, label_N, index_DxU: np.ndarray, batching: Batching):
  """The same, one batch after the other on each device. A place without a sample draws another place's again."""
  ways, size, results, hardware = batching.ways, min(batching.batch_size, index_DxU.shape[1]), [], 0
  for first in range(0, int(np.sum(index_DxU >= 0, axis=1).max()), size):
    index_Dxb = np.full((ways, size), -1, np.int32)
    part = index_DxU[:, first : first + size]
    index_Dxb[:, : part.shape[1]] = part
    index_B = np.where(index_Dxb < 0, index_Dxb.max(), index_Dxb).reshape(-1)
    label_B, index_B = batching.place((jnp.asarray(label_N[index_B]), jnp.asarray(index_B)))
    # Of indices that lie on the devices: each device makes the noise of its samples.
    noise = batching.place(sampler.start_noise(batching.key, index_B, model.input_shape))
    result = jax.device_get(_lockstep(row, model, field_fn, label_B, index_B, noise, batching))
    results.append(jax.tree.map(lambda leaf: leaf.reshape(ways, size, *leaf.shape[1:]), result))
    hardware += int(result.evaluations_B.max()) * len(index_B)
  return jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1), *results), hardware


def _lockstep(row, model, field_fn, label_B, index_B, noise, batching: Batching) -> sampler.Result:
  if is_descent(row):
    return descend_row(row, field.BoundField(field_fn, label_B), noise, batching, index_B=index_B)
  options = _integration(row, model)
  integrated = integrators.integrate(field_fn, noise, label_B, key=batching.key, index_B=index_B, **options)
  zeros_B = jnp.zeros(len(index_B), jnp.int32)
  unknown_B = jnp.full(len(index_B), jnp.nan)  # an integrator asks for no gradient where it ends
  return sampler.Result(integrated.x, integrated.evaluations_B, unknown_B, integrated.status_B, zeros_B)


def guidance_of(row: ml_collections.ConfigDict) -> dict[str, Any]:
  """The row's arguments of a field."""
  return {
    "guidance": row.guidance,
    "guidance_channels": row.guidance_channels or None,
    "guidance_interval": row.guidance_interval or None,
  }


def step_size_of(row: ml_collections.ConfigDict, batching: Batching) -> float:
  """η of a descent, with "auto" resolved."""
  return row.step_size or sampler.AUTO_LENGTH / (batching.multiplier * row.max_evaluations)


def _settings(row, batching: Batching) -> dict[str, Any]:
  return {
    "rule": row.rule,
    "step_size": step_size_of(row, batching),
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


def warn(name: str, row, result: sampler.Result):
  """Tells of samples that diverged, or did not reach their threshold."""
  diverged = np.mean(result.status_B == sampler.DIVERGED)
  if diverged:
    log.warning("%s: %.1f %% of the samples diverged: try a smaller step_size", name, 100 * diverged)
  spent = np.mean(result.status_B == sampler.BUDGET)
  if is_descent(row) and row.threshold and spent:
    text = "%s: %.1f %% of the samples spent max_evaluations = %d above the threshold %g"
    log.warning(text, name, 100 * spent, row.max_evaluations, row.threshold)


def balanced_labels(count: int, num_classes: int, seed: int = 0) -> np.ndarray:
  """0, 1, ... repeating, whatever the seed; without classes, the null class."""
  return np.arange(count, dtype=np.int32) % max(1, num_classes)


def random_labels(count: int, num_classes: int, seed: int) -> np.ndarray:
  """Each class as likely as any other, as in the reference; the first of a longer series are these."""
  return np.random.default_rng(seed).integers(max(1, num_classes), size=count, dtype=np.int32)


LABELS = {"balanced": balanced_labels, "random": random_labels}
