"""The scripts of launch/: what they run, word for word, and what they make of how it ends.

Programs that are not here, or cost, are played by small ones on PATH, which record how they were called. The workers of
a TPU are directories, in which the commands that come "over ssh" really run.
"""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from conftest import ROOT

LAUNCH = ROOT / "launch"
SCRIPTS = sorted(path.name for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))
AWKWARD = '--config.note=it\'s "two  words" $HOME $(HOME) `id` *;\n\\ &'  # one argument
FLAGS = ["--config=configs/digits.py:smoke", "--workdir=runs/a b", AWKWARD]


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


def test_shellcheck_finds_nothing():
  shellcheck = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
  finished = call(shellcheck, "--external-sources", *(LAUNCH / name for name in SCRIPTS), cwd=ROOT)
  assert finished.returncode == 0, finished.stdout + finished.stderr


TPU = ["--name=a", "--zone=z", "--type=v6e-8", "--"]
GKE = ["--name=a", "--image=i", "--bucket=b", "--"]


@pytest.mark.parametrize(
  "command, text",
  [
    (["local.sh"], "--config is missing"),
    (["local.sh", "8", *FLAGS], "not '8'"),
    (["local.sh", "--processes=two", *FLAGS], "--processes is a number, not 'two'"),
    (["local.sh", "--devices=0", *FLAGS], "--devices is a number, not '0'"),
    (["local.sh", "--config=a"], "--workdir is missing"),
    (["tpu_pod.sh", "--zone=z", "--type=v6e-8", "--", *FLAGS], "--name"),
    (["tpu_pod.sh", "--name=a", "--type=v6e-8", "--", *FLAGS], "--zone is missing"),
    (["tpu_pod.sh", "--name=a", "--zone=z", "--", *FLAGS], "--type is missing"),
    (["tpu_pod.sh", "--name=a", "--zone=z", "--type=v9-8", "--", *FLAGS], "--version is needed for --type=v9-8"),
    (["tpu_pod.sh", "--name=A_b", *TPU[1:], *FLAGS], "not 'A_b'"),
    (["tpu_pod.sh", "--poll=soon", *TPU, *FLAGS], "not 'soon'"),
    (["tpu_pod.sh", "--bucket=gs://b", *TPU, *FLAGS], "not 'gs://b'"),
    (["tpu_pod.sh", "--spott", *TPU, *FLAGS], "unknown option '--spott'"),
    (["tpu_pod.sh", "--config=a", *TPU], "unknown option '--config=a'"),
    (["tpu_pod.sh", "train", *TPU, *FLAGS], "unknown command 'train'"),
    (["tpu_pod.sh", "stop", "delete", "--name=a", "--zone=z"], "'stop' and 'delete'"),
    (["tpu_pod.sh", "stop", *TPU, *FLAGS], "for run, not for stop"),
    (["tpu_pod.sh", "--setup=nowhere.sh", *TPU, *FLAGS], "no file 'nowhere.sh'"),
    (["tpu_pod.sh", *TPU, "--workdir=w"], "--config=... of eqm_jax.main is missing"),
    (["gke.sh", "--image=i", "--bucket=b", "--", *FLAGS], "--name"),
    (["gke.sh", "--name=a", "--bucket=b", "--", *FLAGS], "--image"),
    (["gke.sh", "--name=a", "--image=i", "--", *FLAGS], "--bucket"),
    (["gke.sh", "--topology=4", *GKE, *FLAGS], "not '4'"),
    (["gke.sh", "--topology=4x4", "--chips=3", *GKE, *FLAGS], "do not divide by --chips=3"),
    (["gke.sh", "--spott", *GKE, *FLAGS], "unknown option '--spott'"),
    (["gke.sh", *GKE, "--config=c"], "--workdir=... of eqm_jax.main is missing"),
    (["slurm.sbatch", "--config=c"], "no --workdir"),
    (["supervise.sh"], "no command"),
    (["tpu_worker.sh", "dance"], "not 'dance'"),
  ],
)
def test_wrong_usage_is_told_in_one_line(tmp_path, command, text):
  fakes = environment(tmp_path)  # and were anything run after all, it would not be the real one
  for name in ("gcloud", "kubectl", "srun", "python"):
    program(tmp_path / name, f"import pathlib\npathlib.Path({str(tmp_path / 'called')!r}).touch()")
  finished = call("bash", LAUNCH / command[0], *command[1:], env=fakes, cwd=ROOT)
  assert finished.returncode == 2, finished.stderr
  assert text in finished.stderr and len(finished.stderr.splitlines()) == 1
  assert not (tmp_path / "called").exists()


