"""Claims about what the landscape is for: denoising, outliers, composition, and what its valleys hold."""

import os
from typing import Any

import numpy as np

from eqm_jax.evaluation import pictures
from eqm_jax.report import figures
from eqm_jax.report.descent import integrated
from eqm_jax.report.lab import FAILS, HOLDS, PARTLY, Lab, ahead, in_parts, jointly, spread
from eqm_jax.report.runs import Trained
from eqm_jax.tasks import compose, denoise, ood, outliers

GAMMAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SHOWN = 10  # images in a picture
PAIR = (3, 8)  # classes that are composed
NOISE = 0.05  # of a share of a hundred samples


def denoising(lab: Lab) -> dict[str, Any]:
  """Held-out digits at γ, denoised by EqM and by flow matching; neither is told γ."""
  image_N, label_N = (values[: lab.options.held_out] for values in (lab.held_out.images, lab.held_out.labels))
  names = ("given", "EqM", "flow matching")
  found = {score: {name: [[] for _ in GAMMAS] for name in names} for score in ("frechet", "mean square")}
  for seed in lab.seeds:
    eqm, flow_matching = lab.models("eqm", seed), lab.models("flow_matching", seed)
    row, batching = lab.row(eqm, threshold=lab.options.threshold), lab.batching(eqm)
    eqm_field, fm_field = lab.field(eqm), lab.field(flow_matching)
    strips = {name: [image_N[:SHOWN]] for name in names}
    for place, gamma in enumerate(GAMMAS):
      given_N = denoise.noised(image_N, gamma, batching)
      results = {
        "given": given_N,
        "EqM": denoise.descend(row, eqm_field, given_N, label_N, batching).x,
        "flow matching": integrated(lab, fm_field, seed, label_N, given_N),
      }
      for name, result_N in results.items():
        found["frechet"][name][place].append(lab.frechet(result_N))
        found["mean square"][name][place].append(float(np.mean((result_N - image_N) ** 2)))
        strips[name].append(result_N[:SHOWN])
    if seed == lab.seeds[0]:
      for name, strip in strips.items():
        shown = np.concatenate([images[place : place + 1] for place in range(3) for images in strip])
        pictures.grid(shown, len(strip)).save(os.path.join(lab.directory, f"denoising_{name.replace(' ', '_')}.png"))
  figures.lines(
    os.path.join(lab.directory, "denoising.png"), GAMMAS, found["frechet"],
    xlabel="γ of the given images (0: pure noise)", ylabel="Fréchet distance", yscale="log",
  )  # fmt: skip
  given, ours, theirs = (found["frechet"][name][1:] for name in names)
  verdicts = [jointly([ahead(one, start), ahead(one, other)]) for one, start, other in zip(ours, given, theirs)]
  return {
    "title": "EqM starts from images of any noise level, without being told it",
    "paper": "Images noised to γ and descended: FID stays low for every γ; flow matching, run as from noise, breaks.",
    "criterion": "At each γ from .1 to .9: Fréchet distance of EqM's results below that of what was given, and "
    "below flow matching's, beyond the spread.",
    "verdict": in_parts(verdicts),
    "columns": ["", *(f"γ = {gamma:g}" for gamma in GAMMAS)],
    "rows": [
      [f"{name}, {score} ↓", *(f"{np.mean(values):.2f}" for values in series)]
      for score, both in found.items()
      for name, series in both.items()
    ],
    "figures": {
      "denoising.png": "Fréchet distance of the denoised images to the training digits.",
      "denoising_given.png": "Three held-out digits, and what was given at γ = 0 to 0.9.",
      "denoising_EqM.png": "The same, by EqM's descent to ‖f‖ ≤ threshold.",
      "denoising_flow_matching.png": "The same, by flow matching integrated from noise to data.",
    },
    "numbers": {"gammas": GAMMAS, **found},
  }


