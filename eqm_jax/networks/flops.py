"""How much arithmetic the network is: its matrix products, counted by formula.

A compiler's own count leaves out the repetitions of a scan, and counts what rematerialisation does twice.
"""

from eqm_jax.networks.dit import TIME_FREQUENCIES, DiT


def forward(model: DiT) -> int:
  """Floating-point operations of one call for one sample; a product and its sum are two."""
  T, D = (model.input_size // model.patch_size) ** 2, model.width
  F, P = round(D * model.mlp_ratio), model.patch_size**2 * model.channels
  out = 1 if model.energy == "scalar" else P * (2 if model.learn_sigma else 1)
  attention = 4 * T * D * D + 2 * T * T * D  # query, key, value and output; scores and their mix
  block = attention + 2 * T * D * F + 6 * D * D  # the multilayer perceptron, adaLN's modulation
  time = TIME_FREQUENCIES * D + D * D if model.time_input else 0  # without it one for the whole batch
  return 2 * (T * P * D + model.depth * block + 2 * D * D + T * D * out + time)


def training(model: DiT) -> int:
  """Operations of one training step for one sample, without what is computed again to save memory.

  A derivative takes twice what its function takes. The field of an energy is one already, by the input alone, which
  takes once what the energy does.
  """
  return 3 * forward(model) * (1 if model.energy == "none" else 2)


def evaluation(model: DiT, guided: bool = False) -> int:
  """Operations of one evaluation of the field for one sample: of an energy, its gradient in the sample.

  A guided evaluation is two: with the label and without, in one batch.
  """
  return forward(model) * (1 if model.energy == "none" else 2) * (2 if guided else 1)
