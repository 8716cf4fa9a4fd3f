import contextlib
import os
import pickle
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
from conftest import legacy_file, legacy_state_dict, legacy_tensor

from eqm_jax.checkpoints import torch_pickle

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
  def __init__(self, command: str):
    self.command = command

  def __reduce__(self):
    return os.system, (self.command,)


def test_a_malicious_pickle_in_the_older_format_is_refused_and_does_nothing(tmp_path):
  body = pickle.dumps({"model": Malicious(f"echo owned > {tmp_path / 'owned'}")}, protocol=2)
  (tmp_path / "bad.pt").write_bytes(legacy_file(body, {}))
  with pytest.raises(ValueError, match=r"refused, the file asks for (posix|nt)\.system"):
    torch_pickle.read(tmp_path / "bad.pt")
  assert not (tmp_path / "owned").exists()


def test_a_pickle_cannot_turn_a_tensor_to_another_file(tmp_path):
  storages = {"1": np.zeros(2, np.float32)}
  opcodes = legacy_tensor(storages, "1", 0, (2,), (1,)) + b"}V_storage\nI1\nsb"
  (tmp_path / "bad.pt").write_bytes(legacy_file(legacy_state_dict({"a": opcodes}), storages))
  with pytest.raises(ValueError, match="bad.pt.*sets the state of a Tensor"):
    torch_pickle.read(tmp_path / "bad.pt")


def zip_file(path, data: bytes, numbers: np.ndarray):
  """A file of one storage, "0"."""
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("archive/data.pkl", data)
    archive.writestr("archive/data/0", numbers.tobytes())
  return path


def tensor_opcodes(rebuild: bytes, storage: bytes, count: int, rest: bytes, shape=b"I2\nI2\n", stride=b"I2\nI1\n"):
  """A tensor of shape [2, 2], from number 1 on in storage 0."""
  reference = b"(Vstorage\nc%s\nV0\nVcpu\nI%d\ntQ" % (storage, count)
  return b"ctorch._utils\n%s\n(%sI1\n(%st(%st%stR" % (rebuild, reference, shape, stride, rest)


def read_tensor(path, opcodes: bytes, numbers: np.ndarray) -> np.ndarray:
  return torch_pickle.read(zip_file(path, b"\x80\x02}Va\n" + opcodes + b"s.", numbers))["a"].numpy()


HOOKS = b"I00\nccollections\nOrderedDict\n)R"


@pytest.mark.parametrize(
  "count, shape, stride, message",
  [
    (5, b"I2\nI3\n", b"I2\nI1\n", r"shape \(2, 3\) reaches outside its storage"),
    (5, b"I2\nI2\n", b"I-1\nI1\n", "reaches outside its storage"),
    (5, b"L1000000000L\nL1000000000L\n", b"I0\nI0\n", "has 5 numbers only"),  # repeated by its strides
    (9, b"I2\nI2\n", b"I2\nI1\n", "data/0 has 20 bytes, not those of 9 float32"),
  ],
)
def test_a_tensor_that_is_not_in_its_storage_is_refused(tmp_path, count, shape, stride, message):
  opcodes = tensor_opcodes(b"_rebuild_tensor_v2", b"torch\nFloatStorage", count, HOOKS, shape, stride)
  with pytest.raises(ValueError, match=f"a.pt: .*{message}: damaged"):
    read_tensor(tmp_path / "a.pt", opcodes, np.zeros(5, np.float32))


# A tuple of itself twice, and so on: short in a pickle, long as text.
NESTED = b"I1\nq\x00" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(24))


@pytest.mark.parametrize(
  "opcodes",
  [
    b"\x96" + (1 << 29).to_bytes(8, "little"),  # so many bytes
    b"I1\nr" + (1 << 26).to_bytes(4, "little"),  # the object of this number
    b"(Vstorage\nctorch\nFloatStorage\n" + NESTED + b"Vcpu\nI5\ntQ",
    b"ctorch._utils\n_rebuild_tensor_v2\n(NI0\n" + NESTED + b"(I1\ntI00\nNtR",
  ],
)
def test_a_small_file_takes_little_memory(tmp_path, opcodes):
  path = zip_file(tmp_path / "a.pt", b"\x80\x05}Va\n" + opcodes + b"s.", np.zeros(5, np.float32))
  tracemalloc.start()
  with contextlib.suppress(ValueError):
    torch_pickle.read(path)
  assert tracemalloc.get_traced_memory()[1] < 1e7
  tracemalloc.stop()


