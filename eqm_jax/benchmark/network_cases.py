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
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from eqm_jax.benchmark import machine, measure
from eqm_jax.benchmark.results import Row, make_row
from eqm_jax.data.codec import Codec
from eqm_jax.equilibrium import field, sampler, streaming
from eqm_jax.evaluation import evaluate, samplers
from eqm_jax.networks import flops
from eqm_jax.networks.dit import DiT
from eqm_jax.training import sharding
from eqm_jax.training import state as state_lib
from eqm_jax.training import step as step_lib
from eqm_jax.training.pretrained import Pretrained

DESCENT = 20  # evaluations of the descent that one evaluation is timed in
GUIDANCE = 1.5
# Where no trained model is at hand, samples stop after normally distributed shares of the budget: mean and deviation
# are those of the trained digits model at ‖f‖ ≤ 4, 108 ± 7.4 of 249 evaluations.
STOPPING_MEAN, STOPPING_DEVIATION = 0.435, 0.03
PULL_STEP = 0.003  # η of the synthetic descent


class NotApplicable(Exception):
  """A case that a config does not have; the message says why."""


@dataclasses.dataclass
class Workspace:
  """What the cases measure: a config, the devices, and what is made of them on first use."""

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
    chosen = self.config.benchmark.batch_size
    return self.config.evaluation.batch_size if chosen is None else chosen

  @functools.cached_property
  def sample_mesh(self) -> Mesh:
    """All devices along one axis, as samplers use them."""
    return Mesh(np.asarray(self.devices), ("data",))

  @functools.cached_property
  def mesh(self) -> Mesh:
    """The mesh of training."""
    return sharding.make_mesh(**self.config.mesh, devices=self.devices)

  @functools.cached_property
  def optimizer(self) -> Any:
    return state_lib.make_optimizer(self.config.optimizer, self.config.train.steps)

  @functools.cached_property
  def state_shapes(self) -> state_lib.TrainState:
    return jax.eval_shape(functools.partial(state_lib.init_state, self.model, self.optimizer, self.config.seed))

  @functools.cached_property
  def shardings(self) -> Any:
    return sharding.state_shardings(self.state_shapes, self.config.sharding, self.mesh)

  @functools.cached_property
  def init_state(self) -> Callable[[], state_lib.TrainState]:
    """Makes a new training state, placed as in a run."""
    init = functools.partial(state_lib.init_state, self.model, self.optimizer, self.config.seed)
    return jax.jit(init, out_shardings=self.shardings)

  @functools.cached_property
  def params(self) -> Any:
    """Untrained parameters on every device; the output layer is zero."""
    return self.replicated(self.init_state().params)

  @functools.cached_property
  def program_of_step(self) -> measure.Program:
    """The training step of a run that reads pixels or a cache of latents, compiled."""
    step = step_lib.make_step(self.config, self.model, self.optimizer, self.mesh, self.shardings)
    state = jax.tree.map(_with_sharding, self.state_shapes, self.shardings)
    return measure.compile_program(step, state, self.training_batch(), None)

  def training_batch(self) -> dict[str, jax.Array]:
    """A batch of noise in the form in which the config's data set gives its samples."""
    size = self.config.train.batch_size
    placed = sharding.batch_sharding(self.mesh, size, self.config.train.accumulate)
    rng = np.random.default_rng(0)
    image = rng.standard_normal((size, *self.model.input_shape), np.float32)
    batch = {"mean": image, "logvar": image - 3} if self.config.autoencoder.path else {"image": image}
    label = rng.integers(max(1, self.model.num_classes), size=size, dtype=np.int32)
    return jax.device_put({**batch, "label": label}, placed)

  def replicated(self, tree: Any) -> Any:
    """Arrays, whole on every device."""
    return jax.device_put(jax.device_get(tree), NamedSharding(self.sample_mesh, PartitionSpec()))

  def spread(self, tree: Any) -> Any:
    """Arrays, split over the devices along their first axis."""
    return jax.device_put(tree, NamedSharding(self.sample_mesh, PartitionSpec("data")))

  def noise_and_labels(self) -> tuple[jax.Array, jax.Array]:
    """A batch to evaluate the field on."""
    count = self.batch_size * len(self.devices)
    noise = sampler.start_noise(jax.random.key(0), jnp.arange(count), self.model.input_shape)
    return self.spread((noise, jnp.asarray(samplers.balanced_labels(count, self.model.num_classes))))


