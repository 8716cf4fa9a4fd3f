"""Images of the user's own: folders and .npz files, good and bad."""

import numpy as np
import pytest
from PIL import Image

from eqm_jax.data import images

SHAPE = (8, 8, 1)


def test_a_folder_is_read_in_order_cropped_and_converted(tmp_path):
  Image.new("RGB", (40, 24), (255, 255, 255)).save(tmp_path / "b.jpg")
  Image.new("L", (8, 8), 0).save(tmp_path / "a.png")
  Image.new("P", (9, 30)).save(tmp_path / "c.png")
  Image.new("CMYK", (64, 64)).save(tmp_path / "d.jpg")
  (tmp_path / ".hidden").write_text("no image")
  read, labels = images.read(str(tmp_path), SHAPE, 4)
  assert read.shape == (4, 8, 8, 1) and read.dtype == np.float32 and labels is None
  np.testing.assert_allclose(read[0], -1)
  np.testing.assert_allclose(read[1], 1)
  assert len(images.read(str(tmp_path), SHAPE, 2)[0]) == 2
  assert images.read(str(tmp_path), (8, 8, 3), 9)[0].shape == (4, 8, 8, 3)


def test_the_crop_takes_the_centre():
  picture = np.zeros((32, 64), np.uint8)
  picture[:, 16:48] = 200
  np.testing.assert_array_equal(np.asarray(images.centre_crop(Image.fromarray(picture), 32)), 200)
  assert images.centre_crop(Image.new("L", (3, 5)), 8).size == (8, 8)


@pytest.mark.parametrize("name", ["image", "x", "arr_0"])
def test_npz_with_labels(tmp_path, name):
  pixels = np.random.default_rng(0).integers(0, 256, (5, *SHAPE)).astype(np.uint8)
  np.savez(tmp_path / "a.npz", **{name: pixels, "label": np.arange(5)})
  read, labels = images.read(str(tmp_path / "a.npz"), SHAPE, 3)
  np.testing.assert_allclose(read, pixels[:3] / 127.5 - 1, atol=1e-6)
  assert labels.tolist() == [0, 1, 2]


def test_latents_have_no_range(tmp_path):
  latents = 5 * np.random.default_rng(0).normal(size=(5, *SHAPE)).astype(np.float32)
  np.savez(tmp_path / "a.npz", x=latents)
  np.testing.assert_array_equal(images.read(str(tmp_path / "a.npz"), SHAPE, 9, in_pixels=False)[0], latents)
  with pytest.raises(ValueError, match="works on latents.*give an .npz"):
    images.read(str(tmp_path), SHAPE, 9, in_pixels=False)


@pytest.mark.parametrize(
  "arrays, message",
  [
    ({"x": np.zeros((2, 9, 9, 1), np.uint8)}, r"images have shape \(2, 9, 9, 1\), but the model works on"),
    ({"x": np.zeros((0, 8, 8, 1), np.uint8)}, r"shape \(0, 8, 8, 1\)"),
    ({"x": np.zeros((2, 8, 8, 1), np.int64)}, "images are int64: give uint8"),
    ({"x": np.full((2, 8, 8, 1), 255.0)}, r"span 255\.\.255, but must lie in \[-1, 1\]"),
    ({"x": np.full((2, 8, 8, 1), np.nan)}, "128 of 128 values are not finite"),
    ({"pixels": np.zeros((2, 8, 8, 1), np.uint8)}, "no array 'image', 'x' or 'arr_0'"),
    ({"x": np.zeros((2, 8, 8, 1), np.uint8), "label": np.zeros(3, int)}, r"labels are int64\[3\]"),
    ({"x": np.zeros((2, 8, 8, 1), np.uint8), "label": np.zeros(2)}, "labels are float64"),
  ],
)
def test_npz_that_do_not_fit_are_refused(tmp_path, arrays, message):
  np.savez(tmp_path / "bad.npz", **arrays)
  with pytest.raises(ValueError, match=message) as error:
    images.read(str(tmp_path / "bad.npz"), SHAPE, 9)
  assert "bad.npz" in str(error.value)


def test_what_is_noisy_may_leave_the_range(tmp_path):
  noisy = 3 * np.random.default_rng(0).normal(size=(5, *SHAPE))
  np.savez(tmp_path / "a.npz", x=noisy)
  np.testing.assert_allclose(images.read(str(tmp_path / "a.npz"), SHAPE, 9, bounded=False)[0], noisy, atol=1e-6)


def test_deeper_pixels_are_refused_and_not_cut_off(tmp_path):
  Image.fromarray(np.full((8, 8), 30000, np.uint16)).save(tmp_path / "deep.png")
  with pytest.raises(ValueError, match="deep.png: has I;16 pixels, more than 8 bits"):
    images.read(str(tmp_path), SHAPE, 9)


def test_a_flipped_byte_in_an_npz_never_ends_in_another_error(tmp_path):
  np.savez_compressed(tmp_path / "a.npz", x=np.random.default_rng(0).integers(0, 256, (3, *SHAPE)).astype(np.uint8))
  whole = (tmp_path / "a.npz").read_bytes()
  for place in range(0, len(whole), 5):
    (tmp_path / "b.npz").write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
    try:
      images.read(str(tmp_path / "b.npz"), SHAPE, 9)
    except ValueError as error:
      assert "b.npz" in str(error)


def test_missing_and_damaged_files_are_named(tmp_path):
  with pytest.raises(ValueError, match="nowhere: no such folder"):
    images.read(str(tmp_path / "nowhere"), SHAPE, 9)
  (tmp_path / "empty").mkdir()
  with pytest.raises(ValueError, match="empty: the folder holds no image"):
    images.read(str(tmp_path / "empty"), SHAPE, 9)
  (tmp_path / "half.npz").write_bytes(b"PK\x03\x04 and no more")
  with pytest.raises(ValueError, match="half.npz: not a complete .npz"):
    images.read(str(tmp_path / "half.npz"), SHAPE, 9)
  Image.effect_noise((64, 64), 50).save(tmp_path / "empty" / "cut.jpg")
  whole = (tmp_path / "empty" / "cut.jpg").read_bytes()
  (tmp_path / "empty" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
  with pytest.raises(ValueError, match="cut.jpg: not a complete image"):
    images.read(str(tmp_path / "empty"), SHAPE, 9)
