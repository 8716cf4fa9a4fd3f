"""Claims about sampling: update rules, NFE, step sizes, adaptive compute, descending for too long, and seconds."""

from typing import Any

import flax.struct
import jax
import numpy as np

from eqm_jax.equilibrium import ode
from eqm_jax.equilibrium.field import Field
from eqm_jax.report.lab import FAILS, HOLDS, PARTLY, Lab, all_of, lower, some_of, spread
from eqm_jax.report.page import plot_histogram, plot_lines, plot_tradeoff

FACTORS = (0.4, 0.7, 1.0, 1.5, 2.0, 2.5)  # of the step size, as in the paper
PAPER_NFE, PAPER_COUNTS = 249, (10, 25, 50, 100, 249)  # scaled to report.max_nfe
REPEATS = 3  # of a timed sampling, of which the median counts
ETA_FACTORS = (1, 2, 4, 8)  # of the step size of descents that stop at their threshold
TITLES = {
  "eqm": "EqM",
  "flow_matching": "flow matching",
  "flow_matching_untimed": "flow matching without time",
}

Setting = tuple[str, str, str]  # of a timed sampling: model, sampler, budget


def _counts(lab: Lab) -> list[int]:
  """The paper's numbers of evaluations, as fractions of the report's full descent."""
  return [max(2, round(count / PAPER_NFE * lab.options.max_nfe)) for count in PAPER_COUNTS]


def few_steps(lab: Lab) -> dict[str, Any]:
  """GD against NAG from few evaluations to many."""
  counts = _counts(lab)
  rules = {"GD": {"rule": "gd"}, "NAG, μ = .3": {"rule": "nag", "momentum": 0.3}}
  frechet = {
    title: [lab.metrics("eqm", step_size="auto", max_nfe=count, **rule)["frechet"] for count in counts]
    for title, rule in rules.items()
  }
  plot_lines(lab.path("few_steps.png"), counts, frechet, xlabel="NFE", ylabel="Fréchet distance", xscale="log")
  gd, nag = frechet.values()
  return {
    "criterion": "NAG against GD at each of the four smaller NFE, beyond the spread; η = 2/(λ·NFE).",
    "verdict": some_of([lower(n, g) for n, g in zip(nag[:-1], gd[:-1])]),
    "columns": ["update rule", *(f"{count} NFE" for count in counts)],
    "rows": [[title, *map(spread, values)] for title, values in frechet.items()],
    "figures": {"few_steps.png": "Fréchet distance by NFE."},
    "numbers": {"nfe": counts, **frechet},
  }


def step_sizes(lab: Lab) -> dict[str, Any]:
  """η × 0.4 to 2.5 for EqM, and flow matching's step times the same factors."""
  step_size = lab.options.step_size
  adaptive = {"threshold": lab.options.threshold, "batching": "continuous"}
  frechet = {
    "EqM, fixed": [lab.metrics("eqm", step_size=step_size * factor)["frechet"] for factor in FACTORS],
    "EqM, adaptive": [lab.metrics("eqm", step_size=step_size * factor, **adaptive)["frechet"] for factor in FACTORS],
    "flow matching": [[_flow_matching_frechet(lab, seed, factor) for seed in lab.seeds] for factor in FACTORS],
  }
  axes = {"xlabel": "step size, as a multiple", "ylabel": "Fréchet distance", "yscale": "log"}
  plot_lines(lab.path("step_sizes.png"), FACTORS, frechet, **axes)
  means = {title: np.mean(values, axis=1) for title, values in frechet.items()}
  ratios = {title: float(max(values) / min(values)) for title, values in means.items()}
  verdict = PARTLY if ratios["EqM, fixed"] < ratios["flow matching"] else FAILS
  if ratios["EqM, fixed"] <= 1.1 < ratios["flow matching"]:
    verdict = HOLDS
  return {
    "criterion": "Worst over best Fréchet distance of EqM with a fixed NFE: at most 1.1, and flow "
    "matching's more than 1.1, holds; otherwise less than flow matching's holds in part.",
    "verdict": verdict,
    "columns": ["model", *(f"× {factor:g}" for factor in FACTORS), "worst/best"],
    "rows": [[title, *map(spread, values), f"{ratios[title]:.2f}"] for title, values in frechet.items()],
    "figures": {"step_sizes.png": f"Fréchet distance by the step size; × 1 is η = {step_size:g}, and 1/NFE."},
    "notes": ["Flow matching keeps its grid of times, and every step is that much longer: as in the paper."],
    "numbers": {"factors": FACTORS, **frechet},
  }


