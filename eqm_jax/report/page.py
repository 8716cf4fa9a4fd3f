"""The report as one HTML page, and its diagrams: means over seeds, with the spread as a band or as dots."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eqm_jax import pages, plotting
from eqm_jax.report.lab import FAILS, HOLDS, PARTLY

COLOURS = {
  HOLDS: "light-dark(#2a7d2a, #6cc46c)",
  PARTLY: "light-dark(#a86f00, #e0a83c)",
  FAILS: "light-dark(#b02a2a, #f07a7a)",
}
STYLE = ".verdict { font-weight: bold; white-space: nowrap; }"
SIZE, DPI = (6.4, 3.4), 110  # of a diagram, in inches


def page(title: str, description: str, facts: Mapping[str, str], claims: Mapping[str, dict[str, Any]]) -> str:
  """The page of all claims measured so far.

  Args:
    title, description: of the page.
    facts: what holds for all claims: command, device, data, ...
    claims: by name, with `title` and `paper` beside what a claim function returns.
  """
  summary = [
    [f'<a href="#{name}">{html.escape(claim["title"])}</a>', _verdict(claim["verdict"])]
    for name, claim in claims.items()
  ]
  parts = [
    f"<p>{html.escape(description)}</p>",
    pages.facts(facts),
    pages.table(["claim", "here"], summary),
    *(_section(name, claim) for name, claim in claims.items()),
  ]
  return pages.document(title, parts, style=STYLE)


def _section(name: str, claim: dict[str, Any]) -> str:
  parts = [
    f'<h2 id="{name}">{html.escape(claim["title"])}</h2>',
    f"<p><b>Paper.</b> {html.escape(claim['paper'])}</p>",
    f"<p><b>Here.</b> {_verdict(claim['verdict'])}. <i>Criterion:</i> {html.escape(claim['criterion'])}</p>",
    pages.text_table(claim["columns"], claim["rows"]),
    *(f"<p>{html.escape(note)}</p>" for note in claim.get("notes", ())),
    *(pages.figure(f"figures/{file}", caption) for file, caption in claim["figures"].items()),
  ]
  return "\n".join(parts)


def _verdict(verdict: str) -> str:
  return f'<span class="verdict" style="color: {COLOURS[verdict]}">{html.escape(verdict)}</span>'


def plot_lines(path: str, x: Sequence[float], curves: Mapping[str, Sequence[Sequence[float]]], **axes: Any):
  """One line with a band for each curve, [X][seeds]; `axes` are settings such as xlabel="λ" and xscale="log"."""
  figure, panel = plotting.figure(*SIZE)
  for name, values in curves.items():
    values_XxS = np.asarray(values, np.float64)
    mean, deviation = values_XxS.mean(axis=1), values_XxS.std(axis=1)
    (line,) = panel.plot(x, mean, marker="o", markersize=4, label=name)
    panel.fill_between(x, mean - deviation, mean + deviation, alpha=0.2, color=line.get_color())
  panel.set(**axes)
  panel.set_xticks(list(x), [f"{value:g}" for value in x])
  panel.minorticks_off()
  panel.legend()
  figure.savefig(path, dpi=DPI)


def plot_tradeoff(path: str, curves: Mapping[str, tuple[Sequence, Sequence]], **axes: Any):
  """A line through the points of each curve, (x, y) of [X][seeds] each: means over the seeds, and a dot for each."""
  from matplotlib.ticker import LogLocator

  figure, panel = plotting.figure(*SIZE)
  for name, (x, y) in curves.items():
    (line,) = panel.plot(np.mean(x, axis=1), np.mean(y, axis=1), label=name)
    panel.plot(np.ravel(x), np.ravel(y), ".", markersize=4, color=line.get_color())
  panel.set(**axes)
  for axis in (panel.xaxis, panel.yaxis):
    if axis.get_scale() == "log":
      axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
      axis.set_major_formatter("{x:g}")
  panel.minorticks_off()
  panel.legend(loc="upper left", bbox_to_anchor=(1.02, 1), fontsize="small")
  figure.savefig(path, dpi=DPI, bbox_inches="tight")


def plot_bars(path: str, bars: Mapping[str, Sequence[float]], *, xlabel: str):
  """One bar for each name: the mean over seeds, and a dot for every seed."""
  figure, panel = plotting.figure(*SIZE)
  panel.barh(list(bars), [np.mean(values) for values in bars.values()], color="tab:blue", alpha=0.5)
  for position, values in enumerate(bars.values()):
    panel.plot(values, [position] * len(values), "k.", markersize=5)
  panel.invert_yaxis()
  panel.set(xlabel=xlabel)
  figure.savefig(path, dpi=DPI)


def plot_histogram(
  path: str, groups: Mapping[str, np.ndarray], *, xlabel: str, lines: Mapping[str, float] | None = None
):
  """Distributions over each other, and vertical lines."""
  figure, panel = plotting.figure(*SIZE)
  low = min(values.min() for values in groups.values())
  high = max(max(values.max() for values in groups.values()), low + 1e-6)  # also where all values are the same
  for name, values in groups.items():
    panel.hist(values, bins=np.linspace(low, high, 40), alpha=0.5, density=True, label=name)
  for name, value in (lines or {}).items():
    panel.axvline(value, color="black", linestyle="--", label=name)
  panel.set(xlabel=xlabel, ylabel="fraction", yticks=[])
  panel.legend()
  figure.savefig(path, dpi=DPI)
