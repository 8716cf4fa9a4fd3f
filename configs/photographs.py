"""EqM end to end on real photographs: patches → autoencoder → cache of latents → EqM → samples, decoded.

Command:   python -m eqm_jax.main --config=configs/photographs.py --workdir=runs/photographs
Hardware:  two CPU cores, 4 GiB: two and a half minutes, 45 seconds of them for the autoencoder
Expected:  Fréchet distance of latents 9.8 (two halves of the real ones: 12.3), of a classifier's features of decoded
           samples 0.8 (0.3); classifier accuracy 0.996; mean NFE of adaptive descent 117; loss 6, 0.45 of E[c²].

The data are 572 patches of 32×32 pixels out of scikit-learn's two sample photographs, made smaller: a Chinese temple
and a flower. The autoencoder is of the kind of Stable Diffusion's, but tiny, and is trained here first: it restores
colours and shapes, no fine detail. On ImageNet it is downloaded (docs/data.md); everything after it is the same.
"""

import pathlib
import runpy
import types

base = types.SimpleNamespace(**runpy.run_path(str(pathlib.Path(__file__).with_name("base.py"))))


def get_config(variant: str = ""):
  config = base.get_config()
  config.data.update(source="latents", flip=True)
  config.data.options = dict(path="runs/photographs/latents", verify=True)
  config.autoencoder.update(path="runs/photographs/autoencoder", name="photographs", batch_size=128)
  with config.unlocked():
    config.prepare = base.prepare(source="photographs", options=dict(size=32, stride=6, shrink=4))
    config.prepare.fit = base.fit()
  config.model.update(channels=4, width=192, unroll=3, num_classes=2)  # latent pixels: 32 / 4
  config.train.steps = 2600
  config.samplers = dict(adaptive=base.sampler(threshold=10.0))
  config.evaluation.num_samples = 500
  config.evaluation.classifier.steps = 150
  config.tasks.compose.labels = (0, 1)
  config.benchmark.metrics.update(samples=500, real=500)
  config.benchmark.sweeps.tokens = (1, 4, 16, 64)
  return base.apply(config, VARIANTS, variant, "photographs.py")


def online(config):
  """Without a cache: images are encoded in each training step, by the autoencoder of the run above."""
  config.data.source = config.prepare.source
  config.data.options = config.prepare.options
  with config.unlocked():
    del config.prepare
  config.evaluation.update(features=("classifier",), classifier_accuracy=False)


def smoke(config):
  base.smoke(config)
  config.data.options.path = "runs/photographs_smoke/latents"
  config.autoencoder.update(path="runs/photographs_smoke/autoencoder", batch_size=40)
  config.prepare.options.update(stride=40, shrink=2)
  config.prepare.images_per_shard = 40
  config.prepare.fit.update(steps=5, batch_size=8)
  config.prepare.fit.model.update(block_out_channels=(8, 8, 8), norm_num_groups=4)
  config.model.update(width=16, depth=1)
  config.train.steps = 20
  config.samplers.adaptive.update(step_size=0.03, max_nfe=25)


VARIANTS = {"online": online, "smoke": smoke}