def outlier_detection(lab: Lab) -> dict[str, Any]:
  """AUROC of held-out digits against images that are none."""
  inside_N = lab.held_out.images[: lab.options.held_out]
  kinds = {name: outliers.make(name, inside_N, seed=0) for name in outliers.MAKERS}
  sources = {"energy (dot)": ("dot", "energy"), "‖f‖ (implicit)": ("eqm", "norm"), "‖∇E‖ (dot)": ("dot", "norm")}
  sources["‖f‖ (flow matching without time)"] = ("flow_matching_untimed", "norm")
  sources["Mahalanobis distance (no network)"] = ("eqm", "mahalanobis")
  found = {}
  for title, (name, score_name) in sources.items():
    found[title] = {kind: [] for kind in kinds}
    for seed in lab.seeds:
      trained = lab.models(name, seed)
      score = ood.make_score(score_name, trained.model, trained.params, lab.train, lab.batching(trained))
      inside = score(inside_N)
      for kind, images in kinds.items():
        found[title][kind].append(ood.auroc(inside, score(images)))
  means = {title: np.mean(list(by_kind.values()), axis=0) for title, by_kind in found.items()}
  figures.bars(os.path.join(lab.directory, "ood.png"), means, label="AUROC, mean over kinds")
  pictures.grid(np.concatenate([images[:SHOWN] for images in (inside_N, *kinds.values())]), SHOWN).save(
    os.path.join(lab.directory, "ood_images.png")
  )
  ours = [-means["energy (dot)"], -means["‖f‖ (implicit)"]]
  theirs = -means["Mahalanobis distance (no network)"]
  above_chance = HOLDS if all(np.mean(-one) > 0.6 for one in ours) else FAILS
  return {
    "title": "The landscape tells what is no data",
    "paper": "CIFAR-10, dot energy: AUROC SVHN .55, Textures .49, constant 1.00, mean .68, ahead of other models.",
    "criterion": "Mean AUROC by energy and by ‖f‖ above .6, and each above that of a Gaussian fitted to the pixels, "
    "beyond the spread.",
    "verdict": in_parts([above_chance, *(ahead(one, theirs) for one in ours)]),
    "columns": ["score", *kinds, "mean"],
    "rows": [
      [title, *(f"{np.mean(values):.2f}" for values in by_kind.values()), spread(means[title], 2)]
      for title, by_kind in found.items()
    ],
    "figures": {
      "ood.png": "Mean AUROC of each score; 0.5 is chance.",
      "ood_images.png": f"Held-out digits, and from above: {', '.join(kinds)}.",
    },
    "numbers": found,
  }


