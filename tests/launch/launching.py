"""How the tests of launch/ call scripts, and the programs that they put in the place of others."""

import json
import os
import pathlib
import subprocess
import sys
import time

from conftest import ROOT

LAUNCH = ROOT / "launch"
SCRIPTS = sorted(path.name for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))
AWKWARD = '--config.note=it\'s "two  words" $HOME $(HOME) `id` *;\n\\ &'  # one argument
FLAGS = ["--config=configs/digits.py:smoke", "--workdir=runs/a b", AWKWARD]
GKE = ["--name=a", "--image=i", "--bucket=b", "--"]


def program(path: pathlib.Path, text: str) -> pathlib.Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(f"#!{sys.executable}\n{text}")
  path.chmod(0o755)
  return path


def environment(bin_directory: pathlib.Path, **more) -> dict[str, str]:
  own = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
  return {**own, "PATH": f"{bin_directory}:{os.environ['PATH']}", **{name: str(value) for name, value in more.items()}}


def call(*command, env=None, **more) -> subprocess.CompletedProcess:
  return subprocess.run([*map(str, command)], env=env, capture_output=True, text=True, timeout=120, **more)


def wait_until(condition, what: str, seconds: float = 30):
  begin = time.monotonic()
  while not condition():
    assert time.monotonic() - begin < seconds, f"{what} did not come"
    time.sleep(0.02)


# Plays `python -m eqm_jax.main`: records its arguments, and ends as the environment's ACTS says for its process.
RECORDER = """
import json, os, pathlib, signal, sys, time
records = pathlib.Path(os.environ["RECORDS"])
name = next((word.partition("=")[2] for word in sys.argv if word.startswith("--process_id=")), "0")
act = json.loads(os.environ.get("ACTS", "{}")).get(name, "end")
told = []
for number in (signal.SIGTERM, signal.SIGINT):
  if signal.getsignal(number) != signal.SIG_IGN:  # else Python would not hear of it either
    signal.signal(number, lambda number, frame: told.append(signal.Signals(number).name))
os.write(2, f"process {name} is here\\n".encode())
record = {"arguments": sys.argv[1:], "xla_flags": os.environ.get("XLA_FLAGS"), "directory": os.getcwd()}
record["compiled"] = os.environ.get("JAX_COMPILATION_CACHE_DIR")
record["memory"] = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION")
(records / f"{name}.partial").write_text(json.dumps(record))
(records / f"{name}.partial").rename(records / f"{name}.json")
if act == "fail":
  sys.exit(7)
end = time.monotonic() + 60  # when the test is no more
while (act == "stubborn" or act == "wait" and not told) and time.monotonic() < end:
  time.sleep(0.02)
  if told and not (records / f"{name}.told").exists():  # it may be killed while it writes
    (records / f"{name}.partial").write_text(told[0])
    (records / f"{name}.partial").rename(records / f"{name}.told")
"""


def records(tmp_path) -> dict[str, dict]:
  return {path.stem: json.loads(path.read_text()) for path in (tmp_path / "records").glob("*.json")}


def recording_python(tmp_path) -> pathlib.Path:
  """A Python that plays eqm_jax.main; `records` has what it was called with."""
  (tmp_path / "records").mkdir()
  return program(tmp_path / "bin" / "python", RECORDER)
