"""The screen of long runs: speed and time left without compilation, in 100 columns."""

import re

import pytest

from zegformer_jax.runtime import progress
from zegformer_jax.runtime.progress import Progress, announce


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test moves: `clock[0] += seconds`."""
    seconds = [1000.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: seconds[0])
    return seconds


def last_line(capsys):
    return re.split(r"[\r\n]+", capsys.readouterr().err.strip())[-1]


def test_the_time_left_is_that_of_the_steps_without_compilation(clock, capsys):
    """90 seconds of compilation, then 20 of 100 steps of 8 images, half a second each."""
    with Progress("train toy", 100, images=8) as bar:
        bar.note("compiling ...")
        clock[0] += 90
        bar.start()
        for _ in range(20):
            clock[0] += 0.5
            bar.update()
        bar.note("loss 1.500")
    line = last_line(capsys)
    assert re.fullmatch(
        r"train toy:  20%\|.*\| 20/100 steps, loss 1.500, 16.0 images/s, 00:40 left", line
    ), line


def test_a_resumed_run_counts_what_is_left(clock, capsys):
    """It begins at step 59,000; a validation between two steps takes an hour."""
    with Progress("train toy", 60_000, done=59_000, images=1) as bar:
        bar.start()
        for _ in range(10):
            clock[0] += 2
            bar.update()
        clock[0] += 3600
        bar.start()
        for _ in range(10):
            clock[0] += 4
            bar.update()
    line = last_line(capsys)  # 980 steps of 3 s
    assert "| 59020/60000 steps, 0.3 images/s, 49:00 left" in line, line


def test_batches_that_compile_are_not_timed(clock, capsys):
    with Progress("evaluate toy", 30) as bar:
        bar.start()
        clock[0] += 60
        bar.update(10, timed=False)
        assert "left" not in last_line(capsys)
        clock[0] += 5
        bar.update(10)
    assert "| 20/30 images, 2.0 images/s, 00:05 left" in last_line(capsys)


@pytest.mark.parametrize("columns", [60, 100, 300])
def test_no_line_is_longer_than_the_screen_or_100_columns(clock, capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    with Progress("train with a long name " * 3, 60_000, images=8) as bar:
        bar.note("compiling ...")
        bar.start()
        clock[0] += 1000
        bar.update()
        bar.note("loss 123456.789")
    lines = re.split(r"[\r\n]+", capsys.readouterr().err)
    assert 0 < max(map(len, lines)) <= min(columns, 100)


def test_announcements_are_broken_at_spaces(capsys):
    announce(["data: " + "word " * 40, "model: " + "x" * 120])
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines] == ["data:", "word", "word", "model:", "x" * 120]
    assert max(map(len, lines[:3])) <= 100 and lines[1].startswith("  word")


def test_nothing_is_shown_unless_asked(capsys):
    with Progress("train toy", 10, shown=False) as bar:
        bar.note("compiling ...")
        bar.update()
    assert capsys.readouterr() == ("", "")
