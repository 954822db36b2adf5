"""Evaluation on a data set's pictures, on several hosts together, and again after an interrupt."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from tqdm import tqdm

from zegformer_jax import experiment, hosts
from zegformer_jax.evaluation_datasets import on_dataset
from zegformer_jax.evaluation_progress import Progress
from zegformer_jax.evaluator import Evaluator
from zegformer_jax.results import Evaluation
from zegformer_jax.vocabulary import Vocabulary

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
    clip: experiment.LoadedClip | None = None,
) -> Evaluation:
    """Evaluates a checkpoint of a workdir on its data set's validation pictures.

    Args:
        config: the experiment.
        workdir: where its checkpoints are.
        examples: number of pictures whose label maps are kept.
        progress: whether to show a progress bar.
        dataset: name and directory of another data set, see `evaluation_datasets.on_dataset`.
        keep: takes each picture's id and its label map, as the examples'.
        partial: a folder for what is counted so far; an interrupted evaluation goes on from it.
        variables: of the model, see `Evaluator`; None reads the workdir's checkpoint.
        clip: see there.

    Raises:
        Interrupted: Ctrl-C or SIGTERM came; it holds what was counted so far.
    """
    workdir, trained = epath.Path(workdir), None
    if dataset is not None:
        config, trained = on_dataset(config, workdir, *dataset)
    evaluator = Evaluator(config, workdir, variables, trained, clip)
    with hosts.StopRequest() as stop:
        return run(config, workdir, evaluator, examples, progress, keep, partial, stop)


def run(
    config: ConfigDict,
    workdir: epath.Path,
    evaluator: Evaluator,
    examples: int = 0,
    progress: bool = True,
    keep: Keep | None = None,
    partial: epath.PathLike | None = None,
    stop: hosts.StopRequest | None = None,
) -> Evaluation:
    """Evaluates on the validation pictures, on several hosts together; see `evaluate`.

    `stop` ends it after a batch as Ctrl-C does at any moment.
    """
    source = experiment.open_split(config, workdir, "validation")
    result = Evaluation(evaluator.subsets, evaluator.vocabulary, evaluator.shown, of=len(source))
    progress_file = Progress(partial, evaluator.identity(config), len(source))
    progress_file.load(result)
    batches = validation_batches(config, source, evaluator.vocabulary, progress_file.done)
    own = len(range(jax.process_index(), len(source), jax.process_count()))
    bar = tqdm(
        total=own,
        initial=result.pictures,
        desc=f"evaluate {config.model.kind} on {config.dataset.name}",
        disable=not progress or not hosts.is_first(),
        unit="picture",
    )
    try:
        with bar:
            for batch in _count(batches, evaluator, result, examples, keep):
                count = int(batch["valid"].sum())
                progress_file.note(result, batch["index"][:count])
                bar.update(count)
                if stop is not None and result.pictures < own and stop.asked():
                    raise KeyboardInterrupt
    except KeyboardInterrupt as interrupt:
        raise progress_file.interrupt(result) from interrupt
    result.add_hosts()
    progress_file.remove()
    return result


def _count(
    batches: Iterator[dict[str, np.ndarray]],
    evaluator: Evaluator,
    result: Evaluation,
    examples: int,
    keep: Keep | None,
) -> Iterator[dict[str, np.ndarray]]:
    """Adds what the evaluator counts to a result; yields each batch when it is counted."""
    shapes_seen = set()
    for batch in batches:
        start, count = time.perf_counter(), int(batch["valid"].sum())
        sums, predictions = evaluator(batch)
        shape = (batch["image"].shape, batch["label"].shape)
        if shape in shapes_seen:  # the first of a shape compiles
            result.seconds += time.perf_counter() - start
            result.images += count
        shapes_seen.add(shape)
        for row in range(count):
            example = example_of(batch, predictions, row, evaluator)
            if len(result.examples) < examples:
                result.examples.append(example)
            if keep is not None:
                keep(str(batch["id"][row]), example[2].astype(batch["label"].dtype))
        result.add(sums)
        result.pictures += count
        yield batch


def validation_batches(
    config: ConfigDict, source: Any, vocabulary: Vocabulary, done: np.ndarray | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """This host's batches of a source's pictures, without those that are done."""
    from zegformer_jax.input import pipeline

    return pipeline.eval_batches(
        source,
        vocabulary,
        batch_size=config.eval.batch_size,
        short_side=config.eval.short_side,
        max_long_side=config.eval.max_long_side,
        more_short_sides=config.eval.more_short_sides,
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
    height, width = batch["size"][row]
    label_height, label_width = batch["original_size"][row]
    headline = evaluator.subsets[0]
    table = headline.table(evaluator.vocabulary.ignore_label)
    truth = table[batch["label"][row, :label_height, :label_width]]
    return (
        batch["image"][row, :height, :width],
        truth,
        predictions[row, :label_height, :label_width],
    )
