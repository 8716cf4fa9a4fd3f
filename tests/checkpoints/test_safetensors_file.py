import json
import struct

import ml_dtypes
import numpy as np
import pytest

from eqm_jax.checkpoints import safetensors_file, state_dicts


def written_by_hand(path, kind: str, array: np.ndarray, metadata=None):
  header = {"a": {"dtype": kind, "shape": array.shape, "data_offsets": [0, array.nbytes]}}
  text = json.dumps(header | ({"__metadata__": metadata} if metadata else {})).encode()
  path.write_bytes(struct.pack("<Q", len(text)) + text + array.tobytes())


@pytest.mark.parametrize("kind", sorted(safetensors_file.DTYPES))
def test_every_type_is_read(tmp_path, kind):
  array = np.array([[0, 1], [1, 0]]).astype(safetensors_file.DTYPES[kind])
  written_by_hand(tmp_path / "a.safetensors", kind, array)
  found = safetensors_file.read((tmp_path / "a.safetensors").read_bytes())["a"]
  assert found.dtype == array.dtype and found.tobytes() == array.tobytes() and found.shape == (2, 2)


def test_metadata_is_read(tmp_path):
  texts = {"format": "pt", "num_heads": "3", "uncond": "False", "nested": "[" * 9999, "config": '{"ebm": "dot"}'}
  written_by_hand(tmp_path / "a.safetensors", "F32", np.zeros(2, np.float32), texts)
  found = state_dicts.arguments(state_dicts.read(tmp_path / "a.safetensors"))
  assert found.items() >= {"format": "pt", "num_heads": 3, "uncond": False, "ebm": "dot"}.items()


def test_a_written_file_is_read_back(tmp_path):
  arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3).T, "b": np.float32([1.5]).astype(ml_dtypes.bfloat16)}
  path = tmp_path / "a.safetensors"
  safetensors_file.write(path, arrays, {"model": "EqM-B/2", "mlp_ratio": 4.0})
  found = safetensors_file.read(path.read_bytes())
  for name, array in arrays.items():
    np.testing.assert_array_equal(found[name], array, strict=True)
  assert safetensors_file.metadata(path.read_bytes())["args"] == {"model": "EqM-B/2", "mlp_ratio": 4.0}
  with pytest.raises(TypeError):
    safetensors_file.write(path, arrays, {"bad": object()})
  assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("keep", [9, 60, -1])
def test_a_truncated_file_is_refused(tmp_path, keep):
  path = tmp_path / "cut.safetensors"
  written_by_hand(path, "F32", np.zeros(9, np.float32))
  path.write_bytes(path.read_bytes()[:keep])
  with pytest.raises(ValueError, match="cut.safetensors: not a complete .safetensors file"):
    state_dicts.read(path)


def test_a_type_that_is_not_supported_is_named(tmp_path):
  written_by_hand(tmp_path / "a.safetensors", "C64", np.zeros(2, np.complex64))
  with pytest.raises(ValueError, match="a is of type C64, which is not supported: save it as float32"):
    state_dicts.read(tmp_path / "a.safetensors")
