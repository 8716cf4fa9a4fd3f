"""What was measured, as JSON, as tables, and beside an earlier measurement."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import ml_collections

from eqm_jax.benchmark import machine as machine_lib
from eqm_jax.benchmark import measure
from eqm_jax.files import read_json
from eqm_jax.training.checks import differences

KIND = "eqm_jax benchmark"
TITLES = (
  "case",
  "unit",
  "median",
  "fastest – slowest",
  "images/s",
  "GFLOP",
  "of peak",
  "compiles",
  "program",
  "peak",
)


@dataclasses.dataclass(frozen=True)
class Row:
  """One measured case. Times are seconds of one unit, such as a training step."""

  name: str
  about: str  # what was measured, with its sizes
  unit: str
  seconds: float  # the median of the turns
  fastest: float
  slowest: float
  turns: int
  calls: int  # in each turn
  images: float | None = None  # samples in a unit
  compile_seconds: float | None = None
  flops: float | None = None  # of a unit, on all devices
  flops_by: str | None = None  # "formula" (networks/flops.py), or "compiler", XLA's own count
  precision: str | None = None  # of its matrix products: which peak it is compared with
  program_bytes: int | None = None  # arguments, results and temporaries of the program on one device
  process_bytes: int | None = None  # the most that the process held at one time during the case
  device_bytes: int | None = None  # the most that a device has held so far, on accelerators
  details: dict[str, Any] = dataclasses.field(default_factory=dict)


def make_row(
  name: str, about: str, unit: str, timing: measure.Timing, program: measure.Program | None = None, **others: Any
) -> Row:
  """A row from a timing and, where something was compiled, its program."""
  compiled = {"compile_seconds": program.compile_seconds, "program_bytes": program.bytes} if program else {}
  return Row(
    name=name,
    about=about,
    unit=unit,
    seconds=timing.median,
    fastest=min(timing.turns),
    slowest=max(timing.turns),
    turns=len(timing.turns),
    calls=timing.calls,
    **{**compiled, **others},
  )


def document(
  config: ml_collections.ConfigDict,
  machine: dict[str, Any],
  memory: dict[str, int | None],
  peaks: dict[str, dict[str, float]],
  rows: Sequence[Row],
  skipped: dict[str, str],
) -> dict[str, Any]:
  """The content of benchmark.json."""
  comparable = comparable_config(config)
  digest = hashlib.sha256(json.dumps(comparable, sort_keys=True).encode()).hexdigest()
  return {
    "kind": KIND,
    "machine": machine,
    "config_sha256": digest,
    "config": comparable,
    "memory": memory,
    "peaks": peaks,
    "rows": {row.name: _numbers(row, peaks) for row in rows},
    "skipped": skipped,
    "sweeps": {},
  }


def comparable_config(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """The config without what changes none of the rows."""
  content = json.loads(config.to_json())
  content["benchmark"].pop("sweeps")
  return content


def _numbers(row: Row, peaks: dict[str, dict[str, float]]) -> dict[str, Any]:
  numbers = {name: value for name, value in dataclasses.asdict(row).items() if name != "name" and value is not None}
  if row.images:
    numbers["images_per_second"] = row.images / row.seconds
  if row.flops and row.precision in peaks:
    numbers["flops_per_second"] = row.flops / row.seconds
    numbers["fraction_of_peak"] = numbers["flops_per_second"] / peaks[row.precision]["flops_per_second"]
  return numbers


def line(row: Row) -> str:
  """A row as one line of a log."""
  rate = f", {row.images / row.seconds:.4g} images/s" if row.images else ""
  compiled = f", compiled in {row.compile_seconds:.1f} s" if row.compile_seconds is not None else ""
  return f"{row.name}: {_seconds(row.seconds)} per {row.unit}{rate}{compiled}"


def markdown(content: dict[str, Any]) -> str:
  """The tables of a benchmark."""
  rows = content["rows"]
  parts = [machine_lib.sentence(content["machine"]), _peaks(content)]
  parts.append(table(TITLES, [_cells(name, row) for name, row in rows.items()]))
  batching = {name: row["details"] for name, row in rows.items() if "utilisation" in row["details"]}
  if batching:
    titles = ["batching", "NFE, mean (10 % – 90 %)", "executed NFE", "utilisation"]
    cells = [
      [
        name,
        f"{details['nfe']:.1f} ({details['nfe_quantiles'][0]:.0f} – {details['nfe_quantiles'][1]:.0f})",
        f"{details['executed_nfe']:.1f}",
        f"{details['utilisation']:.2f}",
      ]
      for name, details in batching.items()
    ]
    parts.append(table(titles, cells))
  others = [_other(name, row["details"]) for name, row in rows.items()]
  notes = [f"- {name}: {row['about']}{other}" for (name, row), other in zip(rows.items(), others)]
  notes += [f"- {name}: left out, {reason}" for name, reason in content["skipped"].items()]
  if content["machine"]["compilation_cache"]:
    notes.append("- compile times: those of reading a cache (JAX_COMPILATION_CACHE_DIR), where it held the program")
  return "\n\n".join([*parts, "\n".join(notes)]) + "\n"


def _peaks(content: dict[str, Any]) -> str:
  peaks = [
    f"{name} {peak['flops_per_second'] / 1e9:.4g} GFLOP/s ({peak['side']} × {peak['side']})"
    for name, peak in content["peaks"].items()
  ]
  return (
    f"Matrix products in this run: {', '.join(peaks)}. GFLOP are those of one unit on all devices, by formula, with a "
    "star by XLA's count; *of peak* compares them with the matrix products of the same precision. *program* is what "
    "the compiled program holds on a device, arguments, results and temporaries; *peak* the most that the process held "
    "during the case or, on accelerators, that a device has held so far."
  )


def _cells(name: str, row: dict[str, Any]) -> list[str]:
  star = "\\*" if row.get("flops_by") == "compiler" else ""
  return [
    name,
    row["unit"],
    _seconds(row["seconds"]),
    f"{_seconds(row['fastest'])} – {_seconds(row['slowest'])}",
    f"{row['images_per_second']:.4g}" if "images_per_second" in row else "",
    f"{row['flops'] / 1e9:.4g}{star}" if "flops" in row else "",
    f"{100 * row['fraction_of_peak']:.0f} %" if "fraction_of_peak" in row else "",
    _seconds(row["compile_seconds"]) if "compile_seconds" in row else "",
    _bytes(row.get("program_bytes")),
    _bytes(row.get("device_bytes", row.get("process_bytes"))),
  ]


def _other(name: str, details: dict[str, Any]) -> str:
  if "data_wait" in details:
    return f"; {100 * details['data_wait']:.1f} % of the time waiting for data"
  if "bytes_per_second" in details:
    return f"; {details['bytes_per_second'] / 1e6:.0f} MB/s"
  return ""


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A Markdown table."""
  lines = ["| " + " | ".join(cells) + " |" for cells in (titles, *rows)]
  return "\n".join([lines[0], "|" + "---|" * len(titles), *lines[1:]])


