"""Zero-shot semantic segmentation in JAX."""

import argparse
import difflib
import importlib
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from zegformer_jax.cli import config
from zegformer_jax.runtime.environment import PROGRAM, missing_defaults
from zegformer_jax.runtime.errors import UserError
from zegformer_jax.runtime.progress import COLUMNS

# Each command is a module with a docstring, which is its help, `add_arguments(parser)` and
# `run(options)`. It is imported when it is used, so it imports what is slow inside its functions.
COMMANDS = {
    "demo": "zegformer_jax.cli.demo",
    "train": "zegformer_jax.cli.train",
    "evaluate": "zegformer_jax.cli.evaluate",
    "predict": "zegformer_jax.cli.predict",
    "prepare": "zegformer_jax.cli.prepare",
    "convert": "zegformer_jax.cli.convert",
    "compile": "zegformer_jax.cli.compile",
}
ENVIRONMENT = """
environment variables:
  ZEGFORMER_CACHE=DIR  folder for text embeddings, compiled programs and fetched weights
                       (default: zegformer_jax in XDG_CACHE_HOME or ~/.cache)
  ZEGFORMER_DEBUG=1    shows the traceback of every error"""
FAILED, MISUSED, INTERRUPTED = 1, 2, 130  # exit statuses; 130 is a shell's for Ctrl-C


class UsageError(UserError):
    """A command line that no command understands."""


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps line breaks, and breaks lines of options at 100 columns."""

    def __init__(self, prog: str):
        """Takes the terminal's width if it is narrower."""
        columns = shutil.get_terminal_size((COLUMNS, 0)).columns
        super().__init__(prog, max_help_position=28, width=min(columns, COLUMNS))


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, with no abbreviated flags."""

    def __init__(self, prog: str, description: str | None, epilog: str = ""):
        """Keeps the line breaks of both texts."""
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            formatter_class=Formatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raises a `UsageError` that names the command."""
        raise UsageError(f"{self.prog}: {message}; see {self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status; None takes the arguments of the process."""
    os.environ.update(missing_defaults())
    logging.getLogger("absl").setLevel(logging.ERROR)  # TFDS and Orbax report every file
    # Pillow's warnings and log of damaged files, beside the errors that name the file.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    try:
        _run(sys.argv[1:] if arguments is None else arguments)
    except (UserError, OSError) as error:
        if os.environ.get("ZEGFORMER_DEBUG"):
            raise
        print(f"zegformer: {' '.join(str(error).split())}", file=sys.stderr)
        return MISUSED if isinstance(error, UsageError) else FAILED
    except KeyboardInterrupt:
        print("zegformer: interrupted; run the same command to resume", file=sys.stderr)
        return INTERRUPTED
    return 0


def _run(arguments: Sequence[str]) -> None:
    name, *rest = arguments or [""]
    if name not in COMMANDS:
        _print_help_or_fail(name)
        return
    command = importlib.import_module(COMMANDS[name])
    parser = Parser(f"{PROGRAM} {name}", command.__doc__)
    command.add_arguments(parser)
    command.run(config.parse(parser, rest))


def _print_help_or_fail(name: str) -> None:
    """Prints the list of commands if it was asked for."""
    lines = [f"  {key:<9} {_summary(importlib.import_module(COMMANDS[key]))}" for key in COMMANDS]
    more = f"{PROGRAM} COMMAND --help shows a command's options and examples."
    text = "\n".join(["commands:", *lines, "", more, ENVIRONMENT])
    parser = Parser(PROGRAM, __doc__, text)
    parser.usage = f"{PROGRAM} COMMAND [OPTIONS]"
    if name in ("-h", "--help", "help"):
        parser.print_help()
        return
    if not name:
        parser.error(f"name a command: {', '.join(COMMANDS)}")
    close = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"; did you mean {close[0]}?" if close else f", only {', '.join(COMMANDS)}"
    parser.error(f"there is no command '{name}'{hint}")


def _summary(command: ModuleType) -> str:
    return (command.__doc__ or "").partition("\n")[0]


if __name__ == "__main__":
    sys.exit(main())
