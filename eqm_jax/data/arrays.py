"""Arrays in .npz and .npy files: images and labels as people save them, checked, and brought to [−1, 1].

What can be read in one way only is read, with a line in the log where it is unusual. What would have to be changed
(channels first, another range, classes from 1) is refused with the line of NumPy that changes it, or, where it is only
likely to be wrong, gets a warning.
"""

import contextlib
import hashlib
import logging
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import IO, NamedTuple

import numpy as np
from etils import epath

from eqm_jax import checks
from eqm_jax.data.samples import Images, checked_labels

IMAGE_NAMES = ("image", "x", "arr_0")
LATENT_NAMES = ("x", "image", "arr_0")  # samples of a model of latents are saved with the decoded images beside them
LABEL_NAMES = ("label", "arr_1")
LIKE_LABELS = re.compile(r"(labels?|targets?|class(es)?|cls|y)(_|\d|$)", re.IGNORECASE)  # other names of labels
CHANNELS = (1, 3, 4)  # of grey, RGB and RGBA
OVERSHOOT = 1.5  # samples leave [−1, 1] a little
# How files begin that are given for arrays by mistake, and what they are.
OTHER_FILES = {
  b"\x80": "a pickle, which can run code when it is read",
  b"\x1f\x8b": "compressed by gzip, decompress it first",
  b"\x89HDF": "HDF5",
  b"MATLAB": "a MATLAB file",
  b"\x89PNG": "an image",
  b"\xff\xd8": "an image",
}

log = logging.getLogger(__name__)


class Header(NamedTuple):
  """Shape and type of a stored array, known before it is read."""

  shape: tuple[int, ...]
  dtype: np.dtype

  def __str__(self) -> str:
    return f"{self.dtype}{list(self.shape)}"


def npz(path: str, num_classes: int | None = None) -> Images:
  """The images of an .npz or .npy, [N, H, W, C] uint8 or float in [−1, 1], as a data set.

  Args:
    path: of an .npz with `image`, `x` or `arr_0`, and labels [N] as `label` or `arr_1`; or of an .npy of images.
      Without labels all are of class 0.
    num_classes: None: the largest label is that of the last class.

  Raises:
    ValueError: naming the file, and the likely remedy.
  """
  if num_classes is not None:
    checks.at_least("data.options.num_classes", num_classes, 1, "or None, to take it from the labels")
  values, labels = npz_arrays(path)
  if labels is None:
    log.info("%s: no array of labels (%s), all images are of class 0", path, " or ".join(LABEL_NAMES))
    labels = np.zeros(len(values), np.int32)
  num_classes = num_classes or int(labels.max()) + 1
  source = Images(to_float(values, path), checked_labels(labels, num_classes, path), num_classes)
  source.content_hash = hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()
  _warn_of_values(values, path)
  _warn_of_empty_classes(path, source.labels, source.num_classes)
  return source


def read(
  path: str, shape: tuple[int, int, int], count: int, in_pixels: bool = True, bounded: bool = True
) -> tuple[np.ndarray, np.ndarray | None]:
  """The first `count` images of an .npz or .npy, [N, H, W, C] float32, and their labels [N] int32 or None.

  Args:
    path: the file.
    shape: (H, W, C) of the model's samples.
    count: how many images at most.
    in_pixels: False for latents, which may have any finite value.
    bounded: False where floats beyond the range pass.

  Raises:
    ValueError: naming the file, if it is missing, damaged, or of another shape, type or range.
  """
  if not epath.Path(path).exists():
    raise ValueError(f"{path}: no such folder of images and no such .npz or .npy: give the path of one")
  images, labels = npz_arrays(path, count, expected=shape, names=IMAGE_NAMES if in_pixels else LATENT_NAMES)
  converted = to_float(images, path, in_pixels=in_pixels, bounded=bounded)
  if in_pixels:
    _warn_of_values(images, path)
  return converted, labels


