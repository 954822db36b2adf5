"""The published system's numbers, all of them, and the checker itself."""

import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor

import check_golden
import numpy as np
import pytest
from golden_case import GOLDEN

# Comparisons in each part: none may fall out unseen.
COUNTS = {
    "text": 7, "stages": 24, "gradients": 17, "steps": 8, "inference": 57, "segments": 19,
    "per_pixel": 2, "evaluation": 3,
}  # fmt: skip
SLOW = ("text", "segments", "gradients", "steps", "inference", "per_pixel")


@pytest.fixture(scope="module")
def users_process():
    """A process whose programs are compiled as users' are, not as the other tests' are."""
    with (
        pytest.MonkeyPatch.context() as patch,
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool,
    ):
        patch.delenv("XLA_FLAGS")
        patch.delenv("NPROC")
        patch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS")
        yield pool


def rows_of(part):
    return list(check_golden.check(GOLDEN, [part]))


@pytest.mark.parametrize(
    "part",
    [pytest.param(x, marks=[pytest.mark.slow] * (x in SLOW)) for x in check_golden.PARTS],
)
def test_the_numbers_are_the_published_systems(users_process, part):
    rows = users_process.submit(rows_of, part).result()
    assert [row for row in rows if not row.ok] == []
    assert len(rows) == COUNTS[part]


@pytest.fixture
def evaluation_only(tmp_path):
    for name in ("case.json", "evaluation.json"):
        shutil.copyfile(GOLDEN / name, tmp_path / name)
    return tmp_path


def test_the_program_prints_a_table_and_leaves_out_what_is_missing(evaluation_only, capsys):
    assert check_golden.main([str(evaluation_only)]) == 0
    output = capsys.readouterr().out
    assert f"{COUNTS['evaluation']} quantities, 0 missed" in output and "relative 1e-10" in output


def test_the_program_fails_on_another_number(evaluation_only, capsys):
    path = evaluation_only / "evaluation.json"
    path.write_text(path.read_text().replace("43.3288", "43.3289", 1))
    assert check_golden.main([str(evaluation_only)]) == 1
    assert "1 missed" in capsys.readouterr().out


def test_a_directory_without_a_case_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="case.json: no such file"):
        list(check_golden.check(tmp_path))


@pytest.mark.parametrize(
    "actual, expected, arguments, ok",
    [
        ([1.0, 10.0], [1.0, 10.0009], {"relative": 1e-4}, True),
        ([1.0, 10.0], [1.0, 10.0011], {"relative": 1e-4}, False),
        ([1.0], [1.00009], {"absolute": 1e-4}, True),
        ([1.0], [1.00011], {"absolute": 1e-4}, False),
        ([3], [3], {}, True),
        ([3], [4], {}, False),
        ([1.0, 2.0], [1.0], {"absolute": 9.0}, False),
        ([np.nan], [1.0], {"absolute": 9.0}, False),
    ],
)
def test_tolerances(actual, expected, arguments, ok):
    assert bool(check_golden.compare("x", actual, expected, **arguments).ok) is ok
