"""python -m eqm_jax.main --config=configs/digits.py --workdir=runs/digits [--mode=train]"""

import contextlib
import logging
import os
import sys

import absl.logging
from absl import app, flags
from ml_collections import config_flags

from eqm_jax import hardware

CONFIG = config_flags.DEFINE_config_file("config", None, "File with get_config(); file.py:variant chooses a variant.")
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run: checkpoints, metrics, results.")
MODES = "prepare train evaluate statistics sample denoise ood compose inpaint report benchmark plan".split()
MODE = flags.DEFINE_enum("mode", "train", MODES, "train: to the end, then evaluate. report: trains its own models.")
TOPOLOGY = flags.DEFINE_string("topology", None, "TPU slices of --mode=plan: v5e:4x4, v4-32, or several with commas.")
SEARCH = flags.DEFINE_boolean("search", False, "Of --mode=plan: look for cheaper settings even if the given ones fit.")
COMPARE = flags.DEFINE_string("compare", None, "Of --mode=benchmark: an earlier benchmark.json; prints the ratios.")
COMPARE_ANY = flags.DEFINE_boolean("compare_any", False, "Compare also with one of another config or machine.")
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Model to use if not the workdir's: anything eqm_jax.load reads.")
ADDRESS = flags.DEFINE_string("coordinator_address", None, "HOST:PORT of the first process, where no machine tells it.")
PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes of the run, with --coordinator_address.")
PROCESS = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
flags.mark_flags_as_required(["config", "workdir"])

log = logging.getLogger("eqm_jax")


def main(argv: list[str]):
  if len(argv) > 1:
    raise ValueError(f"arguments that are no flags: {' '.join(argv[1:])}")
  _log_to_stderr()
  # Imported here, so that a mistyped flag is told at once.
  from eqm_jax import devices, programs
  from eqm_jax.plan import topology

  if alone := MODE.value == "plan":  # and without devices, wherever it runs
    topology.on_any_machine()
  given = ADDRESS.value, PROCESSES.value, PROCESS.value
  with contextlib.nullcontext() if alone else devices.joined(*given, saves=MODE.value == "train"):
    log.setLevel(logging.WARNING if devices.process()[0] else logging.INFO)  # what is the same is told once
    options = {flag.name: flag.value for flag in (TOPOLOGY, SEARCH, COMPARE, COMPARE_ANY)}
    programs.run(MODE.value, CONFIG.value, os.path.abspath(WORKDIR.value), CHECKPOINT.value, **options)


def _log_to_stderr():  # our own lines; the libraries' (through absl) from WARNING on
  absl.logging.set_verbosity(absl.logging.WARNING)
  handler = logging.StreamHandler()
  handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
  log.addHandler(handler)
  log.propagate = False


def _parse_flags(argv: list[str]) -> list[str]:
  try:
    return flags.FLAGS(argv)
  except (AttributeError, KeyError) as error:  # of a ConfigDict, which names the nearest key
    sys.exit(f"error: unknown key in the config: {_plain(str(error))}")
  except (flags.Error, ValueError, OSError) as error:  # of a config file, with its traceback in the text
    sys.exit(f"error: {_plain(str(error).split('Error: ')[-1])}")


def _plain(text: str) -> str:
  """One line without the quotes and escapes of nested exceptions."""
  return " ".join(text.replace("\\n", " ").replace("\\", "").replace("'", "").replace('"', "").split())


def run():
  """The entry point: what a user can mend is told in one line, without a traceback."""
  try:
    app.run(main, flags_parser=_parse_flags)
  except (ValueError, FloatingPointError, OSError) as error:
    if os.environ.get("EQM_JAX_TRACEBACK"):
      raise
    sys.exit(f"error: {error}")


if __name__ == "__main__":
  hardware.restart_with_huge_pages()
  run()
