"""Measures what docs/noise_level.md reports: python docs/noise_level_figures.py --workdir=runs/noise_level

How well each of three models knows its noise level, and what stopping by it gives beside stopping by ‖f‖: the quality
of samples by their mean NFE, and thresholds that were chosen for one model, used for the others.

The digits with λ = 4 are the weights of the package; the digits with λ = 8 and MNIST are trained in the workdir (on two
CPU cores about 3 and 20 minutes; the rest takes 20). Finished models are kept there: the same command resumes after
them. Writes noise_level.json and noise_level_stopping.png into docs/, and prints the tables of the page. With --smoke
everything is short, and is written into the workdir.
"""

import argparse
import json
import pathlib
import runpy
from typing import Any

import tabulate

import eqm_jax
from eqm_jax import plotting
from eqm_jax.evaluation import readout

HERE = pathlib.Path(__file__).parent
FIRST = "digits, λ = 4"  # thresholds are chosen for it, and used for all
MODELS: dict[str, tuple[str, dict[str, Any], str | None]] = {  # config, what differs from it, weights of the package
  FIRST: ("digits", {}, "digits"),
  "digits, λ = 8": ("digits", {"objective.schedule.multiplier": 8.0}, None),
  "MNIST, λ = 4": ("mnist", {"evaluation.num_samples": 500}, None),
}
MULTIPLIERS = {FIRST: 4.0, "digits, λ = 8": 8.0, "MNIST, λ = 4": 4.0}
NORMS = (2.0, 4.0, 8.0, 16.0, 32.0)  # twice each but the last is one of them
GAMMAS = (0.8, 0.85, 0.9, 0.95, 0.97)
MORE_NORMS = tuple(2 ** (k / 2) for k in range(1, 10, 2))  # between them, of the first model alone
MORE_GAMMAS = (0.925, 0.96, 0.98)
STEP_SIZE, STEP_MULTIPLIER = 0.003, 4.0  # η, at this λ; η·λ is the same for all
MAX_NFE, SMOKE_NFE = 249, 10
SMOKE = {
  "train.steps": 20,
  "optimizer.warmup_steps": 5,
  "checkpoint.every": 20,
  "evaluation.num_samples": 60,
  "evaluation.batch_size": 30,
  "evaluation.chunk_size": 60,
  "evaluation.classifier.steps": 20,
  "tasks.readout.num_samples": 600,
}


def measure(title: str, workdir: pathlib.Path, smoke: bool) -> dict[str, Any]:
  """Read-out and evaluated samplers of a model, trained first if it does not come with the package."""
  name, changes, weights = MODELS[title]
  config = eqm_jax.config(name, **(changes | (SMOKE if smoke else {})))
  directory = workdir / title.replace(", λ = ", "_").replace(" ", "_")
  results = directory / "results.json"
  if results.exists():
    return json.loads(results.read_text(encoding="utf-8"))
  if weights is None:
    count, config.evaluation.num_samples = config.evaluation.num_samples, None
    eqm_jax.run("train", config, directory)
    config.evaluation.num_samples = count
  measured = eqm_jax.run("readout", config, directory, weights).metrics["readout"]
  config.samplers = _samplers(title, str(directory / "readout" / "readout.npz"), smoke)
  config.evaluation.update(features=("classifier",), classifier_accuracy=False, plot_sampler=None)
  rows = eqm_jax.run("evaluate", config, directory, weights).metrics["evaluation"]["rows"]
  found = {"readout": measured, "samplers": {name: _figures(row) for name, row in rows.items()}}
  results.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
  return found


def _samplers(title: str, path: str, smoke: bool) -> dict[str, Any]:
  """A descent without a threshold, and one for each threshold of ‖f‖ and of γ̂."""
  sampler = runpy.run_path(str(HERE.parent / "configs" / "base.py"))["sampler"]
  options = {"step_size": STEP_SIZE * STEP_MULTIPLIER / MULTIPLIERS[title]}
  options["max_nfe"] = SMOKE_NFE if smoke else MAX_NFE
  norms, gammas = (NORMS[::3], GAMMAS[::3]) if smoke else (NORMS, GAMMAS)
  if title == FIRST and not smoke:
    norms, gammas = norms + MORE_NORMS, gammas + MORE_GAMMAS
  rows = {"fixed": sampler(**options)}
  rows |= {_row("norm", value): sampler(**options, threshold=value) for value in norms}
  by_gamma = {"stop": "gamma", "readout": path}
  return rows | {_row("gamma", value): sampler(**options, **by_gamma, threshold=value) for value in gammas}


def _row(stop: str, threshold: float) -> str:
  return f"{stop}_{round(1000 * threshold):05d}"


def _figures(row: dict[str, Any]) -> dict[str, Any]:
  """What the page needs of an evaluated sampler."""
  metrics = row["metrics"]["classifier"]
  return {
    "stop": row["stop"] if row["threshold"] else "budget",
    "threshold": row["threshold"],
    "nfe": row["nfe"]["mean"],
    "budget": row["status"]["budget"],
    "frechet": metrics["frechet"],
    "error": metrics["frechet_error"],
  }


