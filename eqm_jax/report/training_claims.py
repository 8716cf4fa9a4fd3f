"""Claims about training: EqM against its baselines, c(γ), λ, explicit energies, and another block."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eqm_jax.equilibrium import energy, tasks
from eqm_jax.networks import flops
from eqm_jax.report.lab import Lab, all_of, lower, some_of, spread
from eqm_jax.report.page import plot_bars, plot_lines
from eqm_jax.training import state
from eqm_jax.training import step as step_lib

REPEATS = 7  # of a timed step, of which the median counts
GAMMAS = {  # models: their c(γ), and the density of γ
  "eqm": ("truncated", "uniform"),
  "consistent": ("truncated", "consistent"),
  "logit_normal": ("truncated", "logit-normal"),
  "self_stopping": ("self-stopping", "uniform"),
  "self_stopping_consistent": ("self-stopping", "consistent"),
  "linear": ("linear", "uniform"),
  "linear_consistent": ("linear", "consistent"),
}
STEP_SIZE_FACTORS = (0.5, 1, 2, 4)  # among which each c(γ) has its best step size
_FACTORS = ", ".join(f"{factor:g}" for factor in STEP_SIZE_FACTORS)
ASYMMETRY_IMAGES = 64


def baselines(lab: Lab) -> dict[str, Any]:
  """EqM against flow matching with and without time: same network, data, steps and seeds."""
  nag, auto = {"rule": "nag", "momentum": 0.3}, {"step_size": "auto"}
  samplers = {
    "EqM, GD": ("eqm", {}),
    "EqM, GD, η auto": ("eqm", auto),
    "EqM, NAG μ = .3, η auto": ("eqm", {**nag, **auto}),
    "EqM, GD, stops at its threshold": ("eqm", {"threshold": lab.options.threshold, "batching": "continuous"}),
    "flow matching, Euler": ("flow_matching", {}),
    "flow matching, Heun": ("flow_matching", {"rule": "heun"}),
    "flow matching without time, Euler": ("flow_matching_untimed", {}),
    "flow matching without time, NAG μ = .3": (
      "flow_matching_untimed",
      {**nag, "step_size": 1 / lab.options.max_nfe},
    ),
  }
  metrics = {title: lab.metrics(name, **changes) for title, (name, changes) in samplers.items()}
  frechet = {title: values["frechet"] for title, values in metrics.items()}
  plot_bars(lab.path("baselines.png"), frechet, xlabel="Fréchet distance")
  best = {
    model: min((frechet[title] for title, (name, _) in samplers.items() if name == model), key=np.mean)
    for model in ("eqm", "flow_matching", "flow_matching_untimed")
  }
  return {
    "criterion": "The best sampler of EqM against the best of each baseline, Fréchet distance, beyond the spread.",
    "verdict": some_of([lower(best["eqm"], best[other]) for other in ("flow_matching", "flow_matching_untimed")]),
    "columns": ["model and sampler", "NFE", "Fréchet ↓", "classifier accuracy ↑"],
    "rows": [
      [title, f"{np.mean(lab.nfe(name, **changes)):.0f}", *map(spread, metrics[title].values())]
      for title, (name, changes) in samplers.items()
    ],
    "figures": {"baselines.png": "Fréchet distance to the training images; a dot is a seed."},
    "notes": ["η auto is 2/(λ·NFE). EqM's other η and its threshold were chosen on this data set, before this report."],
    "numbers": metrics,
  }


def schedules(lab: Lab) -> dict[str, Any]:
  """The family of c(γ), each at its best step size."""
  names = {
    "truncated, a = .8": "eqm",
    "piecewise, b = 2": "piecewise",
    "linear": "linear",
    "constant, λ = 1": "flow_matching_untimed",
  }
  metrics, rows = {}, []
  for title, name in names.items():
    # A constant field has length 1 where the others have λ, and arrives after 1/η steps.
    unit = 1 / lab.options.max_nfe if name == "flow_matching_untimed" else lab.options.step_size
    best, metrics[title] = _best_step_size(lab, name, unit)
    rows.append([title, f"{unit * best:.3g}", *map(spread, metrics[title].values())])
  frechet = {title: values["frechet"] for title, values in metrics.items()}
  plot_bars(lab.path("schedules.png"), frechet, xlabel="Fréchet distance")
  truncated, *others = frechet.values()
  return {
    "criterion": "Truncated against each of the others, Fréchet distance by GD, beyond the spread; each at its best of "
    f"η × {_FACTORS}. Fails if any is better.",
    "verdict": all_of([lower(truncated, other) for other in others]),
    "columns": ["c(γ)", "best η", "Fréchet ↓", "classifier accuracy ↑"],
    "rows": rows,
    "figures": {"schedules.png": "Fréchet distance by c(γ); λ = 4 but for the constant."},
    "numbers": metrics,
  }


def _best_step_size(lab: Lab, name: str, unit: float) -> tuple[float, dict[str, list[float]]]:
  """The factor of the step size that gives a model the lowest Fréchet distance by GD, and its metrics."""
  by_factor = {factor: lab.metrics(name, rule="gd", step_size=unit * factor) for factor in STEP_SIZE_FACTORS}
  best = min(by_factor, key=lambda factor: np.mean(by_factor[factor]["frechet"]))
  return best, by_factor[best]


def gammas(lab: Lab) -> dict[str, Any]:
  """Densities of γ for three c(γ), each at its best step size."""
  metrics, rows = {}, []
  for name, (schedule, density) in GAMMAS.items():
    factor, metrics[name] = _best_step_size(lab, name, lab.options.step_size)
    rows.append([schedule, density, f"{lab.options.step_size * factor:.3g}", *map(spread, metrics[name].values())])
  frechet = {name: values["frechet"] for name, values in metrics.items()}
  bars = {", ".join(GAMMAS[name]): values for name, values in frechet.items()}
  plot_bars(lab.path("gammas.png"), bars, xlabel="Fréchet distance")
  pairs = (("consistent", "eqm"), ("self_stopping_consistent", "self_stopping"), ("linear_consistent", "linear"))
  return {
    "criterion": "Consistent against uniform γ for each c(γ), Fréchet distance by GD, beyond the spread; each at its "
    f"best of η × {_FACTORS}. Fails if uniform γ is better for any.",
    "verdict": all_of([lower(frechet[consistent], frechet[uniform]) for consistent, uniform in pairs]),
    "columns": ["c(γ)", "γ", "best η", "Fréchet ↓", "classifier accuracy ↑"],
    "rows": rows,
    "figures": {"gammas.png": "Fréchet distance by c(γ) and the density of γ."},
    "notes": ["Consistent: density ∝ 1/c(γ), for truncated and linear c with the floor .05. Logit-normal: N(0, 1)."],
    "numbers": metrics,
  }


def multipliers(lab: Lab) -> dict[str, Any]:
  """λ, at the same η·λ."""
  names = {1: "lambda_1", 2: "lambda_2", 4: "eqm", 8: "lambda_8"}
  metrics = {str(multiplier): lab.metrics(name) for multiplier, name in names.items()}
  frechet = {multiplier: values["frechet"] for multiplier, values in metrics.items()}
  path = lab.path("multipliers.png")
  plot_lines(path, list(names), {"GD": list(frechet.values())}, xlabel="λ", ylabel="Fréchet distance", xscale="log")
  return {
    "criterion": "λ = 4 against 1, 2 and 8, Fréchet distance, beyond the spread; η·λ is the same. "
    "Fails if any is better.",
    "verdict": all_of([lower(frechet["4"], frechet[other]) for other in ("1", "2", "8")]),
    "columns": ["λ", "Fréchet ↓", "classifier accuracy ↑"],
    "rows": [[name, *map(spread, values.values())] for name, values in metrics.items()],
    "figures": {"multipliers.png": "Fréchet distance by λ; the band is the spread of the seeds."},
    "numbers": metrics,
  }


def energies(lab: Lab) -> dict[str, Any]:
  """Implicit field against explicit energies: quality, asymmetry of the Jacobian, and cost of training."""
  names = {"implicit": "eqm", "dot": "dot", "l2 (from implicit)": "l2", "scalar head": "scalar"}
  metrics = {}
  for title, name in names.items():
    metrics[title] = lab.metrics(name)
    for where, gamma in (("at γ = .5", 0.5), ("at data", 1.0)):
      metrics[title][f"asymmetry {where}"] = [_asymmetry(lab, name, seed, gamma) for seed in lab.seeds]
  costs = _training_costs(lab)
  frechet = {title: values["frechet"] for title, values in metrics.items()}
  plot_bars(lab.path("energies.png"), frechet, xlabel="Fréchet distance")
  implicit, dot, l2, _ = frechet.values()
  return {
    "criterion": "Fréchet distance, implicit against dot and l2, and dot against l2, each beyond the spread.",
    "verdict": some_of([lower(implicit, dot), lower(implicit, l2), lower(dot, l2)]),
    "columns": ["form", "Fréchet ↓", "classifier accuracy ↑", "‖J − Jᵀ‖/‖J‖ at γ = .5", "at data"],
    "rows": [[title, *map(spread, values.values())] for title, values in metrics.items()],
    "figures": {"energies.png": "Fréchet distance by the form of the energy."},
    "notes": ["l2 starts from the trained implicit model: it has had twice the steps of the others."]
    + [
      f"{name}: loss and gradient of a batch take {cost['time']:.2f} times as long as the implicit ones, and "
      f"{cost['memory']:.2f} times the temporary memory."
      for name, cost in costs.items()
    ],
    "numbers": {"metrics": metrics, "cost_of_a_step": costs},
  }


def modern_block(lab: Lab) -> dict[str, Any]:
  """RMSNorm, normalised queries and keys, SwiGLU and rotary positions against the paper's block, at equal FLOPs."""
  names = {"the paper's": "eqm", "modern": "modern"}
  best, metrics = {}, {}
  for title, name in names.items():
    best[title], metrics[title] = _best_step_size(lab, name, lab.options.step_size)
  frechet = {title: values["frechet"] for title, values in metrics.items()}
  plot_bars(lab.path("modern_block.png"), frechet, xlabel="Fréchet distance")
  seconds = _median_seconds({title: _gradient_program(lab, name, None)[0] for title, name in names.items()})
  plain_seconds, costs = seconds["the paper's"], {}
  for title, name in names.items():
    loaded = lab.models.load(name, 0)
    costs[title] = {
      "parameters": sum(leaf.size for leaf in jax.tree.leaves(loaded.params)),
      "flops": flops.forward(loaded.model),
      "time": seconds[title] / plain_seconds,
    }
  return {
    "criterion": "Fréchet distance by GD, the modern block against the paper's, beyond the spread, with the same data, "
    f"steps and seeds; each at its best of η × {_FACTORS}.",
    "verdict": lower(frechet["modern"], frechet["the paper's"]),
    "columns": [
      "block",
      "parameters",
      "MFLOP per NFE",
      "time of a training gradient",
      "best η",
      "Fréchet ↓",
      "accuracy ↑",
    ],
    "rows": [
      [title, f"{cost['parameters']:,}", f"{cost['flops'] / 1e6:.2f}", f"{cost['time']:.2f}"]
      + [f"{lab.options.step_size * best[title]:.3g}"]
      + [spread(values) for values in metrics[title].values()]
      for title, cost in costs.items()
    ],
    "figures": {"modern_block.png": "Fréchet distance to the training images; a dot is a seed."},
    "notes": ["The time is relative to the paper's block, on this device: equal FLOPs need not take equal time."],
    "numbers": {"metrics": metrics, "costs": costs},
  }


