"""Evaluates one model: sample → distances → files.

Writes into the output directory `evaluation.json`, the same as a table in
`evaluation.md`, and for people: a grid of samples per sampler, how many evaluations
the samples of adaptive ones used, and the way of some samples; for points of the plane the
samples over the data, and the landscape.
"""

import importlib.metadata
import logging
import os
from typing import Any

import jax
import ml_collections
import numpy as np

import eqm_jax
from eqm_jax.data.samples import Source
from eqm_jax.equilibrium import objective, sampler
from eqm_jax.evaluation import agreement, distances, paths, pictures, plane, samplers
from eqm_jax.files import write_json
from eqm_jax.networks.dit import DiT

STATUS_NAMES = {sampler.CONVERGED: "converged", sampler.BUDGET: "budget", sampler.DIVERGED: "diverged"}

MANY = 50_000  # real samples that stand for a whole data set, where it is larger

log = logging.getLogger(__name__)


def check(config: ml_collections.ConfigDict, model: DiT, source: Source, batching: samplers.Batching):
  """Refuses, before anything is trained or sampled, what could not be evaluated.

  Raises:
    ValueError: naming the key and the value.
  """
  options = config.evaluation
  if model.input_shape != source.shape or model.num_classes != source.num_classes:
    raise ValueError(
      f"the model makes {model.input_shape} of {model.num_classes} classes, but {config.data.source!r} has "
      f"{source.shape} of {source.num_classes}: they cannot be compared. A model of latents is evaluated against a "
      "cache of them (data.source = 'latents')"
    )
  if options.samples < 2:
    raise ValueError(f"evaluation.samples = {options.samples}: a distance needs at least 2 samples")
  if options.repeats < 1 or not set(options.timed) <= set(config.samplers):
    raise ValueError(
      f"evaluation.repeats = {options.repeats} must be at least 1, and evaluation.timed = {options.timed} "
      f"some of the samplers: {', '.join(config.samplers)}"
    )
  if options.weights not in ("ema", "model"):
    raise ValueError(f"evaluation.weights = {options.weights!r} is neither 'ema' nor 'model'")
  for name, row in config.samplers.items():
    samplers.check(name, row, model, batching)
  check_pictured("evaluation.pictured", options.pictured, config.samplers)


def check_pictured(key: str, name: str, rows: ml_collections.ConfigDict):
  """Refuses a sampler that cannot be drawn; "none" draws nothing."""
  if name == "none":
    return
  if name not in rows:
    raise ValueError(f"{key} = {name!r} is not one of the samplers: {', '.join(rows)}, or 'none'")
  if not samplers.is_descent(rows[name]):
    raise ValueError(f"{key} = {name!r} integrates; only a descent is drawn: choose another, or 'none'")


