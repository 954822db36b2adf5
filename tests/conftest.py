"""Settings shared by all tests: several CPU devices, strict broadcasting, no TensorFlow noise."""

import fcntl
import os
import pickle
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

from xla_flags import threads, xla_flags

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags(devices=2)}"
os.environ["NPROC"] = threads(devices=2)
# Also in processes that tests start; the golden numbers are checked in programs that are compiled
# as users' are, see test_golden.py.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Compiled programs are kept for the next run and for other processes.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

from zegformer_jax.runtime.environment import missing_defaults

os.environ.update(missing_defaults())

import hypothesis
import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

# Examples follow from the test alone: the same tree passes, or fails, every time.
hypothesis.settings.register_profile("derandomized", derandomize=True, deadline=None)
hypothesis.settings.load_profile("derandomized")

LONGEST = "test_runs.py"  # the file whose tests take longest
GOLDEN = Path(__file__).parent / "golden" / "small"


def pytest_collection_modifyitems(items):
    """Slow files come first, so that no worker has them left at the end.

    The longest one makes the `finished` run; those that need no such run follow, so that the other
    worker does not wait for it.
    """
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    waiting = {item.path for item in items if "finished" in item.fixturenames}

    def place(item):
        path = item.path
        return path.name != LONGEST, not slow[path], path in waiting, -slow[path]

    items.sort(key=place)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """A folder for what is kept between runs, so that tests leave the user's alone."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["ZEGFORMER_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def golden():
    """Reads a file of golden numbers by name: ``golden("training")["train/loss/total"]``."""

    def read(name: str) -> dict[str, np.ndarray]:
        with np.load(GOLDEN / f"{name}.npz") as arrays:
            return {key: arrays[key] for key in arrays.files}

    return read


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A workdir in which the whole method ran once, shrunk, and the report that it gave.

    It runs once for all of pytest-xdist's workers; each of them has its own copy.
    """
    import shrunk

    from zegformer_jax.cli import demo_stages

    common = tmp_path_factory.getbasetemp()
    common = common.parent if "PYTEST_XDIST_WORKER" in os.environ else common
    said = common / "finished.pickle"
    with open(common / "finished.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not said.exists():
            lines = []
            report = demo_stages.run_stages(shrunk.configs(), common / "finished", lines.append)
            said.write_bytes(pickle.dumps((report, lines)))
    report, lines = pickle.loads(said.read_bytes())
    workdir = tmp_path_factory.mktemp("runs") / "openmoji"
    shutil.copytree(common / "finished", workdir)
    return SimpleNamespace(workdir=workdir, report=report, lines=lines)
