"""Composition: samples from a weighted sum of landscapes, of several labels or several models."""

import os
from typing import Any

import ml_collections
import numpy as np

from eqm_jax import devices
from eqm_jax.data.samples import Source
from eqm_jax.equilibrium import field, sampler
from eqm_jax.equilibrium.labels import checked_labels
from eqm_jax.evaluation import agreement, real, samplers
from eqm_jax.files import write_json
from eqm_jax.networks.dit import DiT
from eqm_jax.tasks import inputs

SHOWN = 12  # images of each kind in the picture

Term = tuple[DiT, Any, int | np.ndarray, float]  # model, parameters, label or labels [N], weight


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
  checked_labels(np.asarray(options.labels), model.num_classes)


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
  images = {"sum": draw(row, [*terms, null], config.tasks.count, batching, "sum")}
  for model, params, label, weight in terms:
    name = f"label {label}, weight {weight:g}"
    name += f" ({sum(other.startswith(name) for other in images) + 1})" if name in images else ""
    alone = [(model, params, label, 1.0)]
    images[name] = draw(row, alone, min(SHOWN, config.tasks.count), batching, name)
  report = {"sampler": row.to_dict(), "terms": [{"label": label, "weight": weight} for *_, label, weight in terms]}
  if config.evaluation.label_agreement:
    known, x = inputs.first_images(source, real.MANY), images["sum"].x
    seen_N = agreement.Classifier(known, source.labels[: len(known)]).predict(
      np.clip(x, -1, 1) if real.is_pixels(source) else x
    )
    report["seen_as"] = {str(label): float(np.mean(seen_N == label)) for label in range(source.num_classes)}
  result = images.pop("sum")
  report["evaluations"] = float(result.evaluations_B.mean())
  os.makedirs(directory, exist_ok=True)
  np.savez(
    os.path.join(directory, "compose.npz"),
    x=result.x,
    evaluations=result.evaluations_B,
    norm=result.norm_B,
    autoencoder=batching.autoencoder,
  )
  inputs.show([*(alone.x for alone in images.values()), result.x], SHOWN, batching).save(
    os.path.join(directory, "compose.png")
  )
  write_json(os.path.join(directory, "compose.json"), report)
  return report


def draw(
  row: ml_collections.ConfigDict, terms: list[Term], count: int, batching: samplers.Batching, name: str
) -> sampler.Result:
  """Descends Σ w_k·f_k from `count` samples' own noise; `name` is what the progress bar says."""
  terms = [term for term in terms if abs(term[3]) > 1e-6]  # what rounding leaves of 1 − Σ w costs a pass
  field_fns = [field.conditional_field(m, devices.replicate(p), **samplers.guidance_of(row)) for m, p, *_ in terms]

  def part(index_B):
    index = batching.place(index_B)
    bound = []
    for field_fn, (_, _, label, _) in zip(field_fns, terms):
      label_B = np.broadcast_to(label, count)[index_B].astype(np.int32)
      bound.append(field.BoundField(field_fn, batching.place(label_B)))
    composed = field.compose(bound, [weight for *_, weight in terms])
    noise = batching.place(sampler.start_noise(batching.key, index_B, terms[0][0].input_shape))
    return samplers.descend_row(row, composed, noise, batching, index_B=index)

  return samplers.in_batches(name, part, count, batching)
