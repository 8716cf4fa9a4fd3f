"""Claims about sampling: update rules, NFE, step sizes, adaptive compute, descending for too long, and seconds."""

from collections.abc import Sequence
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
TIMED_COUNTS = (7, 10, 14, 20, 28, 40, 56, 80, 112, 249)  # as PAPER_COUNTS, and as close as their times can be told
THRESHOLD_FACTORS = (1, 2, 4, 8)  # of the step size of timed descents that stop at their threshold
TOLERANCES = (0.1, 0.03, 0.01, 0.003)  # of timed integrations with steps that the solver chooses
TOLERATED = 1.05  # a distance above the best one of a baseline, relative to it, that counts as reaching it
TITLES = {
  "eqm": "EqM",
  "flow_matching": "flow matching",
  "flow_matching_untimed": "flow matching without time",
}
BASELINES = tuple(model for model in TITLES if model != "eqm")

Setting = tuple[str, str, str]  # of a timed sampling: model, sampler, budget


def _counts(lab: Lab, counts: Sequence[int] = PAPER_COUNTS) -> list[int]:
  """Numbers of evaluations, as the same fractions of the report's full descent that they are of the paper's."""
  return [max(2, round(count / PAPER_NFE * lab.options.max_nfe)) for count in counts]


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
  """Seconds of sampling until EqM has the best Fréchet distance of each baseline."""
  settings = _timed_settings(lab)
  measured = {setting: {"nfe": [], "seconds": [], "frechet": []} for setting in settings}
  for seed in lab.seeds:  # a model's settings are not one after the other, so that a disturbance affects all models
    for setting, changes in settings.items():
      samples, values = lab.sample(setting[0], seed, again=True, **changes), measured[setting]
      values["nfe"].append(float(samples.result.nfe.mean()))
      values["seconds"].append(samples.seconds)
      values["frechet"].append(lab.frechet(samples.result.x))
  seconds = {setting: float(np.median(values["seconds"])) for setting, values in measured.items()}
  frechet: dict[str, dict[Setting, list[float]]] = {model: {} for model in TITLES}
  curves: dict[str, tuple[list, list]] = {}
  for setting, values in measured.items():
    frechet[setting[0]][setting] = values["frechet"]
    x, y = curves.setdefault(f"{TITLES[setting[0]]}, {setting[1]}", ([], []))
    x.append([seconds[setting]] * len(lab.seeds))
    y.append(values["frechet"])
  rows, numbers, verdicts = [], {}, []
  for baseline in BASELINES:
    target_S = TOLERATED * np.min([*frechet[baseline].values()], axis=0)
    taken = {}
    for model in (baseline, "eqm"):
      fastest = fastest_settings(frechet[model], seconds, target_S)
      taken[model] = [float("inf") if one is None else seconds[one] for one in fastest]
      choices = ("none" if one is None else f"{one[1]}, {np.mean(measured[one]['nfe']):.0f} NFE" for one in fastest)
      goal = f"{TITLES[baseline]}: {spread(target_S)}"
      rows.append([goal, TITLES[model], _seconds(taken[model]), "; ".join(dict.fromkeys(choices))])
    numbers[baseline] = {"target": target_S.tolist(), "seconds": {key: _finite(one) for key, one in taken.items()}}
    verdicts.append(lower(taken["eqm"], taken[baseline]))
  axes = {"xlabel": f"seconds of {len(lab.labels)} samples", "ylabel": "Fréchet distance"}
  plot_tradeoff(lab.path("wall_clock.png"), curves, xscale="log", yscale="log", **axes)
  return {
    "criterion": "Seconds until a Fréchet distance at most 5 % above the lowest of each baseline, by seed, with the "
    "fastest of as many samplers and budgets: EqM less than the baseline. Fails for one that EqM does not reach.",
    "verdict": some_of(verdicts),
    "columns": ["distance to reach", "model", "seconds ↓", "with (one for each seed)"],
    "rows": rows,
    "figures": {"wall_clock.png": "Fréchet distance by the time of sampling; a dot is a seed, a line their mean."},
    "notes": [
      f"Seconds of {len(lab.labels)} samples on {jax.devices()[0].device_kind}, compilation left out: the median over "
      "the seeds, which take the same programs."
    ],
    "numbers": {
      "baselines": numbers,
      "settings": [
        {"model": model, "sampler": sampler, "budget": budget, **values}
        for (model, sampler, budget), values in measured.items()
      ],
    },
  }


def fastest_settings(
  frechet: dict[Setting, list[float]], seconds: dict[Setting, float], target_S: np.ndarray
) -> list[Setting | None]:
  """For each seed the fastest setting with at most the target's Fréchet distance; None where there is none."""
  found = []
  for seed, target in enumerate(target_S):
    reaching = [setting for setting, values in frechet.items() if values[seed] <= target]
    found.append(min(reaching, key=seconds.__getitem__, default=None))
  return found


def _seconds(values: list[float]) -> str:
  missing = np.count_nonzero(np.isinf(values))
  return f"not reached with {missing} of {len(values)} seeds" if missing else spread(values, 2)


def _finite(values: list[float]) -> list[float | None]:
  """Numbers for JSON, which has no infinity."""
  return [value if np.isfinite(value) else None for value in values]


def _timed_settings(lab: Lab) -> dict[Setting, dict[str, Any]]:
  """Changes of a sampler row: for each model as many samplers, from few evaluations to many, the models in turn."""
  auto, nag = {"step_size": "auto"}, {"rule": "nag", "momentum": 0.3}
  samplers = {("eqm", "GD"): auto, ("eqm", "NAG μ = .3"): {**nag, **auto}}
  for model in BASELINES:
    samplers |= {(model, "Euler"): {}, (model, "Heun"): {"rule": "heun"}}
  settings: dict[Setting, dict[str, Any]] = {}
  for count in _counts(lab, TIMED_COUNTS):
    settings |= {(*key, f"{count} NFE"): {**changes, "max_nfe": count} for key, changes in samplers.items()}
  stop = {"threshold": lab.options.threshold, "batching": "continuous"}
  for factor, tolerance in zip(THRESHOLD_FACTORS, TOLERANCES):
    step_size = factor * lab.options.step_size
    settings["eqm", "GD to its threshold", f"η = {step_size:g}"] = {**stop, "step_size": step_size}
    for model in BASELINES:
      key = (model, "Tsit5, adaptive", f"tolerance {tolerance:g}")
      settings[key] = {"rule": "tsit5", "tolerance": tolerance}
  return settings