def readout_table(found: dict[str, Any]) -> str:
  """RMSE and bias of each read-out."""
  rows = []
  for title, model in found.items():
    for source in ("network", "untrained network", "pixel statistics"):
      errors = model["readout"][source]
      rows.append([title, source, errors["rmse"], *readout.at_ends(errors)])
  headers = ("model", "γ read off", "RMSE", "below γ = .1", "above γ = .9", "bias above γ = .9")
  return tabulate.tabulate(rows, headers, tablefmt="github", floatfmt=".3f")


def transfer_table(found: dict[str, Any]) -> str:
  """Thresholds that are best for the first model, used for all, beside each one's own best; of those that all have."""
  names = set.intersection(*(set(model["samplers"]) for model in found.values()))
  found = {
    title: {"samplers": {name: row for name, row in model["samplers"].items() if name in names}}
    for title, model in found.items()
  }
  norm, gamma = (_best(found[FIRST], stop)["threshold"] for stop in ("norm", "gamma"))
  rows = []
  for title, model in found.items():
    relative = norm * MULTIPLIERS[title] / MULTIPLIERS[FIRST]
    cells = [model["samplers"]["fixed"]]
    cells += [model["samplers"].get(_row("norm", threshold)) for threshold in (norm, relative)]
    cells += [model["samplers"][_row("gamma", gamma)], _best(model, "norm"), _best(model, "gamma")]
    rows.append([title, *map(_cell, cells[:4]), *(f"{cell['threshold']:.3g}: {_cell(cell)}" for cell in cells[4:])])
  chosen = (f"‖f‖ ≤ {norm:.3g}", f"‖f‖/λ ≤ {norm / MULTIPLIERS[FIRST]:.3g}", f"γ̂ ≥ {gamma:.3g}")
  headers = ("model", "fixed", *chosen, "its own best ‖f‖", "its own best γ̂")
  return tabulate.tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def _best(model: dict[str, Any], stop: str) -> dict[str, Any]:
  return min((row for row in model["samplers"].values() if row["stop"] == stop), key=lambda row: row["frechet"])


def _cell(row: dict[str, Any] | None) -> str:
  return "–" if row is None else f"{row['frechet']:.2f} ± {row['error']:.2f} ({row['nfe']:.0f})"


def draw(found: dict[str, Any], path: pathlib.Path):
  """Fréchet distance by NFE of the first model, and of all by threshold, relative to each one's fixed descent."""
  figure, (by_nfe, by_norm, by_gamma) = plotting.figure(13, 3.8, columns=3)
  for stop, label in (("norm", "stops by ‖f‖"), ("gamma", "stops by γ̂")):
    rows = sorted(_rows(found[FIRST], stop), key=lambda row: row["nfe"])
    columns = ([row[key] for row in rows] for key in ("nfe", "frechet", "error"))
    nfe, frechet, error = columns
    by_nfe.errorbar(nfe, frechet, yerr=error, marker="o", markersize=4, capsize=2, label=label)
  fixed = found[FIRST]["samplers"]["fixed"]
  by_nfe.errorbar(fixed["nfe"], fixed["frechet"], yerr=fixed["error"], fmt="ks", markersize=4, capsize=2, label="fixed")
  by_nfe.set(xlabel="mean NFE", ylabel="Fréchet distance (classifier)", yscale="log", title=FIRST)
  by_nfe.legend()
  for panel, stop in ((by_norm, "norm"), (by_gamma, "gamma")):
    for title, model in found.items():
      rows = sorted(_rows(model, stop), key=lambda row: row["threshold"])
      relative = [row["frechet"] / model["samplers"]["fixed"]["frechet"] for row in rows]
      panel.plot([row["threshold"] for row in rows], relative, marker="o", markersize=4, label=title)
    panel.axhline(1, color="black", linewidth=0.8, linestyle="--")
    panel.set(yscale="log", ylabel="Fréchet distance, fixed descent = 1")
  by_norm.set(xlabel="threshold of ‖f‖", xscale="log")
  by_norm.set_xticks(NORMS, [f"{norm:.3g}" for norm in NORMS])
  by_norm.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
  by_gamma.set(xlabel="threshold of γ̂", xticks=GAMMAS)
  for panel in (by_nfe, by_norm, by_gamma):
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter("{x:.1g}")
  by_norm.legend()
  plotting.rendered(figure).save(path)


def _rows(model: dict[str, Any], stop: str) -> list[dict[str, Any]]:
  return [row for row in model["samplers"].values() if row["stop"] == stop]


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/noise_level"))
  parser.add_argument("--smoke", action="store_true", help="everything short, written into the workdir")
  arguments = parser.parse_args()
  models = {title: measure(title, arguments.workdir, arguments.smoke) for title in MODELS}
  target = arguments.workdir if arguments.smoke else HERE
  (target / "noise_level.json").write_text(json.dumps(models, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
  draw(models, target / "noise_level_stopping.png")
  print(readout_table(models), transfer_table(models), sep="\n\n")
