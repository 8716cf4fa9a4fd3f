"""Plans of a config of the repository and of small ones, compiled for eight v5e chips that are not there."""

import collections as python_collections
import dataclasses
import io
import json
import logging
import math
import re
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, load_config
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from PIL import Image
from plans import flags_that_libtpu_knows, open_slice, small  # noqa: F401

from eqm_jax.networks import flops as flops_lib
from eqm_jax.networks.dit import DiT, parameter_shapes
from eqm_jax.plan import costs, hlo, plan, programs
from eqm_jax.plan import figures as figures_lib
from eqm_jax.training import sharding


def compiled_with_text(program: programs.Program, topology) -> tuple[figures_lib.Figures, hlo.Module]:
  """A program's figures, and the program that they were read from."""
  modules, parse = [], hlo.parse
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(hlo, "parse", lambda text: modules.append(parse(text)) or modules[-1])
    figures = figures_lib.compile_program(program, topology)
  return figures, modules[0]


@pytest.fixture(scope="module")
def shipped():
  """EqM-S/2's training step as configs/imagenet256.py has it, but with pure data parallelism, on v5e:2x4."""
  topology, config = open_slice("v5e:2x4"), load_config("imagenet256", "S/2")
  config.mesh.fsdp, config.sharding.gather = 1, "layer"
  program = programs.training(config, topology)
  return config, program, *compiled_with_text(program, topology)


@pytest.mark.parametrize("name", ["small", pytest.param("shipped", marks=pytest.mark.slow)])
def test_arguments_are_the_shards_and_nothing_else(request, name):
  if name == "small":
    program, figures, module = request.getfixturevalue("written")[4][0]
  else:
    _, program, figures, module = request.getfixturevalue("shipped")
  parameters = [i.result[0] for i in module.entry_computation.instructions if i.opcode == "parameter"]
  shards = [leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(program.arguments)]
  assert python_collections.Counter(a.dims for a in parameters) == python_collections.Counter(shards)
  assert figures.memory["arguments"] == sum(array.padded_bytes for array in parameters)
  counted = sum(array.bytes for array in parameters if len(array.dims))  # but for the two counters
  assert sum(program.argument_bytes.values()) == pytest.approx(counted, abs=8)
  assert figures.memory["aliased"] > 0.99 * figures.memory["outputs"]  # the state is donated


@pytest.mark.slow
def test_memory_is_compared_with_the_chip(shipped):
  _, program, figures, _ = shipped
  parameters = sum(leaf.size for leaf in jax.tree.leaves(program.arguments[0].params))
  assert figures.fits and 16 * parameters < figures.needed < figures.chip.usable_memory
  assert figures.memory["temporaries"] > 0 and figures.seconds > 0
  assert figures.flops == 32 * flops_lib.training(DiT(**load_config("imagenet256", "S/2").model))
  assert figures.seconds_at_mfu == pytest.approx(figures.flops / (0.4 * 197e12))
  assert figures.bound.seconds < figures.seconds_at_mfu


@pytest.mark.slow
def test_data_parallelism_reduces_the_gradient_and_sends_nothing_else(shipped):
  _, program, figures, module = shipped
  params = dict(program.arguments[0].params)
  # The time is one for all samples: of what led to its embedding, one vector is summed.
  time_embed = params.pop("time_embed")
  parameters = sum(leaf.size for leaf in jax.tree.leaves((params, time_embed["dense_1"]["bias"])))
  sent = costs.find_collectives(module, program.mesh)
  assert {one.kind for one in sent} == {"all-reduce"} and {one.axes for one in sent} == {("data",)}
  elements = sum(one.times * array.elements for one in sent for array in one.arrays)
  assert parameters <= elements < parameters + 10  # and a few sums over the batch
  assert figures.collectives["all-reduce"]["bytes"] == sum(one.bytes for one in sent)
  assert not [text for text in figures.warnings if "sharding rule" in text]


