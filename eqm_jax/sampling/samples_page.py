"""A page of samples with their labels, NFE and norms, which a click sorts."""

import html
from collections.abc import Sequence

import numpy as np

from eqm_jax import pages, plotting
from eqm_jax.equilibrium.sampler import Status
from eqm_jax.io import atomic_write

COLUMNS = 10  # of the one picture that holds all samples
SMALLEST, LARGEST = 96, 128  # pixels of a side, as shown
STYLE = """
body { max-width: 66em; }
#samples { display: flex; flex-wrap: wrap; gap: 8px; margin-top: 1em; }
#samples figure { margin: 0; } #samples i { display: block; image-rendering: pixelated; }
#samples figcaption { font-size: 12px; line-height: 1.35; max-width: %dpx; overflow-wrap: anywhere; }
b { color: light-dark(#222, #ddd); } .diverged { color: light-dark(#b02a2a, #f07a7a); }
button { font: inherit; padding: .2em .8em; margin-right: .4em; } button[aria-pressed=true] { font-weight: bold; }
"""
SCRIPT = """
const samples = document.getElementById("samples"), buttons = [...document.querySelectorAll("button")];
buttons[0].dataset.order = 1;
for (const button of buttons) button.onclick = () => {
  const sign = button.dataset.order === "1" ? -1 : 1, key = button.value;
  for (const other of buttons) { other.dataset.order = ""; other.ariaPressed = other === button; }
  button.dataset.order = sign;
  const number = (sample, name) => Number(sample.dataset[name]);
  const order = (a, b) => sign * (number(a, key) - number(b, key)) || number(a, "index") - number(b, "index");
  samples.append(...[...samples.children].sort(order));
};
"""


def write(
  path: str,
  title: str,
  images: np.ndarray,
  *,
  label_N: np.ndarray,
  nfe_N: np.ndarray,
  norm_N: np.ndarray,
  status_N: np.ndarray,
  names: Sequence[str],
):
  """Writes the page.

  Args:
    path: of the page.
    title: its heading.
    images: the first samples, which are shown: [M, H, W, C] in [−1, 1] or uint8.
    label_N, nfe_N, norm_N, status_N: of all samples; norms of a sampler that measures none are NaN.
    names: of the labels, as `labels.names` has them.
  """
  total, count = len(label_N), len(images)
  label_N, nfe_N, norm_N, status_N = (array[:count] for array in (label_N, nfe_N, norm_N, status_N))
  keys = {"index": "number", "label": "label", "nfe": "NFE"}
  diverged_N = status_N == Status.DIVERGED
  if not np.all(np.isnan(norm_N) | diverged_N):
    keys["norm"] = "‖f‖"
  columns = {"index": np.arange(count), "label": label_N, "nfe": nfe_N, "norm": norm_N}
  numbers = {key: columns[key] for key in keys}
  buttons = [f'<button value="{key}" aria-pressed="{str(key == "index").lower()}">{keys[key]}</button>' for key in keys]
  samples, style = _sprite(images)
  for i, place in enumerate(samples):
    data = " ".join(f'data-{key}="{_number(values[i])}"' for key, values in numbers.items())
    caption = f"<b>{html.escape(names[label_N[i]])}</b><br>NFE {nfe_N[i]}"
    if diverged_N[i]:
      caption += '<br><span class="diverged">diverged</span>'
    elif "norm" in keys:
      caption += f"<br>‖f‖ {norm_N[i]:.4g}"
    samples[i] = f"<figure {data}>{place}<figcaption>{caption}</figcaption></figure>"
  shown = f"The first {count:,} of {total:,} samples" if count < total else f"{total:,} samples"
  parts = [
    f"<p>{shown}. Sort by {''.join(buttons)} and click again for the reverse order.</p>",
    f'<div id="samples">{"".join(samples)}</div>',
  ]
  with atomic_write(path, "w") as file:
    file.write(pages.document(title, parts, style=style, script=SCRIPT))


def _sprite(images: np.ndarray) -> tuple[list[str], str]:
  """One element for each image, all parts of one picture, and the style that places them."""
  height, width = images.shape[1:3]
  zoom = max(1, round(SMALLEST / height)) if height < LARGEST else LARGEST / height
  height, width = round(height * zoom), round(width * zoom)
  picture = plotting.grid(images, COLUMNS, margin=0, zoom=1)
  rows = -(-len(images) // COLUMNS)
  if zoom < 1:
    picture = picture.resize((COLUMNS * width, rows * height))
  style = STYLE % max(width, SMALLEST) + (
    f"#samples i {{ width: {width}px; height: {height}px; background: url({pages.embedded(picture)}); "
    f"background-size: {COLUMNS * width}px {rows * height}px; }}\n"
  )
  places = [(-(i % COLUMNS) * width, -(i // COLUMNS) * height) for i in range(len(images))]
  return [f'<i style="background-position: {x}px {y}px"></i>' for x, y in places], style


def _number(value: float) -> str:
  """A number as JavaScript reads it; what is not finite comes last."""
  return f"{value:.6g}" if np.isfinite(value) else "Infinity"
