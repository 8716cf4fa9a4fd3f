"""Pictures of samples. Images are [N, H, W, C] in [−1, 1]; beyond three channels, the first three are shown."""

import contextlib
import io
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
  import matplotlib.figure

MARGIN = 1  # pixels between images, before enlarging
SIDE = 48  # of an image in a grid without captions, about, in pixels
CAPTION_WIDTH, CAPTION_HEIGHT = 64, 16  # pixels


def grid(
  images: np.ndarray,
  columns: int,
  *,
  margin: int = MARGIN,
  zoom: int | None = None,
  captions: Sequence[str] | None = None,
) -> Image.Image:
  """Images row by row, enlarged without smoothing: by `zoom`, or without it small ones.

  Args:
    images: [N, H, W, C].
    columns: images in a row.
    margin: pixels between images, before enlarging.
    zoom: factor of both sides.
    captions: a text below each image, cut off where it would meet the next; "" and None: none.
  """
  pixels = _to_rgb(images)
  N, H, W, _ = pixels.shape
  rows = -(-N // columns)
  canvas = np.full((rows * (H + margin) + margin, columns * (W + margin) + margin, 3), 255, np.uint8)
  for i, image in enumerate(pixels):
    top, left = margin + (i // columns) * (H + margin), margin + (i % columns) * (W + margin)
    canvas[top : top + H, left : left + W] = image
  zoom = zoom or max(1, CAPTION_WIDTH // H if captions else round(SIDE / H))
  picture = Image.fromarray(canvas)
  picture = picture.resize((canvas.shape[1] * zoom, canvas.shape[0] * zoom), Image.Resampling.NEAREST)
  return _with_captions(picture, captions, columns, rows) if captions else picture


def _with_captions(picture: Image.Image, captions: Sequence[str], columns: int, rows: int) -> Image.Image:
  """A grid with a line of text below each row of images that has captions."""
  import matplotlib  # its font has more scripts than Pillow's

  font = ImageFont.truetype(os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), 10)
  width, height = picture.width // columns, picture.height // rows
  texts = [captions[first : first + columns] for first in range(0, rows * columns, columns)]
  captioned = [any(row) for row in texts]
  result = Image.new("RGB", (picture.width, picture.height + CAPTION_HEIGHT * sum(captioned)), "white")
  draw, top = ImageDraw.Draw(result), 0
  for row, row_texts in enumerate(texts):
    end = picture.height if row == rows - 1 else (row + 1) * height
    result.paste(picture.crop((0, row * height, picture.width, end)), (0, top))
    top += end - row * height
    for column, text in enumerate(row_texts):
      room = next((i for i, other in enumerate(row_texts[column + 1 :]) if other), columns - column - 1) + 1
      while text != "…" and font.getlength(text) > width * room - 4:
        text = text.removesuffix("…")[:-1] + "…"
      draw.text((column * width + 2, top), text, fill="black", font=font)
    top += CAPTION_HEIGHT * captioned[row]
  return result


def row_captions(names: Sequence[str], columns: int) -> list[str]:
  """Captions of a grid that name its rows, below the first image of each."""
  return [text for name in names for text in (name, *[""] * (columns - 1))]


def single(image: np.ndarray) -> Image.Image:
  """One image [H, W, C], pixel for pixel."""
  return Image.fromarray(_to_rgb(image))


def animation(frames: Sequence[Image.Image], path: str, *, milliseconds: int = 120):
  """Writes a GIF that runs through the frames, rests on the last and starts again."""
  durations = [milliseconds] * (len(frames) - 1) + [2000]
  frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def nfe_histogram(nfe: np.ndarray, budget: int, title: str) -> Image.Image:
  """Histogram of the samples' NFE, with the budget."""
  drawn, axes = figure(6, 3)
  axes.hist(nfe, bins=range(0, budget + 6, 5), color="tab:blue")
  axes.axvline(nfe.mean(), color="black", label=f"mean {nfe.mean():.0f}")
  axes.axvline(budget, color="tab:red", linestyle="--", label=f"budget {budget}")
  axes.set(xlabel="NFE of a sample", ylabel="samples", title=title)
  axes.legend()
  return rendered(drawn)


def box_plot(groups: Mapping[str, np.ndarray], label: str) -> Image.Image:
  """Values [N] of several groups, as boxes from quartile to quartile."""
  drawn, axes = figure(6, 3)
  axes.boxplot(list(groups.values()), tick_labels=list(groups), orientation="horizontal", showfliers=False)
  axes.invert_yaxis()
  axes.set(xlabel=label)
  return rendered(drawn)


def metric_curve(step_N: Sequence[int], metric_N: Sequence[float], error_N: Sequence[float], label: str) -> Image.Image:
  """A metric over training steps, with its standard errors."""
  drawn, axes = figure(6, 3)
  axes.errorbar(step_N, metric_N, yerr=error_N, marker="o", capsize=3)
  axes.set(xlabel="training step", ylabel=label, yscale="log")
  return rendered(drawn)


def norm_curves(norms_KxB: np.ndarray, nfe_B: np.ndarray, threshold: float | None) -> Image.Image:
  """‖f‖ of a few samples over their NFE, until each stops; a threshold is a dashed line."""
  drawn, axes = figure(6, 3)
  for norm_K, nfe in zip(norms_KxB.T, nfe_B):
    axes.plot(np.arange(1, nfe + 1), norm_K[:nfe], linewidth=1)
  if threshold:
    axes.axhline(threshold, color="black", linestyle="--", label=f"threshold {threshold:g}")
    axes.legend()
  axes.set(xlabel="NFE", ylabel="‖f‖", yscale="log")
  return rendered(drawn)


def level_errors(gamma_N: np.ndarray, predicted: Mapping[str, np.ndarray], bins: int) -> Image.Image:
  """Estimates γ̂ [N] of known noise levels: median and the range from 10 % to 90 % in bins of γ, and RMSE."""
  drawn, (left, right) = figure(9, 3.6, columns=2)
  edges = np.linspace(0, 1, bins + 1)
  bin_N = np.digitize(gamma_N, edges[1:-1])
  filled = np.unique(bin_N)
  centres = (filled + 0.5) / bins
  left.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle="--")
  for name, values_N in predicted.items():
    groups = [(values_N[bin_N == k], gamma_N[bin_N == k]) for k in filled]
    low, median, high = np.transpose([np.percentile(values, (10, 50, 90)) for values, _ in groups])
    (line,) = left.plot(centres, median, label=name)
    left.fill_between(centres, low, high, alpha=0.2, color=line.get_color(), linewidth=0)
    right.plot(centres, [np.sqrt(np.mean((values - gammas) ** 2)) for values, gammas in groups], marker="o", label=name)
  left.set(xlabel="γ (0: noise, 1: data)", ylabel="γ̂")
  right.set(xlabel="γ", ylabel="RMSE of γ̂", ylim=(0, None))
  left.legend()
  return rendered(drawn)


def to_uint8(images: np.ndarray) -> np.ndarray:
  """Images in [−1, 1] as uint8, clipped; uint8 images are returned as they are."""
  if images.dtype == np.uint8:
    return images
  return np.clip(np.rint(127.5 * images + 127.5), 0, 255).astype(np.uint8)


def _to_rgb(images: np.ndarray) -> np.ndarray:
  pixels = to_uint8(images)
  return pixels[..., :3] if pixels.shape[-1] >= 3 else pixels[..., :1].repeat(3, axis=-1)


def figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple["matplotlib.figure.Figure", Any]:
  """A diagram in inches and its axes, [rows, columns] of them if more than one; no display is needed."""
  _import_matplotlib()
  import matplotlib.backends.backend_agg
  import matplotlib.figure

  drawn = matplotlib.figure.Figure(figsize=(width, height), layout="constrained")
  matplotlib.backends.backend_agg.FigureCanvasAgg(drawn)
  return drawn, drawn.subplots(rows, columns)


def _import_matplotlib():
  """Imports matplotlib (here, so that a run that draws nothing starts a second sooner), whatever MPLBACKEND names.

  In a notebook's terminal that is the notebook's backend. Matplotlib cannot be imported where this is not installed,
  although no figure here needs a backend.
  """
  if "matplotlib" in sys.modules:
    return
  backend = os.environ.pop("MPLBACKEND", None)
  try:
    import matplotlib
  finally:
    if backend is not None:
      os.environ["MPLBACKEND"] = backend
  if backend:  # for pyplot, should somebody import it later
    with contextlib.suppress(ValueError):
      matplotlib.rcParams["backend"] = backend


def rendered(figure: "matplotlib.figure.Figure") -> Image.Image:
  """A diagram as an image."""
  buffer = io.BytesIO()
  figure.savefig(buffer, format="png", dpi=120)
  return Image.open(buffer)
