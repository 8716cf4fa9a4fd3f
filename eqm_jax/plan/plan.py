"""Plans: the figures of a config's programs on TPU slices, and settings that fit, as numbers, tables and a picture."""

import dataclasses
import importlib.metadata
import itertools
import logging
import os
from collections.abc import Sequence
from typing import Any

import ml_collections
import tabulate
from PIL import Image

from eqm_jax import plotting
from eqm_jax.io import write_json
from eqm_jax.networks.dit import REMAT_POLICIES, DiT
from eqm_jax.plan import programs
from eqm_jax.plan.figures import RESERVE, Figures, compile_program
from eqm_jax.plan.topology import Topology, open_topologies
from eqm_jax.training import sharding

GIB = 2**30

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Proposal:
  """Settings of a program that fit, or the reason why there are none."""

  flags: str  # to add to the command; "": the settings of the config are the best, or none fits
  figures: Figures | None  # with these settings; None: none fits
  tried: tuple[tuple[str, Figures], ...]  # (flags, figures) of everything compiled
  reason: str

  def numbers(self) -> dict[str, Any]:
    """The proposal as JSON."""
    figures = self.figures.numbers() if self.figures else None
    tried = [{"flags": flags, **one.numbers()} for flags, one in self.tried]
    return {"flags": self.flags, "reason": self.reason, "figures": figures, "tried": tried}


def plan(config: ml_collections.ConfigDict, names: str, directory: str, search: bool = False) -> list[dict[str, Any]]:
  """Plans a config on slices, and writes DIRECTORY/<slice>.json, .md and .png for each of them.

  Args:
    config: the whole config.
    names: of the slices, separated by commas: "v5e:4x4,v4-32".
    directory: of the files; it is made.
    search: search the cheapest settings of the training step even if those of the config fit; for a program that does
      not fit, settings that do are searched anyway.

  Returns:
    The contents of the JSON files.

  Raises:
    ValueError: before anything is compiled, for an unknown slice, without libtpu, or if the config does not fit one.
  """
  planned = [(topology, programs.programs_of(config, topology)) for topology in open_topologies(names)]
  os.makedirs(directory, exist_ok=True)
  one_chip: dict[tuple[str, str], Figures] = {}  # programs of one chip are the same on every slice of its kind
  contents = []
  for topology, requested in planned:
    figures, proposals = [], {}
    for program in requested:
      key = program.kind, topology.chip.name
      if program.kind == programs.TRAINING or key not in one_chip:
        one_chip[key] = compile_program(program, topology)
      figures.append(one_chip[key])
    figures = _with_state(config, figures)
    for one in figures:
      if one.program.kind == programs.TRAINING and (search or not one.fits):
        proposals[one.program.kind] = search_training(config, topology, one)
      elif not one.fits:
        proposals[one.program.kind] = search_batch(config, topology, one)
    contents.append(_write(topology, figures, proposals, directory))
  return contents


