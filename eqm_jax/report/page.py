"""The report as one HTML page."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from eqm_jax.report.lab import FAILS, HOLDS, PARTLY

COLOURS = {HOLDS: "#2a7d2a", PARTLY: "#a86f00", FAILS: "#b02a2a"}
STYLE = """
body { font: 16px/1.5 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222; background: #fff; }
table { border-collapse: collapse; margin: 1em 0; font-size: 14px; display: block; overflow-x: auto; }
td, th { border: 1px solid #ccc; padding: .25em .6em; text-align: left; }
img { max-width: 100%; image-rendering: pixelated; }
figure { margin: 1em 0; } figcaption { font-size: 14px; color: #555; }
code { background: #f2f2f2; padding: .1em .3em; overflow-wrap: anywhere; }
.verdict { font-weight: bold; white-space: nowrap; }
"""


def page(claims: Mapping[str, dict[str, Any]], facts: Mapping[str, str]) -> str:
  """The page of all claims measured so far.

  Args:
    claims: what each claim function returned, by its name.
    facts: what holds for all of them: command, device, data, ...
  """
  summary = [
    [f'<a href="#{name}">{html.escape(claim["title"])}</a>', _verdict(claim["verdict"])]
    for name, claim in claims.items()
  ]
  return "\n".join(
    [
      "<!doctype html>",
      '<html lang="en"><head><meta charset="utf-8">',
      '<meta name="viewport" content="width=device-width, initial-scale=1">',
      f"<title>Equilibrium Matching on digits</title><style>{STYLE}</style></head><body>",
      "<h1>What the paper claims, measured on handwritten digits</h1>",
      "<p>Each claim of the Equilibrium Matching paper beside what was measured here, on a small network and "
      "small pictures. A claim that does not hold here may well hold on ImageNet, and the other way round. "
      "Whether it holds is decided by the criterion given with it, not by hand; a claim of several parts holds in "
      "part where only some do, or where a difference lies within the spread of the seeds.</p>",
      _table(["", ""], [[html.escape(key), html.escape(value)] for key, value in facts.items()]),
      _table(["claim", "here"], summary),
      *(_section(name, claim) for name, claim in claims.items()),
      "</body></html>\n",
    ]
  )


def _section(name: str, claim: dict[str, Any]) -> str:
  parts = [
    f'<h2 id="{name}">{html.escape(claim["title"])}</h2>',
    f"<p><b>Paper.</b> {html.escape(claim['paper'])}</p>",
    f"<p><b>Here.</b> {_verdict(claim['verdict'])}. <i>Criterion:</i> {html.escape(claim['criterion'])}</p>",
    _table(
      [html.escape(name) for name in claim["columns"]], [[html.escape(cell) for cell in row] for row in claim["rows"]]
    ),
    *(f"<p>{html.escape(note)}</p>" for note in claim.get("notes", ())),
  ]
  for file, caption in claim["figures"].items():
    text = html.escape(caption)
    parts.append(f'<figure><img src="figures/{file}" alt="{text}"><figcaption>{text}</figcaption></figure>')
  return "\n".join(parts)


def _verdict(verdict: str) -> str:
  return f'<span class="verdict" style="color: {COLOURS[verdict]}">{html.escape(verdict)}</span>'


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A table of cells that are HTML already."""
  lines = ["<table>"]
  if any(columns):
    lines.append("<tr>" + "".join(f"<th>{cell}</th>" for cell in columns) + "</tr>")
  lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows]
  return "\n".join([*lines, "</table>"])