def test_slurm_help_is_its_head():
  finished = call("bash", LAUNCH / "slurm.sbatch", "--help")
  assert finished.returncode == 0 and "sbatch --nodes=2" in finished.stdout and "#" not in finished.stdout


@pytest.mark.parametrize("name", ["local.sh", "tpu_pod.sh", "gke.sh"])
def test_help_names_every_option(name):
  finished = call(f"./{name}", "--help", cwd=LAUNCH)
  assert finished.returncode == 0 and "set -e" not in finished.stdout
  options = re.findall(r"^ +(--[a-z-]+)(?:=\*)?\)", (LAUNCH / name).read_text(), re.MULTILINE)
  assert len(options) > 3 and all(option in finished.stdout for option in set(options) - {"--help"})


# ---------------------------------------------------------------- supervise.sh

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
print(f"process {name} is here", file=sys.stderr, flush=True)
record = {"arguments": sys.argv[1:], "xla_flags": os.environ.get("XLA_FLAGS"), "directory": os.getcwd()}
record["compiled"] = os.environ.get("JAX_COMPILATION_CACHE_DIR")
(records / f"{name}.partial").write_text(json.dumps(record))
(records / f"{name}.partial").rename(records / f"{name}.json")
if act == "fail":
  sys.exit(7)
end = time.monotonic() + 60  # when the test is no more
while (act == "stubborn" or act == "wait" and not told) and time.monotonic() < end:
  time.sleep(0.02)
  if told:
    (records / f"{name}.told").write_text(told[0])
"""


@pytest.fixture
def recorder(tmp_path):
  (tmp_path / "records").mkdir()
  return program(tmp_path / "bin" / "python", RECORDER)


def records(tmp_path) -> dict[str, dict]:
  return {path.stem: json.loads(path.read_text()) for path in (tmp_path / "records").glob("*.json")}


@pytest.mark.parametrize("act, told, status", [("end", False, 0), ("fail", False, 7), ("wait", True, 143)])
def test_a_run_that_was_told_to_end_is_not_taken_for_a_finished_one(tmp_path, recorder, act, told, status):
  status_file = tmp_path / "status"
  env = environment(tmp_path, RECORDS=tmp_path / "records", ACTS=json.dumps({"0": act}), STATUS_FILE=status_file)
  process = subprocess.Popen(["bash", LAUNCH / "supervise.sh", recorder, *FLAGS], env=env)
  if told:
    wait_until(lambda: records(tmp_path), "the run")
    process.terminate()
  assert process.wait(30) == status
  assert status_file.read_text() == f"{status}\n"
  assert records(tmp_path)["0"]["arguments"] == FLAGS
  if told:
    assert (tmp_path / "records" / "0.told").read_text() == "SIGTERM", "it could not save"


# ---------------------------------------------------------------- local.sh


def local(tmp_path, *words, acts=None, **more) -> subprocess.Popen:
  env = environment(tmp_path, RECORDS=tmp_path / "records", ACTS=json.dumps(acts or {}), XLA_FLAGS="--xla_dump_to=/x y")
  env["PYTHON"] = str(tmp_path / "bin" / "python")
  command = ["bash", LAUNCH / "local.sh", *words, *FLAGS]
  return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)


def check_local_records(found: dict[str, dict], processes: int, devices: int):
  assert set(found) == {str(i) for i in range(processes)}
  ports = set()
  for i, record in found.items():
    expected = ["-m", "eqm_jax.main", *FLAGS]
    if processes > 1:
      ports.add(record["arguments"][len(expected)])
      expected += [record["arguments"][len(expected)], f"--num_processes={processes}", f"--process_id={i}"]
    assert record["arguments"] == expected
    assert record["xla_flags"] == f"--xla_force_host_platform_device_count={devices} --xla_dump_to=/x y"
  assert all(re.fullmatch(r"--coordinator_address=localhost:\d+", port) for port in ports)
  assert len(ports) == (processes > 1)


@pytest.mark.parametrize("processes, devices", [(1, 1), (1, 8), (3, 2)])
def test_local_processes_get_their_flags_and_a_dry_run_prints_the_same(tmp_path, recorder, processes, devices):
  words = [f"--processes={processes}", f"--devices={devices}"]
  process = local(tmp_path, *words)
  _, stderr = process.communicate(timeout=30)
  assert process.returncode == 0, stderr
  check_local_records(records(tmp_path), processes, devices)
  expected = {f"{f'[{i}] ' if i else ''}process {i} is here" for i in range(processes)}
  assert set(stderr.splitlines()) == expected
  shutil.rmtree(tmp_path / "records")
  (tmp_path / "records").mkdir()
  printed, _ = local(tmp_path, "--dry-run", *words).communicate(timeout=30)
  assert not records(tmp_path)
  call("bash", "-c", printed, env=environment(tmp_path, RECORDS=tmp_path / "records"))
  check_local_records(records(tmp_path), processes, devices)


@pytest.mark.parametrize("other", ["wait", "stubborn"])
def test_local_processes_that_are_left_behind_are_stopped(tmp_path, recorder, other):
  begin = time.monotonic()
  process = local(tmp_path, "--processes=2", "--grace=1", acts={"0": other, "1": "fail"})
  _, stderr = process.communicate(timeout=30)
  assert process.returncode == 7, stderr
  assert 0.9 < time.monotonic() - begin < 20, "the other one was not given its time"
  assert (tmp_path / "records" / "0.told").read_text() == "SIGTERM"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("processes", [1, 2])
def test_signals_reach_all_local_processes(tmp_path, recorder, number, processes):
  process = local(tmp_path, f"--processes={processes}", acts={"0": "wait", "1": "wait"})
  wait_until(lambda: len(records(tmp_path)) == processes, "the processes")
  process.send_signal(number)
  _, stderr = process.communicate(timeout=30)
  assert process.returncode == 0, stderr
  for i in range(processes):
    assert (tmp_path / "records" / f"{i}.told").read_text() == number.name


TINY = [
  "--config=configs/digits.py:smoke", "--config.model.width=16", "--config.model.depth=1", "--config.model.num_heads=2",
  "--config.train.steps=4", "--config.train.batch_size=8", "--config.optimizer.warmup_steps=1",
  "--config.evaluation.samples=0", "--config.mesh.data=-1",
]  # fmt: skip


@pytest.mark.parametrize(
  "words, devices",
  [(["--processes=2"], "2 × cpu in 2"), pytest.param(["--devices=2"], "2 × cpu in 1", marks=pytest.mark.slow)],
)
def test_local_training(tmp_path, words, devices):
  env = environment(tmp_path, PYTHON=sys.executable)
  finished = call("bash", LAUNCH / "local.sh", *words, *TINY, f"--workdir={tmp_path / 'run'}", env=env, cwd=ROOT)
  assert finished.returncode == 0, finished.stderr
  assert f"devices: {devices}" in finished.stderr
  steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  assert steps == [1, 4]


# ---------------------------------------------------------------- tpu_pod.sh and tpu_worker.sh

# Plays gcloud, with one TPU of two workers; its state is in the file `state`. Creating it succeeds as often as the file
# `capacity` says "yes"; in a queue there is a wait first. The file `drop` ends the next connection that follows a log.
GCLOUD = """
import json, os, pathlib, shutil, subprocess, sys
world = pathlib.Path(os.environ["WORLD"])
state, capacity, waiting = world / "state", world / "capacity", world / "waiting"
workers = [world / "workers" / str(i) for i in range(2)]
words = [word for word in sys.argv[1:] if not word.startswith("--")]
flags = dict(word.split("=", 1) for word in sys.argv[1:] if word.startswith("--") and "=" in word)
with open(world / "calls", "a") as file:
  file.write(json.dumps(sys.argv[1:]) + "\\n")
