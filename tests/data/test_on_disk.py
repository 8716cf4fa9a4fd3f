"""Folders and TFDS builds: read as others read them; damaged ones named."""

import os
import pathlib
import shutil
import sys

import numpy as np
import pytest
from conftest import encoded, picture, write_build
from PIL import Image

from eqm_jax.data import images, samples, sources

SIZE = 8


@pytest.fixture
def folder(tmp_path):
  """Two classes; one contains directories and a file that is no image."""
  for name in (
    "dog/b.png",
    "dog/a.JPEG",
    "cat/old/z.png",
    "cat/old-er/y.png",
    "cat/old/x/w.png",
    "cat/c.png",
    "cat/a.txt",
  ):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(encoded(picture(), "JPEG" if name.endswith("JPEG") else "PNG"))
  (tmp_path / ".hidden").mkdir()
  return tmp_path


def test_a_folder_is_listed_as_torchvision_does(folder):
  """torchvision walks the sorted classes with sorted(os.walk(class)), and takes the sorted names of each directory."""
  source = sources.open_source("folder", {"path": str(folder), "size": SIZE})
  expected = [
    (pathlib.Path(root) / name, label)
    for label, kind in enumerate(["cat", "dog"])
    for root, _, names in sorted(os.walk(folder / kind))
    for name in sorted(names)
    if not name.endswith(".txt")
  ]
  assert [(pathlib.Path(file), int(label)) for file, label in zip(source.files, source.labels)] == expected
  assert source.num_classes == 2 and source.shape == (8, 8, 3) and source[4]["label"] == 1 and len(source) == 6
  image = source[0]["image"]
  assert image.dtype == np.float32 and image.shape == (8, 8, 3)
  expected = np.asarray(images.centre_crop(picture(), SIZE))
  np.testing.assert_allclose((image + 1) * 127.5, expected, atol=1e-3)


