"""What a config runs on a TPU: the training step, the loop that samples, the decoder, as programs to compile.

They are those that the modes `train`, `evaluate` and `sample` run, lowered for devices that are not there, with shapes
in place of arrays: no data set, no weights and no autoencoder's file is read. Sampling and decoding are the same
program on each chip and send nothing between chips, so one chip's is compiled.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from eqm_jax.data import codec
from eqm_jax.equilibrium import field, streaming
from eqm_jax.evaluation import evaluate, samplers, settings
from eqm_jax.networks import autoencoder, dit, flops
from eqm_jax.plan import placement, roofline
from eqm_jax.plan.topology import Topology
from eqm_jax.training import sharding
from eqm_jax.training import state as state_lib
from eqm_jax.training import step as step_lib

TRAINING, SAMPLING, DECODING = "training", "sampling", "decoding"


@dataclasses.dataclass(frozen=True)
class Program:
  """One program, and what is known of it before it is compiled. Numbers are of one chip."""

  kind: str  # TRAINING, SAMPLING or DECODING
  about: str  # what it is of the config, for the reader
  lower: Callable[[], jax.stages.Lowered]
  mesh: dict[str, int]  # axes and sizes, in the order in which its devices are numbered
  images: int  # that one execution advances: of a batch, in the slots, decoded
  shared_by: int  # chips that work at the same images: those along `tensor`
  units: int  # that one execution has; figures are told of one: an evaluation of a sampling loop, else the whole
  evaluations: int  # units that an image takes: in sampling those of its budget, otherwise 1
  operations: float | None  # floating-point ones of a unit, by formula; None: the compiler's count of all
  again: float  # of a unit, that rematerialisation adds
  fixed_hbm: float  # bytes that a unit moves however small its batch is
  arguments: dict[str, int]  # bytes by what they are, without what fills up tiles
  given: Any  # the arguments as shapes with shardings
  asked: Any = None  # the results as shapes with shardings
  parameters: placement.Parameters | None = None  # of a program on several chips
  warnings: tuple[str, ...] = ()


def of(config: ml_collections.ConfigDict, topology: Topology) -> list[Program]:
  """The programs of a config on a slice.

  Raises:
    ValueError: before anything is compiled, if the mesh, the batch or a row does not fit.
  """
  programs = [training(config, topology)]
  if config.evaluation.samples > 0:
    programs.append(sampling(config, topology))
    if config.autoencoder.path:
      programs.append(decoding(config, topology))
  return programs


def training(config: ml_collections.ConfigDict, topology: Topology) -> Program:
  """The training step, as `training.train` makes it."""
  model, batch_size = planned_model(config), config.train.batch_size
  optimizer = state_lib.make_optimizer(config.optimizer, config.train.steps)
  mesh = sharding.make_mesh(**config.mesh, devices=topology.devices)
  batch_sharding = sharding.batch_sharding(mesh, batch_size, config.train.accumulate)
  shapes = state_shapes(config, model)
  shardings = sharding.state_shardings(shapes, config.sharding, mesh)
  encoder = _autoencoder(config, model) if config.autoencoder.path and config.data.source != "latents" else None

  state = jax.tree.map(_placed, shapes, shardings)
  batch = {
    name: jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=batch_sharding)
    for name, (shape, dtype) in _sample(config, model, encoder).items()
  }
  whole = sharding.replicated(mesh)
  frozen = jax.tree.map(lambda leaf: _placed(leaf, whole), autoencoder.parameter_shapes(encoder)) if encoder else None
  step = step_lib.make_step(config, model, optimizer, mesh, shardings, encoder)

  chips, parameters = mesh.shape["data"] * mesh.shape["fsdp"], sum(leaf.size for leaf in jax.tree.leaves(shapes.params))
  images, tensor = batch_size // chips, mesh.shape["tensor"]
  parts = {
    "parameters": (shapes.params, shardings.params),
    "average": (shapes.ema_params, shardings.ema_params),
    "optimizer": (shapes.opt_state, shardings.opt_state),
  }
  arguments = {name: sharding.held(*part) for name, part in parts.items()}
  arguments |= {"batch": sharding.held(batch, jax.tree.map(lambda leaf: leaf.sharding, batch))}
  arguments |= {"autoencoder": sum(leaf.size * 4 for leaf in jax.tree.leaves(frozen))} if encoder else {}
  held = sum(arguments[name] for name in parts)
  return Program(
    kind=TRAINING,
    about=f"{batch_size} images a step, {images} on a chip, remat {config.model.remat}",
    lower=functools.partial(step.lower, state, batch, frozen),
    mesh=dict(mesh.shape),
    images=images,
    shared_by=tensor,
    units=1,
    evaluations=1,
    operations=images * flops.training(model) / tensor,
    again=images * roofline.done_again(model) / tensor,
    # The state read and written; for each part the weights in the type of the products twice, and their gradient.
    fixed_hbm=2 * held + 3 * config.train.accumulate * parameters * jnp.dtype(model.dtype).itemsize / tensor,
    arguments=arguments,
    given=(state, batch, frozen),
    asked=state,
    parameters=placement.Parameters(shapes.params, shardings.params, mesh),
    warnings=tuple(placement.replicated(shapes, shardings, mesh, topology.chip.usable_memory)),
  )


def sampling(config: ml_collections.ConfigDict, topology: Topology) -> Program:
  """The loop that draws samples on one chip, of the first row that is evaluated."""
  model, options = planned_model(config), config.evaluation
  name = settings.rows_of(config)[0]
  row = config.samplers[name]
  batching = samplers.Batching(
    options.batch_size, jax.random.key(options.seed), evaluate.schedule_of(config).multiplier
  )
  samplers.check(name, row, model, batching)
  mesh = Mesh(np.asarray(topology.devices[:1]), ("data",))
  whole, slots = NamedSharding(mesh, PartitionSpec()), min(options.batch_size, options.unit)
  shapes = dit.parameter_shapes(model)
  params = jax.tree.map(lambda leaf: _placed(leaf, whole), shapes)
  streams = samplers.is_streamed(row)
  label_B = jax.ShapeDtypeStruct((options.unit if streams else slots,), jnp.int32, sharding=whole)
  noise = jax.ShapeDtypeStruct((slots, *model.input_shape), jnp.float32, sharding=whole)

  def stream(params, label_N):
    field_fn = field.conditional_field(model, params, **samplers.guidance_of(row))
    rest = {"shape": model.input_shape, "slots": slots, "mesh": mesh, "index_N": np.arange(options.unit)}
    return streaming.descend_stream(field_fn, label_N, **samplers.descent_of(row, batching), **rest)

  def lockstep(params, label_B, noise):
    field_fn = field.conditional_field(model, params, **samplers.guidance_of(row))
    return samplers.descend_row(row, field.BoundField(field_fn, label_B), noise, batching)

  def evaluated(params, label_B, noise):
    gamma = (jnp.zeros(slots),) if model.time_input else ()
    return field.conditional_field(model, params, **samplers.guidance_of(row))(noise, label_B, *gamma)

  function = stream if streams else lockstep if samplers.is_descent(row) else evaluated
  given = (params, label_B) if streams else (params, label_B, noise)
  passes = 1 if row.guidance == 1.0 else 2  # a guided evaluation is one pass of twice the batch
  parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes))
  loop = "a stream" if streams else "a batch" if samplers.is_descent(row) else "one evaluation"
  return Program(
    kind=SAMPLING,
    about=f"{loop} of {slots} samples, row {name}, {row.max_evaluations} evaluations, guidance {row.guidance:g}",
    lower=functools.partial(jax.jit(function).lower, *given),
    mesh=dict(mesh.shape),
    images=slots,
    shared_by=1,
    units=row.max_evaluations if samplers.is_descent(row) else 1,
    evaluations=row.max_evaluations,
    operations=slots * passes * flops.evaluation(model),
    again=0,
    fixed_hbm=parameters * jnp.dtype(model.dtype).itemsize,
    arguments={"parameters": 4 * parameters},
    given=given,
  )


def decoding(config: ml_collections.ConfigDict, topology: Topology) -> Program:
  """The decoder on one chip, as many images as it takes at a time."""
  model = planned_model(config)
  module = _autoencoder(config, model)
  mesh, images = Mesh(np.asarray(topology.devices[:1]), ("data",)), config.autoencoder.batch_size
  whole = NamedSharding(mesh, PartitionSpec())
  params = jax.tree.map(lambda leaf: _placed(leaf, whole), autoencoder.parameter_shapes(module))
  latents = jax.ShapeDtypeStruct((images, *model.input_shape), jnp.float32, sharding=whole)
  sizes = {name: sum(4 * leaf.size for leaf in jax.tree.leaves(part)) for name, part in params.items()}
  read = sizes["decoder"] + sizes.get("post_quant_conv", 0)
  return Program(
    kind=DECODING,
    about=f"{images} images at a time, {module.dtype}",
    lower=functools.partial(codec.decode_batch.lower, module, params, latents),
    mesh=dict(mesh.shape),
    images=images,
    shared_by=1,
    units=1,
    evaluations=1,
    operations=None,
    again=0,
    fixed_hbm=read,
    arguments={"decoder": read, "encoder, which it does not read": sum(sizes.values()) - read},
    given=(params, latents),
  )


def planned_model(config: ml_collections.ConfigDict) -> dit.DiT:
  """The config's model as the slice would run it: "auto" would choose by the machine that plans, a CPU."""
  model = dit.DiT(**config.model)
  return model.clone(block="xla") if model.block == "auto" else model


