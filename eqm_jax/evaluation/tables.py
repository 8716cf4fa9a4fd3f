"""What evaluation.json holds, as Markdown tables."""

from typing import Any

# score → its column, digits, and where its uncertainty stands
SCORES = {
  "frechet": ("Fréchet", 3, "frechet_error"),
  "spatial_frechet": ("spatial Fréchet", 3, "spatial_frechet_error"),
  "inception_score": ("inception score", 2, "inception_score_std"),
  "kernel_distance": ("kernel distance", 4, "kernel_distance_std"),
  "precision": ("precision", 3, "precision_error"),
  "recall": ("recall", 3, "recall_error"),
}


def markdown(report: dict[str, Any]) -> str:
  """A table of the samplers, and one of all scores for each kind of features."""
  parts = [_samplers(report)]
  for name, about in report["features"].items():
    if name != "label_agreement":
      parts.append(_scores(name, about, report["rows"]))
  return "\n".join(parts)


def _samplers(report: dict[str, Any]) -> str:
  rows = report["rows"]
  extra = [name for name in ("label_agreement", "to_data", "from_data") if any(name in row for row in rows.values())]
  titles = ["sampler", "rule", "η", *(name.replace("_", " ") for name in extra)]
  lines = [_line([*titles, "evaluations (10 % – 90 %)", "hardware", "seconds", "images/s"])]
  lines.append("|" + "---|" * (len(titles) + 4))
  for name, row in rows.items():
    count = row["evaluations"]
    cells = [name, row["rule"], f"{row['eta']:.3g}" if "eta" in row else "–", *(f"{row[key]:.3f}" for key in extra)]
    cells.append(f"{count['mean']:.1f} ({count['q10']:.0f} – {count['q90']:.0f})")
    cells += [f"{row['hardware_ratio']:.2f}", f"{row['seconds']:.1f}", f"{row['images_per_second']:.0f}"]
    lines.append(_line(cells))
  return "\n".join(lines) + "\n"


def _scores(name: str, about: dict[str, Any], rows: dict[str, Any]) -> str:
  there = [score for score in SCORES if any(score in row["scores"][name] for row in rows.values())]
  told = ", ".join(f"{key} {_short(value)}" for key, value in about.items() if key not in ("name", "real"))
  halves = about["real"].get("frechet_between_halves")
  count = about["real"].get("samples", "an untold number of")  # ADM's and pytorch-fid's files do not say
  lines = [f"Features: {name}{f' ({told})' if told else ''}; {count} real samples"]
  if halves is not None:
    lines[0] += f"; Fréchet distance between halves of them {halves:.3f}"
  lines += ["", _line(["sampler", *(SCORES[score][0] for score in there)]), "|" + "---|" * (len(there) + 1)]
  for sampler, row in rows.items():
    lines.append(_line([sampler, *(_cell(row["scores"][name], score) for score in there)]))
  return "\n".join(lines) + "\n"


def _short(value: Any) -> str:
  return f"{value:.3f}" if isinstance(value, float) else str(value)[:12]


def _cell(found: dict[str, float], score: str) -> str:
  _, digits, uncertainty = SCORES[score]
  if score not in found:
    return "–"
  error = found.get(uncertainty)
  return f"{found[score]:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")


def _line(cells: list[str]) -> str:
  return "| " + " | ".join(cells) + " |"