def evaluate(
  config: ml_collections.ConfigDict,
  model: DiT,
  params: Any,
  source: Source,
  batching: samplers.Batching,
  directory: str,
) -> dict[str, Any]:
  """Samples with every sampler of the config and compares with the real data.

  Args:
    config: the whole config; `samplers` and `evaluation` are read.
    model, params: what to sample.
    source: the real data.
    batching: mesh, batch size, key and λ.
    directory: where the files go; made if it is not there.

  Returns:
    What `evaluation.json` holds.

  Raises:
    ValueError: before sampling, if the config does not fit.
  """
  options = config.evaluation
  check(config, model, source, batching)
  os.makedirs(directory, exist_ok=True)

  # ---------------------------------------------------------------- the real data, and what it can tell
  in_plane, in_pixels = source.shape == plane.SHAPE, is_pixels(source)
  chosen = np.linspace(0, len(source) - 1, min(MANY, len(source))).astype(int)
  real = np.stack([real_sample(source[int(i)]) for i in chosen])
  classifier = agreement.Classifier(real, source.labels[chosen]) if options.label_agreement else None
  label_N = samplers.balanced_labels(options.samples, model.num_classes)
  report = {
    "samples": options.samples,
    "labels": "balanced",
    "seed": options.seed,
    "weights": options.weights,
    "space": "plane" if in_plane else "pixels, clipped to [-1, 1]" if in_pixels else "latents",
    "autoencoder": source.autoencoder,
    "real": {"images": len(real), "frechet_between_halves": _between_halves(real)},
    "versions": {"eqm_jax": eqm_jax.__version__}
    | {name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy")},
    "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
    "batch_size": batching.batch_size,
    "rows": {},
  }
  if classifier:
    report["real"] |= {"classifier": classifier.name, "classifier_accuracy": classifier.held_out_accuracy}

  # ---------------------------------------------------------------- one row for each sampler
  seconds = {}
  for name, row in config.samplers.items():
    drawn = samplers.draw(name, row, model, params, label_N, batching)
    seconds[name] = [drawn.seconds]
    images = np.clip(drawn.result.x, -1, 1) if in_pixels else drawn.result.x
    scores = {"frechet": distances.frechet_distance(_flat(images), _flat(real))}
    if in_plane:
      scores |= plane.distances(images, real)
    if classifier:
      scores["label_agreement"] = classifier.agreement(images, label_N)
    report["rows"][name] = {**row.to_dict(), **scores, **_counts(drawn)}
    text = "  ".join(f"{score} {value:.3f}" for score, value in scores.items())
    log.info("%s  %s  evaluations %.1f  %.1f s", name, text, drawn.result.evaluations_B.mean(), drawn.seconds)
    shown = plane.scatter(images, real) if in_plane else pictures.grid(batching.pixels(images[:100]), 10)
    shown.save(os.path.join(directory, f"samples_{name}.png"))
    if row.threshold > 0:
      title = f"{name}: each sample stops at ‖f‖ ≤ {row.threshold:g}"
      histogram = pictures.evaluations_histogram(drawn.result.evaluations_B, row.max_evaluations, title)
      histogram.save(os.path.join(directory, f"evaluations_{name}.png"))
  # In turn, so that what disturbs the machine for a while disturbs every sampler.
  for _ in range(options.repeats - 1):
    for name in options.timed:
      drawn = samplers.draw(name, config.samplers[name], model, params, label_N, batching)
      seconds[name].append(drawn.seconds)
  for name, row in report["rows"].items():
    row["seconds"] = float(np.median(seconds[name]))
    row["images_per_second"] = options.samples / row["seconds"]

  # ---------------------------------------------------------------- the way of one sample per class
  if options.pictured != "none" and in_plane:
    plane.draw(config.samplers[options.pictured], model, params, real, schedule_of(config), batching, directory)
  elif options.pictured != "none":
    few = samplers.balanced_labels(min(max(1, model.num_classes), 10), model.num_classes)
    paths.draw(config.samplers[options.pictured], model, params, few, batching, directory)
  write_json(os.path.join(directory, "evaluation.json"), report)
  with open(os.path.join(directory, "evaluation.md"), "w", encoding="utf-8") as file:
    file.write(table(report))
  return report


def table(report: dict[str, Any]) -> str:
  """The rows of a report as a Markdown table."""
  lines = [
    "| sampler | rule | η | Fréchet | label agreement | evaluations (10 % – 90 %) | hardware | seconds | images/s |",
    "|---|---|---|---|---|---|---|---|---|",
  ]
  in_plane = any("to_data" in row for row in report["rows"].values())
  if in_plane:
    lines = [line + extra for line, extra in zip(lines, (" to data | from data |", "---|---|"))]
  for name, row in report["rows"].items():
    count = row["evaluations"]
    step = f"{row['step_size']:g}" if row["step_size"] else "auto"
    agrees = f"{row['label_agreement']:.3f}" if "label_agreement" in row else "–"
    lines.append(
      f"| {name} | {row['rule']} | {step} | {row['frechet']:.3f} | {agrees} "
      f"| {count['mean']:.1f} ({count['q10']:.0f} – {count['q90']:.0f}) | {row['hardware_ratio']:.2f} "
      f"| {row['seconds']:.1f} | {row['images_per_second']:.0f} |"
      + (f" {row['to_data']:.3f} | {row['from_data']:.3f} |" if in_plane else "")
    )
  return "\n".join(lines) + "\n"


def schedule_of(config: ml_collections.ConfigDict) -> objective.Schedule:
  """c(γ) of what a config trains; flow matching has c ≡ 1."""
  if config.objective.kind == "equilibrium":
    return objective.Schedule(**config.objective.schedule)
  return objective.Schedule("constant", multiplier=1.0)


def is_pixels(source: Source) -> bool:
  """Whether samples are pictures in [−1, 1]: not latents, and not points of the plane."""
  return "image" in source[0] and source.shape != plane.SHAPE


def real_sample(sample: dict[str, np.ndarray]) -> np.ndarray:
  """The image, or the mean of its latent (of the unmirrored side)."""
  if "image" in sample:
    return sample["image"]
  return sample["mean"] if sample["mean"].ndim == 3 else sample["mean"][0]


def _counts(drawn: samplers.Drawn) -> dict[str, Any]:
  """What the samples took: the field's calls, and how many of the hardware's were for them."""
  evaluations = drawn.result.evaluations_B
  quantiles = {f"q{percent}": float(np.percentile(evaluations, percent)) for percent in (0, 10, 50, 90, 100)}
  return {
    "evaluations": {"mean": float(evaluations.mean()), **quantiles},
    "hardware_evaluations": drawn.hardware_evaluations,
    "hardware_ratio": drawn.hardware_evaluations / float(evaluations.sum()),
    "restarts": int(drawn.result.restarts_B.sum()),
    "status": {text: int(np.sum(drawn.result.status_B == code)) for code, text in STATUS_NAMES.items()},
  }


def _between_halves(real: np.ndarray, repeats: int = 10) -> float:
  """The Fréchet distance of random halves of the real data, on average: what "equal" looks like."""
  rng = np.random.default_rng(0)
  orders = [rng.permutation(len(real)) for _ in range(repeats)]
  halves = [np.array_split(_flat(real)[order], 2) for order in orders]
  return float(np.mean([distances.frechet_distance(a, b) for a, b in halves]))


def _flat(images: np.ndarray) -> np.ndarray:
  return images.reshape(len(images), -1)
