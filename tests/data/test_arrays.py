"""Arrays as people save them: read where there is one meaning, refused with the remedy where there is none."""

import io
import pickle
import re
import zipfile

import numpy as np
import pytest

from eqm_jax.data import arrays, samples, sources

SHAPE = (8, 8, 1)
RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (6, *SHAPE)).astype(np.uint8)
COLOUR = RNG.integers(0, 256, (6, 8, 8, 3)).astype(np.uint8)
LABELS = np.arange(6) % 3


def saved(path, **stored) -> str:
  np.savez(path, **stored)
  return str(path)


def source_of(path: str, **options) -> samples.Images:
  return sources.open_source("npz", {"path": path, **options})


def test_an_npz_is_a_data_set(tmp_path):
  path = saved(tmp_path / "a.npz", arr_0=COLOUR, arr_1=LABELS)
  source = source_of(path)
  assert source.shape == (8, 8, 3) and source.num_classes == 3 and source.labels.tolist() == LABELS.tolist()
  np.testing.assert_allclose((source[1]["image"] + 1) * 127.5, COLOUR[1], atol=1e-3)
  same, other = saved(tmp_path / "b.npz", image=COLOUR), saved(tmp_path / "c.npz", image=255 - COLOUR)
  assert source.content_hash == source_of(same).content_hash != source_of(other).content_hash
  with pytest.raises(ValueError, match="labels 0..2, but num_classes = 2 has 0..1: give num_classes = None"):
    source_of(path, num_classes=2)
  with pytest.raises(ValueError, match="nowhere.npz: no such .npz"):
    source_of(str(tmp_path / "nowhere.npz"))
  with pytest.raises(ValueError, match="no such .npz or .npy: give the path of one, .*/a.npz"):
    source_of(path.removesuffix(".npz"))
  with pytest.raises(ValueError, match="data.options.num_classes = 0 must be at least 1: or None"):
    source_of(path, num_classes=0)


@pytest.mark.parametrize("name", ["image", "x", "arr_0"])
def test_the_first_images_and_their_labels(tmp_path, name):
  path = saved(tmp_path / "a.npz", **{name: GREY, "label": LABELS})
  read, labels = arrays.read(path, SHAPE, 3)
  np.testing.assert_allclose(read, GREY[:3] / 127.5 - 1, atol=1e-6)
  assert labels.tolist() == [0, 1, 2] and labels.dtype == np.int32


def test_an_npy_of_images_is_read_as_one(tmp_path, caplog):
  caplog.set_level("INFO")
  np.save(tmp_path / "a.npy", COLOUR)
  source = source_of(str(tmp_path / "a.npy"))
  np.testing.assert_allclose((source.images + 1) * 127.5, COLOUR, atol=1e-3)
  assert source.num_classes == 1 and "no array of labels (label or arr_1), all images are of class 0" in caplog.text
  np.save(tmp_path / "b.npy", np.asfortranarray(GREY.astype(np.float16) / 127.5 - 1))
  np.testing.assert_allclose(arrays.read(str(tmp_path / "b.npy"), SHAPE, 9)[0], GREY / 127.5 - 1, atol=1e-3)


@pytest.mark.parametrize("names", [("images", "labels"), ("data", "y"), ("X_train", "y_train"), ("Photos", "target")])
def test_one_array_under_another_name_is_taken_and_named(tmp_path, names, caplog):
  caplog.set_level("INFO")
  source = source_of(saved(tmp_path / "a.npz", **{names[0]: GREY, names[1]: LABELS, "ids": np.arange(6) + 100}))
  assert source.labels.tolist() == LABELS.tolist() and source.shape == SHAPE
  assert f"the images are those of {names[0]!r}" in caplog.text and f"labels are those of {names[1]!r}" in caplog.text


def test_samples_of_latents_are_latents_to_a_model_of_latents(tmp_path):
  """--mode=sample saves the decoded images beside them."""
  latents = 5 * RNG.normal(size=(6, 4, 4, 4)).astype(np.float32)
  path = saved(tmp_path / "samples.npz", x=latents, image=COLOUR, label=LABELS, autoencoder="ema 0123")
  np.testing.assert_array_equal(arrays.read(path, (4, 4, 4), 9, in_pixels=False)[0], latents)
  assert source_of(path).shape == (8, 8, 3)
  assert arrays.recorded_autoencoder(path) == {"name": "ema", "sha256": "0123"}
  assert arrays.recorded_autoencoder(saved(tmp_path / "a.npz", x=latents, autoencoder="")) is None
  assert arrays.recorded_autoencoder(saved(tmp_path / "b.npz", x=latents)) is None


