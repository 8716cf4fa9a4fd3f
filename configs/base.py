"""All configuration keys: meaning, unit, choices and default. An experiment beside this file changes some of them.

The defaults are a small run on 8×8 digits. Any key can be set on the command line: --config.train.steps=100. What may
be None is a reference of a fixed type (placeholder, FieldReference). Paths start in the working directory, or at `~`.
Functions make each row of `samplers`, and the sections of some experiments only: `prepare`, `prepare.fit`, `report`.
"""

from typing import Any

import ml_collections
from ml_collections import config_dict
from ml_collections.config_dict import FieldReference, placeholder


def get_config() -> ml_collections.ConfigDict:
  """Returns every key with its default."""
  config = ml_collections.ConfigDict()
  config.seed = 0  # of parameters, data order and training noise: a key depends on (seed, step) alone
  config.data = config_dict.create(
    source="digits",  # "digits", "mnist", "photographs", "openmoji", "plane", "folder", "tfds", "npz" or "latents"
    # Arguments of the source; sizes are pixels of a side. digits: part ("all"; "train", 5 of 6 images; "test", the
    # sixth). mnist: size (14 or 28), part. openmoji: size, part, skin_tones. photographs: size, stride and shrink of
    # patches. plane: kind, count, seed. folder: path (a directory for each class), size, channels, upright, background
    # (as tasks has them, but False, None). tfds: those, name, split. npz: path, num_classes. latents: path, verify.
    options=config_dict.create(part="all"),
    flip=False,  # mirror half of the images; of latents, take the moments of the mirrored image
    threads=2,  # that read ahead, in each process
    workers=0,  # processes that read; 0: the training process reads by itself
  )
  config.autoencoder = config_dict.create(  # encodes images and decodes samples of a model of latents
    path=placeholder(str),  # a diffusers directory; None: the model works on pixels
    name=placeholder(str),  # a word for it, such as "ema"; recorded with all latents that it makes
    sha256=placeholder(str),  # of its parameters; None: any
    dtype="float32",  # of its convolutions: "float32" or "bfloat16"
    batch_size=32,  # images at a time on each device; encoding within training steps takes all of a batch
  )
  config.model = config_dict.create(  # the attributes of eqm_jax.networks.dit.DiT
    input_size=8,  # pixels (of latents, latent pixels) of a side
    channels=1,
    patch_size=4,  # pixels of a side
    width=128,
    depth=3,  # blocks
    num_heads=4,
    num_classes=10,  # the label num_classes is the null class
    mlp_ratio=4.0,  # width of the MLP's hidden layer by `width`
    time_input=False,  # γ is an input: for flow matching
    learn_sigma=False,  # carry the unused second half of the output that the released code has
    dtype="float32",  # of the matrix products: "float32" or "bfloat16"
    unroll=1,  # blocks per iteration of the scan; all of them is fastest on a CPU
    remat="none",  # "none", "dots", "dots_no_batch" or "full": what the backward pass computes again
    attention="auto",  # "xla", "pallas" (kernel for TPUs), "cudnn" (GPUs, bfloat16); "auto": by device, type and shape
    block="auto",  # how blocks are written: "xla" for TPUs and GPUs, "cpu", or "auto" by the backend
    energy="none",  # "none": the network is the field; "dot", "l2" or "scalar": the gradient of this energy is
    qk_norm=False,  # RMSNorm of each head's query and key, with a learned scale (docs/options.md, as the next three)
    norm="layer",  # of the tokens: "layer", LayerNorm, or "rms", RMSNorm
    mlp="gelu",  # or "swiglu": gated, of as many parameters
    rope=False,  # rotary positions: query and key are rotated by row and column; the fixed table is added as before
  )
  config.objective = config_dict.create(
    kind="equilibrium",  # or "flow_matching"
    schedule=config_dict.create(  # target magnitude c(γ): the attributes of eqm_jax.Schedule
      kind="truncated",  # "constant", "linear", "truncated", "piecewise", "self_stopping" or "power"
      a=0.8,  # γ from which "truncated" and "piecewise" fall to zero
      b=2.0,  # c(0) / λ of "piecewise"
      breakpoint=0.9,  # time at which "self_stopping" slows down
      exponent=0.8,  # p of "power", λ·(1−γ)^p
      multiplier=4.0,  # λ
    ),
    # Density of γ: "uniform"; "logit_normal", with mean and deviation of logit(γ); "consistent", ∝ 1/max(c/λ, floor),
    # where the floor may be 0 if 1/c can be normalised (docs/options.md). The attributes of eqm_jax.GammaDensity.
    gamma=config_dict.create(kind="uniform", mean=0.0, deviation=1.0, floor=0.0),
    label_dropout=0.1,  # fraction of samples trained with the null class
    dispersive_weight=0.0,  # of the dispersive loss; the released code uses 0 or 0.5
    clean_fraction=0.0,  # fraction of samples at γ = 1 exactly; helps in few dimensions
    second_order="reverse_over_reverse",  # or "forward_over_reverse": differentiation of the loss of an energy
  )
  config.optimizer = config_dict.create(  # AdamW
    learning_rate=2e-3,
    schedule="cosine",  # after the warm-up: "constant", or "cosine" to zero at the last step
    warmup_steps=100,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    weight_decay=0.0,
    clip_norm=placeholder(float),  # of the global gradient; None: no clipping
    max_skipped_batches=0,  # consecutive batches with a non-finite gradient left out; 0: the first one stops the run
    ema_decay=0.998,  # of the averaged parameters, per step
  )
  config.train = config_dict.create(
    steps=4000,
    batch_size=64,  # samples per step on all devices together
    grad_accum_steps=1,  # microbatches a batch is computed in: less memory, the same gradient
    log_every=100,  # steps
    profile=placeholder(tuple),  # (first, last) step of a trace in WORKDIR/profile; None: no trace
    wandb_project=placeholder(str),  # of Weights & Biases, to which metrics and pictures go, too; None: no such log
    init_from=placeholder(str),  # a model, of any classes, for the first parameters (docs/checkpoints.md); None: random
  )
  config.checkpoint = config_dict.create(every=1000, keep=2)  # steps; the newest checkpoints that are kept
  # Devices along each axis, -1 for the rest; dcn_data is the number of slices of TPUs (docs/pods.md). fsdp None: 16, or
  # as many of them (8, 4, 2, 1) as divide the devices of a slice.
  config.mesh = config_dict.create(dcn_data=1, data=-1, fsdp=FieldReference(1), tensor=1)
  config.sharding = config_dict.create(
    rules=(),  # (regex of a parameter's path, mesh axis of each array axis); where none fits, fsdp splits the largest
    ema="parameters",  # sharded as the "parameters" are, or over all "devices": less memory where mesh.data > 1
    gather="layer",  # blocks split by fsdp are gathered one by one, or once a "step", and kept in model.dtype
  )

  config.samplers = config_dict.create(gd=sampler(), nag=sampler(rule="nag", momentum=0.3))
  config.samplers.adaptive = sampler(threshold=4.0)  # each sampler is a row of the evaluation
  config.evaluation = config_dict.create(
    num_samples=FieldReference(1000),  # of each sampler; None: no evaluation, not during training either
    batch_size=200,  # samples in flight on each device
    chunk_size=500,  # samples a device finishes and writes together; a killed evaluation resumes after the last
    seed=0,  # of the samples: a key depends on (seed, sample index) alone
    weights="ema",  # "ema" or "model"
    labels="balanced",  # "balanced": every class in turn; "random"; "none"; or some in turn: "3", "1,5,7-9"
    samplers=placeholder(tuple),  # names of the rows that are evaluated; None: all
    # Of distances: "raw" numbers; a small "classifier" fitted to real images; "inception", as FID; "dinov2", FD-DINOv2.
    features=("raw", "classifier"),
    classifier=config_dict.create(steps=300),  # of its training
    inception=config_dict.create(
      path="data/pt_inception-2015-12-05-6726825d.pth",  # the published weights (docs/evaluation.md)
      resize="tf1",  # to 299×299: "tf1", as ADM's evaluator, or "half_pixel", as pytorch-fid
      dtype="float32",  # the only choice: bfloat16 moves an FID by more than methods differ
      reference=placeholder(str),  # .npz of the real images' statistics (ours, ADM, pytorch-fid); None: computed
      batch_size=64,  # images at a time on each device
    ),
    dinov2=config_dict.create(  # beside each key what differs from inception's
      path="data/dinov2_vitl14_pretrain.pth",  # of any size; FD-DINOv2 is that of ViT-L/14
      resize="bicubic",  # to 224×224: "bicubic", antialiased as in PIL, or "tf1"
      dtype="float32",
      reference=placeholder(str),  # ours, or ADM's for the images in it
      batch_size=64,
    ),
    save_npz=False,  # also write the images of each row, as ADM's evaluator reads them
    # With one of the samplers, `every` so many steps (None: never): metrics go to the log, the best checkpoint is kept.
    during_training=config_dict.create(every=placeholder(int), num_samples=200, sampler="adaptive"),
    classifier_accuracy=True,  # fraction of samples to which a classifier gives the label they were drawn with
    plot_sampler=FieldReference("adaptive"),  # the sampler whose trajectories are drawn; None: no picture
    benchmark_samplers=(),  # samplers whose speed is compared: sampled again in turn, median time
    benchmark_repeats=3,  # how often
  )
  config.sample = config_dict.create(  # --mode=sample
    sampler="adaptive",  # one of the samplers
    num_samples=100,
    labels="balanced",  # as evaluation.labels
    batch_size=100,  # samples in flight on each device
    seed=0,
    weights="ema",  # "ema" or "model"
    save_images=False,  # also one PNG a sample
    save_npz=True,  # also the arrays
  )
  config.tasks = config_dict.create(  # --mode=denoise, ood, compose, inpaint and readout
    images=placeholder(str),  # a folder of images, an image, an .npz or .npy; None: data.source
    upright=True,  # turn image files as their EXIF orientation says; False: as they are stored
    background=placeholder(str),  # behind what is transparent in them: "white", "black", or None: drop transparency
    num_images=100,
    sampler="adaptive",  # one of the samplers that descend; ood only evaluates the field
    labels="none",  # as evaluation.labels, or "own": those of the images
    batch_size=100,  # samples in flight on each device
    seed=0,
    weights="ema",  # "ema" or "model"
    denoise=config_dict.create(gammas=FieldReference((0.0, 0.2, 0.4, 0.6, 0.8))),  # γ to noise to; None: noisy already
    ood=config_dict.create(
      scores=("norm",),  # "norm", ‖f‖; "energy", of a model with one; "mahalanobis", a Gaussian fitted to data.source
      # Outliers: noise, or the images themselves, changed. "photographs" need a model of pixels.
      against=("uniform", "gaussian", "constant", "shuffled", "rotated", "inverted", "photographs"),
    ),
    # A sum of fields, one term for each entry; 1 minus the sum of the weights weighs the field of the null class. Of
    # checkpoints each is a path or None (the model itself); None: always the model itself.
    compose=config_dict.create(labels=(3, 8), weights=(0.5, 0.5), checkpoints=placeholder(tuple)),
    inpaint=config_dict.create(
      mask="right",  # is generated: "left", "right", "top", "bottom", "centre", "all", or an .npy [H, W] of 0 and 1
      gamma=0.0,  # at the start; 0: nothing under the mask is kept
      settle=50,  # NFE with fresh noise outside the mask before the descent
      tries=4,  # trajectories per image; the one that ends with the smallest ‖f‖ is kept
    ),
    readout=config_dict.create(  # a linear read-out of γ from the tokens of the frozen network
      num_samples=12_000,  # noised images; one in six is held out of the fit
      ridge=1e-4,  # penalty of the squared weights, of features of unit variance
    ),
  )
  config.benchmark = config_dict.create(  # --mode=benchmark
    turns=5,  # timings per case; the median counts
    batch_size=placeholder(int),  # samples in flight on each device; None: evaluation.batch_size
    nfe=249,  # budget of the timed descents
    num_samples=800,  # of each descent; rounded up to whole batches
    steps=200,  # training steps with the data set; 0: none
    read_seconds=3.0,  # for which the input pipeline is read alone
    metrics=config_dict.create(samples=1000, real=1000, size=64),  # of random features; samples=0: none
    sweeps=config_dict.create(
      over=(),  # any of "batch", "tokens", "depth", "samples", "devices"; (): no sweep
      batch=(8, 32, 128, 512),  # samples, in a training step and in flight
      tokens=(4, 16, 64, 256),  # of a sample: squares
      depth=(1, 2, 4, 8),  # blocks
      samples=(200, 800, 3200),
    ),
  )
  return config.lock()


