"""launch/slurm.sbatch, with programs in the place of SLURM's."""

import json
import shutil
import subprocess

import pytest
from conftest import ROOT
from launching import FLAGS, LAUNCH, call, environment, program, recording_python, records

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


@pytest.fixture
def recorder(tmp_path):
  return recording_python(tmp_path)


def slurm(tmp_path, recorder, *words: str, act="end", tell="", state="RUNNING") -> subprocess.CompletedProcess:
  for name, text in {"srun": SRUN, "scontrol": SCONTROL, "squeue": f"print({state!r})"}.items():
    program(recorder.parent / name, text)
  env = environment(recorder.parent, RECORDS=tmp_path / "records", ACTS=json.dumps({"0": act}), TELL=tell)
  env |= {"SLURM_JOB_ID": "77", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_CPUS_PER_TASK": "6"}
  env["HOME"] = str(tmp_path)
  env.pop("JAX_COMPILATION_CACHE_DIR", None)
  env |= {"XLA_FLAGS": "--xla_dump_to=/x", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}
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
  assert record["compiled"] == f"{tmp_path}/.cache/eqm_jax" and record["memory"] == "0.5"
  assert "latency_hiding_scheduler=true" in record["xla_flags"] and record["xla_flags"].endswith(" --xla_dump_to=/x")
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
