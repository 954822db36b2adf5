"""The stages of the demo: train four models, evaluate two of them, and write the report."""

import dataclasses
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from zegformer_jax.drawing.curves import loss_curves
from zegformer_jax.drawing.sheet import sheet
from zegformer_jax.evaluation.evaluation import Evaluation
from zegformer_jax.evaluation.loop import evaluate
from zegformer_jax.evaluation.report.files import write_report
from zegformer_jax.evaluation.report.schema import Report, Timing, describe
from zegformer_jax.experiment import Experiment
from zegformer_jax.training.log import read_metrics
from zegformer_jax.training.loop import train

# Each model and its folder in the workdir, in the order in which they need each other.
FOLDERS = {
    "clip": "clip",
    "classifier": "classifier",
    "per_pixel": "per_pixel",
    "zegformer": ".",
}
KINDS = tuple(FOLDERS)
RECORDS_FOLDER = "records"  # shared by the four trainings
METHOD_NAMES = {
    "per_pixel": "per-pixel baseline",
    "grouper": "ZegFormer-seg (grouper only)",
    "clip": "CLIP only",
    "ensemble": "ZegFormer (ensemble)",
    "ensemble_all": "ZegFormer (ensemble_all)",
}
STAGE_NAMES = {
    "clip": "train CLIP on images and captions",
    "classifier": "train the backbone on images of one seen class each",
    "per_pixel": "train the per-pixel baseline",
    "zegformer": "train the grouper",
    "evaluate": "evaluate",
}
# Minutes of each stage on two CPU cores, for the time left.
STAGE_MINUTES = {
    "clip": 3.0,
    "classifier": 1.0,
    "per_pixel": 1.5,
    "zegformer": 6.5,
    "evaluate": 1.0,
}
SCENES_SHOWN = 8
Say = Callable[[str], None]


def run_stages(configs: Mapping[str, ConfigDict], workdir: str | Path, say: Say = print) -> Report:
    """Trains what is not trained yet, evaluates it and writes the report into the workdir.

    Args:
        configs: One for each of `KINDS`.
        workdir: Folder of the grouper's run; the other runs are in folders inside it.
        say: Prints a line.

    Returns:
        The report, which is also written as `report.md`.
    """
    workdir = Path(workdir)
    # Made first, so that `records` and `../records` in the configs mean this folder and not one of
    # the same name in the current folder.
    (workdir / RECORDS_FOLDER).mkdir(parents=True, exist_ok=True)
    clock = StageClock(say)
    for kind in KINDS:
        with clock.stage(kind):
            train(Experiment.open(configs[kind], workdir / FOLDERS[kind]))
    with clock.stage("evaluate"):
        baseline, method = (
            evaluate(Experiment.open(configs[kind], workdir / FOLDERS[kind]), examples=SCENES_SHOWN)
            for kind in ("per_pixel", "zegformer")
        )
    draw_sheet(method, baseline).save(workdir / "scenes.png")
    losses = {
        kind: [(line["step"], losses_of(line)) for line in read_metrics(workdir / FOLDERS[kind])]
        for kind in KINDS
    }
    loss_curves(losses).save(workdir / "losses.png")
    result = make_report(configs, workdir, baseline, method, clock.seconds, losses)
    write_report(workdir, result)
    return result


class StageClock:
    """Announces each stage with the time left, and measures it."""

    def __init__(self, say: Say):
        """Begins without a stage."""
        self.seconds: dict[str, float] = {}
        self._say = say
        self._name = ""
        self._start = 0.0

    def stage(self, name: str) -> "StageClock":
        """Announces a stage and returns the context that measures it."""
        names = list(STAGE_MINUTES)
        position = names.index(name)
        left = sum(list(STAGE_MINUTES.values())[position:])
        self._say(
            f"[{position + 1}/{len(names)}] {STAGE_NAMES[name]} "
            f"(at most {left:.0f} min left on two CPU cores)"
        )
        self._name = name
        return self

    def __enter__(self) -> None:
        """Starts the clock."""
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        """Stops the clock."""
        self.seconds[self._name] = time.perf_counter() - self._start


def losses_of(line: Mapping[str, float]) -> dict[str, float]:
    """Returns the losses among a step's metrics."""
    return {name: value for name, value in line.items() if name.startswith("loss")}


def draw_sheet(method: Evaluation, baseline: Evaluation) -> Any:
    """Draws validation images: image, truth, prediction and the baseline's prediction."""
    vocabulary = method.plan.subsets[0].vocabulary
    rows = [
        (*ours, theirs[2]) for ours, theirs in zip(method.examples, baseline.examples, strict=True)
    ]
    return sheet(
        rows,
        vocabulary.names,
        seen=vocabulary.seen,
        titles=("image", "truth", "ZegFormer", "per-pixel baseline"),
        ignore=method.plan.vocabulary.ignore_label,
    )


def make_report(
    configs: Mapping[str, ConfigDict],
    workdir: Path,
    baseline: Evaluation,
    method: Evaluation,
    seconds: Mapping[str, float],
    losses: Mapping[str, Any],
) -> Report:
    """Collects all measurements in a report."""
    report = describe(method, "ZegFormer on OpenMoji-VOC")
    rows = [*describe(baseline, "").scores, *report.scores]
    scores = [
        dataclasses.replace(row, name=name)
        for method_name, name in METHOD_NAMES.items()
        for row in rows
        if row.name == method_name
    ]
    steps = {
        kind: _median([x["seconds_per_step"] for x in read_metrics(workdir / FOLDERS[kind])])
        for kind in KINDS
    }
    images = {
        "per-pixel baseline": baseline.seconds_per_image,
        "ZegFormer": method.seconds_per_image,
    }
    settings = {kind: config.to_dict() for kind, config in configs.items()} | {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "python": platform.python_version(),
        "jax": jax.__version__,
    }
    return dataclasses.replace(
        report,
        scores=scores,
        shown=METHOD_NAMES[report.shown],
        timing=Timing(step=steps, image=images, stage=dict(seconds)),
        settings=settings,
        losses=losses,
        figures={
            "scenes.png": "Validation scenes; unseen classes are starred.",
            "losses.png": "Training losses.",
        },
    )


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2] if values else float("nan")
