import dataclasses
import json
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ended, start_python
from PIL import Image

from eqm_jax import plotting
from eqm_jax.data import builtin
from eqm_jax.equilibrium import sampler
from eqm_jax.evaluation import evaluator, features, reference_data, validation
from eqm_jax.evaluation.reference_data import ReferenceData
from eqm_jax.networks.dit import DiT
from eqm_jax.sampling import labels as labels_lib
from eqm_jax.sampling.generator import Generator, Samples
from eqm_jax.sampling.sample_store import SampleStore


@pytest.fixture
def generator(tiny_config):
  model = DiT(**tiny_config.model)
  params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), jnp.zeros(1, jnp.int32))["params"]
  # A new network answers zero: move it, so that samples move.
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda leaf: leaf + 0.3 * rng.normal(size=leaf.shape).astype(np.float32), params)
  return Generator(model, params, jax.random.key(0), batch_size=2, multiplier=4.0)


class Decoder:
  """A decoder that makes the same grey or coloured image of every latent."""

  autoencoder_id = {"name": "grey", "sha256": "0" * 64}

  def __init__(self, shape):
    self.shape, self.module = shape, types.SimpleNamespace(dtype="float32")

  def image_shape(self, latent_shape):
    return self.shape

  def decode(self, x):
    return np.zeros((len(x), *self.shape), np.uint8) + 7


def run(config, generator, directory, source=None):
  source = builtin.digits() if source is None else source
  validation.check_options(config, generator)
  validation.check_data(config, generator, source, source)
  reference = ReferenceData(config.evaluation, source, source, 2)
  return evaluator.evaluate(config, generator, reference, str(directory), {"checkpoint": "of a test"})