@flax.struct.dataclass
class _ScaledField:
  """A field times a number: Euler's steps get longer, its times stay."""

  field: Field
  factor: float

  def __call__(self, x, labels, gamma):
    return self.factor * self.field(x, labels, gamma)


def _flow_matching_frechet(lab: Lab, seed: int, factor: float) -> float:
  return lab.frechet(flow_matching_images(lab, seed, lab.labels, factor=factor))


def flow_matching_images(
  lab: Lab, seed: int, labels: np.ndarray, *, start: np.ndarray | None = None, factor: float = 1.0
) -> np.ndarray:
  """Images of the flow-matching model by Euler's method, from noise or `start`; `factor` scales the steps."""
  generator = lab.generator("flow_matching", seed)
  field = generator.field()
  field = field if factor == 1 else _ScaledField(field, factor)

  def integrate_batch(index):
    start_B = generator.noise(index) if start is None else start[index]
    start_B, labels_B = generator.shard((start_B, labels[index]))
    return ode.integrate(field, start_B, labels_B, solver="euler", steps=lab.options.max_nfe, time_conditional=True).x

  return generator.in_batches("flow matching", integrate_batch, len(labels))


def adaptive(lab: Lab) -> dict[str, Any]:
  """Stopping each sample at ‖f‖ ≤ threshold: quality, NFE and seconds."""
  stop = {"threshold": lab.options.threshold}
  samplers = {"fixed": {}, "adaptive, static batching": stop}
  samplers["adaptive, continuous batching"] = {**stop, "batching": "continuous"}
  metrics = {
    title: {**lab.metrics("eqm", **changes), "nfe": lab.nfe("eqm", **changes)} for title, changes in samplers.items()
  }
  seconds = {title: [] for title in samplers}
  for _ in range(REPEATS):  # in turn, so that a disturbance affects all
    for title, changes in samplers.items():
      seconds[title].append(lab.sample("eqm", 0, again=True, **changes).seconds)
  speed = {title: float(np.median(seconds["fixed"]) / np.median(values)) for title, values in seconds.items()}
  nfe_N = np.concatenate([lab.sample("eqm", seed, **stop).result.nfe for seed in lab.seeds])
  lines = {"mean": float(nfe_N.mean()), "fixed": lab.options.max_nfe}
  plot_histogram(lab.path("adaptive.png"), {"adaptive": nfe_N}, xlabel="NFE of a sample", lines=lines)
  static, fixed = metrics["adaptive, static batching"], metrics["fixed"]
  compute = np.mean(static["nfe"]) / lab.options.max_nfe
  quality = np.mean(static["frechet"]) / np.mean(fixed["frechet"])
  return {
    "criterion": "At most half of the NFE, and a Fréchet distance at most 5 % worse; fails if either is not.",
    "verdict": all_of([HOLDS if compute <= 0.5 else FAILS, HOLDS if quality <= 1.05 else FAILS]),
    "columns": ["sampling", "Fréchet ↓", "classifier accuracy ↑", "NFE ↓", "images/s, fixed = 1 ↑"],
    "rows": [
      [title, spread(v["frechet"]), spread(v["accuracy"]), spread(v["nfe"], 1), f"{speed[title]:.2f}"]
      for title, v in metrics.items()
    ],
    "figures": {"adaptive.png": f"NFE of {len(nfe_N)} samples; ‖f‖ ≤ {lab.options.threshold:g} stops one."},
    "notes": [f"Seconds are those of {jax.devices()[0].device_kind}, the samplers timed in turn, {REPEATS} times."],
    "numbers": {"metrics": metrics, "speed": speed},
  }


def more_steps(lab: Lab) -> dict[str, Any]:
  """The same step size for two and four times as long."""
  counts = [factor * lab.options.max_nfe for factor in (1, 2, 4)]
  metrics = {}
  for count in counts:
    samples = [lab.sample("eqm", seed, max_nfe=count) for seed in lab.seeds]
    norm = [float(np.median(one.result.norm)) for one in samples]
    metrics[str(count)] = {**lab.metrics("eqm", max_nfe=count), "norm": norm}
  curves = {
    "Fréchet distance": [values["frechet"] for values in metrics.values()],
    "median ‖f‖": [values["norm"] for values in metrics.values()],
  }
  plot_lines(lab.path("more_steps.png"), counts, curves, xlabel="NFE", xscale="log")
  first, *_, last = metrics.values()
  return {
    "criterion": "At four times the steps the Fréchet distance is higher, and ‖f‖ lower, both beyond the spread.",
    "verdict": all_of([lower(first["frechet"], last["frechet"]), lower(last["norm"], first["norm"])]),
    "columns": ["NFE", "Fréchet ↓", "classifier accuracy ↑", "median ‖f‖"],
    "rows": [[title, *map(spread, values.values())] for title, values in metrics.items()],
    "figures": {"more_steps.png": f"Fréchet distance and ‖f‖ by NFE, η = {lab.options.step_size:g}."},
    "numbers": metrics,
  }


