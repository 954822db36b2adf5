"""Evaluation on an experiment's validation images, by several processes, with interruptions."""

import contextlib
import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from zegformer_jax.evaluation.evaluation import Evaluation, Example, Interrupted
from zegformer_jax.evaluation.evaluator import Evaluator
from zegformer_jax.evaluation.metric import States, add
from zegformer_jax.evaluation.resume import Counted, ResumeFile
from zegformer_jax.evaluation.step import EvaluationStep
from zegformer_jax.experiment import Experiment
from zegformer_jax.input.benchmarks import FOLDER
from zegformer_jax.input.label_counts import find_fault
from zegformer_jax.runtime.compiled import keep_programs
from zegformer_jax.runtime.mesh import describe_devices
from zegformer_jax.runtime.processes import StopRequest, is_first, sum_over_processes
from zegformer_jax.runtime.progress import Progress, announce

SECONDS_BETWEEN_SAVES = 60.0
Keep = Callable[[str, np.ndarray], None]  # takes an image's id and its label map
Batch = dict[str, Any]  # as `input.pipeline.eval_batches` yields them


def evaluate(
    experiment: Experiment,
    *,
    evaluator: Evaluator | None = None,
    keep: Keep | None = None,
    examples: int = 0,
    resume: ResumeFile | None = None,
    progress: bool = True,
) -> Evaluation:
    """Evaluates a model on an experiment's validation images.

    Args:
        experiment: The experiment, which names the data set.
        evaluator: The model and its metrics; None: the experiment's checkpoint.
        keep: Takes each image's id and its label map, as in `Evaluation.examples`.
        examples: Number of images that are returned with their label maps.
        resume: Keeps what is counted, so that an interrupted evaluation can resume.
        progress: Shows a progress bar.

    Raises:
        Interrupted: Ctrl-C or SIGTERM came.
    """
    keep_programs()
    run = _Run(experiment, evaluator or Evaluator(experiment), keep, examples, resume)
    with StopRequest() as stop:
        return run.finish(progress, stop)


class Validation:
    """Evaluates a training's variables again and again, with one compiled step."""

    def __init__(self, experiment: Experiment):
        self._experiment = experiment
        self._evaluator: Evaluator | None = None

    def check(self) -> None:
        """Raises UserError if the settings of the evaluation are wrong; reads no data."""
        EvaluationStep(self._experiment)

    def __call__(self, variables: Any) -> Evaluation:
        """Evaluates variables, which are on the host, on the validation images."""
        is_first_time = self._evaluator is None
        if self._evaluator is None:
            self._evaluator = Evaluator(self._experiment, variables)
        else:
            self._evaluator.set_variables(variables)
        run = _Run(self._experiment, self._evaluator, warns=is_first_time)
        return run.finish(progress=False)


class Clock:
    """Times the steps on batches of shapes that came before; others compile."""

    def __init__(self) -> None:
        self._shapes: set[tuple] = set()
        self._seconds, self._images = 0.0, 0

    def is_new(self, batch: Batch) -> bool:
        """Returns whether no batch had these shapes before, so that the step compiles."""
        return _shapes(batch) not in self._shapes

    @contextlib.contextmanager
    def step(self, batch: Batch) -> Iterator[None]:
        """Times a step on a batch."""
        start = time.perf_counter()
        yield
        if not self.is_new(batch):
            self._seconds += time.perf_counter() - start
            self._images += count_valid(batch)
        self._shapes.add(_shapes(batch))

    @property
    def seconds_per_image(self) -> float:
        """Mean time of an image; NaN if every step compiled."""
        return self._seconds / self._images if self._images else float("nan")


def _shapes(batch: Batch) -> tuple[tuple[int, ...], ...]:
    return tuple(array.shape for array in jax.tree.leaves((batch["views"], batch["label"])))