group, verb = words[2:4]
if verb == "list":
  found = state.read_text() if state.exists() else ""
  if group == "queued-resources":
    if waiting.exists():
      found = "WAITING_FOR_RESOURCES"
      waiting.unlink()
    else:
      found = {"READY": "ACTIVE", "PREEMPTED": "SUSPENDED"}.get(found, found)
  print(found)
elif verb == "create":
  now, *later = capacity.read_text().split()
  capacity.write_text(" ".join(later))
  if now != "yes":
    sys.exit("There is no more capacity")
  if group == "queued-resources":
    waiting.touch()
  for home in workers:
    home.mkdir(parents=True)
  state.write_text("READY")
elif verb == "delete":
  if group == "queued-resources" and "--force" not in sys.argv:
    sys.exit("it has a TPU")
  shutil.rmtree(world / "workers")
  state.unlink()
elif not state.exists() or state.read_text() != "READY":
  sys.exit("cannot connect")
elif verb == "scp":
  for home in workers:
    shutil.copy(words[4], home / words[5].removeprefix("a:"))
else:
  if "follow" in flags["--command"] and (world / "drop").exists():
    (world / "drop").unlink()
    sys.exit(255)
  chosen = workers if flags["--worker"] == "all" else [workers[int(flags["--worker"])]]
  started = []
  for home in chosen:
    own = {"HOME": str(home), "HOSTNAME": f"t1v-n-1234-w-{home.name}"}
    own["PATH"] = f"{world / 'worker_bin'}:{os.environ['PATH']}"
    command = ["bash", "-c", " ".join(flags["--command"].split(" "))]  # as gcloud and ssh take it apart and together
    started.append(subprocess.Popen(command, cwd=home, env={**os.environ, **own}))
  sys.exit(next((status for status in [process.wait() for process in started] if status), 0))
