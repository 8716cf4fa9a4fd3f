"""Compiles what a config runs for TPU slices that are not there, and tells what each program takes."""

import dataclasses
import importlib.metadata
import logging
import os
from typing import Any

import ml_collections

from eqm_jax.files import write_json
from eqm_jax.plan import programs, propose, tables
from eqm_jax.plan.compiled import Figures, compile_program
from eqm_jax.plan.topology import Topology, open_topologies

log = logging.getLogger(__name__)


def plan(config: ml_collections.ConfigDict, names: str, directory: str, search: bool = False) -> list[dict[str, Any]]:
  """Plans a config on slices, and writes for each of them DIRECTORY/<slice>.json, .md and .png.

  Where a program does not fit, settings that do are looked for, which compiles it several times more.

  Args:
    config: the whole config.
    names: of the slices, with commas between them: "v5e:4x4,v4-32".
    directory: made if it is not there.
    search: look for the cheapest settings of the training step even if those of the config fit.

  Returns:
    What the files hold, one for each slice.

  Raises:
    ValueError: before anything is compiled, if a slice is not known, libtpu is missing, or the config does not fit a
      slice: a mesh or batch that does not divide, a row that cannot be drawn.
  """
  topologies = open_topologies(names)
  planned = [(topology, programs.of(config, topology)) for topology in topologies]
  os.makedirs(directory, exist_ok=True)
  known: dict[tuple[str, str], Figures] = {}  # programs of one chip are the same on every slice of its kind
  written = []
  for topology, wanted in planned:
    rows = []
    for program in wanted:
      key = program.kind, topology.chip.name
      found = known.get(key) if program.kind != programs.TRAINING else None
      rows.append(found or compile_program(program, topology))
      known[key] = rows[-1]
    rows = _beside_training(config, rows)
    proposals = _proposals(config, topology, rows, search)
    written.append(_write(topology, rows, proposals, directory))
  return written


def _beside_training(config: ml_collections.ConfigDict, rows: list[Figures]) -> list[Figures]:
  """A warning where samples are drawn during training, and do not fit beside the state."""
  state = sum(rows[0].program.arguments.values())
  draws = len(rows) > 1 and config.evaluation.during_training.every
  if not draws or rows[1].needed + state <= rows[1].chip.usable_memory:
    return rows
  text = (
    f"during training its state ({state / 2**30:.2f} GiB) lies beside these {rows[1].needed / 2**30:.2f} GiB, which is "
    "more than a chip has: lower evaluation.batch_size, or set evaluation.during_training.every = 0"
  )
  return [rows[0], dataclasses.replace(rows[1], warnings=(*rows[1].warnings, text)), *rows[2:]]


def _proposals(config, topology: Topology, rows: list[Figures], search: bool) -> dict[str, propose.Proposal]:
  found = {}
  for row in rows:
    if row.program.kind == programs.TRAINING and (search or not row.fits):
      log.info("looking for settings of the training step on %s", topology.product)
      found[row.program.kind] = propose.training(config, topology, row)
    elif not row.fits:
      found[row.program.kind] = propose.batch(config, topology, row)
  return found


def _write(
  topology: Topology, rows: list[Figures], proposals: dict[str, propose.Proposal], directory: str
) -> dict[str, Any]:
  told = [tables.numbers(row) for row in rows]
  drawn = _drawn(rows[1:])
  content = {
    "slice": topology.product,
    "topology": topology.name,
    "chips": len(topology.devices),
    "chip": dataclasses.asdict(topology.chip),
    "versions": {name: importlib.metadata.version(name) for name in ("jax", "libtpu")},
    "programs": told,
    "images_per_second_per_chip": drawn,
    "proposals": {
      kind: {
        "flags": proposal.flags,
        "reason": proposal.reason,
        "figures": tables.numbers(proposal.figures) if proposal.figures else None,
        "tried": [{"flags": flags, **tables.numbers(figures)} for flags, figures in proposal.tried],
      }
      for kind, proposal in proposals.items()
    },
  }
  title = f"{topology.product} ({topology.name}), {len(topology.devices)} × {topology.chip.name}"
  text = [tables.sheet(topology.product, told), *map(tables.details, told)]
  text += [f"Samples, drawn and decoded: {drawn:.4g} images/s of a chip at the bounds."] if drawn else []
  for kind, proposal in proposals.items():
    tried = [({"settings": flags.replace("--config.", "")}, tables.numbers(found)) for flags, found in proposal.tried]
    text += [_told(kind, proposal), tables.overview(tried)]
  text = "\n\n".join([f"# {title}", *text])
  path = os.path.join(directory, topology.file)
  write_json(path + ".json", content)
  with open(path + ".md", "w", encoding="utf-8") as file:
    file.write(text + "\n")
  tables.picture(title, told).save(path + ".png")
  log.info("%s", text)
  return content


def _drawn(rows: list[Figures]) -> float | None:
  """Samples that a chip draws and, where that is planned, decodes in a second at the bounds."""
  if not rows or not all(row.bound for row in rows):
    return None
  return 1 / sum(1 / row.images_per_second for row in rows)


def _told(kind: str, proposal: propose.Proposal) -> str:
  if proposal.figures is None:
    return f"No settings of {kind} fit: {proposal.reason}."
  if not proposal.flags:
    return f"The settings of {kind} are the best of those tried ({proposal.reason})."
  seconds, needed = proposal.figures.bound.seconds, proposal.figures.needed / 2**30
  return f"Proposed for {kind}: `{proposal.flags}` ({proposal.reason}): {needed:.2f} GiB, bound {1e3 * seconds:.1f} ms."
