"""Runs one mode of eqm_jax: training, sampling, evaluation, and what else --mode=help lists.

  python -m eqm_jax.main --config=configs/digits.py --workdir=runs/digits
  python -m eqm_jax.main --config=configs/digits.py --workdir=runs/digits --mode=sample --config.sample.num_samples=20
  python -m eqm_jax.main --mode=help

Every key of the config is a flag, --config.SECTION.KEY=VALUE; configs/base.py documents them all.
"""

import contextlib
import logging
import os
import re
import sys

import absl.logging
from absl import app, flags
from ml_collections import config_dict, config_flags
from ml_collections.config_flags import config_path

from eqm_jax import hardware, modes

CONFIG = config_flags.DEFINE_config_file(
  "config", None, "The experiment: a file of configs/, or FILE.py:VARIANT for one of its variants."
)
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run, for checkpoints, metrics and results.")
MODE = flags.DEFINE_enum("mode", "train", [*modes.NAMES, "help"], "What to do; help explains each mode in a table.")
CHECKPOINT = flags.DEFINE_string(
  "checkpoint", None, "Model to use instead of the workdir's: a workdir, an exported directory, or a .pt file."
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
PROCESSES = flags.DEFINE_integer("num_processes", None, "Several processes: their number, with --coordinator_address.")
PROCESS = flags.DEFINE_integer("process_id", None, "Several processes: the number of this one, from 0.")

log = logging.getLogger("eqm_jax")


def main(argv: list[str]):
  if MODE.value == "help":
    print(modes.table())
    return
  _check_arguments(argv)
  _log_to_stderr()
  from eqm_jax import distributed  # imports JAX: a mistyped flag is refused before it

  mode = modes.declaration(MODE.value)
  processes = (ADDRESS.value, PROCESSES.value, PROCESS.value)
  with contextlib.ExitStack() as stack:
    if mode.needs_devices:
      stack.enter_context(distributed.initialized(*processes, saves=mode.name == "train"))
      if distributed.process_index_and_count()[0] > 0:
        log.setLevel(logging.WARNING)  # the first process logs what is the same in all
    mode_flags = {flag.name: flag.value for flag in (CHECKPOINT, TOPOLOGY, SEARCH, COMPARE, COMPARE_ANY)}
    modes.run(mode.name, CONFIG.value, os.path.abspath(WORKDIR.value), **mode_flags)


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
  handler = logging.StreamHandler()
  handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
  log.addHandler(handler)
  log.setLevel(logging.INFO)
  log.propagate = False


def _parse_flags(argv: list[str]) -> list[str]:
  to_none = [flag for flag in argv if re.fullmatch(r"--config\.[\w.]+=None", flag)]  # ml_collections parses no None
  try:
    rest = flags.FLAGS([argument for argument in argv if argument not in to_none])
    _check_config_file(argv)
    for flag in to_none if CONFIG.value is not None else ():
      _set_none(CONFIG.value, flag.removeprefix("--config.").removesuffix("=None"))
    return rest
  except (AttributeError, KeyError) as error:  # of a ConfigDict, which names the nearest key
    sys.exit(f"error: {_unknown_key(_plain(str(error)), argv)}")
  except (flags.Error, ValueError, OSError) as error:  # of a config file, with its traceback in the text
    sys.exit(f"error: {_plain(str(error).split('Error: ')[-1])}")


def _check_config_file(argv: list[str]):
  """Refuses a config that does not exist; ml_collections would say so on first use, in several lines."""
  named = re.findall(r"(?:^|\s)--?config[= ](\S+)", " ".join(argv))
  path = named[-1].partition(":")[0] if named else ""
  if path and not os.path.isfile(path):
    raise ValueError(f"--config={named[-1]}: there is no file {path}: give FILE.py or FILE.py:VARIANT")


def _unknown_key(text: str, argv: list[str]) -> str:
  """Message about a key that a config lacks; `text` begins with its last part."""
  key, *nearest = text.split(maxsplit=1)
  paths = [argument.partition("=")[0] for argument in argv if argument.startswith("--config.")]
  flag = next((path for path in paths if key in path.split(".")), key)
  remedy = " ".join([*nearest, "configs/base.py lists the keys, CHANGELOG.md those that were renamed"])
  return f"{flag}: there is no key {key} in the config: {remedy}"


def _set_none(config: config_dict.ConfigDict, key: str):
  """Sets a key to None if that is one of its values: in configs/base.py those are references."""
  section, _, name = key.rpartition(".")
  holder = config_path.get_value(section, config) if section else config
  if not isinstance(dict(holder.items(preserve_field_references=True))[name], config_dict.FieldReference):
    raise ValueError(f"config.{key} = None must be a value: configs/base.py has its choices")
  holder[name] = None


def _plain(text: str) -> str:
  """One line without the quotes and escapes of nested exceptions."""
  return " ".join(text.replace("\\n", " ").replace("\\", "").replace("'", "").replace('"', "").split())


def run():
  """Entry point: an error that the user can correct is one line, without a traceback."""
  try:
    app.run(main, flags_parser=_parse_flags)
  except (ValueError, FloatingPointError, OSError) as error:
    if os.environ.get("EQM_JAX_TRACEBACK"):
      raise
    sys.exit(f"error: {error}")


if __name__ == "__main__":
  hardware.restart_with_huge_pages()
  run()
