"""Floating-point operations of the network's matrix products, counted by formula.

A compiler's own count leaves out the repetitions of a scan, and counts rematerialisation twice. What is computed number
by number is left out: norms, activations, softmax, rotary positions.
"""

from eqm_jax.networks.dit import TIME_FREQUENCIES, DiT


def forward(model: DiT) -> int:
  """Operations of one call for one sample; a multiplication and its addition are two."""
  T = (model.input_size // model.patch_size) ** 2
  D = model.width
  matrices = 3 if model.mlp == "swiglu" else 2  # of the multilayer perceptron
  P = model.patch_size**2 * model.channels
  out = 1 if model.energy == "scalar" else P * (2 if model.learn_sigma else 1)
  attention = 4 * T * D * D + 2 * T * T * D  # query, key, value and output; logits and the weighted sum
  block = attention + matrices * T * D * model.hidden_width + 6 * D * D  # adaLN's modulation
  time = TIME_FREQUENCIES * D + D * D if model.time_input else 0  # without it computed once for the whole batch
  return 2 * (T * P * D + model.depth * block + 2 * D * D + T * D * out + time)


def training(model: DiT) -> int:
  """Operations of one training step for one sample, without rematerialisation.

  A derivative takes twice the operations of its function. The field of an energy is a derivative itself, by the input
  only, which takes as many operations as the energy.
  """
  return 3 * forward(model) * (1 if model.energy == "none" else 2)


def evaluation(model: DiT, guided: bool = False) -> int:
  """Operations of one field evaluation (one NFE) for one sample: for an energy, its gradient in the sample.

  A guided evaluation is two: with the label and without, in one batch.
  """
  return forward(model) * (1 if model.energy == "none" else 2) * (2 if guided else 1)
