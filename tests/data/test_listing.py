"""Image folders as people bring them: litter, links, and names of any encoding."""

import hashlib
import logging
import os
import pathlib
import unicodedata

import pytest
from conftest import encoded, picture

from eqm_jax.data import listing, sources

PNG = encoded(picture())


def write(root: pathlib.Path, *names: str, data: bytes = PNG) -> pathlib.Path:
  """Files below a directory; names may be bytes that are no UTF-8, as surrogates."""
  for name in names:
    path = os.path.join(root, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
      file.write(data)
  return root


def below(root, listed: listing.Listing) -> list[str]:
  return [os.path.relpath(file, root) for file in listed.files]


def folder(root, **options):
  return sources.open_source("folder", {"path": str(root), "size": 8, **options})


@pytest.fixture
def lines(caplog):
  """The log's lines of the listing."""
  caplog.set_level(logging.INFO, "eqm_jax")
  return lambda: [record.getMessage() for record in caplog.records if record.name == listing.__name__]


LITTER = {
  "hidden": (".DS_Store", "cat/._a.png", "cat/.ipynb_checkpoints/a-checkpoint.png", ".git/logo.png", ".idea"),
  "of the operating system": ("__MACOSX/cat/a.png", "cat/Thumbs.db", "cat/desktop.ini", "dog/@eaDir/b.png/thumb.jpg")
  + ("lost+found/x.png", "$RECYCLE.BIN/x.png"),
  "of other kinds": ("readme.txt", "cat/a.txt", "dog/b.png.part", "dog/c.gif", "dog/noextension"),
}


def test_litter_is_left_out_and_named_in_one_line(tmp_path, lines):
  write(tmp_path, "cat/a.png", "cat/old/B.JPG", "dog/b.png")
  clean = folder(tmp_path).content_hash
  write(tmp_path, *(name for names in LITTER.values() for name in names))
  os.mkfifo(tmp_path / "dog" / "pipe.png")
  source = folder(tmp_path)
  assert below(tmp_path, source) == ["cat/a.png", "cat/old/B.JPG", "dog/b.png"] and source.labels.tolist() == [0, 0, 1]
  assert source.content_hash == clean and source.class_names == ("cat", "dog")
  first, line = lines()
  assert first == f"{tmp_path}: 3 images in 2 classes (cat, dog)"
  assert line.startswith(f"{first}; left out 17: hidden 5 (.DS_Store, .git/, .idea, …), of the operating system 6 (")
  assert "of other kinds 6 (cat/a.txt, dog/b.png.part, dog/c.gif, …)" in line


def test_the_content_hash_of_a_clean_folder_is_that_of_its_names(tmp_path):
  """Caches that were begun with earlier versions continue."""
  write(tmp_path, "a/1.png", "a/b/2.png", "ü/3.png")
  expected = hashlib.sha256("a/1.png\na/b/2.png\nü/3.png".encode()).hexdigest()
  assert folder(tmp_path).content_hash == folder(f"{tmp_path}/").content_hash == expected


def test_links_count_once_and_where_the_file_lies_itself(tmp_path, lines):
  root, store = tmp_path / "root", tmp_path / "store"
  write(store, "x/1.png", "x/2.png")
  write(root, "b/own.png")
  (root / "a").mkdir()
  (root / "a" / "copy.png").symlink_to("../b/own.png")  # listed before its target
  (root / "a" / "far.png").symlink_to(store / "x" / "1.png")
  (root / "a" / "far_again.png").symlink_to(store / "x" / ".." / "x" / "1.png")
  (root / "a" / "twice.png").symlink_to("far.png")
  (root / "b" / "more").symlink_to(store)
  (root / "c").symlink_to(write(tmp_path / "classes", "3.png"))
  (root / "c_again").symlink_to(tmp_path / "classes")
  (root / "d").symlink_to("b")
  os.link(root / "b" / "own.png", root / "b" / "hard.png")  # a file of its own
  source = folder(root)
  assert source.class_names == ("a", "b", "c")
  assert below(root, source) == ["a/far.png", "b/hard.png", "b/own.png", "b/more/x/2.png", "c/3.png"]
  (line,) = lines()
  assert "left out 6: links to listed images 6 (a/copy.png, a/far_again.png, a/twice.png, …)" in line


def test_loops_and_dangling_links_are_told_when_listing(tmp_path, lines):
  root = tmp_path / "root"
  write(root, "a/1.png", "b/2.png")
  for name, target in {
    "a/gone.png": "nowhere.png",
    "a/gone": "/nowhere/at/all",
    "a/through.png": "1.png/x.png",
    "a/self.png": "self.png",
    "a/here": ".",
    "a/up": "..",
    "b/above": "../..",
    "around": "../root",
    "lost": "nowhere",
  }.items():
    (root / name).symlink_to(target)
  source = folder(root)
  assert below(root, source) == ["a/1.png", "b/2.png"] and source.num_classes == 2
  (line,) = lines()
  assert "left out 9: dangling links 4 (a/gone, a/gone.png, a/through.png, …), link loops 5 (a/here, a/self" in line


def test_a_link_to_a_link_to_a_directory_elsewhere_is_a_class(tmp_path):
  write(tmp_path, "store/x/1.png")
  (tmp_path / "between").symlink_to("store/x")
  (tmp_path / "root").mkdir()
  (tmp_path / "root" / "a").symlink_to("../between")
  (tmp_path / "linked").symlink_to("root")
  assert below(tmp_path, folder(tmp_path / "linked")) == ["linked/a/1.png"]


def test_names_in_any_encoding_and_either_form(tmp_path):
  """The same data set by way of macOS, which takes letters and accents apart."""
  names = ("Zoë/1.png", "Zo/é.png", "Zo/f.png", "Zo/caf\udce9.png")
  sources_by_form = {}
  for form in ("NFC", "NFD"):
    write(tmp_path / form, *(unicodedata.normalize(form, name) for name in names))
    sources_by_form[form] = folder(tmp_path / form)
  a, b = sources_by_form.values()
  assert a.content_hash == b.content_hash and a.class_names == b.class_names == ("Zo", "Zoë")
  names_by_form = [[unicodedata.normalize("NFC", os.path.basename(file)) for file in source.files] for source in (a, b)]
  assert names_by_form[0] == names_by_form[1] == ["caf\udce9.png", "f.png", "é.png", "1.png"]
  assert a[0]["image"].shape == (8, 8, 3)
  write(tmp_path / "NFC", "Zo/caf\udce9.png", data=b"")
  with pytest.raises(ValueError, match=r"caf\\udce9.png: not a complete image") as error:
    a[0]
  str(error.value).encode()  # can be logged, and written into a cache's manifest
  write(tmp_path / "odd", "\udce9/1.png", "a\x1b\n/1.png")
  assert folder(tmp_path / "odd").class_names == (r"a\x1b\n", r"\udce9")


def test_two_classes_that_look_the_same_are_refused(tmp_path):
  write(tmp_path, *(unicodedata.normalize(form, "é/1.png") for form in ("NFC", "NFD")))
  if len(os.listdir(tmp_path)) == 2:  # the file system keeps both
    with pytest.raises(ValueError, match=r"e\\u0301' and .*\\xe9': two classes whose names look the same"):
      folder(tmp_path)


@pytest.mark.parametrize(
  "names, note",
  [
    (("1", "2", "10"), ", which text sorts unlike numbers: label 1 is 10"),
    (("01", "02", "10"), ""),
    (("1", "2", "x"), ""),
  ],
)
def test_numbers_that_sort_as_text_are_told(tmp_path, lines, names, note):
  write(tmp_path, *(f"{name}/1.png" for name in names))
  source = folder(tmp_path)
  assert source.class_names == tuple(sorted(names))
  assert lines() == [f"{tmp_path}: 3 images in 3 classes ({', '.join(sorted(names))}){note}"]


def test_images_beside_the_classes_are_told(tmp_path, lines):
  write(tmp_path, "a/1.png", "b/1.png", "stray.png")
  (tmp_path / "link.jpg").symlink_to("a/1.png")
  assert len(folder(tmp_path)) == 2
  assert "; left out 2: images in no class 2 (link.jpg, stray.png)" in lines()[0]


def test_images_without_directories_are_one_class(tmp_path, lines):
  write(tmp_path / "faces", "2.png", "1.JPEG", "notes.txt", ".cache/1.png")
  (tmp_path / "faces" / "3.png").symlink_to("2.png")
  source = folder(tmp_path / "faces")
  assert below(tmp_path, source) == ["faces/1.JPEG", "faces/2.png"]
  assert source.num_classes == 1 and source.class_names == ("faces",) and source[1]["label"] == 0
  assert lines()[0].startswith(f"{tmp_path / 'faces'}: 2 images in 1 class (faces); left out 3: hidden 1 (.cache/)")


def test_a_class_whose_images_cannot_be_listed_is_refused_with_the_reason(tmp_path):
  write(tmp_path, "a/1.png", "b/1.gif", "b/._2.png")
  with pytest.raises(ValueError, match=r"b: a class without images .*left out 2: hidden 1 \(b/._2.png\), of other ki"):
    folder(tmp_path)


def test_a_bucket_is_listed_without_questions_about_images(tmp_path, monkeypatch):
  """Stub of a cloud path, of which only directories are asked what they are."""
  write(tmp_path, "a/1.png", "a/sub/2.png", "b/3.jpg", "b/.hidden.png", "b/readme.txt")
  asked = []

  class Bucket:
    def __init__(self, path: str):
      self._path, self.name = path, path.rsplit("/", 1)[1]

    def __fspath__(self) -> str:
      return self._path

    def iterdir(self):
      return [Bucket(f"{self._path}/{name}") for name in os.listdir(self._path.replace("gs:/", str(tmp_path.parent)))]

    def is_dir(self) -> bool:
      asked.append(self.name)
      return os.path.isdir(self._path.replace("gs:/", str(tmp_path.parent)))

  monkeypatch.setattr(listing.epath, "Path", Bucket)
  listed = listing.list_classes(f"gs://{tmp_path.name}")
  root = f"gs://{tmp_path.name}"
  assert listed.classes == {"a": [f"{root}/a/1.png", f"{root}/a/sub/2.png"], "b": [f"{root}/b/3.jpg"]}
  assert not [name for name in asked if listing.is_image(name)]
  assert listed.left_out == {"hidden": ["b/.hidden.png"], "of other kinds": ["b/readme.txt"]}


def test_images_of_a_task_are_listed_by_the_same_rules(tmp_path, lines):
  write(tmp_path, "b.png", "sub/a.png", "._b.png", "Thumbs.db", "notes.txt")
  (tmp_path / "c.png").symlink_to("b.png")
  assert below(tmp_path, listing.list_images(str(tmp_path))) == ["b.png", "sub/a.png"]
  with pytest.raises(ValueError, match=r"holds no image .*left out 1: hidden 1 \(._b.png\)"):
    listing.list_images(str(write(tmp_path / "other", "._b.png")))
