"""Claims about what is trained: EqM against its baselines, c(γ), λ, and explicit energies."""

import functools
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eqm_jax.equilibrium import energy, field, jacobian, objective, tasks
from eqm_jax.report import figures
from eqm_jax.report.lab import Lab, ahead, in_parts, jointly, spread
from eqm_jax.training import state
from eqm_jax.training import step as step_lib

REPEATS = 7  # of a timed step; the median counts
MULTIPLES = (0.5, 1, 2, 4)  # of the step size, where each c(γ) has its best


def baselines(lab: Lab) -> dict[str, Any]:
  """EqM against flow matching with and without time: same network, data, steps and seeds."""
  nag, auto = {"rule": "nag", "momentum": 0.3}, {"step_size": 0.0}
  unit = {"rule": "nag", "momentum": 0.3, "step_size": 1 / lab.options.evaluations}
  ways = {
    "EqM, GD": ("eqm", {}),
    "EqM, GD, η auto": ("eqm", auto),
    "EqM, NAG μ = .3, η auto": ("eqm", {**nag, **auto}),
    "EqM, GD, stops at its threshold": ("eqm", {"threshold": lab.options.threshold, "streaming": True}),
    "flow matching, Euler": ("flow_matching", {}),
    "flow matching, Heun": ("flow_matching", {"rule": "heun"}),
    "flow matching without time, Euler": ("flow_matching_untimed", {}),
    "flow matching without time, NAG μ = .3": ("flow_matching_untimed", unit),
  }
  found = {title: lab.over_seeds(name, **changes) for title, (name, changes) in ways.items()}
  figures.bars(
    os.path.join(lab.directory, "baselines.png"),
    {name: scores["frechet"] for name, scores in found.items()},
    label="Fréchet distance",
  )
  best = {
    model: min((found[title]["frechet"] for title, (name, _) in ways.items() if name == model), key=np.mean)
    for model in ("eqm", "flow_matching", "flow_matching_untimed")
  }
  return {
    "title": "EqM makes better samples than flow matching, with time and without",
    "paper": "ImageNet 256, B/2, 80 epochs: FID 32.85 (EqM), 36.5 to 37 (flow matching), 40.81 (without time).",
    "criterion": "The best sampler of EqM against the best of each baseline, Fréchet distance, beyond the spread.",
    "verdict": in_parts([ahead(best["eqm"], best[other]) for other in ("flow_matching", "flow_matching_untimed")]),
    "columns": ["model and sampler", "evaluations", "Fréchet ↓", "label agreement ↑"],
    "rows": [
      [title, lab.evaluations(name, **changes), *(spread(values) for values in found[title].values())]
      for title, (name, changes) in ways.items()
    ],
    "figures": {"baselines.png": "Fréchet distance to the training digits; a dot is a seed."},
    "notes": [
      "η auto is 2/(λ·evaluations). EqM's other η and its threshold were chosen on digits, before this report."
    ],
    "numbers": found,
  }


def schedules(lab: Lab) -> dict[str, Any]:
  """The family of c(γ), each at its best step size."""
  names = {
    "truncated, a = .8": "eqm",
    "piecewise, b = 2": "piecewise",
    "linear": "linear",
    "constant, λ = 1": "flow_matching_untimed",
  }
  found, rows = {}, []
  for title, name in names.items():
    # A constant field is 1 long where the others are λ, and has its way done after 1/η steps.
    unit = 1 / lab.options.evaluations if name == "flow_matching_untimed" else lab.options.step_size
    tried = {multiple: lab.over_seeds(name, rule="gd", step_size=unit * multiple) for multiple in MULTIPLES}
    best = min(tried, key=lambda multiple: np.mean(tried[multiple]["frechet"]))
    found[title] = tried[best]
    rows.append([title, f"{unit * best:.3g}", *(spread(values) for values in tried[best].values())])
  figures.bars(
    os.path.join(lab.directory, "schedules.png"),
    {name: scores["frechet"] for name, scores in found.items()},
    label="Fréchet distance",
  )
  truncated, *others = (scores["frechet"] for scores in found.values())
  return {
    "title": "A c(γ) that is constant up to a = .8 and then falls to zero is the best of its family",
    "paper": "Truncated decay with a = .8 is best, piecewise slightly worse; a constant is flow matching without time.",
    "criterion": "Truncated against each of the others, Fréchet distance by GD, beyond the spread; each at its best of "
    f"η × {', '.join(f'{multiple:g}' for multiple in MULTIPLES)}. Fails if any is better.",
    "verdict": jointly([ahead(truncated, other) for other in others]),
    "columns": ["c(γ)", "best η", "Fréchet ↓", "label agreement ↑"],
    "rows": rows,
    "figures": {"schedules.png": "Fréchet distance by c(γ); λ = 4 but for the constant."},
    "numbers": found,
  }