def state_shapes(config: ml_collections.ConfigDict, model: dit.DiT) -> state_lib.TrainState:
  """The shapes of a run's state."""
  optimizer = state_lib.make_optimizer(config.optimizer, config.train.steps)
  return jax.eval_shape(functools.partial(state_lib.init_state, model, optimizer, config.seed))


def _sample(config, model: dit.DiT, encoder: autoencoder.Autoencoder | None) -> dict[str, tuple[tuple[int, ...], Any]]:
  """What a data set of the config gives of one sample: {name: (shape, type)}."""
  label = {"label": ((), jnp.int32)}
  if config.data.source == "latents":
    return {"mean": (model.input_shape, jnp.float32), "logvar": (model.input_shape, jnp.float32)} | label
  shape = model.input_shape
  if encoder:
    shape = (shape[0] * encoder.reduction, shape[1] * encoder.reduction, encoder.in_channels)
  return {"image": (shape, jnp.float32)} | label


def _autoencoder(config, model: dit.DiT) -> autoencoder.Autoencoder:
  """The published architecture, in the config's type: what matters of the weights is their shapes."""
  module = autoencoder.Autoencoder(dtype=config.autoencoder.dtype)
  if module.latent_channels != model.channels:
    raise ValueError(
      f"model.channels = {model.channels}, but the published autoencoder has {module.latent_channels}, and a plan "
      "knows no other: leave it out with --config.autoencoder.path="
    )
  return module


def _placed(leaf: Any, placed: NamedSharding) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed)
