"""Training explicit energies, starting from other weights, and samples at γ = 1."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import load_config

from eqm_jax.checkpoints import eqm_torch, pretrained
from eqm_jax.data import builtin
from eqm_jax.equilibrium import gamma, objective
from eqm_jax.networks.dit import DiT
from eqm_jax.training import step, train


def small_config(energy: str = "none", **changes):
  config = load_config("digits", "smoke")
  config.model.update(width=16, depth=1, num_heads=2, energy=energy)
  config.train.update(steps=60, batch_size=32, log_every=20)
  config.checkpoint.every = 60
  config.update_from_flattened_dict(changes)
  return config


@pytest.fixture(scope="module")
def implicit(tmp_path_factory):
  workdir = str(tmp_path_factory.mktemp("implicit"))
  train.train(small_config(), workdir)
  return workdir


def loss_of(config, params) -> float:
  """The loss on all the digits, always with the same noise."""
  digits = builtin.digits()
  batch = {"image": jnp.asarray(digits.images), "label": jnp.asarray(digits.labels)}
  loss_fn = functools.partial(step.batch_loss, DiT(**config.model), config.objective, batch, jax.random.key(1))
  return float(jax.jit(loss_fn)(params))


@pytest.mark.parametrize(
  "form, order",
  [("dot", "reverse_over_reverse"), pytest.param("scalar", "forward_over_reverse", marks=pytest.mark.slow)],
)
def test_an_energy_learns_from_a_zero_output_layer(form, order, tmp_path):
  config = small_config(form, **{"objective.second_order": order, "train.steps": 100, "checkpoint.every": 100})
  train.train(config, str(tmp_path))
  trained = pretrained.load(tmp_path)
  zero = gamma.mean_square_magnitude(objective.Schedule()) * (1 + np.mean(builtin.digits().images ** 2))
  assert trained.model.energy == form and loss_of(config, trained.params) < 0.9 * zero


@pytest.mark.slow
def test_l2_learns_from_the_weights_of_an_implicit_model(implicit, tmp_path):
  """It starts at the weights of the implicit model, and gets better than these are as an energy."""
  config = small_config("l2", **{"train.init_from": implicit, "train.steps": 100, "checkpoint.every": 100})
  train.train(config, str(tmp_path))
  before, after = pretrained.load(implicit), pretrained.load(tmp_path)
  assert after.model == DiT(**config.model)
  assert loss_of(config, after.params) < 0.9 * loss_of(config, before.params)


@pytest.mark.slow
def test_a_run_with_init_from_begins_with_the_average_of_the_other_model(implicit, tmp_path):
  config = small_config(**{"train.init_from": implicit, "train.steps": 1, "checkpoint.every": 1})
  config.optimizer.update(warmup_steps=1)  # the first step has learning rate 0
  train.train(config, str(tmp_path))
  expected = pretrained.load(implicit, weights="ema").params
  for weights in ("ema", "model"):
    found = pretrained.load(tmp_path, weights=weights).params
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), found, expected)


def test_a_model_with_other_classes_gives_all_but_its_label_table(tmp_path, caplog):
  config = small_config(**{"train.steps": 1, "checkpoint.every": 1, "train.init_from": str(tmp_path / "many.pt")})
  config.optimizer.update(warmup_steps=1)  # the first step has learning rate 0
  model = DiT(**{**config.model, "num_classes": 1000})
  params = jax.jit(model.init)(jax.random.key(5), jnp.zeros((1, 8, 8, 1)), jnp.zeros(1, jnp.int32))["params"]
  eqm_torch.export_reference(config.train.init_from, model, params)
  train.train(config, str(tmp_path / "few"))
  assert "has 1000 classes, this model 10: everything but the label table is taken" in caplog.text
  found, label_table = pretrained.load(tmp_path / "few").params, params["label_embed"]["embedding"]
  rows = found.pop("label_embed")["embedding"]
  close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
  jax.tree.map(close, found, {name: params[name] for name in found})
  close(rows[-1], label_table[-1])
  assert rows.shape == (11, 16) and 0.01 < np.std(rows[:-1]) < 0.03  # those of a new run
  assert not np.isclose(rows[:-1, None], label_table).all(axis=-1).any()


def test_l2_refuses_an_output_layer_of_zeros(tmp_path):
  with pytest.raises(ValueError, match="output layer of zeros.*[Ss]tart from.*train.init_from"):
    train.train(small_config("l2"), str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()
  model = DiT(**small_config().model)
  fresh = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), jnp.zeros(1, jnp.int32))["params"]
  pretrained.save_pretrained(tmp_path / "fresh", model, fresh)
  config = small_config("l2", **{"train.init_from": str(tmp_path / "fresh")})
  with pytest.raises(ValueError, match="fresh' has an output layer of zeros"):
    train.train(config, str(tmp_path / "run"))


def test_samples_at_gamma_one_teach_a_field_of_zero():
  """With clean samples alone the target is zero, which a network with output zero meets exactly."""
  config = small_config(**{"objective.clean_fraction": 1.0})
  model = DiT(**config.model)
  batch = {"image": jnp.ones((8, 8, 8, 1)), "label": jnp.zeros(8, jnp.int32)}
  params = jax.jit(model.init)(jax.random.key(0), batch["image"], batch["label"])["params"]

  def loss(clean_fraction):
    config.objective.clean_fraction = clean_fraction
    arguments = model, config.objective, batch, jax.random.key(1)
    return jax.jit(functools.partial(step.batch_loss, *arguments))(params)

  none, half, every = map(loss, (0.0, 0.5, 1.0))
  assert every < 1e-9 < 0.1 * none < half < none


@pytest.mark.parametrize(
  "changes, text",
  [
    ({"model.energy": "cubic"}, "energy = 'cubic'"),
    ({"model.energy": "dot", "objective.kind": "flow_matching"}, "needs objective.kind = 'equilibrium'"),
    ({"model.energy": "dot", "objective.dispersive_weight": 0.5}, "dispersive_weight = 0.5 is for implicit"),
    ({"objective.second_order": "sideways"}, "second_order = 'sideways' must be one of"),
    ({"objective.clean_fraction": 1.0}, r"clean_fraction = 1.0 must be in \[0, 1\)"),
    ({"train.init_from": "nowhere"}, "nowhere: no such model"),
  ],
)
def test_what_cannot_be_trained_is_refused(changes, text, tmp_path):
  with pytest.raises(ValueError, match=text):
    train.train(small_config(**changes), str(tmp_path))


def test_init_params_of_another_shape_are_refused(implicit, tmp_path):
  text = r"init_from = .*: width is 16 in the file, but 32 is .*parameter \S+ is \(.*\), but \(.*\) in this model"
  with pytest.raises(ValueError, match=text):
    train.train(small_config(**{"model.width": 32, "train.init_from": implicit}), str(tmp_path))
