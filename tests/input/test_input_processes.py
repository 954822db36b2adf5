"""Several processes that read one data set, as the hosts of a cluster do."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zegformer_jax.input import pipeline
from zegformer_jax.input.datasets import FileSource
from zegformer_jax.input.settings import InputSettings
from zegformer_jax.text.vocabulary import Vocabulary

ROOT = Path(__file__).resolve().parents[2]
PICTURES, BATCH, CROP, STEPS, START = 7, 4, 32, 5, 2


def open_folder(folder: Path) -> FileSource:
    """The pictures that the test made."""
    images = sorted(folder.glob("*.jpg"))
    labels = [image.with_suffix(".png") for image in images]
    return FileSource(images, labels, Vocabulary.from_names(["sky", "road", "car"]))


def digests(folder: Path, shard_index: int, shard_count: int, threads: int) -> list[list[str]]:
    """A digest of every row of every batch that a process reads."""
    source = open_folder(folder)
    settings = InputSettings(BATCH, CROP, (30, 40, 50), max_long_side=80, threads=threads)
    batches = pipeline.train_batches(
        source, source.vocabulary, settings, seed=3, start_step=START, num_steps=STEPS,
        shard_index=shard_index, shard_count=shard_count,
    )  # fmt: skip
    return [
        [
            hashlib.sha256(image.tobytes() + label.tobytes()).hexdigest()
            for image, label in zip(batch["image"], batch["label"], strict=True)
        ]
        for batch in batches
    ]


@pytest.mark.slow
def test_two_processes_read_what_one_reads(tmp_path):
    """A batch is the same rows in the same order, whoever reads them and with how many threads."""
    rng = np.random.default_rng(0)
    for index in range(PICTURES):
        size = (40 + index, 60 - index)
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(tmp_path / f"{index}.jpg")
        Image.fromarray(rng.integers(0, 3, size, np.uint8)).save(tmp_path / f"{index}.png")
    expected = digests(tmp_path, 0, 1, threads=1)
    assert len(expected) == STEPS and len({row for batch in expected for row in batch}) == 20
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(tmp_path), str(shard)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},  # this tree, whichever is installed
            stdout=subprocess.PIPE,
            text=True,
        )
        for shard in range(2)
    ]
    shards = [json.loads(process.communicate(timeout=300)[0]) for process in processes]
    assert [sum(rows, []) for rows in zip(*shards, strict=True)] == expected


if __name__ == "__main__":
    print(json.dumps(digests(Path(sys.argv[1]), int(sys.argv[2]), 2, threads=4)))