def sampler(**overrides: Any) -> ml_collections.ConfigDict:
  """Makes one row of `samplers`."""
  return _section(
    overrides,
    # Descents: "gd", "nag", "nesterov", "adam", "lbfgs", "langevin". ODE solvers: "euler", "heun", "tsit5", "dopri5",
    # and for a model with time_input "euler_maruyama".
    rule="gd",
    step_size=FieldReference(0.003, field_type=object),  # η; "auto": 2 / (λ · max_nfe), or what another c(γ) asks
    momentum=0.0,  # μ of "nag" and "nesterov"
    temperature=0.0,  # T of "langevin"
    max_nfe=249,  # network calls per sample at most; one call with guidance counts once
    min_nfe=0,  # network calls before a sample may stop
    threshold=placeholder(float),  # a sample stops at ‖f‖ ≤ threshold; None: at max_nfe
    relative_threshold=False,  # compare ‖f‖ / λ instead
    stop="norm",  # or "gamma": a sample stops where the noise level γ that a read-out sees is ≥ threshold
    readout=placeholder(str),  # of stop="gamma": the readout.npz that --mode=readout has fitted to these weights
    max_restarts=0,  # times that a diverged sample starts again
    tolerance=placeholder(float),  # relative and absolute, of a solver with step size control; None: equal steps
    guidance=1.0,  # scale of classifier-free guidance; 1: no guidance
    guidance_channels=placeholder(int),  # number of guided channels, from the first; None: all
    guidance_interval=placeholder(tuple),  # (low, high): guide only where ‖f‖ lies between; None: always
    batching="continuous",  # a finished sample makes room for the next; or "static": a batch ends together
  )


