import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import final_state, load_config

import eqm_jax
from eqm_jax.checkpoints import manager as checkpoint_manager
from eqm_jax.checkpoints import pretrained
from eqm_jax.networks.dit import DiT
from eqm_jax.training import step, train


def long_config():
  config = load_config("digits", "smoke")
  config.model.update(width=16, depth=2, num_heads=2)
  config.train.update(steps=400, batch_size=8, log_every=10)
  config.checkpoint.every = 40
  return config


def losses(workdir: pathlib.Path) -> list[tuple[int, float]]:
  records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return [(record["step"], record["loss"]) for record in records]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("uninterrupted")
  assert train.train(long_config(), str(workdir))
  return workdir


def test_the_loss_falls_and_old_checkpoints_go(uninterrupted):
  values = [loss for _, loss in losses(uninterrupted)]
  assert np.mean(values[-5:]) < 0.8 * values[0]
  with checkpoint_manager.open_manager(str(uninterrupted)) as manager:
    assert list(manager.all_steps()) == [360, 400]


def test_the_average_is_not_the_parameters_and_both_can_be_loaded(uninterrupted):
  ema, model = (pretrained.load(uninterrupted, weights=weights) for weights in ("ema", "model"))
  assert ema.model == model.model == DiT(**long_config().model)
  assert not np.array_equal(ema.params["final_out"]["kernel"], model.params["final_out"]["kernel"])


def test_a_finished_run_has_nothing_left_to_do(uninterrupted):
  before = final_state(uninterrupted)
  assert train.train(long_config(), str(uninterrupted))
  assert final_state(uninterrupted) == before


def test_metrics_have_loss_norms_and_speed(uninterrupted):
  record = json.loads((uninterrupted / "metrics.jsonl").read_text().splitlines()[-1])
  assert {"step", "loss", "relative_loss", "gradient_norm", "learning_rate", "examples_per_second"} <= record.keys()
  np.testing.assert_allclose(record["relative_loss"], record["loss"] / (16 * (0.8 + 0.2 / 3)))


def test_golden_step(tiny_config):
  """The loss and gradient of one batch, computed once. They change only with the
  network's start, the samples of γ, noise and dropped labels, or the loss: on purpose."""
  model, batch, params = golden_inputs(tiny_config)
  loss_fn = functools.partial(step.batch_loss, model, tiny_config.objective, batch, jax.random.key(1))

  def loss_and_norm(params):
    loss, gradient = jax.value_and_grad(loss_fn)(params)
    return loss, optax.tree.norm(gradient)

  loss, norm = jax.jit(loss_and_norm)(perturbed(params))
  np.testing.assert_allclose(loss, GOLDEN_LOSS, rtol=1e-4)
  np.testing.assert_allclose(norm, GOLDEN_GRADIENT_NORM, rtol=1e-3)


GOLDEN_LOSS, GOLDEN_GRADIENT_NORM = 18.841455, 4.002218


def golden_inputs(config):
  model = DiT(**config.model)
  images = jnp.linspace(-1, 1, 4 * 64).reshape(4, 8, 8, 1)
  batch = {"image": images, "label": jnp.arange(4)}
  params = jax.jit(model.init)(jax.random.key(0), images, batch["label"])["params"]
  return model, batch, params


@jax.jit
def perturbed(params):
  """Away from the start, where the zero output layer hides all others."""
  leaves, structure = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(2), len(leaves))
  return structure.unflatten([leaf + 0.05 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys)])


def test_each_objective_trains_and_dispersion_is_added(tiny_config):
  model, batch, params = golden_inputs(tiny_config)
  key = jax.random.key(1)

  def loss(model, params=params, **changes):
    config = tiny_config.objective.copy_and_resolve_references()
    config.update(changes)
    loss_fn = functools.partial(step.batch_loss, model, config, batch, key)
    return jax.jit(loss_fn)(params)

  plain, dispersed = loss(model), loss(model, dispersive_weight=0.5)
  tokens_of = functools.partial(model.apply, return_tokens=True)
  _, tokens = jax.eval_shape(tokens_of, {"params": params}, batch["image"], batch["label"])
  assert dispersed < plain  # the logarithm of a mean of numbers below one
  assert tokens.shape == (4, 16, 16)
  # At the start the network's output is zero: the flow-matching losses are those of (ε − x) alone.
  timed = model.clone(time_input=True)
  untimed = loss(model, kind="flow_matching")
  np.testing.assert_allclose(loss(timed, kind="flow_matching"), untimed, rtol=1e-6)
  assert untimed < plain


