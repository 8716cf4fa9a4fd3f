"""launch/tpu_pod.sh, with a program in the place of gcloud that records how it was called.

The workers of a TPU are directories, in which the commands that come "over ssh" really run.
"""

import json
import pathlib
import shlex
import shutil
import subprocess
import time

import pytest
from launching import FLAGS, LAUNCH, call, environment, program, wait_until

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