def forward(w: Workspace) -> list[Row]:
  """The network alone."""

  def apply(params, x, label):
    gamma = (jnp.zeros(len(x)),) if w.model.time_input else ()
    return w.model.apply({"params": params}, x, label, *gamma)

  x, label = w.noise_and_labels()
  program = measure.compile_program(apply, w.params, x, label)
  timing, _ = measure.timed(program.call, w.params, x, label, turns=w.turns)
  about = f"the network on {_batch(w)}"
  return [make_row("forward", about, "pass", timing, program, **_work(w, len(x), flops.forward(w.model)))]


def training_step(w: Workspace, name: str = "training step") -> list[Row]:
  """The step of a training run, its state donated, on a batch that lies on the devices already."""
  program, batch = w.program_of_step, w.training_batch()
  if not machine.fits(program.bytes, measure.available_memory(w.devices)):
    raise NotApplicable(f"the {name} needs {program.bytes / 2**30:.2f} GiB on each device, more than is available")
  timing, _ = measure.timed(program.call, w.init_state(), batch, None, turns=w.turns, carry=True)
  size = w.config.train.batch_size
  about = f"a batch of {size}, remat {w.config.model.remat}: loss, gradient, AdamW, average"
  return [make_row(name, about, "step", timing, program, **_work(w, size, flops.training(w.model)))]


def evaluation(w: Workspace) -> list[Row]:
  """One evaluation of the field as samplers do it."""
  _check_descends(w)
  return [_evaluation(w, "evaluation", f"a descent from {_batch(w)}", 1.0)]


def guided_evaluation(w: Workspace) -> list[Row]:
  """The same with classifier-free guidance, twice the batch."""
  _check_descends(w)
  if not w.model.num_classes:
    raise NotApplicable("the model knows no classes")
  return [_evaluation(w, "guided evaluation", f"the same with guidance {GUIDANCE}", GUIDANCE)]


def _evaluation(w: Workspace, name: str, about: str, guidance: float) -> Row:
  steps = min(DESCENT, w.config.benchmark.nfe)

  def descent(params, x, label):
    field_fn = field.BoundField(field.conditional_field(w.model, params, guidance=guidance), label)
    return sampler.descend(field_fn, x, rule="gd", step_size=PULL_STEP, max_evaluations=steps).x

  x, label = w.noise_and_labels()
  program = measure.compile_program(descent, w.params, x, label)
  timing, _ = measure.timed(program.call, w.params, x, label, turns=w.turns)
  about = f"{about}, {steps} evaluations, time of one"
  work = _work(w, len(x), flops.evaluation(w.model, guided=guidance != 1))
  return make_row(name, about, "evaluation", timing.divided(steps), program, **work)


def energy_cases(w: Workspace) -> list[Row]:
  """Training step and energy gradient of EqM-E: the same network as the energy x·f(x)."""
  _check_descends(w)
  config = w.config.copy_and_resolve_references()
  config.model.energy, config.objective.kind, config.objective.dispersive_weight = "dot", "equilibrium", 0.0
  energy = dataclasses.replace(w, config=config)
  steps = training_step(energy, "EqM-E training step")
  about = f"the gradient of x·f(x) in a descent from {_batch(w)}"
  return [*steps, _evaluation(energy, "EqM-E energy gradient", about, 1.0)]


