"""Noise level of a sample, read off the activations of a network that has no input for it.

    γ̂ = b + Σ_d (u_d·m_d + v_d·s_d)      m: mean over the tokens, s: mean of their squares

The tokens are those that leave the network's last block. Everything that the network computes of its input has passed
through them, and nothing but b, u and v is fitted: a ridge regression in closed form, on the frozen network.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from eqm_jax import checks
from eqm_jax.equilibrium.pytrees import Model, Params, ShortRepr


@flax.struct.dataclass(eq=False, repr=False)
class NoiseReadout(ShortRepr):
  """A linear read-out of γ: tokens [B, T, D] → γ̂ [B], not clipped to [0, 1]. Made by `fit`; a pytree of two arrays."""

  weights: jax.Array  # float32 [2·D]
  bias: jax.Array  # float32 []

  @property
  def width(self) -> int:
    """D of the tokens that it reads."""
    return self.weights.shape[-1] // 2

  def __call__(self, tokens: jax.Array) -> jax.Array:
    if tokens.shape[-1] != self.width:
      raise ValueError(f"the read-out is of tokens of width {self.width}, but these have {tokens.shape[-1]}: {REFIT}")
    return self.of_features(pooled(tokens))

  def of_features(self, features: jax.Array) -> jax.Array:
    """γ̂ [B] of `pooled` tokens [B, 2·D]."""
    # A sum of products: accelerators would round the factors of a matrix product to bfloat16.
    return jnp.sum(features * self.weights, axis=-1) + self.bias


REFIT = "fit one to this model with --mode=readout"


def pooled(tokens: jax.Array) -> jax.Array:
  """What the read-out is linear in: the means of tokens [B, T, D] and of their squares over T, [B, 2·D] float32."""
  tokens = tokens.astype(jnp.float32)
  return jnp.concatenate([jnp.mean(tokens, axis=1), jnp.mean(tokens**2, axis=1)], axis=-1)


def features(model: Model, params: Params, x: jax.Array, labels: jax.Array) -> jax.Array:
  """`pooled` tokens of a network for samples [B, ...] and their labels [B]: [B, 2·D]."""
  _, tokens = model.apply({"params": params}, x, labels, return_tokens=True)
  return pooled(tokens)


def fit(features: np.ndarray, gamma: np.ndarray, ridge: float = 1e-4) -> NoiseReadout:
  """The read-out with the least squared error of γ, by ridge regression in closed form.

  Args:
    features: of noised samples, [N, 2·D].
    gamma: theirs, [N].
    ridge: the penalty of the squared weights, of features that are scaled to unit variance, beside the mean of the
      squared errors.

  Raises:
    ValueError: for a penalty that is not positive.
  """
  checks.in_interval("ridge", ridge, 0, np.inf, open_low=True, open_high=True)
  features_NxF, gamma_N = np.asarray(features, np.float64), np.asarray(gamma, np.float64)
  mean_F, scale_F = features_NxF.mean(axis=0), features_NxF.std(axis=0)
  scale_F[scale_F <= 1e-6 * np.abs(mean_F)] = np.inf  # a constant feature: rounding would be all of its variance
  scaled_NxF = (features_NxF - mean_F) / scale_F
  gram_FxF = scaled_NxF.T @ scaled_NxF / len(gamma_N) + ridge * np.eye(len(mean_F))
  weights_F = np.linalg.solve(gram_FxF, scaled_NxF.T @ (gamma_N - gamma_N.mean()) / len(gamma_N)) / scale_F
  bias = gamma_N.mean() - mean_F @ weights_F
  return NoiseReadout(jnp.asarray(weights_F, jnp.float32), jnp.asarray(bias, jnp.float32))


def check_model(model: Model, form: str | None = None, readout: NoiseReadout | None = None):
  """Refuses a model whose γ cannot be read off its tokens, or not by this read-out.

  Args:
    model: the network.
    form: of the energy that it is read as; None: as it was built.
    readout: None: one is still to be fitted.

  Raises:
    ValueError: for a model with γ as an input, an energy, or a model of another width.
  """
  energy, width = form or getattr(model, "energy", "none"), getattr(model, "width", None)
  if getattr(model, "time_input", False):
    raise ValueError(
      "a read-out of γ is for fields without time, but this model takes γ as an input (model.time_input = True): give "
      "another model"
    )
  if energy != "none":
    raise ValueError(
      f"a read-out of γ is for implicit fields, but this one is the gradient of an energy ({energy!r}): stop by "
      "'norm', or give an implicit model"
    )
  if readout is not None and width not in (None, readout.width):
    raise ValueError(f"the read-out is of a model of width {readout.width}, but this one has {width}: {REFIT}")