def test_what_is_noisy_may_leave_the_range(tmp_path, caplog):
  noisy = 3 * RNG.normal(size=(5, *SHAPE))
  path = saved(tmp_path / "a.npz", x=noisy)
  np.testing.assert_allclose(arrays.read(path, SHAPE, 9, bounded=False)[0], noisy, atol=1e-6)
  assert not caplog.text
  arrays.read(saved(tmp_path / "b.npz", x=GREY + noisy[:1]), SHAPE, 9, bounded=False)
  assert "if these are pixels in [0, 255] with noise, give images / 127.5 - 1" in caplog.text


FLOATS = COLOUR / 255
BAD_IMAGES = {
  "channels first": (COLOUR.transpose(0, 3, 1, 2), r"\(6, 3, 8, 8\).* give images.transpose\(0, 2, 3, 1\)"),
  "grey, channels first": (GREY.transpose(0, 3, 1, 2), r"channels come first, give images.transpose\(0, 2, 3, 1\)"),
  "not square, channels first": (np.zeros((6, 3, 8, 9), np.uint8), r"images.transpose\(0, 2, 3, 1\)"),
  "latents, channels first": (np.zeros((6, 16, 4, 4)), r"images.transpose\(0, 2, 3, 1\)"),
  "images last": (np.zeros((8, 8, 3, 60), np.uint8), r"images.transpose\(3, 0, 1, 2\)"),
  "no channel axis": (GREY[..., 0], r"for grey images give images\[..., None\]"),
  "a single image": (COLOUR[0], r"for a single image give images\[None\]"),
  "rows of pixels": (COLOUR.reshape(6, -1), r"for rows give images.reshape\(N, H, W, C\)"),
  "a number": (np.zeros(()), r"shape \(\), but must be \[N, H, W, C\]"),
  "videos": (np.zeros((2, 3, 8, 8, 3)), "array of four dimensions"),
  "none": (GREY[:0], r"shape \(0, 8, 8, 1\), but must be .* N at least 1"),
  "floats to 255": (COLOUR * 1.0, r"span 0\.\.255, but must lie in \[-1, 1\].*\[0, 255\] give images / 127.5 - 1"),
  "floats of 16 bits": (COLOUR * 257.0, r"\[0, 65535\] give images / 32767.5 - 1"),
  "standardised": ((FLOATS - FLOATS.mean()) / FLOATS.std() * 2, r"standardised pixels give \(images \* std \+ mean"),
  "latents": (3 * RNG.normal(size=(6, 4, 4, 4)), "latents are read from the cache"),
  "int64": (COLOUR.astype(np.int64), r"images are int64: give uint8 .*images.astype\(np.uint8\)"),
  "16 bits": (COLOUR.astype(np.uint16) * 257, r"uint16: give uint8.*images / 257\).*these span"),
  "int8": ((COLOUR.astype(int) - 128).astype(np.int8), r"int8: give uint8.*these span -128\.\.127"),
  "bool": (COLOUR > 99, r"bool: give uint8.*images \* np.uint8\(255\)"),
  "bfloat16": (np.zeros((6, 8, 8, 3), "V2"), "before saving: an .npy has no bfloat16"),
  "complex": (COLOUR * 1j, "images are complex128: give uint8"),
  "text": (np.full((6, 8, 8, 3), "0"), "images are <U1: give uint8"),
  "not finite": (np.where(COLOUR > 250, np.nan, FLOATS), "of 1152 values are not finite: remove them"),
  "objects": (np.array([GREY[0], GREY[0, :4]], dtype=object), "the array holds Python objects, which could run code"),
}


@pytest.mark.parametrize("images, message", BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_images_that_need_a_change_are_refused_with_it(tmp_path, images, message):
  np.save(tmp_path / "bad.npy", images, allow_pickle=images.dtype == object)
  with pytest.raises(ValueError, match=message) as error:
    source_of(str(tmp_path / "bad.npy"))
  assert "bad.npy" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
  "images, shape, message",
  [
    (np.zeros((2, 9, 9, 1), np.uint8), SHAPE, r"shape \(2, 9, 9, 1\), but the model works on \[N, 8, 8, 1\]: resize"),
    (COLOUR.transpose(0, 3, 1, 2), (8, 8, 3), r"works on \[N, 8, 8, 3\]: channels come first"),
    (COLOUR.transpose(0, 3, 1, 2), SHAPE, "channels come first"),
    (GREY, (8, 8, 3), r"for grey images give images.repeat\(3, axis=-1\)"),
    (COLOUR, SHAPE, r"for RGB give images.mean\(axis=-1, keepdims=True\)"),
    (np.zeros((6, 8, 8, 4), np.uint8), (8, 8, 3), r"for RGBA give images\[..., :3\]"),
    (np.zeros((6, 8, 8, 3)), (8, 8, 4), "as many channels"),
    (GREY[0], SHAPE, r"for a single image give images\[None\]"),
    (GREY[0, ..., 0], SHAPE, r"images\[None, ..., None\]"),
    (GREY[..., 0], SHAPE, r"images\[..., None\]"),
  ],
)
def test_images_of_another_shape_than_the_models_are_refused(tmp_path, images, shape, message):
  np.save(tmp_path / "bad.npy", images)
  with pytest.raises(ValueError, match=message):
    arrays.read(str(tmp_path / "bad.npy"), shape, 9)


