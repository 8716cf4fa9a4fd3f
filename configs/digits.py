"""EqM on scikit-learn's 1,797 handwritten digits (8×8 pixels, 10 classes).

Command:   python -m eqm_jax.main --config=configs/digits.py --workdir=runs/digits
Hardware:  two CPU cores, 4 GiB: about 5 minutes of training and 1 of evaluation
Expected:  Fréchet distance in pixel space 0.34 (adaptive) and 0.53 (fixed), 0.29 being that of two
           halves of the real digits; label agreement 0.95; adaptive descent takes 113 evaluations
           on average. The loss ends near 5.0, 0.36 of E[c²].
"""

import ml_collections
from ml_collections import config_dict


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  """Variants: "" is the run above; "smoke" is a short run of the same code, for tests."""
  if variant not in ("", "smoke"):
    raise ValueError(f"configs/digits.py has no variant {variant!r}: choose 'smoke' or none")
  smoke = variant == "smoke"
  config = ml_collections.ConfigDict()
  config.seed = 0  # of parameters, order, noise; a key depends on (seed, step) alone

  config.data = config_dict.create(
    source="digits",  # "digits" or "latents"
    options=config_dict.create(),  # arguments of the source
    flip=False,  # mirror half of the images: a mirrored digit is no digit
    threads=2,  # that read ahead
  )
  config.model = config_dict.create(  # the attributes of networks.dit.DiT
    input_size=8,  # pixels
    channels=1,
    patch_size=2,  # pixels
    width=96,
    depth=3,  # blocks
    num_heads=4,
    num_classes=10,  # label 10 is "no class"
    mlp_ratio=4.0,
    time_input=False,  # True: a flow-matching network, told γ
    learn_sigma=False,  # True: carry the unused second output half of the released code
    dtype="float32",  # of the matrix products: "float32" or "bfloat16"
    unroll=3,  # blocks per scan iteration; all of them is fastest on a CPU
    remat="none",  # "none", "dots", "dots_no_batch" or "full": what the backward pass computes again
    attention="xla",  # "xla" or "cudnn"
  )
  config.objective = config_dict.create(
    kind="equilibrium",  # or "flow_matching"
    schedule=config_dict.create(  # c(γ)
      kind="truncated",  # "constant", "linear", "truncated" or "piecewise"
      a=0.8,  # γ from which c falls to zero
      b=2.0,  # c(0) of "piecewise"
      multiplier=4.0,  # λ
    ),
    label_dropout=0.1,  # share of samples that are trained without their class
    dispersive_weight=0.0,  # 0 or the reference's 0.5
  )
  config.optimizer = config_dict.create(  # AdamW
    learning_rate=1e-3,
    schedule="cosine",  # after the warm-up: "constant" or "cosine" (to zero at the last step)
    warmup_steps=20 if smoke else 200,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    weight_decay=0.0,
    clip_norm=0.0,  # of the global gradient; 0: no clipping
    ema_decay=0.9 if smoke else 0.999,
  )
  config.train = config_dict.create(
    steps=60 if smoke else 4000,
    batch_size=32 if smoke else 128,
    log_every=20 if smoke else 100,  # steps
  )
  config.checkpoint = config_dict.create(
    every=30 if smoke else 1000,  # steps
    keep=2,  # newest checkpoints
  )
  config.mesh = config_dict.create(data=-1, fsdp=1, tensor=1)  # devices along each axis; -1: the rest
  config.sharding = config_dict.create(rules=())  # (regex of the parameter's path, mesh axis of each array axis)

  config.samplers = config_dict.create(  # one row of the evaluation each
    gd=_sampler(rule="gd", momentum=0.0, threshold=0.0, smoke=smoke),
    nag=_sampler(rule="nag", momentum=0.3, threshold=0.0, smoke=smoke),
    adaptive=_sampler(rule="gd", momentum=0.0, threshold=4.0, smoke=smoke),
  )
  config.evaluation = config_dict.create(
    samples=40 if smoke else 1797,  # 0: none
    batch_size=40 if smoke else 200,  # samples descending together
    seed=0,  # of the start noise, which depends on (seed, sample index) alone
    weights="ema",  # "ema" or "model"
    label_agreement=True,  # fit a classifier to the real images and ask it about the samples
    pictured="adaptive",  # the sampler whose descent is drawn
  )
  return config


def _sampler(*, rule: str, momentum: float, threshold: float, smoke: bool) -> ml_collections.ConfigDict:
  return config_dict.create(
    rule=rule,  # "gd" or "nag"
    step_size=0.03 if smoke else 0.003,  # η
    momentum=momentum,  # μ, of "nag"
    max_evaluations=25 if smoke else 249,  # network calls a sample may use
    threshold=threshold,  # a sample stops at ‖f‖ ≤ threshold; 0: never
    guidance=1.0,  # classifier-free guidance scale; 1: none
    guidance_channels=None,  # channels that are guided: None for all, or a number of them
  )
