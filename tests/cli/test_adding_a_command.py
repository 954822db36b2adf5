"""A command is one module and its line in the table: nothing else knows of it."""

import subprocess
import sys
import textwrap

import pytest

from zegformer_jax.cli import main

TOY = '''
"""Repeats a word.

Examples:
  %(prog)s hello --times=2
"""

from zegformer_jax.runtime.errors import UserError


def add_arguments(parser):
    parser.add_argument("word")
    parser.add_argument("--times", type=int, default=1)


def run(options):
    if options.times < 1:
        raise UserError(f"--times={options.times}: give 1 or more")
    print(*[options.word] * options.times)
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The command `toy`, in a temporary module."""
    (tmp_path / "toy_command.py").write_text(TOY.lstrip())
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(main.COMMANDS, "toy", "toy_command")
    yield "toy"
    sys.modules.pop("toy_command", None)


def test_it_is_listed(toy, capsys):
    assert main.main(["--help"]) == 0
    assert "  toy       Repeats a word.\n" in capsys.readouterr().out


def test_it_has_help(toy, capsys):
    with pytest.raises(SystemExit) as stopped:
        main.main([toy, "--help"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0
    assert out.startswith("usage: zegformer toy [-h] [--times TIMES] word")
    assert "Examples:\n  zegformer toy hello --times=2\n" in out


def test_it_runs(toy, capsys):
    assert main.main([toy, "hello", "--times=2"]) == 0
    assert capsys.readouterr() == ("hello hello\n", "")


@pytest.mark.parametrize(
    "argument, status, line",
    [
        ("--times=0", 1, "zegformer: --times=0: give 1 or more\n"),
        (
            "--times=x",
            2,
            "zegformer: zegformer toy: argument --times: invalid int value: 'x'; "
            "see zegformer toy --help\n",
        ),
        (
            "--config.seed=1",
            2,
            "zegformer: zegformer toy: unrecognized arguments: --config.seed=1; "
            "see zegformer toy --help\n",
        ),
    ],
)
def test_its_errors_are_one_line(toy, capsys, argument, status, line):
    assert main.main([toy, "hello", argument]) == status
    assert capsys.readouterr() == ("", line)


def test_a_command_is_imported_when_it_is_used(tmp_path):
    """`--help` imports neither jax nor TensorFlow, and `train --help` no other command."""
    code = textwrap.dedent("""
        import sys
        from zegformer_jax.cli.main import COMMANDS, main
        try:
            main(sys.argv[1:])
        except SystemExit:
            pass
        heavy = {"jax", "flax", "numpy", "tensorflow", "PIL"}
        print("imported", *sorted(sys.modules.keys() & (heavy | set(COMMANDS.values()))))
    """)
    for arguments, expected in (
        (["--help"], sorted(main.COMMANDS.values())),
        (["train", "--help"], ["zegformer_jax.cli.train"]),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True
        )
        assert done.stdout.splitlines()[-1].split()[1:] == expected, done.stderr
