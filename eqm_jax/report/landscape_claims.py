"""Claims about the landscape: denoising, outlier detection, composition, noise level, and memorisation."""

from typing import Any

import numpy as np

from eqm_jax import plotting
from eqm_jax.equilibrium import tasks
from eqm_jax.evaluation import outliers, readout
from eqm_jax.report.lab import FAILS, HOLDS, PARTLY, Lab, all_of, lower, some_of, spread
from eqm_jax.report.page import plot_bars, plot_histogram, plot_lines
from eqm_jax.report.sampling_claims import flow_matching_images
from eqm_jax.sampling import applications

GAMMAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SHOWN = 10  # images of a row in a picture
SHOWN_DENOISED = 3
WEIGHTS = (-0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5)  # of the first label
COMPOSED = 10 * SHOWN  # samples for each weight
NOISE = 0.05  # sampling noise of a fraction of so many samples
READ_OUT = {"EqM": "eqm", "EqM, λ = 8": "lambda_8", "flow matching without time": "flow_matching_untimed"}
NOISED = 12  # noised images for each sample of the report, of which one in six is held out
RIDGE = 1e-4
LARGEST_RMSE = 0.07  # of a γ that is known: a quarter of its own standard deviation, √(1/12)
SCORES = {  # title: model, score
  "energy (dot)": ("dot", "energy"),
  "‖f‖ (implicit)": ("eqm", "norm"),
  "‖∇E‖ (dot)": ("dot", "norm"),
  "‖f‖ (flow matching without time)": ("flow_matching_untimed", "norm"),
  "Mahalanobis distance (no network)": ("eqm", "mahalanobis"),
}


def denoising(lab: Lab) -> dict[str, Any]:
  """Held-out images at γ, denoised by EqM and by flow matching without γ."""
  images = lab.held_out_images
  names = ("noised", "EqM", "flow matching")
  metrics = {metric: {name: [[] for _ in GAMMAS] for name in names} for metric in ("frechet", "mean square")}
  for seed in lab.seeds:
    pictures = {name: [images[:SHOWN_DENOISED]] for name in names}
    for position, gamma in enumerate(GAMMAS):
      for name, result in _denoised(lab, seed, gamma).items():
        metrics["frechet"][name][position].append(lab.frechet(result))
        metrics["mean square"][name][position].append(float(np.mean((result - images) ** 2)))
        pictures[name].append(result[:SHOWN_DENOISED])
    if seed == lab.seeds[0]:
      for name, columns in pictures.items():
        shown = np.stack(columns, axis=1)
        _save_grid(lab, f"denoising_{name.replace(' ', '_')}.png", shown.reshape(-1, *images.shape[1:]), len(columns))
  axes = {"xlabel": "γ of the noised images (0: pure noise)", "ylabel": "Fréchet distance", "yscale": "log"}
  plot_lines(lab.path("denoising.png"), GAMMAS, metrics["frechet"], **axes)
  noised, ours, theirs = (metrics["frechet"][name][1:] for name in names)
  verdicts = [all_of([lower(one, start), lower(one, other)]) for one, start, other in zip(ours, noised, theirs)]
  return {
    "criterion": "At each γ from .1 to .9: Fréchet distance of EqM's results below that of the noised images, and "
    "below flow matching's, beyond the spread.",
    "verdict": some_of(verdicts),
    "columns": ["", *(f"γ = {gamma:g}" for gamma in GAMMAS)],
    "rows": [
      [f"{name}, {metric} ↓", *(f"{np.mean(values):.2f}" for values in series)]
      for metric, by_name in metrics.items()
      for name, series in by_name.items()
    ],
    "figures": {
      "denoising.png": "Fréchet distance of the denoised images to the training images.",
      "denoising_noised.png": "Three held-out images, and the same at γ = 0 to 0.9.",
      "denoising_EqM.png": "The same, after EqM's descent to ‖f‖ ≤ threshold.",
      "denoising_flow_matching.png": "The same, after flow matching integrated from noise to data.",
    },
    "numbers": {"gammas": GAMMAS, **metrics},
  }


def _denoised(lab: Lab, seed: int, gamma: float) -> dict[str, np.ndarray]:
  """The held-out images at γ, and what EqM and flow matching make of them."""
  noised = np.asarray(tasks.noised(lab.held_out_images, gamma, lab.generator("eqm", seed).key))
  labels = lab.held_out_labels
  return {
    "noised": noised,
    "EqM": lab.descend("eqm", seed, noised, labels, threshold=lab.options.threshold).x,
    "flow matching": flow_matching_images(lab, seed, labels, start=noised),
  }


