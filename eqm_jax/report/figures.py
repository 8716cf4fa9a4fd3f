"""The report's diagrams: means over seeds, with the spread as a band or a bar."""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from eqm_jax.evaluation import pictures

if TYPE_CHECKING:
  import matplotlib.figure

SIZE = 6.4, 3.4  # inches


def lines(
  path: str,
  x: Sequence[float],
  series: Mapping[str, Sequence[Sequence[float]]],
  *,
  xlabel: str,
  ylabel: str,
  **axes: Any,
):
  """One line for each series, [X][seeds]; `axes` are settings such as xscale="log"."""
  figure, panel = pictures.figure(*SIZE)
  for name, values in series.items():
    values_XxS = np.asarray(values, np.float64)
    mean, deviation = values_XxS.mean(axis=1), values_XxS.std(axis=1)
    (line,) = panel.plot(x, mean, marker="o", markersize=4, label=name)
    panel.fill_between(x, mean - deviation, mean + deviation, alpha=0.2, color=line.get_color())
  panel.set(xlabel=xlabel, ylabel=ylabel, **axes)
  panel.set_xticks(list(x), [f"{value:g}" for value in x])
  panel.minorticks_off()
  panel.legend()
  _save(figure, path)


def bars(path: str, series: Mapping[str, Sequence[float]], *, label: str):
  """One bar for each name, the mean over seeds, every seed as a dot."""
  figure, panel = pictures.figure(*SIZE)
  names = list(series)
  panel.barh(names, [np.mean(series[name]) for name in names], color="tab:blue", alpha=0.5)
  for place, name in enumerate(names):
    panel.plot(series[name], [place] * len(series[name]), "k.", markersize=5)
  panel.invert_yaxis()
  panel.set(xlabel=label)
  _save(figure, path)


def histogram(path: str, groups: Mapping[str, np.ndarray], *, xlabel: str, lines: Mapping[str, float] | None = None):
  """Several distributions over each other, and vertical lines."""
  figure, panel = pictures.figure(*SIZE)
  low = min(values.min() for values in groups.values())
  high = max(max(values.max() for values in groups.values()), low + 1e-6)  # also if all values are one
  for name, values in groups.items():
    panel.hist(values, bins=np.linspace(low, high, 40), alpha=0.5, density=True, label=name)
  for name, value in (lines or {}).items():
    panel.axvline(value, color="black", linestyle="--", label=name)
  panel.set(xlabel=xlabel, ylabel="share", yticks=[])
  panel.legend()
  _save(figure, path)


def _save(figure: "matplotlib.figure.Figure", path: str):
  figure.savefig(os.fspath(path), dpi=110)
