"""Cases of the network: forward pass, training step, evaluations of the field, and batching of whole descents."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from eqm_jax.benchmark import measure
from eqm_jax.benchmark.results import Row
from eqm_jax.checkpoints.pretrained import Pretrained
from eqm_jax.data.codec import Codec
from eqm_jax.equilibrium import field as field_lib
from eqm_jax.equilibrium import meshes, objective, sampler, streaming
from eqm_jax.networks import flops
from eqm_jax.networks.dit import DiT
from eqm_jax.sampling import generator as generator_lib
from eqm_jax.sampling import labels as labels_lib
from eqm_jax.sampling.generator import Generator
from eqm_jax.training import sharding
from eqm_jax.training import state as state_lib
from eqm_jax.training import step as step_lib

DESCENT_NFE = 20  # of the descent in which one evaluation is timed
GUIDANCE = 1.5
# Without a trained model, samples stop after normally distributed fractions of the budget. Mean and deviation are those
# of the trained digits model at ‖f‖ ≤ 4: NFE 108 ± 7.4 of 249.
STOPPING_MEAN, STOPPING_DEVIATION = 0.435, 0.03
STEP_SIZE = 0.003  # of the synthetic descents
NOISE_BATCH = 256  # samples whose start noise is made at a time


class NotApplicable(Exception):
  """A case that a config does not have, with the reason."""


@dataclasses.dataclass
class Workspace:
  """A config, the devices, and what the cases make of them on first use."""

  config: ml_collections.ConfigDict
  devices: Sequence[jax.Device]
  directory: str  # for temporary files
  trained: Pretrained | None = None  # the model whose stopping times are measured; None: synthetic ones
  codec: Codec | None = None  # the config's autoencoder; None: there is none, or its weights are not at hand

  @property
  def turns(self) -> int:
    return self.config.benchmark.turns

  @functools.cached_property
  def model(self) -> DiT:
    return DiT(**self.config.model)

  @property
  def batch_size(self) -> int:
    """Samples in flight on each device."""
    batch_size = self.config.benchmark.batch_size
    return self.config.evaluation.batch_size if batch_size is None else batch_size

  @functools.cached_property
  def sample_mesh(self) -> Mesh:
    """All devices along one axis, as samplers use them."""
    return Mesh(np.asarray(self.devices), ("data",), axis_types=(AxisType.Auto,))

  @functools.cached_property
  def mesh(self) -> Mesh:
    """The mesh of training."""
    return sharding.make_mesh(**self.config.mesh, devices=self.devices)

  @functools.cached_property
  def optimizer(self) -> Any:
    return state_lib.make_optimizer(self.config.optimizer, self.config.train.steps)

  @property
  def _init_state(self) -> Callable[[], state_lib.TrainState]:
    return functools.partial(state_lib.init_state, self.model, self.optimizer, self.config.seed)

  @functools.cached_property
  def state_shapes(self) -> state_lib.TrainState:
    return jax.eval_shape(self._init_state)

  @functools.cached_property
  def shardings(self) -> Any:
    return sharding.state_shardings(self.state_shapes, self.config.sharding, self.mesh)

  @functools.cached_property
  def init_state(self) -> Callable[[], state_lib.TrainState]:
    """Makes a new training state, sharded as in a run."""
    return jax.jit(self._init_state, out_shardings=self.shardings)

  @functools.cached_property
  def params(self) -> Any:
    """Untrained parameters on every device; the output layer is zero."""
    return self.replicate(self.init_state().params)

  @functools.cached_property
  def step_program(self) -> measure.Program:
    """The compiled training step of a run on pixels or on a cache of latents."""
    step = step_lib.make_step(self.config, self.model, self.optimizer, self.mesh, self.shardings)
    state = jax.tree.map(lambda leaf, placed: leaf.update(sharding=placed), self.state_shapes, self.shardings)
    return measure.compile_program(step, state, self.training_batch(), None)

  def training_batch(self) -> dict[str, jax.Array]:
    """A batch of noise in the form of the config's data set."""
    size = self.config.train.batch_size
    placed = sharding.batch_sharding(self.mesh, size, self.config.train.grad_accum_steps)
    rng = np.random.default_rng(0)
    image = rng.standard_normal((size, *self.model.input_shape), np.float32)
    batch = {"mean": image, "logvar": image - 3} if self.config.autoencoder.path else {"image": image}
    label = rng.integers(max(1, self.model.num_classes), size=size, dtype=np.int32)
    return jax.device_put({**batch, "label": label}, placed)

  def replicate(self, tree: Any) -> Any:
    """Arrays on every device."""
    return jax.device_put(jax.device_get(tree), NamedSharding(self.sample_mesh, PartitionSpec()))

  def shard(self, tree: Any) -> Any:
    """Arrays split over the devices along their first axis."""
    return jax.device_put(tree, NamedSharding(self.sample_mesh, PartitionSpec("data")))

  def noise_and_labels(self) -> tuple[jax.Array, jax.Array]:
    """A batch to evaluate the field on."""
    count = self.batch_size * len(self.devices)
    noise = sampler.start_noise(jax.random.key(0), jnp.arange(count), self.model.input_shape)
    return self.shard((noise, jnp.asarray(balanced_labels(count, self.model.num_classes))))