def wall_clock(lab: Lab) -> dict[str, Any]:
  """Seconds of sampling until a Fréchet distance that EqM and both baselines reach."""
  settings = _timed_settings(lab)
  frechet, seconds = ({setting: [] for setting in settings} for _ in range(2))
  for seed in lab.seeds:  # all in turn, so that a disturbance affects all
    for setting, changes in settings.items():
      samples = lab.sample(setting[0], seed, again=True, **changes)
      frechet[setting].append(lab.frechet(samples.result.x))
      seconds[setting].append(samples.seconds)
  lowest, fastest = at_equal_quality(frechet, seconds)
  target_S = np.max(list(lowest.values()), axis=0)
  rows, numbers = [], {}
  for model, title in TITLES.items():
    taken = [seconds[setting][seed] for seed, setting in enumerate(fastest[model])]
    choices = ", ".join(dict.fromkeys(f"{sampler}, {budget}" for _, sampler, budget in fastest[model]))
    rows.append([title, *map(spread, (lowest[model], target_S)), spread(taken, 2), choices])
    numbers[model] = {"lowest": lowest[model], "seconds": taken}
  curves = {}
  for setting in settings:
    x, y = curves.setdefault(f"{TITLES[setting[0]]}, {setting[1]}", ([], []))
    x.append(seconds[setting])
    y.append(frechet[setting])
  axes = {"xlabel": f"seconds of {len(lab.labels)} samples", "ylabel": "Fréchet distance"}
  plot_tradeoff(lab.path("wall_clock.png"), curves, xscale="log", yscale="log", **axes)
  eqm, *others = (one["seconds"] for one in numbers.values())
  return {
    "criterion": "Seconds until a Fréchet distance at most that which each of the three models reaches with its best "
    "sampler, for each seed: EqM against each baseline, beyond the spread.",
    "verdict": some_of([lower(eqm, other) for other in others]),
    "columns": ["model", "its lowest Fréchet ↓", "distance to reach", "seconds to it ↓", "with (one for each seed)"],
    "rows": rows,
    "figures": {"wall_clock.png": "Fréchet distance by the time of sampling; mean of the seeds."},
    "notes": [f"Seconds of {len(lab.labels)} samples on {jax.devices()[0].device_kind}, compilation left out."],
    "numbers": {
      "models": numbers,
      "curves": {title: {"seconds": x, "frechet": y} for title, (x, y) in curves.items()},
    },
  }


def at_equal_quality(
  frechet: dict[Setting, list[float]], seconds: dict[Setting, list[float]]
) -> tuple[dict[str, list[float]], dict[str, list[Setting]]]:
  """Each model's lowest Fréchet distance, and its fastest setting at the distance that all models reach; by seed."""
  by_model: dict[str, list[Setting]] = {}
  for setting in frechet:
    by_model.setdefault(setting[0], []).append(setting)
  lowest = {model: np.min([frechet[one] for one in own], axis=0).tolist() for model, own in by_model.items()}
  fastest: dict[str, list[Setting]] = {model: [] for model in by_model}
  for seed, target in enumerate(np.max(list(lowest.values()), axis=0)):
    for model, own in by_model.items():
      reaching = [one for one in own if frechet[one][seed] <= target]
      fastest[model].append(min(reaching, key=lambda one, s=seed: seconds[one][s]))
  return lowest, fastest


def _timed_settings(lab: Lab) -> dict[Setting, dict[str, Any]]:
  """Changes of a sampler row, from few evaluations to many."""
  auto, nag = {"step_size": "auto"}, {"rule": "nag", "momentum": 0.3}
  samplers = {
    ("eqm", "GD"): auto,
    ("eqm", "NAG μ = .3"): {**nag, **auto},
    ("flow_matching", "Euler"): {},
    ("flow_matching", "Heun"): {"rule": "heun"},
    ("flow_matching_untimed", "Euler"): {},
    ("flow_matching_untimed", "Heun"): {"rule": "heun"},
  }
  settings = {
    (*key, f"{count} NFE"): {**changes, "max_nfe": count} for key, changes in samplers.items() for count in _counts(lab)
  }
  stop = {"threshold": lab.options.threshold, "batching": "continuous"}
  for factor in ETA_FACTORS:
    step_size = factor * lab.options.step_size
    settings["eqm", "GD to its threshold", f"η = {step_size:g}"] = {**stop, "step_size": step_size}
  return settings