def search_training(config: ml_collections.ConfigDict, topology: Topology, current: Figures) -> Proposal:
  """The training step with the smallest bound of those that fit.

  Every rematerialisation is compiled on the config's mesh, or, where it does not fit there, on the one that splits the
  state most; then the fastest with the smallest `fsdp` that should do and with the largest, each with both kinds of
  gather: from one mesh to another memory changes by the state's share alone, since a chip's images stay as many. Where
  nothing fits, gradients are accumulated.
  `current` are the figures with the config's own settings.
  """
  log.info("searching settings of the training step for %s", topology.product)
  held, memory = _state_bytes(config, topology), (1 - RESERVE) * topology.chip.usable_memory
  fitting = [fsdp for fsdp in held if held[fsdp] < memory]
  if not fitting:
    least = min(held.values(), default=0) / GIB
    reason = f"the state alone takes {least:.2f} GiB of each chip on the mesh that splits it most: take more chips"
    return Proposal("", None, (), reason)
  gather = config.sharding.gather
  own = config.model.remat, current.program.mesh["fsdp"], config.train.grad_accum_steps, gather
  tried = {own: current}

  def attempt(*settings: str | int) -> Figures:
    if settings not in tried:
      changed = _changed(config, _settings(*settings))
      tried[settings] = compile_program(programs.training(changed, topology), topology)
    return tried[settings]

  def proposal(best: tuple[str, int, int, str] | None, reason: str) -> Proposal:
    compiled = tuple((_flags(_settings(*key)), figures) for key, figures in tried.items())
    return Proposal("" if best in (None, own) else _flags(_settings(*best)), tried.get(best), compiled, reason)

  def fastest() -> tuple[str, int, int, str] | None:
    return min((key for key in tried if tried[key].fits), key=lambda key: tried[key].bound.seconds, default=None)

  start, most = own[1] if own[1] in fitting else fitting[-1], fitting[-1]
  for remat in REMAT_POLICIES:
    figures = attempt(remat, start, own[2], gather)
    if not figures.fits and figures.needed - held[start] + held[most] <= memory:
      attempt(remat, most, own[2], gather)
  if best := fastest():
    rest = tried[best].needed - held[best[1]]
    least = next(fsdp for fsdp in fitting if rest + held[fsdp] <= memory)
    for fsdp, gather in itertools.product((least, most), sharding.GATHER):
      if fsdp > 1 or gather == best[3]:  # nothing is gathered where nothing is split
        attempt(best[0], fsdp, best[2], gather)
    return proposal(fastest(), "the smallest bound of those that fit")
  accumulated = 2 * own[2]
  while current.program.images % accumulated == 0:
    if attempt("full", most, accumulated, "layer").fits:
      return proposal(("full", most, accumulated, "layer"), "nothing fits without gradient accumulation")
    accumulated *= 2
  return proposal(None, "not even one image on a chip fits: take more chips")


def search_batch(config: ml_collections.ConfigDict, topology: Topology, current: Figures) -> Proposal:
  """Sampling or decoding with half as many images at a time, and half of that, until it fits."""
  sampling = current.program.kind == programs.SAMPLING
  section, make = ("evaluation", programs.sampling) if sampling else ("autoencoder", programs.decoding)
  tried, size = [], current.program.images // 2
  while size:
    settings = {f"{section}.batch_size": size}
    flags, figures = _flags(settings), compile_program(make(_changed(config, settings), topology), topology)
    tried.append((flags, figures))
    if figures.fits:
      return Proposal(flags, figures, tuple(tried), "the largest half, quarter, … of the batch that fits")
    size //= 2
  return Proposal("", None, tuple(tried), "not even one image at a time fits")


def _with_state(config: ml_collections.ConfigDict, figures: list[Figures]) -> list[Figures]:
  """The figures, with a warning where sampling during training does not fit beside the state."""
  if len(figures) == 1 or not config.evaluation.during_training.every:
    return figures
  training, sampling, *rest = figures
  state = sum(training.program.argument_bytes.values())
  warning = (
    f"during training its state ({state / GIB:.2f} GiB) lies beside these {sampling.needed / GIB:.2f} GiB, more than "
    "a chip has: lower evaluation.batch_size, or set evaluation.during_training.every = None"
  )
  if sampling.needed + state > sampling.chip.usable_memory:
    sampling = dataclasses.replace(sampling, warnings=(*sampling.warnings, warning))
  return [training, sampling, *rest]