@pytest.mark.slow
def test_hbm_carries_the_state_and_the_activations_at_least_once(shipped):
  config, program, figures, _ = shipped
  state = sum(program.argument_bytes[name] for name in ("parameters", "average", "optimizer"))
  model = config.model
  saved = 32 * 256 * model.depth * 9 * model.width * 2  # of a block: qkv, the output of attention, the two of the MLP
  assert 2 * state + saved < figures.hbm_bytes < 10 * (2 * state + saved)
  assert (program.images < figures.critical_batch) == any("images on a chip are fewer" in t for t in figures.warnings)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  """A small config on v5e:2x4, its state split over all chips: (config, directory, content, log, what was compiled)."""
  config, directory, seen = small(), tmp_path_factory.mktemp("plan") / "plan", []

  def compile_program(program, topology):
    seen.append((program, *compiled_with_text(program, topology)))
    return seen[-1][1]

  logger, handler = logging.getLogger("eqm_jax"), logging.StreamHandler(log := io.StringIO())
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(plan, "compile_program", compile_program)
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    (content,) = plan.plan(config, "v5e-8", str(directory))
    logger.removeHandler(handler)
    logger.setLevel(level)
  return config, directory, content, log.getvalue(), seen


def test_split_parameters_are_gathered_and_their_gradients_scattered(written):
  program, figures, module = written[4][0]
  split = [leaf for leaf in jax.tree.leaves(program.arguments[0].params) if not leaf.sharding.is_fully_replicated]
  assert len(split) >= 7 and program.argument_bytes["parameters"] < 0.2 * sum(4 * leaf.size for leaf in split)
  sent = costs.find_collectives(module, program.mesh)
  assert {one.axes for one in sent} == {("fsdp",)}
  moved = sum(one.bytes for one in sent if one.kind in ("all-gather", "collective-permute", "reduce-scatter"))
  once = sum(2 * leaf.size for leaf in split) * 7 / 8  # in bfloat16
  # All but the modulation, a third of them, are gathered once and their gradients scattered.
  assert 1.2 * once < moved + figures.collectives.get("all-reduce", {"bytes": 0})["bytes"] < 5 * once
  assert not [text for text in figures.warnings if "no sharding rule asks" in text and "together" not in text]


def test_resharding_that_no_rule_asks_for_is_warned_of():
  topology = open_slice("v5e:2x4")
  mesh = sharding.make_mesh(2, 4, 1, devices=topology.devices)
  first, second = (NamedSharding(mesh, spec) for spec in (PartitionSpec(sharding.BATCH), PartitionSpec(None, "fsdp")))
  x = jax.ShapeDtypeStruct((64, 512, 256), jnp.float32, sharding=first)

  def function(x):
    x = jax.lax.with_sharding_constraint(jnp.sin(x), second)
    return jax.lax.with_sharding_constraint(jnp.cumsum(x, axis=0), first)

  program = programs.training(small(), topology)
  program = dataclasses.replace(
    program,
    lower=lambda: jax.jit(function, out_shardings=first).lower(x),
    mesh=dict(mesh.shape),
    state=program.state.replace(params={"kernel": jax.ShapeDtypeStruct((512, 512), jnp.float32, sharding=first)}),
  )
  warnings = figures_lib.compile_program(program, topology).warnings
  resharded = [text for text in warnings if "which no sharding rule asks for" in text]
  assert resharded and "f32[" in resharded[0] and "MiB a step" in resharded[0]


def placed(shapes, shardings):
  return jax.tree.map(
    lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes, shardings
  )


def test_collectives_of_parameters_along_their_own_axes_are_explained():
  topology, config = open_slice("v5e:2x4"), load_config("imagenet256", "S/2")
  mesh = sharding.make_mesh(2, 2, 2, devices=topology.devices)
  shapes = parameter_shapes(DiT(**config.model))
  shardings = sharding.tree_shardings(shapes, config.sharding.rules, mesh)
  parameters = figures_lib.ParameterShapes(placed(shapes, shardings), mesh.shape)
  one = costs.Collective("all-gather", (), ("fsdp",), 2, 12, True, False, "op")

  def unexplained(dims, **changes):
    array = hlo.Array("f32", dims)
    return bool(figures_lib.resharding([dataclasses.replace(one, arrays=(array,), **changes)], parameters))

  assert not unexplained((1, 384, 768))  # mlp_in, still split along tensor
  assert not unexplained((384, 3, 3, 64))  # qkv of one block, the same
  assert unexplained((384, 768), axes=("data",))  # nothing is gathered along data
  assert not unexplained((384, 768), axes=("data",), kind="all-reduce")  # but gradients are summed
  assert unexplained((384, 2304), axes=("tensor",))  # modulation is not split along it
  assert unexplained((64, 256, 384))  # activations stay where they are
  assert not unexplained((64, 256, 384), axes=("tensor",), kind="all-reduce")
  assert unexplained((64, 256, 384), axes=("tensor",))
  assert unexplained((384, 768), axes=None)


