"""Features that samples are compared in: raw numbers, a small classifier's, or a published network's.

Also here: the support vector machine that judges whether a sample shows the class it was sampled for.
"""

import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Collection
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from eqm_jax import distributed
from eqm_jax.checkpoints import dinov2 as dinov2_checkpoint
from eqm_jax.checkpoints import inception as inception_checkpoint
from eqm_jax.checks import at_least, one_of
from eqm_jax.networks import dinov2, inception
from eqm_jax.networks.classifier import Classifier
from eqm_jax.trees import fingerprint

# Of the classifier; the seed of its split, order and parameters never changes, so that figures can be compared.
BATCH, LEARNING_RATE, SEED = 128, 2e-3, 0
MAX_SIZE = 64  # side of the images that the classifier takes, in pixels

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Published:
  """A published network of RGB images; its settings are the section of `evaluation` that has its name."""

  title: str
  file: str  # the published weights
  resizes: tuple[str, ...]
  smallest: int  # height and width of the images, in pixels
  without_weights: Callable[[], tuple[nn.Module, Any]]  # () → the module, and the shapes of its parameters
  load: Callable[[str], tuple[nn.Module, Any]]  # path → the module, and its parameters
  # (module, parameters, images [B, H, W, 3] uint8, resize) → {kind: [B, ...]}
  apply: Callable[[nn.Module, Any, jax.Array, str], dict[str, jax.Array]]
  # module → what identifies it besides its parameters, for reports and files of statistics
  details: Callable[[nn.Module], dict[str, Any]] = lambda module: {}


def _apply_inception(module: nn.Module, params: Any, images: jax.Array, resize: str) -> dict[str, jax.Array]:
  found = inception.features(params, images, resize)
  spatial = found["spatial"].reshape(len(images), -1)
  return {"pool": found["pool"], "spatial": spatial, "logits": found["logits_unbiased"]}


def _apply_dinov2(module: dinov2.DINOv2, params: Any, images: jax.Array, resize: str) -> dict[str, jax.Array]:
  return {"pool": dinov2.features(module, params, images, resize)}


PUBLISHED = {
  "inception": Published(
    title="Inception",
    file=inception_checkpoint.PUBLISHED,
    resizes=inception.RESIZES,
    smallest=1,
    without_weights=lambda: (inception.Inception(), inception.parameter_shapes()),
    load=lambda path: (inception.Inception(), inception_checkpoint.load(path)),
    apply=_apply_inception,
  ),
  "dinov2": Published(
    title="DINOv2",
    file=dinov2_checkpoint.PUBLISHED,
    resizes=dinov2.RESIZES,
    smallest=dinov2.DINOv2.patch_size,
    without_weights=lambda: (dinov2.DINOv2(), dinov2.parameter_shapes(dinov2.DINOv2())),
    load=dinov2_checkpoint.load,
    apply=_apply_dinov2,
    details=lambda module: {"network": module.title},
  ),
}
IMAGE_FEATURES = ("classifier", *PUBLISHED)  # computed from uint8 images
NAMES = ("raw", *IMAGE_FEATURES)


def fit_classifier(
  images: np.ndarray, labels: np.ndarray, num_classes: int, steps: int
) -> tuple[Classifier, Any, float]:
  """Fits a classifier to three quarters of the images, on one device whatever their number.

  Two fits have the same bits on CPUs with the same number of threads (`hardware.xla_cpu_threads`), and on GPUs with
  deterministic operations.

  Args:
    images: [N, H, W, C] in [−1, 1].
    labels: [N].
    num_classes: of the data set.
    steps: of Adam, with batches of up to BATCH images.

  Returns:
    The module, its parameters, and its accuracy on the other quarter.

  Raises:
    ValueError: if there are too few images or classes.
  """
  if max(images.shape[1:3]) > MAX_SIZE:
    raise ValueError(
      f"evaluation.features: the classifier is for images of up to {MAX_SIZE} × {MAX_SIZE} pixels, "
      f"not {images.shape[1:]}: use 'inception'"
    )
  fit_x, held_x, fit_y, held_y = _split("evaluation.features", images, labels, "name 'raw' only")
  module = Classifier(num_classes)
  with jax.default_device(jax.local_devices()[0]):
    params = _fit(module, fit_x, fit_y, steps)
    parts = [held_x[first : first + BATCH] for first in range(0, len(held_x), BATCH)]
    seen = np.concatenate([_logits(module, params, part).argmax(axis=1) for part in parts])
  accuracy = float(np.mean(np.asarray(seen) == held_y))
  log.info("feature classifier: accuracy %.3f on %d held-out images", accuracy, len(held_y))
  return module, jax.device_get(params), accuracy


