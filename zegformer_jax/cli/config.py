"""The flags `--config=FILE[:VARIANT]` and `--config.FIELD=VALUE`: an experiment's config."""

import argparse
import contextlib
import difflib
import importlib.util
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

from ml_collections import ConfigDict

from zegformer_jax.runtime.assets import ROOT
from zegformer_jax.runtime.errors import MissingFile, UserError
from zegformer_jax.runtime.progress import COLUMNS

PREFIX = "--config."
FOLDER = "configs"
KINDS = {bool: "true or false", int: "a whole number", float: "a number", tuple: "a tuple"}


def add_arguments(
    parser: argparse.ArgumentParser,
    default: str | None = None,
    of_workdir: bool = False,
    sections: Sequence[str] = (),
) -> None:
    """Adds `--config`; `parse` reads `--config.FIELD=VALUE`.

    Args:
        parser: The command's parser.
        default: The default; None: the flag is required.
        of_workdir: The default is the workdir's config, which the command reads.
        sections: The sections that the command reads, for its help; () for all of them.
    """
    parser.epilog = describe_fields(sections)
    text = f"the experiment; {PREFIX}FIELD=VALUE changes a field of {FOLDER}/base.py"
    shown = "the workdir's" if of_workdir else default
    parser.add_argument(
        "--config",
        metavar="FILE[:VARIANT]",
        default=default,
        required=shown is None,
        help=f"{text}; default: {shown}" if shown else text,
    )


def describe_fields(sections: Sequence[str] = ()) -> str:
    """Returns the names of the config's fields, for a command's help.

    Args:
        sections: The sections whose fields the command reads; () for all of them.
    """
    source = (ROOT / FOLDER / "base.py").read_text("utf-8")
    values = dict(re.findall(r"^    config\.([\w.]+) = (.*)", source, re.MULTILINE))
    lines: dict[str, list[str]] = {}
    for name, value in values.items():
        section = name.partition(".")[0] if "." in name else ""
        has_more = value.startswith(("ConfigDict()", "backbone_fields"))
        is_listed_apart = any(other.startswith(f"{name}.") for other in values)
        if not is_listed_apart and (not sections or section in sections):
            lines.setdefault(section, []).append(f"{name}.*" if has_more else name)
    texts = (
        textwrap.fill(", ".join(names), COLUMNS - 2, initial_indent="  ", subsequent_indent="    ")
        for names in lines.values()
    )
    return "\n".join([f"fields of {PREFIX}FIELD=VALUE (docs/options.md explains each):", *texts])


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """Parses a command line; `fields` of the result are its `--config.FIELD=VALUE`.

    They are taken out first: argparse takes those with a space for positional arguments. Commands
    that have no `--config`, and no `fields` among their defaults, refuse them.
    """
    fields = [argument for argument in arguments if argument.startswith(PREFIX)]
    options = parser.parse_args([x for x in arguments if not x.startswith(PREFIX)])
    if fields and "config" not in options and "fields" not in options:
        parser.error(f"unrecognized arguments: {' '.join(fields)}")
    options.fields = fields
    return options


def read(options: argparse.Namespace) -> ConfigDict:
    """Returns the config of a command line that `parse` has parsed, locked."""
    return override(load(options.config), options.fields)


def load(name: str) -> ConfigDict:
    """Returns the config of `FILE[:VARIANT]`, locked.

    Args:
        name: A Python file with a function `get_config`, which takes the variant; relative to the
            current folder, or to the one that holds the project's `configs`.

    Raises:
        MissingFile: There is no such file.
        UserError: The file has no `get_config`, or one that takes no variant.
    """
    file, _, variant = name.partition(":")
    get_config = getattr(_import_file(_find(file)), "get_config", None)
    if get_config is None:
        raise UserError(f"{file}: has no function get_config, so it is no config file")
    if variant and not inspect.signature(get_config).parameters:
        raise UserError(f"{file}:{variant}: this config has no variants; give {file} alone")
    with _project_on_path():
        config = get_config(variant) if variant else get_config()
    return config.lock()


def override(config: ConfigDict, arguments: Sequence[str]) -> ConfigDict:
    """Sets fields of a config.

    Args:
        config: Changed in place.
        arguments: Each `--config.FIELD=VALUE`, a value of the type that the field has.

    Raises:
        UserError: There is no such field, or the value is of another type.
    """
    from absl import flags
    from ml_collections import config_flags

    known = dict(_fields(config))
    for argument in arguments:
        field, equals, _ = argument.removeprefix(PREFIX).partition("=")
        if field not in known:
            raise UserError(_unknown(field, list(known)))
        if not equals:
            raise UserError(f"{argument}: write {argument}=VALUE")
        values, command_line = flags.FlagValues(), ["", argument]
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=command_line)
        try:
            values(command_line)
        except (flags.Error, TypeError) as error:
            kind = KINDS.get(type(known[field]), "a text")
            raise UserError(f"{argument}: give {kind}, such as {known[field]!r}") from error
    return config


def _fields(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _unknown(field: str, known: Sequence[str]) -> str:
    inside = [name for name in known if name.startswith(f"{field}.")]
    if inside:
        return f"{field} is a section; give one of its fields, such as {PREFIX}{inside[0]}=VALUE"
    # The section may be right and the name wrong, or the name right in another section.
    close = difflib.get_close_matches(field, known, n=1) or [
        name for name in known if name.rpartition(".")[2] == field.rpartition(".")[2]
    ]
    hint = f"did you mean {close[0]}?" if close else f"{FOLDER}/base.py lists all fields"
    return f"no field {field}; {hint}"


def _find(file: str) -> Path:
    for path in (Path(file), ROOT / file):
        if path.is_file():
            return path
    names = ", ".join(
        f"{FOLDER}/{path.name}"
        for path in sorted((ROOT / FOLDER).glob("*.py"))
        if path.stem not in ("__init__", "base")
    )
    raise MissingFile(f"{file}: no such config file; the project's are {names}")


def _import_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"zegformer_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path}: a config file's name ends in .py")
    module = importlib.util.module_from_spec(spec)
    with _project_on_path():
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _project_on_path() -> Iterator[None]:
    """Lets config files say `from configs import base`, also when the package is installed."""
    sys.path.insert(0, str(ROOT))
    try:
        yield
    finally:
        sys.path.remove(str(ROOT))
