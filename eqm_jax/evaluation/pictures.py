"""Pictures of samples. Images are [N, H, W, C] in [−1, 1]; beyond three channels, the first three are shown."""

import io
from collections.abc import Sequence

import matplotlib.backends.backend_agg
import matplotlib.figure
import numpy as np
from PIL import Image

MARGIN = 1  # pixels between images, before enlarging


def grid(images: np.ndarray, columns: int) -> Image.Image:
  """Images row by row, small ones enlarged without smoothing."""
  pixels = np.clip(np.rint(127.5 * images + 127.5), 0, 255).astype(np.uint8)
  pixels = pixels[..., :3] if pixels.shape[-1] >= 3 else pixels[..., :1].repeat(3, axis=-1)
  N, H, W, _ = pixels.shape
  rows = -(-N // columns)
  canvas = np.full((rows * (H + MARGIN) + MARGIN, columns * (W + MARGIN) + MARGIN, 3), 255, np.uint8)
  for i, image in enumerate(pixels):
    top, left = MARGIN + (i // columns) * (H + MARGIN), MARGIN + (i % columns) * (W + MARGIN)
    canvas[top : top + H, left : left + W] = image
  zoom = max(1, 48 // H)
  return Image.fromarray(canvas).resize((canvas.shape[1] * zoom, canvas.shape[0] * zoom), Image.Resampling.NEAREST)


def animation(frames: Sequence[Image.Image], path: str, *, milliseconds: int = 120):
  """Writes a GIF that runs through the frames, rests on the last and starts again."""
  durations = [milliseconds] * (len(frames) - 1) + [2000]
  frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def evaluations_histogram(evaluations: np.ndarray, budget: int, title: str) -> Image.Image:
  """How many network calls the samples used, against the budget."""
  figure = matplotlib.figure.Figure(figsize=(6, 3), layout="constrained")
  matplotlib.backends.backend_agg.FigureCanvasAgg(figure)
  axes = figure.subplots()
  axes.hist(evaluations, bins=range(0, budget + 6, 5), color="tab:blue")
  axes.axvline(evaluations.mean(), color="black", label=f"mean {evaluations.mean():.0f}")
  axes.axvline(budget, color="tab:red", linestyle="--", label=f"budget {budget}")
  axes.set(xlabel="evaluations used by a sample", ylabel="samples", title=title)
  axes.legend()
  buffer = io.BytesIO()
  figure.savefig(buffer, format="png", dpi=120)
  return Image.open(buffer)