def test_latents_are_sampled_anew_from_their_posterior():
  batch = {"mean": jnp.full((4000, 1, 1, 1), 3.0), "logvar": jnp.full((4000, 1, 1, 1), np.log(0.25))}
  first, second = (step.sample_data(batch, jax.random.normal(jax.random.key(i), (4000, 1, 1, 1))) for i in range(2))
  np.testing.assert_allclose([first.mean(), first.std()], [3.0, 0.5], rtol=0.03)
  assert not np.array_equal(first, second)


@pytest.mark.parametrize(
  "changes", [{"optimizer.learning_rate": 1e18}, pytest.param({"optimizer.eps": 0.0}, marks=pytest.mark.slow)]
)
def test_a_non_finite_step_stops_the_run_and_is_never_saved(tiny_config, tmp_path, changes):
  """A rate that is too high, and a division by zero that spoils the parameters while the loss is still finite."""
  tiny_config.update_from_flattened_dict(
    {"optimizer.warmup_steps": 0, "train.steps": 400, "checkpoint.every": 1, "objective.label_dropout": 0.0, **changes}
  )
  with pytest.raises(FloatingPointError, match=r"step \d+: .*(nan|inf).*stopped") as error:
    train.train(tiny_config, str(tmp_path))
  failed = int(str(error.value).split(":")[0].removeprefix("step "))
  steps = checkpoint_manager.steps(str(tmp_path))
  assert steps == list(range(max(1, failed - 2), failed)), "every step before it was saved, the newest two are kept"
  for content in final_state(tmp_path).values() if steps else ():
    if len(content) % 4 == 0:
      assert np.all(np.isfinite(np.frombuffer(content, np.float32)))


def test_a_failed_start_leaves_the_workdir_free(tiny_config, tmp_path, caplog):
  caplog.set_level("INFO", logger="eqm_jax")
  tiny_config.train.init_from = str(tmp_path / "nowhere")
  with pytest.raises(ValueError, match="nowhere"):
    train.train(tiny_config, str(tmp_path))
  tiny_config.update_from_flattened_dict(
    {"train.init_from": None, "train.steps": 3, "objective.dispersive_weight": 0.5}
  )
  assert train.train(tiny_config, str(tmp_path))
  assert "dispersive loss: over all 8² pairs of the global batch" in caplog.text


