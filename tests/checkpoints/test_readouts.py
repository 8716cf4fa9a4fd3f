import dataclasses

import numpy as np
import pytest

import eqm_jax
from eqm_jax.checkpoints import readouts
from eqm_jax.equilibrium.noise_level import NoiseReadout


@dataclasses.dataclass(frozen=True)
class Model:
  width: int = 2
  energy: str = "none"
  time_input: bool = False


PARAMS = {"kernel": np.ones((2, 3), np.float32)}


@pytest.fixture
def path(tmp_path) -> str:
  readout = NoiseReadout(np.arange(4, dtype=np.float32), np.float32(0.5))
  readouts.save(str(tmp_path / "readout.npz"), readout, PARAMS)
  return str(tmp_path / "readout.npz")


def test_a_readout_comes_back_as_it_was_saved(path):
  for readout in (eqm_jax.load_readout(path, Model(), PARAMS), readouts.read(path, Model(), sha256=None)):
    assert readout.weights.tolist() == [0, 1, 2, 3] and readout.bias == 0.5
    assert readout.weights.dtype == readout.bias.dtype == np.float32


@pytest.mark.parametrize(
  "model, params, text",
  [
    (Model(width=3), PARAMS, "readout.npz: the read-out is of a model of width 2, but this one has 3"),
    (Model(), {"kernel": 2 * PARAMS["kernel"]}, r"fitted to other weights \(sha256 \w{12}\) than the model's"),
    (Model(energy="dot"), PARAMS, "is the gradient of an energy"),
    (Model(time_input=True), PARAMS, "takes γ as an input"),
  ],
)
def test_readouts_of_other_models_are_refused(path, model, params, text):
  with pytest.raises(ValueError, match=text):
    eqm_jax.load_readout(path, model, params)


def test_missing_and_damaged_files_are_refused(path, tmp_path):
  with pytest.raises(ValueError, match="none.npz: no such file: fit one with --mode=readout"):
    eqm_jax.load_readout(tmp_path / "none.npz", Model(), PARAMS)
  np.savez(tmp_path / "other.npz", x=np.ones(3))
  with pytest.raises(ValueError, match="other.npz: not a read-out, or damaged.*weights"):
    eqm_jax.load_readout(tmp_path / "other.npz", Model(), PARAMS)
  whole = (tmp_path / "readout.npz").read_bytes()
  for content in (whole[: len(whole) // 2], b"", b"text"):
    (tmp_path / "half.npz").write_bytes(content)
    with pytest.raises(ValueError, match="half.npz: not a read-out, or damaged"):
      eqm_jax.load_readout(tmp_path / "half.npz", Model(), PARAMS)
