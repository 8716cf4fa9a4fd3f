"""Samples from a model: by descents with continuous or static batching, or by an integrator."""

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from eqm_jax import distributed
from eqm_jax.checkpoints import readouts
from eqm_jax.checks import at_least, one_of
from eqm_jax.data.codec import Codec
from eqm_jax.equilibrium import field as field_lib
from eqm_jax.equilibrium import ode, sampler, streaming, update_rules
from eqm_jax.equilibrium.noise_level import NoiseReadout
from eqm_jax.equilibrium.pytrees import check_labels
from eqm_jax.networks.dit import DiT
from eqm_jax.progress import Progress, waiting
from eqm_jax.sampling import labels as labels_lib
from eqm_jax.trees import fingerprint

STREAM_LENGTH = 16  # samples per slot in one stream: more of them hide the progress, fewer leave slots idle at the end
BATCHING = ("continuous", "static")

log = logging.getLogger(__name__)

Row = ml_collections.ConfigDict  # one of a config's `samplers`


@dataclasses.dataclass(frozen=True)
class Samples:
  """Samples in the order of their labels, as numpy arrays, and their cost."""

  result: sampler.Result
  seconds: float  # without compilation
  executed_nfe: float  # samples that passed through the network, those of idle slots included

  @classmethod
  def concatenate(cls, parts: Iterable["Samples"]) -> "Samples":
    """Consecutive samples as one."""
    parts = list(parts)
    result = jax.tree.map(lambda *leaves: np.concatenate(leaves), *(part.result for part in parts))
    return cls(result, sum(part.seconds for part in parts), sum(part.executed_nfe for part in parts))


