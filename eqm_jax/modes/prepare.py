"""Mode prepare: the cache of latents that a model is trained on, encoded from images by an autoencoder."""

import contextlib
import logging
import os
from typing import Any

import ml_collections
import numpy as np

from eqm_jax import distributed, plotting
from eqm_jax.checkpoints import pretrained
from eqm_jax.data import codec as codec_lib
from eqm_jax.data import encode_latents, latents, samples, sources
from eqm_jax.data.codec import Codec, check_same_autoencoder
from eqm_jax.data.images import DamagedImage
from eqm_jax.data.samples import Source
from eqm_jax.modes import Mode
from eqm_jax.networks.autoencoder import attributes
from eqm_jax.training import fit_autoencoder

COLUMNS = 10  # images in the picture

log = logging.getLogger(__name__)


def run(config: ml_collections.ConfigDict, workdir: str):
  """Encodes the cache, or verifies a finished one.

  Raises:
    ValueError: if the config has no section `prepare`, and as `prepare`.
  """
  del workdir
  if "prepare" not in config:
    raise ValueError(
      f"this config has no section `prepare`: data.source = {config.data.source!r} is read as it is, train at once"
    )
  prepare(config, verify=True)


def prepare(config: ml_collections.ConfigDict, *, verify: bool = False):
  """Encodes the images of `config.prepare.source` into the cache at `config.data.options.path`, unless it is finished.

  All processes of a run take part, each with some of the shards; after a kill another call continues. Where the
  autoencoder does not exist and the config has `prepare.fit`, it is trained first, on the same images. Beside the
  shards lies reconstructed.png: some images, encoded and decoded.

  Args:
    config: the whole config.
    verify: reads a finished cache once and compares its checksums.

  Raises:
    ValueError: if the cache holds something else than the config asks for, or it or an image is damaged.
  """
  if config.data.source != "latents":
    raise ValueError(
      f"data.source = {config.data.source!r} must be 'latents' where the config has a section `prepare`, which encodes "
      "images for it"
    )
  options, path = config.prepare, config.data.options.path
  latents.check_path(path)
  if latents.is_finished(path):
    _check_finished(config, path, verify)
    return
  source = sources.open_source(options.source, {**options.options})
  if source.autoencoder_id:
    raise ValueError(f"prepare.source = {options.source!r} has no images to encode, but latents: give one with images")
  if "fit" in options:
    _fit_or_check(config, source)
  codec = codec_lib.open_codec(config.autoencoder)
  if codec is None:
    raise ValueError("autoencoder.path = None must be a path: give the autoencoder that encodes the images")
  _encode(config, source, codec)


def _requested(options: ml_collections.ConfigDict) -> dict[str, Any]:
  """The settings of a cache that the section `prepare` names."""
  return {
    "source": options.source,
    "options": {name: value for name, value in options.options.to_dict().items() if name != "path"},
    "dtype": options.dtype,
  }


def _check_finished(config: ml_collections.ConfigDict, path: str, verify: bool):
  """Refuses a finished cache of something else; with `verify`, a damaged one."""
  manifest = latents.read_manifest(path)
  saved_id = manifest["autoencoder"]
  requested = _requested(config.prepare) | {"autoencoder": saved_id | {"name": config.autoencoder.name}}
  latents.check_same(os.path.join(path, latents.MANIFEST), manifest, requested)
  if verify:
    codec = codec_lib.open_codec(config.autoencoder)
    check_same_autoencoder(path, saved_id, codec.autoencoder_id if codec else None)
    latents.Latents(path, verify=True)
  log.info("%s: %d images are encoded%s", path, manifest["records"], ", all checksums are right" if verify else "")


def _encode(config: ml_collections.ConfigDict, source: Source, codec: Codec):
  """Writes this process's shards; the first process then completes the cache."""
  options, path = config.prepare, config.data.options.path
  process, processes = distributed.process_index_and_count()
  settings = latents.Settings(
    **_requested(options),
    contents=source.content_hash,
    images=len(source),
    num_classes=source.num_classes,
    image_size=source.shape[0],
    latent_shape=codec.latent_shape(source.shape),
    images_per_shard=options.images_per_shard,
    autoencoder=codec.autoencoder_id,
  )
  encoded = encode_latents.write(
    path,
    source,
    codec.moments,
    settings,
    batch_size=codec.batch_size,
    threads=options.threads,
    skip_damaged=options.skip_damaged,
    process_index=process,
    process_count=processes,
  )
  distributed.wait_for_all("the cache of latents is encoded")
  if process == 0:
    manifest = encode_latents.finish(path, settings, source.class_names)
    skipped = settings.images - manifest["records"]
    log.info("%s: %d images, %d encoded now, %d left out", path, manifest["records"], encoded, skipped)
    _picture(os.path.join(path, "reconstructed.png"), source, codec)
  distributed.wait_for_all("the cache of latents is finished")


def _picture(path: str, source: Source, codec: Codec):
  """Some images, and below them what the autoencoder makes of them: a wrong autoencoder is visible at once."""
  images = []
  for i in samples.spread(source, COLUMNS):
    with contextlib.suppress(DamagedImage):  # left out of the cache, too
      images.append(source[int(i)]["image"])
  if not images:
    return
  mean, _ = codec.moments(np.stack(images))
  decoded = codec.decode(mean[:, 0] * codec.module.scaling_factor)
  plotting.grid(np.concatenate([plotting.to_uint8(np.stack(images)), decoded]), len(images)).save(path)


def _fit_or_check(config: ml_collections.ConfigDict, source: Source):
  """Trains the autoencoder if it does not exist; refuses one that is not of the config's model."""
  options, path = config.prepare.fit, config.autoencoder.path
  if path is None or "://" in path:
    raise ValueError(f"autoencoder.path = {path!r} must be a directory on a disk: give one for the trained autoencoder")
  if not os.path.exists(path):
    if distributed.process_index_and_count()[1] > 1:
      raise ValueError(
        f"autoencoder.path = {path!r} does not exist, and is trained in one process: run --mode=prepare in one first"
      )
    log.info("%s: no autoencoder yet, training one", path)
    pretrained.save_autoencoder(path, *fit_autoencoder.fit(options, source, config.seed))
    return
  saved, requested = attributes(pretrained.load_autoencoder(path)[0]), options.model.to_dict()
  if any(saved[name] != value for name, value in requested.items()):
    raise ValueError(
      f"the autoencoder at {path} is not that of prepare.fit.model: {saved} saved, {requested} requested. Give another "
      "autoencoder.path, or set prepare.fit.model to it"
    )


MODE = Mode(
  name="prepare",
  summary="Encodes images into the cache of latents that a model is trained on.",
  writes="the directory of --config.data.options.path",
  run=run,
  checkpoint="none",
  processes="many",
  checkpoint_hint="preparing data needs no model, but the autoencoder of --config.autoencoder.path",
)