"""

# Plays the Python of a worker: of the system, of the virtual environment, and in it eqm_jax.main, which ends as the
# file `acts` says for the n-th start on this worker.
WORKER_PYTHON = """
import json, os, pathlib, shutil, signal, sys, time
world, worker = pathlib.Path(os.environ["WORLD"]), pathlib.Path(os.environ["HOME"]).name
if sys.argv[2] == "venv":
  os.makedirs("venv/bin")
  shutil.copy(sys.argv[0], "venv/bin/python")
  sys.exit()
if sys.argv[2] == "pip":
  sys.exit(0 if pathlib.Path("code/setup.py").exists() else "no package")
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(True))
runs = world / "runs"
runs.mkdir(exist_ok=True)
before = len(list(runs.glob(f"{worker}-*")))
record = {"arguments": sys.argv[1:], "pid": os.getpid(), "files": os.listdir()}
record |= {name: os.path.realpath(name) for name in ("runs", "data")}
record["compiled"] = os.environ["JAX_COMPILATION_CACHE_DIR"]
(runs / f"{worker}-{before}").write_text(json.dumps(record))
act = (world / "acts").read_text().split()[before]
print(f"worker {worker} begins", flush=True)

def wait_until(condition):
  end = time.monotonic() + 60  # when the test is no more
  while not condition() and time.monotonic() < end:
    time.sleep(0.02)

def pids(name):
  return [int((world / "workers" / i / "eqm_jax" / name).read_text()) for i in "01"]

if act == "fail":
  sys.exit(f"error of worker {worker}")
if act == "wait":
  wait_until(lambda: told or (world / "finish").exists())
if act in ("preempted", "told"):  # when both are there, the first one's machine is told, or both are gone
  wait_until(lambda: all((runs / f"{i}-{before}").exists() for i in "01"))
  if worker == "0" and act == "preempted":
    time.sleep(0.3)
    (world / "state").write_text("PREEMPTED")
    mains = [json.loads((runs / f"{i}-{before}").read_text())["pid"] for i in "10"]
    for pid in pids("pid") + mains:
      os.kill(pid, signal.SIGKILL)
  if worker == "0":
    os.kill(pids("pid")[0], signal.SIGTERM)
    wait_until(lambda: told)
    (world / "saved").touch()
  wait_until((world / "saved").exists)