def recorded_autoencoder(path: str) -> dict[str, str] | None:
  """Name and SHA-256 of the autoencoder whose latents --mode=sample saved in a file; None where there is none."""
  if "autoencoder" not in read_headers(path):
    return None
  name, _, sha256 = str(load(path, ["autoencoder"])["autoencoder"]).rpartition(" ")
  return {"name": name, "sha256": sha256} if sha256 else None


def npz_arrays(
  path: str,
  count: int | None = None,
  *,
  expected: tuple[int, int, int] | None = None,
  names: Sequence[str] = IMAGE_NAMES,
) -> tuple[np.ndarray, np.ndarray | None]:
  """The first `count` images [N, H, W, C] of a file, unconverted, and their labels [N] int32 or None.

  Args:
    path: of an .npz or .npy.
    count: how many at most; None: all.
    expected: (H, W, C) of the images, where it is known.
    names: of the images in an .npz, the preferred one first; one array under another name is taken, too.

  Raises:
    ValueError: naming the file, if it is missing, damaged, or does not hold one array of images.
  """
  headers = read_headers(path)
  image = _image_name(path, headers, names)
  label = _label_name(path, headers, image)
  chosen = [image] if label is None else [image, label]
  _refuse_objects(path, {name: headers[name] for name in chosen})
  _check_shape(path, headers[image], expected)
  loaded = load(path, chosen)
  images = loaded[image][:count]
  if label is None:
    return images, None
  return images, as_labels(path, loaded[label], headers[image].shape[0])[:count]


def read_headers(path: str) -> dict[str, Header]:
  """Shapes and types of the arrays in an .npz, by name; of an .npy, whose array has the name "".

  Raises:
    ValueError: naming the file, if it is missing or damaged, or no such file.
  """
  headers = {}
  with _opened(path) as members:
    for name, open_member in members.items():
      with open_member() as file:
        version = np.lib.format.read_magic(file)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, _, dtype = read_header[version](file)
        headers[name] = Header(shape, dtype)
  if not headers:
    raise ValueError(f"{path}: holds no array: save some, np.savez(path, image=images, label=labels)")
  return headers


def load(path: str, names: Sequence[str]) -> dict[str, np.ndarray]:
  """Some arrays of an .npz or .npy; never unpickles.

  Raises:
    ValueError: naming the file, if it is damaged, or an array holds Python objects.
  """
  headers = read_headers(path)
  _refuse_objects(path, {name: headers[name] for name in names})
  loaded = {}
  with _opened(path) as members:
    for name in names:
      with members[name]() as file:
        loaded[name] = np.lib.format.read_array(file, allow_pickle=False)
  return loaded


def _refuse_objects(path: str, headers: dict[str, Header]):
  for name, header in headers.items():
    if header.dtype.hasobject:
      raise ValueError(
        f"{path}: {f'array {name!r}' if name else 'the array'} holds Python objects, which could run code when they "
        "are read: save numbers, np.asarray(values, dtype), all rows of one length"
      )


class _OtherFile(ValueError):
  """A file that holds no arrays, whole or not."""


@contextlib.contextmanager
def _opened(path: str) -> Iterator[dict[str, Callable[[], contextlib.AbstractContextManager[IO[bytes]]]]]:
  """The arrays of a file by name, as functions that open them; an error of reading names the file."""
  try:
    with epath.Path(path).open("rb") as file:
      begin = file.read(6)
      file.seek(0)
      if begin == np.lib.format.MAGIC_PREFIX:
        yield {"": lambda: contextlib.nullcontext(file)}
      elif begin.startswith(b"PK"):
        with zipfile.ZipFile(file) as archive:
          yield {name[:-4]: lambda n=name: archive.open(n) for name in archive.namelist() if name.endswith(".npy")}
      else:
        kind = next((kind for start, kind in OTHER_FILES.items() if begin.startswith(start)), f"begins with {begin}")
        raise _OtherFile(
          f"{path}: neither .npz nor .npy ({kind if begin else 'empty'}): save arrays by "
          "np.savez(path, image=images, label=labels)"
        )
  except FileNotFoundError as error:
    there = [path + suffix for suffix in (".npz", ".npy") if os.path.exists(path + suffix)]  # which NumPy appends
    raise ValueError(
      f"{path}: no such .npz or .npy: give the path of one{''.join(f', {name}' for name in there)}"
    ) from error
  except IsADirectoryError as error:
    raise ValueError(f"{path}: a directory, not an .npz or .npy: give the path of a file in it") from error
  except _OtherFile:
    raise
  except Exception as error:  # damage makes zipfile, its decompressors and NumPy raise errors of any kind
    raise ValueError(f"{path}: not a complete .npz or .npy ({error}): copy it again, or save it again") from error


