"""The scripts of launch/: what is refused, what they say of themselves, and supervise.sh."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from launching import FLAGS, GKE, LAUNCH, SCRIPTS, call, environment, program, recording_python, records, wait_until


@pytest.fixture
def recorder(tmp_path):
  return recording_python(tmp_path)


def test_shellcheck_finds_nothing():
  shellcheck = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
  finished = call(shellcheck, "--external-sources", *(LAUNCH / name for name in SCRIPTS), cwd=ROOT)
  assert finished.returncode == 0, finished.stdout + finished.stderr


def test_the_flags_for_gpus_are_flags_that_xla_knows(tmp_path):
  """XLA ends a process that has others."""
  env = environment(tmp_path, HOME=tmp_path, XLA_FLAGS="", JAX_PLATFORMS="cpu", PYTHON=sys.executable)
  env.pop("XLA_PYTHON_CLIENT_MEM_FRACTION", None)
  show = "import jax, os; print(len(jax.devices()), *map(os.getenv, ('XLA_PYTHON_CLIENT_MEM_FRACTION', 'XLA_FLAGS')))"
  finished = call("bash", "-c", f'source launch/gpu_env.sh && "$PYTHON" -c "{show}"', env=env, cwd=ROOT)
  assert finished.returncode == 0, finished.stderr
  count, memory, *flags = finished.stdout.split()
  assert (count, memory) == ("1", "0.9") and all(flag.startswith("--xla_gpu_") for flag in flags)


TPU = ["--name=a", "--zone=z", "--type=v6e-8", "--"]


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
    (["gke.sh", "--slices=two", *GKE, *FLAGS], "--slices is a number, not 'two'"),
    (["gke.sh", "--slices=2", *GKE, *FLAGS], "--slices=2 needs --config.mesh.dcn_data=2"),
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
