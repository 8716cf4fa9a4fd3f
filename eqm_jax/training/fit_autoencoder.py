"""Trains a small autoencoder, for data that Stable Diffusion's is too large for or was not trained on."""

import contextlib
import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from eqm_jax.checks import at_least
from eqm_jax.data import pipeline
from eqm_jax.data.samples import Source, arrays, spread
from eqm_jax.networks.autoencoder import Autoencoder, posterior_sample
from eqm_jax.progress import Progress

SCALING_IMAGES = 1024  # whose latents give the scaling factor

log = logging.getLogger(__name__)


def fit(options: ml_collections.ConfigDict, source: Source, seed: int) -> tuple[Autoencoder, Any]:
  """Minimises |x − decode(z)| + kl_weight·KL(q(z|x) ‖ N(0, I)), with z sampled from q(z|x).

  As in latent diffusion (Rombach et al. 2022) without its perceptual and adversarial
  parts, so that images come back blurred. One over the standard deviation of the latents becomes the
  `scaling_factor`.

  Args:
    options: `model` (attributes of `Autoencoder`), steps, batch_size, learning_rate, kl_weight.
    source: images.
    seed: of parameters, order and noise.

  Returns:
    The module and its parameters.

  Raises:
    ValueError: if there are too few steps.
    FloatingPointError: if the loss is not finite at the end.
  """
  at_least("prepare.fit.steps", options.steps, 2)
  at_least("prepare.fit.batch_size", options.batch_size, 1)
  module = Autoencoder(**options.model)
  data = pipeline.batches(source, batch_size=options.batch_size, seed=seed, flip=True, threads=2)
  key_init, key_steps = jax.random.split(jax.random.key(seed))
  params = jax.jit(module.init)(key_init, jnp.zeros((1, *source.shape)))["params"]
  schedule = optax.warmup_cosine_decay_schedule(0.0, options.learning_rate, min(50, options.steps // 2), options.steps)
  optimizer = optax.adam(schedule)

  @functools.partial(jax.jit, donate_argnums=0)
  def step_fn(state, image, key):
    params, opt_state = state
    (_, error), gradient = jax.value_and_grad(_loss, argnums=1, has_aux=True)(
      module, params, image, key, options.kl_weight
    )
    updates, opt_state = optimizer.update(gradient, opt_state)
    return (optax.apply_updates(params, updates), opt_state), error

  state = params, optimizer.init(params)
  with contextlib.closing(data), Progress(total=options.steps, desc="autoencoder", unit="step") as bar:
    for step in range(options.steps):
      state, error = step_fn(state, next(data)["image"], jax.random.fold_in(key_steps, step))
      bar.update()
  if not np.isfinite(error):
    raise FloatingPointError(
      f"the autoencoder's error is {float(error)} after {options.steps} steps, and it is not saved: lower "
      "prepare.fit.learning_rate"
    )
  params = state[0]
  module = module.clone(scaling_factor=_scaling_factor(module, params, source))
  log.info("autoencoder: mean |x − decode(z)| %.4f of [−1, 1], scaling %.4f", float(error), module.scaling_factor)
  return module, params


def _loss(
  module: Autoencoder, params: Any, image: jax.Array, key: jax.Array, kl_weight: float
) -> tuple[jax.Array, jax.Array]:
  mean, logvar = module.apply({"params": params}, image, method="encode")
  noise = jax.random.normal(key, mean.shape, mean.dtype)
  decoded = module.apply({"params": params}, posterior_sample(mean, logvar, noise), method="decode")
  error = jnp.mean(jnp.abs(image - decoded))
  divergence = 0.5 * jnp.mean(mean**2 + jnp.exp(logvar) - 1 - logvar)
  return error + kl_weight * divergence, error


def _scaling_factor(module: Autoencoder, params: Any, source: Source) -> float:
  images = arrays(source, spread(source, SCALING_IMAGES))
  mean, logvar = jax.jit(functools.partial(module.apply, method="encode"))({"params": params}, images)
  return float(1 / jnp.sqrt(jnp.var(mean) + jnp.mean(jnp.exp(logvar))))
