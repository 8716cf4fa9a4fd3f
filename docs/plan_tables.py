"""Puts plans into docs/plan.json, and the tables of docs/plan.md that are made from it.

After the three commands of docs/plan.md, from the repository's root:

    python docs/plan_tables.py B/2=runs/plan_b2 L/2=runs/plan_l2 XL/2=runs/plan_xl2

Programs that a directory has replace those of the same model and slice; the others stay.
"""

import json
import pathlib
import sys

from eqm_jax.io import write_json
from eqm_jax.plan import plan

DOCS = pathlib.Path(__file__).parent
SLICES = ("v5e-16", "v5e-256", "v6e-16", "v5p-16", "v4-32")
ROWS, RATES = "| model | slice | program |", "| model | v5e-16 | v5e-256 |"  # how the two tables begin


def merge(published: dict, model: str, directory: pathlib.Path):
  """Replaces the programs of a model by those of DIRECTORY/plan/*.json."""
  for file in sorted((directory / "plan").glob("*.json")):
    content = json.loads(file.read_text(encoding="utf-8"))
    slices = published.setdefault(model, [])
    old = next((one for one in slices if one["slice"] == content["slice"]), None)
    kept = {row["program"]: row for row in old["programs"]} if old else {}
    for row in content["programs"]:
      kept[row["program"]] = {key: value for key, value in row.items() if key != "movers"}
    content |= {"programs": list(kept.values()), "proposals": {}}
    rates = [row["images_per_second_per_chip"] for row in content["programs"][1:]]
    content["images_per_second_per_chip"] = 1 / sum(1 / rate for rate in rates) if rates else None
    slices[:] = [one for one in slices if one is not old] + [content]
    slices.sort(key=lambda one: SLICES.index(one["slice"]))


def rows(published: dict) -> list[dict[str, str]]:
  """One row for each program."""
  return [
    {"model": model, "slice": one["slice"], "program": row["program"]} | plan.cells_of(row)
    for model, slices in published.items()
    for one in slices
    for row in one["programs"]
  ]


def rates(published: dict) -> list[dict[str, str]]:
  """Samples per second of one chip, of each model on each slice."""
  return [
    {"model": model} | {one["slice"]: f"{one['images_per_second_per_chip']:.3g}" for one in slices}
    for model, slices in published.items()
  ]


def with_table(text: str, beginning: str, table: list[dict[str, str]]) -> str:
  """The text with another table in the place of the one that begins so."""
  lines = text.split("\n")
  start = next(number for number, line in enumerate(lines) if line.startswith(beginning))
  end = next(number for number in range(start, len(lines)) if not lines[number].startswith("|"))
  columns = list(max(table, key=len))
  cells = [columns, ["---"] * len(columns), *([row.get(column) or "–" for column in columns] for row in table)]
  lines[start:end] = ["| " + " | ".join(row) + " |" for row in cells]
  return "\n".join(lines)


def main(arguments: list[str]):
  published = json.loads((DOCS / "plan.json").read_text(encoding="utf-8"))
  for argument in arguments:
    model, _, directory = argument.partition("=")
    merge(published, model, pathlib.Path(directory))
  write_json(str(DOCS / "plan.json"), published)
  page = DOCS / "plan.md"
  text = with_table(page.read_text(encoding="utf-8"), ROWS, rows(published))
  page.write_text(with_table(text, RATES, rates(published)), encoding="utf-8")


if __name__ == "__main__":
  main(sys.argv[1:])
