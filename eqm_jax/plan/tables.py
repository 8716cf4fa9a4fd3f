"""A plan as numbers for files, as tables and as a picture."""

from collections.abc import Sequence
from typing import Any

from PIL import Image

from eqm_jax.evaluation import pictures
from eqm_jax.plan import roofline
from eqm_jax.plan.compiled import Figures

GIB = 2**30
NONE = "–"


def numbers(figures: Figures) -> dict[str, Any]:
  """What is known of a program, as JSON has it: bytes, seconds and operations of one chip and one unit."""
  program, chip = figures.program, figures.chip
  found = {
    "program": program.kind,
    "about": program.about,
    "mesh": program.mesh,
    "images_per_chip": program.images,
    "evaluations_per_image": program.evaluations,
    "compile_seconds": round(figures.seconds, 1),
    "fits": figures.fits,
    "memory": {**figures.memory, "needed": figures.needed, "usable": chip.usable_memory, "stated": chip.memory},
    "argument_bytes": program.arguments,
    "refused": figures.refused,
    "warnings": list(figures.warnings),
  }
  if figures.bound is None:
    return found
  sent, units = figures.collectives.values(), program.units
  return found | {
    "flops": figures.operations,
    "flops_done_again": program.again,
    "mfu": roofline.MFU,
    "flops_per_second_at_mfu": roofline.MFU * chip.flops,
    "seconds_at_mfu": figures.seconds_at_mfu,
    "hbm_bytes": figures.hbm_bytes,
    "link_bytes": {
      "asynchronous": sum(one["bytes"] - one["synchronous_bytes"] for one in sent) / units,
      "synchronous": sum(one["synchronous_bytes"] for one in sent) / units,
    },
    "collectives": figures.collectives,
    "bound_seconds": figures.bound.seconds,
    "bound_parts": {
      "arithmetic": figures.bound.arithmetic,
      "hbm": figures.bound.memory,
      "links_asynchronous": figures.bound.overlapped,
      "links_synchronous": figures.bound.exposed,
    },
    "limit": figures.bound.limit,
    "images_per_second_per_chip": figures.images_per_second,
    "critical_batch_per_chip": figures.critical_batch,
  }


def cells(told: dict[str, Any]) -> dict[str, str]:
  """One program for a reader, by what each number is; `told` as `numbers` gives it."""
  memory = {name: size / GIB for name, size in told["memory"].items()}
  needed = f"{memory['needed']:.2f} of {memory['usable']:.2f}"
  found = {
    "mesh": " ".join(f"{axis}={size}" for axis, size in told["mesh"].items() if size > 1) or "one chip",
    "images": str(told["images_per_chip"]),
    "arguments": f"{memory['arguments']:.2f}" if "arguments" in memory else NONE,
    "temporaries": f"{memory['temporaries']:.2f}" if "temporaries" in memory else NONE,
    "HBM, GiB": needed if told["fits"] else f"**{needed}: does not fit**",
  }
  if "bound_seconds" not in told:
    return found
  parts = told["bound_parts"]
  return found | {
    "TFLOP": f"{told['flops'] / 1e12:.2f}",
    "ms at 40 % MFU": f"{1e3 * told['seconds_at_mfu']:.1f}",
    "arithmetic, ms": f"{1e3 * parts['arithmetic']:.1f}",
    "HBM, ms": f"{1e3 * parts['hbm']:.1f}",
    "links beside, ms": f"{1e3 * parts['links_asynchronous']:.1f}",
    "links alone, ms": f"{1e3 * parts['links_synchronous']:.1f}",
    "bound, ms": f"{1e3 * told['bound_seconds']:.1f}",
    "images/s of a chip": f"{told['images_per_second_per_chip']:.4g}",
    "compiled in s": f"{told['compile_seconds']:.0f}",
  }


def overview(rows: Sequence[tuple[dict[str, str], dict[str, Any]]]) -> str:
  """One line a program: what it is called, {column: text}, and what `numbers` gives of it."""
  lines = [{**names, **cells(told)} for names, told in rows]
  columns = max(lines, key=len)
  table = [columns, ["---"] * len(columns), *([line.get(column, NONE) for column in columns] for line in lines)]
  return "\n".join(f"| {' | '.join(line)} |" for line in table)


def sheet(title: str, programs: Sequence[dict[str, Any]]) -> str:
  """One column a program, for a terminal."""
  told = [cells(program) for program in programs]
  labels = list(max(told, key=len))
  lines = [[title, *(program["program"] for program in programs)]]
  lines += [[label, *(column.get(label, NONE) for column in told)] for label in labels]
  widths = [max(map(len, column)) for column in zip(*lines)]
  lines.insert(1, ["-" * width for width in widths])
  return "\n".join(f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths))} |" for line in lines)


def details(told: dict[str, Any]) -> str:
  """Arguments, collectives and warnings of one program, as a list."""
  parts = ", ".join(f"{name} {size / GIB:.3f}" for name, size in told["argument_bytes"].items())
  lines = [f"**{told['program']}**: {told['about']}", "", f"- arguments in GiB, without padding: {parts}"]
  if told["refused"]:
    lines.append(f"- XLA refuses it: {told['refused']}")
  for kind, sent in told.get("collectives", {}).items():
    lines.append(
      f"- {kind}: {sent['count']:.0f}, {sent['bytes'] / 1e6:.2f} MB out of a chip, "
      f"{sent['synchronous_bytes'] / 1e6:.2f} MB of them synchronous"
    )
  if "critical_batch_per_chip" in told:
    batch = told["critical_batch_per_chip"]
    lines.append(f"- the arithmetic of {batch:.1f} images on a chip covers what moves however small the batch is")
  lines += [f"- warning: {text}" for text in told["warnings"]]
  return "\n".join(lines)


def picture(chip: str, programs: Sequence[dict[str, Any]]) -> Image.Image:
  """The memory of each program by kind, against the chip's."""
  drawn, axes = pictures.figure(8, 1.2 + 0.6 * len(programs))
  told = set()
  for place, program in enumerate(programs):
    memory = program["memory"]
    results = memory.get("outputs", 0) - memory.get("aliased", 0)
    sizes = {name: memory.get(name, 0) for name in ("arguments", "temporaries")} | {"results": results}
    sizes |= {"refused": memory["needed"]} if program["refused"] else {}
    left = 0.0
    for (name, size), colour in zip(sizes.items(), ("tab:blue", "tab:orange", "tab:green", "tab:red")):
      axes.barh(place, size / GIB, left=left, color=colour, label=None if name in told else name)
      left += size / GIB
      told.add(name)
  axes.axvline(programs[0]["memory"]["usable"] / GIB, color="black", linestyle="--", label="usable")
  axes.set_yticks(range(len(programs)), [program["program"] for program in programs])
  axes.invert_yaxis()
  axes.set(xlabel=f"GiB on a chip ({chip})")
  axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
  return pictures.rendered(drawn)
