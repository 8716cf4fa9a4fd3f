"""How well the noise level of samples can be read off a network: a fitted read-out, and its errors over γ.

Two others stand beside it, fitted to the same samples: the same features of the network as it is initialised, which
shows what training has added, and the mean and mean square of each channel of the samples, without any network.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eqm_jax import distributed
from eqm_jax.equilibrium import noise_level, tasks
from eqm_jax.equilibrium.noise_level import NoiseReadout
from eqm_jax.networks.dit import DiT
from eqm_jax.sampling.generator import Generator

BINS = 10  # of γ, equally wide
HELD_OUT = 6  # one sample in so many is left out of a fit
READOUT = 2**32 - 6  # folded into the generator's key, where no sample index reaches
SOURCES = NETWORK, UNTRAINED, PIXELS = "network", "untrained network", "pixel statistics"  # of the features

Data = tuple[np.ndarray, np.ndarray]  # images [N, H, W, C], and labels [N]


@dataclasses.dataclass(frozen=True)
class Noised:
  """Images at random noise levels, half of them with the null label, and the features that γ is read off."""

  gamma: np.ndarray  # [N], uniform in (0, 1)
  has_class: np.ndarray  # bool [N]
  features: dict[str, np.ndarray]  # [N, F], by SOURCES


@dataclasses.dataclass(frozen=True)
class Study:
  """A read-out, and what it and the others beside it say of held-out samples."""

  readout: NoiseReadout
  gamma: np.ndarray  # [N]
  has_class: np.ndarray  # bool [N]
  predicted: dict[str, np.ndarray]  # γ̂ [N], by SOURCES

  def report(self) -> dict[str, Any]:
    """RMSE and bias, of all samples and in bins of γ; of the network also with a class and without."""
    result = {name: _errors(values, self.gamma) for name, values in self.predicted.items()}
    error_N = self.predicted[NETWORK] - self.gamma
    for name, chosen_N in (("rmse_with_class", self.has_class), ("rmse_without_class", ~self.has_class)):
      result[NETWORK][name] = _rmse(error_N[chosen_N]) if chosen_N.any() else None
    return result


def study(generator: Generator, data: Data, held_out: Data, count: int, ridge: float) -> Study:
  """Fits a read-out and compares it with the truth.

  Args:
    generator: of the model. Its key fixes the noise.
    data: what the read-out is fitted to, noised; fewer images than samples are taken several times.
    held_out: what it is scored on.
    count: number of noised samples; one in `HELD_OUT` of them is held out.
    ridge: as for `noise_level.fit`.

  Raises:
    ValueError: for a model that takes γ as an input, or is an energy.
  """
  model = generator.model
  noise_level.check_model(model)
  x, label = jnp.zeros((1, *model.input_shape)), jnp.zeros(1, jnp.int32)
  untrained = jax.jit(model.init)(generator.key, x, label)["params"]
  params = distributed.replicate({NETWORK: generator.params, UNTRAINED: untrained})
  fitted_to = _noised("fit", generator, params, data, stream=0, count=count - count // HELD_OUT)
  scored_on = _noised("held out", generator, params, held_out, stream=1, count=count // HELD_OUT)
  fits = {name: noise_level.fit(fitted_to.features[name], fitted_to.gamma, ridge) for name in SOURCES}
  predicted = {name: np.asarray(fits[name].of_features(scored_on.features[name])) for name in SOURCES}
  return Study(fits[NETWORK], scored_on.gamma, scored_on.has_class, predicted)


def _noised(name: str, generator: Generator, params: dict[str, Any], data: Data, *, stream: int, count: int) -> Noised:
  """`count` noised images of a data set; `name` is that of the progress, `stream` distinguishes the random numbers."""
  key = jax.random.fold_in(generator.key, jnp.uint32(READOUT))
  gamma_key, label_key, noise_key = jax.random.split(jax.random.fold_in(key, stream), 3)
  (image_M, label_M), model = data, generator.model
  gamma_N = np.asarray(jax.random.uniform(gamma_key, (count,)))
  image_of_N = np.arange(count) % len(image_M)
  has_class_N = np.asarray(jax.random.bernoulli(label_key, 0.5, (count,))) & (label_M[image_of_N] < model.num_classes)
  label_N = np.where(has_class_N, label_M[image_of_N], model.num_classes).astype(np.int32)

  def measure(index):
    image, gamma, label, index = generator.shard((image_M[image_of_N[index]], gamma_N[index], label_N[index], index))
    return _features(model, params, tasks.noised(image, gamma, noise_key, index), label)

  return Noised(gamma_N, has_class_N, generator.in_batches(name, measure, count))


@functools.partial(jax.jit, static_argnums=0)
def _features(model: DiT, params: dict[str, Any], x: jax.Array, label: jax.Array) -> dict[str, jax.Array]:
  pixels = noise_level.pooled(x.reshape(len(x), -1, x.shape[-1]))
  return {PIXELS: pixels} | {name: noise_level.features(model, own, x, label) for name, own in params.items()}


def _errors(predicted_N: np.ndarray, gamma_N: np.ndarray) -> dict[str, Any]:
  error_N, bin_N = predicted_N - gamma_N, np.minimum((gamma_N * BINS).astype(int), BINS - 1)
  groups = [error_N[bin_N == k] for k in range(BINS)]
  bins = [
    {"from": k / BINS, "to": (k + 1) / BINS, "samples": len(group), "rmse": _rmse(group), "bias": float(group.mean())}
    for k, group in enumerate(groups)
    if len(group)
  ]
  return {"rmse": _rmse(error_N), "bias": float(error_N.mean()), "bins": bins}


def at_ends(errors: dict[str, Any]) -> list[float]:
  """RMSE in the lowest and the highest bin of γ, and bias in the highest, of `Study.report`; nan where no sample is."""
  bins = {one["from"]: one for one in errors["bins"]}
  lowest, highest = (bins.get(number / BINS, {}) for number in (0, BINS - 1))
  return [one.get(key, math.nan) for one, key in ((lowest, "rmse"), (highest, "rmse"), (highest, "bias"))]


def _rmse(error_N: np.ndarray) -> float:
  return float(np.sqrt(np.mean(error_N**2)))
