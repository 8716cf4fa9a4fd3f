"""Image files below a directory: which of its files they are, in which order, and what is left out.

The order is that of torchvision's ImageFolder: by class, by directory, by name. Names are compared, and hashed, in
Unicode's form NFC, so that a copy by way of another file system is the same data set. Symbolic links are followed; a
file that they lead to twice counts once: where it lies itself, else by the first link to it.
"""

import collections
import dataclasses
import errno
import functools
import hashlib
import logging
import os
import re
import stat
import unicodedata
from collections.abc import Iterable, Iterator

from etils import epath

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's
SYSTEM_NAMES = {  # in lower case; those that begin with a dot are hidden anyway
  *("__macosx", "icon\r", "network trash folder", "temporary items"),  # macOS
  *("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini"),  # Windows
  *("$recycle.bin", "recycler", "system volume information"),
  *("@eadir", "@recycle", "@recently-snapshot", "#recycle", "#snapshot"),  # network storage
  *("lost+found", "__pycache__"),
}
# Kinds of what is left out. Those of the second line may be missed.
HIDDEN, SYSTEM, OTHER = "hidden", "of the operating system", "of other kinds"
TWICE, DANGLING, LOOP, OUTSIDE = "links to listed images", "dangling links", "link loops", "images in no class"
SUSPICIOUS = {TWICE, DANGLING, LOOP, OUTSIDE}
NAMED = 3  # of each kind, in the log
CLASSES_NAMED = 10

FILE, DIRECTORY, LINK = "file", "directory", "link"

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Listing:
  """Image files by class, and what is not among them."""

  root: str
  classes: dict[str, list[str]]  # name as text → paths
  left_out: dict[str, list[str]]  # kind → paths below the root

  @property
  def files(self) -> list[str]:
    """All paths, in the order of the classes."""
    return [file for files in self.classes.values() for file in files]

  @property
  def content_hash(self) -> str:
    """SHA-256 of the paths below the root."""
    start = len(os.path.join(self.root, ""))
    names = "\n".join(_nfc(file[start:]) for file in self.files)
    return hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest()

  def describe_left_out(self) -> str:
    """Number and first names of each kind that is left out, as the end of a line."""
    kinds = [
      f"{kind} {len(self.left_out[kind])} ({_first(map(printable, sorted(self.left_out[kind])), NAMED)})"
      for kind in (HIDDEN, SYSTEM, OTHER, TWICE, DANGLING, LOOP, OUTSIDE)
      if kind in self.left_out
    ]
    return f"; left out {sum(map(len, self.left_out.values()))}: {', '.join(kinds)}" if kinds else ""

  def log(self):
    """Logs in one line what is listed and what is left out; as a warning where that may be missed."""
    text = f"{printable(self.root)}: {_counted(len(self.files), 'image')}"
    if "" not in self.classes:
      text += f" in {_counted(len(self.classes), 'class', 'classes')} ({_first(self.classes, CLASSES_NAMED)})"
    text += _note_on_numbers(list(self.classes)) + self.describe_left_out()
    _log_once(logging.WARNING if self.left_out.keys() & SUSPICIOUS else logging.INFO, text)


def list_classes(root: str) -> Listing:
  """The images below each directory of `root`, a class; where it has images and no directory, all are one class.

  Raises:
    ValueError: naming the directory, if there is no image in it or in a class, or two classes have the same name.
    OSError: if a directory cannot be read.
  """
  root = os.fspath(epath.Path(root))
  scan, directories = _Scan(root), {}
  for path, real in scan.class_directories():
    name = printable(_nfc(os.path.basename(path)))
    if name in directories:
      raise ValueError(
        f"{ascii(directories[name][0])} and {ascii(path)}: two classes whose names look the same, in two Unicode "
        "forms: move the images of both into one directory"
      )
    directories[name] = path, real
  if not directories:
    scan = _Scan(root)
    directories = {printable(_nfc(os.path.basename(scan.real_root))): (root, scan.real_root)}
  listing = scan.listing(directories)
  empty = [directories[name][0] for name, files in listing.classes.items() if not files]
  if empty == [root]:
    raise ValueError(
      f"{printable(root)}: holds no directory and no image ({', '.join(EXTENSIONS)}): put the images of each class "
      f"into one, or all into this one{listing.describe_left_out()}"
    )
  if empty:
    raise ValueError(
      f"{printable(empty[0])}: a class without images ({', '.join(EXTENSIONS)}), one of {len(empty)} in "
      f"{printable(root)}: remove them{listing.describe_left_out()}"
    )
  return listing


