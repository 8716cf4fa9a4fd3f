"""An endless stream of shuffled batches of a data set, with a position that can be saved."""

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from typing import Any

import absl.flags
import grain
import numpy as np

from eqm_jax.data.latents import Latents
from eqm_jax.data.samples import Images, Sample, Source

CLOSE_SECONDS = 5.0  # for the samples that are being read when a stream is closed

log = logging.getLogger(__name__)


def batches(
  source: Source,
  *,
  batch_size: int,
  seed: int,
  flip: bool,
  threads: int,
  workers: int = 0,
  rows: Sequence[int] | None = None,
  place: Callable[[Any], Any] | None = None,
) -> grain.DatasetIterator:
  """Shuffled batches without end, each epoch in its own order.

  Epochs follow each other without a gap, so a batch may hold the end of one and the beginning of the next: no sample is
  dropped, and no batch is small. A process reads the rows of the global batch that its devices hold, so the global
  batches depend neither on processes nor on devices, and a saved position can be continued on others.

  Args:
    source: the data set.
    batch_size: the global batch size.
    seed: fixes order and flips.
    flip: mirrors half of the samples, at random.
    threads: how many threads read ahead, in each worker.
    workers: how many processes read; 0: this one, which is enough unless Python itself is busy. A saved position
      belongs to its number of workers.
    rows: the rows of the global batch that this process reads, ascending; None: all of them.
    place: brings a batch to the devices; called ahead of time, in a thread.

  Returns:
    A grain iterator over dicts of arrays with a leading axis of len(rows), for `close` at the end; its position, the
    same on every process, is saved with the checkpoints.

  Raises:
    ValueError: while it runs, for a damaged image or a label outside the classes, naming the sample.
  """
  order = grain.MapDataset.range(len(source)).seed(seed).shuffle()
  rows = range(batch_size) if rows is None else rows
  if isinstance(source, Images) and not flip:  # calls for single samples would take longer than the copy
    data = grain.MapDataset.source(_Gathered(order.repeat(), source, batch_size, rows))
  else:
    reader = _Reader(source, flip)
    # A random generator for each sample costs more than reading a small image.
    data = (order.random_map(reader) if flip else order.map(reader)).repeat()
    # An endless stream has no remainder; grain's length of one that keeps it overflows.
    data = grain.MapDataset.source(_Rows(data, batch_size, rows)).batch(len(rows), drop_remainder=True)
  stream = data.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * threads))
  if workers:
    if not absl.flags.FLAGS.is_parsed():  # in a notebook or a library; grain reads one of its own flags
      absl.flags.FLAGS.mark_as_parsed()
    stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers), _begin_worker)
  if place is not None:
    stream = grain.experimental.ThreadPrefetchIterDataset(stream.map(place), prefetch_buffer_size=2)
  return iter(stream)


def close(stream: grain.DatasetIterator):
  """Ends the threads and processes of a stream, but does not wait for long while they read."""

  def end():
    with contextlib.suppress(Exception):  # of a thread of grain that ends at the same moment
      stream.close()

  closing = threading.Thread(target=end, name="closing", daemon=True)
  closing.start()
  closing.join(CLOSE_SECONDS)
  if closing.is_alive():
    log.warning("the data set is still reading a sample: not waiting for it")


def _begin_worker(index: int, count: int):
  """Leaves signals to the process that this one reads for, which may have to save first, and ends with it."""
  del index, count
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
  threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
  multiprocessing.parent_process().join()
  os._exit(1)


class _Rows:
  """Some rows of every batch of an endless stream."""

  def __init__(self, stream: grain.MapDataset, batch_size: int, rows: Sequence[int]):
    self._stream = stream
    self._batch_size = batch_size
    self._rows = [int(row) for row in rows]

  def __len__(self):
    return len(self._stream) // self._batch_size * len(self._rows)

  def __getitem__(self, index: int) -> Sample:
    batch, row = divmod(index, len(self._rows))
    return self._stream[batch * self._batch_size + self._rows[row]]


class _Gathered:
  """Some rows of every batch of an endless stream of indices, gathered from images in memory."""

  def __init__(self, order: grain.MapDataset, source: Images, batch_size: int, rows: Sequence[int]):
    self._order = order
    self._source = source
    self._batch_size = batch_size
    self._rows = [int(row) for row in rows]

  def __len__(self):
    return len(self._order) // self._batch_size

  def __getitem__(self, index: int) -> Sample:
    indices = [self._order[index * self._batch_size + row] for row in self._rows]
    return {"image": self._source.images[indices], "label": self._source.labels[indices]}


class _Reader:
  """Maps an index to a sample, mirrored at random with `flip`."""

  def __init__(self, source: Source, flip: bool):
    self._source, self._flip = source, flip

  def __call__(self, index: int, rng: np.random.Generator | None = None) -> Sample:
    mirror = self._flip and bool(rng.integers(2))
    try:
      sample = self._read(index, mirror)
    except Exception:
      raise
    except BaseException as error:  # would end a thread of grain unheard, and the run would wait for ever
      raise RuntimeError(f"sample {index}: {type(error).__name__}: {error}") from error
    if not 0 <= sample["label"] < self._source.num_classes:
      raise ValueError(
        f"sample {index} has label {sample['label']}, but num_classes = {self._source.num_classes}: "
        "labels are 0..num_classes − 1"
      )
    return sample

  def _read(self, index: int, mirror: bool) -> Sample:
    if isinstance(self._source, Latents):  # both sides were encoded
      return self._source.side(index, int(mirror))
    sample = self._source[index]
    return {**sample, "image": sample["image"][:, ::-1]} if mirror else sample
