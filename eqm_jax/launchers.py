"""What the variables of launchers (Open MPI, SLURM, Cloud TPU, Kubernetes) say about the other processes of a run.

JAX finds them through the same variables, in this order. It takes what a shell inside an allocation inherits for a run
of several processes, and waits for the others; what is recognized here as one process starts at once.
"""

import importlib.util
import os

OPEN_MPI = "OMPI_MCA_orte_hnp_uri"
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")  # JAX needs them all
TPU_HOSTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
POD, POD_INDEX = "KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"
TELLING = (  # whom a process waits for
  "JAX_COORDINATOR_ADDRESS",
  "OMPI_COMM_WORLD_SIZE",
  "OMPI_COMM_WORLD_RANK",
  "SLURM_NTASKS",
  "SLURM_PROCID",
  *TPU_HOSTS,
  "TPU_WORKER_ID",
  "MEGASCALE_COORDINATOR_ADDRESS",
  "MEGASCALE_NUM_SLICES",
  POD_INDEX,
)


def variables() -> dict[str, str]:
  """The variables that tell of other processes, as far as they are set."""
  return {name: os.environ[name] for name in TELLING if name in os.environ}


def alone() -> str | None:
  """Why this process is the only one of its run, as a line for its user, "" where nobody would expect others.

  Returns:
    None: there may be others, for JAX to find.
  """
  env = os.environ
  if "JAX_COORDINATOR_ADDRESS" in env:
    return None
  if OPEN_MPI in env:
    return "" if env.get("OMPI_COMM_WORLD_SIZE", "1") == "1" else None
  if all(name in env for name in SLURM):
    return _slurm_step(env.get("SLURM_STEP_NUM_TASKS", env["SLURM_NTASKS"]), env["SLURM_NTASKS"])
  hosts = next((env[name] for name in TPU_HOSTS if name in env), None)
  if hosts is not None:
    is_one = "," not in hosts and env.get("MEGASCALE_NUM_SLICES") in (None, "", "1")
    return "" if is_one else None
  return _pod() if POD in env else None


def _slurm_step(tasks: str, tasks_of_job: str) -> str | None:
  """The shell that salloc opens is a step of one task, but has the number of tasks of the whole job."""
  if tasks != "1":
    return None
  return "" if tasks_of_job == "1" else f"SLURM's job has {tasks_of_job} tasks, but this step one; srun starts all"


def _pod() -> str | None:
  """JAX asks Kubernetes about the others, but only of an indexed job, and with its client."""
  if POD_INDEX not in os.environ:
    return ""
  if importlib.util.find_spec("kubernetes"):
    return None
  return f"{POD_INDEX}={os.environ[POD_INDEX]}, but without the package kubernetes other pods of the job are not found"