def _split(key: str, images: np.ndarray, labels: np.ndarray, remedy: str) -> list[np.ndarray]:
  """Images and labels: three quarters to fit to and one quarter, stratified by class."""
  import sklearn.model_selection

  known, counts = np.unique(labels, return_counts=True)
  if len(known) < 2 or np.min(counts) < 2 or len(images) <= 4 * (len(known) - 1):
    single = ", ".join(map(str, known[counts < 2][:5]))
    raise ValueError(
      f"{key}: a classifier needs two classes, two images of each and four on average; the data has {len(images)} "
      f"images of {len(known)} classes{f', a single one of class {single}' if single else ''}: {remedy}"
    )
  return sklearn.model_selection.train_test_split(images, labels, test_size=0.25, random_state=SEED, stratify=labels)


def _fit(module: Classifier, images: np.ndarray, labels: np.ndarray, steps: int) -> Any:
  params = jax.jit(module.init)(jax.random.key(SEED), jnp.asarray(images[:1]))["params"]
  optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps))

  def loss_fn(params, image_B, label_B):
    logits = module.apply({"params": params}, image_B)["logits"]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, label_B))

  @functools.partial(jax.jit, donate_argnums=0)
  def step_fn(state, image_B, label_B):  # no loop on the device, where CPUs compute convolutions in one thread
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


@dataclasses.dataclass(frozen=True)
class Features:
  """One kind of features."""

  name: str  # one of NAMES
  settings: dict[str, Any]  # everything that the features depend on: distances with equal settings are comparable
  # Samples [N, H, W, C] float32 ("raw"), or images [N, H, W, C] uint8 → "pool" [N, D], and maybe "spatial" [N, S] and
  # "logits" [N, classes], all float32.
  extract: Callable[[np.ndarray], dict[str, np.ndarray]]
  sizes: dict[str, int]  # of the rows of each kind, where they are fixed


def check(options: ml_collections.ConfigDict, networks: Collection[str] | None = None):
  """Refuses features that do not exist or cannot be computed; `options` is the section `evaluation`.

  Args:
    options: the section.
    networks: of which the weights are needed; None: all published ones among the features.

  Raises:
    ValueError: naming the key and the value.
  """
  names = tuple(options.features)
  if not names or any(name not in NAMES or names.count(name) > 1 for name in names):
    raise ValueError(f"evaluation.features = {names} must name some of {', '.join(NAMES)}, each once")
  at_least("evaluation.classifier.steps", options.classifier.steps, 1)
  for name in published(options) if networks is None else networks:
    _check_published(f"evaluation.{name}", options[name], PUBLISHED[name])


def _check_published(key: str, requested: ml_collections.ConfigDict, network: Published):
  one_of(f"{key}.resize", requested.resize, network.resizes)
  if requested.dtype != "float32":
    raise ValueError(
      f"{key}.dtype = {requested.dtype!r} must be 'float32': bfloat16 moves a Fréchet distance by more than methods "
      "differ"
    )
  at_least(f"{key}.batch_size", requested.batch_size, 1)
  if not os.path.isfile(requested.path):
    raise ValueError(
      f"{key}.path = {requested.path!r}: no such file. Fetch {network.file} (docs/evaluation.md), or set "
      "evaluation.num_samples = None"
    )


def published(options: ml_collections.ConfigDict) -> list[str]:
  """The published networks among the features of the section `evaluation`."""
  return [name for name in options.features if name in PUBLISHED]


