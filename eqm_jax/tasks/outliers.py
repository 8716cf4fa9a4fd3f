"""Images that are no data, made of noise or of the data itself, all in [−1, 1] for pixels."""

from collections.abc import Callable

import numpy as np
from PIL import Image

PATCH = 64  # pixels of a photograph that become one image


def uniform(image_N: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Every pixel uniform in [−1, 1]."""
  return rng.uniform(-1, 1, image_N.shape)


def gaussian(image_N: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Every pixel normal, with the mean and deviation that the pixels have."""
  return rng.normal(image_N.mean(), image_N.std(), image_N.shape)


def constant(image_N: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Each image of one grey level, or one colour."""
  return np.broadcast_to(rng.uniform(-1, 1, (len(image_N), 1, 1, image_N.shape[-1])), image_N.shape)


def shuffled(image_N: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """The pixels of each image in another order."""
  N, H, W, C = image_N.shape
  return rng.permuted(image_N.reshape(N, H * W, C), axis=1).reshape(image_N.shape)


def rotated(image_N: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Each image turned by a quarter."""
  del rng
  return image_N.swapaxes(1, 2)[:, ::-1]


def inverted(image_N: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Black for white."""
  del rng
  return -image_N


def photographs(image_N: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Patches of scikit-learn's two sample photographs, downsized."""
  import sklearn.datasets

  _, H, W, C = image_N.shape
  if C not in (1, 3):
    raise ValueError(f"tasks.ood.against: 'photographs' are grey or RGB, but the images have {C} channels")
  photos = [Image.fromarray(photo) for photo in sklearn.datasets.load_sample_images().images]
  patches = []
  for _ in image_N:
    photo = photos[rng.integers(len(photos))].convert("L" if C == 1 else "RGB")
    left, top = rng.integers(photo.width - PATCH), rng.integers(photo.height - PATCH)
    patch = photo.crop((left, top, left + PATCH, top + PATCH)).resize((W, H), Image.Resampling.BOX)
    patches.append(np.asarray(patch).reshape(H, W, C) / 127.5 - 1)
  return np.stack(patches)


MAKERS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
  "uniform": uniform,
  "gaussian": gaussian,
  "constant": constant,
  "shuffled": shuffled,
  "rotated": rotated,
  "inverted": inverted,
  "photographs": photographs,
}


def make(name: str, image_N: np.ndarray, seed: int) -> np.ndarray:
  """As many outliers of a kind as there are images, [N, H, W, C] float32.

  Raises:
    ValueError: for an unknown kind, or one that such images cannot have.
  """
  if name not in MAKERS:
    raise ValueError(f"tasks.ood.against: {name!r} is not known: choose from {', '.join(MAKERS)}")
  rng = np.random.default_rng([seed, list(MAKERS).index(name)])
  return np.ascontiguousarray(MAKERS[name](image_N, rng), np.float32)
