import math
import re

import jax
import pytest

from eqm_jax import checks


def test_values_within_the_bounds_pass():
  checks.at_least("steps", 1, 1)
  checks.in_interval("share", 1.0, 0, 1, open_low=True)
  checks.in_interval("rate", 5e9, 0, math.inf)
  checks.one_of("rule", "gd", ("gd", "nag"))


@pytest.mark.parametrize(
  "check, message",
  [
    (lambda: checks.at_least("steps", 0, 1), "steps = 0 must be at least 1"),
    (lambda: checks.at_least("every", -1, 0, "give None"), "every = -1 must be at least 0: give None"),
    (lambda: checks.at_least("rate", math.nan, 0), "rate = nan must be at least 0"),
    (lambda: checks.at_least("steps", None, 1), "steps = None must be at least 1"),
    (lambda: checks.in_interval("share", None, 0, 1), "share = None must be in [0, 1]"),
    (lambda: checks.in_interval("share", 1.5, 0, 1), "share = 1.5 must be in [0, 1]"),
    (lambda: checks.in_interval("share", 0, 0, 1, open_low=True), "share = 0 must be in (0, 1]"),
    (lambda: checks.in_interval("share", 1, 0, 1, open_high=True, remedy="r"), "share = 1 must be in [0, 1): r"),
    (lambda: checks.in_interval("share", math.nan, 0, 1), "share = nan must be in [0, 1]"),
    (lambda: checks.one_of("rule", "sgd", ("gd", "nag")), "rule = 'sgd' must be one of gd, nag"),
    (lambda: checks.one_of("size", 3, {1: "L"}, "resize"), "size = 3 must be one of 1: resize"),
  ],
)
def test_a_message_has_the_value_what_was_expected_and_a_remedy(check, message):
  with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
    check()


def test_traced_values_pass():
  @jax.jit
  def double(x):
    checks.at_least("x", x, 1)
    checks.in_interval("x", x, 1, 2)
    return 2 * x

  assert double(0.0) == 0