@dataclass
class _Run:
    """One evaluation; see `evaluate` for the fields that it is made of."""

    experiment: Experiment
    evaluator: Evaluator
    keep: Keep | None = None
    examples: int = 0
    resume: ResumeFile | None = None
    warns: bool = True
    shown: list[Example] = field(default_factory=list)
    clock: Clock = field(default_factory=Clock)

    def finish(self, progress: bool, stop: StopRequest | None = None) -> Evaluation:
        """Evaluates; `stop` ends it after a batch, Ctrl-C at any moment."""
        source = self.experiment.open_split("validation")
        if self.warns and is_first():
            _warn_of_fault(self.experiment, source)
        counted = self._start(source)
        own = np.arange(jax.process_index(), len(source), jax.process_count())
        shown = progress and is_first()
        facts = self._facts(len(source)) if progress else []  # all processes open checkpoints
        if shown:
            announce(facts)
        title = f"evaluate {self.experiment.kind}"
        bar = Progress(title, len(own), int(counted.done.sum()), shown=shown)
        saved = time.monotonic()
        try:
            with bar:
                bar.start()
                for batch in validation_batches(self.experiment, source, counted.done):
                    is_new = self.clock.is_new(batch)
                    if is_new:
                        bar.note("compiling ...")
                    counted = self._count(batch, counted)
                    bar.note("")
                    bar.update(count_valid(batch), timed=not is_new)
                    if self.resume and time.monotonic() - saved >= SECONDS_BETWEEN_SAVES:
                        self.resume.save(counted)
                        saved = time.monotonic()
                    if stop and stop.asked() and not counted.done[own].all():
                        raise KeyboardInterrupt
        except KeyboardInterrupt as interrupt:
            raise self._interrupt(counted) from interrupt
        return self._result(*sum_over_processes((counted.states, counted.done.astype(int))))

    def _facts(self, images: int) -> list[str]:
        """Returns lines on what is evaluated, on what."""
        return [
            describe_devices(),
            f"model: {self.experiment.origin}",
            *self.experiment.facts("validation", images),
        ]

    def _start(self, source: Any) -> Counted:
        """Returns what was counted before an interruption."""
        nothing = Counted(self.evaluator.nothing, np.zeros(len(source), bool))
        if self.resume is None:
            return nothing
        parts = self.evaluator.identity(), source.fingerprint(), self.resume.note
        return self.resume.open(hashlib.sha256(repr(parts).encode()).hexdigest(), nothing)

    def _count(self, batch: Batch, counted: Counted) -> Counted:
        """Counts a batch; last, so that every image that is counted was kept."""
        with self.clock.step(batch):
            states, labels_byx = self.evaluator(batch)
        valid = count_valid(batch)
        for row in range(min(valid, self.examples - len(self.shown))):
            self.shown.append(self._example(batch, labels_byx, row))
        for row in range(valid if self.keep is not None else 0):
            labels_yx = _cut(labels_byx, batch, row).astype(batch["label"].dtype)
            self.keep(str(batch["id"][row]), labels_yx)
        done = counted.done.copy()
        done[batch["index"][:valid]] = True
        return Counted(add(counted.states, states), done)

    def _interrupt(self, counted: Counted) -> Interrupted:
        """Saves all completed batches and returns the exception; a partial batch is discarded."""
        if not counted.done.any():
            return Interrupted(None)
        if self.resume is not None:
            self.resume.save(counted)
        return Interrupted(self._result(*counted) if jax.process_count() == 1 else None)

    def _result(self, states: States, done: np.ndarray) -> Evaluation:
        plan, metrics = self.evaluator.plan, self.evaluator.metrics
        seconds = self.clock.seconds_per_image
        return Evaluation(plan, metrics, states, int(done.sum()), len(done), self.shown, seconds)

    def _example(self, batch: Batch, labels_byx: np.ndarray, row: int) -> Example:
        """Returns an image, its labels and its label map, in the headline vocabulary."""
        images, sizes = batch["views"][0]
        height, width = sizes[row]
        plan = self.evaluator.plan
        table = plan.subsets[0].table(plan.vocabulary.ignore_label)
        labels_yx = table[_cut(batch["label"], batch, row)]
        return images[row, :height, :width], labels_yx, _cut(labels_byx, batch, row)


def _warn_of_fault(experiment: Experiment, source: Any) -> None:
    """Warns of validation labels that look wrong; see `label_counts.find_fault`."""
    vocabulary, dataset = experiment.vocabulary, experiment.dataset
    fault = find_fault(source, vocabulary, range(len(vocabulary)), dataset.name == FOLDER)
    if fault:
        message = "WARNING: %s: validation: %s"
        logging.getLogger(__name__).warning(message, dataset.directory, fault)


def validation_batches(
    experiment: Experiment, source: Any, done: np.ndarray | None = None
) -> Iterator[Batch]:
    """Yields this process's batches of a source's images, without those that are done."""
    from zegformer_jax.input import pipeline

    settings = experiment.eval
    return pipeline.eval_batches(
        source,
        experiment.vocabulary,
        batch_size=settings.batch_size,
        short_sides=(settings.short_side, *settings.more_short_sides),
        max_long_side=settings.max_long_side,
        done=done,
        threads=experiment.input.threads,
        prefetch=experiment.input.prefetch * settings.batch_size,
        shard_index=jax.process_index(),
        shard_count=jax.process_count(),
    )


def count_valid(batch: Batch) -> int:
    """Returns the number of images in a batch; the rows after them only fill it."""
    return int(batch["valid"].sum())


def _cut(array_byx: np.ndarray, batch: Batch, row: int) -> np.ndarray:
    """Returns a row of labels without padding."""
    height, width = batch["original_size"][row]
    return array_byx[row, :height, :width]
