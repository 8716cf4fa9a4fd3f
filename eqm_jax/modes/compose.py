"""Mode compose: samples from a weighted sum of landscapes, of several labels or several models."""

import dataclasses
import logging
from typing import Any

import ml_collections
import numpy as np

from eqm_jax import plotting
from eqm_jax.checkpoints import pretrained
from eqm_jax.data.codec import check_same_autoencoder
from eqm_jax.equilibrium.field import check_labels
from eqm_jax.evaluation import features, reference_data
from eqm_jax.modes import Mode
from eqm_jax.modes.task import COLUMNS, Task, open_task
from eqm_jax.networks.dit import DiT
from eqm_jax.sampling.applications import Term, descend_sum

log = logging.getLogger(__name__)


def run(config: ml_collections.ConfigDict, workdir: str, checkpoint: str | None = None):
  """Samples `config.tasks.num_images` images of Σ w_k·f_k + (1 − Σ w_k)·f_null.

  f_null is the first model without a class, so that the descent keeps its pace whatever the weights.

  Writes compose.json, compose.npz and a picture: samples of each term alone, and below them of the sum, from the same
  noise. Where `evaluation.classifier_accuracy` is on, compose.json says how a classifier of real images sees them.

  Raises:
    ValueError: if the terms do not fit each other, or the config does not fit the model.
  """
  task = open_task("compose", config, workdir, checkpoint)
  terms = open_terms(task)
  row, count = task.row(stops=("norm",)), config.tasks.num_images
  first = terms[0].generator
  rest = Term(first, first.model.num_classes, 1 - sum(term.weight for term in terms))
  classifier = _classifier(task) if config.evaluation.classifier_accuracy else None
  result = descend_sum("sum", row, [*terms, rest], count)
  pictured, names = [], []
  for term in terms:
    names.append(term.generator.label_names[term.label])
    name = f"{names[-1]}, weight {term.weight:g}"
    pictured.append(descend_sum(name, row, [dataclasses.replace(term, weight=1.0)], min(COLUMNS, count)).x)
  report = {
    "sampler": row.to_dict(),
    "terms": [{"label": term.label, "class": name, "weight": term.weight} for term, name in zip(terms, names)],
    "nfe": float(result.nfe.mean()),
  }
  if classifier is not None:
    report["classified_as"] = _classified(task, classifier, result.x)
  arrays = {"x": result.x, "nfe": result.nfe, "norm": result.norm}
  captions = plotting.row_captions([*names, "sum"], min(COLUMNS, count)) if first.class_names else None
  task.write(report, task.picture([*pictured, result.x], captions), "compose.npz", arrays)
  log.info("composed samples: %s", task.directory)


def open_terms(task: Task) -> list[Term]:
  """The terms of `tasks.compose`: a model, a label and a weight for each place.

  Raises:
    ValueError: naming the key, if they do not fit each other.
  """
  options, generator = task.options.compose, task.generator
  check(options, generator.model)
  terms = []
  for path, label, weight in zip(_checkpoints(options), options.labels, options.weights):
    if path is None:
      terms.append(Term(generator, label, weight))
      continue
    other = pretrained.load(path, weights=task.options.weights)
    _check_fits(path, other.model, generator.model)
    check_same_autoencoder(f"tasks.compose.checkpoints: {path}", other.autoencoder, task.autoencoder_id)
    loaded = {"model": other.model, "params": other.params, "class_names": other.class_names}
    terms.append(Term(dataclasses.replace(generator, **loaded), label, weight))
  return terms


def check(options: ml_collections.ConfigDict, model: DiT):
  """Refuses a section tasks.compose whose terms do not fit each other.

  Raises:
    ValueError: naming the key and its value.
  """
  lengths = {"labels": len(options.labels), "weights": len(options.weights), "checkpoints": len(_checkpoints(options))}
  if len(set(lengths.values())) != 1 or not options.labels:
    raise ValueError(
      f"tasks.compose has {lengths}: give a label and a weight for each term, and a checkpoint each or None"
    )
  if not np.all(np.isfinite(options.weights)):
    raise ValueError(f"tasks.compose.weights = {tuple(options.weights)} are not all finite: give finite numbers")
  check_labels(np.asarray(options.labels), model.num_classes)


def _checkpoints(options: ml_collections.ConfigDict) -> tuple[str | None, ...]:
  """A path for each term; None is the model of the run."""
  return tuple(options.checkpoints) if options.checkpoints is not None else (None,) * len(options.labels)


def _check_fits(path: str, other: DiT, model: DiT):
  if other.input_shape != model.input_shape or other.num_classes != model.num_classes:
    raise ValueError(
      f"tasks.compose.checkpoints: {path} makes {other.input_shape} of {other.num_classes} classes, but the model "
      f"{model.input_shape} of {model.num_classes}: choose models that can be added"
    )
  if other.time_input:
    raise ValueError(
      f"tasks.compose.checkpoints: {path} takes the time as an input: choose a model without time input, only those add"
    )


def _classifier(task: Task) -> features.PixelClassifier:
  """A classifier of the real images; before anything is sampled, because the data may not allow one."""
  return features.PixelClassifier(*task.real_and_labels(reference_data.MAX_FEATURES))


def _classified(task: Task, classifier: features.PixelClassifier, x: np.ndarray) -> dict[str, Any]:
  """Fraction of samples that a classifier of the real ones assigns to each class."""
  source = task.source
  predicted_N = classifier.predict(np.clip(x, -1, 1) if reference_data.is_pixels(source) else x)
  return {str(label): float(np.mean(predicted_N == label)) for label in range(source.num_classes)}


MODE = Mode(
  name="compose",
  summary="Samples from a weighted sum of labels or models.",
  writes="compose/: compose.png, compose.npz, compose.json",
  run=run,
  checkpoint="needs",
  processes="one",
)
