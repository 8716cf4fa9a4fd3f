import collections

import numpy as np
import pytest
from test_sources import write_latents

from eqm_jax.data import pipeline, sources


def numbered(count: int) -> sources.Images:
  """Images whose left column and label tell their number."""
  images = np.zeros((count, 2, 2, 1), np.float32)
  images[:, :, 0, 0] = np.arange(count)[:, None]
  return sources.Images(images, np.arange(count), num_classes=count)


def labels(iterator, steps: int) -> np.ndarray:
  return np.stack([next(iterator)["label"] for _ in range(steps)])


OPTIONS = dict(batch_size=4, seed=0, flip=False, threads=2)


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
  parts = [
    labels(pipeline.batches(numbered(10), **OPTIONS, process_index=p, process_count=count), 7) for p in range(count)
  ]
  np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


def test_a_saved_position_goes_on_in_the_middle_of_an_epoch():
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


def test_moments_come_from_either_side(tmp_path):
  source = sources.open_source("latents", write_latents(tmp_path))
  sides = collections.Counter()
  iterator = pipeline.batches(source, **{**OPTIONS, "flip": True})
  for _ in range(20):
    batch = next(iterator)
    for mean, logvar, label in zip(batch["mean"], batch["logvar"], batch["label"]):
      side = [np.array_equal(mean, source[label]["mean"][s]) for s in range(2)].index(True)
      np.testing.assert_array_equal(logvar, source[label]["logvar"][side])
      sides[side] += 1
  assert min(sides.values()) > 20
  batch = next(pipeline.batches(source, **OPTIONS))
  np.testing.assert_array_equal(batch["mean"][0], source[batch["label"][0]]["mean"][0])


def test_what_cannot_be_is_refused(tmp_path):
  with pytest.raises(ValueError, match="batch size 4 does not divide over 3 processes"):
    pipeline.batches(numbered(10), **OPTIONS, process_count=3)
  one_side = sources.open_source("latents", write_latents(tmp_path, shape=(6, 4, 4, 4)))
  assert next(pipeline.batches(one_side, **OPTIONS))["mean"].shape == (4, 4, 4, 4)
  with pytest.raises(ValueError, match="one side only"):
    pipeline.batches(one_side, **{**OPTIONS, "flip": True})
