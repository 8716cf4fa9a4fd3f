"""Pages of the documentation site that are made when it is built: modes, config keys, and the files of the root.

MkDocs calls `on_files` and `on_page_markdown`. The configs are read as text, so that the page shows their comments.
"""

import ast
import dataclasses
import io
import pathlib
import re
import tokenize
from collections.abc import Iterator

from mkdocs.structure.files import File

from eqm_jax import modes

ROOT = pathlib.Path(__file__).parents[1]
FROM_ROOT = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
FUNCTION_TITLES = {"sampler": "samplers.NAME", "prepare": "prepare", "fit": "prepare.fit", "report": "report"}
PROCESSES = {"one": "one process", "many": "one process or many, which share the work"}
CHECKPOINTS = {
  "needs": "the workdir's model, or that of `--checkpoint`",
  "takes": "a model if there is one, the workdir's or that of `--checkpoint`",
  "none": "no model",
}


def on_files(files, config):
  """Adds the pages that no file of docs/ holds."""
  pages = {"modes.md": modes_page(), "config_keys.md": config_keys_page()}
  pages |= {name: (ROOT / path).read_text(encoding="utf-8") for name, path in FROM_ROOT.items()}
  for name, content in pages.items():
    files.append(File.generated(config, name, content=content))
  return files


def on_page_markdown(markdown, page, config, files):
  """Points links to files outside docs/ at pages of the site, where there is one; else leaves their text."""
  here = FROM_ROOT.get(page.file.src_uri)
  base = ROOT if here else (ROOT / "docs" / page.file.src_uri).parent
  depth = page.file.src_uri.count("/")

  def replaced(match: re.Match) -> str:
    text, target, anchor = match.groups()
    if re.match(r"[a-z]+:", target):
      return match[0]
    path = (base / target).resolve()
    site_name = site_path(path)
    if site_name is None:
      return f"`{path.relative_to(ROOT)}`" if path.is_relative_to(ROOT) else text
    return f"[{text}]({'../' * depth}{site_name}{anchor or ''})"

  return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)#\s]+)(#[\w-]*)?\)", replaced, markdown)


def site_path(path: pathlib.Path) -> str | None:
  """Where the site has a file of the repository; None: nowhere."""
  root_pages = {(ROOT / name).resolve(): page for page, name in FROM_ROOT.items()}
  root_pages[ROOT / "README.md"] = "index.md"
  root_pages[ROOT / "configs" / "base.py"] = "config_keys.md"
  root_pages[ROOT / "eqm_jax" / "modes" / "__init__.py"] = "modes.md"
  if path in root_pages:
    return root_pages[path]
  if path.is_relative_to(ROOT / "docs"):
    return path.relative_to(ROOT / "docs").as_posix()
  return None


def modes_page() -> str:
  """What each --mode does, needs and writes."""
  command = "python -m eqm_jax.main --config=CONFIG --workdir=DIR --mode=MODE"
  lines = ["# Modes", "", f"`{command}`, or `eqm_jax.run(MODE, config, DIR)` in Python.", ""]
  for mode in map(modes.declaration, modes.NAMES):
    flags = ", ".join(f"`--{flag}`" for flag in mode.all_flags) or "none"
    lines += [
      f"## {mode.name}",
      "",
      mode.summary,
      "",
      f"- writes: {mode.writes}",
      f"- works from: {CHECKPOINTS[mode.checkpoint]}",
      f"- runs in: {PROCESSES[mode.processes]}",
      f"- flags besides `--config` and `--workdir`: {flags}",
      "",
    ]
  return "\n".join(lines)


@dataclasses.dataclass
class Key:
  """One key of a section: its default as it is written, and its comment."""

  name: str
  default: str
  comment: str


def config_keys_page() -> str:
  """All keys of configs/base.py with their defaults and comments, section by section."""
  text = (ROOT / "configs" / "base.py").read_text(encoding="utf-8")
  tree = ast.parse(text)
  comments = Comments(text)
  lines = ["# Config keys", "", ast.get_docstring(tree), "", "Generated from `configs/base.py`.", ""]
  for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
    for section, comment, keys in _sections(function, comments):
      lines += [f"## {section}", "", *([comment, ""] if comment else []), *(_table(keys) if keys else []), ""]
  return "\n".join(lines)


def _table(keys: list[Key]) -> list[str]:
  rows = [f"| `{key.name}` | `{key.default}` | {key.comment} |" for key in keys]
  return ["| key | default | meaning |", "|---|---|---|", *rows]


def _sections(function: ast.FunctionDef, comments: "Comments") -> Iterator[tuple[str, str, list[Key]]]:
  """(title, keys) of each section that a function makes."""
  if function.name in FUNCTION_TITLES:
    call = next(node.value for node in function.body if isinstance(node, ast.Return))
    for title, _, keys in _section(FUNCTION_TITLES[function.name], call, comments):
      yield title, ast.get_docstring(function), keys
  elif function.name == "get_config":
    loose = []
    for node in function.body:
      if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Attribute):
        continue
      name = ast.unparse(node.targets[0]).removeprefix("config.")
      if _is_section(node.value):
        yield from _section(name, node.value, comments)
      else:
        loose.append(Key(name, _default(node.value), comments.of(node)))
    yield "at the top level", "", loose


def _section(title: str, call: ast.Call, comments: "Comments") -> Iterator[tuple[str, str, list[Key]]]:
  keys, deeper = [], []
  for keyword in call.keywords:
    if keyword.arg is None:
      continue
    if _is_section(keyword.value):
      deeper += _section(f"{title}.{keyword.arg}", keyword.value, comments)
    else:
      comment = comments.of(keyword) if keyword.lineno > call.lineno else ""  # else it is the section's
      keys.append(Key(keyword.arg, _default(keyword.value), comment))
  yield title, comments.of(call), keys
  yield from deeper


def _is_section(value: ast.expr) -> bool:
  return isinstance(value, ast.Call) and ast.unparse(value.func) == "config_dict.create" and bool(value.keywords)


def _default(value: ast.expr) -> str:
  """A default as a user reads it: None for a placeholder, the value of a reference."""
  if isinstance(value, ast.Call) and ast.unparse(value.func) == "placeholder":
    return "None"
  if isinstance(value, ast.Call) and ast.unparse(value.func) == "FieldReference":
    return ast.unparse(value.args[0])
  return ast.unparse(value)


class Comments:
  """The comments of a file by line: beside code, and on lines of their own."""

  def __init__(self, text: str):
    self._beside, self._alone = {}, {}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
      if token.type == tokenize.COMMENT:
        lines = self._alone if not token.line[: token.start[1]].strip() else self._beside
        lines[token.start[0]] = token.string.removeprefix("#").strip()

  def of(self, node: ast.AST) -> str:
    """The comment lines above a node, and the comment beside its first line."""
    lines, line = [self._beside.get(node.lineno, "")], node.lineno - 1
    while line in self._alone:
      lines.insert(0, self._alone[line])
      line -= 1
    return " ".join(lines).strip().replace("|", "\\|")