def batching(w: Workspace) -> list[Row]:
  """Whole descents: a fixed number of evaluations, and adaptive ones in static and in continuous batches."""
  _check_descends(w)
  slots = w.batch_size * len(w.devices)
  count = -(-w.config.benchmark.samples // slots) * slots
  descents = _trained_descents(w, count) or _synthetic_descents(w, count)
  fixed = dataclasses.replace(descents, threshold_N=np.zeros(count, np.float32))
  cases = {
    "fixed": (functools.partial(_static, w, fixed, slots), "every sample spends its budget"),
    "static batching": (functools.partial(_static, w, descents, slots), "a batch waits for its slowest sample"),
    "continuous batching": (
      functools.partial(_continuous, w, descents, slots),
      "a finished sample's slot takes the next one",
    ),
  }
  return [_batching_row(w, name, run, text, descents) for name, (run, text) in cases.items()]


@dataclasses.dataclass(frozen=True)
class Descents:
  """Samples to draw, and what stops each of them."""

  field_fn: Callable  # (x, labels) → f
  label_N: np.ndarray
  threshold_N: np.ndarray
  options: dict[str, Any]  # of `descend`: rule, step size, budget
  key: jax.Array
  flops: int  # of one evaluation of one sample
  origin: str  # where the stopping times are from


@flax.struct.dataclass
class PulledField:
  """x plus an untrained network, whose output layer of zeros adds nothing but its time: ‖f‖ falls by 1 − η a step."""

  network: field.ConditionalField

  def __call__(self, x: jax.Array, label_B: jax.Array, gamma_B: jax.Array | None = None) -> jax.Array:
    return x + self.network(x, label_B, gamma_B)


def _synthetic_descents(w: Workspace, count: int) -> Descents:
  """Descents of prescribed length: the field is x, and a threshold the norm of x after a random number of steps."""
  key, nfe = jax.random.key(0), w.config.benchmark.nfe
  shares = np.random.default_rng(0).normal(STOPPING_MEAN, STOPPING_DEVIATION, count)
  nfe_N = np.clip(np.rint(shares * nfe), 1, nfe)
  norm_N = np.concatenate(
    [
      np.linalg.norm(_noise(key, first, min(first + 256, count), w.model.input_shape), axis=1)
      for first in range(0, count, 256)
    ]
  )
  # Evaluation k sees the norm after k − 1 steps; the threshold lies half a step above that.
  threshold_N = norm_N * (1 - PULL_STEP) ** (nfe_N - 1.5)
  return Descents(
    field_fn=PulledField(field.conditional_field(w.model, w.params)),
    label_N=samplers.balanced_labels(count, w.model.num_classes),
    threshold_N=threshold_N.astype(np.float32),
    options={"rule": "gd", "step_size": PULL_STEP, "max_evaluations": nfe},
    key=key,
    flops=flops.evaluation(w.model),
    origin=f"synthetic stopping times, {STOPPING_MEAN} ± {STOPPING_DEVIATION} of the budget, as of the trained digits",
  )


def _noise(key: jax.Array, first: int, last: int, shape: tuple[int, ...]) -> np.ndarray:
  return np.asarray(sampler.start_noise(key, jnp.arange(first, last), shape)).reshape(last - first, -1)


def _trained_descents(w: Workspace, count: int) -> Descents | None:
  """Descents of the trained model by the first adaptive row of the config; None: there is no model, or no such row."""
  adaptive = [name for name, one in w.config.samplers.items() if samplers.is_descent(one) and one.threshold > 0]
  if w.trained is None or not adaptive:
    return None
  name, chosen = adaptive[0], w.config.samplers[adaptive[0]]
  key = state_lib.stream_key(w.config.evaluation.seed, "samples")
  options = samplers.descent_of(chosen, samplers.Batching(w.batch_size, key, evaluate.schedule_of(w.config).multiplier))
  threshold = options.pop("threshold")
  network = field.conditional_field(w.trained.model, w.replicated(w.trained.params), **samplers.guidance_of(chosen))
  return Descents(
    field_fn=network,
    label_N=samplers.balanced_labels(count, w.trained.model.num_classes),
    threshold_N=np.full(count, threshold, np.float32),
    options={name: value for name, value in options.items() if name != "key"},
    key=key,
    flops=flops.evaluation(w.trained.model, guided=chosen.guidance != 1),
    origin=f"the trained model of step {w.trained.step}, sampler {name}, threshold {threshold:g}",
  )


def _static(w: Workspace, descents: Descents, slots: int, **changes) -> tuple[np.ndarray, int]:
  """One batch after another; → (NFE of each sample, executed NFE of all)."""
  nfe_N, executed = [], 0
  for first in range(0, len(descents.label_N), slots):
    part = slice(first, first + slots)
    index_B = jnp.arange(first, first + slots)
    noise = sampler.start_noise(descents.key, index_B, w.model.input_shape)
    noise, label_B, index_B, threshold_B = w.spread(
      (noise, descents.label_N[part], index_B, descents.threshold_N[part])
    )
    result = sampler.descend(
      field.BoundField(descents.field_fn, label_B),
      noise,
      **{**descents.options, **changes},
      threshold=threshold_B,
      key=descents.key,
      index_B=index_B,
    )
    nfe_B = np.asarray(jax.device_get(result).evaluations_B)
    nfe_N.append(nfe_B)
    executed += int(nfe_B.max()) * slots
  return np.concatenate(nfe_N), executed


def _continuous(w: Workspace, descents: Descents, slots: int, **changes) -> tuple[np.ndarray, int]:
  """All samples through the slots; → (NFE of each sample, executed NFE of all)."""
  result = streaming.descend_stream(
    descents.field_fn,
    jnp.asarray(descents.label_N),
    descents.key,
    shape=w.model.input_shape,
    slots=slots,
    threshold=descents.threshold_N,
    mesh=w.sample_mesh,
    **{**descents.options, **changes},
  )
  result = jax.device_get(result)
  return np.asarray(result.evaluations_B), int(result.hardware_evaluations)


def _batching_row(w: Workspace, name: str, run: Callable, text: str, descents: Descents) -> Row:
  begin = time.perf_counter()
  run(max_evaluations=1)  # the budget is an argument of the program: this compiles it, and hardly runs it
  compile_seconds = time.perf_counter() - begin
  timing, (nfe_N, executed) = measure.timed(run, turns=min(w.turns, 3), warm_up=False)
  count = len(nfe_N)
  about = f"{count} samples, {w.batch_size} in flight, budget {descents.options['max_evaluations']}: {text}"
  about += "" if name == "fixed" else f" ({descents.origin})"
  details = {
    "nfe": float(np.mean(nfe_N)),
    "nfe_quantiles": [float(value) for value in np.quantile(nfe_N, (0.1, 0.9))],
    "executed_nfe": executed / count,
    "utilisation": float(np.sum(nfe_N)) / executed,
  }
  work = _work(w, count, descents.flops * executed / count)
  return make_row(name, about, "run", timing, compile_seconds=compile_seconds, details=details, **work)


def _work(w: Workspace, images: int, operations: float) -> dict[str, Any]:
  """What a row says of its arithmetic, that of `images` samples of so many operations each."""
  return {"images": images, "flops": images * operations, "flops_by": "formula", "precision": w.config.model.dtype}


def _batch(w: Workspace) -> str:
  many = f" on each of {len(w.devices)} devices" if len(w.devices) > 1 else ""
  return f"{w.batch_size} samples{many} of {math.prod(w.model.input_shape)} numbers"


def _check_descends(w: Workspace):
  if w.model.time_input:
    raise NotApplicable("the model takes the time: it is integrated, not descended")


def _with_sharding(leaf: jax.ShapeDtypeStruct, placed: NamedSharding) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed)
