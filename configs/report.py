"""Tests the paper's claims on scikit-learn's digits: three seeds of every model, one HTML page.

Command:   python -m eqm_jax.main --config=configs/report.py --workdir=runs/report --mode=report
Hardware:  two CPU cores, 4 GiB: about an hour and a half; killed, it goes on claim by claim and step by step.
Expected:  runs/report/index.html, with its figures and report.json.
Variants:  report.py:beyond, for options that the paper does not have (docs/options.md), takes about as long;
           with ":quick", or ":beyond,quick", networks hardly learn, in minutes.

The network, the data and the optimizer are those of configs/digits.py; one digit in six is held out.
"""

import pathlib
import runpy
import types

digits = types.SimpleNamespace(**runpy.run_path(str(pathlib.Path(__file__).with_name("digits.py"))))

TITLES = {
  "baselines": "EqM makes better samples than flow matching, with time and without",
  "schedules": "A c(γ) that is constant up to a = .8 and then falls to zero is the best of its family",
  "multipliers": "The gradient multiplier λ = 4 is best",
  "few_steps": "With few steps, looking ahead (NAG) beats plain gradient descent",
  "step_sizes": "EqM is robust to the step size, flow matching is not",
  "adaptive": "Stopping each sample by its gradient saves more than half of the NFE at nearly the same quality",
  "more_steps": "More steps than needed do not help, though ‖f‖ goes on falling",
  "denoising": "EqM starts from images of any noise level, without γ as input",
  "outlier_detection": "The landscape separates data from outliers",
  "composition": "Landscapes add up: labels and models are composed by weighted sums, negative weights included",
  "memorisation": "Samples are new images, not copies of training images",
  "energies": "An implicit field makes better samples than explicit energies, and dot better than l2",
}
PAPER = {
  "baselines": "ImageNet 256, B/2, 80 epochs: FID 32.85 (EqM), 36.5 to 37 (flow matching), 40.81 (without time).",
  "schedules": "Truncated decay with a = .8 is best, piecewise slightly worse; a constant is untimed flow matching.",
  "multipliers": "B/2, 80 epochs: FID 32.85 at λ = 4, 38.34 at λ = 1.",
  "few_steps": "B/2, FID at 25, 50, 100 steps: GD 56.1, 43.3, 39.0; NAG 49.4, 41.1, 38.0.",
  "step_sizes": "B/2, η × .4 to 2.5: FID 32.85 to 35.8, worst over best 1.09; SiT-B/2 37.1 at × 1, 120.7 at × 1.5.",
  "adaptive": "B/2, g_min = 10: about 40 % of the NFE, FID 33.79 against 32.85 (3 % worse).",
  "more_steps": "An independent run, 5,000 samples: FID 45.7, 45.7, 47.9 at 250, 500, 1,000 steps, while ‖f‖ fell.",
  "denoising": "Images noised to γ and descended: FID stays low for every γ; flow matching, run as from noise, breaks.",
  "outlier_detection": "CIFAR-10, dot energy: AUROC SVHN .55, Textures .49, constant 1.00, mean .68, ahead of others.",
  "composition": "Sums of class-conditional fields give images with the content of both classes (pictures only).",
  "memorisation": "With perfect training each local minimum is a training image; what networks reach is not reported.",
  "energies": "B/4: FID 57.5 (implicit), 73.4 (dot), 75.5 (l2).",
}
BEYOND = {
  "gammas": ("With a density of γ ∝ 1/c(γ) samples are better than with uniform γ", "Not in the paper: γ is uniform."),
  "wall_clock": ("EqM reaches the quality of flow matching in less time", "Not in the paper: it counts NFE alone."),
  "noise_level": ("The field knows its noise level: γ can be read off its tokens linearly", "Not in the paper."),
  "modern_block": ("A modern block makes better samples at equal compute", "Not in the paper: its blocks are DiT's."),
}
DESCRIPTION = """Each claim of the Equilibrium Matching paper beside what was measured here, on a small network and
small pictures. A claim that fails here may well hold on ImageNet, and the other way round. The criterion given with a
claim decides; one of several parts holds in part where only some do, or within the spread of the seeds."""


def get_config(variant: str = ""):
  config = digits.get_config()
  config.data.options.part = "train"
  config.train.log_every = 1000
  config.evaluation.num_samples = None
  text = dict(title="What the paper claims, measured on handwritten digits", description=DESCRIPTION)
  text["data"] = "scikit-learn's 1,797 digits, 8 × 8 pixels; one in six is held out"
  text["claims"] = {name: (TITLES[name], PAPER[name]) for name in TITLES}
  with config.unlocked():
    config.report = digits.base.report(text=text)
  if variant:
    config.report.command = config.report.command.replace("report.py", f"report.py:{variant}")
  return digits.base.apply(config, VARIANTS, variant, "report.py")


def quick(config):
  """Networks that hardly learn, one seed."""
  digits.smoke(config)
  config.evaluation.num_samples = None
  config.model.update(width=32, depth=1, num_heads=2)
  config.train.update(steps=30, log_every=1000)
  config.report.update(seeds=1, num_samples=60, batch_size=60, max_nfe=24, step_size=0.03, num_held_out=60)


def beyond(config):
  """Options that the paper does not have."""
  config.report.command = config.report.command.replace("runs/report", "runs/beyond")
  text = dict(
    title="Options beyond the paper, measured on digits", description="What the paper leaves open or has not."
  )
  config.report.text.update(text)
  with config.unlocked():
    config.report.text.claims = BEYOND


VARIANTS = {"quick": quick, "beyond": beyond}
