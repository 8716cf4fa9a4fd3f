"""Objects beside the weights: kept without running anything, or refused by name."""

import argparse
import collections
import copyreg
import datetime
import decimal
import enum
import fractions
import functools
import importlib
import logging
import operator
import os
import pathlib
import pickle
import random
import re
import runpy
import shutil
import subprocess
import traceback
import types
import uuid
import zipfile

import numpy as np
import pytest

from eqm_jax.checkpoints import inert, torch_pickle

WEIGHT = np.arange(6, dtype=np.float32).reshape(2, 3)


class Optimizer(enum.Enum):
  ADAM = "adam"


class Settings:
  def __init__(self):
    self.width, self.optimizer, self.inner = 24, Optimizer.ADAM, argparse.Namespace(depth=3)


class AttributeDict(dict):
  pass


class History(list):
  pass


class Slots:
  __slots__ = ("lr",)


Point = collections.namedtuple("Point", "x y")


class Warmup:
  """A schedule, whose `__call__` a scheduler calls."""

  def __call__(self, step):
    raise AssertionError


class Call:
  def __init__(self, function, *arguments):
    self.function, self.arguments = function, arguments

  def __reduce__(self):
    return self.function, self.arguments


def file_with(path, opcodes: bytes):
  """A file of weights with the object of these opcodes under "thing"."""
  torch_pickle.write(path, {"ema": {"a": WEIGHT}}, {"num_heads": 3})
  with zipfile.ZipFile(path) as archive:
    entries = {name: archive.read(name) for name in archive.namelist()}
  data = entries["archive/data.pkl"]
  entries["archive/data.pkl"] = data[:-2] + b"Vthing\n" + opcodes + b"u."
  with zipfile.ZipFile(path, "w") as archive:
    for name, content in entries.items():
      archive.writestr(name, content)
  return path


def opcodes_of(thing, protocol: int) -> bytes:
  return pickle.dumps(thing, protocol)[2:-1]  # without the protocol's number and the end


def read_with(path, opcodes: bytes):
  """The object as a file gives it, whose weights are read as well."""
  contents = torch_pickle.read(file_with(path / "a.pt", opcodes))
  np.testing.assert_array_equal(contents["ema"]["a"].numpy(), WEIGHT)
  assert contents["args"].num_heads == 3
  return contents["thing"]


def slots():
  value = Slots()
  value.lr = 0.1
  return value


OBJECTS = [
  *(np.float32(0.5), np.bool_(True), np.str_("a"), np.datetime64("2020-01-01"), np.complex64(1j), np.bytes_(b"a")),
  *(np.arange(3.0), np.array([1, "a", None], object), np.array(["a"]), np.zeros(2, [("a", "f4"), ("b", "i4")])),
  *(np.dtype("float32"), np.dtype([("a", "f4")]), np.float32, np.ma.masked_array([1], [True]), np.zeros((0, 3))),
  *(np.random.get_state(), np.random.default_rng(0), np.random.RandomState(0), random.getstate(), random.Random(0)),
  *(pathlib.PurePosixPath("/a/b"), pathlib.PureWindowsPath("C:\\a"), pathlib.Path("a")),
  *(collections.Counter("aab"), collections.defaultdict(list, {1: [2]}), collections.defaultdict(int)),
  *(collections.deque([1], 5), collections.UserDict({1: 2}), collections.OrderedDict(a=1), AttributeDict(a=1)),
  *({1, 2}, frozenset([1]), set(), bytearray(b"a"), b"a\xff", b"", 1j, range(3), slice(1, 2), ..., type(None)),
  *(10**30, float("inf"), ValueError("bad"), re.compile("a+"), logging.getLogger("train"), uuid.UUID(int=1)),
  *(datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC), datetime.timedelta(1), decimal.Decimal("1.5")),
  *(fractions.Fraction(1, 3), types.SimpleNamespace(a=1), Optimizer.ADAM, Settings(), Settings, History([1, 2])),
  *(slots(), Point(1, 2), Warmup(), {Optimizer.ADAM: Point(1, 2)}, (collections.Counter(), [Settings()])),
  traceback.StackSummary(),
]


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_objects_beside_the_weights_do_not_hinder(tmp_path, protocol):
  for thing in OBJECTS:
    read_with(tmp_path, opcodes_of(thing, protocol))


