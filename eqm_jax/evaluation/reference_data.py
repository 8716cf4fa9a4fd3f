"""Real data that samples are compared with: opened once, reduced to statistics, read from and written to files."""

import contextlib
import json
import logging
import os
from collections.abc import Callable
from typing import Any

import ml_collections
import numpy as np

from eqm_jax import distributed, plotting
from eqm_jax.data import arrays as array_files
from eqm_jax.data.samples import Source, arrays, spread
from eqm_jax.evaluation import features as features_lib
from eqm_jax.evaluation import metrics, plane
from eqm_jax.evaluation.features import Features
from eqm_jax.evaluation.metrics import Gaussian, GaussianStatistics, ReferenceStatistics
from eqm_jax.io import atomic_write
from eqm_jax.networks import dit
from eqm_jax.progress import Progress
from eqm_jax.sampling.generator import Generator, Row, Samples
from eqm_jax.sampling.sample_store import SampleStore
from eqm_jax.trees import fingerprint

MAX_FEATURES = 10_000  # real samples whose features are kept, as many as ADM's file has
CHUNK = 512  # real samples in memory at a time: 0.4 GB as images of 256×256
PREVIEW = 100  # samples of each sample set that are kept as images
NAMES = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}  # of the statistics of a kind, in a file

log = logging.getLogger(__name__)