@pytest.mark.parametrize("size", [(300, 200), (64, 64), (65, 130), (32, 31), (20, 50)])
def test_the_crop_is_the_one_of_adm(size):
  """ADM's steps, spelled out with Pillow: halve with BOX while it is twice as large, BICUBIC, cut the centre."""
  image, target = picture(size=size), 32
  halved = image
  while min(halved.size) >= 64:
    halved = halved.resize((halved.size[0] // 2, halved.size[1] // 2), resample=Image.BOX)
  scale = target / min(halved.size)
  resized = halved.resize(tuple(round(side * scale) for side in halved.size), resample=Image.BICUBIC)
  pixels = np.array(resized)
  top, left = (pixels.shape[0] - target) // 2, (pixels.shape[1] - target) // 2
  expected = pixels[top : top + target, left : left + target]
  np.testing.assert_array_equal(images.decode(encoded(image), "a.png", target, 3), expected)


@pytest.mark.parametrize(
  "data, message",
  [
    (encoded(picture(size=(90, 90)), "JPEG")[:900], "cat/c.png: not a complete image"),
    (encoded(picture(size=(90, 90)))[:900], "cat/c.png: not a complete image"),
    (b"", "cat/c.png: not a complete image"),
    (b"no image at all", r"cat/c.png: not a complete image \(of no known format\)"),
    (encoded(picture(size=(3, 5))), "cat/c.png: is 3 × 5 pixels, too small for 64 × 64"),
    (encoded(Image.fromarray(np.zeros((9, 9), np.uint16))), "cat/c.png: has I;16 pixels"),
  ],
)
def test_a_damaged_image_is_named(folder, data, message):
  (folder / "cat" / "c.png").write_bytes(data)
  source = sources.open_source("folder", {"path": str(folder), "size": 64})
  with pytest.raises(images.DamagedImage, match=message):
    source[0]
  source[1]  # the others are as good as before


def test_an_image_that_cannot_be_read_is_named_and_is_not_a_damaged_one(folder):
  """A lost disk must not become a cache without the images of that disk."""
  source = sources.open_source("folder", {"path": str(folder), "size": SIZE})
  (folder / "cat" / "c.png").unlink()
  with pytest.raises(OSError, match="cat/c.png"):
    source[0]


def test_other_files_have_another_content_hash(folder):
  """A cache that was begun does not continue with another folder of as many images."""

  def content_hash(path):
    return sources.open_source("folder", {"path": str(path), "size": SIZE}).content_hash

  before = content_hash(folder)
  shutil.copytree(folder, folder / ".moved")
  assert content_hash(folder / ".moved") == before
  (folder / "dog" / "b.png").rename(folder / "dog" / "c.png")
  assert content_hash(folder) != before


def test_orientation_and_transparency_are_options(folder, build):
  """Stored as ADM reads them by default."""
  upside_down, transparent = picture(size=(8, 8)), picture(size=(8, 8))
  upside_down.getexif()[0x0112] = 3
  transparent.putalpha(0)
  upside_down.save(folder / "cat" / "a.png", exif=upside_down.getexif())
  transparent.save(folder / "cat" / "b.png")
  options = {"path": str(folder), "size": SIZE}
  stored = sources.open_source("folder", options)
  changed = sources.open_source("folder", {**options, "upright": True, "background": "white"})
  np.testing.assert_array_equal(changed[0]["image"], stored[0]["image"][::-1, ::-1])
  assert stored[1]["image"].min() < 0.5 and changed[1]["image"].min() == 1
  sources.open_source("tfds", {"name": "tiny", "path": str(build), "upright": True, "background": "black"})[0]


def test_samples_spread_over_a_folder_sorted_by_class_are_of_all_classes(tmp_path):
  colours = {"a": (255, 0, 0), "b": (0, 255, 0), "c": (0, 0, 255)}
  for name, colour in colours.items():
    (tmp_path / name).mkdir()
    for i in range(20):
      Image.new("RGB", (SIZE, SIZE), colour).save(tmp_path / name / f"{i:02}.png")
  source = sources.open_source("folder", {"path": str(tmp_path), "size": SIZE})
  assert source.labels.tolist() == sorted(source.labels)
  chosen = samples.spread(source, 6)
  assert chosen[0] == 0 and chosen[-1] == len(source) - 1 and source.labels[chosen].tolist() == [0, 0, 1, 1, 2, 2]
  images_NxHxWxC = samples.arrays(source, chosen, threads=2)
  assert images_NxHxWxC.shape == (6, SIZE, SIZE, 3) and images_NxHxWxC.dtype == np.float32
  assert images_NxHxWxC[:, 0, 0].argmax(axis=-1).tolist() == [0, 0, 1, 1, 2, 2]
  assert samples.spread(source, 100).tolist() == list(range(60)) == samples.spread(60, 60).tolist()


def test_small_images_are_enlarged(folder):
  (folder / "cat" / "c.png").write_bytes(encoded(picture(size=(3, 5))))
  assert sources.open_source("folder", {"path": str(folder), "size": SIZE})[0]["image"].shape == (8, 8, 3)


@pytest.mark.parametrize(
  "change, options, message",
  [
    (lambda d: None, {"path": "nowhere"}, "nowhere: no such directory"),
    (lambda d: (d / "horse").mkdir(), {}, "horse: a class without images"),
    (
      lambda d: (d / "bird").mkdir(),
      {"path": "bird"},
      "bird: holds no directory and no image .*: put the images",
    ),
    (lambda d: None, {"size": 0}, "size = 0 must be at least 1"),
    (lambda d: None, {"channels": 4}, "data.options.channels = 4 must be one of 1, 3"),
    (lambda d: None, {"background": "grey"}, "data.options.background = 'grey' must be one of None, white, black"),
  ],
)
def test_folders_that_are_no_data_set_are_refused(folder, change, options, message):
  change(folder)
  path = str(folder / options.pop("path", ""))
  with pytest.raises(ValueError, match=message):
    sources.open_source("folder", {"path": path, "size": SIZE, **options})


@pytest.fixture(scope="module")
def build(tmp_path_factory):
  path = tmp_path_factory.mktemp("tfds")
  write_build(path)
  return path


def test_a_tfds_build_is_read_without_tensorflow(build):
  source = sources.open_source("tfds", {"name": "tiny", "path": str(build), "size": SIZE})
  assert len(source) == 10 and source.class_names == ("cat", "dog") and source.shape == (8, 8, 3)
  expected = {
    (np.asarray(images.centre_crop(picture(seed=i), SIZE)).astype(np.float32) / 127.5 - 1).tobytes(): i % 2
    for i in range(10)
  }
  assert {source[i]["image"].tobytes(): int(source[i]["label"]) for i in range(10)} == expected
  assert source.labels.tolist() == [source[i]["label"] for i in range(10)]
  part = sources.open_source("tfds", {"name": "tiny:1.0.0", "path": str(build), "split": "train[:40%]"})
  assert len(part) == 4 and part.shape == (32, 32, 3)
  assert "tensorflow" not in sys.modules


def test_the_newest_version_is_taken(build, tmp_path):
  for version in ("9.0.0", "10.0.0"):
    write_build(tmp_path, version=version)
  source = sources.open_source("tfds", {"name": "tiny", "path": str(tmp_path)})
  assert "10.0.0" in source._where


@pytest.mark.parametrize(
  "options, message",
  [
    ({"name": "cifar10"}, "cifar10: no such TFDS build.*tfds build cifar10 --file_format=array_record --data_dir="),
    ({"name": "tiny:2.0.0"}, "2.0.0: no such TFDS build.*tfds build tiny:2.0.0"),
    ({"path": "nowhere"}, "no such TFDS build"),
    ({"split": "valid"}, "split 'valid' cannot be opened"),
    ({"channels": 2}, "data.options.channels = 2 must be one of 1, 3"),
    ({"path": "regression"}, "its samples have image, label, but need `image`, and `label` that is a class"),
  ],
)
def test_the_error_of_a_missing_build_has_the_command_that_makes_it(build, options, message):
  write_build(build / "regression", label=np.float32) if options.get("path") == "regression" else None
  path = str(build / options.pop("path", ""))
  with pytest.raises(ValueError, match=message):
    sources.open_source("tfds", {"name": "tiny", "path": path, **options})


def test_a_damaged_build_is_named(build, tmp_path):
  shutil.copytree(build / "tiny", tmp_path / "tiny")
  next((tmp_path / "tiny" / "1.0.0").glob("*array_record*")).unlink()
  source = sources.open_source("tfds", {"name": "tiny", "path": str(tmp_path)})
  with pytest.raises(OSError, match="record 3 cannot be read"):
    source[3]


def test_the_error_of_a_build_without_random_access_has_the_command_that_converts_it(build, tmp_path):
  info = tmp_path / "tiny" / "1.0.0"
  info.mkdir(parents=True)
  for file in (build / "tiny" / "1.0.0").iterdir():
    (info / file.name).write_bytes(
      file.read_bytes().replace(b'"fileFormat": "array_record"', b'"fileFormat": "tfrecord"')
    )
  with pytest.raises(ValueError, match="tfds convert_format .*--out_file_format=array_record"):
    sources.open_source("tfds", {"name": "tiny", "path": str(tmp_path)})
