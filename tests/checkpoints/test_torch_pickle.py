import os
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest
from conftest import legacy_file, legacy_state_dict, legacy_tensor

from eqm_jax.checkpoints import torch_pickle


def write_pickle(path, data: bytes):
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("archive/data.pkl", data)
    archive.writestr("archive/byteorder", "little")


LEGACY_STORAGES = {
  "94271": np.arange(30, dtype=np.float32),
  "5": np.arange(4).astype(ml_dtypes.bfloat16),
  "61": np.array([7, 2**40]),
  "8": np.array([True, False]),
  "0": np.zeros(0, np.float64),
}


def small_legacy_file(**changed) -> bytes:
  tensors = {
    "whole": legacy_tensor(LEGACY_STORAGES, "94271", 0, (5, 6), (6, 1)),
    "part": legacy_tensor(LEGACY_STORAGES, "94271", 8, (3, 2), (6, 1)),
    "transposed": legacy_tensor(LEGACY_STORAGES, "94271", 0, (6, 5), (1, 6)),
    "expanded": legacy_tensor(LEGACY_STORAGES, "94271", 4, (3, 2), (0, 0)),
    "scalar": legacy_tensor(LEGACY_STORAGES, "61", 1),
    "bfloat16": legacy_tensor(LEGACY_STORAGES, "5", 0, (4,), (1,)),
    "bool": legacy_tensor(LEGACY_STORAGES, "8", 0, (2,), (1,)),
    "empty": legacy_tensor(LEGACY_STORAGES, "0", 0, (0, 4), (4, 1)),
  }
  return legacy_file(**{"body": legacy_state_dict(tensors), "storages": LEGACY_STORAGES, **changed})


class Malicious:
  def __init__(self, function, *arguments):
    self.function, self.arguments = function, arguments

  def __reduce__(self):
    return self.function, self.arguments


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize(
  "function, arguments, name",
  [
    (os.system, ("echo owned > {marker}",), r"(posix|nt)\.system"),
    (exec, ("open({marker!r}, 'w')",), r"(builtins|__builtin__)\.exec"),
    (getattr, ("x", "upper"), r"(builtins|__builtin__)\.getattr"),
  ],
)
def test_a_malicious_pickle_is_refused_by_name_and_does_nothing(tmp_path, function, arguments, name, legacy):
  marker = tmp_path / "owned"
  arguments = [argument.format(marker=str(marker)) for argument in arguments]
  body = pickle.dumps({"model": Malicious(function, *arguments)}, protocol=2)
  if legacy:
    (tmp_path / "bad.pt").write_bytes(legacy_file(body, {}))
  else:
    write_pickle(tmp_path / "bad.pt", body)
  with pytest.raises(ValueError, match=f"refused, the file asks for {name}"):
    torch_pickle.read(tmp_path / "bad.pt")
  assert not marker.exists()


def test_a_pickle_cannot_turn_a_tensor_to_another_file(tmp_path):
  storages = {"1": np.zeros(2, np.float32)}
  opcodes = legacy_tensor(storages, "1", 0, (2,), (1,)) + b"}V_storage\nI1\nsb"
  (tmp_path / "bad.pt").write_bytes(legacy_file(legacy_state_dict({"a": opcodes}), storages))
  with pytest.raises(ValueError, match="bad.pt.*sets the state of a Tensor"):
    torch_pickle.read(tmp_path / "bad.pt")


def test_a_tensor_that_reaches_outside_its_storage_is_refused(tmp_path):
  path = tmp_path / "bad.pt"
  torch_pickle.write(path, {"model": {"a": np.zeros((2, 3), np.float32)}}, {})
  with zipfile.ZipFile(path) as archive:
    data = archive.read("archive/data.pkl")
  # Shape (2, 3) becomes (2, 99): it would read past the six numbers that are there.
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("archive/data.pkl", data.replace(b"(\x8a\x01\x02\x8a\x01\x03t", b"(\x8a\x01\x02\x8a\x01\x63t"))
    archive.writestr("archive/data/0", np.zeros(6, np.float32).tobytes())
  with pytest.raises(ValueError, match="outside its storage"):
    torch_pickle.read(path)["model"]["a"].numpy()


