"""configs/base.py is the document: every experiment has its keys. test_config_keys.py holds them against the code."""

import inspect
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from typing import Any

import jax
import ml_collections
import pytest
from absl import flags
from conftest import ROOT, environment, load_config
from ml_collections import config_flags

from eqm_jax.benchmark import measure
from eqm_jax.data import sources
from eqm_jax.equilibrium.gamma import GammaDensity
from eqm_jax.equilibrium.objective import Schedule
from eqm_jax.networks import dit
from eqm_jax.networks.autoencoder import Autoencoder
from eqm_jax.report import report
from eqm_jax.training import sharding, state

CONFIGS = ROOT / "configs"
EXPERIMENTS = sorted(path.stem for path in CONFIGS.glob("*.py") if path.stem != "base")
OPTIONAL = {("prepare",), ("prepare", "fit"), ("report",)}  # sections that exist only where they apply


def variants(name: str) -> list[str]:
  return list(runpy.run_path(str(CONFIGS / f"{name}.py"))["VARIANTS"])


def nested_keys(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """The keys of a config as nested dicts; None in place of a value."""
  return {
    key: nested_keys(value) if isinstance(value, ml_collections.ConfigDict) else None for key, value in config.items()
  }


def base_keys() -> dict[str, Any]:
  """Every key of base.py, optional sections included; "*" where names are free."""
  base = runpy.run_path(str(CONFIGS / "base.py"))
  keys = nested_keys(base["get_config"]())
  keys["data"]["options"] = {"*": None}  # arguments of the source
  keys["samplers"] = {"*": nested_keys(base["sampler"]())}
  keys["prepare"] = nested_keys(base["prepare"]()) | {"options": {"*": None}, "fit": nested_keys(base["fit"]())}
  keys["report"] = nested_keys(base["report"]())
  keys["report"]["text"]["claims"] = {"*": None}
  return keys


def differences(keys: dict[str, Any], base: dict[str, Any], path: tuple[str, ...] = ()) -> list[str]:
  """Keys that only one of both has."""
  if "*" in base:
    base = dict.fromkeys(keys, base["*"])
  found = [".".join((*path, key)) for key in keys.keys() - base.keys()]
  found += [".".join((*path, key)) for key in base.keys() - keys.keys() if (*path, key) not in OPTIONAL]
  for key in keys.keys() & base.keys():
    if (keys[key] is None) != (base[key] is None):
      found.append(".".join((*path, key)))
    elif base[key] is not None:
      found += differences(keys[key], base[key], (*path, key))
  return found


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_and_variants_have_exactly_the_keys_of_base(name):
  base = base_keys()
  for variant in ["", *variants(name)]:
    config = load_config(name, variant)
    assert not differences(nested_keys(config), base), variant
    for section in (config.data, config.get("prepare")):
      if section is not None:
        inspect.signature(sources.SOURCES[section.source]).bind(**section.options)
    named = {config.sample.sampler, config.tasks.sampler, config.evaluation.during_training.sampler}
    named |= {config.evaluation.plot_sampler, *config.evaluation.benchmark_samplers}
    named |= {*(config.evaluation.samplers or ())}
    assert named - {None} <= set(config.samplers), variant
    json.loads(config.to_json())


def test_other_keys_and_lost_keys_are_found():
  config = load_config("digits")
  config.train.other, config.samplers.gd.other = 1, 2
  del config.mesh.fsdp
  del config.samplers.nag.rule
  expected = ["mesh.fsdp", "samplers.gd.other", "samplers.nag.rule", "train.other"]
  assert sorted(differences(nested_keys(config), base_keys())) == expected


def test_misspelt_overrides_of_an_experiment_are_refused():
  base = runpy.run_path(str(CONFIGS / "base.py"))
  with pytest.raises(KeyError, match="treshold"):
    base["sampler"](treshold=1.0)
  with pytest.raises(AttributeError, match="stpes"):
    base["get_config"]().train.stpes = 1


def test_sections_that_are_passed_on_whole_are_the_arguments_of_what_takes_them():
  base = base_keys()
  assert set(base["model"]) == set(dit.DiT.__dataclass_fields__) - {"parent", "name"}
  assert set(base["objective"]["schedule"]) == set(Schedule.__dataclass_fields__)
  assert set(base["objective"]["gamma"]) == set(GammaDensity.__dataclass_fields__)
  assert set(base["mesh"]) == set(inspect.signature(sharding.make_mesh).parameters) - {"devices"}
  assert set(base["prepare"]["fit"]["model"]) < set(Autoencoder.__dataclass_fields__)


def parsed(*arguments: str) -> ml_collections.ConfigDict:
  """The config of a command line."""
  values, argv = flags.FlagValues(), ["main", *arguments]
  config_flags.DEFINE_config_file("config", None, flag_values=values, sys_argv=argv)
  values(argv)
  return values.config


def test_the_command_line_gives_values_where_none_stands():
  config = parsed(
    f"--config={CONFIGS / 'report.py'}",
    "--config.evaluation.num_samples=100",
    "--config.evaluation.during_training.every=7",
    "--config.evaluation.samplers=('gd', 'nag')",
    "--config.evaluation.plot_sampler=gd",
    "--config.optimizer.clip_norm=1",
    "--config.train.profile=(3, 5)",
    "--config.train.init_from=runs/other",
    "--config.samplers.gd.threshold=0.5",
    "--config.samplers.nag.stop=gamma",
    "--config.samplers.nag.readout=runs/digits/readout/readout.npz",
    "--config.samplers.gd.guidance_channels=3",
    "--config.samplers.gd.guidance_interval=(1.0, 9.0)",
    "--config.samplers.gd.step_size=auto",
    "--config.samplers.nag.step_size=0.01",
    "--config.tasks.denoise.gammas=(0.5,)",
    "--config.tasks.compose.checkpoints=('a.pt', None)",
  )
  assert load_config("report").evaluation.num_samples is None
  assert (config.evaluation.num_samples, config.evaluation.during_training.every) == (100, 7)
  assert (config.evaluation.samplers, config.evaluation.plot_sampler) == (("gd", "nag"), "gd")
  assert config.optimizer.clip_norm == 1.0 and isinstance(config.optimizer.clip_norm, float)
  assert (config.train.profile, config.train.init_from) == ((3, 5), "runs/other")
  row = config.samplers.gd
  assert (row.threshold, row.guidance_channels, row.guidance_interval, row.step_size) == (0.5, 3, (1.0, 9.0), "auto")
  assert config.samplers.nag.step_size == 0.01 and config.samplers.nag.threshold is None
  assert (config.samplers.nag.stop, config.samplers.nag.readout) == ("gamma", "runs/digits/readout/readout.npz")
  assert (row.stop, row.readout) == ("norm", None)
  assert config.tasks.denoise.gammas == (0.5,) and config.tasks.compose.checkpoints == ("a.pt", None)


@pytest.mark.parametrize("argument", ["evaluation.num_samples=many", "samplers.gd.threshold=low", "train.stpes=3"])
def test_the_command_line_refuses_other_types_and_keys(argument):
  key = argument.partition("=")[0].split(".")[-1]
  with pytest.raises((flags.Error, AttributeError, KeyError), match=key):
    parsed(f"--config={CONFIGS / 'digits.py'}", f"--config.{argument}")


def test_configs_work_anywhere_and_import_nothing_of_the_package(tmp_path):
  shutil.copytree(CONFIGS, tmp_path / "share" / "configs")
  code = (
    "import runpy, sys\n"
    "for file in sys.argv[1:]:\n"
    "  runpy.run_path(file)['get_config']()\n"
    "assert not [name for name in sys.modules if name.partition('.')[0] in ('eqm_jax', 'jax', 'flax')]"
  )
  files = [os.path.join("share", "configs", f"{name}.py") for name in ("base", *EXPERIMENTS)]
  subprocess.run([sys.executable, "-c", code, *files], cwd=tmp_path, check=True, env=environment())


def test_all_configs_together_are_short():
  assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in CONFIGS.glob("*.py")) <= 860