@dataclasses.dataclass(frozen=True, eq=False)
class Generator:
  """A model to sample from, and how: random key, batch size, decoder. Samples are split over this process's devices.

  What is sampled is a row of a config's `samplers` and one label per sample.
  """

  model: DiT
  params: Any = dataclasses.field(repr=False)  # None: nothing can be sampled yet, but rows can be checked
  key: jax.Array  # the random numbers of sample i depend on (key, i) alone
  batch_size: int  # samples in flight on each device
  multiplier: float  # λ of the field
  auto_length: float = sampler.AUTO_LENGTH  # λ·η·NFE of the step size "auto"; it depends on c(γ)
  decoder: Codec | None = None  # turns latents into images; None: the samples are shown as they are
  class_names: Sequence[str] | None = None  # shown beside labels; None: they have none

  @property
  def num_devices(self) -> int:
    """Number of devices that samples are split over."""
    return jax.local_device_count()

  @functools.cached_property
  def autoencoder_id(self) -> str:
    """Name and SHA-256 of the decoder; "" without one."""
    return "{name} {sha256}".format(**self.decoder.autoencoder_id) if self.decoder else ""

  @property
  def decoder_dtype(self) -> str:
    """Type of the decoder's convolutions; "" without one."""
    return self.decoder.module.dtype if self.decoder else ""

  @functools.cached_property
  def params_sha256(self) -> str | None:
    """Fingerprint of the parameters; None without them."""
    return None if self.params is None else fingerprint(self.params)

  @functools.cached_property
  def image_shape(self) -> tuple[int, int, int]:
    """(H, W, C) of a sample as it is shown."""
    return self.decoder.image_shape(self.model.input_shape) if self.decoder else self.model.input_shape

  @functools.cached_property
  def label_names(self) -> list[str]:
    """Words for the labels, the null class at the end."""
    return labels_lib.names(self.model.num_classes, self.class_names)

  def captions(self, label_N: Sequence[int]) -> list[str] | None:
    """Words for labels, below pictures; None where their classes have no names."""
    if self.class_names is None or np.all(np.asarray(label_N) == self.model.num_classes):
      return None
    return [self.label_names[label] for label in label_N]

  def pixels(self, x: np.ndarray) -> np.ndarray:
    """Samples [N, H, W, C] as they are shown: latents decoded to uint8, anything else unchanged."""
    return self.decoder.decode(np.asarray(x)) if self.decoder else x

  def shard(self, tree: Any) -> Any:
    """Arrays [B, ...] split over the devices along their first axis."""
    return distributed.shard(tree)

  def noise(self, index: np.ndarray) -> jax.Array:
    """Start noise of samples, [B, H, W, C]."""
    return sampler.start_noise(self.key, index, self.model.input_shape)

  @functools.cached_property
  def _replicated_params(self) -> Any:
    return distributed.replicate(self.params)

  def field(self, row: Row | None = None) -> field_lib.Field:
    """The model's field, (x, labels) → f, with the guidance of a row; → (f, γ̂) where the row stops by γ̂."""
    return field_lib.field(self.model, self._replicated_params, **(self.field_options(row) if row else {}))

  def field_options(self, row: Row) -> dict[str, Any]:
    """Arguments of `equilibrium.field` for a row.

    Raises:
      ValueError: if its read-out cannot be read, or is of another model.
    """
    return {
      "guidance": row.guidance,
      "guidance_channels": row.guidance_channels,
      "guidance_interval": row.guidance_interval,
      "readout": self.readout(row),
    }

  def readout(self, row: Row) -> NoiseReadout | None:
    """The read-out that stops the samples of a row; None for a row that stops by ‖f‖.

    Raises:
      ValueError: if it cannot be read, or is of another model.
    """
    return readouts.read(row.readout, self.model, self.params_sha256) if stops_by_gamma(row) else None

  def step_size(self, row: Row) -> float:
    """η of a descent, with "auto" resolved."""
    return self.auto_length / (self.multiplier * row.max_nfe) if row.step_size == "auto" else row.step_size

  def descent_options(self, row: Row) -> dict[str, Any]:
    """Arguments of `equilibrium.descend` for a row."""
    return {
      "rule": row.rule,
      "step_size": self.step_size(row),
      "momentum": row.momentum,
      "temperature": row.temperature,
      "key": self.key,
      "multiplier": self.multiplier if row.relative_threshold else 1.0,
      "threshold": row.threshold or 0.0,
      "stop": row.stop,
      "max_nfe": row.max_nfe,
      "min_nfe": row.min_nfe,
      "max_restarts": row.max_restarts,
    }

  def descend(self, row: Row, start: jax.Array, field: Callable, **options) -> sampler.Result:
    """One static batch from `start`, [B, ...]; `options` go to `equilibrium.descend`."""
    return sampler.descend(field, start, **self.descent_options(row), **options)

  def check(self, name: str, row: Row):
    """Refuses a row that the model cannot be sampled with.

    Raises:
      ValueError: naming the row and the value.
    """
    one_of(f"samplers.{name}.rule", row.rule, [*update_rules.RULES, *ode.SOLVERS])
    one_of(f"samplers.{name}.batching", row.batching, BATCHING)
    at_least("batch_size", self.batch_size, 1)
    if self.model.time_input and is_descent(row):
      raise ValueError(
        f"samplers.{name}.rule = {row.rule!r} descends a field without time, but this model takes the time as an "
        f"input: choose one of {', '.join(ode.SOLVERS)}, or set evaluation.num_samples = None"
      )
    try:
      _check_stop(row)
      field_lib.field(self.model, {}, **self.field_options(row))
      if is_descent(row):
        options = self.descent_options(row)
        sampler.check_threshold(options.pop("threshold"), 1, row.stop)
        sampler.make_policy(**options, example=jax.ShapeDtypeStruct(self.model.input_shape, jnp.float32))
      else:
        ode.check(**_integration(row, self.model), key=self.key)
    except ValueError as error:
      raise ValueError(f"samplers.{name}: {error}") from error

  def samples(self, name: str, row: Row, labels: np.ndarray) -> Samples:
    """One sample per label, [N]; `name` is that of the row."""
    size = self.batch_size * (STREAM_LENGTH if is_continuous(row) else 1)
    size = min(size, -(-len(labels) // self.num_devices))
    chunks = self.chunks(name, row, labels, size, range(-(-len(labels) // size)))
    samples = Samples.concatenate(chunk for _, chunk in chunks)
    warn_unfinished(name, row, samples.result)
    return samples

  def chunks(
    self, name: str, row: Row, labels: np.ndarray, chunk_size: int, numbers: Sequence[int]
  ) -> Iterator[tuple[int, Samples]]:
    """Some chunks of a sample set, with their progress.

    Chunk c holds the samples c·chunk_size to (c + 1)·chunk_size − 1, the last one the rest. One device samples a whole
    chunk, by a program whose shapes depend on `chunk_size` and the batch size alone: the bits of a sample depend
    neither on the number of devices nor on which chunks are sampled together.

    Args:
      name: of the row, for the progress.
      row: of the config's samplers.
      labels: of the whole sample set, [N].
      chunk_size: samples in a chunk.
      numbers: of the chunks to sample.

    Yields:
      The number of a chunk, and its samples. Chunks that are sampled at the same time share the time.
    """
    check_labels(labels, self.model.num_classes)
    field = self.field(row)
    run_round = _continuous_round if is_continuous(row) else _static_round
    rounds = [numbers[i : i + self.num_devices] for i in range(0, len(numbers), self.num_devices)]
    if rounds:  # all rounds have the shapes of the first, which a budget of one evaluation compiles
      index_DxU = self._round_index(rounds[0], chunk_size, len(labels))
      index_DxU = index_DxU if is_continuous(row) else index_DxU[:, : self.batch_size]
      with waiting(f"{name}: compiling"):
        run_round(self, _shortest(row), field, labels, index_DxU)
    total = sum(len(labels[number * chunk_size : (number + 1) * chunk_size]) for number in numbers)
    nfe, done = 0, 0
    with Progress(total=total, desc=name, unit="image") as bar:
      for together in rounds:
        index_DxU = self._round_index(together, chunk_size, len(labels))
        begin = time.monotonic()
        result, executed_nfe = run_round(self, row, field, labels, index_DxU)
        chunks = _split_round(result, index_DxU, time.monotonic() - begin, executed_nfe)
        nfe += sum(int(chunk.result.nfe.sum()) for chunk in chunks)
        done += int(np.sum(index_DxU >= 0))
        bar.set_postfix(nfe=f"{nfe / done:.0f}")
        bar.update(int(np.sum(index_DxU >= 0)))
        yield from zip(together, chunks)

  def in_batches(self, name: str, function: Callable, count: int) -> Any:
    """Applies a function to the indices 0 to count − 1 in batches of one size, with progress.

    Args:
      name: description of the progress.
      function: indices [B], numpy → a tree of arrays [B, ...].
      count: number of indices.

    Returns:
      The tree, as numpy arrays [count, ...].
    """
    size = min(self.batch_size, -(-count // self.num_devices))
    return distributed.in_batches(lambda index: function(np.asarray(index)), np.arange(count), size, progress=name)

  def _round_index(self, numbers: Sequence[int], chunk_size: int, count: int) -> np.ndarray:
    """Indices of the samples that the devices take in one round, [D, U]; −1 fills up."""
    index_DxU = np.full((self.num_devices, chunk_size), -1, np.int32)
    for device, number in enumerate(numbers):
      index = np.arange(number * chunk_size, min((number + 1) * chunk_size, count))
      index_DxU[device, : len(index)] = index
    return index_DxU


def is_descent(row: Row) -> bool:
  """Whether a row descends; otherwise it integrates."""
  return row.rule in update_rules.RULES


def is_continuous(row: Row) -> bool:
  """Whether a row takes continuous batching: where all samples stop together, there is nothing for it to do."""
  return bool(is_descent(row) and row.batching == "continuous" and (row.threshold or row.max_restarts))


def stops_by_gamma(row: Row) -> bool:
  """Whether the samples of a row stop by the γ̂ of a read-out."""
  return row.stop == "gamma"


def stop_condition(row: Row) -> str:
  """Where a sample of a descent with a threshold stops, in symbols."""
  if stops_by_gamma(row):
    return f"γ̂ ≥ {row.threshold:g}"
  return f"{'‖f‖/λ' if row.relative_threshold else '‖f‖'} ≤ {row.threshold:g}"


def _check_stop(row: Row):
  """Refuses keys of a row that do not go together with what its threshold is compared with."""
  one_of("stop", row.stop, sampler.STOPS)
  if not stops_by_gamma(row):
    if row.readout is not None:
      raise ValueError(f"readout = {row.readout!r} has no effect with stop = {row.stop!r}: set stop = 'gamma', or None")
    return
  if not is_descent(row):
    raise ValueError(f"stop = 'gamma' is for rules that descend, but rule = {row.rule!r} integrates: set stop = 'norm'")
  if row.relative_threshold:
    raise ValueError("relative_threshold = True divides ‖f‖ by λ, but stop = 'gamma': set relative_threshold = False")
  if row.readout is None:
    raise ValueError("stop = 'gamma', but readout = None: fit one with --mode=readout, and give its readout.npz")


def warn_unfinished(name: str, row: Row, result: sampler.Result):
  """Warns of samples that diverged or did not reach their threshold."""
  diverged = np.mean(result.status == sampler.Status.DIVERGED)
  if diverged:
    log.warning("%s: %.1f %% of the samples diverged: try a smaller step_size", name, 100 * diverged)
  unfinished = np.mean(result.status == sampler.Status.BUDGET)
  if is_descent(row) and row.threshold and unfinished:
    text = "%s: %.1f %% of the samples spent max_nfe = %d %s the threshold %g"
    side = "below" if stops_by_gamma(row) else "above"
    log.warning(text, name, 100 * unfinished, row.max_nfe, side, row.threshold)


def _shortest(row: Row) -> Row:
  """The row with a budget of one evaluation: the same program, which ends at once."""
  if not is_descent(row):
    return row
  shortest = row.copy_and_resolve_references()
  shortest.update({"max_nfe": 1, "min_nfe": 0})
  return shortest


def _split_round(result, index_DxU: np.ndarray, seconds: float, executed_nfe: int) -> list[Samples]:
  """The samples of each device; time and executed evaluations are shared by their numbers."""
  count_D = np.sum(index_DxU >= 0, axis=1)
  chunks = []
  for device, count in enumerate(count_D):
    own = jax.tree.map(lambda leaf, d=device, n=count: leaf[d, :n], result)
    share = float(count / count_D.sum())
    chunks.append(Samples(own, seconds * share, executed_nfe * share))
  return chunks


def _continuous_round(generator: Generator, row: Row, field, labels: np.ndarray, index_DxU: np.ndarray):
  """One queue on each device: a `Result` of arrays [D, U, ...], and the executed evaluations."""
  result = streaming.descend_stream(
    field,
    jnp.asarray(labels[np.maximum(index_DxU, 0).reshape(-1)]),
    shape=generator.model.input_shape,
    slots=min(generator.batch_size, index_DxU.shape[1]) * generator.num_devices,
    mesh=distributed.local_mesh(),
    index=index_DxU.reshape(-1),
    **generator.descent_options(row),
  )
  executed_nfe = int(result.executed_nfe)
  result = jax.device_get(result.replace(executed_nfe=None))
  return jax.tree.map(lambda leaf: leaf.reshape(*index_DxU.shape, *leaf.shape[1:]), result), executed_nfe


def _static_round(generator: Generator, row: Row, field, labels: np.ndarray, index_DxU: np.ndarray):
  """The same, one batch after the other on each device. A place without a sample repeats another one."""
  D, size, results, executed_nfe = generator.num_devices, min(generator.batch_size, index_DxU.shape[1]), [], 0
  for first in range(0, int(np.sum(index_DxU >= 0, axis=1).max()), size):
    index_DxB = np.full((D, size), -1, np.int32)
    part = index_DxU[:, first : first + size]
    index_DxB[:, : part.shape[1]] = part
    index_B = np.where(index_DxB < 0, index_DxB.max(), index_DxB).reshape(-1)
    label_B, index_B = generator.shard((jnp.asarray(labels[index_B]), jnp.asarray(index_B)))
    result = jax.device_get(_static_batch(generator, row, field, label_B, index_B))
    results.append(jax.tree.map(lambda leaf: leaf.reshape(D, size, *leaf.shape[1:]), result))
    executed_nfe += int(result.nfe.max()) * len(index_B)
  return jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1), *results), executed_nfe


def _static_batch(generator: Generator, row: Row, field, label_B: jax.Array, index_B: jax.Array) -> sampler.Result:
  """One batch, until its slowest sample is done."""
  # Of indices that lie on the devices: each device makes the noise of its samples.
  noise = generator.shard(generator.noise(index_B))
  if is_descent(row):
    return generator.descend(row, noise, field.bind(label_B), index=index_B)
  options = _integration(row, generator.model)
  return ode.integrate(field, noise, label_B, key=generator.key, index=index_B, **options)


def _integration(row: Row, model: DiT) -> dict[str, Any]:
  """Arguments of `equilibrium.integrate`: with a tolerance the solver chooses its steps, otherwise the budget does."""
  options = {"solver": row.rule, "time_conditional": model.time_input}
  if row.tolerance is not None:
    return options | {"rtol": row.tolerance, "atol": row.tolerance}
  return options | {"steps": row.max_nfe // ode.SOLVERS[row.rule].stages}
