"""Writes options.md: the fields of `configs/base.py` with their defaults and comments.

    .venv/bin/python docs/options.py

A comment is on the field's line or directly above it; a field with both starts a group, which the
comment above it names. A backbone's fields are explained by the docstring of its module.
"""

import ast
import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package, if not installed

from zegformer_jax.models.backbones import BACKBONES, backbone_fields  # noqa: E402

BASE = Path(__file__).resolve().parents[1] / "configs" / "base.py"
PAGE = Path(__file__).with_name("options.md")
HEAD = """\
# Options

Every field of an experiment, with its default and meaning. `--config.FIELD=VALUE` sets a field on
the command line, for instance `--config.train.steps=3000`; a field that does not exist is an error.
`.venv/bin/python docs/options.py` generates this page from `configs/base.py` and the backbones.
"""
COLUMNS = "| field | default | meaning |\n|---|---|---|\n"


class Option(NamedTuple):
    """A field of the config: its name with its section, its default in Python, its comment."""

    name: str
    default: str
    comment: str
    group: str = ""
    section: str = ""  # heading of its table; "" for the name's own


def read_options(source: str) -> list[Option]:
    """Returns the fields that `get_config` in the source of `configs/base.py` sets."""
    lines, body = source.splitlines(), _get_config(source).body
    assigned = {ast.unparse(x.targets[0]): x for x in body if isinstance(x, ast.Assign)}
    options = []
    for name, node in assigned.items():
        is_section = any(other.startswith(f"{name}.") for other in assigned)
        if is_section:
            continue
        if name == "config.model.backbone":
            options += [option for backbone in BACKBONES for option in read_backbone(backbone)]
            continue
        after = lines[node.end_lineno - 1][node.end_col_offset :].strip().lstrip("# ")
        above = " ".join(_comment_above(lines, node.lineno - 1))
        comment, group = (after, above) if after else (above, "")
        options.append(Option(name.removeprefix("config."), _default(node.value), comment, group))
    return options


def read_backbone(name: str) -> list[Option]:
    """Returns the fields of the section `model.backbone` for one backbone."""
    text = inspect.getdoc(BACKBONES[name].module)
    meanings = dict(re.findall(r"^ {4}(\w+): ((?:.|\n {8})+)", text, re.MULTILINE))
    meanings = {field: " ".join(meaning.split()) for field, meaning in meanings.items()}
    meanings["name"] = "Name of the backbone; a config's variant chooses it with its sizes."
    return [
        Option(
            f"model.backbone.{field}",
            json.dumps(default) if isinstance(default, str) else repr(default),
            meanings[field],
            section=f"model.backbone, {name}",
        )
        for field, default in backbone_fields(name).items()
    ]


def _get_config(source: str) -> ast.FunctionDef:
    functions = [x for x in ast.parse(source).body if isinstance(x, ast.FunctionDef)]
    return next(function for function in functions if function.name == "get_config")


def _comment_above(lines: list[str], end: int) -> Iterator[str]:
    start = end
    while lines[start - 1].lstrip().startswith("#"):
        start -= 1
    return (line.strip().lstrip("# ") for line in lines[start:end])


def _default(value: ast.expr) -> str:
    text = ast.unparse(value)
    if isinstance(value, ast.BinOp):
        return text  # 2 / 3 is clearer than its digits
    if text == "ConfigDict()":
        return "{}"
    default = eval(text)
    return json.dumps(default) if isinstance(default, str) else repr(default)


def make_page(source: str) -> str:
    """Returns options.md for the source of `configs/base.py`."""
    sections: dict[str, list[Option]] = {}
    for option in read_options(source):
        section = option.section or option.name.rpartition(".")[0]
        sections.setdefault(section, []).append(option)
    parts = [HEAD]
    for section, options in sections.items():
        parts.append(f"\n## {section or 'The whole experiment'}\n\n{COLUMNS}")
        for option in options:
            if option.group:
                parts.append(f"\n{option.group}\n\n{COLUMNS}")
            cells = (f"`{option.name}`", f"`{option.default}`", option.comment)
            parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n")
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(make_page(BASE.read_text("utf-8")), "utf-8")
