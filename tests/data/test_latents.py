"""The cache of latents: what is written is read; killed, shared, damaged and foreign ones."""

import dataclasses
import json
import os
import resource
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from conftest import ROOT

from eqm_jax.data import encoding, latents
from eqm_jax.data.images import DamagedImage
from eqm_jax.data.samples import Images

SCALE = 0.5
IDENTITY = {"name": "ema", "sha256": "ab12", "scaling_factor": SCALE}
WRITE = dict(batch_size=2, threads=2)


def numbered(count: int = 10, size: int = 4) -> Images:
  """Images whose every pixel tells their number and column."""
  images = np.zeros((count, size, size, 3), np.float32)
  images += np.arange(count)[:, None, None, None] / 16 + np.arange(size)[None, None, :, None] / 256
  return Images(images, np.arange(count) % 5, num_classes=5)


def encode(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Stands for an autoencoder: keeps every second pixel."""
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
      **dict(latent_shape=(H // 2, W // 2, C), dtype="float16", images_per_shard=3, autoencoder=IDENTITY),
      **changes,
    }
  )


def write_cache(path, source=None, **changes) -> latents.Settings:
  """A finished cache."""
  source = source or numbered()
  settings = settings_of(source, **changes)
  encoding.write(str(path), source, encode, settings, **WRITE)
  encoding.finish(str(path), settings)
  return settings


def files(path) -> dict[str, bytes]:
  return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_what_was_encoded_is_read_as_a_scaled_distribution(tmp_path, dtype):
  source = numbered()
  write_cache(tmp_path / "cache", source, dtype=dtype)
  read = latents.Latents(str(tmp_path / "cache"), verify=True)
  assert len(read) == 10 and read.shape == (2, 2, 3) and read.num_classes == 5 and read.autoencoder == IDENTITY
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


def test_processes_share_the_shards_and_make_the_same_cache(tmp_path):
  source = numbered()
  settings = write_cache(tmp_path / "one", source)
  counts = []
  for process in (1, 0):  # in any order
    with pytest.raises(ValueError, match="is not finished: run the preparation again"):
      encoding.finish(str(tmp_path / "two"), settings)
    counts.append(
      encoding.write(str(tmp_path / "two"), source, encode, settings, **WRITE, process_index=process, process_count=2)
    )
  encoding.finish(str(tmp_path / "two"), settings)
  assert counts == [4, 6] and files(tmp_path / "one") == files(tmp_path / "two")


class Failing:
  """A source that dies at one image."""

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
from eqm_jax.data import encoding

calls = []
def dies(images):
  calls.append(1)
  if len(calls) == 4:  # in the middle of the second shard
    os.kill(os.getpid(), 9)
  return encode(images)

encoding.write(sys.argv[1], numbered(), dies, settings_of(numbered()), **WRITE)
"""


def test_killed_and_started_again_it_goes_on_and_ends_with_the_same_bits(tmp_path):
  settings = write_cache(tmp_path / "whole")
  path = tmp_path / "killed"
  environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'tests' / 'data'}"}
  assert subprocess.run([sys.executable, "-c", KILLED, str(path)], env=environment, timeout=120).returncode == -9
  left = set(files(path))
  assert "latents-00000-of-00004.array_record.json" in left and "latents-00001-of-00004.array_record" not in left
  assert not latents.is_finished(str(path))
  with pytest.raises(ValueError, match="was begun and not finished"):
    latents.Latents(str(path))
  assert encoding.write(str(path), numbered(), encode, settings, **WRITE) == 7  # not the three of the first shard
  encoding.finish(str(path), settings)
  assert files(path) == files(tmp_path / "whole")
  assert encoding.write(str(path), numbered(), encode, settings, **WRITE) == 0  # nothing is left to do


def test_a_shard_that_was_cut_off_is_made_again(tmp_path):
  settings = settings_of(numbered())
  encoding.write(str(tmp_path), numbered(), encode, settings, **WRITE)
  shard = tmp_path / "latents-00002-of-00004.array_record"
  shard.write_bytes(shard.read_bytes()[:-1])
  assert encoding.write(str(tmp_path), numbered(), encode, settings, **WRITE) == 3


def test_a_damaged_image_ends_it_by_name_or_is_left_out_and_counted(tmp_path):
  source = Failing(numbered(), 7, DamagedImage("cat.jpg: not a whole image"))
  settings = settings_of(numbered())
  with pytest.raises(ValueError, match=r"cat.jpg: not a whole image\. Mend it, .*skip_damaged"):
    encoding.write(str(tmp_path), source, encode, settings, **WRITE)
  assert len([name for name in files(tmp_path) if name.endswith(".array_record")]) == 2  # what was good is kept
  encoding.write(str(tmp_path), source, encode, settings, **WRITE, skip_damaged=True)
  manifest = encoding.finish(str(tmp_path), settings)
  assert manifest["records"] == 9 and [shard["skipped"] for shard in manifest["shards"]][2] == [
    "cat.jpg: not a whole image"
  ]
  read = latents.Latents(str(tmp_path))
  np.testing.assert_array_equal(read.labels, np.delete(np.arange(10) % 5, 7))
  np.testing.assert_allclose([read[i]["mean"][0, 0, 0, 0] * 32 for i in range(9)], np.delete(np.arange(10), 7))


