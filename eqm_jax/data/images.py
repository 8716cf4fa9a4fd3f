"""Image files to arrays: decoding, ADM's crop, and the images that a user passes to a task."""

import io
import os
import re

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from eqm_jax.data import arrays, listing

MODES = {1: "L", 3: "RGB"}  # channels → Pillow's mode
BACKGROUNDS = (None, "white", "black")
MAX_ENLARGEMENT = 8  # the largest factor by which an image may be enlarged
BITS_PER_SAMPLE = 258  # TIFF's tag
JPEG_2000 = b"\xff\x4f\xff\x51"  # how its codestream begins


class DamagedImage(ValueError):
  """An image that cannot be used; the message names its file."""


class LargeImage(ValueError):
  """An image with more pixels or text than is safe to decode: intact, and so not left out with the damaged ones."""


def decode(
  data: bytes, where: str, size: int, channels: int, *, upright: bool = False, background: str | None = None
) -> np.ndarray:
  """One image file, [size, size, channels] uint8: converted to grey or RGB, then `centre_crop`.

  Palettes are looked up, CMYK is converted, and of several frames the first is taken.

  Args:
    data: the file's bytes.
    where: its name, for errors.
    size: of the result, pixels.
    channels: 3, RGB, or 1, grey.
    upright: turns or mirrors the image as its EXIF orientation says; False takes the pixels as they are stored.
    background: "white" or "black" is put behind what is transparent; None drops transparency, and shows the colours
      that are stored there.

  Raises:
    DamagedImage: if it is incomplete, more than 8 bits deep, or far too small.
    LargeImage: if it has more pixels than Pillow decodes.
  """
  where, bits = listing.printable(where), _bits(data)
  try:
    with Image.open(io.BytesIO(data)) as image:
      _check(image, bits, where, size)
      image = _upright(image) if upright else image
      image = _opaque(image, background).convert(MODES[channels])
      return np.asarray(centre_crop(image, size)).reshape(size, size, channels)
  except (DamagedImage, MemoryError):
    raise
  except Exception as error:  # Pillow's decoders raise errors of any kind
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
      raise LargeImage(f"{where}: too large, but not damaged ({error}): make it smaller first") from error
    if "MAX_TEXT" in str(error):
      raise LargeImage(f"{where}: its texts are too large ({error}): remove them first") from error
    if bits > 8:  # Pillow cannot open all of these
      raise DamagedImage(_too_deep(where, f"{bits}-bit", bits)) from error
    reason = "of no known format" if isinstance(error, UnidentifiedImageError) else error
    raise DamagedImage(f"{where}: not a complete image ({reason})") from error


