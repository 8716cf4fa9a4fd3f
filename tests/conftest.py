"""Shared fixtures: configs by name, processes, the authors' numbers, and a model small enough to compile often."""

import argparse
import atexit
import html
import importlib.metadata
import io
import json
import os
import pathlib
import pickle
import re
import runpy
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from typing import Any

from packaging.version import Version

from eqm_jax import hardware

# Tests compile much and run little. Without optimisations, and without the kernels of XLA's fusion emitters, they
# take a third of the time. Inherited by the processes that tests start; set before jax is imported.
os.environ["XLA_FLAGS"] = " ".join(
  [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
  ]
)
if Version(importlib.metadata.version("jaxlib")) < Version("0.11.1"):  # newer ones refuse this flag as unknown
  os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

# What one of these processes has compiled, the others read. The cache is of this run of the tests alone, so nothing in
# it is stale.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jax_cache_of_tests_")
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
  os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
  atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

if "JAX_PLATFORMS" not in os.environ:  # inherited by the processes that tests start
  hardware.use_cpu_without_accelerator()

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from eqm_jax.checkpoints import manager as checkpoint_manager
from eqm_jax.checkpoints import torch_pickle

# A shell that starts tests in the background has them ignore SIGINT, and so would the scripts that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = pathlib.Path(__file__).parents[1]
HEADS = {"eqm_tiny": 4, "eqm_tiny_p4": 3}  # what the .pt files cannot tell


def load_config(name: str, variant: str | None = "") -> ml_collections.ConfigDict:
  """A config of configs/ that takes new keys, too; with `variant` None that of the file's own default."""
  get_config = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]
  config = get_config() if variant is None else get_config(variant)
  return config.unlock()


def picture(mode: str = "RGB", size=(12, 10), seed: int = 0) -> Image.Image:
  pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
  return Image.fromarray(pixels).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
  buffer = io.BytesIO()
  image.save(buffer, kind)
  return buffer.getvalue()


def write_build(path, *, version="1.0.0", label=None):
  """A TFDS build of ten images, made by TFDS, which needs no TensorFlow if the images are encoded already."""
  import tensorflow_datasets as tfds

  class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    name = "tiny"
    VERSION = tfds.core.Version(version)

    def _info(self):
      features = {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "label": label or tfds.features.ClassLabel(names=["cat", "dog"]),
      }
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, manager):
      return {"train": self._generate_examples()}

    def _generate_examples(self):
      for i in range(10):
        yield i, {"image": io.BytesIO(encoded(picture(seed=i))), "label": i % 2}

  Tiny(data_dir=str(path), file_format="array_record").download_and_prepare()


def legacy_file(body: bytes, storages: dict[str, np.ndarray], **changed) -> bytes:
  """A file of the format before PyTorch 1.6, as torch.save wrote it: `body` is the pickle of the objects."""
  parts = {
    "magic": 0x1950A86A20F9469CFC6C,
    "version": 1001,
    "system": {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}},
    "body": body,
    "keys": list(storages),
    **changed,
  }
  data = b"".join(part if name == "body" else pickle.dumps(part, protocol=2) for name, part in parts.items())
  for array in storages.values():
    data += struct.pack("<q", array.size) + array.tobytes()
  return data


def legacy_tensor(
  storages: dict[str, np.ndarray], key: str, offset=0, shape=(), stride=(), view: bytes = b"N"
) -> bytes:
  """The opcodes of one tensor, in their readable form of protocol 0."""
  kind = {dtype: name for name, dtype in torch_pickle.STORAGES.items()}[storages[key].dtype]
  numbers = [b"(" + b"".join(b"I%d\n" % number for number in numbers) + b"t" for numbers in (shape, stride)]
  storage = b"(Vstorage\nctorch\n%s\nV%s\nVcpu\nI%d\n%stQ" % (kind.encode(), key.encode(), storages[key].size, view)
  arguments = storage + b"I%d\n" % offset + b"".join(numbers) + b"I00\nccollections\nOrderedDict\n)R"
  return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"


def legacy_state_dict(tensors: dict[str, bytes]) -> bytes:
  """The pickle of an OrderedDict with `_metadata`, as a module's state dict has it."""
  items = b"".join(b"V%s\n" % name.encode() + opcodes for name, opcodes in tensors.items())
  return b"ccollections\nOrderedDict\n)R(" + items + b"u}V_metadata\n}V\n}Vversion\nI1\nsssb."


def final_state(workdir: pathlib.Path) -> dict[str, bytes]:
  """Every array of a run's newest checkpoint, as bytes."""
  with checkpoint_manager.open_manager(str(workdir)) as manager:
    step = manager.latest_step()
    as_arrays = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), manager.item_metadata(step).state.tree)
    state = manager.restore(step, args=ocp.args.Composite(state=ocp.args.PyTreeRestore(restore_args=as_arrays))).state
  flat = jax.tree_util.tree_flatten_with_path(state)[0]
  return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in flat}


def environment(devices: int = 1, **more: str) -> dict[str, str]:
  """For a process with so many pretended devices that imports the package and whatever the tests import."""
  flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
  path = os.pathsep.join([str(ROOT), *sys.path])
  return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": path, **more}


