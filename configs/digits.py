"""EqM on scikit-learn's 1,797 handwritten digits (8×8 pixels, 10 classes).

Command:   python -m eqm_jax.main --config=configs/digits.py --workdir=runs/digits
Hardware:  two CPU cores with AVX2, 4 GiB: two minutes of training and two of evaluation, compilation included
Expected:  Fréchet distance in pixel space 0.24 (adaptive) and 0.32 (GD), where two halves of the real digits have
           0.29, and in a classifier's features 0.19, 0.28 and 0.64; classifier accuracy 0.99; adaptive descent takes
           107 NFE on average. The loss ends near 5.3, 0.39 of E[c²].
Variants:  digits.py:smoke (short, for tests), :samplers, :modern (docs/options.md), :flow_matching,
           :flow_matching_untimed and the explicit energies :dot, :scalar and :l2, which starts from the run above.
"""

import pathlib
import runpy
import types

base = types.SimpleNamespace(**runpy.run_path(str(pathlib.Path(__file__).with_name("base.py"))))


def get_config(variant: str = ""):
  config = base.get_config()
  config.model.unroll = 3
  config.evaluation.update(num_samples=1797, batch_size=450, chunk_size=900)
  config.evaluation.during_training.num_samples = 600
  config.benchmark.metrics.update(samples=1797, real=1797)
  return base.apply(config, VARIANTS, variant, "digits.py")


def smoke(config):
  base.smoke(config)
  for row in config.samplers.values():
    row.update(step_size=0.03, max_nfe=25)
  config.evaluation.during_training.update(every=30, num_samples=40)


def samplers(config):
  """A comparison of samplers on the run above: --workdir=runs/digits --mode=evaluate."""
  rows = dict(
    fixed=base.sampler(batching="static"),
    static=base.sampler(threshold=4.0, batching="static"),
    continuous=base.sampler(threshold=4.0),
  )
  for nfe in (10, 25, 50, 100, 249):
    for rule, momentum in (("gd", 0.0), ("nag", 0.3), ("nesterov", 0.3)):
      rows[f"{rule}_{nfe:03d}"] = base.sampler(rule=rule, momentum=momentum, step_size="auto", max_nfe=nfe)
    rows[f"adam_{nfe:03d}"] = base.sampler(rule="adam", step_size=2.0 / nfe, max_nfe=nfe)
    rows[f"heun_{nfe:03d}"] = base.sampler(rule="heun", max_nfe=nfe)
  for percent in (40, 70, 150, 200, 250):
    rows[f"gd_eta_{percent:03d}"] = base.sampler(step_size=0.003 * percent / 100)
  config.samplers = rows
  config.evaluation.update(batch_size=200, chunk_size=1797, plot_sampler=None)
  config.evaluation.benchmark_samplers = ("fixed", "static", "continuous")
  _default_sampler(config, "continuous")


def flow_matching_untimed(config):
  """The baseline without γ as input, on the same data, steps and seeds. GD with η = 1/N is Euler's method."""
  config.objective.kind = "flow_matching"
  config.samplers = dict(gd=base.sampler(step_size=1 / 249), heun=base.sampler(rule="heun"))
  config.samplers.nag = base.sampler(rule="nag", momentum=0.3, step_size=1 / 249)
  config.evaluation.plot_sampler = None
  _default_sampler(config, "gd")


def flow_matching(config):
  """The same with γ as input."""
  flow_matching_untimed(config)
  config.model.time_input = True
  config.samplers = dict(euler=base.sampler(rule="euler"), heun=base.sampler(rule="heun"))
  _default_sampler(config, "euler")


def _default_sampler(config, name: str):
  for section in (config.evaluation.during_training, config.sample, config.tasks):
    section.sampler = name


VARIANTS = {
  "smoke": smoke,
  "samplers": samplers,
  "flow_matching": flow_matching,
  "flow_matching_untimed": flow_matching_untimed,
  "modern": lambda config: config.model.update(qk_norm=True, norm="rms", mlp="swiglu", rope=True),
  "dot": lambda config: config.model.update(energy="dot"),
  "scalar": lambda config: config.model.update(energy="scalar"),
  "l2": lambda config: config.update(model=dict(energy="l2"), train=dict(init_from="runs/digits")),  # the run above
}
