"""EqM on CIFAR-10, 32×32 pixels, 10 classes, read through TFDS.

Command:   python -m eqm_jax.main --config=configs/cifar10.py --workdir=runs/cifar10
Hardware:  one accelerator; not run by us. 36 GFLOP per image and step: 400,000 steps of 256 take an estimated 10 hours
           at half of the peak of one v5e chip (197 TFLOP/s, bfloat16).
Expected:  the paper's FID of 3.36 is a U-Net's without classes; no figure is known for this transformer with classes.
Data:      a TFDS build of cifar10 under data/tfds (docs/data.md), and Inception's weights (docs/evaluation.md).
"""

import pathlib
import runpy
import types

base = types.SimpleNamespace(**runpy.run_path(str(pathlib.Path(__file__).with_name("base.py"))))
VARIANTS = {}


def get_config(variant: str = ""):
  config = base.get_config()
  config.data.update(source="tfds", flip=True, threads=16)
  config.data.options = dict(name="cifar10", path="data/tfds", split="train", size=32, channels=3)
  config.model.update(input_size=32, channels=3, patch_size=2, width=384, depth=12, num_heads=6, dtype="bfloat16")
  config.optimizer.update(learning_rate=2e-4, warmup_steps=5000, ema_decay=0.9999)
  config.train.update(steps=400_000, batch_size=256)
  config.checkpoint.every = 10_000
  config.samplers.adaptive.threshold = 9.0
  config.evaluation.update(num_samples=10_000, batch_size=512, chunk_size=1000)
  config.evaluation.update(features=("inception",), classifier_accuracy=False)
  config.evaluation.during_training.update(every=20_000, num_samples=2000)
  config.benchmark.update(num_samples=2048, steps=100)
  config.benchmark.metrics.update(samples=10_000, real=10_000, size=2048)
  config.benchmark.sweeps.update(tokens=(64, 256, 1024), depth=(1, 4, 12), samples=(512, 2048, 8192))
  return base.apply(config, VARIANTS, variant, "cifar10.py")