def _seconds(seconds: float) -> str:
  if seconds < 1e-3:
    return f"{1e6 * seconds:.3g} µs"
  return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _bytes(count: int | None) -> str:
  if count is None:
    return ""
  return f"{count / 2**20:.4g} MiB" if count < 2**30 else f"{count / 2**30:.2f} GiB"


def read(path: str) -> dict[str, Any]:
  """An earlier benchmark.json.

  Raises:
    ValueError: if it is missing, or is not such a file.
  """
  try:
    content = read_json(path)
  except OSError as error:
    raise ValueError(f"--compare={path}: cannot be read ({error.strerror}): give a benchmark.json") from error
  if not isinstance(content, dict) or content.get("kind") != KIND:
    raise ValueError(f"--compare={path}: not the result of a benchmark: give a benchmark.json of --mode=benchmark")
  return content


def check_comparable(path: str, old: dict[str, Any], machine: dict[str, Any], config: dict[str, Any]):
  """Refuses to compare measurements of different machines or configs.

  Raises:
    ValueError: naming what differs.
  """
  differing = [
    f"{name}: {old['machine'].get(name)!r} in the file, {machine[name]!r} here"
    for name in machine_lib.SAME_MACHINE
    if old["machine"].get(name) != machine[name]
  ]
  differing += [f"{name}: {was!r} in the file, {now!r} here" for name, was, now in differences(old["config"], config)]
  if differing:
    shown = "; ".join(differing[:5]) + (f"; and {len(differing) - 5} more" if len(differing) > 5 else "")
    raise ValueError(
      f"--compare={path} is of another machine or config ({shown}): measure that one anew, or add --compare_any to "
      "compare all the same"
    )


def comparison(old: dict[str, Any], new: dict[str, Any]) -> str:
  """The ratio new/old of every row that both have, below 1 where the new one is faster."""
  titles, rows = ["case", "old", "new", "new / old", "of peak, old", "of peak, new"], []
  for name in [name for name in new["rows"] if name in old["rows"]]:
    before, after = old["rows"][name], new["rows"][name]
    overlap = before["fastest"] <= after["slowest"] and after["fastest"] <= before["slowest"]
    ratio = f"{after['seconds'] / before['seconds']:.3f}" + (" (within the spread)" if overlap else "")
    shares = [f"{100 * row['fraction_of_peak']:.0f} %" if "fraction_of_peak" in row else "" for row in (before, after)]
    rows.append([name, _seconds(before["seconds"]), _seconds(after["seconds"]), ratio, *shares])
  for name in [name for name in new["peaks"] if name in old["peaks"]]:
    before, after = (content["peaks"][name]["flops_per_second"] for content in (old, new))
    cells = [f"{rate / 1e9:.4g} GFLOP/s" for rate in (before, after)]
    rows.append([f"matrix products, {name}", *cells, f"{before / after:.3f}", "", ""])
  lost = sorted(old["rows"].keys() ^ new["rows"].keys())
  return table(titles, rows) + (f"\n\nOnly in one of them: {', '.join(lost)}" if lost else "")
