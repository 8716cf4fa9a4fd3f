"""Evaluates one model: sample → distances → files.

Writes into the output directory `evaluation.json`, and for people: a grid of samples
per sampler, the descent of some samples as a strip and as an animation, and how many
evaluations the samples used.
"""

import importlib.metadata
import logging
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import tqdm
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from eqm_jax.data.sources import Source
from eqm_jax.equilibrium import field, sampler
from eqm_jax.evaluation import agreement, distances, pictures
from eqm_jax.files import write_json
from eqm_jax.networks.dit import DiT

STATUS_NAMES = {sampler.CONVERGED: "converged", sampler.BUDGET: "budget", sampler.DIVERGED: "diverged"}
STRIP_COLUMNS, ANIMATION_FRAMES = 10, 26

log = logging.getLogger(__name__)


def evaluate(
  config: ml_collections.ConfigDict, model: DiT, params: Any, source: Source, mesh: Mesh, directory: str
) -> dict[str, Any]:
  """Samples with every sampler of the config and compares with the real data.

  Args:
    config: the whole config; `samplers` and `evaluation` are read.
    model, params: what to sample.
    source: the real data.
    mesh: samples are split over its `data` and `fsdp` axes.
    directory: where the files go; made if it is not there.

  Returns:
    What `evaluation.json` holds.

  Raises:
    ValueError: before sampling, if the config does not fit.
  """
  options = config.evaluation
  if options.pictured not in config.samplers:
    raise ValueError(
      f"evaluation.pictured = {options.pictured!r} is not one of the samplers: {', '.join(config.samplers)}"
    )
  if options.samples < 2:
    raise ValueError(f"evaluation.samples = {options.samples}: a distance needs at least 2 samples")
  if model.time_input:
    raise ValueError(
      "this network is told the time: it is integrated, not descended, so it has no equilibrium samplers"
    )
  os.makedirs(directory, exist_ok=True)

  # ---------------------------------------------------------------- the real data, and what it can tell
  real = np.stack([real_sample(source[i]) for i in range(len(source))])
  classifier = agreement.Classifier(real, source.labels) if options.label_agreement else None
  label_N = _balanced_labels(options.samples, model)
  report = {
    "samples": options.samples,
    "labels": "balanced",
    "seed": options.seed,
    "weights": options.weights,
    "space": "pixels in [-1, 1]" if "image" in source[0] else "latents",
    "real": {"images": len(real), "frechet_between_halves": _between_halves(real)},
    "versions": {name: importlib.metadata.version(name) for name in ("eqm_jax", "jax", "flax", "numpy")},
    "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
    "rows": {},
  }
  if classifier:
    report["real"] |= {"classifier": classifier.name, "classifier_accuracy": classifier.held_out_accuracy}

  # ---------------------------------------------------------------- one row for each sampler
  for name, row in config.samplers.items():
    result, seconds = sample(row, model, params, label_N, options.seed, options.batch_size, mesh, name)
    images = np.clip(result.x, -1, 1) if "image" in source[0] else result.x
    scores = {"frechet": distances.frechet_distance(_flat(images), _flat(real))}
    if classifier:
      scores["label_agreement"] = classifier.agreement(images, label_N)
    evaluations = result.evaluations_B
    report["rows"][name] = {
      **row.to_dict(),
      **scores,
      "evaluations": {"mean": float(evaluations.mean()), **_quantiles(evaluations)},
      "status": {text: int(np.sum(result.status_B == code)) for code, text in STATUS_NAMES.items()},
      "seconds": seconds,
      "images_per_second": options.samples / seconds,
    }
    text = "  ".join(f"{score} {value:.3f}" for score, value in scores.items())
    log.info("%s  %s  evaluations %.1f  %.1f s", name, text, evaluations.mean(), seconds)
    pictures.grid(images[:100], 10).save(os.path.join(directory, f"samples_{name}.png"))
    if row.threshold > 0:
      title = f"{name}: each sample stops at ‖f‖ ≤ {row.threshold:g}"
      histogram = pictures.evaluations_histogram(evaluations, row.max_evaluations, title)
      histogram.save(os.path.join(directory, f"evaluations_{name}.png"))

  _draw_descent(config, model, params, directory)
  write_json(os.path.join(directory, "evaluation.json"), report)
  return report


