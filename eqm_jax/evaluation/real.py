"""The real data: as arrays, and as the statistics that samples are compared with."""

import contextlib
import dataclasses
import json
import logging
import os
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import tqdm

from eqm_jax import devices
from eqm_jax.data import pipeline
from eqm_jax.data.samples import Source
from eqm_jax.evaluation import pictures, plane
from eqm_jax.evaluation.distances import check_spread
from eqm_jax.evaluation.features import Features
from eqm_jax.evaluation.moments import Gaussian, Moments, merge
from eqm_jax.files import whole

MANY = 10_000  # real samples that stand for a whole data set where all would be too many: as many as ADM's file has
CHUNK = 512  # real samples that are held at a time: 0.4 GB as images of 256×256
READ_AHEAD = 64  # samples
KINDS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}  # of features, and their names in a file


log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Statistics:
  """What is known of the features of the real data."""

  gaussians: dict[str, Gaussian]  # "pool", and maybe "spatial"
  features: np.ndarray | None  # "pool" of up to MANY samples, [M, D]; None: not known
  about: dict[str, Any]  # where they are from


def is_pixels(source: Source) -> bool:
  """Whether samples are pictures in [−1, 1]: not latents, and not points of the plane."""
  return source.autoencoder is None and source.shape != plane.SHAPE


def sample_array(sample: dict[str, np.ndarray]) -> np.ndarray:
  """The image, or the mean of its latent (of the unmirrored side)."""
  if "image" in sample:
    return sample["image"]
  return sample["mean"] if sample["mean"].ndim == 3 else sample["mean"][0]


def some(source: Source) -> np.ndarray:
  """The indices of at most MANY samples, evenly spaced."""
  return np.linspace(0, len(source) - 1, min(MANY, len(source))).astype(int)


def arrays(source: Source, indices: np.ndarray, threads: int = 4) -> np.ndarray:
  """Samples as one array [N, H, W, C] float32."""
  batches = pipeline.in_order(source, indices, batch_size=READ_AHEAD, threads=threads)
  return np.concatenate([np.stack([sample_array(sample) for sample in samples]) for samples in batches])


def statistics(source: Source, features: Features, of_images: bool, threads: int) -> Statistics:
  """Of all samples of a data set, each process computing a share.

  Args:
    source: the data.
    features: in which.
    of_images: whether they take uint8 images, and not the samples themselves.
    threads: that read ahead.

  Raises:
    ValueError: if there are fewer than two samples, or all are the same.
  """
  about = {"from": "the data set", "contents": source.contents, "samples": len(source), "features": features.identity}
  if len(source) < 2:
    raise ValueError(f"the data set has {len(source)} sample: statistics need two")

  def extracted(indices):
    found = arrays(source, indices, threads)
    return features.extract(pictures.to_uint8(found) if of_images else found)

  chosen = some(source)
  parts = [extracted(chosen[first : first + CHUNK]) for first in range(0, len(chosen), CHUNK)]
  kept = {kind: np.concatenate([part[kind] for part in parts]) for kind in parts[0] if kind in KINDS}
  if len(source) > MANY:
    gaussians = _over_all(len(source), extracted, {kind: array.shape[1] for kind, array in kept.items()})
  else:
    gaussians = {kind: Moments.of(kept[kind]).gaussian for kind in KINDS if kind in kept}
  for kind, gaussian in gaussians.items():
    if not np.all(np.isfinite(gaussian.covariance)):
      raise ValueError(f"{features.name} features of the real data are not finite ({kind})")
    check_spread(f"{features.name} features of the real data", gaussian)
  return Statistics(gaussians, kept["pool"], about)


def _over_all(count: int, extracted: Callable, sizes: dict[str, int]) -> dict[str, Gaussian]:
  """Part by part; process p of n takes every n-th part, and the moments of all are merged."""
  process, processes = devices.process()
  own = {kind: Moments(0, np.zeros(size), np.zeros((size, size))) for kind, size in sizes.items()}
  for first in tqdm.tqdm(range(process * CHUNK, count, processes * CHUNK), desc="real data", unit="part", disable=None):
    found = extracted(np.arange(first, min(first + CHUNK, count)))
    own = {kind: merge([so_far, Moments.of(found[kind])]) for kind, so_far in own.items()}
  merged = {}
  for kind, known in own.items():
    everywhere = [devices.from_all(np.asarray(array, np.float64)) for array in (known.count, known.mean, known.scatter)]
    merged[kind] = merge(Moments(int(n), mean, scatter) for n, mean, scatter in zip(*everywhere)).gaussian
  return merged