def test_real_samples_are_at_no_distance_from_themselves(tiny_config, generator, tmp_path, monkeypatch):
  """Real images instead of samples: a distance of zero, and the classifier's own accuracy."""
  source = builtin.digits()

  def real_ones(self, name, row, labels, chunk_size, numbers):
    for number in numbers:
      index = np.arange(number * chunk_size, min((number + 1) * chunk_size, len(labels)))
      images = np.stack([source.images[source.labels == labels[i]][i // 10] for i in index])
      zeros = np.zeros(len(index), np.int32)
      yield number, Samples(sampler.Result(images, zeros + 1, zeros, zeros, zeros), 1.0, len(index))

  monkeypatch.setattr(Generator, "chunks", real_ones)
  tiny_config.evaluation.update(num_samples=1700, chunk_size=300, samplers=("gd",), plot_sampler=None)
  report = run(tiny_config, generator, tmp_path)
  for row in report["rows"].values():
    metrics = row["metrics"]["raw"]
    assert metrics["frechet"] < 0.05 and metrics["frechet_error"] < 0.05
    assert abs(metrics["kernel_distance"]) < 0.01  # of noise it is above 0.1
    assert metrics["precision"] > 0.95 and metrics["recall"] > 0.95
    assert metrics["nearest"] == 0
    assert row["classifier_accuracy"] > 0.98
    assert row["seconds"] == 6.0  # of six chunks
  assert 0.2 < report["features"]["raw"]["real"]["frechet_between_halves"] < 0.4
  assert 1 < report["features"]["raw"]["real"]["nearest_other"] < 3
  with Image.open(tmp_path / "nearest_gd.png") as picture:  # samples, and below them the same images
    rows = np.asarray(picture)[8:, :, 0]
  height = 9 * 8 + plotting.CAPTION_HEIGHT  # of a row
  np.testing.assert_array_equal(rows[:64], rows[height : height + 64])
  assert 0.95 < report["features"]["classifier_accuracy"]["held_out_accuracy"] <= 1


def test_nearest_real_images_of_another_size_are_shown_at_the_size_of_samples(tmp_path):
  class Reference:
    def preview(self, store):
      return np.zeros((3, 8, 8, 3), np.float32)

    def neighbours(self, store, count):
      return {"inception": np.ones((count, 16, 16, 3), np.float32)}

  evaluator._write_neighbours(str(tmp_path / "nearest.png"), None, Reference())
  of_samples = plotting.grid(np.zeros((1, 8, 8, 3)), evaluator.NEIGHBOUR_COLUMNS, captions=["samples"])
  with Image.open(tmp_path / "nearest.png") as picture:
    assert picture.size == (of_samples.width, 2 * of_samples.height - 8)
    assert np.asarray(picture)[of_samples.height + 20, 20].tolist() == [255, 255, 255]  # grey are the samples


@pytest.mark.slow
def test_noise_is_far_from_the_digits_and_agrees_with_no_label(tiny_config, generator, tmp_path):
  for row in tiny_config.samplers.values():
    row.update(max_nfe=1, threshold=None)
  tiny_config.evaluation.update(num_samples=100, features=("raw", "classifier"), samplers=("gd",), plot_sampler=None)
  tiny_config.evaluation.classifier.steps = 15
  report = run(tiny_config, generator, tmp_path)
  for row in report["rows"].values():
    assert row["metrics"]["raw"]["frechet"] > 5 and row["classifier_accuracy"] < 0.3
    assert row["metrics"]["raw"]["precision"] == 0
    classifier = row["metrics"]["classifier"]
    assert classifier["frechet"] > 3 * report["features"]["classifier"]["real"]["frechet_between_halves"]
    assert classifier["spatial_frechet"] > 0 and 1 <= classifier["inception_score"] <= 10
    assert row["nfe"]["mean"] == 1 and row["status"]["budget"] == 100
  table = re.sub(" +", " ", (tmp_path / "evaluation.md").read_text())
  assert "Features: raw; 1797 real samples" in table and "Features: classifier (sha256" in table
  columns = "Fréchet | spatial Fréchet | inception score | kernel distance | MIND | precision | recall | nearest real"
  assert f"| sampler | {columns} |" in table
  assert len(re.findall("median distance to the nearest other one [0-9.]+", table)) == 2


def test_the_report_tells_all_that_a_number_depends_on(tiny_config, generator, tmp_path):
  tiny_config.evaluation.update(samplers=("adaptive",), labels="random", seed=3, chunk_size=7)
  tiny_config.evaluation.update(save_npz=True, plot_sampler=None)
  report = run(tiny_config, generator, tmp_path)
  assert report["labels"] == "random" and report["seed"] == 3 and report["samples"] == 20
  assert report["weights"]["kind"] == "ema" and report["weights"]["checkpoint"] == "of a test"
  assert len(report["weights"]["sha256"]) == 64
  assert report["precision"] == {
    "network": "float32", "sampler": "float32", "features": "float32", "distances": "float64"
  }  # fmt: skip
  assert report["features"]["raw"]["name"] == "raw" and report["features"]["raw"]["real"]["samples"] == 1797
  assert set(report["versions"]) >= {"eqm_jax", "python", "jax", "jaxlib", "flax", "numpy"}
  assert set(report["rows"]) == {"adaptive"}
  row = report["rows"]["adaptive"]
  assert {"rule", "eta", "momentum", "guidance", "guidance_channels", "threshold", "batching"} <= set(row)
  assert {"mean", "q0", "q10", "q50", "q90", "q100"} == set(row["nfe"])
  # As ADM's evaluator reads it.
  with np.load(tmp_path / "adaptive.npz") as arrays:
    assert arrays["arr_0"].shape == (20, 8, 8, 1) and arrays["arr_0"].dtype == np.uint8
    np.testing.assert_array_equal(arrays["arr_1"], labels_lib.parse("labels", "random", 20, 10, seed=3))
    x = generator.samples("adaptive", tiny_config.samplers.adaptive, arrays["arr_1"]).result.x
    difference = np.abs(arrays["arr_0"].astype(int) - plotting.to_uint8(x))
    assert difference.max() <= 1 and np.mean(difference > 0) < 0.01  # rounding, where the batches differ
  assert not (tmp_path / "chunks").exists(), "a finished evaluation leaves no chunks behind"


@pytest.mark.parametrize("count, chunk_size", [(2, 5), (3, 2), (11, 5)])
def test_few_samples_are_evaluated_in_chunks_and_batches_that_do_not_divide_them(
  tiny_config, generator, tmp_path, count, chunk_size
):
  tiny_config.samplers.gd.max_nfe = 1
  tiny_config.evaluation.update(num_samples=count, chunk_size=chunk_size, samplers=("gd",), plot_sampler=None)
  row = run(tiny_config, generator, tmp_path)["rows"]["gd"]
  found = row["metrics"]["raw"]
  assert found["frechet"] > 0 and (found["frechet_error"] is None) == (count < 4) and ("recall" in found) == (count > 3)
  assert row["nfe"]["mean"] == 1 and row["status"]["budget"] == count
  assert (tmp_path / "evaluation.md").read_text().count("–") >= (count < 4) and (tmp_path / "samples_gd.png").exists()


def test_a_killed_evaluation_goes_on_where_it_was(tiny_config, generator, tmp_path, monkeypatch):
  tiny_config.evaluation.update(chunk_size=4, samplers=("adaptive", "nag"), plot_sampler=None)
  expected = run(tiny_config, generator, tmp_path / "whole")

  chunks, sampled = Generator.chunks, []

  def killed_in_the_second_row(self, name, *arguments):
    for chunk in chunks(self, name, *arguments):
      if (name, chunk[0]) == ("nag", 2):
        raise KeyboardInterrupt
      yield chunk

  def counted(self, name, *arguments):
    sampled.extend((name, number) for number in arguments[-1])
    return chunks(self, name, *arguments)

  monkeypatch.setattr(Generator, "chunks", killed_in_the_second_row)
  with pytest.raises(KeyboardInterrupt):
    run(tiny_config, generator, tmp_path / "killed")
  monkeypatch.setattr(Generator, "chunks", counted)
  resumed = run(tiny_config, generator, tmp_path / "killed")
  assert sampled == [("nag", 2), ("nag", 3), ("nag", 4)]
  for name, row in expected["rows"].items():
    assert resumed["rows"][name]["metrics"] == row["metrics"], "the same bits"
    assert resumed["rows"][name]["nfe"] == row["nfe"]
  # Other weights are another sample set: no chunk of the first is reused.
  other = dataclasses.replace(generator, params=jax.tree.map(lambda leaf: leaf * 1.01, generator.params))
  sampled.clear()
  run(tiny_config, other, tmp_path / "killed")
  assert len(sampled) == 10


def test_another_machine_makes_another_sample_set_and_comparable_metrics(tiny_config, generator, tmp_path):
  reference, row = ReferenceData(tiny_config.evaluation, builtin.digits(), None, 2), tiny_config.samplers.gd
  row.max_nfe = 1
  settings_here = reference.settings(row, generator)
  here = reference.sample("gd", row, np.arange(2), generator, str(tmp_path))
  reference.computed_with = ["another processor"]
  there = reference.sample("gd", row, np.arange(2), generator, str(tmp_path))
  assert here.directory != there.directory and len(list(tmp_path.glob("gd-*/*.npz"))) == 2
  assert reference.settings(row, generator) == settings_here, "what decides whether metrics can be compared"


def test_decoded_samples_are_shown_as_images_in_chunks_of_any_size(tiny_config, generator, tmp_path, monkeypatch):
  monkeypatch.setattr(reference_data, "PREVIEW", 10)
  decoding, latents = dataclasses.replace(generator, decoder=Decoder((16, 16, 3))), builtin.digits()
  latents.autoencoder_id = Decoder.autoencoder_id
  tiny_config.evaluation.update(chunk_size=4, samplers=("gd",), plot_sampler=None)
  run(tiny_config, decoding, tmp_path, latents)
  with Image.open(tmp_path / "samples_gd.png") as picture:
    assert np.unique(np.asarray(picture)).tolist() == [7, 255]
  assert not (tmp_path / "nearest_gd.png").exists(), "latents are no images"


def test_a_damaged_chunk_is_named(tiny_config, generator, tmp_path):
  tiny_config.evaluation.update(chunk_size=10, samplers=("gd",))
  reference = ReferenceData(tiny_config.evaluation, builtin.digits(), None, 2)
  labels = labels_lib.parse("labels", "balanced", 20, 10)
  store = reference.sample("gd", tiny_config.samplers.gd, labels, generator, str(tmp_path))
  file = sorted(tmp_path.rglob("*.npz"))[1]
  file.write_bytes(file.read_bytes()[:100])
  with pytest.raises(ValueError, match="000001.npz: damaged .* Remove the file"):
    reference.metrics(store)
  first = sorted(tmp_path.rglob("*.npz"))[0]
  whole = first.read_bytes()
  first.write_bytes(whole[:100])
  with pytest.raises(ValueError, match="000000.npz: damaged .* Remove the file"):
    store.names()
  first.write_bytes(whole)
  file.unlink()
  store = reference.sample("gd", tiny_config.samplers.gd, labels, generator, str(tmp_path))
  assert reference.metrics(store)["raw"]["frechet"] > 0


def test_chunks_that_no_other_process_samples_are_named(tmp_path):
  store = SampleStore(str(tmp_path), "gd", {"seed": 0}, 20, 10)
  store.write(0, {"x": np.zeros(3)})
  with pytest.raises(ValueError, match="chunks of other processes are still missing after 0 s; .* all processes share"):
    store.wait(0.0)


@pytest.mark.slow
def test_repeats_take_turns_and_integrators_have_rows(tiny_config, generator, tmp_path):
  tiny_config.samplers.nag.update(rule="heun", momentum=0.0, max_nfe=4)
  tiny_config.evaluation.update(benchmark_repeats=2, benchmark_samplers=("gd",), plot_sampler=None)
  report = run(tiny_config, generator, tmp_path)
  assert report["rows"]["nag"]["nfe"]["mean"] == 4
  table = re.sub(" +", " ", (tmp_path / "evaluation.md").read_text())
  assert "| nag | heun | – |" in table
  assert not (tmp_path / "descent.png").exists()


@pytest.mark.parametrize(
  "change, text",
  [
    (lambda c: c.evaluation.update(plot_sampler="heun"), "'heun' must be one of adaptive, gd, nag"),
    (lambda c: c.samplers.adaptive.update(rule="heun"), "'adaptive' must descend, but integrates"),
    (
      lambda c: (c.evaluation.update(samplers=("gd",)), c.samplers.adaptive.update(stop="gamma", readout="/none.npz")),
      "samplers.adaptive: /none.npz: no such file",
    ),
    (lambda c: c.evaluation.update(num_samples=1), "samples = 1"),
    (lambda c: c.evaluation.update(chunk_size=0), "chunk_size = 0"),
    (lambda c: c.evaluation.update(batch_size=0), "evaluation.batch_size = 0"),
    (lambda c: c.evaluation.update(num_samples=None), "num_samples = None must be at least 2"),
    (lambda c: c.evaluation.update(labels="some"), "evaluation.labels = 'some': 'some' is neither a label nor a range"),
    (lambda c: c.evaluation.update(labels="11"), r"evaluation.labels = '11': labels span 11\.\.11"),
    (lambda c: c.evaluation.update(labels="none"), "evaluation.labels = 'none' requests no class: set"),
    (lambda c: c.evaluation.update(samplers=("best",)), "evaluation.samplers = 'best'"),
    (lambda c: c.evaluation.update(samplers=()), r"evaluation.samplers = \(\) must name at least one"),
    (
      lambda c: c.evaluation.update(features=("fid",)),
      r"features = \('fid',\) must name some of raw, classifier, inception",
    ),
    (lambda c: c.evaluation.update(features=()), "features"),
    (lambda c: c.evaluation.update(features=("inception",)), "inception.path = .* no such file. Fetch pt_inception"),
    (lambda c: c.evaluation.update(benchmark_repeats=0), "repeats = 0"),
    (lambda c: c.evaluation.update(benchmark_samplers=("fast",)), "'fast'"),
    (lambda c: c.evaluation.update(weights="best"), "'best'"),
    (lambda c: c.samplers.gd.update(step_size=-1.0), "samplers.gd: step_size = -1.0"),
  ],
)
def test_bad_options_are_refused(tiny_config, generator, change, text):
  change(tiny_config)
  with pytest.raises(ValueError, match=text):
    validation.check_options(tiny_config, generator)


def test_a_readout_beside_the_optimal_field_is_refused(tiny_config, generator):
  """In the plane: the pictures show the descents of both."""
  tiny_config.samplers.adaptive.update(stop="gamma", threshold=0.9, readout="/none.npz")
  tiny_config.evaluation.update(samplers=("gd",), features=("raw",))
  model = generator.model.clone(input_size=1, channels=2, patch_size=1)
  with pytest.raises(ValueError, match="plot_sampler = 'adaptive' stops by a read-out, which the optimal field beside"):
    validation.check_options(tiny_config, dataclasses.replace(generator, model=model))


def test_labels_are_words_or_lists(tiny_config, generator):
  for labels in ("random", "3", "1,5,7-9"):
    tiny_config.evaluation.labels = labels
    validation.check_options(tiny_config, generator)


@pytest.mark.parametrize(
  "changes, text",
  [
    (dict(dtype="bfloat16"), "dtype = 'bfloat16' must be 'float32'"),
    (dict(resize="bicubic"), "resize = 'bicubic' must be one of tf1, half_pixel"),
    (dict(batch_size=0), "inception.batch_size = 0"),
  ],
)
def test_bad_inception_options_are_refused(tiny_config, generator, changes, text):
  tiny_config.evaluation.features = ("inception",)
  tiny_config.evaluation.inception.update(path=__file__, **changes)
  with pytest.raises(ValueError, match=text):
    validation.check_options(tiny_config, generator)


def test_data_that_samples_cannot_be_compared_with_is_refused(tiny_config, generator, tmp_path):
  fewer_classes = dataclasses.replace(generator, model=generator.model.clone(num_classes=9))
  with pytest.raises(ValueError, match="cannot be compared"):
    run(tiny_config, fewer_classes, tmp_path)
  digits, photographs = builtin.digits(), builtin.photographs(size=8)
  tiny_config.evaluation.features = ("inception",)
  with pytest.raises(ValueError, match=r"takes RGB images, but the samples are \(8, 8, 1\): name 'classifier'"):
    validation.check_data(tiny_config, generator, None, None)
  tiny_config.evaluation.features = ("classifier",)
  with pytest.raises(ValueError, match=r"fitted to images \(8, 8, 3\), but the samples are \(8, 8, 1\)"):
    validation.check_data(tiny_config, generator, digits, photographs)
  # Decoded latents are compared as images.
  latents = dataclasses.replace(generator, model=generator.model.clone(channels=4))
  decoded = dataclasses.replace(latents, decoder=Decoder((8, 8, 3)))
  validation.check_data(tiny_config, decoded, None, photographs)
  tiny_config.evaluation.update(features=("raw",), save_npz=True)
  with pytest.raises(ValueError, match=r"save_npz = True needs images, but the samples are \(8, 8, 4\)"):
    validation.check_data(tiny_config, latents, None, None)


def seven_of_ten_not_finite(x: np.ndarray) -> np.ndarray:
  return np.where(np.arange(len(x))[:, None, None, None] < 7, np.nan, x)


@pytest.mark.parametrize(
  "name, spoil, text",
  [
    ("raw", seven_of_ten_not_finite, "samplers.gd: 14 of 20 samples are not"),
    ("classifier", np.zeros_like, "samplers.gd: the samples: all rows are the same"),
    pytest.param("raw", np.zeros_like, "samplers.gd: the samples: all rows are the same", marks=pytest.mark.slow),
    pytest.param(
      "classifier", seven_of_ten_not_finite, "samplers.gd: 14 of 20 samples are not", marks=pytest.mark.slow
    ),
  ],
)
def test_samples_that_cannot_be_compared_are_refused(tiny_config, generator, tmp_path, name, spoil, text, monkeypatch):
  chunks = Generator.chunks

  def spoiled(*arguments):
    for number, samples in chunks(*arguments):
      yield number, dataclasses.replace(samples, result=samples.result.replace(x=spoil(samples.result.x)))

  monkeypatch.setattr(Generator, "chunks", spoiled)
  tiny_config.evaluation.update(
    samplers=("gd",), plot_sampler=None, classifier_accuracy=False, features=(name,), chunk_size=10
  )
  tiny_config.evaluation.classifier.steps = 1
  with pytest.raises(ValueError, match=text):
    run(tiny_config, generator, tmp_path)


# An evaluation on some number of pretended devices, or by one of several processes, and what came out.
PROGRAM = """
import json, sys
import jax, numpy as np
from conftest import connection, load_config

directory, *connected = sys.argv[1:]
if connected:
  jax.distributed.initialize(*connection())

from eqm_jax import distributed
from eqm_jax.data import builtin
from eqm_jax.evaluation import evaluator
from eqm_jax.evaluation.reference_data import ReferenceData
from eqm_jax.networks.dit import DiT
from eqm_jax.sampling.generator import Generator

config = load_config("digits", "smoke")
config.model.update(patch_size=2, width=16, depth=2, num_heads=2)
config.evaluation.update(
  num_samples=90, batch_size=4, chunk_size=10, features=("raw", "classifier"),
  samplers=("adaptive", "nag"), plot_sampler=None,
)
config.evaluation.classifier.steps = 8
config.samplers.adaptive.threshold = 84.0
config.samplers.nag.batching = "static"
model = DiT(**config.model)
params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 8, 8, 1)), np.zeros(1, np.int32))["params"]
rng = np.random.default_rng(0)
params = jax.tree.map(lambda leaf: leaf + 0.3 * rng.normal(size=leaf.shape).astype(np.float32), jax.device_get(params))
source = builtin.digits()
reference = ReferenceData(config.evaluation, source, source, 1)
generator = Generator(model, params, jax.random.key(0), batch_size=4, multiplier=4.0)
report = evaluator.evaluate(config, generator, reference, directory, {})
process, processes = distributed.process_index_and_count()
third = distributed.from_all(np.asarray([1 / 3 + process, 1e300]))
assert distributed.from_all(np.asarray(1.5)).shape == (processes,)
json.dump({"devices": jax.device_count(), "report": report, "third": third.tolist()}, sys.stdout)
"""


# Over how many threads XLA splits a product on a CPU decides the bits of the classifier that is fitted. Otherwise there
# would be one for each core, but with eight pretended devices at least eight.
THREADS = 8


def evaluated(directory, **options) -> list[dict]:
  """What came out of each process."""
  finished = ended(start_python("-c", PROGRAM, directory, NPROC=str(THREADS), **options))
  return [json.loads(one.stdout.splitlines()[-1]) for one in finished]  # gloo writes a line of its own before


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory) -> dict:
  return evaluated(tmp_path_factory.mktemp("one"))[0]["report"]


def assert_same_to_rounding(report: dict, expected: dict):
  evaluations = expected["rows"]["adaptive"]["nfe"]
  assert evaluations["q0"] < evaluations["q100"], "the samples should differ"
  assert report["features"] == expected["features"] and report["computed_with"] == expected["computed_with"]
  for name, row in expected["rows"].items():
    other = report["rows"][name]
    for space, metrics in row["metrics"].items():
      assert other["metrics"][space] == pytest.approx(metrics, rel=1e-5, abs=1e-6, nan_ok=True), (name, space)
    assert row["nfe"] == other["nfe"] and row["classifier_accuracy"] == other["classifier_accuracy"]


@pytest.mark.slow
def test_one_device_and_eight_give_the_same_to_rounding(tmp_path, on_one_device):
  (found,) = evaluated(tmp_path, devices=8)
  assert found["devices"] == 8
  assert_same_to_rounding(found["report"], on_one_device)


@pytest.mark.slow
def test_two_processes_share_the_samples_and_give_the_same_to_rounding(tmp_path, on_one_device):
  first, second = evaluated(tmp_path, processes=2)
  assert first["devices"] == 2 and second["report"] is None
  assert first["third"] == second["third"] == [[1 / 3, 1e300], [1 / 3 + 1, 1e300]], "float64, unrounded"
  assert_same_to_rounding(first["report"], on_one_device)


def test_the_classifier_knows_digits_and_not_shuffled_labels():
  source = builtin.digits()
  classifier = features.PixelClassifier(source.images, source.labels)
  assert classifier.held_out_accuracy > 0.97
  assert classifier.accuracy(source.images, (source.labels + 1) % 10) < 0.02