def read(
  path: str,
  shape: tuple[int, int, int],
  count: int,
  in_pixels: bool = True,
  bounded: bool = True,
  *,
  upright: bool = True,
  background: str | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
  """The first `count` images of a folder, in the order of their names, one image file, or an .npz.

  Image files are brought to the size as in ADM: halved while the short side is at least twice the size, resized,
  and cropped at the centre; and to grey or RGB. An .npz holds them as `image`, `x` or `arr_0`, [N, H, W, C], uint8 or
  float in [−1, 1] (up to ±1.5 passes, for samples that overshoot), and optionally labels as `label` or `arr_1`.

  Args:
    path: the folder or file; of a folder, the images in it and below it (`listing.list_images`).
    shape: (H, W, C) of the model's samples.
    count: how many images at most.
    in_pixels: False for a model of latents, which takes an .npz of finite floats only.
    bounded: False where images may be noisy: floats beyond the range pass.
    upright, background: as `decode` takes them.

  Returns:
    images [N, H, W, C] float32, and labels [N] int32 or None.

  Raises:
    ValueError: naming the file, if it is missing, damaged, or of another size, type or range.
  """
  is_folder = os.path.isdir(path)
  if not is_folder and not (os.path.isfile(path) and listing.is_image(path)):
    return arrays.read(path, shape, count, in_pixels, bounded)
  if not in_pixels:
    raise ValueError(f"{path}: the model works on latents of shape {shape}, not on images: give an .npz of latents")
  H, W, C = shape
  if C not in MODES or H != W:
    raise ValueError(f"{path}: image files are grey or RGB and square, but the model works on {shape}: give an .npz")
  files = [path]
  if is_folder:
    listed = listing.list_images(path)
    listed.log()
    files = listed.files[:count]
  images = []
  for name in files:
    with open(name, "rb") as file:
      images.append(decode(file.read(), name, H, C, upright=upright, background=background))
  return arrays.to_float(np.stack(images), path), None


def centre_crop(image: Image.Image, size: int) -> Image.Image:
  """The crop of ADM: halves with a box filter, resizes the short side bicubically, crops the centre."""
  while min(image.size) >= 2 * size:
    image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
  scale = size / min(image.size)
  image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
  left, top = (image.width - size) // 2, (image.height - size) // 2
  return image.crop((left, top, left + size, top + size))


def _check(image: Image.Image, bits: int, where: str, size: int):
  """Refuses an opened image that is too deep or too small; `bits` are those of its header."""
  if bits > 8 or image.mode.startswith(("I", "F")):
    raise DamagedImage(_too_deep(where, image.mode, bits))
  if min(image.size) * MAX_ENLARGEMENT < size:
    raise DamagedImage(
      f"{where}: is {image.width} × {image.height} pixels, too small for {size} × {size}: "
      f"it would be enlarged more than {MAX_ENLARGEMENT} times, give a larger one"
    )


def _too_deep(where: str, mode: str, bits: int) -> str:
  depth = f" ({bits} bits a channel)" if bits > 8 else ""
  return f"{where}: has {mode} pixels, more than 8 bits deep{depth}: convert it to 8 bits first"


def _bits(data: bytes) -> int:
  """Bits of a channel in a file's own header; 0 where it is not known.

  Pillow opens some files of 16 bits as 8-bit RGB, and keeps the upper half.
  """
  if data.startswith(b"\x89PNG\r\n\x1a\n"):
    return data[24] if len(data) > 24 else 0
  if data.startswith(b"\xff\xd8"):
    return _bits_of_jpeg(data)
  if data.startswith(tuple(TiffImagePlugin.PREFIXES)):
    return _bits_of_tiff(data)
  if re.match(rb"P[2356]\s", data):  # grey and colour: width, height, largest value
    numbers = re.sub(rb"#[^\r\n]*", b"", data[2:1024]).split()[:3]
    return int(numbers[2]).bit_length() if len(numbers) == 3 and numbers[2].isdigit() else 0
  if data[4:8] == b"jP  " or data.startswith(JPEG_2000):
    place = data.find(JPEG_2000)
    return (data[place + 42] & 127) + 1 if 0 <= place < len(data) - 42 else 0  # in the size segment
  if data[4:8] == b"ftyp":  # AVIF: number of channels, bits of each
    place = data[:4096].find(b"pixi")
    return max(data[place + 9 : place + 9 + data[place + 8]], default=0) if 0 <= place < len(data) - 8 else 0
  return 0


def _bits_of_jpeg(data: bytes) -> int:
  place = 2
  while place + 4 < len(data) and data[place] == 0xFF:
    marker = data[place + 1]
    if marker == 0xFF:  # fill
      place += 1
      continue
    if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of a frame
      return data[place + 4]
    place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
  return 0


def _bits_of_tiff(data: bytes) -> int:
  try:
    directory = TiffImagePlugin.ImageFileDirectory_v2(data[: 16 if data[2] == 43 else 8])
    file = io.BytesIO(data)
    file.seek(directory.next)
    directory.load(file)
    return max(directory.get(BITS_PER_SAMPLE, (1,)))
  except Exception:  # damaged, which Pillow says when it opens the image
    return 0


def _upright(image: Image.Image) -> Image.Image:
  image.load()  # a damaged image is no image with damaged EXIF
  try:
    return ImageOps.exif_transpose(image)
  except Exception:  # EXIF is written by many programs, some of it wrong: as stored
    return image


def _opaque(image: Image.Image, background: str | None) -> Image.Image:
  """An image without transparency, as `decode` has it."""
  if not image.has_transparency_data:
    return image
  image = image.convert("RGBA")
  if background is None:
    return image.convert("RGB")
  return Image.alpha_composite(Image.new("RGBA", image.size, background), image)