def list_images(root: str) -> Listing:
  """All images below a directory.

  Raises:
    ValueError: naming the directory, if there is none.
    OSError: if a directory cannot be read.
  """
  scan = _Scan(root)
  listing = scan.listing({"": (root, scan.real_root)})
  if not listing.files:
    raise ValueError(
      f"{printable(root)}: the folder holds no image ({', '.join(EXTENSIONS)}): give another one"
      f"{listing.describe_left_out()}"
    )
  return listing


def printable(name: str) -> str:
  """A file's name as text: what is no character in it, or moves the cursor, is escaped."""
  return re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", lambda match: ascii(match[0])[1:-1], name)


class _Scan:
  """A walk over directories that takes each file once."""

  def __init__(self, root: str):
    self.root = root
    self._is_local = "://" not in root
    self.real_root = os.path.realpath(root) if self._is_local else root
    self._left_out = collections.defaultdict(list)
    self._visited: set[str] = set()  # real directories
    self._taken = collections.defaultdict(set)  # real directory → names of its files that are listed
    self._real_path = functools.cache(functools.partial(os.path.realpath, strict=True))
    self._links: list[tuple[str, str, list[str]]] = []  # path, real directory that it lies in, images of its class

  def class_directories(self) -> list[tuple[str, str]]:
    """(path, real path) of the directories in the root, sorted; what lies beside them is left out."""
    found, links = {}, []
    for name, path, kind in self._entries(self.root):
      if kind == DIRECTORY:
        found[os.path.join(self.real_root, name)] = path
      elif kind == LINK:
        links.append(path)
      else:
        self._leave_out(OUTSIDE if kind == FILE and is_image(name) else OTHER, path)
    for path in sorted(links, key=_order):
      target = self._target(path)
      if target is None:
        continue
      if not os.path.isdir(target):
        self._leave_out(OUTSIDE if is_image(path) else OTHER, path)
      elif _is_within(self.real_root, target):
        self._leave_out(LOOP, path)
      elif target in found:
        self._leave_out(TWICE, path)
      else:
        found[target] = path
    return sorted(((path, real) for real, path in found.items()), key=lambda pair: _order(pair[0]))

  def listing(self, directories: dict[str, tuple[str, str]]) -> Listing:
    """The images below the (path, real path) of each class: first those that no link leads to."""
    classes: dict[str, list[str]] = {name: [] for name in directories}
    for name in sorted(directories, key=lambda name: os.path.islink(directories[name][0])):
      self._walk(*directories[name], classes[name])
    while self._links:
      links, self._links = sorted(self._links, key=lambda link: _order(link[0])), []
      for path, real, files in links:
        self._follow(path, real, files)
    for files in classes.values():
      files.sort(key=_order)
    return Listing(self.root, classes, dict(self._left_out))

  def _walk(self, directory: str, real: str, files: list[str]):
    """Adds the images below a directory that are reached without links, and notes the links."""
    stack = [(directory, real)]
    while stack:
      directory, real = stack.pop()
      if real in self._visited:
        self._leave_out(TWICE, os.path.join(directory, ""))
        continue
      self._visited.add(real)
      for name, path, kind in self._entries(directory):
        if kind == LINK:
          self._links.append((path, real, files))
        elif kind == DIRECTORY:
          stack.append((path, os.path.join(real, name)))
        elif kind == FILE and is_image(name):
          self._take(path, real, name, files)
        else:
          self._leave_out(OTHER, path)

  def _follow(self, link: str, real: str, files: list[str]):
    """Adds what a link in the directory `real` leads to."""
    target = self._target(link)
    if target is None:
      return
    if os.path.isdir(target):
      if _is_within(real, target) or _is_within(self.real_root, target):
        self._leave_out(LOOP, link)
      else:
        self._walk(link, target, files)
    elif is_image(link) and os.path.isfile(target):
      self._take(link, *os.path.split(target), files)
    else:
      self._leave_out(OTHER, link)

  def _take(self, path: str, real: str, name: str, files: list[str]):
    """Adds the image `name` of the directory `real`, once."""
    if name in self._taken[real]:
      self._leave_out(TWICE, path)
    else:
      self._taken[real].add(name)
      files.append(path)

  def _target(self, link: str) -> str | None:
    """Where a link leads to in the end; None where nothing is, which is noted."""
    try:
      directory, name = os.path.split(os.path.join(os.path.dirname(link), os.readlink(link)))
      target = os.path.join(self._real_path(directory), name)  # many links lead into a few directories
      if name in ("", ".", "..") or stat.S_ISLNK(os.lstat(target).st_mode):
        target = os.path.realpath(link, strict=True)
      return target
    except OSError as error:
      self._leave_out(LOOP if error.errno == errno.ELOOP else DANGLING, link)
      return None

  def _entries(self, directory: str) -> Iterator[tuple[str, str, str]]:
    """(name, path, kind) of what lies in a directory, without litter."""
    for name, path, kind in self._scan(directory):
      if name.startswith(".") or name.lower() in SYSTEM_NAMES:
        path = os.path.join(path, "") if kind == DIRECTORY else path
        self._leave_out(HIDDEN if name.startswith(".") else SYSTEM, path)
      else:
        yield name, path, kind

  def _scan(self, directory: str) -> Iterator[tuple[str, str, str]]:
    if not self._is_local:
      for entry in epath.Path(directory).iterdir():
        # A request to the bucket, which each of a million images need not cost.
        is_directory = not is_image(entry.name) and entry.is_dir()
        yield entry.name, os.fspath(entry), DIRECTORY if is_directory else FILE
      return
    with os.scandir(directory) as entries:
      for entry in entries:
        yield entry.name, entry.path, _kind(entry)

  def _leave_out(self, kind: str, path: str):
    self._left_out[kind].append(path[len(os.path.join(self.root, "")) :])


