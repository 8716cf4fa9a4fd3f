"""Descents from given images, and of weighted sums of fields: partial denoising and composition."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from eqm_jax.equilibrium import field as field_lib
from eqm_jax.equilibrium.sampler import Result
from eqm_jax.sampling.generator import Generator, Row

NEGLIGIBLE = 1e-6  # weight that rounding leaves of 1 − Σ w; its term would cost a pass of the network


@dataclasses.dataclass(frozen=True)
class Term:
  """One term of a composition."""

  generator: Generator  # of the model
  label: int | np.ndarray  # one for all samples, or one each
  weight: float


def descend_images(name: str, generator: Generator, row: Row, start_N: np.ndarray, label_N: np.ndarray) -> Result:
  """Descends from images [N, H, W, C], however noisy, batch by batch.

  Args:
    name: description of the progress.
    generator: the model; image i takes the random numbers of sample i.
    row: a row of the config's samplers that descends.
    start_N: where the descents start.
    label_N: the class of each image.
  """
  field = generator.field(row)

  def descend(index):
    start, label, index = generator.shard((start_N[index], label_N[index], index))
    return generator.descend(row, start, field.bind(label), index=index)

  return generator.in_batches(name, descend, len(start_N))


def descend_sum(name: str, row: Row, terms: Sequence[Term], count: int) -> Result:
  """Descends Σ w_k·f_k from the noise of samples 0 to count − 1.

  Args:
    name: description of the progress.
    row: a row of the config's samplers that descends; its guidance acts in each term.
    terms: what is summed. Noise, batch size and pace are those of the first term's generator.
    count: number of samples.
  """
  generator = terms[0].generator
  terms = [term for term in terms if abs(term.weight) > NEGLIGIBLE]
  fields = [term.generator.field(row) for term in terms]
  label_KxN = [np.broadcast_to(term.label, count).astype(np.int32) for term in terms]

  def descend(index):
    bound = [field.bind(generator.shard(label_N[index])) for field, label_N in zip(fields, label_KxN)]
    composed = field_lib.compose(bound, [term.weight for term in terms])
    start = generator.shard(generator.noise(index))
    return generator.descend(row, start, composed, index=generator.shard(index))

  return generator.in_batches(name, descend, count)
