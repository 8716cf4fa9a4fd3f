"""The programs that a config runs on a TPU: the training step, the sampling loop, the decoder.

They are those of the modes `train`, `evaluate` and `sample`, lowered for devices that are not there, with shapes in
place of arrays: no data set, no weights and no autoencoder's file is read. Sampling and decoding are the same program
on each chip and send nothing between chips, so one chip's is compiled.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from eqm_jax.data import codec
from eqm_jax.equilibrium import field as field_lib
from eqm_jax.equilibrium import objective, sampler, streaming
from eqm_jax.evaluation import validation
from eqm_jax.networks import attention, autoencoder, dit
from eqm_jax.networks import flops as flops_lib
from eqm_jax.plan import costs
from eqm_jax.plan.topology import Topology
from eqm_jax.sampling import generator as generator_lib
from eqm_jax.training import sharding
from eqm_jax.training import state as state_lib
from eqm_jax.training import step as step_lib

TRAINING, SAMPLING, DECODING = "training", "sampling", "decoding"


@dataclasses.dataclass(frozen=True)
class Program:
  """A program before it is compiled. Numbers are those of one chip and one iteration."""

  kind: str  # TRAINING, SAMPLING or DECODING
  about: str  # its settings, for the reader
  lower: Callable[[], jax.stages.Lowered]
  mesh: dict[str, int]  # axes and sizes, in the order in which devices are numbered
  images: int  # a chip's share of the batch (chips along `tensor` share it), its slots, or the images that it decodes
  arguments: Any  # shapes with shardings
  argument_bytes: dict[str, int]  # by content, without padding
  fixed_hbm: float  # bytes that move however small the batch is
  flops: float | None = None  # by formula; None: the compiler's count
  rematerialised_flops: float = 0.0
  iterations: int = 1  # in one execution: the budget of a sampling loop, otherwise 1
  nfe: int = 1  # iterations that an image takes: in sampling its budget
  state: Any = None  # the TrainState among the arguments of a training step


def programs_of(config: ml_collections.ConfigDict, topology: Topology) -> list[Program]:
  """The programs of a config on a slice.

  Raises:
    ValueError: before anything is compiled, if the mesh, the batch or a sampler does not fit.
  """
  programs = [training(config, topology)]
  if config.evaluation.num_samples:
    programs.append(sampling(config, topology))
    if config.autoencoder.path:
      programs.append(decoding(config, topology))
  return programs


def training(config: ml_collections.ConfigDict, topology: Topology) -> Program:
  """The training step, as `training.train` makes it."""
  model = dit.DiT(**config.model)
  batch_size, microbatches = config.train.batch_size, config.train.grad_accum_steps
  optimizer = state_lib.make_optimizer(config.optimizer, config.train.steps)
  mesh = sharding.make_mesh(**config.mesh, devices=topology.devices)
  batch_sharding = sharding.batch_sharding(mesh, batch_size, microbatches)
  shapes = state_shapes(config, model)
  shardings = sharding.state_shardings(shapes, config.sharding, mesh)
  encoder = _autoencoder(config, model) if config.autoencoder.path and config.data.source != "latents" else None

  state = _placed(shapes, shardings)
  batch = {
    name: jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=batch_sharding)
    for name, (shape, dtype) in _sample(config, model, encoder).items()
  }
  encoder_params = _placed(autoencoder.parameter_shapes(encoder), sharding.replicated(mesh)) if encoder else None
  step = step_lib.make_step(config, model, optimizer, mesh, shardings, encoder=encoder)

  images, tensor = sharding.samples_on_device(mesh, batch_size), mesh.shape["tensor"]
  state_bytes = {
    "parameters": sharding.held(shapes.params, shardings.params),
    "average": sharding.held(shapes.ema_params, shardings.ema_params),
    "optimizer": sharding.held(shapes.opt_state, shardings.opt_state),
  }
  rest = {"batch": sharding.held(batch, jax.tree.map(lambda leaf: leaf.sharding, batch))}
  rest |= {"autoencoder": 4 * _elements(encoder_params)} if encoder else {}
  weights = _elements(shapes.params) * jnp.dtype(model.dtype).itemsize / tensor
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    fused = model.attention_form(batch_size // microbatches) in attention.KERNELS
  return Program(
    kind=TRAINING,
    about=f"{batch_size} images a step, {images} on a chip, remat {model.remat}, gather {config.sharding.gather}",
    lower=functools.partial(step.lower, state, batch, encoder_params),
    mesh={axis: size for axis, size in mesh.shape.items() if axis != sharding.SLICES or size > 1},
    images=images,
    arguments=(state, batch, encoder_params),
    argument_bytes=state_bytes | rest,
    # The state read and written; per microbatch the weights in the type of the products twice, and their gradient.
    fixed_hbm=2 * sum(state_bytes.values()) + 3 * microbatches * weights,
    flops=images * flops_lib.training(model) / tensor,
    rematerialised_flops=images * costs.rematerialised_flops(model, fused) / tensor,
    state=state,
  )


def sampling(config: ml_collections.ConfigDict, topology: Topology) -> Program:
  """The loop that samples on one chip, with the first sampler that is evaluated; of an ODE, one evaluation."""
  model, options = dit.DiT(**config.model), config.evaluation
  name = validation.evaluated_samplers(config)[0]
  row = config.samplers[name]
  multiplier = objective.schedule_of(config.objective).multiplier
  generator = generator_lib.Generator(model, None, jax.random.key(options.seed), options.batch_size, multiplier)
  generator.check(name, row)
  mesh, replicated = _one_chip(topology)
  continuous, descends = generator_lib.is_continuous(row), generator_lib.is_descent(row)
  slots = min(options.batch_size, options.chunk_size)
  shapes = dit.parameter_shapes(model)
  params = _placed(shapes, replicated)
  count = options.chunk_size if continuous else slots
  labels = jax.ShapeDtypeStruct((count,), jnp.int32, sharding=replicated)
  noise = jax.ShapeDtypeStruct((slots, *model.input_shape), jnp.float32, sharding=replicated)

  def run(params, labels, *noise):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # it is for a TPU, whatever this machine is
      return sample(params, labels, *noise)

  def sample(params, labels, *noise):
    field = field_lib.field(model, params, **generator.field_options(row))
    if continuous:
      stream_options = {"shape": model.input_shape, "slots": slots, "mesh": mesh, "index": np.arange(count)}
      return streaming.descend_stream(field, labels, **generator.descent_options(row), **stream_options)
    if descends:
      return sampler.descend(field.bind(labels), *noise, **generator.descent_options(row))
    gamma = (jnp.zeros(slots),) if model.time_input else ()
    return field(*noise, labels, *gamma)

  arguments = (params, labels) if continuous else (params, labels, noise)
  loop = "continuous batching" if continuous else "static batching"
  loop = loop if descends else "one evaluation"
  weights = _elements(shapes)
  return Program(
    kind=SAMPLING,
    about=f"{loop}, {slots} samples at a time, sampler {name}, {row.max_nfe} NFE, guidance {row.guidance:g}",
    lower=functools.partial(jax.jit(run).lower, *arguments),
    mesh=dict(mesh.shape),
    images=slots,
    arguments=arguments,
    argument_bytes={"parameters": 4 * weights},
    fixed_hbm=weights * jnp.dtype(model.dtype).itemsize,
    flops=slots * flops_lib.evaluation(model, guided=row.guidance != 1.0),
    iterations=row.max_nfe if descends else 1,
    nfe=row.max_nfe,
  )


def decoding(config: ml_collections.ConfigDict, topology: Topology) -> Program:
  """The decoder on one chip, with `autoencoder.batch_size` images at a time."""
  model, images = dit.DiT(**config.model), config.autoencoder.batch_size
  module = _autoencoder(config, model)
  mesh, replicated = _one_chip(topology)
  params = _placed(autoencoder.parameter_shapes(module), replicated)
  latents = jax.ShapeDtypeStruct((images, *model.input_shape), jnp.float32, sharding=replicated)
  sizes = {name: 4 * _elements(part) for name, part in params.items()}
  used = sizes["decoder"] + sizes.get("post_quant_conv", 0)
  return Program(
    kind=DECODING,
    about=f"{images} images at a time, {module.dtype}",
    lower=functools.partial(codec.decode_batch.lower, module, params, latents),
    mesh=dict(mesh.shape),
    images=images,
    arguments=(params, latents),
    argument_bytes={"decoder": used, "encoder, unused": sum(sizes.values()) - used},
    fixed_hbm=used,
  )


def state_shapes(config: ml_collections.ConfigDict, model: dit.DiT) -> state_lib.TrainState:
  """The shapes of a run's state."""
  optimizer = state_lib.make_optimizer(config.optimizer, config.train.steps)
  return jax.eval_shape(functools.partial(state_lib.init_state, model, optimizer, config.seed))