@pytest.mark.parametrize(
  "changes, text",
  [
    ({"model.input_size": 16}, r"shape \(8, 8, 1\), but the model takes \(16, 16, 1\)"),
    ({"model.channels": 3}, r"\(8, 8, 1\), but the model takes \(8, 8, 3\)"),
    ({"model.num_classes": 9}, "num_classes = 9, but 'digits' has 10"),
    ({"model.num_heads": 3}, "num_heads = 3 does not divide model.width = 16"),
    ({"model.time_input": True}, "time_input = False"),
    ({"objective.kind": "diffusion"}, "'diffusion'"),
    ({"objective.label_dropout": 1.5}, "label_dropout = 1.5"),
    ({"objective.schedule.a": 1.0}, "objective.schedule.a = 1.0"),
    ({"objective.schedule.breakpoint": 1.0}, r"objective.schedule.breakpoint = 1.0 must be in \[0, 1\)"),
    ({"objective.schedule.exponent": -1.0}, "objective.schedule.exponent = -1.0"),
    ({"objective.gamma.kind": "beta"}, "objective.gamma.kind = 'beta' must be one of uniform, logit_normal"),
    ({"objective.gamma.deviation": 0.0}, "objective.gamma.deviation = 0.0"),
    ({"objective.gamma.floor": 1.5}, "objective.gamma.floor = 1.5"),
    ({"objective.gamma.kind": "consistent"}, "objective.gamma.floor = 0.0 must be .* 'truncated'.*set a floor"),
    ({"optimizer.learning_rate": 0.0}, "learning_rate = 0.0"),
    ({"optimizer.schedule": "step"}, "'step'"),
    ({"optimizer.warmup_steps": 13}, r"warmup_steps = 13 must be in \[0, 12\]"),
    ({"optimizer.clip_norm": -1.0}, "clip_norm = -1.0 must be .* or None for no clipping"),
    ({"optimizer.ema_decay": 1.0}, "ema_decay = 1.0"),
    ({"train.steps": 0}, "train.steps = 0"),
    ({"checkpoint.every": 0}, "checkpoint.every = 0"),
    ({"checkpoint.keep": 0}, "checkpoint.keep = 0"),
    ({"data.threads": 0}, "data.threads = 0"),
    ({"train.batch_size": 0}, "train.batch_size = 0"),
    ({"train.grad_accum_steps": 0}, "train.grad_accum_steps = 0"),
    (
      {"train.grad_accum_steps": 3},
      r"batch size 8 does not divide .* in 3 microbatches \(train.grad_accum_steps\): use a multiple of 3",
    ),
    (
      {"train.grad_accum_steps": 2, "objective.dispersive_weight": 0.5},
      "train.grad_accum_steps = 2 splits the batch, but",
    ),
    ({"optimizer.max_skipped_batches": -1}, "max_skipped_batches = -1 must be at least 0"),
    ({"sharding.ema": "everywhere"}, "sharding.ema = 'everywhere' must be one of parameters, devices"),
    ({"sharding.rules": (("kernel", ("model",)),)}, "'model': the mesh has data, fsdp, tensor|has 1 axes"),
    ({"mesh.fsdp": 2}, "fsdp=2, tensor=1 needs|there are 1"),
  ],
)
def test_a_config_that_does_not_fit_is_refused_before_anything_is_written(tiny_config, tmp_path, changes, text):
  tiny_config.update_from_flattened_dict(changes)
  with pytest.raises(ValueError, match=text):
    train.train(tiny_config, str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


def test_a_workdir_of_another_run_is_refused_and_untouched(uninterrupted):
  config = long_config()
  config.optimizer.learning_rate = 0.5
  before = final_state(uninterrupted)
  with pytest.raises(ValueError, match="optimizer.learning_rate: 0.002 in the workdir, 0.5 in this config"):
    train.train(config, str(uninterrupted))
  assert final_state(uninterrupted) == before


def test_what_does_not_touch_the_parameters_may_change(uninterrupted):
  config = long_config()
  config.samplers.gd.step_size = 0.1
  config.checkpoint.keep = 5
  assert train.train(config, str(uninterrupted))


def edit_config(workdir: pathlib.Path, edit) -> None:
  path = workdir / "config.json"
  saved = json.loads(path.read_text())
  edit(saved)
  path.write_text(json.dumps(saved))


def test_the_workdir_has_the_resolved_config_and_the_version(uninterrupted):
  saved = json.loads((uninterrupted / "config.json").read_text())
  assert saved["eqm_jax_version"] == eqm_jax.__version__
  assert saved["train"]["steps"] == 400 and saved["train"]["init_from"] is None
  assert saved["data"]["num_samples"] == 1797 and saved["data"]["class_names"] == list("0123456789")
  assert eqm_jax.load(uninterrupted).class_names == tuple("0123456789")


def test_classes_of_other_names_are_refused(uninterrupted, tmp_path):
  """Renamed folders are numbered anew, so that a label may mean another class."""
  workdir = tmp_path / "run"
  shutil.copytree(uninterrupted, workdir)
  edit_config(workdir, lambda saved: saved["data"]["class_names"].__setitem__(2, "10"))
  with pytest.raises(ValueError, match="label 2 for the class '10', but in the data set it is '2'. Give the classes"):
    train.train(long_config(), str(workdir))
  edit_config(workdir, lambda saved: saved["data"].pop("class_names"))  # of an earlier version
  assert train.train(long_config(), str(workdir))


@pytest.mark.parametrize("version, named", [("0.1.7", "0.1.7"), (None, "0.1.0")])
def test_a_workdir_of_an_older_version_is_refused_by_name(uninterrupted, tmp_path, version, named):
  """Its keys have other names; the first release did not record its version."""

  def age(saved):
    del saved["eqm_jax_version"]
    if version:
      saved["eqm_jax_version"] = version
    saved["objective"]["clean_share"] = saved["objective"].pop("clean_fraction")
    saved["optimizer"]["clip_norm"] = 0.0

  workdir = tmp_path / "run"
  shutil.copytree(uninterrupted, workdir)
  edit_config(workdir, age)
  with pytest.raises(ValueError, match=rf"written by eqm_jax {named}, with keys .*: objective.clean_share\. Continue"):
    train.train(long_config(), str(workdir))


def test_a_key_that_was_none_is_compared_and_a_new_key_is_not(uninterrupted, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(uninterrupted, workdir)
  edit_config(workdir, lambda saved: saved["objective"].pop("second_order"))
  edit_config(workdir, lambda saved: saved["model"].pop("rope"))
  assert train.train(long_config(), str(workdir))
  config = long_config()
  config.model.rope = True  # shapes no parameter, and would go on as another network
  with pytest.raises(ValueError, match="model.rope: False in the workdir, True in this config"):
    train.train(config, str(workdir))
  edit_config(workdir, lambda saved: saved["objective"].pop("gamma"))
  config = long_config()
  config.objective.gamma.kind = "logit_normal"  # another objective
  with pytest.raises(ValueError, match="objective.gamma.kind: 'uniform' in the workdir, 'logit_normal' in this config"):
    train.train(config, str(workdir))
  config = long_config()
  config.optimizer.clip_norm = 1.0
  with pytest.raises(ValueError, match="optimizer.clip_norm: None in the workdir, 1.0 in this config"):
    train.train(config, str(workdir))
