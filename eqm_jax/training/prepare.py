"""Makes the cache of latents that a model is trained on: images → autoencoder → moments on disk."""

import contextlib
import logging
import os

import jax
import ml_collections
import numpy as np

from eqm_jax import devices
from eqm_jax.data import encoding, latents, sources
from eqm_jax.data.codec import Codec, check_same_autoencoder
from eqm_jax.data.images import DamagedImage
from eqm_jax.data.samples import Source
from eqm_jax.evaluation import pictures
from eqm_jax.networks.autoencoder import attributes
from eqm_jax.training import autoencoder, pretrained

SHOWN = 10  # images of the picture

log = logging.getLogger(__name__)


def prepare(config: ml_collections.ConfigDict, *, verify: bool = False):
  """Encodes `config.prepare.source` into the cache at `config.data.options.path`, if that is not finished.

  Beside the shards lies reconstructed.png, some images and what the autoencoder makes of them.

  All processes of a run take part; each encodes its shards on its own devices. A killed one
  goes on where it was. Where the autoencoder is missing and the config has `prepare.fit`, it is
  trained first, on the same images.

  Args:
    config: the whole config.
    verify: read a finished cache once and compare its checksums.

  Raises:
    ValueError: if the cache holds something else than the config asks for, is damaged, or an
      image is.
  """
  if config.data.source != "latents":
    raise ValueError(f"data.source = {config.data.source!r}: only 'latents' are prepared")
  options, path = config.prepare, config.data.options.path
  latents.check_path(path)
  wanted = {
    "source": options.source,
    "options": {name: value for name, value in options.options.to_dict().items() if name != "path"},
    "dtype": options.dtype,
  }
  if latents.is_finished(path):
    manifest = latents.read_manifest(path)
    name = {"autoencoder": manifest["autoencoder"] | {"name": config.autoencoder.name}}
    latents.check_same(os.path.join(path, latents.MANIFEST), manifest, wanted | name)
    if verify:
      codec = pretrained.open_codec(config.autoencoder)
      check_same_autoencoder(path, manifest["autoencoder"], codec.identity if codec else None)
      latents.Latents(path, verify=True)
    log.info("%s: %d images are encoded%s", path, manifest["records"], ", all checksums are right" if verify else "")
    return
  source = sources.open_source(options.source, {**options.options})
  if source.autoencoder:
    raise ValueError(f"prepare.source = {options.source!r} has no images to encode")
  if "fit" in options:
    _fit_or_check(config, source)
  codec = pretrained.open_codec(config.autoencoder)
  if codec is None:
    raise ValueError("autoencoder.path is empty: give the autoencoder that encodes the images")
  settings = latents.Settings(
    **wanted,
    contents=source.contents,
    images=len(source),
    num_classes=source.num_classes,
    image_size=source.shape[0],
    latent_shape=codec.latent_shape(source.shape),
    images_per_shard=options.images_per_shard,
    autoencoder=codec.identity,
  )
  encoded = encoding.write(
    path,
    source,
    codec.moments,
    settings,
    batch_size=codec.batch_size,
    threads=options.threads,
    skip_damaged=options.skip_damaged,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  devices.wait_for_all("the cache of latents is encoded")
  if jax.process_index() == 0:
    manifest = encoding.finish(path, settings)
    skipped = settings.images - manifest["records"]
    log.info("%s: %d images, %d of them encoded now, %d left out", path, manifest["records"], encoded, skipped)
    _picture(os.path.join(path, "reconstructed.png"), source, codec)
  devices.wait_for_all("the cache of latents is finished")


def _picture(path: str, source: Source, codec: Codec):
  """Some images, and below them what the autoencoder makes of them: a wrong one is seen at once."""
  images = []
  for i in np.linspace(0, len(source) - 1, min(SHOWN, len(source))).astype(int):
    with contextlib.suppress(DamagedImage):  # left out of the cache, too
      images.append(source[int(i)]["image"])
  if not images:
    return
  mean, _ = codec.moments(np.stack(images))
  decoded = codec.decode(mean[:, 0] * codec.module.scaling_factor)
  pictures.grid(np.concatenate([pictures.to_uint8(np.stack(images)), decoded]), len(images)).save(path)


def _fit_or_check(config: ml_collections.ConfigDict, source: Source):
  """Trains the autoencoder where there is none; refuses one that is not of the config's model."""
  options, path = config.prepare.fit, config.autoencoder.path
  if not os.path.exists(path):
    if not path or "://" in path:
      raise ValueError(f"autoencoder.path = {path!r}: give a directory on a disk for the autoencoder that is trained")
    if jax.process_count() > 1:
      raise ValueError(f"there is no autoencoder at {path}: train it in one process first, with --mode=prepare")
    log.info("there is no autoencoder at %s: training one", path)
    pretrained.save_autoencoder(path, *autoencoder.fit(options, source, config.seed))
    return
  there = attributes(pretrained.load_autoencoder(path)[0])
  wanted = options.model.to_dict()
  if any(there[name] != value for name, value in wanted.items()):
    raise ValueError(f"the autoencoder at {path} is another than prepare.fit.model: {there} there, {wanted} wanted")
