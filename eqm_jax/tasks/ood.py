"""Out-of-distribution detection: how well a score tells the data from images that are none."""

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from eqm_jax import devices
from eqm_jax.data.samples import Source
from eqm_jax.equilibrium import energy, field, tasks
from eqm_jax.evaluation import pictures, real, samplers
from eqm_jax.files import write_json
from eqm_jax.networks.dit import DiT
from eqm_jax.tasks import inputs, outliers

SCORES = ("norm", "energy", "mahalanobis")
SHOWN = 12  # images of each kind in the picture

Score = Callable[[np.ndarray], np.ndarray]  # images [N, H, W, C] → [N], larger for what is no data


def ood(
  config: ml_collections.ConfigDict,
  model: DiT,
  params: Any,
  given: inputs.Inputs,
  source: Source,
  batching: samplers.Batching,
  directory: str,
) -> dict[str, Any]:
  """Scores the data set and what it is told from.

  In-distribution are the first `tasks.count` samples of the data set: where the model was
  trained on them, they look more at home than new data would. Against them stand
  the kinds of `tasks.ood.against`, and the images of `tasks.images` if there are any.

  Writes ood.json (AUROC of every score against every kind, higher is better, 0.5 is
  chance), scores.npz (the scores themselves), and pictures of the images and of the scores.

  Raises:
    ValueError: before scoring, for an unknown score or kind, or an energy of a model
      that has none.
  """
  options = config.tasks.ood
  data_N = inputs.first_images(source, config.tasks.count)
  kinds = {name: outliers.make(name, data_N, config.tasks.seed) for name in options.against}
  if config.tasks.images:
    kinds["images"] = given.image_N
  if not kinds or not options.scores:
    raise ValueError("tasks.ood: name at least one of 'scores', and of 'against' (or give tasks.images)")
  scores = {name: make_score(name, model, params, source, batching) for name in options.scores}
  report = {"images": len(data_N), "auroc": {}}
  arrays = {}
  for name, score in scores.items():
    inside_N = score(data_N)
    outside = {kind: score(images) for kind, images in kinds.items()}
    report["auroc"][name] = {kind: auroc(inside_N, outside_N) for kind, outside_N in outside.items()}
    report["auroc"][name]["mean"] = float(np.mean(list(report["auroc"][name].values())))
    arrays |= {f"{name}_{kind}": values for kind, values in {"data": inside_N, **outside}.items()}
  os.makedirs(directory, exist_ok=True)
  np.savez(os.path.join(directory, "scores.npz"), **arrays)
  shown = [images[np.arange(max(SHOWN, len(data_N))) % len(images)] for images in (data_N, *kinds.values())]
  inputs.show(shown, SHOWN, batching).save(os.path.join(directory, "ood.png"))
  for name in scores:
    groups = {kind: arrays[f"{name}_{kind}"] for kind in ("data", *kinds)}
    pictures.score_boxes(groups, name).save(os.path.join(directory, f"scores_{name}.png"))
  write_json(os.path.join(directory, "ood.json"), report)
  return report


def auroc(inside_N: np.ndarray, outside_N: np.ndarray) -> float:
  """How often an outlier scores above an image of the data."""
  import sklearn.metrics

  truth = np.concatenate([np.zeros(len(inside_N)), np.ones(len(outside_N))])
  return float(sklearn.metrics.roc_auc_score(truth, np.concatenate([inside_N, outside_N])))


def make_score(name: str, model: DiT, params: Any, source: Source, batching: samplers.Batching) -> Score:
  """A score by its name.

  "norm" is ‖f(x)‖ and "energy" E(x), both without a class; "mahalanobis", the baseline
  that knows no network, the distance to a Gaussian with shrunk covariance fitted to `source`.

  Raises:
    ValueError: for an unknown name, or a model that cannot give the score.
  """
  if name not in SCORES:
    raise ValueError(f"tasks.ood.scores: {name!r} is not known: choose from {', '.join(SCORES)}")
  if name == "mahalanobis":
    import sklearn.covariance

    known = inputs.first_images(source, real.MANY)
    gaussian = sklearn.covariance.LedoitWolf().fit(known.reshape(len(known), -1))
    return lambda images: np.sqrt(gaussian.mahalanobis(images.reshape(len(images), -1)))
  if model.time_input:
    raise ValueError(f"tasks.ood.scores: {name!r} needs a field without time, but this model is told the time")
  params = devices.replicate(params)
  if name == "energy":
    form = energy.checked_form(model, None)

    def values(x, label):
      return _energies(energy.Energy(params, label, model, form), x)
  else:
    field_fn = field.conditional_field(model, params)

    def values(x, label):
      return tasks.field_norm(field.BoundField(field_fn, label), x)

  def score(images):
    def part(index_B):
      return values(*batching.place((images[index_B], jnp.full(len(index_B), model.num_classes, jnp.int32))))

    return samplers.in_batches(name, part, len(images), batching)

  return score


@jax.jit
def _energies(energy_fn: energy.Energy, x: jax.Array) -> jax.Array:
  return energy_fn(x)
