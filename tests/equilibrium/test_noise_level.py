"""A read-out of γ: the regression, and fields that return it beside f."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.linear_model

import eqm_jax
from eqm_jax.equilibrium import noise_level, tasks
from eqm_jax.equilibrium.noise_level import NoiseReadout
from eqm_jax.networks.dit import DiT

RNG = np.random.default_rng(0)
READOUT = NoiseReadout(jnp.asarray([0.5, -1.0, 0.25, 2.0]), jnp.asarray(0.1))


@dataclasses.dataclass(frozen=True)
class Network:
  """f is x plus the label; of two tokens, one holds the first number of x and the label."""

  num_classes: int = 3
  input_shape: tuple[int, ...] = (2, 2, 4)
  width: int = 2
  energy: str = "none"
  time_input: bool = False
  calls: list = dataclasses.field(default_factory=list, hash=False, compare=False)

  def apply(self, variables, x, label, return_tokens=False):
    self.calls.append(return_tokens)
    f, label = x + label[:, None, None, None], label.astype(x.dtype)
    tokens = jnp.stack([jnp.stack([x[:, 0, 0, 0], label], axis=-1), jnp.zeros((len(x), 2))], axis=1)
    return (f, tokens) if return_tokens else f


X = jnp.asarray(RNG.normal(size=(3, 2, 2, 4)), jnp.float32)
LABELS = np.asarray([0, 2, 1])


def level(label) -> np.ndarray:
  """What the read-out gives for `Network`, by its formula."""
  first, label = np.asarray(X[:, 0, 0, 0]), np.asarray(label)
  return 0.5 * first / 2 - label / 2 + 0.25 * first**2 / 2 + 2 * label**2 / 2 + 0.1


def test_the_fit_is_ridge_regression_on_scaled_features():
  features = RNG.normal(size=(200, 6)) * [1, 10, 0.1, 1, 1, 0] + [5, 0, 100, 0, 0, 7]
  gamma = 0.3 + features @ [0.1, 0.01, 1, 0, -0.1, 0] + 0.05 * RNG.normal(size=200)
  readout = noise_level.fit(features, gamma, ridge=0.01)
  spread = features.std(axis=0)
  scaled = (features - features.mean(axis=0)) / np.where(spread > 0, spread, 1)
  expected = sklearn.linear_model.Ridge(alpha=0.01 * 200).fit(scaled, gamma).predict(scaled)
  np.testing.assert_allclose(readout.of_features(features), expected, atol=1e-4)
  assert readout.weights[5] == 0 and readout.width == 3  # a constant feature says nothing
  with pytest.raises(ValueError, match=r"ridge = 0.0 must be in \(0"):
    noise_level.fit(features, gamma, ridge=0.0)


def test_the_readout_is_linear_in_the_means_of_tokens_and_of_their_squares():
  tokens = jnp.asarray(RNG.normal(size=(3, 5, 2)), jnp.bfloat16)
  t = np.asarray(tokens, np.float32)
  expected = t.mean(axis=1) @ [0.5, -1.0] + (t**2).mean(axis=1) @ [0.25, 2.0] + 0.1
  np.testing.assert_allclose(jax.jit(lambda readout, tokens: readout(tokens))(READOUT, tokens), expected, rtol=1e-5)
  with pytest.raises(ValueError, match="tokens of width 2, but these have 3: fit one .* --mode=readout"):
    READOUT(jnp.ones((1, 5, 3)))


@jax.jit
def evaluate(field, x):
  return field(x)


def test_a_field_with_a_readout_gives_both_from_one_pass():
  model = Network()
  f, gamma = evaluate(eqm_jax.field(model, {}, LABELS, readout=READOUT), X)
  assert model.calls == [True]
  np.testing.assert_array_equal(f, X + LABELS[:, None, None, None])
  np.testing.assert_allclose(gamma, level(LABELS), rtol=1e-5)


def test_with_guidance_gamma_is_that_of_the_conditions():
  f, gamma = evaluate(eqm_jax.field(Network(), {}, LABELS, guidance=1.5, readout=READOUT), X)
  np.testing.assert_allclose(f, X + (3 + 1.5 * (LABELS - 3))[:, None, None, None], rtol=1e-5)
  np.testing.assert_allclose(gamma, level(LABELS), rtol=1e-5)
  both, scale = np.stack([LABELS, LABELS[::-1]], axis=1), np.asarray([1.5, -0.5], np.float32)
  _, gamma = evaluate(eqm_jax.field(Network(), {}, both, guidance=scale, readout=READOUT), X)
  np.testing.assert_allclose(gamma, (level(LABELS) + level(LABELS[::-1])) / 2, rtol=1e-5)


def test_a_descent_reads_the_level_of_a_transformer():
  """f and tokens of the network are those of its plain calls, and the sample stops where γ̂ says so."""
  model = DiT(input_size=4, channels=1, patch_size=2, width=8, depth=1, num_heads=2, num_classes=3)
  x = jax.random.normal(jax.random.key(0), (2, 4, 4, 1))
  labels = jnp.asarray([0, 3])
  params = jax.jit(model.init)(jax.random.key(1), x, labels)["params"]
  params = jax.tree.map(lambda leaf: leaf + 0.1 * RNG.normal(size=leaf.shape).astype(np.float32), params)
  readout = NoiseReadout(jnp.asarray(RNG.normal(size=16), jnp.float32), jnp.asarray(0.0))
  f, start = evaluate(eqm_jax.field(model, params, labels, readout=readout), x)
  readout = readout.replace(bias=jnp.asarray(0.5 - start[0]))  # the first sample starts at γ̂ = 0.5
  field = eqm_jax.field(model, params, labels, readout=readout)
  options = dict(step_size=0.1, max_nfe=1, stop="gamma")
  result = eqm_jax.descend(field, x, threshold=0.4, **options)
  np.testing.assert_allclose(result.gamma, start + 0.5 - start[0], atol=1e-4)
  assert result.status[0] == eqm_jax.Status.CONVERGED
  np.testing.assert_array_equal(result.x[0], x[0])
  moved = eqm_jax.descend(field, x, threshold=0.6, **options)
  np.testing.assert_allclose(moved.x[0], x[0] - 0.1 * f[0], atol=1e-5)


def test_a_sample_that_diverges_has_not_arrived():
  result = eqm_jax.descend(
    lambda x: (x * jnp.nan, jnp.full(3, 2.0)), X, step_size=0.1, max_nfe=3, threshold=0.9, stop="gamma"
  )
  assert (result.status == eqm_jax.Status.DIVERGED).all()


@pytest.mark.parametrize(
  "model, options, text",
  [
    (Network(width=4), {}, "read-out is of a model of width 2, but this one has 4"),
    (Network(energy="dot"), {}, "gradient of an energy .'dot'.: stop by 'norm'"),
    (Network(), dict(form="l2"), "gradient of an energy .'l2'."),
    (Network(time_input=True), {}, "this model takes γ as an input .model.time_input = True"),
  ],
)
def test_models_that_a_readout_is_not_of_are_refused(model, options, text):
  with pytest.raises(ValueError, match=text):
    eqm_jax.field(model, {}, LABELS, readout=READOUT, **options)


@pytest.mark.parametrize(
  "use",
  [
    lambda field: eqm_jax.compose([jnp.tanh, field], [0.5, 0.5]),
    lambda field: eqm_jax.guided(field, jnp.tanh, 2.0),
    lambda field: eqm_jax.integrate(field, X, solver="euler", steps=2),
    lambda field: eqm_jax.asymmetry(field, X, jax.random.key(0)),
    lambda field: tasks.inpaint(field, X, np.ones((2, 2, 1)), jax.random.key(0), step_size=0.1, max_nfe=2),
  ],
)
def test_what_takes_f_alone_refuses_fields_with_a_readout(use):
  with pytest.raises(ValueError, match=r"returns \(f, γ̂\), and f alone is needed: make it without `readout`"):
    use(eqm_jax.field(Network(), {}, LABELS, readout=READOUT))
