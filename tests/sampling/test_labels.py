"""The one vocabulary of labels."""

import numpy as np
import pytest

from eqm_jax.sampling import labels


@pytest.mark.parametrize(
  "spec, expected",
  [
    ("balanced", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]),
    ("none", [10] * 12),
    ("3", [3] * 12),
    (3, [3] * 12),
    ("1,5,7-9", [1, 5, 7, 8, 9, 1, 5, 7, 8, 9, 1, 5]),
    ((1, 5, 7), [1, 5, 7] * 4),
    ("0-1, 10", [0, 1, 10] * 4),
  ],
)
def test_labels(spec, expected):
  parsed = labels.parse("sample.labels", spec, 12, 10)
  assert parsed.tolist() == expected and parsed.dtype == np.int32


@pytest.mark.parametrize(
  "spec, num_classes, columns",
  [("balanced", 9, 9), ("balanced", 5, 5), ("balanced", 12, 12), ("balanced", 13, 10), ("balanced", 4, 10)]
  + [("random", 9, 10), ("0,8", 9, 10), ("none", 9, 10)],
)
def test_a_picture_has_a_column_for_each_class_where_labels_take_turns(spec, num_classes, columns):
  assert labels.columns(spec, num_classes) == columns


def test_words_for_labels_have_the_names_of_classes_where_they_say_more():
  assert labels.names(2) == ["class 0", "class 1", "no class"]
  assert labels.names(2, ("0", "1")) == labels.names(2)
  assert labels.names(3, ("0", "10", "Zoë")) == ["0 (0)", "1 (10)", "2 (Zoë)", "no class"]


def test_random_labels_depend_on_the_seed_and_begin_alike():
  few, many = (labels.parse("sample.labels", "random", count, 10, seed=1) for count in (20, 1000))
  np.testing.assert_array_equal(many[:20], few)
  assert set(many) == set(range(10))
  assert not np.array_equal(labels.parse("sample.labels", "random", 20, 10, seed=2), few)


@pytest.mark.parametrize("spec", ["balanced", "random"])
def test_without_classes_there_is_the_null_class_only(spec):
  assert labels.parse("sample.labels", spec, 3, 0).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
  "spec, count, message",
  [
    ("11", 3, r"11\.\.11, but the model"),
    ((3, -1), 3, r"-1\.\.3, but the model"),
    ("5-3", 3, "'5-3' is neither a label nor a range"),
    ("cat", 3, "sample.labels = 'cat': 'cat' is neither a label nor a range"),
    ("-1", 3, "'-1' is neither a label nor a range"),
    ("balanced", 0, "number of samples = 0"),
  ],
)
def test_bad_labels_are_refused(spec, count, message):
  with pytest.raises(ValueError, match=message):
    labels.parse("sample.labels", spec, count, 10)