def balanced_labels(count: int, num_classes: int) -> np.ndarray:
  """Labels of samples that are timed: every class in turn."""
  return labels_lib.parse("benchmark", "balanced", count, num_classes)


def forward(w: Workspace) -> list[Row]:
  """The network alone."""

  def apply(params, x, label):
    gamma = (jnp.zeros(len(x)),) if w.model.time_input else ()
    return w.model.apply({"params": params}, x, label, *gamma)

  x, label = w.noise_and_labels()
  with meshes.known_devices(x, w.params):  # as in a descent
    program = measure.compile_program(apply, w.params, x, label)
  timing, _ = measure.timed(program.call, w.params, x, label, turns=w.turns)
  about = f"the network on {_batch(w)}"
  return [Row("forward", about, "pass", timing, program, **_work(w, len(x), flops.forward(w.model)))]


def training_step(w: Workspace, name: str = "training step") -> list[Row]:
  """The step of a training run, which donates its state, on a batch that is on the devices already."""
  program, batch = w.step_program, w.training_batch()
  if not measure.fits(program.bytes, measure.available_memory(w.devices)):
    raise NotApplicable(f"the {name} needs {program.bytes / 2**30:.2f} GiB on each device, more than is available")
  timing, _ = measure.timed(program.call, w.init_state(), batch, None, turns=w.turns, carry=True)
  size = w.config.train.batch_size
  about = f"a batch of {size}, remat {w.config.model.remat}: loss, gradient, AdamW, average"
  return [Row(name, about, "step", timing, program, **_work(w, size, flops.training(w.model)))]


def evaluation(w: Workspace) -> list[Row]:
  """One evaluation of the field inside a descent."""
  _check_descends(w)
  return [_evaluation(w, "evaluation", f"a descent from {_batch(w)}")]


def guided_evaluation(w: Workspace) -> list[Row]:
  """The same with classifier-free guidance: twice the batch."""
  _check_descends(w)
  if not w.model.num_classes:
    raise NotApplicable("the model has no classes")
  return [_evaluation(w, "guided evaluation", f"the same with guidance {GUIDANCE}", GUIDANCE)]


def _evaluation(w: Workspace, name: str, about: str, guidance: float = 1.0) -> Row:
  nfe = min(DESCENT_NFE, w.config.benchmark.nfe)

  def descent(params, x, label):
    field = field_lib.field(w.model, params, label, guidance=guidance)
    return sampler.descend(field, x, step_size=STEP_SIZE, max_nfe=nfe).x

  x, label = w.noise_and_labels()
  with meshes.known_devices(x, w.params):
    program = measure.compile_program(descent, w.params, x, label)
  timing, _ = measure.timed(program.call, w.params, x, label, turns=w.turns)
  about = f"{about}, NFE {nfe}, time of one evaluation"
  work = _work(w, len(x), flops.evaluation(w.model, guided=guidance != 1))
  return Row(name, about, "evaluation", timing.divided(nfe), program, **work)