def free_port() -> int:
  """Of this machine, for processes that are to find each other."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    return free.getsockname()[1]


STARTED: list[subprocess.Popen] = []


def start_python(
  *arguments, processes: int | None = None, devices: int = 1, **variables: str
) -> list[subprocess.Popen]:
  """One process of Python, or so many that find each other by three more arguments, as eqm_jax.main takes them.

  Those that still run when the test ends are killed.

  Args:
    *arguments: of Python, such as "-c", PROGRAM, and those of the program.
    processes: how many to connect; None starts one that knows of no others.
    devices: pretended devices of each process.
    **variables: of the environment.
  """
  command = [sys.executable, *map(str, arguments)]
  connections = [[]]
  if processes is not None:
    address = [f"--coordinator_address=localhost:{free_port()}", f"--num_processes={processes}"]
    connections = [[*address, f"--process_id={i}"] for i in range(processes)]
  options = dict(cwd=ROOT, env=environment(devices, **variables), text=True)
  started = [
    subprocess.Popen(command + connection, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    for connection in connections
  ]
  STARTED.extend(started)
  return started


def connection() -> tuple[str | None, int | None, int | None]:
  """For a program of `start_python`: the coordinator's address, the number of processes, and that of this one."""
  parser = argparse.ArgumentParser()
  parser.add_argument("--coordinator_address")
  parser.add_argument("--num_processes", type=int)
  parser.add_argument("--process_id", type=int)
  found, _ = parser.parse_known_args()
  return found.coordinator_address, found.num_processes, found.process_id


def ended(
  processes: list[subprocess.Popen], status: int | None = 0, timeout: float = 300
) -> list[subprocess.CompletedProcess]:
  """The processes with what they wrote, once all have ended: all with this exit status, unless it is None."""
  try:
    output = [process.communicate(timeout=timeout) for process in processes]
  finally:
    for process in processes:
      process.kill()
  finished = [subprocess.CompletedProcess(one.args, one.returncode, *two) for one, two in zip(processes, output)]
  if status is not None:
    assert [one.returncode for one in finished] == [status] * len(finished), "\n".join(one.stderr for one in finished)
  return finished


def run_python(*arguments, status: int | None = 0, timeout: float = 300, **options) -> subprocess.CompletedProcess:
  """One process of `start_python`, when it has ended."""
  (finished,) = ended(start_python(*arguments, **options), status, timeout)
  return finished


@pytest.fixture(autouse=True)
def kill_processes():
  """Ends the processes that a test has left running."""
  yield
  while STARTED:
    with STARTED.pop() as process:
      process.kill()


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
  """Drops the compiled programs of a module: kept, those of all modules take gigabytes in each worker."""
  yield
  jax.clear_caches()


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


def in_browser(page: pathlib.Path, script: str, *, dark: bool = False, width: int = 1100) -> tuple[Any, Image.Image]:
  """What the body of a JavaScript function returns for a loaded page, and a screenshot, by a headless Chromium.

  Fails on any error in the page, a picture that is not drawn, and a page that is wider than the window.
  """
  copy, shot = page.with_suffix(".tested.html"), page.with_suffix(".screenshot.png")
  copy.write_text(
    "<!doctype html><script>window.errors = []; window.onerror = text => errors.push(text);</script>"
    f"{page.read_text(encoding='utf-8')}<script>window.onload = () => {{ document.title = JSON.stringify({{ errors,"
    " broken: [...document.images].filter(image => !image.naturalWidth).map(image => image.alt),"
    " wider: document.documentElement.scrollWidth - innerWidth,"
    f" result: (() => {{ {script} }})() }}); }};</script>",
    encoding="utf-8",
  )
  flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={width},2000"]
  flags += ["--virtual-time-budget=3000", f"--user-data-dir={page.with_suffix('.profile')}", f"--screenshot={shot}"]
  flags += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--dump-dom", copy.as_uri()]
  dom = subprocess.run([CHROMIUM, *flags], capture_output=True, text=True, timeout=120, check=True).stdout
  found = json.loads(html.unescape(re.findall("<title>(.*?)</title>", dom)[0]))
  assert found["errors"] == found["broken"] == [] and found["wider"] <= 0, found
  with Image.open(shot) as image:
    return found["result"], image.convert("RGB")


class Reference:
  """Numbers computed by the authors' code, in our layout (NHWC) and our sign (f = −out)."""

  def __init__(self, name: str):
    self.name, self.heads = name, HEADS[name]
    self.checkpoint = ROOT / "tests" / "reference" / f"{name}.pt"
    self.arrays = np.load(ROOT / "tests" / "reference" / f"{name}.npz")

  def __getitem__(self, key: str) -> np.ndarray:
    return self.arrays[key]

  def image(self, key: str, dtype=np.float64) -> jnp.ndarray:
    """An array of images, ..., C, H, W → ..., H, W, C."""
    return jnp.asarray(np.moveaxis(self.arrays[key], -3, -1), dtype)

  def label(self, key: str) -> jnp.ndarray:
    return jnp.asarray(self.arrays[key], jnp.int32)


@pytest.fixture(params=list(HEADS))
def reference(request) -> Reference:
  return Reference(request.param)


@pytest.fixture
def tiny_config() -> ml_collections.ConfigDict:
  """The digits, with a network and a run of the smallest useful size."""
  config = load_config("digits", "smoke")
  config.model.update(patch_size=2, width=16, depth=2, num_heads=2, unroll=2)
  config.train.update(steps=12, batch_size=8, log_every=4)
  config.checkpoint.every = 4
  config.optimizer.warmup_steps = 2
  config.evaluation.update(num_samples=20, batch_size=2)  # each halving of the slots is a program of its own
  return config
