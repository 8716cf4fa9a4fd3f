"""Which variables of launchers mean one process."""

import pytest

from eqm_jax import launchers

SLURM = {"SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
OPEN_MPI = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911"}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}


@pytest.fixture(autouse=True)
def clean(monkeypatch):
  """No variable of a launcher, and no client of Kubernetes."""
  for name in (*launchers.TELLING, *launchers.SLURM, "SLURM_STEP_NUM_TASKS", launchers.OPEN_MPI, launchers.POD):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setattr(launchers.importlib.util, "find_spec", lambda name: None)


@pytest.mark.parametrize(
  "variables, line",
  [
    ({**SLURM, "SLURM_NTASKS": "1"}, ""),
    ({**SLURM, "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}, "SLURM's job has 8 tasks, but this step one"),
    ({**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1"}, ""),
    (OPEN_MPI, ""),  # a shell below mpirun
    ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, ""),
    (POD, ""),
    ({**POD, "JOB_COMPLETION_INDEX": "1"}, "JOB_COMPLETION_INDEX=1, but without the package kubernetes"),
  ],
)
def test_one_process_starts_at_once(monkeypatch, variables, line):
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  reason = launchers.alone()
  assert reason is not None and reason.startswith(line) and bool(reason) == bool(line) and "\n" not in reason


@pytest.mark.parametrize(
  "variables",
  [
    {},  # a TPU's metadata may name others
    {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "8"},  # outside any step, where JAX does not look to SLURM
    {**SLURM, "SLURM_NTASKS": "8"},
    {**SLURM, "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8"},
    {**SLURM, "SLURM_NTASKS": "8", **POD},  # SLURM in Kubernetes
    {**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "2"},
    {"TPU_WORKER_HOSTNAMES": "a,b", **POD},
    {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2", **POD},
    {"JAX_COORDINATOR_ADDRESS": "a:1", **POD},
  ],
)
def test_where_there_may_be_others_jax_looks_for_them(monkeypatch, variables):
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  assert launchers.alone() is None


def test_an_indexed_job_with_the_client_of_kubernetes_is_left_to_jax(monkeypatch):
  monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
  monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")
  monkeypatch.setattr(launchers.importlib.util, "find_spec", lambda name: name == "kubernetes")
  assert launchers.alone() is None and launchers.variables() == {"JOB_COMPLETION_INDEX": "0"}
