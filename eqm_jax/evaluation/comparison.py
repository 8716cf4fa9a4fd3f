"""Samples against real data: drawn unit by unit, and compared in every kind of features that a config names."""

import logging
from typing import Any

import ml_collections
import numpy as np

from eqm_jax import devices
from eqm_jax.convert.fingerprint import fingerprint
from eqm_jax.data.samples import Source
from eqm_jax.evaluation import agreement, distances, features, pictures, plane, real, samplers, scores
from eqm_jax.evaluation.parts import Parts
from eqm_jax.networks import dit

SHOWN = 100  # samples of each series that are kept as images

log = logging.getLogger(__name__)


class Comparison:
  """The real data, opened and reduced to statistics once."""

  def __init__(self, options: ml_collections.ConfigDict, source: Source | None, images: Source | None, threads: int):
    """Reads the real data, and fits what is fitted to it.

    Args:
      options: the section evaluation, checked.
      source: the real samples: images, latents or points; None where nothing in `options` needs them.
      images: the real images; None where nothing in `options` needs them.
      threads: that read.

    Raises:
      ValueError: if the data or a file does not fit.
    """
    self._options = options
    self._in_pixels = source is not None and real.is_pixels(source)
    self.in_plane = source is not None and source.shape == plane.SHAPE
    # What a classifier is fitted to decides what it sees.
    self._fitted_to = {"contents": source.contents, "samples": len(source)} if options.label_agreement else None
    self.computed_with = devices.computed_with()
    self.real_N = self._classifier = None
    if options.label_agreement or self.in_plane:
      some = real.some(source)
      self.real_N = real.arrays(source, some, threads)  # in the plane, those that pictures show
    if options.label_agreement:
      self._classifier = agreement.Classifier(self.real_N, source.labels[some])
    self._spaces = []
    for name in options.features:
      fitted_to = None
      if name == "classifier":
        chosen = real.some(images)
        fitted_to = real.arrays(images, chosen, threads), images.labels[chosen], images.num_classes
      space = features.open_features(name, options, fitted_to, self._in_pixels)
      if name == "inception" and options.inception.reference:
        known = real.load(options.inception.reference, space)
      else:
        of_images = name in features.OF_IMAGES
        known = real.statistics(images if of_images else source, space, of_images, threads)
      self._spaces.append((space, known))

  @property
  def real_data(self) -> list[dict[str, Any]]:
    """Where the statistics of each kind of features are from."""
    return [known.about for _, known in self._spaces]

  def describe(self) -> dict[str, Any]:
    """What a report says of the real data and of the features."""
    found = {
      space.name: {**space.identity, "real": {**known.about, **_between_halves(known)}} for space, known in self._spaces
    }
    if self._classifier:
      found["label_agreement"] = {
        "classifier": self._classifier.name,
        "classifier_accuracy": self._classifier.held_out_accuracy,
      }
    return found

  def draw(
    self,
    name: str,
    row: ml_collections.ConfigDict,
    model: dit.DiT,
    params: Any,
    label_N: np.ndarray,
    batching: samplers.Batching,
    directory: str,
  ) -> Parts:
    """Draws a series of samples and writes what is known of each unit; units that are there already stay.

    Args:
      name: of the row.
      row, model, params, label_N, batching: as in `samplers.draw`.
      directory: of all series.

    Returns:
      The series. In a run of several processes each draws its share: `Parts.wait` for the others.
    """
    about = {
      **self.settings(row, batching),
      "model": {**dit.attributes(model), "sha256": fingerprint(params)},
      "npz": self._options.npz,
      "agreement_with": self._fitted_to,
      "computed_with": self.computed_with,  # a series has the bits of one kind of machine, whoever resumes it
    }
    parts = Parts(directory, name, about, len(label_N), self._options.unit)
    own, missing = parts.own(), parts.missing()
    if len(missing) < len(own):
      log.info("%s: goes on with %d of %d units of samples", name, len(missing), len(own))
    for number, drawn in samplers.draw_units(name, row, model, params, label_N, batching, parts.size, missing):
      parts.write(number, self._measured(drawn, number, batching))
    return parts

  def settings(self, row: ml_collections.ConfigDict, batching: samplers.Batching) -> dict[str, Any]:
    """All that samples and their features depend on beyond rounding, but for the weights and the number of samples."""
    return {
      "row": row.to_dict(),
      "seed": self._options.seed,
      "labels": self._options.labels,
      "batch_size": batching.batch_size,
      "multiplier": batching.multiplier,
      "autoencoder": f"{batching.autoencoder} {batching.decoder_dtype}",
      "features": [space.identity for space, _ in self._spaces],
    }

  def scores(self, parts: Parts) -> dict[str, dict[str, float]]:
    """The scores of a finished series, for each kind of features.

    Raises:
      ValueError: if the samples cannot be compared: not finite, or all the same.
    """
    finite_N = parts.array("finite")
    if not np.all(finite_N):
      raise ValueError(f"{np.sum(~finite_N)} of {len(finite_N)} samples are not finite: did they diverge?")
    found, there = {}, parts.names()
    for space, known in self._spaces:
      kinds = [name for name in there if name.startswith(f"{space.name}.")]
      found[space.name] = scores.scores({name.split(".")[1]: parts.array(name) for name in kinds}, known)
    return found

  def shown(self, parts: Parts) -> np.ndarray:
    """The first samples of a series, as a picture shows them."""
    return np.concatenate([parts.read("shown", number) for number in parts.numbers[: -(-SHOWN // parts.size)]])

  def label_agreement(self, parts: Parts, label_N: np.ndarray) -> float | None:
    """How often the classifier of real samples sees the class that was asked for; None: it was not asked."""
    return float(np.mean(parts.array("seen") == label_N)) if self._classifier else None

  def _measured(self, drawn: samplers.Drawn, number: int, batching: samplers.Batching) -> dict[str, np.ndarray]:
    """What is kept of a unit."""
    options, result = self._options, drawn.result
    arrays = {
      "evaluations": result.evaluations_B,
      "status": result.status_B,
      "restarts": result.restarts_B,
      "seconds": np.asarray([drawn.seconds]),
      "hardware": np.asarray([drawn.hardware_evaluations]),
      "finite": np.all(np.isfinite(result.x), axis=(1, 2, 3)),
    }
    shown = max(0, min(SHOWN - number * options.unit, len(result.x)))
    in_images = any(space.name in features.OF_IMAGES for space, _ in self._spaces)
    whole = in_images or options.npz
    pixels = batching.pixels(result.x[: None if whole else shown]) if whole or shown else result.x[:0]
    images = pictures.to_uint8(np.nan_to_num(pixels)) if whole else pixels  # what is not finite is told later
    for space, _ in self._spaces:
      extracted = space.extract(images if space.name in features.OF_IMAGES else result.x)
      arrays |= {f"{space.name}.{kind}": array for kind, array in extracted.items()}
    if self._classifier:
      x = np.nan_to_num(result.x)
      arrays["seen"] = self._classifier.predict(np.clip(x, -1, 1) if self._in_pixels else x)
    if shown:
      arrays["shown"] = pixels[:shown]
    if options.npz:
      arrays["image"] = images
    return arrays


def _between_halves(known: real.Statistics) -> dict[str, float]:
  """The Fréchet distance of random halves of the real data, on average: what "equal" looks like."""
  if known.features is None or known.about.get("samples") != len(known.features) or len(known.features) < 4:
    return {}
  rng = np.random.default_rng(0)
  repeats = 10 if known.features.shape[1] <= 512 else 1  # each takes seconds with more
  orders = [rng.permutation(len(known.features)) for _ in range(repeats)]
  halves = [np.array_split(known.features[order], 2) for order in orders]
  return {"frechet_between_halves": float(np.mean([distances.frechet_distance(a, b) for a, b in halves]))}