print("the end", flush=True)
"""


class Cloud:
  """A repository, a gcloud, and workers, all in one directory."""

  def __init__(self, world: pathlib.Path, acts: str, capacity: str = "yes"):
    self.world = world
    self.repository = world / "repository"
    shutil.copytree(LAUNCH, self.repository / "launch")
    (self.repository / "setup.py").touch()
    for command in ("init", "add --all"):
      subprocess.run(["git", *command.split()], cwd=self.repository, check=True, capture_output=True)
    (self.repository / "data").mkdir()
    (self.repository / "data" / "large.npz").touch()  # git does not track it
    program(world / "bin" / "gcloud", GCLOUD)
    program(world / "worker_bin" / "python3.13", WORKER_PYTHON)
    mounted = "import pathlib, sys\nmark = pathlib.Path(sys.argv[-1]) / 'mounted'\n"
    program(world / "worker_bin" / "mountpoint", f"{mounted}sys.exit(not mark.exists())")
    program(world / "worker_bin" / "gcsfuse", f"{mounted}mark.write_text(' '.join(sys.argv[1:]))")
    (world / "acts").write_text(acts)
    (world / "capacity").write_text(capacity)
    self.env = environment(world / "bin", WORLD=world)
    self.started = []

  def command(self, *words: str, flags=FLAGS) -> list[str]:
    where = ["--name=a", "--zone=z", "--poll=0.1"]
    what = ["--type=v5litepod-16", "--spot", *words, "--", *flags] if flags else words
    return ["bash", str(self.repository / "launch" / "tpu_pod.sh"), *where, *what]

  def run(self, *words: str, flags=FLAGS) -> subprocess.CompletedProcess:
    return call(*self.command(*words, flags=flags), env=self.env)

  def start(self, *words: str) -> subprocess.Popen:
    """`run`, which goes on while the test does; returns when both workers have begun."""
    process = subprocess.Popen(self.command(*words), env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    self.started.append(process)
    wait_until(lambda: len(self.runs()) == 2, "the run")
    return process

  def calls(self) -> list[list[str]]:
    path = self.world / "calls"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

  def verbs(self, *which: str) -> list[str]:
    return [words[3] for words in self.calls() if words[3] in which]

  def runs(self) -> dict[str, dict]:
    """What eqm_jax.main was given, by worker and number of the start."""
    return {path.name: json.loads(path.read_text()) for path in (self.world / "runs").glob("*") if path.stat().st_size}


@pytest.fixture
def clouds(tmp_path):
  """Makes clouds, and ends what runs in them."""
  made = []

  def make(*arguments, **more) -> Cloud:
    made.append(Cloud(tmp_path / f"world{len(made)}", *arguments, **more))
    return made[-1]

  yield make
  for cloud in made:
    (cloud.world / "finish").touch()
    for process in cloud.started:
      process.kill()
      process.communicate()


def test_a_tpu_run_that_ends_is_over_and_a_dry_run_prints_what_it_did(clouds):
  cloud = clouds("wait")
  (cloud.world / "finish").touch()
  finished = cloud.run("--bucket=my-bucket", "--create-flag=--reserved", "--ssh-flag=--internal-ip")
  assert finished.returncode == 0, finished.stderr
  assert "worker 0 begins" in finished.stdout and "the end" in finished.stdout
  runs = cloud.runs()
  assert set(runs) == {"0-0", "1-0"}
  for name, record in runs.items():
    assert record["arguments"] == ["-m", "eqm_jax.main", *FLAGS]
    storage = cloud.world / "workers" / name[0] / "eqm_jax" / "storage"
    assert all(record[name] == str(storage / name) for name in ("runs", "data", "compiled"))
    assert set(record["files"]) == {"launch", "setup.py", "data", "runs"}
    mount = (storage / "mounted").read_text().split()
    assert mount[-2:] == ["my-bucket", "storage"] and "--rename-dir-limit=1000000" in mount
  assert cloud.verbs("create", "delete") == ["create"]
  create = next(words for words in cloud.calls() if words[3] == "create")
  assert {"--accelerator-type=v5litepod-16", "--version=v2-alpha-tpuv5-lite", "--spot", "--reserved"} < set(create)
  assert all("--internal-ip" in words for words in cloud.calls() if words[3] in ("ssh", "scp"))

  again = clouds("wait")
  (again.world / "finish").touch()
  printed = again.run("--dry-run", "--bucket=my-bucket", "--create-flag=--reserved", "--ssh-flag=--internal-ip")
  assert printed.returncode == 0 and not again.calls() and not (again.repository / "build").exists()
  lines = call("bash", "-e", "-c", printed.stdout, env=again.env, cwd=again.repository)
  assert lines.returncode == 0, lines.stderr
  unique = [list(words) for words in dict.fromkeys(map(tuple, cloud.calls()))]
  assert again.calls()[:-1] == unique
  assert again.calls()[-1][2:5] == ["tpu-vm", "delete", "a"]
  assert [record["arguments"] for record in again.runs().values()] == [["-m", "eqm_jax.main", *FLAGS]] * 2


@pytest.mark.parametrize("queued", [[], ["--queued"]])
def test_a_preempted_run_goes_on_in_a_new_tpu(clouds, queued):
  cloud = clouds("preempted wait", capacity="yes no yes")
  (cloud.world / "finish").touch()
  finished = cloud.run(*queued)
  assert finished.returncode == 0, finished.stderr
  assert cloud.verbs("create", "delete") == ["create", "delete", "create", "create"]
  assert {words[2] for words in cloud.calls() if words[3] in ("create", "delete")} == {
    "queued-resources" if queued else "tpu-vm"
  }
  runs = cloud.runs()
  assert set(runs) == {"0-0", "1-0", "0-1", "1-1"}
  assert all(record["arguments"] == ["-m", "eqm_jax.main", *FLAGS] for record in runs.values())
  assert finished.stdout.count("the end") == 1


def test_a_run_that_saved_because_a_machine_was_told_is_started_again(clouds):
  """Both processes exit with 0, as at the end of the training; the TPU stays READY."""
  cloud = clouds("told wait")
  (cloud.world / "finish").touch()
  finished = cloud.run()
  assert finished.returncode == 0, finished.stderr
  assert set(cloud.runs()) == {"0-0", "1-0", "0-1", "1-1"}
  assert cloud.verbs("create", "delete") == ["create"]


def test_a_failed_run_is_not_started_again_and_its_log_is_shown(clouds):
  cloud = clouds("fail fail fail")
  finished = cloud.run()
  assert finished.returncode == 1
  assert "[worker 0] error of worker 0" in finished.stdout and "[worker 1] error of worker 1" in finished.stdout
  assert set(cloud.runs()) == {"0-0", "1-0"} and cloud.verbs("create", "delete") == ["create"]


def test_a_tpu_that_cannot_be_made_is_told(clouds):
  cloud = clouds("wait", capacity="no yes")
  finished = cloud.run()
  assert finished.returncode == 1 and "no more capacity" in finished.stderr
  assert cloud.verbs("create") == ["create"] and not cloud.runs()


def test_what_cannot_be_installed_is_not_tried_for_ever(clouds):
  cloud = clouds("wait")
  subprocess.run(["git", "rm", "--quiet", "--force", "setup.py"], cwd=cloud.repository, check=True)
  finished = cloud.run()
  assert finished.returncode == 1 and "no package" in finished.stderr
  assert len(cloud.verbs("scp")) == 3 and not cloud.runs()


def test_stop_ends_the_run_for_good(clouds):
  cloud = clouds("wait wait")
  process = cloud.start()
  assert "running\nrunning\n" in cloud.run("status", flags=()).stdout
  assert cloud.run("stop", flags=()).returncode == 0
  output = process.communicate(timeout=60)[0].decode()
  assert process.returncode == 1, output
  assert "the end" in output and set(cloud.runs()) == {"0-0", "1-0"}
  assert cloud.run("status", flags=()).stdout == "READY\nstopped\nstopped\n"
  assert cloud.run("logs", "--worker=1", flags=()).stdout == "worker 1 begins\nthe end\n"
  assert cloud.run("delete", flags=()).returncode == 0 and cloud.verbs("delete") == ["delete"]


def test_a_run_outlives_its_watcher_and_is_found_again(clouds):
  cloud = clouds("wait wait")
  watcher = cloud.start()
  watcher.kill()
  watcher.wait()
  other = cloud.run(flags=[*FLAGS, "--config.seed=1"])
  assert other.returncode == 1 and "another run is going on" in other.stderr
  (cloud.world / "drop").touch()
  process = cloud.start()
  wait_until(lambda: not (cloud.world / "drop").exists(), "the second watcher")
  time.sleep(1)
  assert process.poll() is None
  (cloud.world / "finish").touch()
  output = process.communicate(timeout=60)[0].decode()
  assert process.returncode == 0 and "the end" in output
  assert set(cloud.runs()) == {"0-0", "1-0"} and cloud.verbs("scp", "create") == ["create", "scp"]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("gcloud"), reason="gcloud is not installed")
@pytest.mark.parametrize("queued", [[], ["--queued"]])
def test_gcloud_itself_knows_the_flags(tmp_path, clouds, queued):
  """It reads them before it asks who is calling, which here is nobody, on a network that leads nowhere."""
  cloud = clouds("")
  printed = cloud.run("--dry-run", "--bucket=b", "--project=p", *queued).stdout
  nobody = {"CONFIG": tmp_path, "CORE_CHECK_GCE_METADATA": "false", "CORE_DISABLE_USAGE_REPORTING": "true"}
  nobody |= {"PROXY_TYPE": "http", "PROXY_ADDRESS": "localhost", "PROXY_PORT": "9"}
  env = environment(tmp_path, **{f"CLOUDSDK_{name}": value for name, value in nobody.items()})
  commands = [words for line in printed.split("\ngcloud ")[1:] if (words := shlex.split(line, comments=True))]
  assert len(commands) == 9
  for words in [*commands, ["compute", "tpus", "tpu-vm", "list", "--no-such-flag"]]:
    end = next((i for i, word in enumerate(words) if word == "--quiet"), len(words))
    finished = call("gcloud", *words[: end + 1], env=env)
    assert finished.returncode, "whom did that reach?"
    known = "active account" in finished.stderr
    assert known == ("--no-such-flag" not in words), finished.stderr


# ---------------------------------------------------------------- gke.sh and jobset.yaml


def gke(tmp_path, *words: str) -> tuple[list[str], dict]:
  """What kubectl is called with, and the manifest that it reads."""
  text = "import json, sys\njson.dump([sys.argv[1:], sys.stdin.read()], open(sys.argv[0] + '.call', 'w'))"
  kubectl = program(tmp_path / "bin" / "kubectl", text)
  env = environment(kubectl.parent)
  finished = call("bash", LAUNCH / "gke.sh", *GKE[:-1], *words, "--", *FLAGS, env=env)
  assert finished.returncode == 0, finished.stderr
  called = (tmp_path / "bin" / "kubectl.call").read_text()
  (tmp_path / "bin" / "kubectl.call").unlink()
  printed = call("bash", LAUNCH / "gke.sh", "--dry-run", *GKE[:-1], *words, "--", *FLAGS, env=env)
  assert not (tmp_path / "bin" / "kubectl.call").exists()
  assert call("bash", "-e", "-c", printed.stdout, env=env).returncode == 0
  assert (tmp_path / "bin" / "kubectl.call").read_text() == called, "the dry run prints something else"
  arguments, manifest = json.loads(called)
  return arguments, yaml.safe_load(manifest)


@pytest.mark.parametrize(
  "words, topology, chips, hosts",
  [
    ([], "4x4", 4, 4),
    (["--topology=16x16"], "16x16", 4, 64),
    (["--topology=2x4", "--chips=8"], "2x4", 8, 1),
    (["--accelerator=tpu-v5p-slice", "--topology=4x4x8"], "4x4x8", 4, 32),
  ],
)
def test_a_jobset_has_a_pod_for_every_host(tmp_path, words, topology, chips, hosts):
  _, manifest = gke(tmp_path, *words)
  (replicated,) = manifest["spec"]["replicatedJobs"]
  job = replicated["template"]["spec"]
  pod = job["template"]["spec"]
  (container,) = pod["containers"]
  assert job["completions"] == job["parallelism"] == hosts and replicated["replicas"] == 1
  assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == topology
  assert container["resources"]["limits"] == {"google.com/tpu": chips}


def test_a_jobset_restarts_after_preemption_and_keeps_its_files_in_the_bucket(tmp_path):
  arguments, manifest = gke(tmp_path, "--spot", "--namespace=n", "--restarts=3", "--service-account=s")
  assert arguments == ["apply", "--namespace=n", "--filename=-"]
  assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
  policy = manifest["spec"]["failurePolicy"]
  assert policy["maxRestarts"] == 3
  assert policy["rules"] == [
    {"action": "RestartJobSetAndIgnoreMaxRestarts", "onJobFailureReasons": ["PodFailurePolicy"]}
  ]
  job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
  pod, annotations = job["template"]["spec"], job["template"]["metadata"]["annotations"]
  (container,) = pod["containers"]
  assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
  assert pod["terminationGracePeriodSeconds"] >= 300 and pod["serviceAccountName"] == "s"
  disrupted, told = job["podFailurePolicy"]["rules"]
  assert disrupted["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
  assert told["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [143]}
  assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
  (volume,) = pod["volumes"]
  assert annotations["gke-gcsfuse/volumes"] == "true"
  assert volume["csi"]["driver"] == "gcsfuse.csi.storage.gke.io"
  assert volume["csi"]["volumeAttributes"]["bucketName"] == "b"
  assert " " not in volume["csi"]["volumeAttributes"]["mountOptions"]
  assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/storage"}]
  assert container["env"] == [{"name": "JAX_COMPILATION_CACHE_DIR", "value": "/storage/compiled"}]
  without = gke(tmp_path)[1]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
  assert set(pod["nodeSelector"]) - set(without["nodeSelector"]) == {"cloud.google.com/gke-spot"}


def test_the_command_of_a_pod_starts_the_run(tmp_path, recorder):
  job = gke(tmp_path)[1]["spec"]["replicatedJobs"][0]["template"]["spec"]
  (container,) = job["template"]["spec"]["containers"]
  assert not [word for word in container["args"] if re.search(r"(?<!\$)(\$\$)*\$\(", word)], "that is a variable"
  storage = tmp_path / "storage"
  command = [word.replace("/storage", str(storage)) for word in container["command"]]
  command += [word.replace("$$", "$") for word in container["args"]]  # as Kubernetes does
  env = environment(recorder.parent, RECORDS=tmp_path / "records", ACTS='{"0": "wait"}')
  process = subprocess.Popen(command, env=env, cwd=ROOT)  # as in the image, where the code is
  wait_until(lambda: records(tmp_path), "the run")
  process.terminate()
  assert process.wait(30) == 143
  assert records(tmp_path)["0"]["arguments"] == ["-m", "eqm_jax.main", *FLAGS]
  assert sorted(path.name for path in storage.iterdir()) == ["data", "runs"]


def test_the_manifest_is_yaml_before_it_is_filled_in_and_nothing_is_forgotten(tmp_path):
  text = (LAUNCH / "jobset.yaml").read_text()
  assert yaml.safe_load(text)["kind"] == "JobSet"
  left = str(gke(tmp_path)[1])
  for name in set(re.findall(r"\$[A-Z_]+", text)):
    assert name not in left.replace("$$HOME", "")


def test_the_image_is_made_of_what_is_here():
  copied = [line.split()[1:-1] for line in (LAUNCH / "Dockerfile").read_text().splitlines() if line.startswith("COPY ")]
  names = {name for sources in copied for name in sources}
  assert {"setup.py", "eqm_jax", "configs", "launch"} <= names and all((ROOT / name).exists() for name in names)


# ---------------------------------------------------------------- slurm.sbatch

# Play SLURM: srun runs one task, and tells it to end if TELL is set; the others record that they were called.
SRUN = """
import json, os, pathlib, subprocess, sys, time
records = pathlib.Path(os.environ["RECORDS"])
(records / "srun").write_text(json.dumps(sys.argv[1:]))
task = subprocess.Popen(sys.argv[sys.argv.index("bash"):])
if os.environ.get("TELL"):
  while not (records / "0.json").exists():
    time.sleep(0.02)
  task.terminate()
  os.kill(os.getppid(), 15)  # the shell of the job hears of it too