def test_tensors_in_one_storage_are_read_together(tmp_path, monkeypatch):
  """As in a network whose parameters were flattened: for each tensor the whole would be read."""
  read, reads = torch_pickle._read_entry, []
  monkeypatch.setattr(torch_pickle, "_read_entry", lambda *arguments: reads.append(arguments) or read(*arguments))
  tensor = tensor_opcodes(b"_rebuild_tensor_v2", b"torch\nFloatStorage", 5, HOOKS)
  contents = torch_pickle.read(
    zip_file(tmp_path / "a.pt", b"\x80\x02}(Va\n" + tensor + b"Vb\n" + tensor + b"u.", np.arange(5, dtype=np.float32))
  )
  for value in contents.values():
    np.testing.assert_array_equal(value.numpy(), [[1, 2], [3, 4]])
  assert len(reads) == 1


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
    ({"body": legacy_tensor(LEGACY_STORAGES, "5", 0, (4,)) + b"."}, "whose shape and stride do not fit"),
  ],
)
def test_a_damaged_file_of_the_older_format_is_refused(tmp_path, changed, message):
  (tmp_path / "bad.pth").write_bytes(small_legacy_file(**changed))
  with pytest.raises(ValueError, match=f"bad.pth.*{message}"):
    torch_pickle.read(tmp_path / "bad.pth")


NEW_TYPES = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "uint16", "uint32")


@pytest.mark.parametrize("name", NEW_TYPES)
def test_types_without_a_storage_of_their_own_are_read(tmp_path, name):
  numbers = np.array([0, 1, 2, 0.5, 3]).astype(np.dtype(getattr(ml_dtypes, name, name)))
  rest = HOOKS + b"ctorch\n%s\nN" % name.encode()
  opcodes = tensor_opcodes(b"_rebuild_tensor_v3", b"torch.storage\nUntypedStorage", numbers.nbytes, rest)
  found = read_tensor(tmp_path / "a.pt", opcodes, numbers)
  assert found.dtype == numbers.dtype
  np.testing.assert_array_equal(found.astype(np.float32), numbers[1:].reshape(2, 2).astype(np.float32))


def test_a_type_that_is_not_supported_hinders_only_who_needs_it(tmp_path):
  rest = HOOKS + b"ctorch\nfloat4_e2m1fn_x2\nN"
  opcodes = tensor_opcodes(b"_rebuild_tensor_v3", b"torch.storage\nUntypedStorage", 5, rest)
  with pytest.raises(ValueError, match="a.pt: a tensor of torch.float4_e2m1fn_x2, which is not supported"):
    read_tensor(tmp_path / "a.pt", opcodes, np.zeros(5, np.int8))
  assert torch_pickle.read(tmp_path / "a.pt")["a"].shape == (2, 2)


def test_quantized_tensors_are_multiplied_by_their_scale(tmp_path):
  numbers = np.array([0, 1, -2, 3, 127], np.int8)
  integers = numbers[1:].reshape(2, 2).astype(np.float32)
  opcodes = tensor_opcodes(
    b"_rebuild_qtensor", b"torch\nQInt8Storage", 5, b"(ctorch\nper_tensor_affine\nF0.5\nI1\nt" + HOOKS
  )
  np.testing.assert_array_equal(read_tensor(tmp_path / "a.pt", opcodes, numbers), (integers - 1) * 0.5)
  assert torch_pickle.read(tmp_path / "a.pt")["a"].resolution == 0.5
  array = pickle.dumps(np.array([0.5, 2.0]), 2)[2:-1]  # a scale for each row, stored as arrays or tensors
  quantizer = b"(ctorch\nper_channel_affine\n" + array + b"I0\nI0\nt"
  opcodes = tensor_opcodes(b"_rebuild_qtensor", b"torch\nQInt8Storage", 5, quantizer + HOOKS)
  np.testing.assert_array_equal(read_tensor(tmp_path / "a.pt", opcodes, numbers), integers * [[0.5], [2.0]])


@pytest.mark.parametrize(
  "wrapper, size, whole",
  [
    (b"_rebuild_tensor_v2", b"", True),  # a subclass with attributes
    (b"_rebuild_wrapper_subclass", b"(I2\nI2\nt", True),  # a sharded tensor on one device
    (b"_rebuild_wrapper_subclass", b"(I4\nI2\nt", False),  # and its part on one of several
  ],
)
def test_tensors_in_tensors_are_read_where_they_are_whole(tmp_path, wrapper, size, whole):
  numbers = np.arange(5, dtype=np.float32)
  tensor = tensor_opcodes(b"_rebuild_tensor_v2", b"torch\nFloatStorage", 5, HOOKS)
  arguments = b"(ctorch\nDTensor\nctorch\nfloat32\n" + size + b"t"
  if not size:
    arguments = tensor.removeprefix(b"ctorch._utils\n_rebuild_tensor_v2\n").removesuffix(b"R")
  state = b"}V_local_tensor\n" + tensor + b"s"
  opcodes = b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch._utils\n%s\nctorch\nDTensor\n" % wrapper
  opcodes += arguments + state + b"tR"
  found = torch_pickle.read(zip_file(tmp_path / "a.pt", b"\x80\x02" + opcodes + b".", numbers))
  assert isinstance(found, torch_pickle.Tensor) == whole
  if whole:
    np.testing.assert_array_equal(found.numpy(), numbers[1:].reshape(2, 2))
  else:
    assert type(found).__name__ == "torch.DTensor"
