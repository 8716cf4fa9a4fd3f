"""Pictures of samples. Images are [N, H, W, C] in [−1, 1]; beyond three channels, the first three are shown."""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
  import matplotlib.figure

MARGIN = 1  # pixels between images, before enlarging


def grid(images: np.ndarray, columns: int) -> Image.Image:
  """Images row by row, small ones enlarged without smoothing."""
  pixels = _to_rgb(images)
  N, H, W, _ = pixels.shape
  rows = -(-N // columns)
  canvas = np.full((rows * (H + MARGIN) + MARGIN, columns * (W + MARGIN) + MARGIN, 3), 255, np.uint8)
  for i, image in enumerate(pixels):
    top, left = MARGIN + (i // columns) * (H + MARGIN), MARGIN + (i % columns) * (W + MARGIN)
    canvas[top : top + H, left : left + W] = image
  zoom = max(1, 48 // H)
  return Image.fromarray(canvas).resize((canvas.shape[1] * zoom, canvas.shape[0] * zoom), Image.Resampling.NEAREST)


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
  import matplotlib.backends.backend_agg  # here, so that a run that draws nothing starts a second sooner
  import matplotlib.figure

  drawn = matplotlib.figure.Figure(figsize=(width, height), layout="constrained")
  matplotlib.backends.backend_agg.FigureCanvasAgg(drawn)
  return drawn, drawn.subplots(rows, columns)


def rendered(figure: "matplotlib.figure.Figure") -> Image.Image:
  """A diagram as an image."""
  buffer = io.BytesIO()
  figure.savefig(buffer, format="png", dpi=120)
  return Image.open(buffer)
