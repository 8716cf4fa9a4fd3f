"""The cache of latents: written and read, by killed and by several processes, damaged, and of other settings."""

import dataclasses
import json
import resource

import ml_dtypes
import numpy as np
import pytest
from conftest import run_python

from eqm_jax.data import encode_latents, latents
from eqm_jax.data.images import DamagedImage, LargeImage
from eqm_jax.data.samples import Images

SCALE = 0.5
AUTOENCODER_ID = {"name": "ema", "sha256": "ab12", "scaling_factor": SCALE}
WRITE = dict(batch_size=2, threads=2)


def numbered(count: int = 10, size: int = 4) -> Images:
  """Images in which every pixel encodes their number and its column."""
  images = np.zeros((count, size, size, 3), np.float32)
  images += np.arange(count)[:, None, None, None] / 16 + np.arange(size)[None, None, :, None] / 256
  return Images(images, np.arange(count) % 5, num_classes=5)


def encode(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Stub of an autoencoder that keeps every second pixel."""
  assert 1 <= len(images) <= WRITE["batch_size"]
  sides = np.stack([images, images[:, :, ::-1]], axis=1)[:, :, ::2, ::2]
  return sides, -sides


def settings_of(source, **changes) -> latents.Settings:
  H, W, C = source.shape
  return latents.Settings(
    **{
      **dict(
        source="numbered",
        options={"size": H},
        contents="c0",
        images=len(source),
        num_classes=source.num_classes,
        image_size=H,
      ),
      **dict(latent_shape=(H // 2, W // 2, C), dtype="float16", images_per_shard=3, autoencoder=AUTOENCODER_ID),
      **changes,
    }
  )


def write_cache(path, source=None, **changes) -> latents.Settings:
  """A finished cache."""
  source = source or numbered()
  settings = settings_of(source, **changes)
  encode_latents.write(str(path), source, encode, settings, **WRITE)
  encode_latents.finish(str(path), settings)
  return settings


def files(path) -> dict[str, bytes]:
  return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_encoded_images_are_read_as_a_scaled_distribution(tmp_path, dtype):
  source = numbered()
  write_cache(tmp_path / "cache", source, dtype=dtype)
  read = latents.Latents(str(tmp_path / "cache"), verify=True)
  assert len(read) == 10 and read.shape == (2, 2, 3) and read.num_classes == 5 and read.autoencoder_id == AUTOENCODER_ID
  np.testing.assert_array_equal(read.labels, source.labels)
  stored = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[dtype]
  for i in range(10):
    mean = np.stack([source.images[i], source.images[i][:, ::-1]])[:, ::2, ::2].astype(stored).astype(np.float32)
    sample = read[i]
    assert sample["label"] == source.labels[i] and sample["mean"].dtype == sample["logvar"].dtype == np.float32
    np.testing.assert_allclose(sample["mean"], SCALE * mean)
    np.testing.assert_allclose(np.exp(sample["logvar"] / 2), SCALE * np.exp(-mean / 2), rtol=1e-5)
    for side in range(2):
      one = read.side(i, side)
      np.testing.assert_array_equal(one["mean"], sample["mean"][side])
      np.testing.assert_array_equal(one["logvar"], sample["logvar"][side])
  assert {file.name for file in (tmp_path / "cache").iterdir()} == {latents.MANIFEST} | {
    f"latents-{shard:05d}-of-00004.array_record" for shard in range(4)
  }


def test_names_of_the_classes_are_kept_beside_the_settings(tmp_path):
  """Caches without them are read as before."""
  settings = write_cache(tmp_path / "old")
  encode_latents.write(str(tmp_path / "new"), numbered(), encode, settings, **WRITE)
  encode_latents.finish(str(tmp_path / "new"), settings, class_names=("a", "b", "c", "d", "Zoë"))
  assert latents.Latents(str(tmp_path / "new")).class_names == ["a", "b", "c", "d", "Zoë"]
  assert latents.Latents(str(tmp_path / "old")).class_names is None
  manifest = json.loads((tmp_path / "old" / latents.MANIFEST).read_text())
  del manifest["class_names"]
  (tmp_path / "old" / latents.MANIFEST).write_text(json.dumps(manifest))
  assert latents.Latents(str(tmp_path / "old")).class_names is None


def test_processes_share_the_shards_and_make_the_same_cache(tmp_path):
  source = numbered()
  settings = write_cache(tmp_path / "one", source)
  counts = []
  for process in (1, 0):  # in any order
    with pytest.raises(ValueError, match="is not finished: run the preparation again"):
      encode_latents.finish(str(tmp_path / "two"), settings)
    counts.append(
      encode_latents.write(
        str(tmp_path / "two"), source, encode, settings, **WRITE, process_index=process, process_count=2
      )
    )
  encode_latents.finish(str(tmp_path / "two"), settings)
  assert counts == [4, 6] and files(tmp_path / "one") == files(tmp_path / "two")


class Failing:
  """A source that raises an error at one image."""

  def __init__(self, source, index, error):
    self._source, self._index, self._error = source, index, error
    self.shape, self.num_classes = source.shape, source.num_classes

  def __len__(self):
    return len(self._source)

  def __getitem__(self, index):
    if index == self._index:
      raise self._error
    return self._source[index]


KILLED = """
import os, sys
import numpy as np
from test_latents import WRITE, encode, numbered, settings_of
from eqm_jax.data import encode_latents

calls = []
def dies(images):
  calls.append(1)
  if len(calls) == 4:  # in the middle of the second shard
    os.kill(os.getpid(), 9)
  return encode(images)

encode_latents.write(sys.argv[1], numbered(), dies, settings_of(numbered()), **WRITE)
"""


def test_a_killed_run_that_starts_again_ends_with_the_same_bits(tmp_path):
  settings = write_cache(tmp_path / "whole")
  path = tmp_path / "killed"
  run_python("-c", KILLED, path, status=-9)
  left = set(files(path))
  assert "latents-00000-of-00004.array_record.json" in left and "latents-00001-of-00004.array_record" not in left
  assert not latents.is_finished(str(path))
  with pytest.raises(ValueError, match="was begun and not finished"):
    latents.Latents(str(path))
  assert encode_latents.write(str(path), numbered(), encode, settings, **WRITE) == 7  # not the three of the first shard
  encode_latents.finish(str(path), settings)
  assert files(path) == files(tmp_path / "whole")
  assert encode_latents.write(str(path), numbered(), encode, settings, **WRITE) == 0  # all is done


def test_a_shard_that_was_cut_off_is_made_again(tmp_path):
  settings = settings_of(numbered())
  encode_latents.write(str(tmp_path), numbered(), encode, settings, **WRITE)
  shard = tmp_path / "latents-00002-of-00004.array_record"
  shard.write_bytes(shard.read_bytes()[:-1])
  assert encode_latents.write(str(tmp_path), numbered(), encode, settings, **WRITE) == 3


def test_a_damaged_image_is_an_error_with_its_name_or_is_left_out_and_counted(tmp_path):
  source = Failing(numbered(), 7, DamagedImage("cat.jpg: not a whole image"))
  settings = settings_of(numbered())
  with pytest.raises(ValueError, match=r"cat.jpg: not a whole image\. Mend it, .*skip_damaged"):
    encode_latents.write(str(tmp_path), source, encode, settings, **WRITE)
  assert len([name for name in files(tmp_path) if name.endswith(".array_record")]) == 2  # finished shards are kept
  encode_latents.write(str(tmp_path), source, encode, settings, **WRITE, skip_damaged=True)
  manifest = encode_latents.finish(str(tmp_path), settings)
  assert manifest["records"] == 9 and [shard["skipped"] for shard in manifest["shards"]][2] == [
    "cat.jpg: not a whole image"
  ]
  read = latents.Latents(str(tmp_path))
  np.testing.assert_array_equal(read.labels, np.delete(np.arange(10) % 5, 7))
  np.testing.assert_allclose([read[i]["mean"][0, 0, 0, 0] * 32 for i in range(9)], np.delete(np.arange(10), 7))


@pytest.mark.parametrize(
  "error",
  [
    OSError("cat.jpg: the network disk is gone"),
    RuntimeError("memory is gone"),
    LargeImage("cat.jpg: too large, but not damaged"),
  ],
)
def test_other_errors_are_no_damaged_images(tmp_path, error):
  source = Failing(numbered(), 7, error)
  with pytest.raises(type(error), match=str(error)):
    encode_latents.write(str(tmp_path), source, encode, settings_of(numbered()), **WRITE, skip_damaged=True)


def test_nothing_but_damaged_images_is_no_cache(tmp_path):
  settings = settings_of(numbered(2))

  class Damaged(Images):
    def __getitem__(self, index):
      raise DamagedImage(f"{index}.jpg: not a whole image")

  source = Damaged(numbered(2).images, np.zeros(2, int), 5)
  encode_latents.write(str(tmp_path), source, encode, settings, **WRITE, skip_damaged=True)
  with pytest.raises(ValueError, match="all 2 images are damaged .0.jpg: .*: give another data set"):
    encode_latents.finish(str(tmp_path), settings)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"autoencoder": {**AUTOENCODER_ID, "name": "mse"}}, "autoencoder: .*'ema'.* saved, .*'mse'.* requested"),
    ({"image_size": 8}, "image_size: 4 saved, 8 requested"),
    ({"contents": "c1"}, "contents: 'c0' saved, 'c1' requested"),
    ({"dtype": "bfloat16"}, "dtype: 'float16' saved"),
    ({"images_per_shard": 5}, "images_per_shard: 3 saved, 5 requested"),
  ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_a_directory_of_other_latents_is_refused(tmp_path, changes, message, finished):
  settings = settings_of(numbered())
  encode_latents.write(str(tmp_path), numbered(), encode, settings, **WRITE)
  if finished:
    encode_latents.finish(str(tmp_path), settings)
  before = files(tmp_path)
  with pytest.raises(ValueError, match=message):
    encode_latents.write(str(tmp_path), numbered(), encode, dataclasses.replace(settings, **changes), **WRITE)
  assert files(tmp_path) == before


def edit_manifest(path, **changes):
  manifest = json.loads((path / latents.MANIFEST).read_text())
  (path / latents.MANIFEST).write_text(json.dumps({**manifest, **changes}))


def flip_a_bit(file):
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 1
  file.write_bytes(content)


SHARD = "latents-00001-of-00004.array_record"


@pytest.mark.parametrize(
  "damage, message",
  [
    (lambda path: (path / latents.MANIFEST).unlink(), "cache of latents is not there .*--mode=prepare"),
    (lambda path: (path / latents.MANIFEST).write_text("{"), "manifest.json: not readable as JSON"),
    (lambda path: (path / latents.MANIFEST).write_text("[]"), "lacks source, options"),
    (lambda path: edit_manifest(path, version=2), "version 2 .*only version 1 .*run --mode=prepare"),
    (lambda path: edit_manifest(path, num_classes=3), "labels 0..4, but num_classes = 3 has 0..2"),
    (lambda path: (path / SHARD).unlink(), f"{SHARD} is missing"),
    (lambda path: (path / SHARD).write_bytes(b""), f"{SHARD}: 0 bytes, but manifest.json has"),
    (lambda path: flip_a_bit(path / SHARD), f"{SHARD}: its SHA-256 is not that of manifest.json"),
  ],
)
def test_a_damaged_cache_is_named(tmp_path, damage, message):
  write_cache(tmp_path)
  damage(tmp_path)
  with pytest.raises(ValueError, match=message):
    latents.Latents(str(tmp_path), verify=True)


def test_a_flipped_bit_is_noticed_while_reading(tmp_path):
  write_cache(tmp_path)
  flip_a_bit(tmp_path / SHARD)
  read = latents.Latents(str(tmp_path))  # its size is right
  with pytest.raises(ValueError, match="cannot be read .*the cache is damaged, copy it again"):
    [read[i] for i in range(len(read))]


def test_buckets_must_be_mounted(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match="gs://bucket/latents: .*mount the bucket"):
    latents.Latents("gs://bucket/latents")
  with pytest.raises(ValueError, match="gs://bucket/latents: .*mount the bucket"):
    write_cache("gs://bucket/latents")
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"dtype": "float32"}, "prepare.dtype = 'float32' must be one of float16, bfloat16"),
    ({"images_per_shard": 0}, "prepare.images_per_shard = 0 must be at least 1"),
  ],
)
def test_impossible_settings_are_refused_before_anything_is_written(changes, message):
  with pytest.raises(ValueError, match=message):
    settings_of(numbered(), **changes)


MANY = """
import resource, sys
from eqm_jax.data import latents

resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]), int(sys.argv[3])))
read = latents.Latents(sys.argv[1])
print(sum(read[i]["label"] for i in range(len(read))), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


def test_more_shards_than_files_may_be_open(tmp_path):
  write_cache(tmp_path, numbered(120), images_per_shard=1)

  assert run_python("-c", MANY, tmp_path, 100, 1000).stdout.split() == ["240", "376"]
  refused = run_python("-c", MANY, tmp_path, 100, 300, status=1)
  assert "need 376 open files, but 300 are allowed" in refused.stderr


def test_latents_beyond_the_format_are_refused(tmp_path):
  def huge(images):
    return tuple(1e6 * moment for moment in encode(images))

  with pytest.raises(ValueError, match="not finite in float16: .*bfloat16"), np.errstate(over="ignore"):
    encode_latents.write(str(tmp_path), numbered(), huge, settings_of(numbered()), **WRITE)
  encode_latents.write(str(tmp_path / "b"), numbered(), huge, settings_of(numbered(), dtype="bfloat16"), **WRITE)


def test_a_disk_without_room_is_refused_before_anything_is_encoded(tmp_path):
  settings = dataclasses.replace(settings_of(numbered()), images=10**12, images_per_shard=10**9)
  with pytest.raises(ValueError, match=r"needs \d+\.\d\d GB more, but the disk has"):
    encode_latents.write(str(tmp_path), numbered(), encode, settings, **WRITE)


FULL = """
import resource, signal, sys
from test_latents import WRITE, encode, numbered, settings_of
from eqm_jax.data import encode_latents

source = numbered(64, size=64)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
encode_latents.write(sys.argv[1], source, encode, settings_of(source, images_per_shard=32), **WRITE)
"""


def test_a_disk_that_fills_up_while_writing_is_an_error_and_leaves_no_shard_that_looks_complete(tmp_path):
  """A limit on the size of files fails as a full disk does: in the middle of a write."""
  failed = run_python("-c", FULL, tmp_path, 400_000, status=None)
  assert failed.returncode != 0 and "OSError" in failed.stderr and "array_record.partial" in failed.stderr
  assert set(files(tmp_path)) == {latents.SETTINGS}
  assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
  source = numbered(64, size=64)  # with room again it continues
  assert encode_latents.write(str(tmp_path), source, encode, settings_of(source, images_per_shard=32), **WRITE) == 64
