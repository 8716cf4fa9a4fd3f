"""EqM on points of the plane: two moons, eight Gaussians or a checkerboard.

Command:   python -m eqm_jax.main --config=configs/toy2d.py --workdir=runs/moons
           Variants: toy2d.py:two_moons (the default), :eight_gaussians, :checkerboard; with
           "-dot" or "-scalar" after it an explicit energy; "-imagenet" trains as on ImageNet.
Hardware:  two CPU cores, 2 GiB: about two minutes
Expected:  evaluation/plane.png, the field, its energy and descents, with the optimal field below,
           and evaluation/samples_adaptive.png. Samples are about as near to the data as new
           data is, and all of the data is reached.

In few dimensions a point does not tell its γ, so the field near the data is an average over
many γ, and with ImageNet's c(γ) (a = 0.8) it does not vanish on the data: descents drift along
the moons and gather in a few places. Here a is smaller, and a share of the points is
trained at γ = 1 exactly, where the target is zero: then the data itself is at rest.
"""

import ml_collections
from ml_collections import config_dict

CLASSES = {"two_moons": 2, "eight_gaussians": 8, "checkerboard": 8}
KINDS = ("dot", "scalar", "imagenet", "smoke")


def get_config(variant: str = "two_moons") -> ml_collections.ConfigDict:
  """Variants: "points" or "points-kind"; kind "smoke" is a short run of the same code, for tests."""
  points, _, kind = (variant or "two_moons").partition("-")
  if points not in CLASSES or kind not in ("", *KINDS):
    raise ValueError(
      f"configs/toy2d.py has no variant {variant!r}: choose {', '.join(CLASSES)}, and maybe -{', -'.join(KINDS)}"
    )
  smoke, imagenet = kind == "smoke", kind == "imagenet"
  config = ml_collections.ConfigDict()
  config.seed = 0  # of parameters, order, noise; a key depends on (seed, step) alone

  config.data = config_dict.create(
    source="plane",  # one of data/sources.py
    options=config_dict.create(kind=points, count=4096, seed=0),  # arguments of the source
    flip=False,  # mirror half of the images
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
    input_size=1,  # a point is an image of one pixel
    channels=2,  # with two channels
    patch_size=1,
    width=16 if smoke else 64,
    depth=1 if smoke else 3,  # blocks
    num_heads=4,
    num_classes=CLASSES[points],  # the label after the last is "no class"
    mlp_ratio=4.0,
    time_input=False,  # True: a flow-matching network, told γ
    learn_sigma=False,  # True: carry the unused second output half of the released code
    dtype="float32",  # of the matrix products: "float32" or "bfloat16"
    unroll=3,  # blocks per scan iteration; all of them is fastest on a CPU
    remat="none",  # "none", "dots", "dots_no_batch" or "full": what the backward pass computes again
    attention="xla",  # "xla" or "cudnn"
    block="auto",  # how blocks are written: "xla" for TPUs and GPUs, "cpu", or "auto": by the backend
    # "none": the network is the field; "dot", "l2" or "scalar": the gradient of this energy is.
    energy=kind if kind in ("dot", "scalar") else "none",
  )
  config.objective = config_dict.create(
    kind="equilibrium",  # or "flow_matching"
    schedule=config_dict.create(  # c(γ)
      kind="truncated",  # "constant", "linear", "truncated" or "piecewise"
      a=0.8 if imagenet else 0.5,  # γ from which c falls to zero
      b=2.0,  # c(0) of "piecewise"
      multiplier=4.0,  # λ
    ),
    label_dropout=0.3,  # share of samples that are trained without their class
    dispersive_weight=0.0,  # 0 or the reference's 0.5
    clean_share=0.0 if imagenet else 0.7,  # share of samples at γ = 1 exactly
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
    batch_size=32 if smoke else 256,
    accumulate=1,  # parts of the batch, computed one after another: less memory, the same gradient
    log_every=20 if smoke else 500,  # steps
    profile=(0, 0),  # first and last step of a trace in WORKDIR/profile; (0, 0): none
    init_from="",  # a model whose weights to start from, anything that eqm_jax.load reads; "": random ones
  )
  config.checkpoint = config_dict.create(
    every=30 if smoke else 2000,  # steps
    keep=2,  # newest checkpoints
  )
  config.mesh = config_dict.create(data=-1, fsdp=1, tensor=1)  # devices along each axis; -1: the rest
  config.sharding = config_dict.create(
    rules=(),  # (regex of the parameter's path, mesh axis of each array axis); none fits: fsdp splits the largest
    ema="parameters",  # lies as the parameters do, or split over all "devices", which with data > 1 takes less memory
  )

  budget = 20 if smoke else 249
  config.samplers = config_dict.create(  # one row of the evaluation each
    fixed=_row(max_evaluations=budget),
    adaptive=_row(max_evaluations=budget, threshold=0.3),
  )
  config.evaluation = config_dict.create(
    samples=40 if smoke else 2000,  # 0: none
    batch_size=40 if smoke else 500,  # samples in flight on each device
    unit=40 if smoke else 2000,  # samples that a device draws as a whole; a killed evaluation goes on after these
    seed=0,  # of the samples, which depend on (seed, sample index) alone
    weights="ema",  # "ema" or "model"
    labels="balanced",  # "balanced": every class in turn; or "random"
    rows=(),  # the samplers that are evaluated; (): all
    # What samples are compared in: "raw", their own numbers (pixels, latents, points); "classifier", the features of a
    # small network fitted to the real images; "inception", as everyone's FID is.
    features=("raw",),
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
      every=0,  # steps; 0: never
      samples=500,
      sampler="adaptive",  # one of the samplers
    ),
    label_agreement=True,  # fit a classifier to the real points and ask it about the samples
    pictured="adaptive",  # the sampler whose descents are drawn, with the landscape; or "none"
    timed=(),  # samplers whose speed is compared: drawn again in turn, the median time is reported
    repeats=3,  # how often
  )
  config.sample = config_dict.create(  # of --mode=sample
    sampler="adaptive",  # one of the samplers
    count=100,  # samples
    labels="balanced",  # "balanced", "none", or labels and ranges such as "3" or "1,5,7-9", in turn
    batch_size=100,  # samples in flight on each device
    seed=0,
    weights="ema",  # "ema" or "model"
    images=False,  # also one PNG a sample: of points, single pixels
    npz=True,  # also the arrays
  )
  config.tasks = config_dict.create(  # of --mode=denoise, ood, compose and inpaint
    images="",  # an .npz of points [N, 1, 1, 2], or "": those of data.source
    count=100,  # points
    sampler="adaptive",  # one of the samplers that descend; ood only looks at the field
    labels="none",  # "own" of the points, "none", "balanced", or labels such as "3" or "1,5,7-9", in turn
    batch_size=100,  # samples in flight on each device
    seed=0,
    weights="ema",  # "ema" or "model"
    denoise=config_dict.create(
      gammas=(0.0, 0.2, 0.4, 0.6, 0.8),  # how noisy the points are made; (): they are noisy already
    ),
    ood=config_dict.create(
      scores=("norm",),  # "norm", ‖f‖; "energy", of a model with one; "mahalanobis", a Gaussian fitted to data.source
      against=("uniform", "gaussian"),  # what the points are told from
    ),
    compose=config_dict.create(  # one term for each place of the three
      labels=(0, 1),
      weights=(0.5, 0.5),  # what they lack of 1 goes to the model without a class
      checkpoints=("", ""),  # anything that eqm_jax.load reads; "" is the model itself
    ),
    inpaint=config_dict.create(
      mask="all",  # a point has no parts
      gamma=0.5,  # where it starts
      settle=0,  # evaluations with fresh noise before the descent
      tries=1,  # how often each point is painted; the one with the smallest ‖f‖ is kept
    ),
  )
  config.benchmark = config_dict.create(  # of --mode=benchmark
    turns=5,  # how often each case is timed; the median counts
    batch_size=config_dict.placeholder(int),  # samples in flight on each device; None: evaluation.batch_size
    nfe=249,  # budget of the timed descents, in evaluations
    samples=2000,  # drawn by each of them; rounded up to whole batches
    steps=200,  # training steps with the data set; 0: none
    read_seconds=3.0,  # that the input pipeline is read alone
    metrics=config_dict.create(  # of random features, as many as an evaluation has
      samples=2000,  # 0: none
      real=2000,
      size=2,  # numbers of a feature
    ),
    sweeps=config_dict.create(
      over=(),  # some of "batch", "tokens", "depth", "samples", "devices"; (): none
      batch=(64, 256, 1024),  # sizes, of the training step and of the samples in flight
      tokens=(1, 4, 16),  # of a sample: squares
      depth=(1, 2, 4, 8),  # blocks
      samples=(500, 2000, 8000),  # drawn
    ),
  )
  return config


def _row(**changes) -> ml_collections.ConfigDict:
  row = config_dict.create(
    # Descents: "gd", "nag", "nesterov", "adam", "lbfgs", "langevin".
    # Integrators: "euler", "heun", "tsit5", "dopri5"; for a network with time also "euler_maruyama".
    rule="gd",
    step_size=0.01,  # η; 0 is "auto": 2/(λ·max_evaluations)
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
