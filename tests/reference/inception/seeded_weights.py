"""Seeded stand-in weights for the FID Inception-v3, so that a port can be checked without the 95 MB file.

`names_and_shapes.json` lists every entry of the published state dict (`pt_inception-2015-12-05`): its name and
shape, in order. `seeded_weights()` fills each with numbers that depend on its name alone, so the reference and a
port see the same network. `golden.npz` holds what the reference then computes.
"""

import json
import math
import pathlib
import zlib

import numpy as np


def seeded_weights(listing=pathlib.Path(__file__).with_name("names_and_shapes.json")):
  """Returns {name: float32 array} for every entry of the published state dict (batch counters left out)."""
  weights = {}
  for name, shape in json.loads(pathlib.Path(listing).read_text()):
    noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith("running_var"):
      value = 1 + 0.2 * np.abs(noise)
    elif name.endswith(("bn.bias", "running_mean", "fc.bias")):
      value = 0.1 * noise
    elif name.endswith("bn.weight"):
      value = 1 + 0.1 * noise
    elif name == "fc.weight":
      value = noise / math.sqrt(shape[1])
    else:
      value = noise * math.sqrt(2 / math.prod(shape[1:]))
    weights[name] = value.astype(np.float32)
  return weights