def references(options: ml_collections.ConfigDict) -> dict[str, str]:
  """{name of a published network among the features: file of the real images' statistics}, where one is given."""
  sections = {name: options[name] for name in published(options)}
  return {name: requested.reference for name, requested in sections.items() if requested.reference}


def open_features(
  name: str, options: ml_collections.ConfigDict, images: tuple[np.ndarray, np.ndarray, int] | None, in_pixels: bool
) -> Features:
  """Features by name; `options` is the section `evaluation`, which `check` has passed.

  Args:
    images: real images [N, H, W, C], their labels and the number of classes, to fit "classifier" to.
    in_pixels: whether samples are pixels, which "raw" clips to [−1, 1].

  Raises:
    ValueError: if a file of weights does not fit, or the data has too few classes or images.
  """
  if name == "raw":
    return Features(name, {"name": name}, functools.partial(_raw, in_pixels=in_pixels), {})
  if name in PUBLISHED:
    return _open_published(name, options[name])
  module, params, accuracy = fit_classifier(*images, options.classifier.steps)
  # Two fits on GPUs differ in their bits, so all processes take those of the first.
  params, accuracy = distributed.from_first(params), float(distributed.from_all(np.asarray(accuracy))[0])
  settings = {"name": name, "sha256": fingerprint(params), "held_out_accuracy": accuracy, "dtype": "float32"}
  apply = functools.partial(_classify, module, distributed.replicate(params))
  return Features(name, settings, _batched(apply, BATCH), {})


def _open_published(name: str, requested: ml_collections.ConfigDict) -> Features:
  network = PUBLISHED[name]
  module, params = network.load(requested.path)
  settings = {"name": name, "resize": requested.resize, **network.details(module), "sha256": fingerprint(params)}
  apply = functools.partial(network.apply, module, distributed.replicate(params), resize=requested.resize)
  shapes = jax.eval_shape(apply, jax.ShapeDtypeStruct((1, 256, 256, 3), np.uint8))
  sizes = {kind: leaf.shape[1] for kind, leaf in shapes.items()}
  return Features(name, settings, _batched(apply, requested.batch_size), sizes)


def _raw(samples: np.ndarray, in_pixels: bool) -> dict[str, np.ndarray]:
  samples = samples.reshape(len(samples), -1)
  return {"pool": np.clip(samples, -1, 1) if in_pixels else samples}


def _batched(function: Callable, batch_size: int) -> Callable:
  return lambda images: distributed.in_batches(function, images, batch_size)


@functools.partial(jax.jit, static_argnums=0)
def _classify(module: Classifier, params: Any, images: jax.Array) -> dict[str, jax.Array]:
  return module.apply({"params": params}, images.astype(jnp.float32) / 127.5 - 1)


class PixelClassifier:
  """A support vector machine on the numbers of samples, fitted to three quarters of the real ones.

  Its verdict on samples is the classifier accuracy: how often it sees the class that was asked for.
  """

  name = "sklearn.svm.SVC(C=10)"

  def __init__(self, images: np.ndarray, labels: np.ndarray):
    """Fits `images` [N, ...] to `labels` [N]; the split is always the same.

    Raises:
      ValueError: if there are too few images or classes.
    """
    import sklearn.svm

    key, remedy = "evaluation.classifier_accuracy = True", "set it to False"
    fit_x, held_x, fit_y, held_y = _split(key, images.reshape(len(images), -1), labels, remedy)
    self._svc = sklearn.svm.SVC(C=10).fit(fit_x, fit_y)
    self.held_out_accuracy = float(self._svc.score(held_x, held_y))  # on the other quarter

  def predict(self, images: np.ndarray) -> np.ndarray:
    """Class of each of `images` [N, ...], [N]."""
    return self._svc.predict(images.reshape(len(images), -1))

  def accuracy(self, images: np.ndarray, labels: np.ndarray) -> float:
    """Fraction of `images` [N, ...] that are classified as `labels` [N]."""
    return float(np.mean(self.predict(images) == labels))