def save(path: str, known: Statistics):
  """Writes an .npz that ADM's and pytorch-fid's programs read, too (mu, sigma, mu_s, sigma_s).

  Raises:
    ValueError: if the file is there already.
  """
  if os.path.exists(path):
    raise ValueError(f"{path} is there already: remove it first, or give another path")
  named = {}
  for kind, names in KINDS.items():
    if kind in known.gaussians:
      named |= dict(zip(names, (known.gaussians[kind].mean, known.gaussians[kind].covariance)))
  os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
  with whole(path) as file:
    np.savez(file, **named, features=known.features, about=json.dumps(known.about))


def check_path(path: str):
  """Refuses, as a ValueError, statistics that are not there."""
  if not os.path.isfile(path):
    raise ValueError(
      f"{path}: no such statistics. --mode=statistics computes them from the data set; docs/evaluation.md tells "
      "where ADM's are"
    )


def load(path: str, features: Features) -> Statistics:
  """Reads what `save` wrote, ADM's VIRTUAL_*.npz, or pytorch-fid's .npz.

  ADM's file holds 10,000 images as well, which precision, recall and the kernel distance are computed with.

  Args:
    path: the file.
    features: what the samples are compared in.

  Raises:
    ValueError: naming the file, if it is missing or damaged, of other features or of features of another size.
  """
  check_path(path)
  with _naming(path), np.load(path) as file:
    found = {name: file[name] for names in KINDS.values() for name in names if name in file}
    about = json.loads(str(file["about"])) if "about" in file else None
    kept = file["features"] if about and "features" in file else None
    images = file["arr_0"] if not about and "arr_0" in file else None
  if not {"mu", "sigma"} <= set(found):
    raise ValueError(f"{path}: holds no statistics (mu and sigma); a data set of images is no reference by itself")
  gaussians = {}
  for kind, (mean, covariance) in KINDS.items():
    if mean in found:
      gaussians[kind] = _checked(path, kind, found[mean], found[covariance], features)
  if about is None:
    program, resizes = ("ADM", ("tf1",)) if "spatial" in gaussians else ("pytorch-fid", ("half_pixel", "tf1"))
    if features.identity.get("resize") not in resizes:
      raise ValueError(
        f"{path}: {program}'s statistics are of inception with resize {' or '.join(resizes)}, "
        f"not of {features.identity}"
      )
    about = {"features": "not recorded", "program": program}
    if program == "pytorch-fid" and features.identity["resize"] == "tf1":
      about["warning"] = "pytorch-fid's program resizes half_pixel, the samples are resized as in TensorFlow 1"
      log.warning("%s: %s; such statistics by others may fit", path, about["warning"])
    if images is not None:
      kept = features.extract(images[:MANY])["pool"]
  elif about["features"] != features.identity:
    raise ValueError(f"{path}: statistics of {about['features']}, but the samples' features are {features.identity}")
  return Statistics(gaussians, kept, {**about, "from": os.path.basename(path)})


def _checked(path: str, kind: str, mean: np.ndarray, covariance: np.ndarray, features: Features) -> Gaussian:
  size = features.sizes.get(kind, len(mean))
  if mean.shape != (size,) or covariance.shape != (size, size):
    raise ValueError(
      f"{path}: statistics of shapes {mean.shape} and {covariance.shape}, but {kind} features of {features.name} "
      f"have {size} dimensions"
    )
  if not (np.all(np.isfinite(mean)) and np.all(np.isfinite(covariance))):
    raise ValueError(f"{path}: {kind} statistics are not finite")
  return Gaussian(mean.astype(np.float64), covariance.astype(np.float64))


@contextlib.contextmanager
def _naming(path: str):
  try:
    yield
  except (OSError, EOFError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
    raise ValueError(f"{path}: not a whole .npz of statistics ({error})") from error
  except ValueError as error:  # of numpy, for what it will not unpickle
    raise ValueError(f"{path}: not an .npz of statistics ({error})") from error