@pytest.mark.parametrize(
  "opcodes",
  [
    b"ctorch\nbfloat16\n",
    b"ctorch\nfloat8_e4m3fn\n",
    b"ctorch\nper_tensor_affine\n",
    b"ctorch\ndevice\n(Vcuda\nI0\ntR",
    b"ctorch\nSize\n((I1\nI2\ntt\x52",
    b"ctorch.serialization\n_get_layout\n(Vtorch.strided\ntR",
    b"cpathlib._local\nPosixPath\n(Va\nVb\ntR",  # Python 3.13
    b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntVb\ntR",  # numpy 1
    b"ctorch.optim.lr_scheduler\nLambdaLR\n)\x81}V_step_count\nI1\nsb",
    b"ctorch.nn.functional\nsilu\n",  # named, not called
    b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n(NNNNtR",
    b"(iargparse\nNamespace\n",  # INST of protocol 0
  ],
)
def test_objects_of_pytorch_and_of_other_versions_do_not_hinder(tmp_path, opcodes):
  read_with(tmp_path, opcodes)


def test_numbers_and_attributes_are_kept(tmp_path):
  settings, attributes, integer, number = (
    read_with(tmp_path, opcodes_of(thing, 2))
    for thing in (Settings(), AttributeDict(a=1), np.int64(3), np.float32(0.5))
  )
  assert vars(settings)["width"] == 24 and settings.inner.depth == 3
  assert settings.optimizer.arguments == ("adam",) and repr(settings) == "<test_inert.Settings>"
  assert inert.attributes(attributes) == {"a": 1}
  assert (integer, number) == (3, 0.5) and type(integer) is int and type(number) is float
  for protocol in (2, 5):
    for array in (np.arange(6.0).reshape(2, 3).T, np.arange(3, dtype=">i4"), np.array([True])):
      np.testing.assert_array_equal(read_with(tmp_path, opcodes_of(array, protocol)).numpy(), array)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
  "call, name",
  [
    ((os.system, "echo > {marker}"), r"(posix|nt)\.system"),
    ((eval, "open({marker!r}, 'w')"), r"builtins\.eval"),
    ((exec, "open({marker!r}, 'w')"), r"builtins\.exec"),
    ((open, "{marker}", "w"), r"_?io\.open"),
    ((getattr, "x", "upper"), r"builtins\.getattr"),
    ((__import__, "os"), r"builtins\.__import__"),
    ((compile, "1", "a", "eval"), r"builtins\.compile"),
    ((subprocess.Popen, "touch {marker}"), r"subprocess\.Popen"),  # in protocol 2 "commands", its name in Python 2
    ((functools.partial, print), r"functools\.partial"),
    ((operator.attrgetter, "a"), r"operator\.attrgetter"),
    ((operator.methodcaller, "a"), r"operator\.methodcaller"),
    ((importlib.import_module, "os"), r"importlib\.import_module"),
    ((runpy.run_path, "{marker}"), r"runpy\.run_path"),
    ((pickle.loads, b""), r"_?pickle\.loads"),
    ((shutil.rmtree, "{marker}"), r"shutil\.rmtree"),
    ((map, print, [1]), r"builtins\.map"),
    ((np.load, "{marker}"), r"numpy\.load"),
    ((file_with, "{marker}", b""), r"test_inert\.file_with"),
  ],
)
def test_what_could_run_code_is_refused_by_name(tmp_path, call, name, protocol):
  marker = tmp_path / "marker"
  function, *arguments = call
  arguments = [value.format(marker=str(marker)) if isinstance(value, str) else value for value in arguments]
  with pytest.raises(ValueError, match=rf"a\.pt: refused, the file asks for {name}, which could run code"):
    read_with(tmp_path, opcodes_of(Call(function, *arguments), protocol))
  assert not marker.exists()


@pytest.mark.parametrize(
  "opcodes",
  [
    b"\x8c\x05torch\x8c\x09os.system\x93",  # by way of a module that imports it
    b"\x8c\x05torch\x8c\x10subprocess.Popen\x93",
    b"ctorch.hub\nload\n(VX\ntR",
    b"ctorch.storage\n_load_from_bytes\n(VX\ntR",
    b"c__builtin__\neval\n(VX\ntR",
    b"(V1+1\ni__builtin__\neval\n",
    b"c_codecs\nencode\n(Va\nVrot13\ntR",
    b"ccopyreg\n__newobj__\n(cbuiltins\neval\ntR",
    b"ctrain\nrun\n)R",
  ],
)
def test_hidden_calls_are_refused(tmp_path, opcodes):
  with pytest.raises(ValueError, match="refused, the file asks for"):
    read_with(tmp_path, opcodes)


@pytest.mark.parametrize(
  "opcodes",
  [
    b"ctrain\nSettings\n(N}Vfunction\nI1\nstb",  # sets attributes of the class itself
    b"ccollections\nCounter\n(N}Vupdate\nI1\nstb",
    b"ccollections\nOrderedDict\n(N}Vupdate\nI1\nstb",
    b"ctorch._utils\n_rebuild_tensor_v2\n}Vx\nI1\nsb",
    b"ccopyreg\n_reconstructor\n}Vx\nI1\nsb",
  ],
)
def test_a_file_changes_nothing_that_outlives_it(tmp_path, opcodes):
  before = dict(vars(collections.Counter)), dict(vars(inert.Inert))
  with pytest.raises(ValueError, match=r"a\.pt"):
    read_with(tmp_path, opcodes)
  assert (dict(vars(collections.Counter)), dict(vars(inert.Inert))) == before
  assert not hasattr(copyreg._reconstructor, "x")


def test_a_method_that_a_file_replaces_calls_nothing_of_python(tmp_path):
  """An attribute of the instance stands before the type's method, which the next opcode calls."""
  thing = read_with(tmp_path, b"ctrain\nHistory\n)\x81}Vextend\nctrain\nCallback\nsb(I1\nI2\ne")
  assert vars(thing)["extend"].__name__ == "train.Callback"
