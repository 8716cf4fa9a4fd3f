import os
import pickle
import zipfile

import numpy as np
import pytest

from eqm_jax.convert import torch_file


def write_pickle(path, data: bytes):
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("archive/data.pkl", data)
    archive.writestr("archive/byteorder", "little")


class Malicious:
  def __init__(self, function, *arguments):
    self.function, self.arguments = function, arguments

  def __reduce__(self):
    return self.function, self.arguments


@pytest.mark.parametrize(
  "function, arguments, name",
  [
    (os.system, ("echo owned > {marker}",), r"(posix|nt)\.system"),
    (exec, ("open({marker!r}, 'w')",), r"(builtins|__builtin__)\.exec"),
    (getattr, ("x", "upper"), r"(builtins|__builtin__)\.getattr"),
  ],
)
def test_a_malicious_pickle_is_refused_by_name_and_does_nothing(tmp_path, function, arguments, name):
  marker = tmp_path / "owned"
  arguments = [argument.format(marker=str(marker)) for argument in arguments]
  write_pickle(tmp_path / "bad.pt", pickle.dumps({"model": Malicious(function, *arguments)}, protocol=2))
  with pytest.raises(ValueError, match=f"refused, the file asks for {name}"):
    torch_file.read(tmp_path / "bad.pt")
  assert not marker.exists()


def test_a_tensor_that_reaches_outside_its_storage_is_refused(tmp_path):
  path = tmp_path / "bad.pt"
  torch_file.write(path, {"model": {"a": np.zeros((2, 3), np.float32)}}, {})
  with zipfile.ZipFile(path) as archive:
    data = archive.read("archive/data.pkl")
  # Shape (2, 3) becomes (2, 99): it would read past the six numbers that are there.
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("archive/data.pkl", data.replace(b"(\x8a\x01\x02\x8a\x01\x03t", b"(\x8a\x01\x02\x8a\x01\x63t"))
    archive.writestr("archive/data/0", np.zeros(6, np.float32).tobytes())
  with pytest.raises(ValueError, match="outside its storage"):
    torch_file.read(path)["model"]["a"].numpy()


def test_what_is_written_is_read(tmp_path):
  rng = np.random.default_rng(0)
  arrays = {"weight": rng.normal(size=(3, 4)).astype(np.float32), "bias": np.float32([1.5]), "scalar": np.float32(2.0)}
  arguments = {"model": "EqM-B/2", "count": 1000, "negative": -3, "ratio": 0.25, "uncond": True, "nothing": None}
  torch_file.write(tmp_path / "a.pt", {"model": arrays, "ema": arrays}, arguments)
  read = torch_file.read(tmp_path / "a.pt")
  assert list(read) == ["model", "ema", "args"] and vars(read["args"]) == arguments
  for state in (read["model"], read["ema"]):
    for name, array in arrays.items():
      np.testing.assert_array_equal(state[name].numpy(), array)
  with zipfile.ZipFile(tmp_path / "a.pt") as archive:  # shared arrays are stored once
    assert sum(name.startswith("archive/data/") for name in archive.namelist()) == 3


def test_a_failed_write_leaves_the_old_file(tmp_path):
  path = tmp_path / "a.pt"
  torch_file.write(path, {"model": {"a": np.ones(2, np.float32)}}, {})
  with pytest.raises((TypeError, AttributeError)):
    torch_file.write(path, {"model": {"a": np.ones(2, np.float32)}}, {"bad": object()})
  assert torch_file.read(path)["model"]["a"].shape == (2,)


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_a_truncated_file_is_told(tmp_path, reference, keep):
  content = reference.checkpoint.read_bytes()
  (tmp_path / "cut.pt").write_bytes(content[: int(keep * len(content)) if keep < 1 else keep])
  with pytest.raises(ValueError, match="cut.pt.*truncated"):
    torch_file.read(tmp_path / "cut.pt")


def test_a_flipped_byte_in_a_tensor_is_told(tmp_path, reference):
  content = bytearray(reference.checkpoint.read_bytes())
  content[content.index(b"data/1") + 200] ^= 0xFF
  (tmp_path / "flipped.pt").write_bytes(content)
  state = torch_file.read(tmp_path / "flipped.pt")
  state = state["model"] if "model" in state else state
  with pytest.raises(ValueError, match="damaged"):
    for tensor in state.values():
      tensor.numpy()


def test_another_zip_is_not_a_pytorch_file(tmp_path):
  with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
    archive.writestr("hello", "world")
  with pytest.raises(ValueError, match="not a PyTorch file"):
    torch_file.read(tmp_path / "other.zip")