def test_points_of_the_plane_are_images_of_one_pixel(tmp_path):
  points = RNG.normal(size=(5, 1, 1, 2)).clip(-1, 1)
  np.testing.assert_allclose(arrays.read(saved(tmp_path / "a.npz", x=points), (1, 1, 2), 9)[0], points, atol=1e-6)
  assert source_of(str(tmp_path / "a.npz")).shape == (1, 1, 2)


@pytest.mark.parametrize(
  "images, message",
  [
    (FLOATS, r"values span 0\.\.1, where -1 is black: if these are pixels in \[0, 1\], give images \* 2 - 1"),
    (FLOATS * 1.1 - 0.05, r"values span -0\.05\.\.1\.05, .*give images \* 2 - 1"),
    (FLOATS - 0.5, r"meant in \[-0.5, 0.5\], give images \* 2"),
    (COLOUR % 2, r"all pixels are 0 or 1 of 255, black: .*images \* 255"),
    (RNG.integers(0, 256, (6, 8, 8, 4)).astype(np.uint8), r"4 channels: if these are RGBA, images\[..., :3\]"),
    (FLOATS * 2 - 1, ""),
    (COLOUR, ""),
    (np.zeros((6, 8, 8, 3)), ""),
  ],
)
def test_values_that_are_only_likely_to_be_meant_otherwise_get_a_warning(tmp_path, images, message, caplog):
  path = saved(tmp_path / "a.npz", image=images, label=LABELS)
  with caplog.at_level("WARNING"):
    source_of(path)
    assert len(caplog.records) == bool(message)
    if message:
      assert re.search(f"a.npz: .*{message}", caplog.text)
      caplog.clear()
      arrays.read(path, images.shape[1:], 2)
      assert len(caplog.records) == ("RGBA" not in message), "what the model's own shape says needs no warning"


BAD_LABELS = {
  "one-hot": (np.eye(3)[LABELS], r"float64\[6, 3\]: .*these are one-hot, give label.argmax\(axis=1\)"),
  "one-hot integers": (np.eye(3, dtype=int)[LABELS], "these are one-hot"),
  "probabilities": (np.full((6, 3), 1 / 3), r"if they are one-hot, give label.argmax\(axis=1\)"),
  "another count": (np.zeros(7, int), r"int64\[7\]: give one integer for each image, of which there are 6"),
  "a row": (LABELS[None], r"give label.reshape\(-1\)"),
  "one": (np.asarray(3), r"int64\[\]: give one integer for each image"),
  "names": (np.array(["cat", "dog"] * 3), r"\('cat', 'dog'\): number the classes, np.unique\(label, return_inverse"),
  "bytes": (np.array([b"cat", b"dog"] * 3), "number the classes"),
  "fractions": (LABELS + 0.5, r"float64\[6\]: give one integer for each image, not \[0.5, 1.5, 2.5\]"),
  "not finite": (np.array([0, 1, 2, 0, 1, np.nan]), "not .nan"),
  "negative": (LABELS - 1, r"span -1\.\.1: number the classes from 0; leave unlabelled images out"),
  "from 1": (LABELS + 1, r"labels 1\.\.3, but num_classes = 3 has 0\.\.2: they count from 1, subtract 1"),
  "too large": (LABELS + 2, r"labels 2\.\.4, but num_classes = 3 has 0\.\.2: give num_classes = None"),
  "identifiers": (LABELS + 2**40, "number the classes"),
  "objects": (np.array([0, None] * 3), "array 'label' holds Python objects"),
  "dates": (np.zeros(6, "M8[D]"), "give one integer for each image"),
}


@pytest.mark.parametrize("labels, message", BAD_LABELS.values(), ids=BAD_LABELS)
def test_labels_that_need_a_change_are_refused_with_it(tmp_path, labels, message):
  path = saved(tmp_path / "bad.npz", image=GREY, label=labels)
  with pytest.raises(ValueError, match=message) as error:
    source_of(path, num_classes=3)
  assert "bad.npz" in str(error.value)