def prepare(**overrides: Any) -> ml_collections.ConfigDict:
  """Makes the section `prepare`: images, encoded once into the cache at data.options.path."""
  return _section(
    overrides,
    source="folder",  # one of data.source that has images
    options=config_dict.create(),  # its arguments
    dtype="float16",  # of the moments: "float16" or "bfloat16"
    images_per_shard=2048,  # 67 MB of 32×32×4 latents
    threads=2,  # that read ahead
    skip_damaged=False,  # leave damaged images out and count them; False: stop at the first, as at too large ones
  )


def fit(**overrides: Any) -> ml_collections.ConfigDict:
  """Makes the section `prepare.fit`: trains an autoencoder where autoencoder.path has none."""
  return _section(
    overrides,
    steps=350,
    batch_size=16,  # images
    learning_rate=5e-3,
    kl_weight=1e-4,
    # Attributes of eqm_jax.networks.autoencoder.Autoencoder; each level but the last halves the image.
    model=config_dict.create(block_out_channels=(16, 32, 32), layers_per_block=1, norm_num_groups=8),
  )


def report(**overrides: Any) -> ml_collections.ConfigDict:
  """Makes the section `report`, of --mode=report."""
  return _section(
    overrides,
    command="python -m eqm_jax.main --config=configs/report.py --workdir=runs/report --mode=report",  # on the page
    seeds=3,  # of parameters, order and noise; numbers are mean and standard deviation over them
    num_samples=1000,  # of each sampler
    batch_size=500,  # samples in flight on each device
    max_nfe=249,  # of a full descent; the paper's "250 steps"
    step_size=0.003,  # η of a full descent
    threshold=4.0,  # of adaptive compute
    num_held_out=299,  # images to denoise and to tell from outliers
    composed_labels=(3, 8),  # two classes that look different
    # The page: title, a paragraph, the data set; of each claim its title, and what the paper reports.
    text=config_dict.create(title="", description="", data="", claims=config_dict.create()),
  )


