import collections
import json
import os
import pathlib
import signal
import threading
import time

import numpy as np
import pytest
from conftest import start_python
from test_latents import write_cache

from eqm_jax.data import latents, pipeline, samples


def numbered(count: int) -> samples.Images:
  """Images whose left column and label are their number."""
  images = np.zeros((count, 2, 2, 1), np.float32)
  images[:, :, 0, 0] = np.arange(count)[:, None]
  return samples.Images(images, np.arange(count), num_classes=count)


def labels(iterator, steps: int) -> np.ndarray:
  return np.stack([next(iterator)["label"] for _ in range(steps)])


OPTIONS = dict(batch_size=4, seed=0, flip=False, threads=2)


def share(process: int, count: int) -> range:
  """The rows of a batch of four that one of several processes reads."""
  return range(4)[process * 4 // count : (process + 1) * 4 // count]


def test_every_epoch_has_every_sample_once_in_an_order_of_its_own():
  seen = labels(pipeline.batches(numbered(10), **OPTIONS), 10).reshape(4, 10)  # batches run over the ends of epochs
  for epoch in seen:
    assert sorted(epoch) == list(range(10))
  assert len({tuple(epoch) for epoch in seen}) == 4


def test_the_seed_fixes_the_order():
  first, again = (labels(pipeline.batches(numbered(10), **OPTIONS), 5) for _ in range(2))
  other = labels(pipeline.batches(numbered(10), **{**OPTIONS, "seed": 1}), 5)
  np.testing.assert_array_equal(first, again)
  assert not np.array_equal(first, other)


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_same_global_batches(count):
  whole = labels(pipeline.batches(numbered(10), **OPTIONS), 7)
  parts = [labels(pipeline.batches(numbered(10), **OPTIONS, rows=share(p, count)), 7) for p in range(count)]
  np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


class OneByOne:
  """The images of another source, which cannot be gathered as one array."""

  def __init__(self, source: samples.Images):
    self._source, self.num_classes = source, source.num_classes

  def __len__(self):
    return len(self._source)

  def __getitem__(self, index: int):
    return self._source[index]


@pytest.mark.parametrize("rows", [None, [0, 3]])
def test_images_in_memory_give_the_batches_and_positions_that_reading_one_by_one_gives(rows):
  gathered = pipeline.batches(numbered(10), **OPTIONS, rows=rows)
  read = pipeline.batches(OneByOne(numbered(10)), **OPTIONS, rows=rows)
  for _ in range(7):
    batch, expected = next(gathered), next(read)
    for key in ("image", "label"):
      np.testing.assert_array_equal(batch[key], expected[key])
      assert batch[key].dtype == expected[key].dtype
    assert gathered.get_state() == read.get_state()


def test_rows_need_be_no_range():
  whole = labels(pipeline.batches(numbered(10), **OPTIONS), 7)
  for rows in ([0, 3], [1, 2], [1, 2, 3]):
    np.testing.assert_array_equal(labels(pipeline.batches(numbered(10), **OPTIONS, rows=rows), 7), whole[:, rows])


def test_a_saved_position_continues_in_the_middle_of_an_epoch():
  iterator = pipeline.batches(numbered(10), **{**OPTIONS, "flip": True})
  for _ in range(3):
    next(iterator)
  position = iterator.get_state()
  expected = [next(iterator)["image"] for _ in range(4)]
  other = pipeline.batches(numbered(10), **{**OPTIONS, "flip": True})
  other.set_state(position)
  np.testing.assert_array_equal([next(other)["image"] for _ in range(4)], expected)


def test_half_of_the_images_are_mirrored():
  iterator = pipeline.batches(numbered(50), **{**OPTIONS, "flip": True})
  images = np.concatenate([next(iterator)["image"] for _ in range(100)])
  mirrored = np.mean(images[:, 0, 1, 0] > 0)
  assert 0.4 < mirrored < 0.6
  unmirrored = next(pipeline.batches(numbered(50), **OPTIONS))
  np.testing.assert_array_equal(unmirrored["image"][:, 0, 0, 0], unmirrored["label"])


@pytest.mark.parametrize("before, after", [(1, 4), (4, 2)])
def test_another_number_of_processes_continues_in_the_middle_of_an_epoch(before, after):
  def streams(count):
    return [pipeline.batches(numbered(10), **OPTIONS, rows=share(p, count)) for p in range(count)]

  whole = labels(pipeline.batches(numbered(10), **OPTIONS), 8)
  first = streams(before)
  for stream in first:
    labels(stream, 3)
  positions = [stream.get_state() for stream in first]
  assert all(position == positions[0] for position in positions)
  second = streams(after)
  for stream in second:
    stream.set_state(positions[0])
  np.testing.assert_array_equal(np.concatenate([labels(stream, 5) for stream in second], axis=1), whole[3:])


def test_batches_are_placed_ahead_and_the_position_is_that_of_the_last_batch_taken():
  placed = []

  def place(batch):
    placed.append(1)
    return {**batch, "label": -batch["label"]}

  whole = labels(pipeline.batches(numbered(10), **OPTIONS), 8)
  iterator = pipeline.batches(numbered(10), **OPTIONS, place=place)
  np.testing.assert_array_equal(labels(iterator, 3), -whole[:3])
  position = json.loads(json.dumps(iterator.get_state()))  # it is saved as JSON
  other = pipeline.batches(numbered(10), **OPTIONS, place=place)
  other.set_state(position)
  np.testing.assert_array_equal(labels(other, 5), -whole[3:])
  assert len(placed) > 8


def test_moments_come_from_either_side(tmp_path):
  write_cache(tmp_path)
  source = latents.Latents(str(tmp_path))
  sides = collections.Counter()
  iterator = pipeline.batches(source, **{**OPTIONS, "flip": True})
  positions = {source[i]["mean"][side].tobytes(): (i, side) for i in range(len(source)) for side in range(2)}
  for _ in range(20):
    batch = next(iterator)
    for mean, logvar, label in zip(batch["mean"], batch["logvar"], batch["label"]):
      index, side = positions[mean.tobytes()]
      np.testing.assert_array_equal(logvar, source[index]["logvar"][side])
      assert label == source.labels[index]
      sides[side] += 1
  assert min(sides.values()) > 20
  batch = next(pipeline.batches(source, **OPTIONS))
  assert all(positions[mean.tobytes()][1] == 0 for mean in batch["mean"])


def test_labels_outside_the_classes_are_refused():
  source = OneByOne(numbered(10))
  source.num_classes = 9  # as of a data set whose labels were not read before
  with pytest.raises(ValueError, match="sample 9 has label 9, but num_classes = 9: labels are 0"):
    labels(pipeline.batches(source, **OPTIONS), 5)


@pytest.mark.slow  # starts processes
def test_workers_read_the_same_batches_and_continue_from_their_position():
  iterator = pipeline.batches(numbered(10), **OPTIONS, workers=2)
  again = pipeline.batches(numbered(10), **OPTIONS, workers=2)
  first = labels(iterator, 3)
  position = iterator.get_state()
  rest = labels(iterator, 6)
  again.set_state(position)
  np.testing.assert_array_equal(labels(again, 6), rest)
  seen = np.concatenate([first, rest]).reshape(-1)
  assert sorted(seen[:10]) == list(range(10))


class Reading(OneByOne):
  """The images of another source, each after a call of `before`."""

  def __init__(self, source: samples.Images, before):
    super().__init__(source)
    self._before = before

  def __getitem__(self, index: int):
    self._before()
    return super().__getitem__(index)


def threads() -> set[str]:
  return {thread.name for thread in threading.enumerate() if thread.name.startswith(("grain", "closing"))}


def wait_until(condition):
  begin = time.monotonic()
  while not condition():
    assert time.monotonic() - begin < 60
    time.sleep(0.01)


def test_a_closed_stream_leaves_no_thread():
  before = threads()
  stream = pipeline.batches(numbered(10), **OPTIONS, place=lambda batch: batch)
  next(stream)
  assert threads() - before
  pipeline.close(stream)
  pipeline.close(stream)
  wait_until(lambda: not threads() - before)


def test_a_sample_that_takes_long_does_not_delay_the_end(monkeypatch, caplog):
  monkeypatch.setattr(pipeline, "CLOSE_SECONDS", 0.05)
  go_on, stuck = threading.Event(), threading.Event()
  go_on.set()

  def read():
    if not go_on.is_set():
      stuck.set()
    go_on.wait()

  stream = pipeline.batches(Reading(numbered(10), read), **OPTIONS, place=lambda batch: batch)
  next(stream)
  go_on.clear()
  for _ in range(20):  # until the batches that were read ahead are taken
    if stuck.wait(0.05):
      break
    next(stream)
  pipeline.close(stream)
  assert "still reading a sample" in caplog.text
  go_on.set()
  wait_until(lambda: "closing" not in threads())


@pytest.mark.parametrize("error", [OSError("gone"), SystemExit(3), KeyboardInterrupt()])
def test_whatever_a_data_set_raises_arrives(error):
  """Grain's threads pass exceptions on, but end silently with what is none, and the run would wait for ever."""

  def read():
    raise error

  stream = pipeline.batches(Reading(numbered(10), read), **OPTIONS, place=lambda batch: batch)
  with pytest.raises((OSError, RuntimeError), match="gone|SystemExit: 3|KeyboardInterrupt"):
    next(stream)
  pipeline.close(stream)


# Prints the processes that read, and goes on until it is killed.
READS = """
import multiprocessing, sys, time
import numpy as np
from eqm_jax.data import pipeline, samples
if __name__ == "__main__":
  source = samples.Images(np.zeros((10, 2, 2, 1), np.float32), np.zeros(10, int), num_classes=1)
  stream = pipeline.batches(source, batch_size=4, seed=0, flip=True, threads=1, workers=2)
  for _ in range(4):  # of both
    next(stream)
  print(*(child.pid for child in multiprocessing.active_children()), flush=True)
  while True:
    next(stream)
"""


@pytest.mark.slow
def test_processes_that_read_ignore_signals_and_end_with_the_one_they_read_for(tmp_path):
  (tmp_path / "reads.py").write_text(READS)
  (reading,) = start_python(tmp_path / "reads.py")
  workers = [int(word) for word in reading.stdout.readline().split()]
  assert len(workers) == 2
  for number in (signal.SIGTERM, signal.SIGINT):
    for worker in workers:
      os.kill(worker, number)
  time.sleep(0.5)
  assert all(is_alive(worker) for worker in workers) and reading.poll() is None
  reading.kill()
  wait_until(lambda: not any(is_alive(worker) for worker in workers))


def is_alive(process_id: int) -> bool:
  try:
    return pathlib.Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
  except FileNotFoundError:
    return False
