"""EqM on points of the plane: two moons, eight Gaussians or a checkerboard.

Command:   python -m eqm_jax.main --config=configs/toy2d.py --workdir=runs/moons
           Variants: toy2d.py:two_moons (the default), :eight_gaussians, :checkerboard; with "-dot" or "-scalar" after
           it an explicit energy; "-imagenet" trains as on ImageNet; "-smoke" is short, for tests.
Hardware:  two CPU cores, 2 GiB: about two minutes
Expected:  evaluation/plane.png, the field, its energy and descents, with the optimal field below, and
           evaluation/samples_adaptive.png. Samples are about as near to the data as new data is, and reach all of it.

In few dimensions a point does not reveal its γ, so the field near the data is an average over many γ, and with
ImageNet's c(γ) (a = 0.8) it does not vanish on the data: descents drift along the moons and gather in a few places.
Here a is smaller, and a fraction of the points is trained at γ = 1 exactly, with target zero: the data is at rest.
"""

import functools
import pathlib
import runpy
import types

base = types.SimpleNamespace(**runpy.run_path(str(pathlib.Path(__file__).with_name("base.py"))))


def get_config(variant: str = "two_moons"):
  config = base.get_config()
  config.data.source = "plane"
  config.data.options = dict(kind="two_moons", count=4096, seed=0)
  config.model.update(input_size=1, channels=2, patch_size=1, width=64, unroll=3)  # a point: one pixel, two channels
  config.objective.update(label_dropout=0.3, clean_fraction=0.7)
  config.objective.schedule.a = 0.5
  config.train.update(batch_size=256, log_every=500)
  config.checkpoint.every = 2000
  config.samplers = dict(fixed=base.sampler(step_size=0.01), adaptive=base.sampler(step_size=0.01, threshold=0.3))
  config.evaluation.update(num_samples=2000, batch_size=500, chunk_size=2000, features=("raw",))
  config.evaluation.during_training.num_samples = 500
  config.tasks.ood.against = ("uniform", "gaussian")
  config.tasks.compose.labels = (0, 1)
  config.tasks.inpaint.update(mask="all", gamma=0.5, settle=0, tries=1)  # a point has no parts
  config.benchmark.num_samples = 2000
  config.benchmark.metrics.update(samples=2000, real=2000, size=2)
  config.benchmark.sweeps.update(batch=(64, 256, 1024), tokens=(1, 4, 16), samples=(500, 2000, 8000))
  return base.apply(config, VARIANTS, variant or "two_moons", "toy2d.py")


def points(config, kind: str, num_classes: int, override):
  config.data.options.kind = kind
  config.model.num_classes = num_classes
  override(config)


def smoke(config):
  base.smoke(config)
  config.model.update(width=16, depth=1)
  for row in config.samplers.values():
    row.max_nfe = 20


KINDS = {
  "": lambda config: None,
  "-dot": lambda config: config.model.update(energy="dot"),
  "-scalar": lambda config: config.model.update(energy="scalar"),
  "-imagenet": lambda config: config.objective.update(clean_fraction=0.0, schedule=dict(a=0.8)),
  "-smoke": smoke,
}
VARIANTS = {
  kind + suffix: functools.partial(points, kind=kind, num_classes=num_classes, override=override)
  for kind, num_classes in (("two_moons", 2), ("eight_gaussians", 8), ("checkerboard", 8))
  for suffix, override in KINDS.items()
}