def _state_bytes(config: ml_collections.ConfigDict, topology: Topology) -> dict[int, int]:
  """{fsdp: bytes of the state on a chip} on the meshes data × fsdp that the sharding rules and the batch accept."""
  shapes, others = programs.state_shapes(config, DiT(**config.model)), config.mesh.tensor * config.mesh.dcn_data
  held = {}
  for fsdp in range(1, len(topology.devices) // others + 1):
    if (len(topology.devices) // others) % fsdp == 0:
      mesh = sharding.make_mesh(**{**config.mesh, "data": -1, "fsdp": fsdp}, devices=topology.devices)
      try:
        sharding.batch_sharding(mesh, config.train.batch_size, config.train.grad_accum_steps)
        held[fsdp] = sharding.held(shapes, sharding.state_shardings(shapes, config.sharding, mesh))
      except ValueError:
        continue
  return held


def _changed(config: ml_collections.ConfigDict, settings: dict[str, Any]) -> ml_collections.ConfigDict:
  changed = config.copy_and_resolve_references()
  changed.update_from_flattened_dict(settings)
  return changed


def _flags(settings: dict[str, Any]) -> str:
  return " ".join(f"--config.{key}={value}" for key, value in settings.items())


def _settings(remat: str, fsdp: int, grad_accum_steps: int, gather: str) -> dict[str, Any]:
  settings = {"model.remat": remat, "mesh.data": -1, "mesh.fsdp": fsdp, "sharding.gather": gather}
  return settings | {"train.grad_accum_steps": grad_accum_steps}


def _write(topology: Topology, figures: list[Figures], proposals: dict[str, Proposal], directory: str):
  rows = [one.numbers() for one in figures]
  sampled = None  # samples that a chip makes and, where that is planned, decodes in a second
  if rows[1:] and all(one.bound for one in figures[1:]):
    sampled = 1 / sum(1 / one.images_per_second for one in figures[1:])
  content = {
    "slice": topology.product,
    "topology": topology.name,
    "chips": len(topology.devices),
    "chip": dataclasses.asdict(topology.chip),
    "versions": {name: importlib.metadata.version(name) for name in ("jax", "libtpu")},
    "programs": rows,
    "images_per_second_per_chip": sampled,
    "proposals": {kind: proposal.numbers() for kind, proposal in proposals.items()},
  }
  title = f"{topology.product} ({topology.name}), {len(topology.devices)} × {topology.chip.name}"
  columns, headers = list(map(cells_of, rows)), [topology.product, *(row["program"] for row in rows)]
  lines = [[label, *(column.get(label) for column in columns)] for label in max(columns, key=len)]
  text = [f"# {title}", _markdown(lines, headers), *map(_details, rows)]
  text += [f"Samples, with decoding: {sampled:.4g} images/s of a chip at the bounds."] if sampled else []
  for kind, one in proposals.items():
    tried = [{"settings": flags.replace("--config.", "")} | cells_of(figures.numbers()) for flags, figures in one.tried]
    text += [_proposed(kind, one), _markdown(tried, "keys")]
  path = os.path.join(directory, topology.name.replace(":", "_"))
  write_json(path + ".json", content)
  with open(path + ".md", "w", encoding="utf-8") as file:
    file.write("\n\n".join(text) + "\n")
  _picture(title, rows).save(path + ".png")
  log.info("%s", "\n\n".join(text))
  return content


def _proposed(kind: str, proposal: Proposal) -> str:
  if proposal.figures is None:
    return f"No settings of {kind} fit: {proposal.reason}."
  if not proposal.flags:
    return f"The settings of {kind} are the best of those tried ({proposal.reason})."
  seconds, needed = proposal.figures.bound.seconds, proposal.figures.needed / GIB
  return f"Proposed for {kind}: `{proposal.flags}` ({proposal.reason}): {needed:.2f} GiB, bound {1e3 * seconds:.1f} ms."


def cells_of(row: dict[str, Any]) -> dict[str, str]:
  """{column: text} of one program, from its `numbers`."""
  memory = {name: f"{size / GIB:.2f}" for name, size in row["memory"].items()}
  needed = f"{memory['needed']} of {memory['usable']}"
  cells = {
    "mesh": " ".join(f"{axis}={size}" for axis, size in row["mesh"].items() if size > 1) or "one chip",
    "images": str(row["images_per_chip"]),
    "arguments": memory.get("arguments"),
    "temporaries": memory.get("temporaries"),
    "HBM, GiB": needed if row["fits"] else f"**{needed}: does not fit**",
  }
  if "bound_seconds" not in row:
    return cells
  names = ("ms at 40 % MFU", "arithmetic, ms", "HBM, ms", "links beside, ms", "links alone, ms", "DCN, ms")
  seconds = dict(zip(names, (row["seconds_at_mfu"], *row["bound_parts"].values())))
  seconds["bound, ms"] = row["bound_seconds"]
  cells |= {"TFLOP": f"{row['flops'] / 1e12:.2f}"} | {name: f"{1e3 * one:.1f}" for name, one in seconds.items()}
  cells |= {"images/s of a chip": f"{row['images_per_second_per_chip']:.4g}"}
  return cells | {"compiled in s": f"{row['compile_seconds']:.0f}"}


def _markdown(rows: Sequence, headers: str | Sequence[str]) -> str:
  return tabulate.tabulate(rows, headers, tablefmt="github", missingval="–", disable_numparse=True)


def _details(row: dict[str, Any]) -> str:
  """Arguments, collectives and warnings of one program, as a list."""
  arguments = ", ".join(f"{name} {size / GIB:.3f}" for name, size in row["argument_bytes"].items())
  lines = [f"**{row['program']}**: {row['about']}", "", f"- arguments in GiB, without padding: {arguments}"]
  lines += [f"- XLA refuses it: {row['refused']}"] if row["refused"] else []
  for kind, sent in row.get("collectives", {}).items():
    total, synchronous = sent["bytes"] / 1e6, sent["synchronous_bytes"] / 1e6
    line = f"- {kind}: {sent['count']:.0f}, {total:.2f} MB out of a chip, {synchronous:.2f} MB of them synchronous"
    between = f"; {sent['dcn_bytes'] / 1e6:.2f} MB to other slices" if "dcn_bytes" in sent else ""
    lines.append(line + between)
  if row.get("estimated_cycles"):
    million = row["estimated_cycles"] / 1e6
    lines.append(f"- XLA's estimate: {million:.1f} million cycles one after another, without kernels and collectives")
  if "critical_batch_per_chip" in row:
    batch = row["critical_batch_per_chip"]
    lines.append(f"- critical batch: the arithmetic of {batch:.1f} images on a chip covers the traffic of any batch")
  lines += [f"- warning: {warning}" for warning in row["warnings"]]
  if row.get("movers"):
    lines += ["", f"What moves most of the {row['hbm_bytes'] / 1e9:.2f} GB of {row['program']} in HBM:", ""]
    lines.append(_markdown([_mover(one) for one in row["movers"]], "keys"))
  return "\n".join(lines)


def _mover(one: dict[str, Any]) -> dict[str, str]:
  """{column: text} of an instruction; of the operation in the model's code the last parts of its name."""
  parts = [part for part in one["op"].split("/") if part not in ("while", "body", "closed_call", "checkpoint")]
  return {
    "GB": f"{one['bytes'] / 1e9:.3f}",
    "times": f"{one['times']:g}",
    "instruction": one["name"],
    "result": one["result"],
    "of": "/".join(parts[-4:]),
  }


def _picture(title: str, rows: Sequence[dict[str, Any]]) -> Image.Image:
  """The memory of each program by kind, against the chip's."""
  figure, axes = plotting.figure(8, 1.2 + 0.6 * len(rows))
  names, left = [row["program"] for row in rows], [0.0] * len(rows)
  memory = [row["memory"] for row in rows]
  bars = {name: [sizes.get(name, 0) for sizes in memory] for name in ("arguments", "temporaries")}
  bars["results"] = [sizes.get("outputs", 0) - sizes.get("aliased", 0) for sizes in memory]
  bars["refused"] = [sizes["needed"] if row["refused"] else 0 for row, sizes in zip(rows, memory)]
  for (name, sizes), colour in zip(bars.items(), ("tab:blue", "tab:orange", "tab:green", "tab:red")):
    if name != "refused" or any(sizes):
      axes.barh(range(len(rows)), [size / GIB for size in sizes], left=left, color=colour, label=name)
      left = [start + size / GIB for start, size in zip(left, sizes)]
  axes.axvline(memory[0]["usable"] / GIB, color="black", linestyle="--", label="usable")
  axes.set_yticks(range(len(rows)), names)
  axes.invert_yaxis()
  axes.set(xlabel=f"GiB on a chip ({title})")
  axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
  return plotting.rendered(figure)