def test_large_arrays_that_no_rule_splits_are_warned_of():
  topology, config = open_slice("v5e:2x4"), load_config("imagenet256", "S/2")
  shapes = programs.state_shapes(config, DiT(**config.model))

  def warnings(memory, **sizes):
    mesh = sharding.make_mesh(**{"data": 1, "fsdp": 1, "tensor": 1, **sizes}, devices=topology.devices)
    state = placed(shapes, sharding.state_shardings(shapes, config.sharding, mesh))
    return figures_lib.replicated(state, mesh.shape, memory)

  assert warnings(16e9, fsdp=8) == []
  config.sharding.rules = (("blocks/mlp_in/kernel", ()), *config.sharding.rules)
  assert [text.split(" lies")[0] for text in warnings(16e9, fsdp=8)] == [
    f"{tree}/blocks/mlp_in/kernel (27 MiB)" for tree in ("params", "ema_params", "opt_state/0/mu", "opt_state/0/nu")
  ]
  assert warnings(16e9, data=8) == []  # half a gigabyte of sixteen
  (text,) = warnings(1e9, data=8)
  assert "the whole state (0.5 GiB, 53 % of a chip's memory)" in text and "config.mesh.fsdp" in text


@pytest.mark.slow
def test_few_images_on_a_chip_are_warned_of(shipped):
  _, program, figures, _ = shipped
  few = dataclasses.replace(program, images=2)
  (text,) = figures_lib.small_batch(few, 8.4)
  assert text.startswith("2 images on a chip are fewer than the 8 ")
  assert figures_lib.small_batch(few, 1.9) == []


def test_a_plan_is_written_as_numbers_tables_and_pictures(written):
  config, directory, content, log, _ = written
  assert json.loads((directory / "v5e_2x4.json").read_text()) == json.loads(json.dumps(content))
  training, sampling = content["programs"]
  assert (training["mesh"], training["images_per_chip"]) == ({"data": 1, "fsdp": 8, "tensor": 1}, 8)
  assert sampling["images_per_chip"] == 8 and sampling["nfe_per_image"] == 249
  model = DiT(**config.model)
  assert sampling["flops"] == 8 * flops_lib.evaluation(model)
  assert sampling["argument_bytes"]["parameters"] == sum(4 * p.size for p in jax.tree.leaves(parameter_shapes(model)))
  rate = sampling["images_per_second_per_chip"]
  assert rate == pytest.approx(8 / (249 * sampling["bound_seconds"]))
  table = (directory / "v5e_2x4.md").read_text()
  assert table.startswith("# v5e-8 (v5e:2x4), 8 × TPU v5e") and "all-gather" in table
  assert f"{training['memory']['needed'] / 2**30:.2f} of 15.75" in table
  with Image.open(directory / "v5e_2x4.png") as picture:
    assert picture.width > 300
  assert "compiling for v5e:2x4" in log and "images on a chip are fewer" in log


