"""Image files to arrays: decoding, ADM's crop, and the images that a user passes to a task."""

import io
import os
import zipfile
import zlib

import numpy as np
from etils import epath
from PIL import Image

MODES = {1: "L", 3: "RGB"}  # channels → Pillow's mode
IMAGE_NAMES, LABEL_NAMES = ("image", "x", "arr_0"), ("label", "arr_1")  # in an .npz
MAX_ENLARGEMENT = 8  # the largest factor by which an image may be enlarged


class DamagedImage(ValueError):
  """An image that cannot be used; the message names its file."""


def decode(data: bytes, where: str, size: int, channels: int) -> np.ndarray:
  """One image file, [size, size, channels] uint8: converted to grey or RGB, then `centre_crop`.

  Palettes are looked up, CMYK is converted, and an alpha channel is dropped.

  Args:
    data: the file's bytes.
    where: its name, for errors.

  Raises:
    DamagedImage: if it is incomplete, more than 8 bits deep, or far too small.
  """
  try:
    with Image.open(io.BytesIO(data)) as image:
      if image.mode.startswith(("I", "F")):
        raise DamagedImage(f"{where}: has {image.mode} pixels, more than 8 bits deep: convert it to 8 bits first")
      if min(image.size) * MAX_ENLARGEMENT < size:
        raise DamagedImage(
          f"{where}: is {image.width} × {image.height} pixels, too small for {size} × {size}: "
          f"it would be enlarged more than {MAX_ENLARGEMENT} times, give a larger one"
        )
      return np.asarray(centre_crop(image.convert(MODES[channels]), size)).reshape(size, size, channels)
  except (DamagedImage, MemoryError):
    raise
  except Exception as error:  # Pillow's decoders raise errors of any kind
    raise DamagedImage(f"{where}: not a complete image ({error})") from error


def read(
  path: str, shape: tuple[int, int, int], count: int, in_pixels: bool = True, bounded: bool = True
) -> tuple[np.ndarray, np.ndarray | None]:
  """The first `count` images of a folder, in the order of their names, or of an .npz.

  Files of a folder are brought to the size as in ADM: halved while the short side is at least twice the size, resized,
  and cropped at the centre; and to grey or RGB. An .npz holds them as `image`, `x` or `arr_0`, [N, H, W, C], uint8 or
  float in [−1, 1] (up to ±1.5 passes, for samples that overshoot), and optionally labels as `label` or `arr_1`.

  Args:
    path: the folder or .npz.
    shape: (H, W, C) of the model's samples.
    count: how many images at most.
    in_pixels: False for a model of latents, which takes an .npz of finite floats only.
    bounded: False where images may be noisy: floats beyond the range pass.

  Returns:
    images [N, H, W, C] float32, and labels [N] int32 or None.

  Raises:
    ValueError: naming the file, if it is missing, damaged, or of another size, type or range.
  """
  if os.path.isdir(path):
    if not in_pixels:
      raise ValueError(f"{path}: the model works on latents of shape {shape}, not on images: give an .npz of latents")
    return _read_folder(path, shape, count), None
  if not os.path.isfile(path):
    raise ValueError(f"{path}: no such folder of images and no such .npz: give the path of one")
  images, labels = npz_arrays(path, count)
  if images.shape[1:] != shape:
    raise ValueError(
      f"{path}: images have shape {images.shape}, but the model works on [N, {', '.join(map(str, shape))}]"
    )
  return to_float(images, path, in_pixels=in_pixels, bounded=bounded), labels


def to_float(images: np.ndarray, where: str, *, in_pixels: bool = True, bounded: bool = True) -> np.ndarray:
  """Pixels, uint8 or float in [−1, 1], as float32 in [−1, 1]; latents, finite floats, as float32.

  Raises:
    ValueError: naming `where`, for other types or values; `bounded` False allows floats beyond the range.
  """
  if in_pixels and images.dtype == np.uint8:
    return images.astype(np.float32) / 127.5 - 1
  if not np.issubdtype(images.dtype, np.floating):
    expected = "uint8 in 0..255 or float in [-1, 1]" if in_pixels else "floating-point latents"
    raise ValueError(f"{where}: images are {images.dtype}: give {expected}")
  if not np.all(np.isfinite(images)):
    raise ValueError(f"{where}: {np.sum(~np.isfinite(images))} of {images.size} values are not finite: remove them")
  low, high = images.min(), images.max()
  if in_pixels and bounded and (low < -1.5 or high > 1.5):
    raise ValueError(f"{where}: float images span {low:g}..{high:g}, but must lie in [-1, 1]; or give uint8 in 0..255")
  return images.astype(np.float32)


def centre_crop(image: Image.Image, size: int) -> Image.Image:
  """The crop of ADM: halves with a box filter, resizes the short side bicubically, crops the centre."""
  while min(image.size) >= 2 * size:
    image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
  scale = size / min(image.size)
  image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
  left, top = (image.width - size) // 2, (image.height - size) // 2
  return image.crop((left, top, left + size, top + size))


def _read_folder(path: str, shape, count: int) -> np.ndarray:
  H, W, C = shape
  if C not in MODES or H != W:
    raise ValueError(f"{path}: a folder holds grey or RGB images, but the model works on {shape}: give an .npz")
  names = sorted(name for name in os.listdir(path) if os.path.isfile(os.path.join(path, name)) and name[0] != ".")
  if not names:
    raise ValueError(f"{path}: the folder holds no image: give another one")
  images = []
  for name in names[:count]:
    with open(os.path.join(path, name), "rb") as file:
      images.append(decode(file.read(), file.name, H, C))
  return to_float(np.stack(images), path)


def npz_arrays(path: str, count: int | None = None) -> tuple[np.ndarray, np.ndarray | None]:
  """The first `count` images [N, H, W, C] of an .npz, unconverted, and their labels [N] int32 or None.

  Raises:
    ValueError: naming the file, if it is missing, damaged, or holds none.
  """
  try:
    with epath.Path(path).open("rb") as file, np.load(file) as arrays:
      loaded = {name: arrays[name][:count] for name in (*IMAGE_NAMES, *LABEL_NAMES) if name in arrays}
  except FileNotFoundError as error:
    raise ValueError(f"{path}: no such .npz: give the path of one") from error
  except (ValueError, OSError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
    raise ValueError(f"{path}: not a complete .npz ({error})") from error
  images = next((loaded[name] for name in IMAGE_NAMES if name in loaded), None)
  if images is None:
    raise ValueError(f"{path}: holds no array 'image', 'x' or 'arr_0' [N, H, W, C]")
  if images.ndim != 4 or not len(images):
    raise ValueError(f"{path}: images have shape {images.shape}, but must be [N, H, W, C], N at least 1")
  labels = next((loaded[name] for name in LABEL_NAMES if name in loaded), None)
  if labels is None:
    return images, None
  if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
    raise ValueError(f"{path}: labels are {labels.dtype}{list(labels.shape)}: give one integer for each image")
  return images, labels.astype(np.int32)
