"""EqM on scikit-learn's 1,797 handwritten digits (8×8 pixels, 10 classes).

Command:   python -m eqm_jax.main --config=configs/digits.py --workdir=runs/digits
Hardware:  two CPU cores with AVX2, 4 GiB: two minutes of training and two of evaluation, compilation included
Expected:  Fréchet distance in pixel space 0.24 (adaptive) and 0.32 (fixed), 0.29 being that of two
           halves of the real digits, and in a classifier's features 0.19, 0.28 and 0.64; label
           agreement 0.99; adaptive descent takes 107 evaluations on average. The loss ends near 5.3, 0.39 of E[c²].
"""

import ml_collections
from ml_collections import config_dict

ENERGIES = ("dot", "l2", "scalar")
VARIANTS = ("", "smoke", "samplers", "flow_matching", "flow_matching_untimed", *ENERGIES)


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  """Variants: "" is the run above.

  "smoke": a short run of the same code, for tests.
  "samplers": compares samplers on the run above: --workdir=runs/digits --mode=evaluate
  "flow_matching", "flow_matching_untimed": the baselines, with the same network, data,
    steps and seeds, told the time or not.
  "dot", "scalar", "l2": explicit energies; "l2" starts from the run above.
  """
  if variant not in VARIANTS:
    raise ValueError(f"configs/digits.py has no variant {variant!r}: choose one of {', '.join(VARIANTS[1:])} or none")
  smoke = variant == "smoke"
  flow_matching = variant.startswith("flow_matching")
  timed = variant == "samplers"
  default_sampler = {"flow_matching": "euler", "flow_matching_untimed": "gd", "samplers": "streaming"}.get(
    variant, "adaptive"
  )
  config = ml_collections.ConfigDict()
  config.seed = 0  # of parameters, order, noise; a key depends on (seed, step) alone

  config.data = config_dict.create(
    source="digits",  # one of data/sources.py
    options=config_dict.create(part="all"),  # "all", "train" (5 of 6 images) or "test" (the sixth)
    flip=False,  # mirror half of the images: a mirrored digit is no digit
    threads=2,  # that read ahead
    workers=0,  # processes that read; 0: this one
  )
  config.autoencoder = config_dict.create(  # of models of latents
    path="",  # "": the samples are pixels, nothing is decoded
    name="",  # which it is, your word; recorded wherever its latents go
    sha256="",  # of its parameters, where they must be certain ones
    dtype="float32",  # of its convolutions: "float32" or "bfloat16"
    batch_size=32,  # images that it takes at a time on each device
  )
  config.model = config_dict.create(  # the attributes of networks.dit.DiT
    input_size=8,  # pixels
    channels=1,
    patch_size=4,  # pixels
    width=128,
    depth=3,  # blocks
    num_heads=4,
    num_classes=10,  # label 10 is "no class"
    mlp_ratio=4.0,
    time_input=variant == "flow_matching",  # True: a flow-matching network, told γ
    learn_sigma=False,  # True: carry the unused second output half of the released code
    dtype="float32",  # of the matrix products: "float32" or "bfloat16"
    unroll=3,  # blocks per scan iteration; all of them is fastest on a CPU
    remat="none",  # "none", "dots", "dots_no_batch" or "full": what the backward pass computes again
    attention="xla",  # "xla" or "cudnn"
    block="auto",  # how blocks are written: "xla" for TPUs and GPUs, "cpu", or "auto": by the backend
    # "none": the network is the field; "dot", "l2" or "scalar": the gradient of this energy is.
    energy=variant if variant in ENERGIES else "none",
  )
  config.objective = config_dict.create(
    kind="flow_matching" if flow_matching else "equilibrium",
    schedule=config_dict.create(  # c(γ)
      kind="truncated",  # "constant", "linear", "truncated" or "piecewise"
      a=0.8,  # γ from which c falls to zero
      b=2.0,  # c(0) of "piecewise"
      multiplier=4.0,  # λ
    ),
    label_dropout=0.1,  # share of samples that are trained without their class
    dispersive_weight=0.0,  # 0 or the reference's 0.5
    clean_share=0.0,  # share of samples at γ = 1 exactly; helps in few dimensions
    second_order="reverse_over_reverse",  # or "forward_over_reverse": the loss's derivative, for an energy
  )
  config.optimizer = config_dict.create(  # AdamW
    learning_rate=2e-3,
    schedule="cosine",  # after the warm-up: "constant" or "cosine" (to zero at the last step)
    warmup_steps=20 if smoke else 100,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    weight_decay=0.0,
    clip_norm=0.0,  # of the global gradient; 0: no clipping
    skip_nonfinite=0,  # batches in a row whose gradient is not finite that are left out; 0: the first stops the run
    ema_decay=0.9 if smoke else 0.998,
  )
  config.train = config_dict.create(
    steps=60 if smoke else 4000,
    batch_size=32 if smoke else 64,
    accumulate=1,  # parts of the batch, computed one after another: less memory, the same gradient
    log_every=20 if smoke else 100,  # steps
    profile=(0, 0),  # first and last step of a trace in WORKDIR/profile; (0, 0): none
    # A model whose weights to start from, anything that eqm_jax.load reads; "": random ones.
    init_from="runs/digits" if variant == "l2" else "",
  )
  config.checkpoint = config_dict.create(
    every=30 if smoke else 1000,  # steps
    keep=2,  # newest checkpoints
  )
  config.mesh = config_dict.create(data=-1, fsdp=1, tensor=1)  # devices along each axis; -1: the rest
  config.sharding = config_dict.create(
    rules=(),  # (regex of the parameter's path, mesh axis of each array axis); none fits: fsdp splits the largest
    ema="parameters",  # lies as the parameters do, or split over all "devices", which with data > 1 takes less memory
  )

  config.samplers = _samplers(variant)
  config.evaluation = config_dict.create(
    samples=40 if smoke else 1797,  # 0: none
    batch_size=40 if smoke else 200 if timed else 450,  # samples in flight on each device
    unit=40
    if smoke
    else 1797
    if timed
    else 900,  # samples that a device draws as a whole; a killed evaluation goes on after these
    seed=0,  # of the samples, which depend on (seed, sample index) alone
    weights="ema",  # "ema" or "model"
    labels="balanced",  # "balanced": every class in turn; or "random"
    rows=(),  # the samplers that are evaluated; (): all
    # What samples are compared in: "raw", their own numbers (pixels, latents, points); "classifier", the features of a
    # small network fitted to the real images; "inception", as everyone's FID is.
    features=("raw",) if variant == "smoke" else ("raw", "classifier"),
    classifier=config_dict.create(steps=300),  # of its fit
    inception=config_dict.create(
      path="data/pt_inception-2015-12-05-6726825d.pth",  # the published weights (docs/evaluation.md)
      resize="tf1",  # to 299×299: "tf1", as ADM's evaluator, or "half_pixel", as pytorch-fid
      dtype="float32",  # the only one that is reported
      reference="",  # statistics of the real images, an .npz of ours, ADM or pytorch-fid; "": computed each time,
      batch_size=64,  # images that it takes at a time on each device
    ),
    npz=False,  # also write the images of each row, as ADM's evaluator reads them
    during_training=config_dict.create(  # scores go to the metrics, the best checkpoint is kept
      every=30 if smoke else 0,  # steps; 0: never, since so short a run is evaluated at its end
      samples=40 if smoke else 600,
      sampler=default_sampler,  # one of the samplers
    ),
    label_agreement=True,  # fit a classifier to the real images and ask it about the samples
    # The sampler whose descent is drawn, or "none".
    pictured="none" if flow_matching or timed else "adaptive",
    # Samplers whose speed is compared: drawn again in turn, the median time is reported.
    timed=("fixed", "lockstep", "streaming") if timed else (),
    repeats=3,  # how often
  )
  config.sample = config_dict.create(  # of --mode=sample
    sampler=default_sampler,  # one of the samplers
    count=100,  # samples
    labels="balanced",  # "balanced", "none", or labels and ranges such as "3" or "1,5,7-9", in turn
    batch_size=20 if smoke else 100,  # samples in flight on each device
    seed=0,
    weights="ema",  # "ema" or "model"
    images=False,  # also one PNG a sample
    npz=True,  # also the arrays
  )
  config.tasks = config_dict.create(  # of --mode=denoise, ood, compose and inpaint
    images="",  # a folder of images, an .npz, or "": those of data.source
    count=20 if smoke else 100,  # images
    sampler=default_sampler,  # one of the samplers that descend; ood only looks at the field
    labels="none",  # "own" of the images, "none", "balanced", or labels such as "3" or "1,5,7-9", in turn
    batch_size=20 if smoke else 100,  # samples in flight on each device
    seed=0,
    weights="ema",  # "ema" or "model"
    denoise=config_dict.create(
      gammas=(
        0.0,
        0.2,
        0.4,
        0.6,
        0.8,
      ),  # how noisy the images are made; (): they are noisy already, nobody knows how much
    ),
    ood=config_dict.create(
      scores=("norm",),  # "norm", ‖f‖; "energy", of a model with one; "mahalanobis", a Gaussian fitted to data.source
      # What the images are told from: made of noise, or of the images themselves; pixels only: "photographs".
      against=("uniform", "gaussian", "constant", "shuffled", "rotated", "inverted", "photographs"),
    ),
    compose=config_dict.create(  # one term for each place of the three
      labels=(3, 8),
      weights=(0.5, 0.5),  # what they lack of 1 goes to the model without a class
      checkpoints=("", ""),  # anything that eqm_jax.load reads; "" is the model itself
    ),
    inpaint=config_dict.create(
      mask="right",  # painted anew: "left", "right", "top", "bottom", "centre", "all", or a .npy [H, W] of 0 and 1
      gamma=0.0,  # where it starts: 0 keeps nothing of what is under the mask
      settle=50,  # evaluations with fresh noise before the descent
      tries=4,  # how often each image is painted; the one with the smallest ‖f‖ is kept
    ),
  )
  config.benchmark = config_dict.create(  # of --mode=benchmark
    turns=2 if smoke else 5,  # how often each case is timed; the median counts
    batch_size=config_dict.placeholder(int),  # samples in flight on each device; None: evaluation.batch_size
    nfe=25 if smoke else 249,  # budget of the timed descents, in evaluations
    samples=80 if smoke else 800,  # drawn by each of them; rounded up to whole batches
    steps=20 if smoke else 200,  # training steps with the data set; 0: none
    read_seconds=0.2 if smoke else 3.0,  # that the input pipeline is read alone
    metrics=config_dict.create(  # of random features, as many as an evaluation has
      samples=100 if smoke else 1797,  # 0: none
      real=100 if smoke else 1797,
      size=64,  # numbers of a feature
    ),
    sweeps=config_dict.create(
      over=(),  # some of "batch", "tokens", "depth", "samples", "devices"; (): none
      batch=(8, 32, 128, 512),  # sizes, of the training step and of the samples in flight
      tokens=(4, 16, 64, 256),  # of a sample: squares
      depth=(1, 2, 4, 8),  # blocks
      samples=(200, 800, 3200),  # drawn
    ),
  )
  return config