def _image_name(path: str, headers: dict[str, Header], names: Sequence[str]) -> str:
  """The name of the array of images."""
  if "" in headers:
    return ""
  candidates = {name: header for name, header in headers.items() if len(header.shape) in (3, 4)}
  known = next((name for name in names if name in (candidates or headers)), None)
  unnamed = [name for name in candidates if re.fullmatch(r"arr_\d+", name)]
  if known is not None and (known != "arr_0" or len(unnamed) < 2):
    return known
  if len(candidates) == 1:
    log.info("%s: no %s, the images are those of %r", path, _words(names), *candidates)
    return next(iter(candidates))
  problem = "holds several arrays of images" if candidates else f"holds no array {_words(names)} [N, H, W, C]"
  raise ValueError(
    f"{path}: {problem}, but {_listed(candidates or headers)}: save one as 'image', "
    "np.savez(path, image=images, label=labels)"
  )


def _label_name(path: str, headers: dict[str, Header], image: str) -> str | None:
  """The name of the labels of the array `image`; None without labels."""
  known = next((name for name in LABEL_NAMES if name in headers and name != image), None)
  if known is not None or image == "":
    return known
  count = headers[image].shape[:1]
  likely = {
    name: header
    for name, header in headers.items()
    if name != image and LIKE_LABELS.match(name) and header.shape[:1] == count
  }
  if len(likely) > 1:
    raise ValueError(f"{path}: several arrays may be the labels, {_listed(likely)}: save one as 'label'")
  for name in likely:
    log.info("%s: no %s, the labels are those of %r", path, _words(LABEL_NAMES), name)
  return next(iter(likely), None)


def _words(names: Sequence[str]) -> str:
  return ", ".join(map(repr, names[:-1])) + f" or {names[-1]!r}"


def _listed(headers: dict[str, Header]) -> str:
  return ", ".join(f"{name!r} {header}" for name, header in list(headers.items())[:12])


def _check_shape(path: str, header: Header, expected: tuple[int, int, int] | None):
  shape = header.shape
  if not shape or not shape[0]:
    raise ValueError(f"{path}: images have shape {shape}, but must be [N, H, W, C], N at least 1: give some")
  remedy = _layout_remedy(shape, expected) or (expected and _size_remedy(shape[1:], expected))
  if not remedy:
    if expected is None and shape[3] == 4 and header.dtype == np.uint8:
      log.warning("%s: images have 4 channels: if these are RGBA, images[..., :3] leaves transparency out", path)
    return
  wanted = "must be [N, H, W, C]" if expected is None else f"the model works on [N, {', '.join(map(str, expected))}]"
  raise ValueError(f"{path}: images have shape {shape}, but {wanted}: {remedy}")


