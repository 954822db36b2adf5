"""Evaluation on a data set's pictures, on several hosts together, and again after an interrupt."""

import hashlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from tqdm import tqdm

from zegformer_jax.evaluation.counts import Evaluation
from zegformer_jax.evaluation.evaluator import Evaluator
from zegformer_jax.evaluation.resume import Progress, identify_records
from zegformer_jax.experiment.data import (
    dataset_directory,
    dataset_vocabulary,
    on_dataset,
    open_split,
)
from zegformer_jax.experiment.models import LoadedClip
from zegformer_jax.runtime.processes import StopRequest, is_first
from zegformer_jax.text.vocabulary import Vocabulary

Keep = Callable[[str, np.ndarray], None]


def evaluate(
    config: ConfigDict,
    workdir: epath.PathLike,
    examples: int = 0,
    progress: bool = True,
    dataset: tuple[str, str] | None = None,
    keep: Keep | None = None,
    partial: epath.PathLike | None = None,
    variables: Any = None,
    clip: LoadedClip | None = None,
) -> Evaluation:
    """Evaluates a checkpoint of a workdir on its data set's validation pictures.

    Args:
        config: the experiment.
        workdir: where its checkpoints are.
        examples: number of pictures whose label maps are kept.
        progress: whether to show a progress bar.
        dataset: name and directory of another data set, see `evaluation_datasets.on_dataset`.
        keep: takes each picture's id and its label map, as the examples'. `kinds`, where it has
            them, say what it writes: one that writes other kinds begins anew.
        partial: a folder for what is counted so far; an interrupted evaluation goes on from it.
            The file stays until `finish` of the result is called.
        variables: of the model, see `Evaluator`; None reads the workdir's checkpoint.
        clip: see there.

    Raises:
        Interrupted: Ctrl-C or SIGTERM came; it holds what was counted so far.
    """
    workdir, trained = epath.Path(workdir), None
    if dataset is not None:
        own = config
        config, is_own = on_dataset(own, workdir, *dataset)
        trained = None if is_own else dataset_vocabulary(own, workdir)
    evaluator = Evaluator(config, workdir, variables, trained, clip)
    with StopRequest() as stop:
        return run(config, workdir, evaluator, examples, progress, keep, partial, stop)


def run(
    config: ConfigDict,
    workdir: epath.Path,
    evaluator: Evaluator,
    examples: int = 0,
    progress: bool = True,
    keep: Keep | None = None,
    partial: epath.PathLike | None = None,
    stop: StopRequest | None = None,
) -> Evaluation:
    """Evaluates on the validation pictures, on several hosts together; see `evaluate`.

    `stop` ends it after a batch as Ctrl-C does at any moment.
    """
    source = open_split(config, workdir, "validation")
    progress_file = _open_progress(config, workdir, evaluator, source, keep, partial)
    result = Evaluation(evaluator.subsets, evaluator.vocabulary, evaluator.shown, of=len(source))
    result.finish = progress_file.remove
    progress_file.load(result)
    batches = validation_batches(config, source, evaluator.vocabulary, progress_file.done)
    own = len(range(jax.process_index(), len(source), jax.process_count()))
    bar = tqdm(
        total=own,
        initial=result.pictures,
        desc=f"evaluate {config.model.kind} on {config.dataset.name}",
        disable=not progress or not is_first(),
        unit="picture",
    )
    try:
        with bar:
            for batch in _count(batches, evaluator, result, examples, keep):
                count = _count_valid(batch)
                progress_file.note(result, batch["index"][:count])
                bar.update(count)
                if stop is not None and result.pictures < own and stop.asked():
                    raise KeyboardInterrupt
    except KeyboardInterrupt as interrupt:
        raise progress_file.interrupt(result) from interrupt
    result.add_hosts()
    return result


def _open_progress(
    config: ConfigDict,
    workdir: epath.Path,
    evaluator: Evaluator,
    source: Any,
    keep: Keep | None,
    folder: epath.PathLike | None,
) -> Progress:
    """What is counted so far, by all that the counts and the files beside them follow from."""
    if folder is None:
        return Progress(None, "", len(source))
    parts = (
        evaluator.identity(config),
        [(subset.name, subset.vocabulary) for subset in evaluator.subsets],
        identify_records(source, dataset_directory(config, workdir)),
        sorted(getattr(keep, "kinds", ())),
    )
    return Progress(folder, hashlib.sha256(repr(parts).encode()).hexdigest(), len(source))


def _count(
    batches: Iterator[dict[str, np.ndarray]],
    evaluator: Evaluator,
    result: Evaluation,
    examples: int,
    keep: Keep | None,
) -> Iterator[dict[str, np.ndarray]]:
    """Adds what the evaluator counts to a result; yields each batch when it is counted."""
    shapes_seen: set[tuple] = set()
    for batch in batches:
        sums, predictions = _run_timed(batch, evaluator, result, shapes_seen)
        count = _count_valid(batch)
        for row in range(min(count, examples - len(result.examples))):
            result.examples.append(example_of(batch, predictions, row, evaluator))
        for row in range(count if keep is not None else 0):
            labels_hw = _cut(predictions, batch, row).astype(batch["label"].dtype)
            keep(str(batch["id"][row]), labels_hw)
        result.add(sums)  # last: a picture that is counted has its files
        result.pictures += count
        yield batch


def _run_timed(
    batch: dict[str, np.ndarray], evaluator: Evaluator, result: Evaluation, shapes_seen: set[tuple]
) -> tuple[dict[Any, np.ndarray], np.ndarray]:
    """Runs the evaluator on a batch, and adds the time it took unless it compiled for its shape."""
    start = time.perf_counter()
    answer = evaluator(batch)
    shape = (*(images.shape for images, _ in batch["views"]), batch["label"].shape)
    if shape in shapes_seen:
        result.seconds += time.perf_counter() - start
        result.images += _count_valid(batch)
    shapes_seen.add(shape)
    return answer


def _count_valid(batch: dict[str, np.ndarray]) -> int:
    """The pictures of a batch; the rows after them only fill it."""
    return int(batch["valid"].sum())


def _cut(array_bhw: np.ndarray, batch: dict[str, np.ndarray], row: int) -> np.ndarray:
    """A row of labels without its padding, [h, w]."""
    height, width = batch["original_size"][row]
    return array_bhw[row, :height, :width]


def validation_batches(
    config: ConfigDict, source: Any, vocabulary: Vocabulary, done: np.ndarray | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """This host's batches of a source's pictures, without those that are done."""
    from zegformer_jax.input import pipeline

    return pipeline.eval_batches(
        source,
        vocabulary,
        batch_size=config.eval.batch_size,
        short_sides=(config.eval.short_side, *config.eval.more_short_sides),
        max_long_side=config.eval.max_long_side,
        done=done,
        num_threads=config.input.threads,
        prefetch=config.input.prefetch * config.eval.batch_size,
        shard_index=jax.process_index(),
        shard_count=jax.process_count(),
    )


def example_of(
    batch: dict[str, np.ndarray], predictions: np.ndarray, row: int, evaluator: Evaluator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cuts one picture, its truth and its prediction out of a batch, in the headline vocabulary."""
    images_bhwc, sizes = batch["views"][0]
    height, width = sizes[row]
    table = evaluator.subsets[0].table(evaluator.vocabulary.ignore_label)
    return (
        images_bhwc[row, :height, :width],
        table[_cut(batch["label"], batch, row)],
        _cut(predictions, batch, row),
    )
