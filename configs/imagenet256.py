"""EqM-XL/2 on ImageNet 256×256 in the latent space of Stable Diffusion's autoencoder.

Command:   python -m eqm_jax.main --config=configs/imagenet256.py --workdir=runs/xl2
           It encodes the images into a cache (--mode=prepare does only that), trains from that and goes on when started
           again. Variants: imagenet256.py:B/2, :L/2, :XL/2 (the default), :S/2, and patches 4 and 8. "-gpu": for GPUs
           of 80 GB, from one up; "-tfds": the images of a TFDS build; "-online": encoded in each step, without a cache.
Hardware:  a TPU slice or GPUs; not run by us yet. XL/2 takes 0.71 TFLOP per image and step, so 7.0 million steps of 256
           (1,400 epochs) take an estimated 56 hours at half of the peak of 64 v5e chips (197 TFLOP/s each, bfloat16).
           State: 10.8 GB, split over up to 16 devices. docs/plan.md has what each size takes on TPUs, docs/gpus.md on
           GPUs; --mode=plan computes it for other slices.
Expected:  the paper's figures (FID of 50,000 samples). XL/2, 1,400 epochs, with guidance: 1.90. B/2, 80 epochs (400,000
           steps), without guidance: 32.85; its loss flattens near 10.3 (see `relative_loss` in the metrics). With the
           authors' checkpoints, without training and without ImageNet (docs/evaluation.md):
           --mode=evaluate with :B/2 and --checkpoint=EqM-B-2.pt for 32.85, :XL/2 and EqM-XL-2.pt for 1.90.
Data:      the images in data/imagenet/train and Stable Diffusion's autoencoder in data/sd-vae-ft-ema (docs/data.md);
           Inception's weights and ADM's statistics (docs/evaluation.md), or --config.evaluation.num_samples=None.
"""

import functools
import pathlib
import runpy
import types

base = types.SimpleNamespace(**runpy.run_path(str(pathlib.Path(__file__).with_name("base.py"))))

SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}  # depth, width, heads
RULES = (  # the first regex that is found in a parameter's path decides; the blocks have a leading axis of depth
  ("blocks/qkv/kernel", (None, "fsdp", None, "tensor", None)),  # width → 3, heads, width of a head
  ("blocks/qkv/bias", (None, None, "tensor", None)),
  ("blocks/attention_out/kernel", (None, "tensor", None, "fsdp")),  # heads, width of a head → width
  ("blocks/mlp_(in|gate)/kernel", (None, "fsdp", "tensor")),
  ("blocks/mlp_(in|gate)/bias", (None, "tensor")),
  ("blocks/mlp_out/kernel", (None, "tensor", "fsdp")),
  ("blocks/modulation/kernel", (None, None, "fsdp")),  # by its outputs, which need no sum over devices
  ("blocks/modulation/bias", (None, "fsdp")),
  ("final_modulation/kernel", ("fsdp", None)),
  ("label_embed/embedding|time_embed/dense_./kernel", (None, "fsdp")),  # 1,001 classes divide by nothing
  ("(patch_embed|final_out|energy_out)/kernel|bias|qk_norm", ()),  # narrow
)


def get_config(variant: str = "XL/2", file: str = "imagenet256.py"):
  config = base.get_config()
  config.data.update(source="latents", flip=True)
  config.data.options = dict(path="data/imagenet256_latents", verify=False)  # 43 GB
  config.autoencoder.update(path="data/sd-vae-ft-ema", name="ema")  # "ema" or "mse" of Stable Diffusion's
  with config.unlocked():
    config.prepare = base.prepare(options=dict(path="data/imagenet/train", size=256, channels=3), threads=32)
  config.model.update(input_size=32, channels=4, num_classes=1000, dtype="bfloat16")  # latent pixels: 256 / 8
  config.model.remat = "dots_no_batch"  # on TPUs "none" writes attention to HBM
  config.optimizer.update(learning_rate=1e-4, schedule="constant", warmup_steps=0, ema_decay=0.9999)
  config.train.update(steps=400_000, batch_size=256)  # the 80 epochs of the paper's ablations
  config.checkpoint.update(every=10_000, keep=3)
  config.mesh.fsdp = None  # the state is split over 16 devices, or fewer where there are not as many
  config.sharding.update(rules=RULES, gather="step")
  row = functools.partial(base.sampler, guidance_channels=3)  # as the released code
  config.samplers = dict(
    published_b2=row(),  # of the paper's 32.85: GD, no guidance
    published_xl2=row(rule="nag", step_size=0.0017, momentum=0.3, guidance=1.5),  # of its 1.90
    adaptive=row(threshold=10.0),
  )
  config.evaluation.update(num_samples=50_000, batch_size=64, chunk_size=64, labels="random")
  config.evaluation.update(features=("inception",), classifier_accuracy=False, plot_sampler=None)
  config.evaluation.inception.reference = "data/VIRTUAL_imagenet256_labeled.npz"
  config.evaluation.during_training.update(every=50_000, num_samples=5000)
  config.sample.batch_size = 64
  config.tasks.update(num_images=64, batch_size=64)
  config.tasks.ood.against = ("uniform", "gaussian", "constant", "shuffled", "rotated", "inverted")
  config.tasks.compose.labels = (207, 360)
  config.benchmark.update(num_samples=512, steps=40)
  config.benchmark.metrics.update(samples=10_000, real=10_000, size=2048)
  config.benchmark.sweeps.update(tokens=(64, 256, 1024), depth=(1, 4, 12), samples=(64, 256, 1024))
  return base.apply(config, VARIANTS, variant or "XL/2", file)


def network(config, size: str, patch: int, override):
  depth, width, num_heads = SIZES[size]
  config.model.update(depth=depth, width=width, num_heads=num_heads, patch_size=patch)
  if size == "XL":
    config.train.steps = 7_000_000  # 1,400 epochs
  published = "published_xl2" if size == "XL" else "published_b2"
  config.evaluation.samplers = (published,)
  config.evaluation.during_training.sampler = config.sample.sampler = published
  override(config)


def gpu(config):
  config.mesh.fsdp, config.sharding.gather = 1, "layer"  # each has the whole state
  config.train.grad_accum_steps = 2  # 128 images at a time fit one, 256 hardly; on several: 1


def tfds(config):
  config.prepare.source = "tfds"
  config.prepare.options = dict(name="imagenet2012", path="data/tfds", split="train", size=256, channels=3)


def online(config):
  config.data.update(source=config.prepare.source, threads=config.prepare.threads)
  config.data.options = config.prepare.options
  with config.unlocked():
    del config.prepare
  config.autoencoder.dtype = "bfloat16"  # what is encoded once is encoded exactly, in float32


VARIANTS = {
  f"{size}/{patch}{suffix}": functools.partial(network, size=size, patch=patch, override=override)
  for size in SIZES
  for patch in (2, 4, 8)
  for suffix, override in (("", lambda config: None), ("-gpu", gpu), ("-tfds", tfds), ("-online", online))
}
