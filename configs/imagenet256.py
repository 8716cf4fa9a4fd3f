"""EqM-XL/2 on ImageNet 256×256 in the latent space of Stable Diffusion's autoencoder.

Command:   python -m eqm_jax.main --config=configs/imagenet256.py --workdir=runs/xl2
           It encodes the images into a cache, trains from that and goes on where it was when
           started again. --mode=prepare encodes only.
           Variants: imagenet256.py:B/2, :L/2, :XL/2 (the default); :S/2 and patches 4 and 8 as
           well. With "-tfds" after it, the images are those of a TFDS build; with "-online" they
           are encoded in each step, without a cache.
Hardware:  a TPU slice or GPUs; not run by us yet. XL/2 takes 0.71 TFLOP per image and step, so
           7.0 million steps of 256 (1,400 epochs) take an estimated 56 hours at half of the
           peak of 64 v5e chips (197 TFLOP/s each, bfloat16). State: 10.8 GB, split by fsdp. docs/plan.md
           has what each size takes on slices from v5e-16 to v4-32; --mode=plan tells it of others. On one
           device, or any number that four does not divide: --config.mesh.fsdp=-1 --config.mesh.data=1.
Expected:  the paper's figures (FID of 50,000 samples). XL/2, 1,400 epochs, with guidance: 1.90.
           B/2, 80 epochs (400,000 steps), without guidance: 32.85. The loss of B/2 flattens near
           10.3; that is normal, see `relative_loss` in the metrics.
           With the authors' checkpoints, without training and without ImageNet (docs/evaluation.md):
           --config=configs/imagenet256.py:B/2 --mode=evaluate --checkpoint=EqM-B-2.pt for 32.85,
           --config=configs/imagenet256.py:XL/2 --mode=evaluate --checkpoint=EqM-XL-2.pt for 1.90.
Data:      docs/data.md tells what to download: the images to data/imagenet/train, Stable
           Diffusion's autoencoder to data/sd-vae-ft-ema; docs/evaluation.md the same of
           Inception's weights and ADM's statistics. --config.evaluation.samples=0 does without them.
"""

import ml_collections
from ml_collections import config_dict

SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}  # depth, width, heads
PATCHES = ("2", "4", "8")
KINDS = ("", "tfds", "online")
RULES = (  # the first regex that is found in a parameter's path decides; the blocks have a leading axis of depth
  ("blocks/qkv/kernel", (None, "fsdp", None, "tensor", None)),  # width → 3, heads, width of a head
  ("blocks/qkv/bias", (None, None, "tensor", None)),
  ("blocks/attention_out/kernel", (None, "tensor", None, "fsdp")),  # heads, width of a head → width
  ("blocks/mlp_in/kernel", (None, "fsdp", "tensor")),
  ("blocks/mlp_in/bias", (None, "tensor")),
  ("blocks/mlp_out/kernel", (None, "tensor", "fsdp")),
  ("blocks/modulation/kernel", (None, "fsdp", None)),  # of one vector a sample: too small to split within
  ("final_modulation/kernel", ("fsdp", None)),
  ("label_embed/embedding", (None, "fsdp")),  # 1,001 classes divide by nothing
  ("time_embed/dense_./kernel", (None, "fsdp")),
  ("(patch_embed|final_out|energy_out)/kernel", ()),  # narrow
  ("bias", ()),
)