def test_sums_over_slices_as_libtpu_makes_them_are_no_resharding():
  mesh = AbstractMesh((2, 2, 4, 1), sharding.AXES)
  leaf = jax.ShapeDtypeStruct((384, 768), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
  parameters = figures_lib.ParameterShapes({"kernel": leaf}, dict(mesh.shape))

  def warnings(kind, axes, op=""):
    one = costs.Collective(kind, tuple(hlo.arrays("bf16[900,8,128]")), axes, 2, 1, True, False, op)
    return figures_lib.resharding([one], parameters)

  assert not warnings("all-reduce", ("dcn_data",)) and not warnings("all-gather", ("data", "fsdp"))
  assert warnings("all-gather", ("data",), "model/mlp_in") and warnings("all-gather", ("dcn_data",), "model/mlp_in")
  parameters = figures_lib.ParameterShapes({"kernel": leaf}, {"data": 2, "fsdp": 4, "tensor": 1})
  assert warnings("all-gather", ("data",))  # of one slice


def stand_in(monkeypatch, memory_of):
  """Compilation by a formula: `memory_of` gives a training step's temporaries in bytes from its program's `about`."""
  compiled = []

  def compile_program(program, topology):
    compiled.append(program)
    needed = sum(program.argument_bytes.values()) + memory_of(program)
    seconds = 1 + program.rematerialised_flops / program.flops + 1e-6 * program.mesh["fsdp"]
    seconds -= 1e-7 if program.about.endswith("gather step") else 0
    bound = costs.Roofline(seconds, 0, 0, 0)
    return figures_lib.Figures(program, topology.chip, 1.0, {"needed": needed}, bound=bound)

  monkeypatch.setattr(plan, "compile_program", compile_program)
  return compiled, compile_program


def remat_of(program):
  return re.search(r"remat (\w+)", program.about)[1]


def with_memory(topology, usable: float):
  return dataclasses.replace(topology, chip=dataclasses.replace(topology.chip, usable_memory=usable))


def test_the_fastest_remat_that_fits_is_proposed_with_the_fastest_mesh_and_gather(monkeypatch):
  config, topology = load_config("imagenet256", "XL/2"), with_memory(open_slice("v5e-16"), 8 * 2**30)
  config.mesh.update(data=1, fsdp=16)
  config.sharding.gather = "layer"
  kept = {"none": 9, "dots": 7.2, "dots_no_batch": 4, "full": 1}  # GiB, beside a state of 10.06 / fsdp
  compiled, compile_program = stand_in(monkeypatch, lambda program: int(kept[remat_of(program)] * 2**30))
  found = plan.search_training(config, topology, compile_program(programs.training(config, topology), topology))
  # "dots" repeats no product, but 7.2 and a sixteenth of the state leave no reserve; an fsdp of 4 takes 2.5 beside 4.
  assert found.flags == (
    "--config.model.remat=dots_no_batch --config.mesh.data=-1 --config.mesh.fsdp=4 --config.sharding.gather=step "
    "--config.train.grad_accum_steps=1"
  )
  tried = {(dict(one.mesh)["fsdp"], one.about.rsplit(" ")[-1]) for one in compiled if remat_of(one) == "dots_no_batch"}
  assert found.figures.fits and tried == {(16, "layer"), (16, "step"), (4, "layer"), (4, "step")}
  assert len(compiled) == 7  # and the three other rematerialisations once
  proposed = load_config("imagenet256", "XL/2")
  for flag in found.flags.split():
    key, value = flag.removeprefix("--config.").split("=")
    proposed.update_from_flattened_dict({key: int(value) if value.lstrip("-").isdigit() else value})
  again = compile_program(programs.training(proposed, topology), topology)
  assert again.fits and again.needed == found.figures.needed


def test_what_fits_and_is_fastest_stays(monkeypatch):
  config, topology = load_config("imagenet256", "B/2"), open_slice("v5e-16")
  config.model.remat, config.mesh.fsdp = "none", 1
  _, compile_program = stand_in(monkeypatch, lambda program: 2**30)
  found = plan.search_training(config, topology, compile_program(programs.training(config, topology), topology))
  assert found.flags == "" and found.figures.fits


def test_gradients_are_accumulated_where_nothing_else_fits(monkeypatch):
  config, topology = load_config("imagenet256", "XL/2"), open_slice("v5e-16")
  config.train.batch_size = 4096

  grad_accum_steps = {}
  training = programs.training

  def counted(config, topology):
    program = training(config, topology)
    grad_accum_steps[id(program)] = config.train.grad_accum_steps
    return program

  monkeypatch.setattr(programs, "training", counted)
  _, compile_program = stand_in(monkeypatch, lambda program: 256 * 2**30 // grad_accum_steps[id(program)])
  found = plan.search_training(config, topology, compile_program(programs.training(config, topology), topology))
  assert found.figures.fits and "--config.train.grad_accum_steps=32" in found.flags and "remat=full" in found.flags


def test_a_state_that_fits_nowhere_is_reported(monkeypatch):
  config, topology = load_config("imagenet256", "XL/2"), with_memory(open_slice("v5e:2x2"), 2**30)
  _, compile_program = stand_in(monkeypatch, lambda program: 0)
  found = plan.search_training(config, topology, compile_program(programs.training(config, topology), topology))
  assert found.figures is None and "the state alone takes 2.5" in found.reason


@pytest.mark.slow  # compiles seven programs
def test_too_little_memory_leads_to_settings_that_fit(monkeypatch, tmp_path):
  """A chip that holds neither the activations nor the whole state: the proposed settings, compiled, fit."""
  config = small()
  config.model.update(remat="none", input_size=32)
  config.mesh.update(data=-1, fsdp=1)
  config.evaluation.num_samples = None
  topology = open_slice("v5e-8")
  current = figures_lib.compile_program(programs.training(config, topology), topology)
  monkeypatch.setattr(plan, "open_topologies", lambda names: [with_memory(topology, 0.8 * current.needed)])
  (content,) = plan.plan(config, "v5e-8", str(tmp_path))
  assert not content["programs"][0]["fits"]
  proposed = content["proposals"]["training"]
  assert proposed["flags"] and proposed["figures"]["fits"]
  assert proposed["figures"]["memory"]["needed"] <= 0.95 * 0.8 * current.needed
  best = min(one["bound_seconds"] for one in proposed["tried"] if one["fits"])
  assert proposed["figures"]["bound_seconds"] == best
  assert f"Proposed for training: `{proposed['flags']}`" in (tmp_path / "v5e_2x4.md").read_text()


@pytest.mark.slow
def test_a_program_that_xla_refuses_has_the_memory_that_it_needs():
  config, topology = load_config("imagenet256", "L/2"), open_slice("v5e-16")
  config.model.remat = "none"
  config.mesh.fsdp = 1
  figures = figures_lib.compile_program(programs.training(config, topology), topology)
  assert not figures.fits and figures.bound is None
  assert "exceeds available HBM (15.75G)" in figures.refused and 16 * 2**30 < figures.needed < 32 * 2**30


@pytest.mark.slow
def test_the_published_table_is_what_compiles(tmp_path):
  documented = json.loads((ROOT / "docs" / "plan.json").read_text())
  config = load_config("imagenet256", "XL/2")
  config.evaluation.num_samples = None
  (found,) = plan.plan(config, "v5e-16", str(tmp_path))
  (expected,) = (one for one in documented["XL/2"] if one["slice"] == "v5e-16")
  if found["versions"] != expected["versions"]:
    pytest.skip(f"the table is of {expected['versions']}")
  training, published = found["programs"][0], expected["programs"][0]
  del training["movers"]  # docs/plan.md lists them
  for row in (training, published):
    del row["compile_seconds"]
  assert training == published


def test_the_tables_of_the_page_are_made_from_the_published_numbers(tmp_path):
  tables = runpy.run_path(str(ROOT / "docs" / "plan_tables.py"))
  published, text = json.loads((ROOT / "docs" / "plan.json").read_text()), (ROOT / "docs" / "plan.md").read_text()
  for kind, beginning in (("rows", tables["ROWS"]), ("rates", tables["RATES"])):
    assert tables["with_table"](text, beginning, tables[kind](published)) == text
  # A plan of one program takes that program's place.
  first = json.loads(json.dumps(published["L/2"][1]))
  first["programs"] = [first["programs"][1] | {"images_per_second_per_chip": 7.0, "movers": []}]
  (tmp_path / "plan").mkdir()
  (tmp_path / "plan" / "slice.json").write_text(json.dumps(first))
  merged = json.loads(json.dumps(published))
  tables["merge"](merged, "L/2", tmp_path)
  assert [one["slice"] for one in merged["L/2"]] == list(tables["SLICES"])
  training, sampling, decoding = merged["L/2"][1]["programs"]
  assert training == published["L/2"][1]["programs"][0] and "movers" not in sampling
  rate = decoding["images_per_second_per_chip"]
  assert merged["L/2"][1]["images_per_second_per_chip"] == pytest.approx(7 * rate / (7 + rate))


def test_every_row_of_the_published_table_fits_with_the_shipped_config():
  documented = json.loads((ROOT / "docs" / "plan.json").read_text())
  assert set(documented) == {"B/2", "L/2", "XL/2"}
  for name, slices in documented.items():
    config = load_config("imagenet256", name)
    assert [one["slice"] for one in slices] == ["v5e-16", "v5e-256", "v6e-16", "v5p-16", "v4-32"]
    for one in slices:
      assert [program["program"] for program in one["programs"]] == ["training", "sampling", "decoding"]
      mesh = sharding.make_mesh(**config.mesh, devices=open_slice(one["slice"]).devices)
      training, sizes = one["programs"][0], {axis: size for axis, size in mesh.shape.items() if axis != sharding.SLICES}
      settings = f"remat {config.model.remat}, gather {config.sharding.gather}"
      assert training["mesh"] == sizes and settings in training["about"]
      assert training["images_per_chip"] * math.prod(mesh.shape.values()) == config.train.batch_size
      for program in one["programs"]:
        assert program["fits"] and program["memory"]["needed"] <= 0.95 * program["memory"]["usable"]
        assert np.isfinite(program["bound_seconds"])