def composition(lab: Lab) -> dict[str, Any]:
  """Sums of landscapes: of two labels with weights from −.5 to 1.5, and of the seeds' models."""
  weights = (-0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
  a, b = PAIR
  seen = {label: [[] for _ in weights] for label in PAIR}
  count = min(len(lab.label_N), 10 * SHOWN)
  shown = []
  for seed in lab.seeds:
    trained = lab.models("eqm", seed)
    for place, weight in enumerate(weights):
      terms = [(trained.model, trained.params, a, weight), (trained.model, trained.params, b, 1 - weight)]
      images = _composed(lab, trained, terms, count)
      predicted_N = lab.classifier.predict(np.clip(images, -1, 1))
      for label in PAIR:
        seen[label][place].append(float(np.mean(predicted_N == label)))
      if seed == lab.seeds[0]:
        shown.append(images[:SHOWN])
  pictures.grid(np.concatenate(shown), SHOWN).save(os.path.join(lab.directory, "composition.png"))
  figures.lines(
    os.path.join(lab.directory, "composition_labels.png"), weights,
    {f"seen as {label}": series for label, series in seen.items()},
    xlabel=f"weight of label {a}; label {b} has the rest", ylabel="share of the samples",
  )  # fmt: skip
  means = {label: np.mean(series, axis=1) for label, series in seen.items()}
  rises = np.all(np.diff(means[a][1:-1]) >= -NOISE) and np.all(np.diff(means[b][1:-1]) <= NOISE)
  # Beyond 0 and 1 the other label has a negative weight.
  beyond = means[b][0] >= means[b][1] - NOISE and means[a][-1] >= means[a][-2] - NOISE
  verdicts = [HOLDS if rises else FAILS, HOLDS if beyond else FAILS]
  notes = []
  if len(lab.seeds) > 1:
    everyone = [lab.models("eqm", seed) for seed in lab.seeds]
    terms = [(one.model, one.params, lab.label_N, 1 / len(everyone)) for one in everyone]
    together = lab.frechet(_composed(lab, everyone[0], terms, len(lab.label_N)))
    alone = lab.over_seeds("eqm", threshold=lab.options.threshold)["frechet"]
    verdicts.append(HOLDS if together <= np.mean(alone) else FAILS)
    notes.append(
      f"Fréchet distance of the mean of {len(everyone)} models' fields {together:.3f}; alone {spread(alone)}."
    )
  return {
    "title": "Landscapes add up: labels and models are composed by weighted sums, negative weights included",
    "paper": "Sums of class-conditional fields give images with the content of both classes (pictures only).",
    "criterion": "Three parts. From weight 0 to 1 the share seen as a label rises with its weight; a negative weight "
    f"of the other does not lower it (differences up to {NOISE} are noise); the mean of the seeds' fields is at least "
    "as good as they are alone, by Fréchet distance.",
    "verdict": in_parts(verdicts),
    "columns": ["", *(f"weight {weight:g}" for weight in weights)],
    "rows": [[f"seen as {label}", *(spread(values, 2) for values in series)] for label, series in seen.items()],
    "notes": notes,
    "figures": {
      "composition_labels.png": "What a classifier of real digits sees.",
      "composition.png": f"From the same noise, a row for each weight of label {a}, {weights[0]} to {weights[-1]}.",
    },
    "numbers": {"weights": weights, "seen": seen},
  }


def _composed(lab: Lab, first: Trained, terms: list[compose.Term], count: int) -> np.ndarray:
  row = lab.row(first, threshold=lab.options.threshold)
  return compose.draw(row, terms, count, lab.batching(first), "composition").x


def memorisation(lab: Lab) -> dict[str, Any]:
  """How near samples come to the nearest training image, beside held-out digits."""
  import sklearn.neighbors

  neighbours = sklearn.neighbors.NearestNeighbors(n_neighbors=1).fit(lab.real.reshape(len(lab.real), -1))

  def nearest(images):
    distance, index = neighbours.kneighbors(np.clip(images, -1, 1).reshape(len(images), -1))
    return distance[:, 0], index[:, 0]

  held_N = nearest(lab.held_out.images)[0]
  stop = {"threshold": lab.options.threshold, "streaming": True}
  ways = {"adaptive": stop, "fixed": {}, "four times as long": {"max_evaluations": 4 * lab.options.evaluations}}
  found, groups = {}, {"held-out digits": held_N}
  for name, changes in ways.items():
    distances = [nearest(lab.sample("eqm", seed, **changes).result.x)[0] for seed in lab.seeds]
    found[name] = {
      "median": [float(np.median(one)) for one in distances],
      "copies": [float(np.mean(one < np.percentile(held_N, 1))) for one in distances],
    }
    groups[name] = np.concatenate(distances)
  figures.histogram(
    os.path.join(lab.directory, "memorisation.png"), groups, xlabel="distance to the nearest training image"
  )
  images = lab.sample("eqm", lab.seeds[0], **stop).result.x[: 2 * SHOWN]
  pairs = [images[:SHOWN], lab.real[nearest(images[:SHOWN])[1]], images[SHOWN:], lab.real[nearest(images[SHOWN:])[1]]]
  pictures.grid(np.concatenate(pairs), SHOWN).save(os.path.join(lab.directory, "memorisation_pairs.png"))
  median = float(np.median(held_N))
  copies = np.mean(found["adaptive"]["copies"])
  return {
    "title": "Samples are new images, not copies of training images",
    "paper": "With perfect training every local minimum is a training image; what networks reach is not reported.",
    "criterion": "At most 5 % of the adaptive samples are nearer to a training image than 99 % of the held-out digits.",
    "verdict": HOLDS if copies <= 0.05 else PARTLY if copies <= 0.25 else FAILS,
    "columns": ["", "median distance to the nearest training image", "nearer than 99 % of the held-out digits"],
    "rows": [["held-out digits", f"{median:.3f}", "0.010"]]
    + [[name, spread(scores["median"]), spread(scores["copies"])] for name, scores in found.items()],
    "figures": {
      "memorisation.png": "Distances to the nearest training image.",
      "memorisation_pairs.png": "Samples (first and third row), and below each its nearest training image.",
    },
    "numbers": {"held_out_median": median, **found},
  }
