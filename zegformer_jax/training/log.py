"""The log of a training: lines of metrics as JSON, and TensorBoard events."""

import json
import operator
import resource
import sys
import time
from collections.abc import Mapping
from typing import Any

from etils import epath

from zegformer_jax.runtime.errors import reading
from zegformer_jax.runtime.processes import is_first

METRICS_FILE = "metrics.jsonl"
VALIDATION_FILE = "validation.jsonl"
EVENTS_FOLDER = "tensorboard"
# The numbers of a line that differ from run to run.
TIMINGS = ("seconds_per_step", "images_per_second", "host_memory_gib")


class Lines:
    """A file of JSON lines in the order of their `step`; only the first process writes.

    Attributes:
        history: The lines.
    """

    def __init__(self, path: epath.Path, step: int):
        """Opens the file and drops the lines after `step`, from which the training resumes."""
        self._path = path
        self.history = [line for line in read_lines(path) if line["step"] <= step]
        if is_first() and path.exists():
            partial = path.with_suffix(".partial")
            partial.write_text("".join(json.dumps(line) + "\n" for line in self.history))
            partial.replace(path)

    def add(self, line: Mapping[str, Any]) -> None:
        """Writes a line."""
        self.history.append(dict(line))
        if is_first():
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")


def read_lines(path: epath.Path) -> list[dict[str, Any]]:
    """Reads the complete lines of a file of JSON lines; none if there is no file."""
    if not path.exists():
        return []
    with reading(path, "remove the line, or the file"):
        *lines, rest = path.read_text().split("\n")
        del rest  # after the last line's end: empty, or a line that a killed process began
        return [{"step": operator.index(line["step"])} | line for line in map(json.loads, lines)]


def read_metrics(workdir: epath.PathLike) -> list[dict[str, float]]:
    """Reads the metrics of a workdir; none if nothing was trained there."""
    return read_lines(epath.Path(workdir) / METRICS_FILE)


class TrainingLog:
    """The lines of one run, and its TensorBoard events.

    Attributes:
        metrics: Lines of the training's metrics.
        validation: Lines of the validation's scores.
    """

    def __init__(self, workdir: epath.Path, step: int, tensorboard: bool):
        """Opens the log of a training that resumes after `step`."""
        self.metrics = Lines(workdir / METRICS_FILE, step)
        self.validation = Lines(workdir / VALIDATION_FILE, step)
        self._step, self._time = step, time.perf_counter()
        self._writer = None
        if tensorboard and is_first():
            from clu import metric_writers

            summaries = metric_writers.SummaryWriter(str(workdir / EVENTS_FOLDER))
            self._writer = metric_writers.AsyncWriter(summaries)

    def start_clock(self) -> None:
        """Excludes the time before this call from the time of a step."""
        self._time = time.perf_counter()

    def timings(self, step: int, batch_size: int) -> dict[str, float]:
        """Returns time and memory of the steps since the last line, at the end of `step`."""
        now = time.perf_counter()
        seconds = (now - self._time) / max(step - self._step, 1)
        self._step, self._time = step, now
        # The largest resident size so far: bytes on macOS, KiB elsewhere.
        unit = 1 if sys.platform == "darwin" else 2**10
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return dict(zip(TIMINGS, (seconds, batch_size / seconds, peak / 2**30), strict=True))

    def write_metrics(self, step: int, line: Mapping[str, float]) -> None:
        """Writes a line of metrics."""
        self.metrics.add({"step": step} | dict(line))
        self._write_events(step, line, "train")

    def write_validation(self, step: int, line: Mapping[str, float]) -> None:
        """Writes a line of validation scores."""
        self.validation.add({"step": step} | dict(line))
        self._write_events(step, line, "validation")

    def _write_events(self, step: int, line: Mapping[str, float], kind: str) -> None:
        if self._writer is not None:
            self._writer.write_scalars(step, {f"{kind}/{k}": v for k, v in line.items()})

    def close(self) -> None:
        """Waits until everything is written."""
        if self._writer is not None:
            self._writer.close()
