"""Results of a benchmark: as JSON, as Markdown tables, and compared with those of an earlier one."""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
import tabulate

from eqm_jax import hardware
from eqm_jax.benchmark import measure
from eqm_jax.io import read_json
from eqm_jax.training.validation import differences

KIND = "eqm_jax benchmark"
SAME_MACHINE = ("platform", "device", "devices", "processor", "instruction_sets", "cores")  # for a comparison
MOST_DIFFERENCES = 5  # in a message
TITLES = "case, unit, median, fastest – slowest, images/s, GFLOP, of peak, compiles, program, peak".split(", ")
LEGEND = (
  "GFLOP are those of one unit on all devices, by formula, or with a star by XLA's count; *of peak* compares them with "
  "the matrix products of the same precision. *program*: arguments, results and temporaries of the compiled program on "
  "one device. *peak*: the peak memory of the process during the case or, on accelerators, of a device so far."
)


@dataclasses.dataclass
class Row:
  """One measured case. Times are seconds of one unit, such as a training step."""

  name: str
  about: str  # what was measured, with its sizes
  unit: str
  timing: measure.Timing
  program: measure.Program | None = None  # where something was compiled
  compile_seconds: float | None = None  # where `program` does not have them
  images: float | None = None  # samples in a unit
  flops: float | None = None  # of a unit, on all devices
  flops_by: str | None = None  # "formula" (networks/flops.py), or "compiler", XLA's own count
  precision: str | None = None  # of its matrix products, which selects the peak to compare with
  process_bytes: int | None = None  # peak memory of the process during the case
  device_bytes: int | None = None  # peak memory of a device so far, on accelerators
  details: dict[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def seconds(self) -> float:
    return self.timing.median

  def entry(self, peaks: dict[str, dict[str, float]]) -> dict[str, Any]:
    """The entry of benchmark.json: the numbers that there are, and the rates beside the peaks."""
    turns = self.timing.turns
    entry = {"seconds": self.seconds, "fastest": min(turns), "slowest": max(turns)}
    entry |= {"turns": len(turns), "calls": self.timing.calls}
    if self.program:
      entry |= {"compile_seconds": self.program.compile_seconds, "program_bytes": self.program.bytes}
    fields = [field.name for field in dataclasses.fields(self) if field.name not in ("name", "timing", "program")]
    entry |= {name: getattr(self, name) for name in fields if getattr(self, name) is not None}
    if self.images:
      entry["images_per_second"] = self.images / self.seconds
    if self.flops and self.precision in peaks:
      entry["flops_per_second"] = self.flops / self.seconds
      entry["fraction_of_peak"] = entry["flops_per_second"] / peaks[self.precision]["flops_per_second"]
    return {name: value for name, value in entry.items() if value is not None}


def describe_machine(devices: Sequence[jax.Device]) -> dict[str, Any]:
  """Devices, processor and versions."""
  processor = hardware.processor()
  return {
    "platform": devices[0].platform,
    "device": devices[0].device_kind,
    "devices": len(devices),
    "processor": processor.name,
    "instruction_sets": list(processor.instruction_sets),
    "cores": hardware.cores(),
    "python": platform.python_version(),
    "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
    "xla_flags": os.environ.get("XLA_FLAGS", ""),
    "compilation_cache": jax.config.jax_compilation_cache_dir,  # with one, compile times are those of reading it
  }


def machine_sentence(machine: dict[str, Any]) -> str:
  """The machine in one line."""
  sets = ", ".join(machine["instruction_sets"]) or "vector instructions unknown"
  versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
  processor = f"{machine['processor']} ({sets}), {machine['cores']} cores"
  devices = "" if machine["platform"] == "cpu" else f"{machine['devices']} × {machine['device']}; "
  forced = f", {machine['devices']} forced devices" if not devices and machine["devices"] > 1 else ""
  flags = f"; XLA_FLAGS={machine['xla_flags'].strip()}" if machine["xla_flags"].strip() else ""
  return f"{devices}{processor}{forced}; {versions}{flags}"


def comparable_config(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """The config without the keys that change none of the rows."""
  content = json.loads(config.to_json())
  content["benchmark"].pop("sweeps")
  return content


def config_entries(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """The entries of benchmark.json about the config."""
  comparable = comparable_config(config)
  digest = hashlib.sha256(json.dumps(comparable, sort_keys=True).encode()).hexdigest()
  return {"config_sha256": digest, "config": comparable}


def line(row: Row) -> str:
  """A row as one line of a log."""
  entry = row.entry({})
  rate = f", {entry['images_per_second']:.4g} images/s" if "images_per_second" in entry else ""
  compiled = f", compiled in {entry['compile_seconds']:.1f} s" if "compile_seconds" in entry else ""
  return f"{row.name}: {_seconds(row.seconds)} per {row.unit}{rate}{compiled}"


def markdown(content: dict[str, Any]) -> str:
  """The tables of a benchmark."""
  rows = content["rows"]
  peaks = ", ".join(
    f"{name} {peak['flops_per_second'] / 1e9:.4g} GFLOP/s ({peak['side']} × {peak['side']})"
    for name, peak in content["peaks"].items()
  )
  parts = [machine_sentence(content["machine"]), f"Matrix products in this run: {peaks}. {LEGEND}"]
  parts.append(_table(TITLES, [_cells(name, row) for name, row in rows.items()]))
  descents = {name: row["details"] for name, row in rows.items() if "utilisation" in row["details"]}
  if descents:
    titles = ["batching", "NFE, mean (10 % – 90 %)", "executed NFE", "utilisation"]
    parts.append(_table(titles, [_descent_cells(name, details) for name, details in descents.items()]))
  notes = [f"- {name}: {row['about']}{_note(row['details'])}" for name, row in rows.items()]
  notes += [f"- {name}: left out, {reason}" for name, reason in content["skipped"].items()]
  if content["machine"]["compilation_cache"]:
    notes.append("- compile times: those of reading a cache (JAX_COMPILATION_CACHE_DIR), where it held the program")
  return "\n\n".join([*parts, "\n".join(notes)]) + "\n"


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  return tabulate.tabulate(rows, titles, tablefmt="github", disable_numparse=True)


def _cells(name: str, row: dict[str, Any]) -> list[str]:
  star = "\\*" if row.get("flops_by") == "compiler" else ""
  return [
    name,
    row["unit"],
    _seconds(row["seconds"]),
    f"{_seconds(row['fastest'])} – {_seconds(row['slowest'])}",
    f"{row['images_per_second']:.4g}" if "images_per_second" in row else "",
    f"{row['flops'] / 1e9:.4g}{star}" if "flops" in row else "",
    _percent(row),
    _seconds(row["compile_seconds"]) if "compile_seconds" in row else "",
    _bytes(row.get("program_bytes")),
    _bytes(row.get("device_bytes", row.get("process_bytes"))),
  ]


def _descent_cells(name: str, details: dict[str, Any]) -> list[str]:
  low, high = details["nfe_quantiles"]
  nfe = f"{details['nfe']:.1f} ({low:.0f} – {high:.0f})"
  return [name, nfe, f"{details['executed_nfe']:.1f}", f"{details['utilisation']:.2f}"]


def _note(details: dict[str, Any]) -> str:
  if "data_wait" in details:
    return f"; {100 * details['data_wait']:.1f} % of the time waiting for data"
  if "bytes_per_second" in details:
    return f"; {details['bytes_per_second'] / 1e6:.0f} MB/s"
  return ""


def _percent(row: dict[str, Any]) -> str:
  return f"{100 * row['fraction_of_peak']:.0f} %" if "fraction_of_peak" in row else ""


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
    ValueError: naming the differences.
  """
  machines = [(name, old["machine"].get(name), machine[name]) for name in SAME_MACHINE]
  changed = [entry for entry in machines if entry[1] != entry[2]] + list(differences(old["config"], config))
  if changed:
    shown = "; ".join(f"{name}: {was!r} in the file, {now!r} here" for name, was, now in changed[:MOST_DIFFERENCES])
    more = f"; and {len(changed) - MOST_DIFFERENCES} more" if len(changed) > MOST_DIFFERENCES else ""
    raise ValueError(
      f"--compare={path} is of another machine or config ({shown}{more}): measure that one anew, or add --compare_any "
      "to compare all the same"
    )


def comparison(old: dict[str, Any], new: dict[str, Any]) -> str:
  """A table of the ratios new/old of the common rows, below 1 where the new one is faster."""
  titles, rows = ["case", "old", "new", "new / old", "of peak, old", "of peak, new"], []
  for name in [name for name in new["rows"] if name in old["rows"]]:
    before, after = old["rows"][name], new["rows"][name]
    overlap = before["fastest"] <= after["slowest"] and after["fastest"] <= before["slowest"]
    ratio = f"{after['seconds'] / before['seconds']:.3f}" + (" (within the spread)" if overlap else "")
    times = [_seconds(before["seconds"]), _seconds(after["seconds"])]
    rows.append([name, *times, ratio, _percent(before), _percent(after)])
  for name in [name for name in new["peaks"] if name in old["peaks"]]:
    before, after = (content["peaks"][name]["flops_per_second"] for content in (old, new))
    cells = [f"{rate / 1e9:.4g} GFLOP/s" for rate in (before, after)]
    rows.append([f"matrix products, {name}", *cells, f"{before / after:.3f}", "", ""])
  unmatched = sorted(old["rows"].keys() ^ new["rows"].keys())
  return _table(titles, rows) + (f"\n\nOnly in one of them: {', '.join(unmatched)}" if unmatched else "")