def sample(
  row: ml_collections.ConfigDict,
  model: DiT,
  params: Any,
  label_N: np.ndarray,
  seed: int,
  batch_size: int,
  mesh: Mesh,
  title: str,
) -> tuple[sampler.Result, float]:
  """Draws one sample per label by one sampler of a config.

  Sample i starts from noise that depends on (seed, i) alone, and does not depend on
  the batches.

  Returns:
    A `Result` of numpy arrays in the order of `label_N`, and the seconds it took,
    compilation left out.
  """
  N = len(label_N)
  batch_size = min(batch_size, N)
  batches = [np.arange(start, start + batch_size) for start in range(0, N, batch_size)]
  sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
  params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))

  def run(index_B: np.ndarray, max_evaluations: int) -> sampler.Result:
    index_B = index_B % N  # the last batch is filled up with samples that are dropped below
    noise = sampler.start_noise(jax.random.key(seed), index_B, model.input_shape)
    noise, labels = jax.device_put((noise, jnp.asarray(label_N[index_B])), sharding)
    return jax.device_get(descend_as(row, model, params, labels, noise, max_evaluations))

  run(batches[0], 1)  # compiles
  begin = time.monotonic()
  progress = tqdm.tqdm(batches, desc=title, unit_scale=batch_size, unit="image", disable=None)
  results = [run(index_B, row.max_evaluations) for index_B in progress]
  seconds = time.monotonic() - begin
  return jax.tree.map(lambda *parts: np.concatenate(parts)[:N], *results), seconds


def descend_as(
  row: ml_collections.ConfigDict, model: DiT, params: Any, label_B: jax.Array, x0: jax.Array, max_evaluations: int
) -> sampler.Result:
  """One batch by one sampler of a config."""
  field_fn = field.implicit_field(
    model, params, label_B, guidance=row.guidance, guidance_channels=row.guidance_channels
  )
  return sampler.descend(
    field_fn,
    x0,
    step_size=row.step_size,
    momentum=row.momentum,
    rule=row.rule,
    max_evaluations=max_evaluations,
    threshold=row.threshold,
  )


def real_sample(sample: dict[str, np.ndarray]) -> np.ndarray:
  """The image, or the mean of its latent (of the unmirrored side)."""
  if "image" in sample:
    return sample["image"]
  return sample["mean"] if sample["mean"].ndim == 3 else sample["mean"][0]


def _draw_descent(config: ml_collections.ConfigDict, model: DiT, params: Any, directory: str):
  """The way of one sample per class, by the pictured sampler: a strip and an animation.

  Descents are repeatable, so the state after k evaluations is a descent of budget k.
  """
  row = config.samplers[config.evaluation.pictured]
  label_B = _balanced_labels(min(max(1, model.num_classes), STRIP_COLUMNS), model)
  noise = sampler.start_noise(jax.random.key(config.evaluation.seed), np.arange(len(label_B)), model.input_shape)
  last = descend_as(row, model, params, label_B, noise, row.max_evaluations).evaluations_B.max()

  def after(evaluations: int) -> np.ndarray:
    x = noise if evaluations == 0 else descend_as(row, model, params, label_B, noise, evaluations).x
    return np.asarray(x)

  frames = [after(k) for k in np.linspace(0, int(last), ANIMATION_FRAMES).round().astype(int).tolist()]
  animation = [pictures.grid(frame, len(frame)) for frame in frames]
  pictures.animation(animation, os.path.join(directory, "descent.gif"))
  columns = [frames[i] for i in np.linspace(0, len(frames) - 1, STRIP_COLUMNS).round().astype(int)]
  strip = np.stack(columns, axis=1).reshape(-1, *model.input_shape)
  pictures.grid(strip, STRIP_COLUMNS).save(os.path.join(directory, "descent.png"))


def _balanced_labels(count: int, model: DiT) -> np.ndarray:
  """0, 1, ... repeating; without classes all the null class."""
  return np.arange(count, dtype=np.int32) % max(1, model.num_classes)


def _between_halves(real: np.ndarray, repeats: int = 10) -> float:
  """The Fréchet distance of random halves of the real data, on average: what "equal" looks like."""
  rng = np.random.default_rng(0)
  orders = [rng.permutation(len(real)) for _ in range(repeats)]
  halves = [np.array_split(_flat(real)[order], 2) for order in orders]
  return float(np.mean([distances.frechet_distance(a, b) for a, b in halves]))


def _quantiles(evaluations: np.ndarray) -> dict[str, float]:
  return {f"q{percent}": float(np.percentile(evaluations, percent)) for percent in (0, 10, 50, 90, 100)}


def _flat(images: np.ndarray) -> np.ndarray:
  return images.reshape(len(images), -1)