def _kind(entry: os.DirEntry) -> str:
  if entry.is_symlink():
    return LINK
  if entry.is_dir():
    return DIRECTORY
  return FILE if entry.is_file() else "other"


def _is_within(directory: str, other: str) -> bool:
  """Whether a directory is another one, or lies below it; both are real paths."""
  return directory == other or directory.startswith(os.path.join(other, ""))


def is_image(name: str) -> bool:
  """Whether a file's name is that of an image."""
  return os.path.splitext(name)[1].lower() in EXTENSIONS


def _nfc(name: str) -> str:
  """A name in Unicode form NFC, read as UTF-8 whatever the locale is; bytes that are none stay surrogates."""
  if name.isascii():
    return name
  return unicodedata.normalize("NFC", os.fsencode(name).decode("utf-8", "surrogateescape"))


def _order(path: str) -> tuple[str, str, str]:
  """Key of the order of sorted(os.walk(directory)), whichever Unicode form names have."""
  directory, name = os.path.split(path)
  return _nfc(directory), _nfc(name), path


def _first(names: Iterable[str], count: int) -> str:
  names = list(names)
  return ", ".join(names[:count]) + (", …" if len(names) > count else "")


def _counted(count: int, one: str, many: str = "") -> str:
  return f"{count} {one if count == 1 else many or one + 's'}"


def _note_on_numbers(names: list[str]) -> str:
  """A remark where names are numbers in another order than that of the numbers."""
  if not all(name.isdecimal() for name in names):
    return ""
  numbers = [int(name) for name in names]
  places = [i for i, (number, place) in enumerate(zip(numbers, sorted(numbers))) if number != place]
  return f", which text sorts unlike numbers: label {places[0]} is {names[places[0]]}" if places else ""


@functools.cache
def _log_once(level: int, text: str):
  """Logs a line that is not repeated where a mode lists a directory several times."""
  log.log(level, "%s", text)