def outlier_detection(lab: Lab) -> dict[str, Any]:
  """AUROC of held-out images against outliers."""
  kinds = {name: outliers.make(name, lab.held_out_images, seed=0) for name in outliers.MAKERS}
  auroc = {title: {kind: [] for kind in kinds} for title in SCORES}
  for title, (model, score_name) in SCORES.items():
    for seed in lab.seeds:
      score = outliers.make_score(score_name, lab.generator(model, seed), lab.train)
      inside = score(lab.held_out_images)
      for kind, images in kinds.items():
        auroc[title][kind].append(outliers.auroc(inside, score(images)))
  means = {title: np.mean(list(by_kind.values()), axis=0) for title, by_kind in auroc.items()}
  plot_bars(lab.path("ood.png"), means, xlabel="AUROC, mean over kinds")
  _save_grid(lab, "ood_images.png", np.concatenate([x[:SHOWN] for x in (lab.held_out_images, *kinds.values())]))
  ours = [-means["energy (dot)"], -means["‖f‖ (implicit)"]]
  baseline = -means["Mahalanobis distance (no network)"]
  above_chance = HOLDS if all(np.mean(-one) > 0.6 for one in ours) else FAILS
  return {
    "criterion": "Mean AUROC by energy and by ‖f‖ above .6, and each above that of a Gaussian fitted to the pixels, "
    "beyond the spread.",
    "verdict": some_of([above_chance, *(lower(one, baseline) for one in ours)]),
    "columns": ["score", *kinds, "mean"],
    "rows": [
      [title, *(f"{np.mean(values):.2f}" for values in by_kind.values()), spread(means[title], 2)]
      for title, by_kind in auroc.items()
    ],
    "figures": {
      "ood.png": "Mean AUROC of each score; 0.5 is chance.",
      "ood_images.png": f"Held-out images, and from above: {', '.join(kinds)}.",
    },
    "numbers": auroc,
  }


def composition(lab: Lab) -> dict[str, Any]:
  """Sums of fields: of two labels with weights from −.5 to 1.5, and of the seeds' models."""
  first, second = lab.options.composed_labels
  fractions = {label: [[] for _ in WEIGHTS] for label in (first, second)}
  pictures = []
  for seed in lab.seeds:
    for position, weight in enumerate(WEIGHTS):
      terms = [(seed, first, weight), (seed, second, 1 - weight)]
      images = _composed(lab, terms, min(len(lab.labels), COMPOSED))
      predicted = lab.classifier.predict(np.clip(images, -1, 1))
      for label, series in fractions.items():
        series[position].append(float(np.mean(predicted == label)))
      if seed == lab.seeds[0]:
        pictures.append(images[:SHOWN])
  _save_grid(lab, "composition.png", np.concatenate(pictures))
  curves = {f"classified as {label}": series for label, series in fractions.items()}
  axes = {"xlabel": f"weight of label {first}; label {second} has the rest", "ylabel": "fraction of the samples"}
  plot_lines(lab.path("composition_labels.png"), WEIGHTS, curves, **axes)
  verdicts, notes = _weight_verdicts(fractions[first], fractions[second]), []
  if len(lab.seeds) > 1:
    together = lab.frechet(_composed(lab, [(s, lab.labels, 1 / len(lab.seeds)) for s in lab.seeds], len(lab.labels)))
    alone = lab.metrics("eqm", threshold=lab.options.threshold)["frechet"]
    verdicts.append(HOLDS if together <= np.mean(alone) else FAILS)
    notes.append(
      f"Fréchet distance of the mean of {len(lab.seeds)} models' fields {together:.3f}; alone {spread(alone)}."
    )
  return {
    "criterion": "Three parts. From weight 0 to 1 the fraction classified as a label rises with its weight; a negative "
    f"weight of the other does not lower it (differences up to {NOISE} are noise); the mean of the seeds' fields is at "
    "least as good as they are alone, by Fréchet distance.",
    "verdict": some_of(verdicts),
    "columns": ["", *(f"weight {weight:g}" for weight in WEIGHTS)],
    "rows": [[title, *(spread(values, 2) for values in series)] for title, series in curves.items()],
    "notes": notes,
    "figures": {
      "composition_labels.png": "Predictions of a classifier that was fitted to real images.",
      "composition.png": f"From the same noise, a row for each weight of label {first}, {WEIGHTS[0]} to {WEIGHTS[-1]}.",
    },
    "numbers": {"weights": WEIGHTS, "classified_as": fractions},
  }


def _weight_verdicts(first: list[list[float]], second: list[list[float]]) -> list[str]:
  """Whether the fractions follow the weights between 0 and 1, and beyond, where the other label's is negative."""
  first_mean, second_mean = np.mean(first, axis=1), np.mean(second, axis=1)
  rises = np.all(np.diff(first_mean[1:-1]) >= -NOISE) and np.all(np.diff(second_mean[1:-1]) <= NOISE)
  beyond = second_mean[0] >= second_mean[1] - NOISE and first_mean[-1] >= first_mean[-2] - NOISE
  return [HOLDS if rises else FAILS, HOLDS if beyond else FAILS]


def _composed(lab: Lab, terms: list[tuple[int, int | np.ndarray, float]], count: int) -> np.ndarray:
  """Samples of Σ weight·field over terms (seed, label or labels, weight), with the noise of the first seed."""
  terms = [applications.Term(lab.generator("eqm", seed), label, weight) for seed, label, weight in terms]
  return applications.descend_sum("composition", lab.row("eqm", threshold=lab.options.threshold), terms, count).x


