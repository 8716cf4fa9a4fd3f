"""HTML pages of one file each: tables, curves and pictures, for light and dark browsers, without a network."""

import base64
import html
import io
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

MAX_WIDTH = 1280  # pixels of a picture
MAX_PNG = 200_000  # bytes; a larger picture is a photograph, and becomes a JPEG
WIDTH, HEIGHT = 350, 190  # of a chart
LEFT, RIGHT, TOP, BOTTOM = 54, 30, 10, 26  # its margins
MAX_POINTS = 300  # of a curve
STYLE = """
:root { color-scheme: light dark; --line: light-dark(#ccc, #444); --quiet: light-dark(#555, #aaa);
  --curve: light-dark(#1f6fb4, #6db3f2); }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64em; margin: 2em auto; padding: 0 1em;
  color: light-dark(#222, #ddd); background: light-dark(#fff, #17191c); }
a { color: light-dark(#0645ad, #8ab4f8); }
table { border-collapse: collapse; margin: 1em 0; font-size: 14px; display: block; overflow-x: auto; }
td, th { border: 1px solid var(--line); padding: .25em .6em; text-align: left; }
img { max-width: 100%; }
figure { margin: 1em 0; } figcaption { font-size: 14px; color: var(--quiet); }
code, pre { background: light-dark(#f2f2f2, #24272b); padding: .1em .3em; overflow-wrap: anywhere; }
pre { font-size: 13px; overflow-x: auto; padding: 1em; }
.side-by-side { display: grid; grid-template-columns: repeat(auto-fill, minmax(18em, 1fr)); gap: 0 1.5em; }
.chart { width: 100%; height: auto; } .chart text { font-size: 12px; fill: var(--quiet); }
.chart path { fill: none; stroke: var(--curve); stroke-width: 1.5; } .chart .grid { stroke: var(--line); }
.chart .range { fill: var(--curve); fill-opacity: .25; stroke: none; }
"""


def document(title: str, parts: Sequence[str], *, style: str = "", script: str = "") -> str:
  """A whole page: its title as heading, and parts that are HTML."""
  return "\n".join(
    [
      "<!doctype html>",
      '<html lang="en"><head><meta charset="utf-8">',
      '<meta name="viewport" content="width=device-width, initial-scale=1">',
      f"<title>{html.escape(title)}</title><style>{STYLE}{style}</style></head><body>",
      f"<h1>{html.escape(title)}</h1>",
      *parts,
      *([f"<script>{script}</script>"] if script else []),
      "</body></html>\n",
    ]
  )


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A table of cells that are HTML already."""
  lines = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in columns) + "</tr>"] if columns else []
  lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows]
  return "\n".join(["<table>", *lines, "</table>"])


def text_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A table of cells that are text."""
  return table(list(map(html.escape, columns)), [list(map(html.escape, row)) for row in rows])


def facts(values: Mapping[str, str]) -> str:
  """A table of names and values, both text."""
  return text_table([], list(values.items()))


def figure(source: str, caption: str) -> str:
  """A picture, by its address, and its caption, which is text."""
  text = html.escape(caption)
  return f'<figure><img src="{source}" alt="{text}"><figcaption>{text}</figcaption></figure>'


def embedded(image: Image.Image) -> str:
  """The address of a picture that lies in the page itself, at most `MAX_WIDTH` wide."""
  if image.width > MAX_WIDTH:
    image = image.convert("RGB").resize((MAX_WIDTH, round(image.height * MAX_WIDTH / image.width)))
  kind, content = "png", _encoded(image, format="PNG")
  if len(content) > MAX_PNG:
    kind, content = "jpeg", _encoded(image.convert("RGB"), format="JPEG", quality=85)
  return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _encoded(image: Image.Image, **options) -> bytes:
  buffer = io.BytesIO()
  image.save(buffer, **options)
  return buffer.getvalue()


def chart(title: str, x: Sequence[float], y: Sequence[float | None], *, log: bool = False) -> str:
  """One curve as a figure. Of many points it shows means, and the range of what they are the mean of.

  Args:
    title: text; the last value stands beside it.
    x: increasing.
    y: values that are missing or not finite are left out.
    log: whether the axis of y is logarithmic, where all values are positive.
  """
  x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
  x, y = x[np.isfinite(y)], y[np.isfinite(y)]
  if not len(y):
    return f"<figure><figcaption>{html.escape(title)}: no finite value</figcaption></figure>"
  log = log and bool(y.min() > 0)
  shown = np.log10(y) if log else y
  groups = np.array_split(np.arange(len(y)), min(len(y), MAX_POINTS))
  across = _scale(x, LEFT, WIDTH - RIGHT)
  up = _scale(shown, HEIGHT - BOTTOM, TOP)
  middle = [across(x[group].mean()) for group in groups]
  lines = [
    f'<path class="grid" d="M{LEFT} {up(value):.1f}H{WIDTH - RIGHT}"/>'
    f'<text x="{LEFT - 6}" y="{up(value) + 4:.1f}" text-anchor="end">{label}</text>'
    for value, label in _ticks(shown, log)
  ]
  lines += [
    f'<text x="{across(value):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{label}</text>'
    for value, label in _ticks(x, False, 4)
  ]
  if len(groups) < len(y):
    top, bottom = ([up(edge(shown[group])) for group in groups] for edge in (np.max, np.min))
    lines.append(f'<path class="range" d="{_path(middle + middle[::-1], top + bottom[::-1])}Z"/>')
  curve = _path(middle, [up(shown[group].mean()) for group in groups])
  dot = "h0" if len(groups) == 1 else ""  # a round end of a line without length
  lines.append(f'<path stroke-linecap="round" d="{curve}{dot}"/>')
  text = html.escape(f"{title}: {y[-1]:.5g} at {x[-1]:,.10g}")
  drawing = f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"><title>{text}</title>{"".join(lines)}</svg>'
  return f"<figure>{drawing}<figcaption>{text}</figcaption></figure>"


def _scale(values: np.ndarray, first: float, last: float):
  """The map of the values' range to pixels; a single value lies in the middle."""
  low, high = values.min(), values.max()
  if high == low:
    return lambda value: (first + last) / 2
  return lambda value: first + (value - low) / (high - low) * (last - first)


def _path(x: Sequence[float], y: Sequence[float]) -> str:
  return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x, y))


def _ticks(values: np.ndarray, log: bool, intervals: int = 5) -> list[tuple[float, str]]:
  """Round numbers within the range of the values, and how they are written; with `log` the values are logarithms."""
  low, high = values.min(), values.max()
  if log and high - low >= 2:
    decades = np.arange(np.ceil(low), np.floor(high) + 1)
    return [(value, f"{10**value:g}") for value in decades[:: -(-len(decades) // 5)]]
  if log:
    return [(np.log10(value), label) for value, label in _ticks(10**values, False) if value > 0]
  if high == low:
    return [(low, f"{low:.4g}")]
  step = 10 ** np.floor(np.log10((high - low) / intervals))
  step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= intervals + 1e-6)
  first, last = np.ceil(low / step - 1e-6), np.floor(high / step + 1e-6)  # also an end that is round but for rounding
  return [(i * step, f"{i * step:,.6g}") for i in range(int(first), int(last) + 1)]
