"""Random one-token mutants of the core, each run against the fast tests of its own package.

    pip install cosmic-ray
    python tests/mutants.py [--count=60] [--seed=0]

cosmic-ray makes the mutants and runs the tests, in a copy of the last commit. Prints the diff of
every mutant that the tests did not kill; whether it is equivalent is for the reader to say.
"""

import argparse
import contextlib
import os
import random
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from cosmic_ray import commands
from cosmic_ray.config import ConfigDict
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import TestOutcome, WorkerOutcome, WorkItem, WorkResult

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 600  # after which a mutant's tests are stopped: it is killed
# The core and the tests of its packages.
CORE = {
    "zegformer_jax/segmentation": "tests/segmentation",
    "zegformer_jax/training/losses.py": "tests/training",
    "zegformer_jax/training/matching.py": "tests/training",
    "zegformer_jax/training/optim.py": "tests/training",
    "zegformer_jax/training/targets.py": "tests/training",
    "zegformer_jax/evaluation/metrics": "tests/evaluation",
    "zegformer_jax/text/vocabulary.py": "tests/text",
    "zegformer_jax/text/tokenizer.py": "tests/text",
    "zegformer_jax/input/transforms.py": "tests/input",
}
# In type annotations, where a mutant cannot matter.
LEFT_OUT = "core/ReplaceBinaryOperator_BitOr_"


def copy_of_commit(folder: Path) -> None:
    """Writes the files of the last commit into a folder."""
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, check=True, capture_output=True)
    subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)


def session(module: str, tests: str) -> ConfigDict:
    """Returns cosmic-ray's settings for one module and its tests."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", tests]
    return ConfigDict(
        {
            "module-path": module,
            "timeout": SECONDS,
            "excluded-modules": [],
            "test-command": shlex.join(command),
            "distributor": {"name": "local"},
        }
    )


def sample(databases: dict[str, WorkDB], count: int, seed: int) -> None:
    """Leaves a random sample of all databases' mutants to be run."""
    everything = [(name, item) for name, db in databases.items() for item in _mutants(db)]
    chosen = random.Random(seed).sample(everything, min(count, len(everything)))
    kept = {(name, item.job_id) for name, item in chosen}
    print(f"{len(kept)} of {len(everything)} mutants", flush=True)
    skipped = WorkResult(worker_outcome=WorkerOutcome.SKIPPED)
    for name, db in databases.items():
        for item in list(db.work_items):
            if (name, item.job_id) not in kept:
                db.set_result(item.job_id, skipped)


def _mutants(db: WorkDB) -> Iterator[WorkItem]:
    for item in db.work_items:
        if not any(mutation.operator_name.startswith(LEFT_OUT) for mutation in item.mutations):
            yield item


def report(databases: dict[str, WorkDB]) -> int:
    """Prints the survivors; returns the number of mutants that were killed."""
    killed = 0
    for db in databases.values():
        for _, result in db.completed_work_items:
            if result.worker_outcome == WorkerOutcome.SKIPPED:
                continue
            if result.test_outcome == TestOutcome.SURVIVED:
                print(result.diff, flush=True)
            else:
                killed += 1
    return killed


def main(arguments: list[str]) -> None:
    """Makes, samples and runs the mutants."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=60, help="mutants to run; default: 60")
    parser.add_argument("--seed", type=int, default=0, help="of the sample; default: 0")
    options = parser.parse_args(arguments)
    with TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        copy_of_commit(folder)
        os.chdir(folder)  # where cosmic-ray runs the tests
        databases = {}
        for place, module in enumerate(CORE):
            db = stack.enter_context(use_db(f"{place}.sqlite", WorkDB.Mode.create))
            files = [Path(module)] if module.endswith(".py") else sorted(Path(module).rglob("*.py"))
            commands.init(files, db, {})
            databases[module] = db
        sample(databases, options.count, options.seed)
        for module, tests in CORE.items():
            commands.execute(databases[module], session(module, tests))
        print(f"{report(databases)} killed")


if __name__ == "__main__":
    main(sys.argv[1:])