def _sample(config, model: dit.DiT, encoder: autoencoder.Autoencoder | None) -> dict[str, tuple[tuple[int, ...], Any]]:
  """The arrays of one sample of the config's data set: {name: (shape, type)}."""
  label = {"label": ((), jnp.int32)}
  if config.data.source == "latents":
    return {"mean": (model.input_shape, jnp.float32), "logvar": (model.input_shape, jnp.float32)} | label
  shape = model.input_shape
  if encoder:
    shape = (shape[0] * encoder.reduction, shape[1] * encoder.reduction, encoder.in_channels)
  return {"image": (shape, jnp.float32)} | label


def _autoencoder(config, model: dit.DiT) -> autoencoder.Autoencoder:
  """The published architecture in the config's type: shapes are all that a plan needs of the weights."""
  module = autoencoder.Autoencoder(dtype=config.autoencoder.dtype)
  if module.latent_channels != model.channels:
    raise ValueError(
      f"model.channels = {model.channels}, but a plan decodes with the published autoencoder, which has "
      f"{module.latent_channels}: leave it out with config.autoencoder.path = None"
    )
  return module


def _one_chip(topology: Topology) -> tuple[Mesh, NamedSharding]:
  """A mesh of one chip of a slice, and the sharding of arrays on it."""
  mesh = Mesh(np.asarray(topology.devices[:1]), ("data",), axis_types=(AxisType.Auto,))
  return mesh, NamedSharding(mesh, PartitionSpec())


def _placed(shapes: Any, shardings: Any) -> Any:
  """Shapes with shardings, one for each leaf or one for all."""
  shardings = jax.tree.broadcast(shardings, shapes)
  return jax.tree.map(lambda leaf, own: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=own), shapes, shardings)


def _elements(shapes: Any) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(shapes))
