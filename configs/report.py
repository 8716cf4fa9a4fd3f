"""Tests the paper's claims on scikit-learn's digits: three seeds of every model, one HTML page.

Command:   python -m eqm_jax.main --config=configs/report.py --workdir=runs/report --mode=report
Hardware:  two CPU cores, 4 GiB: about an hour and a half; killed, it goes on claim by claim and step by step.
           configs/report.py:quick goes the same way with networks that hardly learn, in minutes.
Expected:  runs/report/index.html, with its figures and report.json.

The network, the data and the optimizer are those of configs/digits.py; one digit in six is held out.
"""

import os
import runpy

import ml_collections
from ml_collections import config_dict


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  """Variants: "" and "quick"."""
  if variant not in ("", "quick"):
    raise ValueError(f"configs/report.py has no variant {variant!r}: choose 'quick' or none")
  quick = variant == "quick"
  digits = runpy.run_path(os.path.join(os.path.dirname(os.path.abspath(__file__)), "digits.py"))
  config = digits["get_config"]("smoke" if quick else "")
  config.data.options.part = "train"
  config.evaluation.samples = 0
  config.train.log_every = 1000
  if quick:
    config.model.update(width=32, depth=1, num_heads=2)
    config.train.steps = 30
  config.report = config_dict.create(
    # Told on the page.
    command=f"python -m eqm_jax.main --config=configs/report.py{':quick' if quick else ''} --workdir=runs/report"
    " --mode=report",
    seeds=1 if quick else 3,  # of parameters, order and noise; figures are mean and spread over them
    samples=60 if quick else 1000,  # of each row
    batch_size=60 if quick else 500,  # samples in flight on each device
    evaluations=24 if quick else 249,  # of a full descent; the paper's "250 steps"
    step_size=0.03 if quick else 0.003,  # η of a full descent
    threshold=4.0,  # of adaptive compute
    held_out=60 if quick else 299,  # images that are denoised and told from others
  )
  return config