def noise_level(lab: Lab) -> dict[str, Any]:
  """A linear read-out of γ from the tokens of frozen fields, on held-out images."""
  data, held_out = (lab.images, lab.train.labels), (lab.held_out_images, lab.held_out_labels)
  count = NOISED * lab.options.num_samples
  found: dict[str, list[dict[str, Any]]] = {}
  for title, model in READ_OUT.items():
    for seed in lab.seeds:
      study = readout.study(lab.generator(model, seed), data, held_out, count, RIDGE)
      errors = study.report()
      found.setdefault(title, []).append(errors[readout.NETWORK])
      if model == "eqm":
        for name in (readout.UNTRAINED, readout.PIXELS):
          found.setdefault(name, []).append(errors[name])
        if seed == lab.seeds[0]:
          plotting.level_errors(study.gamma, study.predicted, readout.BINS).save(lab.path("noise_level.png"))
  rmse = {title: [errors["rmse"] for errors in runs] for title, runs in found.items()}
  ours = rmse["EqM"]
  known = HOLDS if max(ours) <= LARGEST_RMSE else FAILS
  return {
    "criterion": f"RMSE of γ on held-out images at most {LARGEST_RMSE:g} with every seed, and below those of read-outs "
    "of the untrained network and of pixel statistics, beyond the spread; fails if any is not.",
    "verdict": all_of([known, lower(ours, rmse[readout.UNTRAINED]), lower(ours, rmse[readout.PIXELS])]),
    "columns": ["read-out of", "RMSE ↓", "below γ = .1 ↓", "above γ = .9 ↓", "bias above γ = .9"],
    "rows": [
      [title, spread(rmse[title])] + [spread(values) for values in zip(*map(readout.at_ends, runs))]
      for title, runs in found.items()
    ],
    "notes": [
      f"Ridge regression on the means of the last block's tokens and of their squares, {count} noised images, half of "
      f"them without their class, one in {readout.HELD_OUT} held out. Answering γ = .5 has an RMSE of .289."
    ],
    "figures": {"noise_level.png": "γ̂ by γ (median, 10 % to 90 %), and its RMSE; EqM, first seed."},
    "numbers": found,
  }


def memorisation(lab: Lab) -> dict[str, Any]:
  """Distance of samples to the nearest training image, beside that of held-out images."""
  import sklearn.neighbors

  neighbours = sklearn.neighbors.NearestNeighbors(n_neighbors=1).fit(lab.images.reshape(len(lab.images), -1))

  def nearest(images):
    distance, index = neighbours.kneighbors(np.clip(images, -1, 1).reshape(len(images), -1))
    return distance[:, 0], index[:, 0]

  held_out = nearest(lab.held_out_images)[0]
  stop = {"threshold": lab.options.threshold, "batching": "continuous"}
  samplers = {"adaptive": stop, "fixed": {}, "four times as long": {"max_nfe": 4 * lab.options.max_nfe}}
  found, groups = {}, {"held-out images": held_out}
  for title, changes in samplers.items():
    distances = [nearest(lab.sample("eqm", seed, **changes).result.x)[0] for seed in lab.seeds]
    found[title] = {
      "median": [float(np.median(one)) for one in distances],
      "copies": [float(np.mean(one < np.percentile(held_out, 1))) for one in distances],
    }
    groups[title] = np.concatenate(distances)
  plot_histogram(lab.path("memorisation.png"), groups, xlabel="distance to the nearest training image")
  images = lab.sample("eqm", lab.seeds[0], **stop).result.x[: 2 * SHOWN]
  pairs = [images[:SHOWN], lab.images[nearest(images[:SHOWN])[1]]]
  pairs += [images[SHOWN:], lab.images[nearest(images[SHOWN:])[1]]]
  _save_grid(lab, "memorisation_pairs.png", np.concatenate(pairs))
  copies = np.mean(found["adaptive"]["copies"])
  verdict = PARTLY if copies <= 0.25 else FAILS
  return {
    "criterion": "At most 5 % of the adaptive samples are nearer to a training image than 99 % of the held-out images.",
    "verdict": HOLDS if copies <= 0.05 else verdict,
    "columns": ["", "median distance to the nearest training image", "nearer than 99 % of the held-out images"],
    "rows": [["held-out images", f"{np.median(held_out):.3f}", "0.010"]]
    + [[title, *map(spread, values.values())] for title, values in found.items()],
    "figures": {
      "memorisation.png": "Distances to the nearest training image.",
      "memorisation_pairs.png": "Samples (first and third row), and below each its nearest training image.",
    },
    "numbers": {"held_out_median": float(np.median(held_out)), **found},
  }


def _save_grid(lab: Lab, file: str, images: np.ndarray, columns: int = SHOWN):
  plotting.grid(images, columns).save(lab.path(file))