def _layout_remedy(shape: tuple[int, ...], expected: tuple[int, int, int] | None) -> str | None:
  """The line that brings images to [N, H, W, C]; None where they seem to be in this order."""
  if len(shape) == 2:
    single = expected is not None and shape == expected[:2]
    return f"for {'a single image give images[None, ..., None]' if single else 'rows give images.reshape(N, H, W, C)'}"
  if len(shape) == 3:
    single = shape == expected if expected is not None else shape[2] in CHANNELS
    return f"for {'a single image give images[None]' if single else 'grey images give images[..., None]'}"
  if len(shape) != 4:
    return "give an array of four dimensions"
  _, a, b, c = shape
  if shape[1:] == expected or a == b:  # images are squares
    return None
  if b == c or (a in CHANNELS and c not in CHANNELS):
    return "channels come first, give images.transpose(0, 2, 3, 1)"
  if shape[0] == a and b in CHANNELS and c not in CHANNELS:
    return "the images are counted last, give images.transpose(3, 0, 1, 2)"
  return None


def _size_remedy(shape: tuple[int, ...], expected: tuple[int, ...]) -> str | None:
  """What brings images (H, W, C) to the expected size and channels."""
  if shape == expected:
    return None
  channels = shape[2], expected[2]
  if shape[:2] != expected[:2]:
    return "resize them, or give a folder of image files, which are cropped to this size"
  if channels == (4, 3):
    return "for RGBA give images[..., :3]"
  if channels == (1, 3):
    return "for grey images give images.repeat(3, axis=-1)"
  if channels == (3, 1):
    return "for RGB give images.mean(axis=-1, keepdims=True).astype(images.dtype)"
  return "give images with as many channels"


def to_float(images: np.ndarray, where: str, *, in_pixels: bool = True, bounded: bool = True) -> np.ndarray:
  """Pixels, uint8 or float in [−1, 1], as float32 in [−1, 1]; latents, finite floats, as float32.

  Raises:
    ValueError: naming `where`, for other types or values; `bounded` False allows floats beyond the range.
  """
  if in_pixels and images.dtype == np.uint8:
    return images.astype(np.float32) / 127.5 - 1
  if not np.issubdtype(images.dtype, np.floating):
    expected = "uint8 in 0..255 or float in [-1, 1]" if in_pixels else "floating-point latents"
    raise ValueError(f"{where}: images are {images.dtype}: give {expected}{_type_remedy(images, in_pixels)}")
  if not np.all(np.isfinite(images)):
    raise ValueError(f"{where}: {np.sum(~np.isfinite(images))} of {images.size} values are not finite: remove them")
  low, high = float(images.min()), float(images.max())
  if in_pixels and bounded and not -OVERSHOOT <= low <= high <= OVERSHOOT:
    raise ValueError(
      f"{where}: float images span {low:g}..{high:g}, but must lie in [-1, 1]; or give uint8 in 0..255"
      f"{_range_remedy(images, low, high)}"
    )
  return images.astype(np.float32)


def _type_remedy(images: np.ndarray, in_pixels: bool) -> str:
  """What images of a wrong type need; "" where that is not known."""
  if images.dtype.kind == "V":
    return ", .astype(np.float32) before saving: an .npy has no bfloat16, nor records"
  if not in_pixels:
    return ", as an autoencoder encodes them" if images.dtype == np.uint8 else ""
  if images.dtype == bool:
    return ", images * np.uint8(255)"
  if images.dtype.kind not in "iu":
    return ""
  low, high = int(images.min()), int(images.max())
  if low < 0:
    return f"; these span {low}..{high}"
  if high <= 255:
    return ", images.astype(np.uint8)"
  return f", (images / 257).astype(np.uint8) for 16 bits; these span {low}..{high}"


def _range_remedy(images: np.ndarray, low: float, high: float) -> str:
  """What floats beyond [−1, 1] need; "" where that is not known."""
  if low >= 0 and 10 < high <= 65536:
    return f": for pixels in [0, {255 if high <= 256 else 65535}] give images / {127.5 if high <= 256 else 32767.5} - 1"
  if images.shape[-1] not in (1, 3):
    return ": latents are read from the cache of --mode=prepare, data.source = 'latents'"
  if -10 < low < 0 and high < 10:
    return ": for standardised pixels give (images * std + mean) * 2 - 1"
  return ""