class ReferenceData:
  """The real data of an evaluation, and what samples are measured with."""

  def __init__(self, options: ml_collections.ConfigDict, source: Source | None, images: Source | None, threads: int):
    """Reads the real data, computes its statistics, and fits the classifiers.

    Args:
      options: the section `evaluation`, already checked.
      source: real samples: images, latents or points; None where nothing in `options` needs them.
      images: real images; None where nothing in `options` needs them.
      threads: that read.

    Raises:
      ValueError: if the data or a file does not fit.
    """
    self._options, self._threads = options, threads
    self._in_pixels = source is not None and is_pixels(source)
    self.in_plane = source is not None and source.shape == plane.SHAPE
    self._fitted_to = None  # the data that the pixel classifier's verdicts depend on
    self.computed_with = distributed.computed_with()
    self.class_names = next((data.class_names for data in (source, images) if data is not None), None)
    self.real_N = self._classifier = None
    if options.classifier_accuracy or self.in_plane:
      chosen = spread(source, MAX_FEATURES)
      self.real_N = arrays(source, chosen, threads)  # in the plane, pictures show these
    if options.classifier_accuracy:
      self._fitted_to = {"content_hash": source.content_hash, "samples": len(source)}
      self._classifier = features_lib.PixelClassifier(self.real_N, source.labels[chosen])
    self._spaces = [self._open_space(name, source, images, threads) for name in options.features]

  def _open_space(self, name: str, source: Source | None, images: Source | None, threads: int):
    """Features by name, the statistics of the real data in them, and the real images; None without images."""
    fit_to = None
    if name == "classifier":
      chosen = spread(images, MAX_FEATURES)
      fit_to = arrays(images, chosen, threads), images.labels[chosen], images.num_classes
    space = features_lib.open_features(name, self._options, fit_to, self._in_pixels)
    reference = features_lib.references(self._options).get(name)
    if reference:
      return space, load(reference, space), None
    from_images = name in features_lib.IMAGE_FEATURES
    real = images if from_images else source
    return space, compute_statistics(real, space, from_images, threads), real if is_pixels(real) else None

  @property
  def origins(self) -> list[dict[str, Any]]:
    """Where the statistics of each kind of features come from."""
    return [statistics.origin for _, statistics, _ in self._spaces]

  def describe(self) -> dict[str, Any]:
    """The real data and the features, for a report."""
    described = {
      space.name: {**space.settings, "real": {**statistics.origin, **_between_real(statistics)}}
      for space, statistics, _ in self._spaces
    }
    if self._classifier:
      described["classifier_accuracy"] = {
        "classifier": self._classifier.name,
        "held_out_accuracy": self._classifier.held_out_accuracy,
      }
    return described

  def sample(self, name: str, row: Row, labels: np.ndarray, generator: Generator, directory: str) -> SampleStore:
    """Samples a row, one sample per label, and stores the measurements of each chunk; finished chunks are kept.

    Args:
      name: of the row.
      row: of the config's samplers.
      labels: [N].
      generator: the model to sample from.
      directory: of all sample sets.

    Returns:
      The sample set. In a run of several processes each samples its share: `SampleStore.wait` for the others.
    """
    settings = {
      **self.settings(row, generator),
      "model": {**dit.attributes(generator.model), "sha256": fingerprint(generator.params)},
      "save_npz": self._options.save_npz,
      "classifier_fitted_to": self._fitted_to,
      "computed_with": self.computed_with,  # a sample set has the bits of one kind of machine, whoever resumes it
    }
    store = SampleStore(directory, name, settings, len(labels), self._options.chunk_size)
    own, missing = store.own(), store.missing()
    if len(missing) < len(own):
      log.info("%s: resuming with %d of %d chunks of samples", name, len(missing), len(own))
    sampled, seconds = 0, 0.0
    for number, samples in generator.chunks(name, row, labels, store.chunk_size, missing):
      store.write(number, self._measure(samples, number, generator))
      sampled, seconds = sampled + len(samples.result.nfe), seconds + samples.seconds
    if sampled:
      log.info("%s: %d samples, %.1f images/s", name, sampled, sampled / seconds)
    return store

  def settings(self, row: Row, generator: Generator) -> dict[str, Any]:
    """Everything that samples and their features depend on, except the weights and the number of samples."""
    readout = generator.readout(row)
    return {
      "row": row.to_dict(),
      "seed": self._options.seed,
      "labels": self._options.labels,
      "batch_size": generator.batch_size,
      "multiplier": generator.multiplier,
      "readout": readout and fingerprint(readout),
      "autoencoder": f"{generator.autoencoder_id} {generator.decoder_dtype}",
      "features": [space.settings for space, *_ in self._spaces],
    }

  def metrics(self, store: SampleStore) -> dict[str, dict[str, float]]:
    """Metrics of a finished sample set, by kind of features.

    Raises:
      ValueError: if the samples cannot be compared: not finite, or all the same.
    """
    finite_N = store.array("finite")
    if not np.all(finite_N):
      raise ValueError(f"{np.sum(~finite_N)} of {len(finite_N)} samples are not finite: did they diverge?")
    result, saved = {}, store.names()
    for space, statistics, _ in self._spaces:
      kinds = [name for name in saved if name.startswith(f"{space.name}.")]
      result[space.name] = metrics.compute({name.split(".")[1]: store.array(name) for name in kinds}, statistics)
    return result

  def preview(self, store: SampleStore) -> np.ndarray:
    """The first samples of a sample set as images."""
    return _first(store, "preview", PREVIEW)

  def neighbours(self, store: SampleStore, count: int) -> dict[str, np.ndarray]:
    """The nearest real image of each of the first samples, [count, H, W, C], by kind of features.

    Where the data has more than MAX_FEATURES images, so many are looked at. Kinds without real images are left out:
    latents, points, and statistics from a file.
    """
    found = {}
    for space, statistics, real in self._spaces:
      if real is not None:
        index_N, _ = metrics.nearest(_first(store, f"{space.name}.pool", count), statistics.features)
        found[space.name] = arrays(real, spread(real, MAX_FEATURES)[index_N], self._threads)
    return found

  def classifier_accuracy(self, store: SampleStore, labels: np.ndarray) -> float | None:
    """How often the classifier of real samples sees the requested class; None where the config does not ask for it."""
    return float(np.mean(store.array("predicted") == labels)) if self._classifier else None

  def _measure(self, samples: Samples, number: int, generator: Generator) -> dict[str, np.ndarray]:
    """The arrays that are stored for a chunk."""
    options, result = self._options, samples.result
    arrays = {
      "nfe": result.nfe,
      "norm": result.norm,
      "status": result.status,
      "restarts": result.restarts,
      "seconds": np.asarray([samples.seconds]),
      "executed_nfe": np.asarray([samples.executed_nfe]),
      "finite": np.all(np.isfinite(result.x), axis=(1, 2, 3)),
    }
    preview = max(0, min(PREVIEW - number * options.chunk_size, len(result.x)))
    every_image = options.save_npz or any(space.name in features_lib.IMAGE_FEATURES for space, *_ in self._spaces)
    shown = result.x if every_image else result.x[:preview]
    pixels = generator.pixels(shown) if len(shown) else shown
    images = plotting.to_uint8(np.nan_to_num(pixels)) if every_image else pixels  # `finite` reports what was not
    for space, *_ in self._spaces:
      extracted = space.extract(images if space.name in features_lib.IMAGE_FEATURES else result.x)
      arrays |= {f"{space.name}.{kind}": array for kind, array in extracted.items()}
    if self._classifier:
      x = np.nan_to_num(result.x)
      arrays["predicted"] = self._classifier.predict(np.clip(x, -1, 1) if self._in_pixels else x)
    if preview:
      arrays["preview"] = pixels[:preview]
    if options.save_npz:
      arrays["image"] = images
    return arrays