def _asymmetry(lab: Lab, name: str, seed: int, gamma: float) -> float:
  """‖J − Jᵀ‖/‖J‖ on held-out images at one γ, root mean square over them."""
  generator = lab.generator(name, seed)
  x = tasks.noised(lab.held_out_images[:ASYMMETRY_IMAGES], gamma, generator.key)
  field = generator.field().bind(lab.held_out_labels[: len(x)])
  return float(jnp.sqrt(jnp.mean(energy.asymmetry(field, x, generator.key) ** 2)))


def _training_costs(lab: Lab) -> dict[str, dict[str, float]]:
  """Time and temporary memory of an energy's training gradient, relative to the implicit model's."""
  programs = {"implicit": _gradient_program(lab, "eqm", None)}
  for name in ("dot", "scalar"):
    for order in energy.SECOND_ORDER:
      programs[f"{name}, {order.replace('_', ' ')}"] = _gradient_program(lab, name, order)
  seconds = _median_seconds({title: gradient for title, (gradient, _) in programs.items()})
  implicit_seconds, implicit_bytes = seconds.pop("implicit"), programs["implicit"][1]
  return {
    title: {"time": one / implicit_seconds, "memory": programs[title][1] / implicit_bytes}
    for title, one in seconds.items()
  }


def _median_seconds(programs: dict[str, Callable]) -> dict[str, float]:
  """The median time of each program."""
  seconds = {title: [] for title in programs}
  for _ in range(REPEATS):  # in turn, so that a disturbance affects all
    for title, program in programs.items():
      begin = time.monotonic()
      jax.block_until_ready(program())
      seconds[title].append(time.monotonic() - begin)
  return {title: float(np.median(values)) for title, values in seconds.items()}


def _gradient_program(lab: Lab, name: str, second_order: str | None):
  """The compiled loss and gradient of one training batch, and the bytes of its temporaries."""
  config, loaded = lab.models.config(name, 0), lab.models.load(name, 0)
  if second_order:
    config.objective.second_order = second_order
  size = min(config.train.batch_size, len(lab.images))
  batch = {"image": jnp.asarray(lab.images[:size]), "label": jnp.asarray(lab.train.labels[:size])}
  key = state.stream_key(0, "steps")
  loss_fn = functools.partial(step_lib.batch_loss, loaded.model, config.objective, batch, key)
  compiled = jax.jit(jax.value_and_grad(loss_fn)).lower(loaded.params).compile()
  return functools.partial(compiled, loaded.params), compiled.memory_analysis().temp_size_in_bytes
