"""Mode sample: samples from a model as files."""

import logging
import os

import ml_collections
import numpy as np

from eqm_jax import plotting
from eqm_jax.checks import at_least, one_of
from eqm_jax.evaluation import plane
from eqm_jax.io import write_json
from eqm_jax.modes import Mode, common
from eqm_jax.sampling import generator as generator_lib
from eqm_jax.sampling import labels, samples_page, trajectories
from eqm_jax.sampling.generator import Generator, Samples

IN_GRID = 100  # samples in samples.png
TRAJECTORIES = 10  # samples whose descent is plotted

log = logging.getLogger(__name__)


def run(config: ml_collections.ConfigDict, workdir: str, checkpoint: str | None = None):
  """Samples what `config.sample` asks for.

  Writes samples.png (a grid of the first hundred), samples.html (these with labels, NFE and ‖f‖) and samples.json (mean
  NFE, speed); with `save_images` one PNG a sample below images/; with `save_npz` samples.npz with x, label, nfe, norm,
  status and restarts, of a sampler that stops by γ̂ also gamma, and for latents also the decoded image (uint8) and the
  autoencoder; and, if the sampler descends, the trajectories of the first samples.

  Raises:
    ValueError: before sampling, if the config does not fit the model.
  """
  options = config.sample
  at_least("sample.num_samples", options.num_samples, 1)
  at_least("sample.batch_size", options.batch_size, 1)
  generator, _ = common.open_generator(config, options, workdir, checkpoint)
  one_of("sample.sampler", options.sampler, config.samplers)
  row = config.samplers[options.sampler]
  generator.check(options.sampler, row)
  num_classes = generator.model.num_classes
  label_N = labels.parse("sample.labels", options.labels, options.num_samples, num_classes, seed=options.seed)
  directory = common.directory_of(workdir, "samples")

  samples = generator.samples(options.sampler, row, label_N)
  rate, nfe = len(label_N) / samples.seconds, float(samples.result.nfe.mean())
  log.info("%d images, %.1f images/s, NFE %.1f per image", len(label_N), rate, nfe)
  summary = {"sampler": options.sampler, "samples": len(label_N), "images_per_second": rate, "nfe": nfe}
  write_json(os.path.join(directory, "samples.json"), summary)
  _write(options, generator, samples, label_N, directory)
  if generator_lib.is_descent(row) and generator.model.input_shape != plane.SHAPE:
    trajectories.plot(generator, row, label_N[:TRAJECTORIES], directory)
  log.info("samples: %s", directory)


def _write(
  options: ml_collections.ConfigDict, generator: Generator, samples: Samples, label_N: np.ndarray, directory: str
):
  """The files of the samples themselves."""
  result = samples.result
  pixels = generator.pixels(result.x if options.save_images or options.save_npz else result.x[:IN_GRID])
  if generator.model.input_shape == plane.SHAPE:
    grid = plane.scatter(result.x)
  else:
    columns = labels.columns(options.labels, generator.model.num_classes)
    grid = plotting.grid(pixels[:IN_GRID], columns, captions=generator.captions(label_N[:IN_GRID]))
    samples_page.write(
      os.path.join(directory, "samples.html"),
      f"Samples: {options.sampler}",
      pixels[:IN_GRID],
      label_N=label_N,
      names=generator.label_names,
      **{f"{key}_N": getattr(result, key) for key in ("nfe", "norm", "status")},
    )
  grid.save(os.path.join(directory, "samples.png"))
  if options.save_images:
    os.makedirs(os.path.join(directory, "images"), exist_ok=True)
    for i, (image, label) in enumerate(zip(pixels, label_N)):
      plotting.single(image).save(os.path.join(directory, "images", f"{i:06d}_{label}.png"))
  if options.save_npz:
    arrays = {"x": result.x, "label": label_N, "nfe": result.nfe}
    arrays |= {"norm": result.norm, "status": result.status, "restarts": result.restarts}
    arrays |= {} if result.gamma is None else {"gamma": result.gamma}
    if generator.decoder:
      arrays |= {"image": pixels, "autoencoder": generator.autoencoder_id}
    np.savez(os.path.join(directory, "samples.npz"), **arrays)


MODE = Mode(
  name="sample",
  summary="Samples from a model.",
  writes="samples/: samples.png, .html, .json and .npz, images/, and descent.png, descent.gif, norms.png of a descent",
  run=run,
  checkpoint="needs",
  processes="one",
)
