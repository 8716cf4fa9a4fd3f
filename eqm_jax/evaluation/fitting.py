"""Fits the small classifier whose features stand for Inception's where images are small."""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from eqm_jax.networks.classifier import Classifier

BATCH = 128

LARGEST = 64  # pixels along a side
LEARNING_RATE = 2e-3
SEED = 0  # of the split, the order and the parameters: always the same, so that figures can be compared

log = logging.getLogger(__name__)


def fit(images: np.ndarray, labels: np.ndarray, num_classes: int, steps: int) -> tuple[Classifier, Any, float]:
  """Fits a classifier to three quarters of the images, on one device, so that it has the same bits on any number.

  On CPUs that holds for one number of threads (`hardware.xla_cpu_threads`), on GPUs for deterministic operations.

  Args:
    images: [N, H, W, C] in [−1, 1].
    labels: [N].
    num_classes: how many there may be.
    steps: of Adam, with batches of up to BATCH.

  Returns:
    The module, its parameters, and its accuracy on the other quarter.

  Raises:
    ValueError: if there are too few images or classes.
  """
  if num_classes < 2 or np.min(np.bincount(labels, minlength=num_classes)) < 2:
    raise ValueError(
      f"evaluation.features: a classifier needs two classes and two images of each; the data has {len(images)} images "
      f"of {num_classes} classes"
    )
  if max(images.shape[1:3]) > LARGEST:
    raise ValueError(
      f"evaluation.features: the classifier is for images of up to {LARGEST} × {LARGEST} pixels, "
      f"not {images.shape[1:]}: use 'inception'"
    )
  import sklearn.model_selection

  fit_x, held_x, fit_y, held_y = sklearn.model_selection.train_test_split(
    images, labels, test_size=0.25, random_state=SEED, stratify=labels
  )
  module = Classifier(num_classes)
  with jax.default_device(jax.local_devices()[0]):
    params = _fit(module, fit_x, fit_y, steps)
    parts = [held_x[first : first + BATCH] for first in range(0, len(held_x), BATCH)]
    seen = np.concatenate([_logits(module, params, part).argmax(axis=1) for part in parts])
  accuracy = float(np.mean(np.asarray(seen) == held_y))
  log.info("feature classifier: %.3f of %d held-out images are seen right", accuracy, len(held_y))
  return module, jax.device_get(params), accuracy


def _fit(module: Classifier, images: np.ndarray, labels: np.ndarray, steps: int) -> Any:
  params = jax.jit(module.init)(jax.random.key(SEED), jnp.asarray(images[:1]))["params"]
  optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps))

  def loss_fn(params, image_B, label_B):
    logits = module.apply({"params": params}, image_B)["logits"]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, label_B))

  @functools.partial(jax.jit, donate_argnums=0)
  def step_fn(state, image_B, label_B):  # not one loop on the device: there a CPU computes convolutions in one thread
    params, opt_state = state
    updates, opt_state = optimizer.update(jax.grad(loss_fn)(params, image_B, label_B), opt_state)
    return optax.apply_updates(params, updates), opt_state

  state, rng = (params, optimizer.init(params)), np.random.default_rng(SEED)
  for _ in range(steps):
    index_B = rng.integers(len(images), size=min(BATCH, len(images)))
    state = step_fn(state, images[index_B], labels[index_B])
  return state[0]


@functools.partial(jax.jit, static_argnums=0)
def _logits(module: Classifier, params: Any, images: jax.Array) -> jax.Array:
  return module.apply({"params": params}, images)["logits"]