@pytest.mark.parametrize("labels", [LABELS * 1.0, LABELS[:, None], LABELS.astype(np.uint8), LABELS.astype(np.float16)])
def test_labels_of_one_meaning_are_read(tmp_path, labels):
  source = source_of(saved(tmp_path / "a.npz", image=GREY, label=labels))
  assert source.labels.tolist() == LABELS.tolist() and source.labels.dtype == np.int32 and source.num_classes == 3
  truths = source_of(saved(tmp_path / "b.npz", image=GREY, label=LABELS > 0))
  assert truths.labels.tolist() == [0, 1, 1, 0, 1, 1]


@pytest.mark.parametrize(
  "labels, num_classes, message",
  [
    (LABELS + 1, None, r"labels span 1\.\.3, class 0 has no image: if they count from 1, subtract 1"),
    (LABELS + 1, 10, "if they count from 1, subtract 1"),
    (LABELS * 2, None, r"2 of 5 classes have no image \(1, 3\): .*np.unique\(label, return_inverse=True\)\[1\]"),
    (LABELS, 1000, r"997 of 1000 classes have no image \(3, 4, 5, 6, 7, …\)"),
    (LABELS + 10**9, None, r"1000000000 of 1000000003 classes have no image \(0, 1, 2, 3, 4, …\)"),
    (LABELS, 3, ""),
  ],
)
def test_classes_without_an_image_get_a_warning(tmp_path, labels, num_classes, message, caplog):
  with caplog.at_level("WARNING"):
    source_of(saved(tmp_path / "a.npz", image=GREY, label=labels), num_classes=num_classes)
  assert len(caplog.records) == bool(message)
  assert re.search(message, caplog.text)


@pytest.mark.parametrize(
  "stored, message",
  [
    (
      {"x_train": GREY, "y_train": LABELS, "x_test": GREY},
      r"several arrays of images, but 'x_train' uint8\[6, 8, 8, 1\]",
    ),
    ({"arr_0": GREY, "arr_1": GREY}, r"several arrays of images.*'arr_1' uint8.*np.savez\(path, image=images, label="),
    ({"images": GREY, "data": GREY}, "save one as 'image'"),
    ({"mu": np.zeros(3), "sigma": np.eye(3)}, r"holds no array 'image', 'x' or 'arr_0' .*'mu' float64\[3\], 'sigma'"),
    ({"image": GREY, "labels": LABELS, "y": LABELS}, "several arrays may be the labels, 'labels' .*'y'"),
    ({}, "holds no array"),
  ],
)
def test_names_that_are_not_clear_are_listed(tmp_path, stored, message):
  with pytest.raises(ValueError, match=message):
    source_of(saved(tmp_path / "a.npz", **stored))


class Evil:
  """What runs code where it is unpickled."""

  def __reduce__(self):
    return pytest.fail, ("unpickled",)


def test_files_that_are_no_arrays_are_refused(tmp_path):
  path, zipped = tmp_path / "a.npz", io.BytesIO()
  with zipfile.ZipFile(zipped, "w") as archive:
    archive.writestr("archive/data.pkl", "")
  kinds = {
    pickle.dumps({"image": Evil()}): "a pickle, which can run code when it is read",
    b"\x1f\x8b\x08 and so on": "compressed by gzip",
    b"\x89HDF\r\n\x1a\n": "HDF5",
    b"MATLAB 5.0 MAT-file": "a MATLAB file",
    b"index,label": "begins with b'index,'.*save arrays by np.savez",
    b"": "empty",
    zipped.getvalue(): "holds no array",
  }
  for data, message in kinds.items():
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"a.npz: .*{message}"):
      source_of(str(path))
  np.save(tmp_path / "evil.npy", np.array([Evil()], dtype=object))
  with pytest.raises(ValueError, match="evil.npy: the array holds Python objects"):
    source_of(str(tmp_path / "evil.npy"))
  with pytest.raises(ValueError, match="a directory, not an .npz or .npy"):
    source_of(str(tmp_path))


@pytest.mark.parametrize("name", ["a.npz", "a.npy"])
def test_truncated_files_are_named_wherever_they_end(tmp_path, name):
  np.savez(tmp_path / "a.npz", image=GREY, label=LABELS)
  np.save(tmp_path / "a.npy", GREY)
  whole = (tmp_path / name).read_bytes()
  for end in (1, 5, 60, len(whole) // 2, len(whole) - 1):
    (tmp_path / name).write_bytes(whole[:end])
    with pytest.raises(ValueError, match=f"{name}: (not a complete .npz or .npy|neither)"):
      source_of(str(tmp_path / name))


def test_a_flipped_byte_never_ends_in_another_error(tmp_path):
  np.savez_compressed(tmp_path / "a.npz", x=GREY[:3])
  whole = (tmp_path / "a.npz").read_bytes()
  for place in range(0, len(whole), 5):
    (tmp_path / "b.npz").write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
    try:
      arrays.read(str(tmp_path / "b.npz"), SHAPE, 9)
    except ValueError as error:
      assert "b.npz" in str(error)
