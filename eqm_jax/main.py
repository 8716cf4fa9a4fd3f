"""Runs one mode of eqm_jax: training, sampling, evaluation, and what else --mode=help lists.

  python -m eqm_jax.main --config=configs/digits.py --workdir=runs/digits
  python -m eqm_jax.main --config=configs/digits.py --workdir=runs/digits --mode=sample --config.sample.num_samples=20
  python -m eqm_jax.main --mode=help

The program `eqm-jax` does the same as `python -m eqm_jax.main`, and --config=digits finds that config anywhere. Every
key of the config is a flag, --config.SECTION.KEY=VALUE; configs/base.py documents them all.
"""

import contextlib
import importlib.metadata
import logging
import os
import platform
import re
import sys

import absl.logging
from absl import app, flags
from ml_collections import config_flags

import eqm_jax
from eqm_jax import experiments, hardware, modes, process, progress

CONFIG = config_flags.DEFINE_config_file(
  "config", None, "The experiment: a name such as digits, or a file FILE.py; with :VARIANT, one of its variants."
)
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run, for checkpoints, metrics and results.")
MODE = flags.DEFINE_enum("mode", "train", [*modes.NAMES, "help"], "What to do; help explains each mode in a table.")
CHECKPOINT = flags.DEFINE_string(
  "checkpoint", None, "Model to use instead of the workdir's, as eqm_jax.load takes it: a path, or digits."
)
TOPOLOGY = flags.DEFINE_string("topology", None, "For plan: TPU slices, such as v5e:4x4 or v4-32,v5e-16.")
SEARCH = flags.DEFINE_boolean("search", False, "For plan: look for cheaper settings even where the config fits.")
COMPARE = flags.DEFINE_string("compare", None, "For benchmark: an earlier benchmark.json to compare with.")
COMPARE_ANY = flags.DEFINE_boolean(
  "compare_any", False, "For benchmark: compare even if that is of another config or machine."
)
ADDRESS = flags.DEFINE_string(
  "coordinator_address",
  None,
  "Several processes: HOST:PORT of the first one. TPU pods, SLURM, Open MPI and GKE know it.",
)
PROCESSES = flags.DEFINE_integer(
  "num_processes", None, "Several processes: their number, with --coordinator_address. 1: looks for no others."
)
PROCESS = flags.DEFINE_integer("process_id", None, "Several processes: the number of this one, from 0.")
VERSION = flags.DEFINE_boolean("version", False, "Print the versions of the package, JAX and Python.")

log = logging.getLogger("eqm_jax")


def main(argv: list[str]):
  if VERSION.value:
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "flax")]
    print(f"eqm_jax {eqm_jax.__version__}", *versions, f"Python {platform.python_version()}", sep=", ")
    return
  if MODE.value == "help":
    sys.stdout.reconfigure(errors="replace")  # of an encoding without the table's lines
    print(modes.table())
    return
  _check_arguments(argv)
  _log_to_stderr()
  hardware.use_cpu_without_accelerator()
  from eqm_jax import distributed  # imports JAX: a mistyped flag is refused before it

  mode = modes.declaration(MODE.value)
  processes = (ADDRESS.value, PROCESSES.value, PROCESS.value)
  with contextlib.ExitStack() as stack:
    if mode.needs_devices:
      stack.enter_context(distributed.initialized(*processes, saves=mode.name == "train"))
      if distributed.process_index_and_count()[0] > 0:
        log.setLevel(logging.WARNING)  # the first process logs what is the same in all
    mode_flags = {flag.name: flag.value for flag in (CHECKPOINT, TOPOLOGY, SEARCH, COMPARE, COMPARE_ANY)}
    modes.run(mode.name, CONFIG.value, WORKDIR.value, **mode_flags)


def _check_arguments(argv: list[str]):
  if len(argv) > 1:
    raise ValueError(f"{' '.join(argv[1:])}: arguments must be flags, --NAME=VALUE; --help lists them")
  missing = [f"--{flag.name}" for flag in (CONFIG, WORKDIR) if flag.value is None]
  if missing:
    raise ValueError(
      f"{' and '.join(missing)} missing: --mode={MODE.value} needs --config=FILE and --workdir=DIRECTORY, give them"
    )


def _log_to_stderr():
  """Logs the package's lines; those of libraries, which use absl, from WARNING on."""
  absl.logging.set_verbosity(absl.logging.WARNING)
  log.addHandler(progress.LineHandler(sys.stderr))
  log.setLevel(logging.INFO)
  log.propagate = False


def _parse_flags(argv: list[str]) -> list[str]:
  to_none = [flag for flag in argv if re.fullmatch(r"--config\.[\w.]+=None", flag)]  # ml_collections parses no None
  try:
    rest = flags.FLAGS([argument for argument in _with_path(argv) if argument not in to_none])
    for flag in to_none if CONFIG.value is not None else ():
      experiments.set_value(CONFIG.value, flag.removeprefix("--config.").removesuffix("=None"), None)
    return rest
  except (AttributeError, KeyError) as error:  # of a ConfigDict, which names the nearest key
    sys.exit(f"error: {_unknown_key(_plain(str(error)), argv)}")
  except (flags.Error, ValueError, OSError) as error:  # of a config file, with its traceback in the text
    sys.exit(f"error: {_plain(str(error).split('Error: ')[-1])}")


def _with_path(argv: list[str]) -> list[str]:
  """The arguments with the path of a config in place of its name."""
  flag = re.compile(r"(?<=\0)(--?config[=\0])([^\0]+)")
  return flag.sub(lambda match: match[1] + experiments.find(match[2]), "\0".join(argv)).split("\0")


def _unknown_key(text: str, argv: list[str]) -> str:
  """Message about a key that a config lacks; `text` begins with its last part."""
  key, *nearest = text.split(maxsplit=1)
  paths = [argument.partition("=")[0] for argument in argv if argument.startswith("--config.")]
  flag = next((path for path in paths if key in path.split(".")), key)
  remedy = " ".join([*nearest, "configs/base.py lists the keys, CHANGELOG.md those that were renamed"])
  return f"{flag}: there is no key {key} in the config: {remedy}"


def _plain(text: str) -> str:
  """One line without the quotes and escapes of nested exceptions."""
  return " ".join(text.replace("\\n", " ").replace("\\", "").replace("'", "").replace('"', "").split())


def run():
  """Parses the flags and runs: an error that the user can correct is one line, without a traceback."""
  if progress.in_notebook():
    raise ValueError(
      "main.run() reads a command line, which a notebook does not have: call in place of it "
      "eqm_jax.run('train', eqm_jax.config('digits'), 'runs/digits')"
    )
  try:
    app.run(main, flags_parser=_parse_flags)
  except (ValueError, FloatingPointError, OSError) as error:
    if os.environ.get("EQM_JAX_TRACEBACK"):
      raise
    sys.exit(f"error: {error}")


if __name__ == "__main__":
  process.restart_with_huge_pages()
  process.end_on_second_interrupt()
  try:
    run()
  except BaseException as ending:  # SystemExit, when all went well
    process.end_process(ending)
