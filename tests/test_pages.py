import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from eqm_jax import pages


def test_text_is_escaped_in_every_part():
  parts = [pages.facts({"a < b": "1 & 2"}), pages.text_table(["x > y"], [["<p>"]]), pages.figure("a.png", '"c" < d')]
  text = pages.document("t & t", parts, style="p {}", script="1 < 2;")
  for part in (
    "<title>t &amp; t</title>",
    "a &lt; b",
    "1 &amp; 2",
    "x &gt; y",
    "&lt;p&gt;",
    'alt="&quot;c&quot; &lt; d',
  ):
    assert part in text
  assert "<script>1 < 2;</script>" in text and "p {}</style>" in text


def decoded(source: str) -> tuple[str, Image.Image]:
  kind, content = re.fullmatch("data:image/([a-z]+);base64,(.*)", source).groups()
  return kind, Image.open(io.BytesIO(base64.b64decode(content)))


def test_small_pictures_are_embedded_without_loss_and_photographs_are_made_smaller():
  pixels = np.random.default_rng(0).integers(0, 256, (600, 2000, 3)).astype(np.uint8)
  kind, image = decoded(pages.embedded(Image.fromarray(pixels[:20, :30])))
  assert kind == "png" and (np.asarray(image) == pixels[:20, :30]).all()
  kind, image = decoded(pages.embedded(Image.fromarray(pixels).convert("RGBA")))
  assert kind == "jpeg" and image.size == (1280, 384)


def numbers_of(chart: str, tag: str) -> list[list[float]]:
  return [list(map(float, re.findall(r"-?[\d.]+", path))) for path in re.findall(f'<path {tag}[^>]*d="([^"]*)"', chart)]


def labels_of(chart: str) -> list[str]:
  return re.findall("<text[^>]*>([^<]*)</text>", chart)


def test_a_chart_has_a_point_for_each_value_within_its_frame():
  chart = pages.chart("loss <x>", [10, 20, 30, 40], [1.0, 100.0, None, 10000.0], log=True)
  (curve,) = numbers_of(chart, "stroke-linecap")
  x, y = curve[::2], curve[1::2]
  assert len(x) == 3 and x == sorted(x) and y == sorted(y, reverse=True)
  np.testing.assert_allclose(y[0] - y[1], y[1] - y[2], atol=0.2, err_msg="equal ratios are equally high")
  assert 0 < min(x) and max(x) < pages.WIDTH and 0 < min(y) and max(y) < pages.HEIGHT
  assert labels_of(chart) == ["1", "10", "100", "1000", "10000", "10", "20", "30", "40"]
  assert "loss &lt;x&gt;: 10000 at 40" in chart


@pytest.mark.parametrize(
  "y, log, labels",
  [
    ([0.0, 1.0], True, ["0", "0.2", "0.4", "0.6", "0.8", "1"]),  # no logarithm of zero
    ([20.0, 50.0], True, ["20", "30", "40", "50"]),  # too little for decades
    ([1e-8, 1e8], True, ["1e-08", "0.0001", "1", "10000", "1e+08"]),
    ([-2e-3, 2e-3], False, ["-0.002", "-0.001", "0", "0.001", "0.002"]),
    ([7.0, 7.0], False, ["7"]),
    ([7.0, 7.0], True, ["7"]),
  ],
)
def test_axes_have_round_numbers(y, log, labels):
  assert labels_of(pages.chart("", [0, 1], y, log=log))[: len(labels)] == labels


def test_a_single_value_is_a_dot_and_none_is_said():
  assert re.search(r'd="M[\d.]+ [\d.]+h0"', pages.chart("loss", [1], [2.0]))
  assert "loss: no finite value" in pages.chart("loss", [1, 2], [None, np.inf])


def test_many_values_are_a_curve_of_means_and_their_range():
  values = np.where(np.arange(100_000) % 1000 == 500, 50.0, 1.0)
  chart = pages.chart("loss", np.arange(100_000), values)
  (curve,), (extent,) = numbers_of(chart, "stroke-linecap"), numbers_of(chart, 'class="range"')
  assert len(curve) == 2 * pages.MAX_POINTS and len(extent) == 4 * pages.MAX_POINTS
  assert min(extent[1::2]) == pages.TOP < min(curve[1::2]), "a rare peak is seen"
