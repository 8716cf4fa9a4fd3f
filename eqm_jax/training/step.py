"""One training step: state and batch in, the next state and the metrics of the step out."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import Mesh, PartitionSpec

from eqm_jax.data.codec import encode_batch
from eqm_jax.equilibrium import energy, gamma, objective
from eqm_jax.networks.autoencoder import Autoencoder, posterior_sample
from eqm_jax.networks.dit import DiT
from eqm_jax.training import sharding
from eqm_jax.training import state as state_lib


def make_step(
  config: ml_collections.ConfigDict,
  model: DiT,
  optimizer: optax.GradientTransformation,
  mesh: Mesh,
  shardings: Any,
  *,
  encoder: Autoencoder | None = None,
) -> Callable:
  """The jitted step (state, batch, encoder_params) → (state, metrics); the state that goes in is donated.

  Args:
    config: the whole config.
    model, optimizer: of the run.
    mesh: of the devices that hold the batch and the state.
    shardings: of the state, a tree of its structure.
    encoder: encodes the images of each batch, with `encoder_params`; None: the batch is trained on as it is, and
      `encoder_params` is None.
  """
  learning_rate = state_lib.learning_rate_schedule(config.optimizer, config.train.steps)

  def train_step(state, batch, encoder_params):
    key = jax.random.fold_in(state_lib.stream_key(config.seed, "steps"), state.step)
    noise = sample_noise(model, config.objective, batch["label"], key)

    gathered = None
    if config.sharding.gather == "step":
      gathered = sharding.gathered_blocks(state.params, shardings.params, model.dtype)

    def loss_fn(params, microbatch):
      batch, noise = microbatch
      if gathered is not None:
        params = sharding.with_gathered(params, gathered, shardings.params)
      batch = encode_batch(encoder, encoder_params, batch) if encoder else batch
      return loss_with_noise(model, config.objective, batch, noise, params)

    # The network names the mesh's axes for its activations, and finds the mesh here.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      loss, gradient = _accumulate(
        jax.value_and_grad(loss_fn), state.params, (batch, noise), config.train.grad_accum_steps, shardings.params
      )
    updated = state_lib.update(state, gradient, optimizer, config.optimizer.ema_decay)
    skipped = state_lib.skipped_batches(updated.opt_state) if config.optimizer.max_skipped_batches else 0
    metrics = {
      "loss": loss,
      "gradient_norm": optax.tree.norm(gradient),
      "parameter_norm": optax.tree.norm(updated.params),  # not finite if the update was not
      "learning_rate": learning_rate(state.step - skipped),  # the schedule stands still while batches are skipped
    }
    if config.optimizer.max_skipped_batches:
      metrics["skipped_batches"] = skipped
    return updated, metrics

  return jax.jit(
    train_step,
    donate_argnums=0,
    out_shardings=(shardings, sharding.replicated(mesh)),
    compiler_options=_compiler_options(model, config.train.batch_size, mesh),
  )


# XLA gives the products of CPUs to YNNPACK, whose threads compete with XLA's own where a layer's activations outgrow
# the caches (docs/performance.md); below that size it is the faster one. Its sums are faster everywhere.
SUMS_BY_YNNPACK = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
LARGE_ACTIVATIONS = 2**21  # bytes of a layer's output


def _compiler_options(model: DiT, batch_size: int, mesh: Mesh) -> dict[str, str] | None:
  """Options for the compiler of the training step; None except for large activations on CPUs."""
  tokens = batch_size * (model.input_size // model.patch_size) ** 2
  activations = tokens * model.width * jnp.dtype(model.dtype).itemsize
  if mesh.devices.flat[0].platform != "cpu" or activations < LARGE_ACTIVATIONS:
    return None
  try:
    jax.jit(lambda: jnp.zeros(()), compiler_options=SUMS_BY_YNNPACK).lower().compile()
  except jax.errors.JaxRuntimeError:  # another version of XLA, which has no such option
    return None
  return SUMS_BY_YNNPACK


@flax.struct.dataclass
class BatchNoise:
  """Random numbers of one step, sampled for the global batch from the one key of the step."""

  gamma_B: jax.Array
  noise_BxHxWxC: jax.Array
  label_B: jax.Array  # the null class where the label is dropped
  posterior_BxHxWxC: jax.Array  # standard normal, for the posterior of latents; XLA removes it for pixels


def sample_noise(model: DiT, config: ml_collections.ConfigDict, label_B: jax.Array, key: jax.Array) -> BatchNoise:
  """Samples γ, noise, dropped labels and the posterior's noise; `config` is the objective section."""
  key_data, key_gamma, key_noise, key_label, key_clean = jax.random.split(key, 5)
  shape_BxHxWxC = (*label_B.shape, *model.input_shape)
  density, schedule = gamma.GammaDensity(**config.gamma), objective.schedule_of(config)
  gamma_B = gamma.quantile(jax.random.uniform(key_gamma, label_B.shape), density, schedule)
  gamma_B = jnp.where(jax.random.bernoulli(key_clean, config.clean_fraction, label_B.shape), 1.0, gamma_B)
  dropped_B = jax.random.bernoulli(key_label, config.label_dropout, label_B.shape)
  return BatchNoise(
    gamma_B=gamma_B,
    noise_BxHxWxC=jax.random.normal(key_noise, shape_BxHxWxC),
    label_B=jnp.where(dropped_B, model.num_classes, label_B),
    posterior_BxHxWxC=jax.random.normal(key_data, shape_BxHxWxC),
  )


