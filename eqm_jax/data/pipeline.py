"""From a source to an endless stream of batches, with a position that can be saved."""

import grain
import numpy as np

from eqm_jax.data.sources import Sample, Source


def batches(
  source: Source,
  *,
  batch_size: int,
  seed: int,
  flip: bool,
  threads: int,
  process_index: int = 0,
  process_count: int = 1,
) -> grain.DatasetIterator:
  """Shuffled batches without end, each epoch in an order of its own.

  Epochs follow each other without a gap, so a batch may hold the end of one and the
  beginning of the next: no sample is dropped. Process p of n gets the p-th n-th of
  every batch, so the global batches do not depend on the number of processes.

  Args:
    source: the data set.
    batch_size: the global batch size.
    seed: fixes order and flips.
    flip: mirror half of the samples, at random.
    threads: how many threads read ahead.

  Returns:
    A grain iterator over dicts of arrays with a leading axis of
    batch_size / process_count; its position is saved with the checkpoints.

  Raises:
    ValueError: if the processes do not divide the batch, or `flip` is asked of
      moments that were cached without their mirror image.
  """
  if batch_size % process_count:
    raise ValueError(f"batch size {batch_size} does not divide over {process_count} processes")
  if flip and "image" not in source[0] and source[0]["mean"].ndim == 3:
    raise ValueError("data.flip = True, but the cached moments are of one side only: [N, 2, H, W, C] holds both")
  data = grain.MapDataset.source(source).seed(seed).shuffle().random_map(_mirrored if flip else _unmirrored)
  # An endless stream has no remainder; grain's length of one that keeps it overflows.
  data = data.repeat().batch(batch_size // process_count, drop_remainder=True)[process_index::process_count]
  return iter(data.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * threads)))


def _mirrored(sample: Sample, rng: np.random.Generator) -> Sample:
  mirror = bool(rng.integers(2))
  if "image" in sample:
    return {**sample, "image": sample["image"][:, ::-1] if mirror else sample["image"]}
  return _side(sample, int(mirror))


def _unmirrored(sample: Sample, rng: np.random.Generator) -> Sample:
  del rng
  return sample if "image" in sample else _side(sample, 0)


def _side(sample: Sample, side: int) -> Sample:
  """One side of moments that have both; others as they are."""
  if sample["mean"].ndim == 3:
    return sample
  return {**sample, "mean": sample["mean"][side], "logvar": sample["logvar"][side]}