def get_config(variant: str = "XL/2") -> ml_collections.ConfigDict:
  """Variants: "size/patch"; below XL the 80 epochs of the paper's ablations instead of 1,400.

  "size/patch-tfds" reads the images from a TFDS build; "size/patch-online" encodes them in each training step, without
  a cache.
  """
  model, _, kind = variant.partition("-")
  size, _, patch = model.partition("/")
  if size not in SIZES or patch not in PATCHES or kind not in KINDS:
    raise ValueError(
      f"configs/imagenet256.py has no variant {variant!r}: choose S, B, L or XL, a slash, 2, 4 or 8, "
      "and maybe -tfds or -online"
    )
  depth, width, num_heads = SIZES[size]
  online = kind == "online"
  largest = size == "XL"
  published = "published_xl2" if largest else "published_b2"  # the sampler of the paper's figures
  config = ml_collections.ConfigDict()
  config.seed = 0  # of parameters, order, noise; a key depends on (seed, step) alone

  images = dict(path="data/imagenet/train", size=256, channels=3)  # one directory for each class
  if kind == "tfds":
    images = dict(name="imagenet2012", path="data/tfds", split="train", size=256, channels=3)
  images = config_dict.create(**images)
  config.data = config_dict.create(
    source="folder" if online else "latents",  # one of data/sources.py
    options=images
    if online
    else config_dict.create(
      path="data/imagenet256_latents",  # of the cache, 43 GB; made when it is not there
      verify=False,  # read it once and compare the checksums; --mode=prepare does
    ),
    flip=True,  # mirror half of the images; of latents, use the mirror image's moments
    threads=32 if online else 2,  # that read ahead; for a cache more are slower
    workers=0,  # processes that read; 0: this one
  )
  config.autoencoder = config_dict.create(
    path="data/sd-vae-ft-ema",  # "": samples stay latents, and nothing can be encoded
    name="ema",  # which it is: "ema" or "mse" of Stable Diffusion's; recorded wherever its latents go
    sha256="",  # of its parameters, where they must be certain ones
    dtype="bfloat16" if online else "float32",  # of its convolutions; what is encoded once is encoded exactly
    batch_size=32,  # images that it takes at a time on each device; in a training step, all of its batch
  )
  if not online:
    config.prepare = config_dict.create(  # of the cache
      source=kind or "folder",  # one of data/sources.py that has images
      options=images,  # its arguments
      dtype="float16",  # of the moments: "float16" or "bfloat16"
      images_per_shard=2048,  # 67 MB
      threads=32,  # that read ahead
      skip_damaged=False,  # leave damaged images out, and count them; False: stop at the first
    )
  config.model = config_dict.create(  # the attributes of networks.dit.DiT
    input_size=32,  # latent pixels: 256 / 8
    channels=4,
    patch_size=int(patch),  # latent pixels
    width=width,
    depth=depth,  # blocks
    num_heads=num_heads,
    num_classes=1000,  # label 1000 is "no class"
    mlp_ratio=4.0,
    time_input=False,  # True: a flow-matching network, told γ
    learn_sigma=False,  # True: carry the unused second output half of the released code
    dtype="bfloat16",  # of the matrix products: "float32" or "bfloat16"
    unroll=1,  # blocks per scan iteration
    remat="dots_no_batch",  # "none", "dots", "dots_no_batch" or "full"; on TPUs "none" writes attention to HBM
    attention="xla",  # "xla" or "cudnn"
    block="auto",  # how blocks are written: "xla" for TPUs and GPUs, "cpu", or "auto": by the backend
    energy="none",  # "none": the network is the field; "dot", "l2" or "scalar": the gradient of this energy is
  )
  config.objective = config_dict.create(
    kind="equilibrium",  # or "flow_matching"
    schedule=config_dict.create(  # c(γ), the paper's best
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
    learning_rate=1e-4,
    schedule="constant",  # after the warm-up: "constant" or "cosine" (to zero at the last step)
    warmup_steps=0,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    weight_decay=0.0,
    clip_norm=0.0,  # of the global gradient; 0: no clipping
    skip_nonfinite=0,  # batches in a row whose gradient is not finite that are left out; 0: the first stops the run
    ema_decay=0.9999,
  )
  config.train = config_dict.create(
    steps=7_000_000 if largest else 400_000,
    batch_size=256,
    accumulate=1,  # parts of the batch, computed one after another: less memory, the same gradient
    log_every=100,  # steps
    profile=(0, 0),  # first and last step of a trace in WORKDIR/profile; (0, 0): none
    init_from="",  # a model whose weights to start from, anything that eqm_jax.load reads; "": random ones
  )
  config.checkpoint = config_dict.create(
    every=10_000,  # steps
    keep=3,  # newest checkpoints
  )
  # Devices along each axis; -1: the rest. Larger models split their state over groups of four chips.
  config.mesh = config_dict.create(data=-1, fsdp=4 if size in ("L", "XL") else 1, tensor=1)
  config.sharding = config_dict.create(
    rules=RULES,  # (regex of the parameter's path, mesh axis of each array axis); none fits: fsdp splits the largest
    ema="parameters",  # lies as the parameters do, or split over all "devices", which with data > 1 takes less memory
  )

  config.samplers = config_dict.create(  # one row of the evaluation each
    published_b2=_row(),  # what the paper's 32.85 is from: GD, no guidance
    published_xl2=_row(rule="nag", step_size=0.0017, momentum=0.3, guidance=1.5),  # what its 1.90 is from
    adaptive=_row(threshold=10.0),
  )
  config.evaluation = config_dict.create(
    samples=50_000,  # 0: none
    batch_size=64,  # samples in flight on each device
    unit=64,  # samples that a device draws as a whole; a killed evaluation goes on after these
    seed=0,  # of the samples, which depend on (seed, sample index) alone
    weights="ema",  # "ema" or "model"
    labels="random",  # "balanced": every class in turn; or "random"
    rows=(published,),  # the samplers that are evaluated; (): all
    # What samples are compared in: "raw", their own numbers (pixels, latents, points); "classifier", the features of a
    # small network fitted to the real images; "inception", as everyone's FID is.
    features=("inception",),
    classifier=config_dict.create(steps=300),  # of its fit
    inception=config_dict.create(
      path="data/pt_inception-2015-12-05-6726825d.pth",  # the published weights (docs/evaluation.md)
      resize="tf1",  # to 299×299: "tf1", as ADM's evaluator, or "half_pixel", as pytorch-fid
      dtype="float32",  # the only one that is reported
      reference="data/VIRTUAL_imagenet256_labeled.npz",  # statistics of the real images: ours, ADM's or pytorch-fid's,
      batch_size=64,  # images that it takes at a time on each device
    ),
    npz=False,  # also write the images of each row, as ADM's evaluator reads them
    during_training=config_dict.create(  # scores go to the metrics, the best checkpoint is kept
      every=50_000,  # steps; 0: never
      samples=5000,
      sampler=published,  # one of the samplers
    ),
    label_agreement=False,  # fit a classifier to the real images and ask it about the samples
    pictured="none",  # the sampler whose descent is drawn, or "none"
    timed=(),  # samplers whose speed is compared: drawn again in turn, the median time is reported
    repeats=3,  # how often
  )
  config.sample = config_dict.create(  # of --mode=sample
    sampler=published,  # one of the samplers
    count=100,  # samples
    labels="balanced",  # "balanced", "none", or labels and ranges such as "3" or "1,5,7-9", in turn
    batch_size=64,  # samples in flight on each device
    seed=0,
    weights="ema",  # "ema" or "model"
    images=False,  # also one PNG a sample
    npz=True,  # also the arrays
  )
  config.tasks = config_dict.create(  # of --mode=denoise, ood, compose and inpaint
    images="",  # a folder of images, an .npz, or "": those of data.source
    count=64,  # images
    sampler="adaptive",  # one of the samplers that descend; ood only looks at the field
    labels="none",  # "own" of the images, "none", "balanced", or labels such as "3" or "1,5,7-9", in turn
    batch_size=64,  # samples in flight on each device
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
      against=("uniform", "gaussian", "constant", "shuffled", "rotated", "inverted"),
    ),
    compose=config_dict.create(  # one term for each place of the three
      labels=(207, 360),
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
    turns=5,  # how often each case is timed; the median counts
    batch_size=config_dict.placeholder(int),  # samples in flight on each device; None: evaluation.batch_size
    nfe=249,  # budget of the timed descents, in evaluations
    samples=512,  # drawn by each of them; rounded up to whole batches
    steps=40,  # training steps with the data set; 0: none
    read_seconds=3.0,  # that the input pipeline is read alone
    metrics=config_dict.create(  # of random features, as many as an evaluation has
      samples=10_000,  # 0: none
      real=10_000,
      size=2048,  # numbers of a feature; at 50,000 × 2,048 all metrics take four minutes on two CPU cores
    ),
    sweeps=config_dict.create(
      over=(),  # some of "batch", "tokens", "depth", "samples", "devices"; (): none
      batch=(8, 32, 128, 512),  # sizes, of the training step and of the samples in flight
      tokens=(64, 256, 1024),  # of a sample: squares
      depth=(1, 4, 12),  # blocks
      samples=(64, 256, 1024),  # drawn
    ),
  )
  return config


def _row(**changes) -> ml_collections.ConfigDict:
  row = config_dict.create(
    # Descents: "gd", "nag", "nesterov", "adam", "lbfgs", "langevin".
    # Integrators: "euler", "heun", "tsit5", "dopri5"; for a network with time also "euler_maruyama".
    rule="gd",
    step_size=0.003,  # η; 0 is "auto": 2/(λ·max_evaluations)
    momentum=0.0,  # μ, of "nag" and "nesterov"
    temperature=0.0,  # T, of "langevin"
    max_evaluations=249,  # network calls a sample may use: the paper's "250 steps"
    min_evaluations=0,  # no sample stops before
    threshold=0.0,  # a sample stops at ‖f‖ ≤ threshold; 0: never
    relative_threshold=False,  # compare ‖f‖/λ instead
    max_restarts=0,  # how often a sample that diverges begins again
    tolerance=0.0,  # of an integrator with step control, relative and absolute; 0: equal steps
    guidance=1.0,  # classifier-free guidance scale; 1: none
    guidance_channels=3,  # how many channels are guided, from the first: 3 as in the reference; 0: all
    guidance_interval=(),  # (low, high): guide only while ‖f‖ lies between; (): always
    streaming=True,  # a sample that is done makes room for the next; False: in lockstep
  )
  row.update(changes)
  return row