def batch_loss(
  model: DiT, config: ml_collections.ConfigDict, batch: dict[str, jax.Array], key: jax.Array, params: Any
) -> jax.Array:
  """Scalar loss of one batch with the random numbers of one key; `config` is the objective section."""
  return loss_with_noise(model, config, batch, sample_noise(model, config, batch["label"], key), params)


def loss_with_noise(
  model: DiT, config: ml_collections.ConfigDict, batch: dict[str, jax.Array], noise: BatchNoise, params: Any
) -> jax.Array:
  """Mean loss of samples whose random numbers are given, plus the dispersive loss over all pairs of them."""
  data_BxHxWxC = sample_data(batch, noise.posterior_BxHxWxC)

  def field_fn(x_BxHxWxC, *gamma):  # → f, and the tokens for the dispersive loss
    if energy.is_energy(model):
      return energy.SECOND_ORDER[config.second_order](model, model.energy, params, x_BxHxWxC, noise.label_B), None
    return model.apply({"params": params}, x_BxHxWxC, noise.label_B, *gamma, return_tokens=True, training=True)

  inputs = field_fn, data_BxHxWxC, noise.noise_BxHxWxC, noise.gamma_B
  if config.kind == "equilibrium":
    loss_B, tokens = objective.equilibrium_loss(*inputs, objective.schedule_of(config), has_aux=True)
  else:
    loss_B, tokens = objective.flow_matching_loss(*inputs, time_conditional=model.time_input, has_aux=True)
  loss = jnp.mean(loss_B)
  if config.dispersive_weight:
    loss += config.dispersive_weight * objective.dispersive_loss(tokens)
  return loss


def sample_data(batch: dict[str, jax.Array], noise_BxHxWxC: jax.Array) -> jax.Array:
  """The batch's images, or latents sampled from the posterior N(mean, exp(logvar)) with standard normal noise."""
  if "image" in batch:
    return batch["image"]
  return posterior_sample(batch["mean"], batch["logvar"], noise_BxHxWxC)


def _accumulate(
  function: Callable, params: Any, inputs: Any, num_microbatches: int, shardings: Any
) -> tuple[jax.Array, Any]:
  """Mean loss and gradient over microbatches, one after another.

  The mean over microbatches of one size is that of the whole batch, to rounding; memory is that of one microbatch.
  """
  if num_microbatches == 1:
    return function(params, inputs)

  def split(leaf):  # microbatch m gets samples m, m + num_microbatches, ...: nothing moves between devices
    leaf = leaf.reshape(leaf.shape[0] // num_microbatches, num_microbatches, *leaf.shape[1:]).swapaxes(0, 1)
    return jax.lax.with_sharding_constraint(leaf, PartitionSpec(None, sharding.BATCH))

  def add(total, microbatch):
    total = jax.tree.map(jnp.add, total, function(params, microbatch))
    return (total[0], jax.lax.with_sharding_constraint(total[1], shardings)), None

  zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
  total, _ = jax.lax.scan(add, zeros, jax.tree.map(split, inputs))
  return jax.tree.map(lambda leaf: leaf / num_microbatches, total)
