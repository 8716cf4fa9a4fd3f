"""Composition: samples from a weighted sum of landscapes, of several labels or several models."""

import os
from typing import Any

import ml_collections
import numpy as np

from eqm_jax.data.sources import Source
from eqm_jax.equilibrium import field, sampler
from eqm_jax.evaluation import agreement, pictures, samplers
from eqm_jax.evaluation.evaluate import real_sample
from eqm_jax.files import write_json
from eqm_jax.networks.dit import DiT
from eqm_jax.tasks import inputs

SHOWN = 12  # images of each kind in the picture

Term = tuple[DiT, Any, int, float]  # model, parameters, label, weight


def check(options: ml_collections.ConfigDict, model: DiT):
  """Refuses terms that do not fit each other; `options` is the section tasks.compose.

  Raises:
    ValueError: naming the key and what it holds.
  """
  lengths = {name: len(options[name]) for name in ("labels", "weights", "checkpoints")}
  if len(set(lengths.values())) != 1 or not options.labels:
    raise ValueError(f"tasks.compose: there are {lengths}: give one label, one weight and one checkpoint for each term")
  if not np.all(np.isfinite(options.weights)):
    raise ValueError(f"tasks.compose.weights = {tuple(options.weights)} are not all finite")
  field.checked_labels(np.asarray(options.labels), model.num_classes)


def compose(
  config: ml_collections.ConfigDict, terms: list[Term], source: Source, batching: samplers.Batching, directory: str
) -> dict[str, Any]:
  """Samples `config.tasks.count` images of Σ w_k·f_k + (1 − Σ w_k)·f_null.

  f_null is the first model without a class, so that the descent keeps its pace whatever
  the weights.

  Writes compose.json, compose.npz and a picture: samples of each term alone, and below
  them of the sum, from the same noise. Where `evaluation.label_agreement` is on, a classifier
  of the real images tells as what they are seen.

  Args:
    terms: a model, its parameters, a label and a weight for each place of
      `tasks.compose`.
  """
  row = inputs.check(config, terms[0][0], batching)
  null = (*terms[0][:2], terms[0][0].num_classes, 1 - sum(weight for *_, weight in terms))
  images = {"sum": _draw(row, [*terms, null], config.tasks.count, batching, "sum")}
  for model, params, label, weight in terms:
    name = f"label {label}, weight {weight:g}"
    name += f" ({sum(other.startswith(name) for other in images) + 1})" if name in images else ""
    alone = [(model, params, label, 1.0)]
    images[name] = _draw(row, alone, min(SHOWN, config.tasks.count), batching, name)
  report = {"sampler": row.to_dict(), "terms": [{"label": label, "weight": weight} for *_, label, weight in terms]}
  if config.evaluation.label_agreement:
    real = np.stack([real_sample(source[i]) for i in range(len(source))])
    seen_N = agreement.Classifier(real, source.labels).predict(np.clip(images["sum"].x, -1, 1))
    report["seen_as"] = {str(label): float(np.mean(seen_N == label)) for label in range(source.num_classes)}
  result = images.pop("sum")
  report["evaluations"] = float(result.evaluations_B.mean())
  os.makedirs(directory, exist_ok=True)
  np.savez(os.path.join(directory, "compose.npz"), x=result.x, evaluations=result.evaluations_B, norm=result.norm_B)
  rows = [alone.x for alone in images.values()] + [result.x[: 4 * SHOWN]]
  pictures.grid(np.concatenate(rows), min(SHOWN, len(result.x))).save(os.path.join(directory, "compose.png"))
  write_json(os.path.join(directory, "compose.json"), report)
  return report


def _draw(row, terms: list[Term], count: int, batching: samplers.Batching, name: str) -> sampler.Result:
  field_fns = [field.conditional_field(m, batching.replicate(p), **samplers.guidance_of(row)) for m, p, *_ in terms]

  def part(index_B):
    index = batching.place(index_B)
    bound = [
      field.BoundField(field_fn, batching.place(np.full(len(index_B), label, np.int32)))
      for field_fn, (_, _, label, weight) in zip(field_fns, terms)
      if weight
    ]
    composed = field.compose(bound, [weight for *_, weight in terms if weight])
    noise = batching.place(sampler.start_noise(batching.key, index_B, terms[0][0].input_shape))
    return samplers.descend_row(row, composed, noise, batching, index_B=index)

  return samplers.in_batches(name, part, count, batching)