def _first(store: SampleStore, name: str, count: int) -> np.ndarray:
  """The first `count` rows of an array of a sample set, or all."""
  return np.concatenate([store.read(name, number) for number in store.numbers[: -(-count // store.chunk_size)]])[:count]


def is_pixels(source: Source) -> bool:
  """Whether samples are pictures in [−1, 1]: neither latents nor points of the plane."""
  return source.autoencoder_id is None and source.shape != plane.SHAPE


def compute_statistics(source: Source, features: Features, from_images: bool, threads: int) -> ReferenceStatistics:
  """Statistics of all samples of a data set; each process computes a share.

  Args:
    source: the real data.
    features: to compute them in.
    from_images: whether the features take uint8 images instead of the samples themselves.
    threads: that read ahead.

  Raises:
    ValueError: if there are fewer than two samples, or all are the same.
  """
  if len(source) < 2:
    raise ValueError(
      f"the data set has {len(source)} sample, but statistics of the real data need 2: give data.source more, or set "
      "evaluation.num_samples = None"
    )

  def extract(indices):
    samples = arrays(source, indices, threads)
    return features.extract(plotting.to_uint8(samples) if from_images else samples)

  chosen = spread(source, MAX_FEATURES)
  parts = [extract(chosen[first : first + CHUNK]) for first in range(0, len(chosen), CHUNK)]
  kept = {kind: np.concatenate([part[kind] for part in parts]) for kind in parts[0] if kind in NAMES}
  if len(source) > MAX_FEATURES:
    gaussians = _over_all(len(source), extract, {kind: array.shape[1] for kind, array in kept.items()})
  else:
    gaussians = {kind: GaussianStatistics.of(kept[kind]).gaussian for kind in NAMES if kind in kept}
  for kind, gaussian in gaussians.items():
    if not np.all(np.isfinite(gaussian.covariance)):
      raise ValueError(f"{features.name} features of the real data are not finite ({kind}): is the data damaged?")
    metrics.check_spread(f"{features.name} features of the real data", np.diagonal(gaussian.covariance))
  origin = {
    "from": "the data set",
    "content_hash": source.content_hash,
    "samples": len(source),
    "features": features.settings,
  }
  return ReferenceStatistics(gaussians, kept["pool"], origin)


def _over_all(count: int, extract: Callable, sizes: dict[str, int]) -> dict[str, Gaussian]:
  """Chunk by chunk; process p of n takes every n-th chunk, and the statistics of all are merged."""
  process, processes = distributed.process_index_and_count()
  own = {kind: GaussianStatistics(0, np.zeros(size), np.zeros((size, size))) for kind, size in sizes.items()}
  for first in Progress(range(process * CHUNK, count, processes * CHUNK), desc="statistics of real data", unit="chunk"):
    extracted = extract(np.arange(first, min(first + CHUNK, count)))
    own = {kind: metrics.merge([total, GaussianStatistics.of(extracted[kind])]) for kind, total in own.items()}
  merged = {}
  for kind, statistics in own.items():
    parts = (statistics.count, statistics.mean, statistics.scatter)
    everywhere = zip(*[distributed.from_all(np.asarray(part, np.float64)) for part in parts])
    merged[kind] = metrics.merge(GaussianStatistics(int(n), mean, scatter) for n, mean, scatter in everywhere).gaussian
  return merged


def save(path: str, statistics: ReferenceStatistics):
  """Writes an .npz with mu, sigma, mu_s and sigma_s, which ADM's and pytorch-fid's programs read too.

  Raises:
    ValueError: if the file exists.
  """
  if os.path.exists(path):
    raise ValueError(f"{path} exists already: remove it first, or give another path")
  named = {}
  for kind, names in NAMES.items():
    if kind in statistics.gaussians:
      named |= dict(zip(names, (statistics.gaussians[kind].mean, statistics.gaussians[kind].covariance)))
  os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
  with atomic_write(path) as file:
    np.savez(file, **named, features=statistics.features, about=json.dumps(statistics.origin))


def check_path(name: str, path: str):
  """Raises ValueError if there is no file of statistics of the features with this name."""
  if not os.path.isfile(path):
    raise ValueError(
      f"evaluation.{name}.reference: {path}: no such statistics. --mode=statistics computes them from the data set; "
      "docs/evaluation.md says where ADM's are"
    )


def load(path: str, features: Features) -> ReferenceStatistics:
  """Reads a file of `save`, ADM's VIRTUAL_*.npz, or, for features of Inception, pytorch-fid's .npz.

  ADM's file also holds 10,000 images, which MIND, precision, recall and the kernel distance are computed with. Its
  statistics are those of Inception: for features of another network they are computed from these images.

  Args:
    path: the file.
    features: that the samples are compared in.

  Raises:
    ValueError: naming the file, if it is missing or damaged, or has other features or features of another size.
  """
  check_path(features.name, path)
  with _naming_key(features.name):
    headers = array_files.read_headers(path)
    if features.name != "inception" and "about" not in headers:
      return _of_foreign_images(path, "arr_0" in headers, features)
    known = [name for names in NAMES.values() for name in names if name in headers]
    if not {"mu", "sigma"} <= set(known):
      raise ValueError(
        f"{path}: holds no statistics (mu and sigma), but {', '.join(headers) or 'one array'}: --mode=statistics "
        "computes them from a data set of images"
      )
    ours = [name for name in ("about", "features") if "about" in headers and name in headers]
    saved = array_files.load(path, known + ours)
    origin = _recorded_origin(path, saved)
    gaussians = {
      kind: _checked(path, kind, Gaussian(saved[mean], saved[covariance]), features)
      for kind, (mean, covariance) in NAMES.items()
      if {mean, covariance} <= set(known)
    }
    if origin is None:
      origin = _foreign_origin(path, "spatial" in gaussians, features)
      kept = _features_of_images(path, features) if "arr_0" in headers else None
    elif origin["features"] != features.settings:
      raise ValueError(
        f"{path}: statistics of {origin['features']}, but the samples' features are {features.settings}: compute "
        "others by --mode=statistics"
      )
    else:
      kept = saved.get("features")
      if kept is not None and (kept.shape[1:] != gaussians["pool"].mean.shape or not np.all(np.isfinite(kept))):
        raise ValueError(
          f"{path}: features of shape {kept.shape} are not finite, or not of the {len(gaussians['pool'].mean)} numbers "
          "of mu: compute them again, --mode=statistics"
        )
  return ReferenceStatistics(gaussians, kept, {**origin, "from": os.path.basename(path)})


def _recorded_origin(path: str, saved: dict[str, np.ndarray]) -> dict[str, Any] | None:
  """What `save` records of its statistics; None for another program's."""
  if "about" not in saved:
    return None
  try:
    return {"features": None, **json.loads(str(saved["about"]))}
  except (ValueError, TypeError) as error:
    raise ValueError(f"{path}: its record `about` is damaged ({error}): compute it again, --mode=statistics") from error


def _features_of_images(path: str, features: Features) -> np.ndarray:
  """Features of the images that ADM's file holds beside the statistics."""
  images = array_files.load(path, ["arr_0"])["arr_0"][:MAX_FEATURES]
  if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not len(images):
    raise ValueError(
      f"{path}: arr_0 is {images.dtype}{list(images.shape)}, but images beside statistics are uint8 [N, H, W, 3]: "
      "leave it out"
    )
  return features.extract(images)["pool"]


def _of_foreign_images(path: str, has_images: bool, features: Features) -> ReferenceStatistics:
  """Statistics of the images in a file of another program, whose own statistics are those of Inception."""
  if not has_images:
    raise ValueError(
      f"{path}: statistics of another program, which are of Inception, but the samples' features are {features.name}, "
      "and it holds no images (arr_0) to compute others from: compute statistics by --mode=statistics"
    )
  pool = _features_of_images(path, features)
  if len(pool) < 2:
    raise ValueError(f"{path}: arr_0 holds {len(pool)} image, but statistics need 2: give more")
  gaussian = GaussianStatistics.of(pool).gaussian
  metrics.check_spread(f"{features.name} features of arr_0", np.diagonal(gaussian.covariance))
  origin = {"from": os.path.basename(path), "samples": len(pool), "features": features.settings}
  return ReferenceStatistics({"pool": gaussian}, pool, origin)


def _foreign_origin(path: str, has_spatial: bool, features: Features) -> dict[str, Any]:
  """The origin of statistics that another program wrote, which does not record it."""
  program, resizes = ("ADM", ("tf1",)) if has_spatial else ("pytorch-fid", ("half_pixel", "tf1"))
  if features.settings.get("resize") not in resizes:
    raise ValueError(
      f"{path}: {program}'s statistics are of inception with resize {' or '.join(resizes)}, not of {features.settings}"
    )
  origin = {"features": "not recorded", "program": program}
  if program == "pytorch-fid" and features.settings["resize"] == "tf1":
    origin["warning"] = "pytorch-fid's program resizes half_pixel, the samples are resized as in TensorFlow 1"
    log.warning("%s: %s; such statistics by others may fit", path, origin["warning"])
  return origin


def _checked(path: str, kind: str, gaussian: Gaussian, features: Features) -> Gaussian:
  """The Gaussian in float64, if it fits the features."""
  mean, covariance = gaussian.mean, gaussian.covariance
  size = features.sizes.get(kind, mean.size)
  if mean.shape != (size,) or covariance.shape != (size, size):
    raise ValueError(
      f"{path}: statistics of shapes {mean.shape} and {covariance.shape}, but {kind} features of {features.name} "
      f"have {size} dimensions: give statistics of the same features, as --mode=statistics computes them"
    )
  if mean.dtype.kind not in "iuf" or covariance.dtype.kind not in "iuf":
    raise ValueError(f"{path}: {kind} statistics are {mean.dtype} and {covariance.dtype}: give numbers")
  mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
  if not (np.all(np.isfinite(mean)) and np.all(np.isfinite(covariance))):
    raise ValueError(f"{path}: {kind} statistics are not finite: compute them again, from images without damage")
  if np.min(np.diagonal(covariance)) < 0 or not np.allclose(covariance, covariance.T, atol=1e-3 * np.ptp(covariance)):
    raise ValueError(
      f"{path}: {kind} statistics have no covariance (symmetric, variances of at least 0): compute them again"
    )
  return Gaussian(mean, covariance)


@contextlib.contextmanager
def _naming_key(name: str):
  """Names the key in errors of reading its file."""
  try:
    yield
  except ValueError as error:
    raise ValueError(f"evaluation.{name}.reference: {error}") from error


def _between_real(statistics: ReferenceStatistics) -> dict[str, float]:
  """Distances within the real data, the scale on which those of samples are read.

  Returns:
    "frechet_between_halves", the mean Fréchet distance between random halves, where all features are kept, and
    "nearest_other", the median distance of real samples to the nearest other one.
  """
  features = statistics.features
  if features is None or len(features) < 2:
    return {}
  nearest = {"nearest_other": metrics.nearest_other(features)}
  if statistics.origin.get("samples") != len(features) or len(features) < 4:
    return nearest
  rng = np.random.default_rng(0)
  repeats = 10 if features.shape[1] <= 512 else 1  # with more features each takes seconds
  distances = []
  for _ in range(repeats):
    halves = np.array_split(features[rng.permutation(len(features))], 2)  # of copies, a half may be all the same
    distances.append(metrics.frechet_of_gaussians(*(GaussianStatistics.of(half).gaussian for half in halves)))
  return {"frechet_between_halves": float(np.mean(distances)), **nearest}
