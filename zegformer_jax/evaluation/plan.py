"""Plan of an evaluation: its vocabularies, ways of scoring and calibrations."""

import math
from dataclasses import dataclass

import numpy as np

from zegformer_jax.evaluation.subsets import Subset, load_subsets
from zegformer_jax.experiment import Experiment
from zegformer_jax.runtime.errors import UserError
from zegformer_jax.segmentation.zegformer import Model, Question
from zegformer_jax.text.vocabulary import Vocabulary, mark_seen


@dataclass(frozen=True, eq=False)
class Plan:
    """Questions of an evaluation to a model; metrics are made from it, see `metrics.METRICS`.

    Attributes:
        model: The model, without its arrays.
        vocabulary: Vocabulary of the data set's labels.
        subsets: Vocabularies that scores are reported for; the first is the headline.
        questions: The label maps of each subset.
        shown: The way of scoring of the label maps that are shown or written.
        gamma: Calibration, subtracted from the scores of seen classes.
        sweep: Further calibrations to report for `shown` in the headline vocabulary.
        oracles: Whether segments and their names are also measured apart.
    """

    model: Model
    vocabulary: Vocabulary
    subsets: tuple[Subset, ...]
    questions: tuple[Question, ...]
    shown: str
    gamma: float
    sweep: tuple[float, ...]
    oracles: bool


def make_plan(experiment: Experiment, model: Model, trained: Vocabulary | None = None) -> Plan:
    """Reads from an experiment what its evaluation asks.

    Args:
        experiment: The experiment.
        model: Its model.
        trained: Vocabulary of the training if the experiment's data set is another one: a class
            is seen if a synonym of it was.

    Raises:
        UserError: A way of scoring or a vocabulary does not exist, the sweep is no range, or images
            shall be cut into tiles.
    """
    settings, vocabulary = experiment.eval, experiment.vocabulary
    if settings.tile:
        raise UserError(
            f"eval.tile {settings.tile}: an evaluation takes whole images, predict takes tiles; "
            "give --config.eval.tile=0, and cut large images and labels before they are prepared"
        )
    methods = _choose("methods", settings.methods, model.methods) or model.methods
    # A model with one way of scoring, as the baseline, leaves `eval.scores` no choice.
    shown = settings.scores if len(model.methods) > 1 else model.methods[0]
    _choose("scores", (shown,), methods)
    if trained is not None:
        vocabulary = mark_seen(vocabulary, trained)
    subsets = load_subsets(settings.vocabularies, vocabulary, experiment.dataset.name)
    return Plan(
        model=model,
        vocabulary=vocabulary,
        subsets=subsets,
        questions=tuple(ask(subset, methods, (settings.gamma,)) for subset in subsets),
        shown=shown,
        gamma=settings.gamma,
        sweep=parse_sweep(settings.sweep_gamma),
        oracles=settings.oracles,
    )


def ask(subset: Subset, methods: tuple[str, ...], gammas: tuple[float, ...]) -> Question:
    """Returns the question for label maps in a subset's vocabulary."""
    seen_c = np.asarray(subset.vocabulary.seen, bool)
    return Question(
        indices=tuple(subset.indices.tolist()), seen_c=seen_c, methods=methods, gammas=gammas
    )


def _choose(field: str, wanted: tuple[str, ...], known: tuple[str, ...]) -> tuple[str, ...]:
    for method in wanted:
        if method not in known:
            raise UserError(f"eval.{field} '{method}': choose one of {', '.join(known)}")
    return tuple(wanted)


def parse_sweep(text: str) -> tuple[float, ...]:
    """Reads `first:last:step`; an empty text is an empty sweep.

    Raises:
        UserError: The text is not three such numbers, or the range is empty.
    """
    if not text:
        return ()
    try:
        first, last, step = (float(part) for part in text.split(":"))
        count = math.floor((last - first) / step + 1e-6) + 1 if step > 0 else 0
    except (ValueError, OverflowError):
        count = 0
    if count < 1:
        raise UserError(f"eval.sweep_gamma '{text}': give first:last:step, as 0:0.3:0.05")
    return tuple(round(first + step * place, 6) for place in range(count))