def _warn_of_values(images: np.ndarray, where: str):
  """Warns of values that may, but need not, be meant in another range."""
  low, high = float(images.min()), float(images.max())
  if images.dtype == np.uint8:
    if 0 < high <= 1:
      log.warning("%s: all pixels are 0 or 1 of 255, black: if 1 is meant to be white, give images * 255", where)
  elif high > 20:  # of noisy images; others are refused
    text = "%s: values span %g..%g: if these are pixels in [0, 255] with noise, give images / 127.5 - 1"
    log.warning(text, where, low, high)
  elif -0.1 <= low < high <= OVERSHOOT:  # interpolation leaves [0, 1] a little, too
    text = "%s: values span %g..%g, where -1 is black: if these are pixels in [0, 1], give images * 2 - 1"
    log.warning(text, where, low, high)
  elif -0.5 <= low < 0 < high <= 0.5:
    text = "%s: values span %g..%g, where -1 is black and 1 white: if they are meant in [-0.5, 0.5], give images * 2"
    log.warning(text, where, low, high)


def as_labels(path: str, labels: np.ndarray, count: int) -> np.ndarray:
  """Labels of `count` images, [N] or [N, 1] whole numbers from 0, as int32 [N].

  Raises:
    ValueError: naming the file, and the likely remedy.
  """
  if labels.shape == (count, 1):
    labels = labels[:, 0]
  stored = f"{path}: labels are {Header(labels.shape, labels.dtype)}"
  if labels.shape != (count,):
    raise ValueError(f"{stored}: give one integer for each image, of which there are {count}{_one_each(labels, count)}")
  if labels.dtype.kind in "USO":
    names = ", ".join(map(repr, np.unique(labels)[:3].tolist()))
    raise ValueError(f"{stored} ({names}): number the classes, np.unique(label, return_inverse=True)[1]")
  if labels.dtype.kind == "f" and np.all(np.isfinite(labels)) and np.all(labels == np.rint(labels)):
    log.info("%s, all whole numbers: taken as integers", stored)
  elif labels.dtype.kind not in "iub":
    wrong = labels[labels != np.rint(labels)][:3].tolist() if labels.dtype.kind == "f" else []
    raise ValueError(f"{stored}: give one integer for each image{f', not {wrong}' if wrong else ''}")
  low, high = labels.min(), labels.max()
  if low < 0:
    raise ValueError(f"{stored} and span {low:g}..{high:g}: number the classes from 0; leave unlabelled images out")
  if float(high) >= 2**31:
    raise ValueError(f"{stored} up to {high:g}: number the classes, np.unique(label, return_inverse=True)[1]")
  return labels.astype(np.int32)


def _one_each(labels: np.ndarray, count: int) -> str:
  """What makes one label for each image of an array of another shape; "" where that is not known."""
  if labels.ndim == 2 and len(labels) == count and labels.shape[1] > 1:
    one_hot = labels.dtype.kind in "iufb" and np.all((labels == 0) | (labels == 1)) and np.all(labels.sum(axis=1) == 1)
    return f": {'these are' if one_hot else 'if they are'} one-hot, give label.argmax(axis=1)"
  return ": give label.reshape(-1)" if labels.size == count else ""


def _warn_of_empty_classes(path: str, labels: np.ndarray, num_classes: int):
  known = np.unique(labels)
  if len(known) == num_classes:
    return
  if known[0] == 1:
    log.warning("%s: labels span 1..%d, class 0 has no image: if they count from 1, subtract 1", path, known[-1])
    return
  empty = np.setdiff1d(np.arange(min(num_classes, len(known) + 5)), known)[:5]
  text = "%s: %d of %d classes have no image (%s%s): if that is not meant, number only those that have, "
  text += "np.unique(label, return_inverse=True)[1]"
  count = num_classes - len(known)
  log.warning(text, path, count, num_classes, ", ".join(map(str, empty)), ", …" if count > len(empty) else "")