def multipliers(lab: Lab) -> dict[str, Any]:
  """λ, with η·λ kept."""
  names = {1: "lambda_1", 2: "lambda_2", 4: "eqm", 8: "lambda_8"}
  found = {str(multiplier): lab.over_seeds(name) for multiplier, name in names.items()}
  figures.lines(
    os.path.join(lab.directory, "multipliers.png"),
    list(names),
    {"GD": [scores["frechet"] for scores in found.values()]},
    xlabel="λ",
    ylabel="Fréchet distance",
    xscale="log",
  )
  verdict = jointly([ahead(found["4"]["frechet"], found[other]["frechet"]) for other in ("1", "2", "8")])
  return {
    "title": "The gradient multiplier λ = 4 is best",
    "paper": "B/2, 80 epochs: FID 32.85 at λ = 4, 38.34 at λ = 1.",
    "criterion": "λ = 4 against 1, 2 and 8, Fréchet distance, beyond the spread; η·λ is the same. "
    "Fails if any is better.",
    "verdict": verdict,
    "columns": ["λ", "Fréchet ↓", "label agreement ↑"],
    "rows": [[name, spread(scores["frechet"]), spread(scores["agreement"])] for name, scores in found.items()],
    "figures": {"multipliers.png": "Fréchet distance by λ; the band is the spread of the seeds."},
    "numbers": found,
  }


def energies(lab: Lab) -> dict[str, Any]:
  """Implicit field against explicit energies: quality, symmetry of the Jacobian, and cost of training."""
  names = {"implicit": "eqm", "dot": "dot", "l2 (from implicit)": "l2", "scalar head": "scalar"}
  found = {}
  for title, name in names.items():
    found[title] = lab.over_seeds(name)
    for where, gamma in (("at γ = .5", 0.5), ("at data", 1.0)):
      found[title][f"asymmetry {where}"] = [_asymmetry(lab, name, seed, gamma) for seed in lab.seeds]
  costs = _second_order(lab)
  figures.bars(
    os.path.join(lab.directory, "energies.png"),
    {name: scores["frechet"] for name, scores in found.items()},
    label="Fréchet distance",
  )
  implicit, dot, l2, _ = (scores["frechet"] for scores in found.values())
  verdicts = [ahead(implicit, dot), ahead(implicit, l2), ahead(dot, l2)]
  return {
    "title": "An implicit field makes better samples than explicit energies, and dot better than l2",
    "paper": "B/4: FID 57.5 (implicit), 73.4 (dot), 75.5 (l2).",
    "criterion": "Fréchet distance, implicit against dot and l2, and dot against l2, each beyond the spread.",
    "verdict": in_parts(verdicts),
    "columns": ["form", "Fréchet ↓", "label agreement ↑", "‖J − Jᵀ‖/‖J‖ at γ = .5", "at data"],
    "rows": [[name, *(spread(values) for values in scores.values())] for name, scores in found.items()],
    "figures": {"energies.png": "Fréchet distance by the form of the energy."},
    "notes": ["l2 starts from the trained implicit model: it has had twice the steps of the others."]
    + [
      f"{name}: loss and gradient of a batch take {cost['time']:.2f} times as long as the implicit ones, and "
      f"{cost['memory']:.2f} times the temporary memory."
      for name, cost in costs.items()
    ],
    "numbers": {"scores": found, "cost_of_a_step": costs},
  }


def _asymmetry(lab: Lab, name: str, seed: int, gamma: float) -> float:
  """‖J − Jᵀ‖/‖J‖ on held-out images at one γ, root mean square over them."""
  trained, images = lab.models(name, seed), lab.held_out.images[:64]
  key = lab.batching(trained).key
  x = tasks.noised(images, gamma, key)
  bound = field.bound(lab.field(trained), lab.held_out.labels[: len(x)])
  return float(jnp.sqrt(jnp.mean(jacobian.asymmetry(bound, x, key) ** 2)))


def _second_order(lab: Lab) -> dict[str, dict[str, float]]:
  """Time and temporary memory of a training step's gradient, relative to the implicit one's."""
  steps = {}
  for name in ("eqm", "dot", "scalar"):
    trained = lab.models(name, 0)
    for order in energy.SECOND_ORDER if name != "eqm" else ["implicit"]:
      config = trained.config.objective.copy_and_resolve_references()
      if name != "eqm":
        config.second_order = order
      size = min(trained.config.train.batch_size, len(lab.real))
      batch = {"image": jnp.asarray(lab.real[:size]), "label": jnp.asarray(lab.train.labels[:size])}
      loss_fn = functools.partial(
        step_lib.batch_loss,
        trained.model,
        config,
        objective.Schedule(**config.schedule),
        batch,
        state.stream_key(0, "steps"),
      )
      compiled = jax.jit(jax.value_and_grad(loss_fn)).lower(trained.params).compile()
      title = name if name == "eqm" else f"{name}, {order.replace('_', ' ')}"
      steps[title] = functools.partial(compiled, trained.params), compiled.memory_analysis().temp_size_in_bytes
  seconds = {name: [] for name in steps}
  for _ in range(REPEATS):  # in turn, so that a disturbance meets all
    for name, (step, _) in steps.items():
      begin = time.monotonic()
      jax.block_until_ready(step())
      seconds[name].append(time.monotonic() - begin)
  base_time, base_memory = np.median(seconds.pop("eqm")), steps["eqm"][1]
  return {
    name: {"time": float(np.median(values) / base_time), "memory": steps[name][1] / base_memory}
    for name, values in seconds.items()
  }