def energy_cases(w: Workspace) -> list[Row]:
  """Training step and energy gradient of EqM-E: the same network as the energy x·f(x)."""
  _check_descends(w)
  config = w.config.copy_and_resolve_references()
  config.model.energy, config.objective.kind, config.objective.dispersive_weight = "dot", "equilibrium", 0.0
  energy = dataclasses.replace(w, config=config)
  steps = training_step(energy, "EqM-E training step")
  about = f"the gradient of x·f(x) in a descent from {_batch(w)}"
  return [*steps, _evaluation(energy, "EqM-E energy gradient", about)]


def batching(w: Workspace) -> list[Row]:
  """Whole descents: with a fixed NFE, and adaptive ones by static and by continuous batching."""
  _check_descends(w)
  slots = w.batch_size * len(w.devices)
  count = -(-w.config.benchmark.num_samples // slots) * slots
  descents = _trained_descents(w, count) or _synthetic_descents(w, count)
  fixed = dataclasses.replace(descents, thresholds=np.zeros(count, np.float32))
  return [
    _batching_row(w, "fixed", _static, fixed, "every sample spends its budget"),
    _batching_row(w, "static batching", _static, descents, "a batch waits for its slowest sample"),
    _batching_row(w, "continuous batching", _continuous, descents, "a finished sample's slot takes the next one"),
  ]


@dataclasses.dataclass(frozen=True)
class Descents:
  """Samples to descend to, and where each of them stops."""

  field: Callable  # (x, labels) → f
  labels: np.ndarray
  thresholds: np.ndarray
  options: dict[str, Any]  # of `descend`: key, step size, budget, ...
  flops: int  # of one evaluation of one sample
  origin: str  # of the stopping times


@flax.struct.dataclass
class SyntheticField:
  """x plus an untrained network, whose output is zero but takes its time: ‖f‖ falls by 1 − η per step."""

  network: field_lib.Field

  def __call__(self, x: jax.Array, labels: jax.Array, gamma: jax.Array | None = None) -> jax.Array:
    return x + self.network(x, labels, gamma)


def _synthetic_descents(w: Workspace, count: int) -> Descents:
  """Descents of prescribed lengths: the field is x, and a threshold the norm of x after a random number of steps."""
  key, max_nfe = jax.random.key(0), w.config.benchmark.nfe
  fractions = np.random.default_rng(0).normal(STOPPING_MEAN, STOPPING_DEVIATION, count)
  nfe_N = np.clip(np.rint(fractions * max_nfe), 1, max_nfe)
  index_N = jnp.arange(count)
  noise = [
    np.asarray(sampler.start_noise(key, index_N[first : first + NOISE_BATCH], w.model.input_shape))
    for first in range(0, count, NOISE_BATCH)
  ]
  norm_N = np.concatenate([np.linalg.norm(batch.reshape(len(batch), -1), axis=1) for batch in noise])
  # Evaluation k sees the norm after k − 1 steps; the threshold lies half a step above it.
  threshold_N = norm_N * (1 - STEP_SIZE) ** (nfe_N - 1.5)
  return Descents(
    field=SyntheticField(field_lib.field(w.model, w.params)),
    labels=balanced_labels(count, w.model.num_classes),
    thresholds=threshold_N.astype(np.float32),
    options={"key": key, "step_size": STEP_SIZE, "max_nfe": max_nfe},
    flops=flops.evaluation(w.model),
    origin=f"synthetic stopping times, {STOPPING_MEAN} ± {STOPPING_DEVIATION} of the budget, as of the trained digits",
  )


def _trained_descents(w: Workspace, count: int) -> Descents | None:
  """Descents of the trained model by the config's first sampler with a threshold; None without one of both."""
  adaptive = [name for name, row in w.config.samplers.items() if generator_lib.is_descent(row) and row.threshold]
  if w.trained is None or not adaptive:
    return None
  name, row = adaptive[0], w.config.samplers[adaptive[0]]
  key = state_lib.stream_key(w.config.evaluation.seed, "samples")
  schedule = objective.schedule_of(w.config.objective)
  length = sampler.auto_length(schedule)
  generator = Generator(w.trained.model, w.trained.params, key, w.batch_size, schedule.multiplier, length)
  options = generator.descent_options(row)
  threshold = options.pop("threshold")
  return Descents(
    field=generator.field(row),
    labels=balanced_labels(count, w.trained.model.num_classes),
    thresholds=np.full(count, threshold, np.float32),
    options=options,
    flops=flops.evaluation(w.trained.model, guided=row.guidance != 1),
    origin=f"the trained model of step {w.trained.step}, sampler {name}, threshold {threshold:g}",
  )


def _static(w: Workspace, descents: Descents, slots: int, **changes) -> tuple[np.ndarray, int]:
  """Descends one batch after another; → (NFE of each sample, executed NFE of all)."""
  options, nfe, executed = {**descents.options, **changes}, [], 0
  for first in range(0, len(descents.labels), slots):
    batch = slice(first, first + slots)
    index = jnp.arange(first, first + slots)
    noise = sampler.start_noise(options["key"], index, w.model.input_shape)
    noise, labels, index, threshold = w.shard((noise, descents.labels[batch], index, descents.thresholds[batch]))
    result = sampler.descend(descents.field, noise, labels, threshold=threshold, index=index, **options)
    nfe.append(np.asarray(jax.device_get(result).nfe))
    executed += int(nfe[-1].max()) * slots
  return np.concatenate(nfe), executed


def _continuous(w: Workspace, descents: Descents, slots: int, **changes) -> tuple[np.ndarray, int]:
  """Descends all samples through the slots; → (NFE of each sample, executed NFE of all)."""
  result = streaming.descend_stream(
    descents.field,
    jnp.asarray(descents.labels),
    shape=w.model.input_shape,
    slots=slots,
    threshold=descents.thresholds,
    mesh=w.sample_mesh,
    **{**descents.options, **changes},
  )
  result = jax.device_get(result)
  return np.asarray(result.nfe), int(result.executed_nfe)


def _batching_row(w: Workspace, name: str, descend: Callable, descents: Descents, text: str) -> Row:
  run = functools.partial(descend, w, descents, w.batch_size * len(w.devices))
  begin = time.perf_counter()
  run(max_nfe=1)  # compiles: the budget is an argument of the program
  compile_seconds = time.perf_counter() - begin
  timing, (nfe_N, executed) = measure.timed(run, turns=min(w.turns, 3), warm_up=False)
  count = len(nfe_N)
  about = f"{count} samples, {w.batch_size} in flight, budget {descents.options['max_nfe']}: {text}"
  about += "" if name == "fixed" else f" ({descents.origin})"
  details = {
    "nfe": float(np.mean(nfe_N)),
    "nfe_quantiles": [float(value) for value in np.quantile(nfe_N, (0.1, 0.9))],
    "executed_nfe": executed / count,
    "utilisation": float(np.sum(nfe_N)) / executed,
  }
  work = _work(w, count, descents.flops * executed / count)
  return Row(name, about, "run", timing, compile_seconds=compile_seconds, details=details, **work)


def _work(w: Workspace, images: int, operations: float) -> dict[str, Any]:
  """The entries of a row about its arithmetic, `operations` for each of the images."""
  return {"images": images, "flops": images * operations, "flops_by": "formula", "precision": w.config.model.dtype}


def _batch(w: Workspace) -> str:
  devices = f" on each of {len(w.devices)} devices" if len(w.devices) > 1 else ""
  return f"{w.batch_size} samples{devices} of {math.prod(w.model.input_shape)} numbers"


def _check_descends(w: Workspace):
  if w.model.time_input:
    raise NotApplicable("the model takes the time as an input: it is integrated, not descended")
