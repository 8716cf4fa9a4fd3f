"""EqM on 5,000 digits of MNIST, averaged to 14×14 pixels.

Command:   python -m eqm_jax.main --config=configs/mnist.py --workdir=runs/mnist
Hardware:  two CPU cores, 4 GiB: 20 minutes of training and 6 of evaluation if nothing else runs on them; 40 in all
           were measured while other jobs did. Variant ":28" is for accelerators and was not run by us.
Expected:  classifier accuracy 0.943 (adaptive), 0.942 (GD) and 0.940 (NAG) without guidance, of held-out real digits
           0.959; Fréchet distance in pixel space 0.97 to 1.01, of two halves of the real digits 0.45, and in a
           classifier's features 0.27 and 0.19; mean NFE of adaptive descent 106; loss at the end 3.2, 0.23 of E[c²].
"""

import pathlib
import runpy
import types

base = types.SimpleNamespace(**runpy.run_path(str(pathlib.Path(__file__).with_name("base.py"))))


def get_config(variant: str = ""):
  config = base.get_config()
  config.data.source = "mnist"
  config.data.options = dict(size=14, part="all")  # the mean of each four pixels
  config.model.update(input_size=14, patch_size=2, depth=4, unroll=4)
  config.train.steps = 4500
  config.samplers.adaptive.threshold = 7.0
  config.evaluation.during_training.every = 1000
  config.benchmark.metrics.real = 5000
  return base.apply(config, VARIANTS, variant, "mnist.py")


SIZE_28 = dict(data=dict(options=dict(size=28)), model=dict(input_size=28, width=256, depth=8))  # a larger network, too
VARIANTS = {"28": lambda config: config.update(SIZE_28)}