@pytest.mark.parametrize("error", [OSError("cat.jpg: the network disk is gone"), RuntimeError("memory is gone")])
def test_other_errors_are_no_damaged_images(tmp_path, error):
  source = Failing(numbered(), 7, error)
  with pytest.raises(type(error), match="is gone"):
    encoding.write(str(tmp_path), source, encode, settings_of(numbered()), **WRITE, skip_damaged=True)


def test_nothing_but_damaged_images_is_no_cache(tmp_path):
  settings = settings_of(numbered(2))

  class Damaged(Images):
    def __getitem__(self, index):
      raise DamagedImage(f"{index}.jpg: not a whole image")

  source = Damaged(numbered(2).images, np.zeros(2, int), 5)
  encoding.write(str(tmp_path), source, encode, settings, **WRITE, skip_damaged=True)
  with pytest.raises(ValueError, match="all 2 images are damaged, the first: 0.jpg"):
    encoding.finish(str(tmp_path), settings)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"autoencoder": {**IDENTITY, "name": "mse"}}, "autoencoder: .*'ema'.* there, .*'mse'.* wanted"),
    ({"image_size": 8}, "image_size: 4 there, 8 wanted"),
    ({"contents": "c1"}, "contents: 'c0' there, 'c1' wanted"),
    ({"dtype": "bfloat16"}, "dtype: 'float16' there"),
    ({"images_per_shard": 5}, "images_per_shard: 3 there, 5 wanted"),
  ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_a_directory_of_other_latents_is_refused(tmp_path, changes, message, finished):
  settings = settings_of(numbered())
  encoding.write(str(tmp_path), numbered(), encode, settings, **WRITE)
  if finished:
    encoding.finish(str(tmp_path), settings)
  before = files(tmp_path)
  with pytest.raises(ValueError, match=message):
    encoding.write(str(tmp_path), numbered(), encode, dataclasses.replace(settings, **changes), **WRITE)
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
    (lambda path: edit_manifest(path, version=2), "version 2 .*only version 1"),
    (lambda path: edit_manifest(path, num_classes=3), "labels 0..4, but num_classes = 3"),
    (lambda path: (path / SHARD).unlink(), f"{SHARD} is missing"),
    (lambda path: (path / SHARD).write_bytes(b""), f"{SHARD}: 0 bytes, but manifest.json says"),
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
  with pytest.raises(ValueError, match="cannot be read .*the cache is damaged"):
    [read[i] for i in range(len(read))]


def test_buckets_must_be_mounted(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match="gs://bucket/latents: .*mount the bucket"):
    latents.Latents("gs://bucket/latents")
  with pytest.raises(ValueError, match="gs://bucket/latents: .*mount the bucket"):
    write_cache("gs://bucket/latents")
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("changes", [{"dtype": "float32"}, {"images_per_shard": 0}])
def test_settings_that_cannot_be_are_refused_before_anything_is_written(changes):
  with pytest.raises(ValueError, match="prepare.dtype = .* must be one of float16, bfloat16"):
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

  def read(soft: int, hard: int):
    command = [sys.executable, "-c", MANY, str(tmp_path), str(soft), str(hard)]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)

  assert read(100, 1000).stdout.split() == ["240", "376"]
  refused = read(100, 300)
  assert refused.returncode == 1 and "need 376 open files, but 300 are allowed" in refused.stderr


def test_latents_beyond_the_format_are_refused(tmp_path):
  def huge(images):
    return tuple(1e6 * moment for moment in encode(images))

  with pytest.raises(ValueError, match="not finite in float16: .*bfloat16"), np.errstate(over="ignore"):
    encoding.write(str(tmp_path), numbered(), huge, settings_of(numbered()), **WRITE)
  encoding.write(str(tmp_path / "b"), numbered(), huge, settings_of(numbered(), dtype="bfloat16"), **WRITE)


def test_a_disk_without_room_is_told_before_anything_is_encoded(tmp_path):
  settings = dataclasses.replace(settings_of(numbered()), images=10**12, images_per_shard=10**9)
  with pytest.raises(ValueError, match=r"needs \d+\.\d\d GB more, but the disk has"):
    encoding.write(str(tmp_path), numbered(), encode, settings, **WRITE)


FULL = """
import resource, signal, sys
from test_latents import WRITE, encode, numbered, settings_of
from eqm_jax.data import encoding

source = numbered(64, size=64)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
encoding.write(sys.argv[1], source, encode, settings_of(source, images_per_shard=32), **WRITE)
"""


def test_a_disk_that_fills_up_while_writing_is_told_and_leaves_nothing_that_looks_whole(tmp_path):
  """A limit on the size of files fails as a full disk does: in the middle of a write."""
  environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'tests' / 'data'}"}
  command = [sys.executable, "-c", FULL, str(tmp_path), str(400_000)]
  ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
  assert ended.returncode != 0 and "OSError" in ended.stderr and "array_record.partial" in ended.stderr
  assert set(files(tmp_path)) == {latents.SETTINGS}
  assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
  source = numbered(64, size=64)  # with room again it goes on
  assert encoding.write(str(tmp_path), source, encode, settings_of(source, images_per_shard=32), **WRITE) == 64