def test_a_written_file_is_read_back(tmp_path):
  rng = np.random.default_rng(0)
  arrays = {"weight": rng.normal(size=(3, 4)).astype(np.float32), "bias": np.float32([1.5]), "scalar": np.float32(2.0)}
  arguments = {"model": "EqM-B/2", "count": 1000, "negative": -3, "ratio": 0.25, "uncond": True, "nothing": None}
  torch_pickle.write(tmp_path / "a.pt", {"model": arrays, "ema": arrays}, arguments)
  read = torch_pickle.read(tmp_path / "a.pt")
  assert list(read) == ["model", "ema", "args"] and vars(read["args"]) == arguments
  for state in (read["model"], read["ema"]):
    for name, array in arrays.items():
      np.testing.assert_array_equal(state[name].numpy(), array)
  with zipfile.ZipFile(tmp_path / "a.pt") as archive:  # shared arrays are stored once
    assert sum(name.startswith("archive/data/") for name in archive.namelist()) == 3


def test_a_failed_write_leaves_the_old_file(tmp_path):
  path = tmp_path / "a.pt"
  torch_pickle.write(path, {"model": {"a": np.ones(2, np.float32)}}, {})
  with pytest.raises((TypeError, AttributeError)):
    torch_pickle.write(path, {"model": {"a": np.ones(2, np.float32)}}, {"bad": object()})
  assert torch_pickle.read(path)["model"]["a"].shape == (2,)


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path, reference, keep):
  content = reference.checkpoint.read_bytes()
  (tmp_path / "cut.pt").write_bytes(content[: int(keep * len(content)) if keep < 1 else keep])
  with pytest.raises(ValueError, match="cut.pt.*truncated"):
    torch_pickle.read(tmp_path / "cut.pt")


def test_a_flipped_byte_in_a_tensor_is_refused(tmp_path, reference):
  content = bytearray(reference.checkpoint.read_bytes())
  content[content.index(b"data/1") + 200] ^= 0xFF
  (tmp_path / "flipped.pt").write_bytes(content)
  state = torch_pickle.read(tmp_path / "flipped.pt")
  state = state["model"] if "model" in state else state
  with pytest.raises(ValueError, match="damaged"):
    for tensor in state.values():
      tensor.numpy()


def test_another_zip_is_not_a_pytorch_file(tmp_path):
  with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
    archive.writestr("hello", "world")
  with pytest.raises(ValueError, match="not a PyTorch file"):
    torch_pickle.read(tmp_path / "other.zip")


def test_the_format_before_pytorch_1_6_is_read(tmp_path):
  (tmp_path / "old.pth").write_bytes(small_legacy_file())
  read = {name: tensor.numpy() for name, tensor in torch_pickle.read(tmp_path / "old.pth").items()}
  whole = LEGACY_STORAGES["94271"].reshape(5, 6)
  expected = {
    "whole": whole,
    "part": whole[1:4, 2:4],
    "transposed": whole.T,
    "expanded": np.full((3, 2), 4, np.float32),
    "scalar": np.int64(2**40),
    "bfloat16": LEGACY_STORAGES["5"],
    "bool": LEGACY_STORAGES["8"],
    "empty": np.zeros((0, 4)),
  }
  assert list(read) == list(expected)
  for name, array in expected.items():
    assert read[name].dtype == array.dtype
    np.testing.assert_array_equal(read[name], array, err_msg=name, strict=True)


def test_a_truncated_file_of_the_older_format_is_refused_wherever_it_ends(tmp_path):
  content, path = small_legacy_file(), tmp_path / "cut.pth"
  for size in {*range(0, len(content), 5), len(content) - 1}:
    path.write_bytes(content[:size])
    with pytest.raises(ValueError, match=rf"cut.pth \({size:,} bytes\) is truncated"):
      torch_pickle.read(path)


@pytest.mark.parametrize(
  "changed, message",
  [
    ({"version": 1002}, "version 1002 of the format before PyTorch 1.6, but only 1001"),
    ({"system": {"little_endian": False}}, "big-endian"),
    ({"keys": ["94271", "5", "61", "8"]}, "name 5 storages, its list 4: damaged"),
    ({"keys": ["5", "94271", "61", "8", "0"]}, "a storage of 4 numbers holds 30: damaged"),
    ({"body": legacy_tensor(LEGACY_STORAGES, "5", view=b"(V9\nI0\nI4\nt") + b"."}, "not a reference to a storage"),
    ({"body": legacy_tensor(LEGACY_STORAGES, "5", 0, (4,)) + b"."}, r"shape \(4,\) and stride \(\): damaged"),
  ],
)
def test_a_damaged_file_of_the_older_format_is_refused(tmp_path, changed, message):
  (tmp_path / "bad.pth").write_bytes(small_legacy_file(**changed))
  with pytest.raises(ValueError, match=f"bad.pth.*{message}"):
    torch_pickle.read(tmp_path / "bad.pth")