def test_the_report_has_texts_for_every_claim():
  papers, beyond = (load_config("report", variant).report.text.claims for variant in ("", "beyond"))
  claims = papers.to_dict() | beyond.to_dict()
  assert set(claims) == set(report.CLAIMS) and not set(papers) & set(beyond)
  assert all(title and paper for title, paper in claims.values())


def test_the_variant_for_gpus_fits_one_of_80_gigabytes():
  """State, three times its gradients and twice what the backward pass keeps at least, of what launch/ lets JAX take."""
  config = load_config("imagenet256", "XL/2-gpu")
  model, mesh = dit.DiT(**config.model), sharding.make_mesh(**config.mesh)
  optimizer = state.make_optimizer(config.optimizer, config.train.steps)
  shapes = jax.eval_shape(lambda: state.init_state(model, optimizer, 0))
  shardings = sharding.state_shardings(shapes, config.sharding, mesh)
  held, gradients = (sharding.held(*both) for both in ((shapes, shardings), (shapes.params, shardings.params)))
  kept = config.train.batch_size * measure.activation_bytes(model)
  assert 10.7e9 < held < 10.9e9 and 2.6e9 < gradients < 2.8e9 and 37e9 < kept < 39e9
  assert held + 3 * gradients + 2 * kept / config.train.grad_accum_steps < 0.9 * 80e9 < held + 3 * gradients + 2 * kept


@pytest.mark.parametrize("size", dit.SIZES)
@pytest.mark.parametrize("patch", [2, 4, 8])
def test_imagenet_variants_are_the_published_sizes(size, patch):
  model = dit.DiT(**load_config("imagenet256", f"{size}/{patch}").model)
  assert (model.depth, model.width, model.num_heads, model.patch_size) == (*dit.SIZES[size], patch)
  assert model.input_shape == (32, 32, 4)


@pytest.mark.parametrize(
  "name, variant",
  [
    ("digits", "big"),
    ("imagenet256", "H/14"),
    ("imagenet256", "XL"),
    ("imagenet256", "B/2-offline"),
    ("mnist", "14"),
    ("cifar10", "big"),
    ("imagenet512", "XL/3"),
    ("photographs", "large"),
    ("toy2d", "three_moons"),
    ("toy2d", "two_moons-big"),
    ("report", "long"),
  ],
)
def test_unknown_variants_are_refused(name, variant):
  known = f"choose one of {', '.join(variants(name))}, or none" if variants(name) else "it has none"
  with pytest.raises(ValueError, match=re.escape(f"configs/{name}.py has no variant {variant!r}: {known}")):
    load_config(name, variant)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_docstrings_have_command_hardware_and_result(name):
  text = (CONFIGS / f"{name}.py").read_text(encoding="utf-8")
  for word in ("Command:", f"--config=configs/{name}.py", "Hardware:", "Expected:"):
    assert word in text.split('"""')[1], word