def _samplers(variant: str) -> ml_collections.ConfigDict:
  """One row of the evaluation each."""
  if variant == "smoke":
    few = dict(step_size=0.03, max_evaluations=25)
    rows = dict(gd=_row(**few), nag=_row(rule="nag", momentum=0.3, **few), adaptive=_row(threshold=4.0, **few))
  elif variant == "samplers":
    rows = dict(
      fixed=_row(streaming=False),
      lockstep=_row(threshold=4.0, streaming=False),
      streaming=_row(threshold=4.0),
    )
    for evaluations in (10, 25, 50, 100, 249):
      for rule, momentum in (("gd", 0.0), ("nag", 0.3), ("nesterov", 0.3)):
        rows[f"{rule}_{evaluations:03d}"] = _row(
          rule=rule, momentum=momentum, step_size=0.0, max_evaluations=evaluations
        )
      rows[f"adam_{evaluations:03d}"] = _row(rule="adam", step_size=2.0 / evaluations, max_evaluations=evaluations)
      rows[f"heun_{evaluations:03d}"] = _row(rule="heun", max_evaluations=evaluations)
    for percent in (40, 70, 150, 200, 250):
      rows[f"gd_eta_{percent:03d}"] = _row(step_size=0.003 * percent / 100)
  elif variant == "flow_matching":
    rows = dict(euler=_row(rule="euler"), heun=_row(rule="heun"))
  elif variant == "flow_matching_untimed":  # GD with η = 1/N is Euler with N steps
    rows = dict(
      gd=_row(step_size=1 / 249), nag=_row(rule="nag", momentum=0.3, step_size=1 / 249), heun=_row(rule="heun")
    )
  else:
    rows = dict(gd=_row(), nag=_row(rule="nag", momentum=0.3), adaptive=_row(threshold=4.0))
  return ml_collections.ConfigDict(rows)


def _row(**changes) -> ml_collections.ConfigDict:
  row = config_dict.create(
    # Descents: "gd", "nag", "nesterov", "adam", "lbfgs", "langevin".
    # Integrators: "euler", "heun", "tsit5", "dopri5"; for a network with time also "euler_maruyama".
    rule="gd",
    step_size=0.003,  # η; 0 is "auto": 2/(λ·max_evaluations)
    momentum=0.0,  # μ, of "nag" and "nesterov"
    temperature=0.0,  # T, of "langevin"
    max_evaluations=249,  # network calls a sample may use
    min_evaluations=0,  # no sample stops before
    threshold=0.0,  # a sample stops at ‖f‖ ≤ threshold; 0: never
    relative_threshold=False,  # compare ‖f‖/λ instead
    max_restarts=0,  # how often a sample that diverges begins again
    tolerance=0.0,  # of an integrator with step control, relative and absolute; 0: equal steps
    guidance=1.0,  # classifier-free guidance scale; 1: none
    guidance_channels=0,  # how many channels are guided, from the first; 0: all
    guidance_interval=(),  # (low, high): guide only while ‖f‖ lies between; (): always
    streaming=True,  # a sample that is done makes room for the next; False: in lockstep
  )
  row.update(changes)
  return row
