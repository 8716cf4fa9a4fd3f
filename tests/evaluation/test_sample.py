import pytest

from eqm_jax.evaluation.sample import parse_labels


@pytest.mark.parametrize(
  "text, expected",
  [
    ("balanced", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]),
    ("none", [10] * 12),
    ("3", [3] * 12),
    ("1,5,7-9", [1, 5, 7, 8, 9, 1, 5, 7, 8, 9, 1, 5]),
    ("0-1, 10", [0, 1, 10] * 4),
  ],
)
def test_labels(text, expected):
  assert parse_labels("sample.labels", text, 12, 10).tolist() == expected


@pytest.mark.parametrize(
  "text, count, message",
  [
    ("11", 3, r"11\.\.11, but the model knows 0\.\.9"),
    ("5-3", 3, "'5-3' is no label"),
    ("cat", 3, "'cat' is no label"),
    ("-1", 3, "'-1' is no label"),
    ("balanced", 0, "number of samples, 0"),
  ],
)
def test_bad_labels_are_refused(text, count, message):
  with pytest.raises(ValueError, match=message):
    parse_labels("sample.labels", text, count, 10)