def _section(overrides: dict[str, Any], **defaults: Any) -> ml_collections.ConfigDict:
  section = config_dict.create(**defaults).lock()
  for key, value in overrides.items():
    section[key] = value
  return section.unlock()


def smoke(config):
  """Shortens training, evaluation and tasks, for tests."""
  config.optimizer.update(warmup_steps=20, ema_decay=0.9)
  config.train.update(steps=60, batch_size=32, log_every=20)
  config.checkpoint.every = 30
  config.evaluation.update(num_samples=40, batch_size=40, chunk_size=40, features=("raw",))
  config.sample.batch_size = 20
  config.tasks.update(num_images=20, batch_size=20)
  config.benchmark.update(turns=2, nfe=25, num_samples=80, steps=20, read_seconds=0.2)
  config.benchmark.metrics.update(samples=100, real=100)


def apply(config, variants: dict[str, Any], names: str, file: str) -> ml_collections.ConfigDict:
  """Applies functions of `variants` to the config of an experiment: "smoke" or "samplers,smoke"; "" is the config."""
  for name in filter(None, names.split(",")):
    if name not in variants:
      known = f"choose one of {', '.join(variants)}, or none" if variants else "it has none"
      raise ValueError(f"configs/{file} has no variant {name!r}: {known}")
    variants[name](config)
  return config.unlock().lock()  # sections that replace others are not locked yet
