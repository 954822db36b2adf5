"""Settings shared by all tests: several CPU devices, strict broadcasting, no TensorFlow noise."""

import os
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import hypothesis
import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

# Examples follow from the test alone: the same tree passes, or fails, every time.
hypothesis.settings.register_profile("derandomized", derandomize=True, deadline=None)
hypothesis.settings.load_profile("derandomized")

GOLDEN = Path(__file__).parent / "golden" / "small"


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
    """A workdir in which the whole method ran once, shrunk, and the report that it gave."""
    import shrunk

    from zegformer_jax import demo

    workdir = tmp_path_factory.mktemp("runs") / "openmoji"
    lines = []
    report = demo.run(shrunk.configs(), workdir, lines.append)
    return SimpleNamespace(workdir=workdir, report=report, lines=lines)
