"""Configs by name: where files are found, variants, and values that are refused."""

import copy
import json
import os
import pickle

import pytest
from conftest import ROOT

from eqm_jax import experiments

OWN = "import ml_collections\ndef get_config():\n  return ml_collections.ConfigDict({'train': {'steps': 7}})\n"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
  """Another working directory."""
  monkeypatch.chdir(tmp_path)
  return tmp_path


@pytest.mark.parametrize("name", ["digits", "digits.py", "configs/digits", "configs/digits.py", "./configs/digits.py"])
def test_configs_of_the_package_are_found_anywhere(elsewhere, name):
  assert experiments.find(name) == str(ROOT / "configs" / "digits.py")
  assert experiments.find(f"{name}:smoke") == f"{ROOT / 'configs' / 'digits.py'}:smoke"
  assert experiments.config(f"{name}:smoke") == experiments.config(name, "smoke")


@pytest.mark.parametrize("file", ["digits.py", "configs/digits.py", "mine.py", "home/mine.py"])
def test_a_local_file_wins(elsewhere, monkeypatch, file):
  monkeypatch.setenv("HOME", str(elsewhere / "home"))
  path = elsewhere / file
  path.parent.mkdir(exist_ok=True)
  path.write_text(OWN)
  for name in {file, file.removesuffix(".py"), str(path), file.replace("home/", "~/")}:
    assert experiments.config(name).train.steps == 7
  if "digits" in file:
    assert experiments.config("digits").train.steps == 7


def test_a_program_of_the_same_name_is_no_config(elsewhere):
  (elsewhere / "digits.py").write_text("raise RuntimeError\n")
  assert experiments.config("digits").train.steps == 4000
  (elsewhere / "mine.py").write_text("raise RuntimeError\n")
  with pytest.raises(ValueError, match="config 'mine': has no function get_config: give a path"):
    experiments.config("mine")


@pytest.mark.parametrize("name", ["digit", "", "configs/digit.py", "/nowhere/digits.py", "other/digits.py"])
def test_a_config_that_is_not_there_is_refused_with_those_that_are(elsewhere, name):
  with pytest.raises(ValueError, match="there is no such file.* cifar10, digits, imagenet256, .*toy2d$"):
    experiments.find(name)
  assert "base" not in experiments.names() and set(experiments.names()) >= {"digits", "report"}


def test_variants_are_applied_in_order(elsewhere):
  both = experiments.config("digits", "samplers", "smoke")
  assert "heun_010" in both.samplers and both.train.steps == 60
  assert both == experiments.config("digits:samplers,smoke") == experiments.config("digits:samplers", "smoke")
  assert {row.max_nfe for row in both.samplers.values()} == {25}
  with pytest.raises(ValueError, match="has no variant 'smok': choose one of smoke"):
    experiments.config("digits", "samplers", "smok")
  (elsewhere / "mine.py").write_text(OWN)
  with pytest.raises(ValueError, match="mine.py has no variants, but 'a' is asked for"):
    experiments.config("mine", "a")


def test_overrides_set_values_sections_and_samplers():
  config = experiments.config(
    "digits",
    **{
      "train.steps": 500,
      "samplers.gd.rule": "adam",
      "evaluation": {"num_samples": None, "classifier": {"steps": 3}},
      "evaluation.features": ["raw"],
      "data.options": {"path": "x.npz"},
    },
  )
  assert config.train.steps == 500 and config.train.batch_size == 64 and config.samplers.gd.rule == "adam"
  assert config.evaluation.num_samples is None and config.evaluation.features == ("raw",)
  assert config.evaluation.classifier.steps == 3 and config.evaluation.chunk_size == 900
  assert config.data.options.to_dict() == {"path": "x.npz"}
  json.loads(config.to_json())


@pytest.mark.parametrize(
  "key, value, message",
  [
    ("train.stpes", 3, "train has no key 'stpes': did you mean 'steps'"),
    ("tain.steps", 3, "this section of the config has no key 'tain': did you mean 'train'"),
    ("samplers.gd.treshold", 3.0, "samplers.gd has no key 'treshold': did you mean 'threshold'"),
    ("train.steps.x", 3, "train.steps is no section"),
    ("evaluation", {"classifier": {"stpes": 3}}, "evaluation.classifier has no key 'stpes'"),
    ("data.options.path", "x", "data.options has no key 'path': .*set it whole"),
    ("train.steps", "many", "train.steps = 'many' must be of type int"),
    ("evaluation.samplers", "gd", "evaluation.samplers = 'gd' must be of type tuple"),
    ("train", 3, "train = 3 must be a dict"),
    ("train", None, "train = None must be a dict"),
    ("train.steps", None, "train.steps = None must be a value"),
  ],
)
def test_overrides_that_do_not_fit_are_refused(key, value, message):
  with pytest.raises(ValueError, match=message):
    experiments.config("digits", **{key: value})


@pytest.mark.parametrize("variant", ["", "samplers"])
def test_a_mistyped_attribute_is_refused_with_the_nearest(variant):
  config = experiments.config("digits", variant)
  for section in (config.train, copy.deepcopy(config).train, pickle.loads(pickle.dumps(config)).train):
    with pytest.raises(AttributeError, match="has no key 'stpes': did you mean 'steps'"):
      section.stpes = 3
  with pytest.raises(AttributeError, match="did you mean 'threshold'"):
    next(iter(config.samplers.values())).treshold = 3.0
  with pytest.raises(ValueError, match="steps = None must be a value"):
    config.train.steps = None
  with pytest.raises(ValueError, match="steps = 'many' must be of type int"):
    config.train.steps = "many"
  assert "python/object" not in repr(config)
  config.train.steps, config.evaluation.num_samples = 3, None
  config.train = {"batch_size": 2}
  assert (config.train.steps, config.train.batch_size, config.train.log_every) == (3, 2, 100)
  config.samplers = {"mine": {"rule": "gd"}}
  with pytest.raises(AttributeError, match="has no key 'rul'"):
    config.samplers.mine.rul = "nag"
  with config.unlocked():
    config.train.new = 3
  with pytest.raises(AttributeError):
    config.train.other = 3


def test_all_sections_of_all_variants_are_locked():
  for name in experiments.names():
    raw = experiments.load(os.path.join(experiments.directory(), f"{name}.py"), "")
    sections = [raw]
    for section in sections:
      assert section.is_locked
      sections += [value for value in section.values() if hasattr(value, "is_locked")]
