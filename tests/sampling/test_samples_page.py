import re

import numpy as np
import pytest
from conftest import in_browser, needs_browser

from eqm_jax import Status
from eqm_jax.sampling import labels, samples_page


def write(path, *, count=12, size=8, **changes):
  rng = np.random.default_rng(0)
  arrays = {
    "label_N": np.arange(count) % 4,  # the last is the null class
    "nfe_N": rng.permutation(count) + 10,
    "norm_N": rng.uniform(1, 9, count),
    "status_N": np.full(count, Status.CONVERGED),
  }
  images = rng.uniform(-1, 1, (min(count, 10), size, size, 1))
  names = labels.names(3, ["cat", "dog", "<i>bird</i>"])
  samples_page.write(str(path), "Samples: a & b", images, names=names, **arrays | changes)
  return arrays | changes


def test_every_sample_shown_has_its_label_nfe_and_norm(tmp_path):
  arrays = write(tmp_path / "page.html")
  text = (tmp_path / "page.html").read_text()
  captions = re.findall("<figcaption>(.*?)</figcaption>", text)
  assert len(captions) == 10 and "The first 10 of 12 samples" in text and "<h1>Samples: a &amp; b</h1>" in text
  assert captions[0] == f"<b>0 (cat)</b><br>NFE {arrays['nfe_N'][0]}<br>‖f‖ {arrays['norm_N'][0]:.4g}"
  assert "2 (&lt;i&gt;bird&lt;/i&gt;)" in captions[2] and "no class" in captions[3]
  assert "http" not in text, "nothing is fetched"


def test_a_diverged_sample_says_so_and_a_sampler_without_norms_shows_none(tmp_path):
  status, norm = np.full(12, Status.CONVERGED), np.full(12, np.nan)
  status[1] = Status.DIVERGED
  write(tmp_path / "page.html", status_N=status)
  text = (tmp_path / "page.html").read_text()
  assert text.count("diverged</span>") == 1 and text.count("‖f‖ ") == 9
  write(tmp_path / "page.html", norm_N=norm)
  text = (tmp_path / "page.html").read_text()
  assert "‖f‖" not in text and 'value="norm"' not in text and "nan" not in text


def test_names_of_labels():
  assert labels.names(2) == ["class 0", "class 1", "no class"] and labels.names(0) == ["no class"]
  assert labels.names(2, ["cat", "1"]) == ["0 (cat)", "1 (1)", "no class"]


CLICK = """
  const order = () => [...document.querySelectorAll("#samples figure")].map(one => Number(one.dataset.index));
  const button = value => document.querySelector(`button[value=${value}]`);
  const orders = {};
  for (const key of ["label", "nfe", "norm", "index"]) {
    button(key).click(); orders[key] = order();
    button(key).click(); orders["-" + key] = order();
  }
  button("norm").click();
  return orders;
"""


@needs_browser
@pytest.mark.parametrize("size, dark", [(8, False), (200, True)])
def test_in_a_browser_clicks_sort_the_samples(tmp_path, size, dark):
  status = np.full(12, Status.CONVERGED)
  status[4] = Status.DIVERGED
  norm = np.random.default_rng(1).uniform(1, 9, 12)
  norm[4] = np.nan
  arrays = write(tmp_path / "page.html", size=size, status_N=status, norm_N=norm)
  orders, shot = in_browser(tmp_path / "page.html", CLICK, dark=dark)
  index = np.arange(10)
  for key, values in (("label", arrays["label_N"]), ("nfe", arrays["nfe_N"]), ("norm", norm), ("index", index)):
    values = np.nan_to_num(values[:10].astype(float), nan=np.inf)
    assert orders[key] == np.lexsort((index, values)).tolist(), key
    assert orders["-" + key] == np.lexsort((index, -values)).tolist(), key
  pixels = np.asarray(shot)
  background = pixels[-1, 0].mean()
  assert background < 50 if dark else background > 200
  assert np.unique(pixels[100:400]).size > 200, "the samples are drawn: they have all shades"
