"""Loading files of the FID's Inception, and the errors for other files."""

import hashlib
import json
import logging
import re
import runpy

import jax
import numpy as np
import pytest
from conftest import ROOT, legacy_file, legacy_state_dict, legacy_tensor

from eqm_jax.checkpoints import inception as convert
from eqm_jax.networks import inception

DIRECTORY = ROOT / "tests" / "reference" / "inception"
SHAPES = {name: tuple(shape) for name, shape in json.loads((DIRECTORY / "names_and_shapes.json").read_text())}
VALUES = np.linspace(0.5, 1.5, len(SHAPES), dtype=np.float32)  # one for each entry


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
  return runpy.run_path(str(DIRECTORY / "seeded_weights.py"))["seeded_weights"]()


def small_file(without: str | None = None, values: np.ndarray = VALUES) -> bytes:
  """A file with every published name and shape and yet small: each tensor repeats one number."""
  storages = {"1": values, "2": np.array([80_000])}
  tensors = {}
  for i, (name, shape) in enumerate(SHAPES.items()):
    tensors[name] = legacy_tensor(storages, "1", i, shape, (0,) * len(shape))
    if name.endswith("running_var"):
      tensors[name.replace("running_var", "num_batches_tracked")] = legacy_tensor(storages, "2")
  tensors.pop(without, None)
  return legacy_file(legacy_state_dict(tensors), storages)


def test_a_file_gives_the_same_parameters_as_its_arrays(tmp_path, caplog, monkeypatch):
  content = small_file()
  digest = hashlib.sha256(content).hexdigest()
  (tmp_path / "saved-again.pth").write_bytes(content)
  params = convert.load(tmp_path / "saved-again.pth")
  assert f"saved-again.pth: Inception's names and shapes, but SHA-256 {digest}, not the 6726825d" in caplog.text
  arrays = {name: np.full(shape, value) for (name, shape), value in zip(SHAPES.items(), VALUES)}
  expected = convert.load(arrays)
  jax.tree.map(np.testing.assert_array_equal, params, expected)
  assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
  shapes = jax.tree.map(lambda leaf: leaf.shape, inception.parameter_shapes())
  assert jax.tree.map(np.shape, params) == shapes

  caplog.clear()
  monkeypatch.setattr(convert, "PUBLISHED_SHA256", digest)
  convert.load(str(tmp_path / "saved-again.pth"))
  assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_folded_batch_norm_is_the_batch_norm(weights):
  name = "Mixed_6b.branch7x7_2"
  parts = [weights[f"{name}.bn.{part}"].astype(np.float64) for part in convert.NORM]
  kernel = weights[f"{name}.conv.weight"].astype(np.float64)
  x = np.random.default_rng(0).normal(size=(2, 9, 9, kernel.shape[1]))
  padded = np.pad(x, ((0, 0), (0, 0), (3, 3), (0, 0)))
  plain = sum(padded[:, :, j : j + 9] @ kernel[:, :, 0, j].T for j in range(7))
  scale, shift, mean, variance = parts
  expected = np.maximum((plain - mean) / np.sqrt(variance + 1e-3) * scale + shift, 0)
  params = convert.load(weights)["Mixed_6b"]["branch7x7_2"]
  result = inception.Conv(128, (1, 7)).apply({"params": params}, x.astype(np.float32))
  assert expected.std() > 0.1
  np.testing.assert_allclose(result, expected, atol=1e-5)


def test_the_counters_of_batches_are_not_needed(weights):
  counters = {name.replace("running_var", "num_batches_tracked"): 0 for name in weights if "running_var" in name}
  jax.tree.map(np.testing.assert_array_equal, convert.load(weights | counters), convert.load(weights))


def spoilt(weights, name, index, value) -> dict[str, np.ndarray]:
  array = weights[name].copy()
  array[index] = value
  return {**weights, name: array}


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda w: {n: a for n, a in w.items() if n != "fc.bias"}, r"1 names are missing, 0 .*missing: \['fc.bias'\]"),
    (lambda w: {**w, "AuxLogits.fc.bias": np.zeros(3)}, r"1 are unknown; .*unknown: \['AuxLogits.fc.bias'\]"),
    (lambda w: {f"module.{n}": a for n, a in w.items()}, r"472 names are missing, 472 are unknown"),
    (
      lambda w: {**w, "fc.weight": w["fc.weight"][:1000]},
      r"fc.weight has shape \(1000, 2048\), but the FID's Inception has \(1008, 2048\)",
    ),
    (lambda w: {**w, "fc.weight": w["fc.weight"].T}, r"fc.weight has shape \(2048, 1008\)"),
    (lambda w: {**w, "fc.weight": 3}, "fc.weight has shape None"),
    (
      lambda w: spoilt(w, "Conv2d_1a_3x3.conv.weight", (0, 0, 0), np.nan),
      "Conv2d_1a_3x3.conv.weight: 3 of 864 values are not finite",
    ),
    (lambda w: spoilt(w, "fc.bias", 5, np.inf), "fc.bias: 1 of 1,008 values are not finite"),
    (lambda w: spoilt(w, "Conv2d_1a_3x3.bn.running_var", 0, -0.5), "running_var: a variance is -0.5, below 0"),
  ],
)
def test_arrays_that_do_not_fit_are_named(weights, change, message):
  with pytest.raises(ValueError, match=message):
    convert.load(change(weights))


@pytest.mark.parametrize(
  "content, message",
  [
    (small_file()[:30_000], "is truncated"),
    (small_file()[:-1], "is truncated"),
    (b"<html>404</html>", "is truncated, or not a PyTorch file"),
    (small_file(without="fc.bias"), r"missing: \['fc.bias'\]"),
    (small_file(values=np.where(np.arange(len(VALUES)) == 1, np.nan, VALUES)), "Conv2d_1a_3x3.bn.weight: 32 of 32"),
    ((ROOT / "tests" / "reference" / "eqm_tiny.pt").read_bytes(), "472 names are missing, 4 are unknown"),
    (legacy_file(b"(lI1\na.", {}), "holds a list, not a state dict"),
  ],
  ids=["cut", "a byte short", "a web page", "incomplete", "not finite", "another network", "a list"],
)
def test_the_error_of_another_file_has_its_size_and_hash(tmp_path, content, message):
  path = tmp_path / "weights.pth"
  path.write_bytes(content)
  identification = (
    f"The file has {len(content):,} bytes and SHA-256 {hashlib.sha256(content).hexdigest()}; the published one"
  )
  with pytest.raises(ValueError, match=f"weights.pth.*{message}.*{re.escape(identification)}") as raised:
    convert.load(path)
  assert "pt_inception-2015-12-05-6726825d.pth" in str(raised.value) and "95,628,359" in str(raised.value)
  assert str(raised.value).count(str(path)) == 1


def test_the_error_of_a_missing_file_names_what_to_fetch(tmp_path):
  with pytest.raises(ValueError, match="nowhere.pth: no such file: fetch pt_inception-2015.*pytorch-fid.*fid_weights"):
    convert.load(tmp_path / "nowhere.pth")
  with pytest.raises(ValueError, match="no such file"):
    convert.load(tmp_path)