sys.exit(task.wait())
"""
SCONTROL = "import os, pathlib, sys\npathlib.Path(os.environ['RECORDS'], 'scontrol').write_text(' '.join(sys.argv[1:]))"


def slurm(tmp_path, recorder, *words: str, act="end", tell="", state="RUNNING") -> subprocess.CompletedProcess:
  for name, text in {"srun": SRUN, "scontrol": SCONTROL, "squeue": f"print({state!r})"}.items():
    program(recorder.parent / name, text)
  env = environment(recorder.parent, RECORDS=tmp_path / "records", ACTS=json.dumps({"0": act}), TELL=tell)
  env |= {"SLURM_JOB_ID": "77", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_CPUS_PER_TASK": "6"}
  env["HOME"] = str(tmp_path)
  env.pop("JAX_COMPILATION_CACHE_DIR", None)
  copied = shutil.copy(LAUNCH / "slurm.sbatch", tmp_path / "slurm_script")  # as SLURM does
  finished = call("bash", copied, *words, *FLAGS, env=env, cwd=tmp_path)
  if "--dry-run" in words:
    assert finished.returncode == 0 and not list((tmp_path / "records").iterdir())
    return call("bash", "-c", finished.stdout, env=env, cwd=ROOT)
  return finished


@pytest.mark.parametrize(
  "act, tell, state, status, requeued",
  [
    ("end", "", "RUNNING", 0, False),
    ("fail", "", "RUNNING", 7, False),
    ("wait", "yes", "RUNNING", 143, True),  # preempted, or at the time limit
    ("wait", "yes", "COMPLETING", 143, False),  # cancelled
  ],
)
def test_a_slurm_job_goes_on_unless_it_ended_failed_or_was_cancelled(
  tmp_path, recorder, act, tell, state, status, requeued
):
  finished = slurm(tmp_path, recorder, act=act, tell=tell, state=state)
  assert finished.returncode == status, finished.stderr
  asked = tmp_path / "records" / "scontrol"
  assert (asked.read_text() if asked.exists() else "") == ("requeue 77" if requeued else "")
  record = records(tmp_path)["0"]
  assert record["arguments"] == ["-m", "eqm_jax.main", *FLAGS] and record["directory"] == str(ROOT)
  assert record["compiled"] == f"{tmp_path}/.cache/eqm_jax"
  step = json.loads((tmp_path / "records" / "srun").read_text())
  assert {"--cpus-per-task=6", "--kill-on-bad-exit=0", "--gpu-bind=none"} < set(step)


def test_a_slurm_dry_run_prints_the_step(tmp_path, recorder):
  steps = []
  for words in (["--dry-run"], []):
    finished = slurm(tmp_path, recorder, *words)
    assert finished.returncode == 0, finished.stderr
    steps.append(json.loads((tmp_path / "records" / "srun").read_text()))
    assert records(tmp_path)["0"]["arguments"] == ["-m", "eqm_jax.main", *FLAGS]
  assert steps[0] == steps[1]
  assert (tmp_path / "records" / "scontrol").read_text() == "requeue 77"


def test_slurm_is_asked_for_a_process_a_gpu_and_for_time_to_save():
  options, text = {}, (LAUNCH / "slurm.sbatch").read_text()
  for line in text.splitlines():
    if line and not line.startswith("#"):
      break  # sbatch reads no further
    if line.startswith("#SBATCH --"):
      name, _, value = line.removeprefix("#SBATCH --").partition("=")
      options[name] = value
  assert len(options) == text.count("#SBATCH --")
  assert options["ntasks-per-node"] == options["gpus-per-node"] != ""
  name, seconds = options["signal"].split("@")
  assert name == "TERM" and int(seconds) >= 120
  assert "requeue" in options and options["open-mode"] == "append" and "%j" in options["output"]
