"""EqM-XL/2 on ImageNet 512×512 in the latent space of Stable Diffusion's autoencoder.

Command:   python -m eqm_jax.main --config=configs/imagenet512.py --workdir=runs/xl2_512 (variants of imagenet256.py)
Hardware:  a TPU slice or GPUs; not run by us. 1,024 tokens an image: XL/2 takes 3.1 TFLOP per image and step, and 3.0
           million steps of 256 an estimated 106 hours at half of the peak of 64 v5e chips.
Expected:  the paper has no figures for this size.
Data:      as for configs/imagenet256.py (docs/data.md); the cache takes 172 GB.
"""

import pathlib
import runpy
import types

smaller = types.SimpleNamespace(**runpy.run_path(str(pathlib.Path(__file__).with_name("imagenet256.py"))))
VARIANTS = smaller.VARIANTS


def get_config(variant: str = "XL/2"):
  config = smaller.get_config(variant, "imagenet512.py")
  images = config.prepare if "prepare" in config else config.data
  images.options.size = 512  # pixels
  if config.data.source == "latents":
    config.data.options.path = "data/imagenet512_latents"
  config.model.input_size = 64  # latent pixels: 512 / 8
  config.model.remat = "full"  # the backward pass computes each block again
  config.autoencoder.batch_size = 8  # on each device: a decoder's activations of one image are 1 GB
  config.train.steps = 3_000_000
  config.samplers.adaptive.threshold = 20.0  # ‖f‖ grows with the root of the dimension: twice that of 256
  config.evaluation.inception.reference = "data/VIRTUAL_imagenet512.npz"  # ADM's statistics of this size
  config.sample.batch_size = 32
  return config
