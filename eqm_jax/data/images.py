"""Images that a user brings: a folder of them, or an .npz."""

import os
import zipfile
import zlib

import numpy as np
from PIL import Image, UnidentifiedImageError


def read(
  path: str, shape: tuple[int, int, int], count: int, in_pixels: bool = True, bounded: bool = True
) -> tuple[np.ndarray, np.ndarray | None]:
  """The first `count` images of a folder, in the order of their names, or of an .npz.

  Files of a folder are brought to the size as in ADM: halved while the short side is at
  least twice the size, resized, and cropped at the centre; and to grey or RGB. An .npz
  holds them as `image`, `x` or `arr_0`, [N, H, W, C], uint8 or float in [−1, 1] (about:
  up to ±1.5 passes for the overshoot of samples), and maybe labels as `label` or `arr_1`.
  For a model of latents (not `in_pixels`) only an .npz of finite floats will do; where
  images may be noisy (not `bounded`), floats beyond the range pass.

  Returns:
    images [N, H, W, C] float32, and labels [N] int32 or None.

  Raises:
    ValueError: naming the file, for what is missing, damaged, or of another size,
      type or range.
  """
  if os.path.isdir(path):
    if not in_pixels:
      raise ValueError(f"{path}: the model works on latents of shape {shape}, not on images: give an .npz of latents")
    return _read_folder(path, shape, count), None
  if not os.path.isfile(path):
    raise ValueError(f"{path}: no such folder of images and no such .npz")
  return _read_npz(path, shape, count, in_pixels, bounded)


def to_float(images: np.ndarray, where: str, in_pixels: bool = True, bounded: bool = True) -> np.ndarray:
  """Pixels, uint8 or float in [−1, 1], to float32 in [−1, 1]; latents, any floats, to float32."""
  if in_pixels and images.dtype == np.uint8:
    return images.astype(np.float32) / 127.5 - 1
  if not np.issubdtype(images.dtype, np.floating):
    wanted = "uint8 in 0..255 or float in [-1, 1]" if in_pixels else "floating-point latents"
    raise ValueError(f"{where}: images are {images.dtype}: give {wanted}")
  if not np.all(np.isfinite(images)):
    raise ValueError(f"{where}: {np.sum(~np.isfinite(images))} of {images.size} values are not finite")
  low, high = images.min(), images.max()
  if in_pixels and bounded and (low < -1.5 or high > 1.5):
    raise ValueError(f"{where}: float images span {low:g}..{high:g}, but must lie in [-1, 1]; or give uint8 in 0..255")
  return images.astype(np.float32)


def centre_crop(image: Image.Image, size: int) -> Image.Image:
  """ADM's crop: halve with a box filter, resize the short side bicubically, crop the centre."""
  while min(image.size) >= 2 * size:
    image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
  scale = size / min(image.size)
  image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
  left, top = (image.width - size) // 2, (image.height - size) // 2
  return image.crop((left, top, left + size, top + size))


def _read_folder(path: str, shape, count: int) -> np.ndarray:
  H, W, C = shape
  modes = {1: "L", 3: "RGB"}
  if C not in modes or H != W:
    raise ValueError(f"{path}: a folder holds grey or RGB images, but the model works on {shape}: give an .npz")
  names = sorted(name for name in os.listdir(path) if os.path.isfile(os.path.join(path, name)) and name[0] != ".")
  if not names:
    raise ValueError(f"{path}: the folder holds no image")
  images = []
  for name in names[:count]:
    file = os.path.join(path, name)
    try:
      with Image.open(file) as image:
        if image.mode.startswith(("I", "F")):
          raise ValueError(f"{file}: has {image.mode} pixels, more than 8 bits deep: convert it to 8 bits first")
        images.append(np.asarray(centre_crop(image.convert(modes[C]), H)).reshape(shape))
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
      raise ValueError(f"{file}: not a whole image ({error})") from error
  return to_float(np.stack(images), path)


def _read_npz(path: str, shape, count: int, in_pixels: bool, bounded: bool) -> tuple[np.ndarray, np.ndarray | None]:
  try:
    with np.load(path) as arrays:
      found = {name: arrays[name][:count] for name in ("image", "x", "arr_0", "label", "arr_1") if name in arrays}
  except (ValueError, OSError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
    raise ValueError(f"{path}: not a whole .npz ({error})") from error
  name = next((name for name in ("image", "x", "arr_0") if name in found), None)
  if name is None:
    raise ValueError(f"{path}: holds no array 'image', 'x' or 'arr_0' [N, {', '.join(map(str, shape))}]")
  if found[name].ndim != 4 or found[name].shape[1:] != shape or not len(found[name]):
    raise ValueError(
      f"{path}: {name} has shape {found[name].shape}, but the model works on [N, {', '.join(map(str, shape))}]"
    )
  labels = found.get("label", found.get("arr_1"))
  if labels is not None and (labels.shape != (len(found[name]),) or not np.issubdtype(labels.dtype, np.integer)):
    raise ValueError(f"{path}: labels are {labels.dtype}{list(labels.shape)}: give one integer for each image")
  images = to_float(found[name], f"{path}: {name}", in_pixels, bounded)
  return images, None if labels is None else labels.astype(np.int32)
