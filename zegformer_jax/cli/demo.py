"""The whole method on the embedded benchmark: train, evaluate, report."""

import dataclasses
import importlib
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

KINDS = (
    "clip",
    "classifier",
    "per_pixel",
    "zegformer",
)  # in the order in which they need each other
FOLDERS = {
    "clip": "clip",
    "classifier": "classifier",
    "per_pixel": "per_pixel",
    "zegformer": ".",
}
RECORDS_FOLDER = "records"  # that the four share
METHOD_NAMES = {
    "per_pixel": "per-pixel baseline",
    "grouper": "ZegFormer-seg (grouper only)",
    "clip": "CLIP only",
    "ensemble": "ZegFormer (ensemble)",
    "ensemble_all": "ZegFormer (ensemble_all)",
}
STAGE_NAMES = {
    "clip": "train CLIP on pictures and captions",
    "classifier": "train the backbone on single pictures of seen classes",
    "per_pixel": "train the per-pixel baseline",
    "zegformer": "train the grouper",
    "evaluate": "evaluate",
}
# Minutes that the stages took on two CPU cores; only their ratios matter, for the time left.
STAGE_MINUTES = {
    "clip": 3.0,
    "classifier": 1.0,
    "per_pixel": 1.5,
    "zegformer": 6.5,
    "evaluate": 1.0,
}
SCENES_SHOWN = 8
Say = Callable[[str], None]


def load_configs(seed: int) -> dict[str, ConfigDict]:
    """The trainings' configs of `configs/openmoji.py`, with another seed."""
    module = importlib.import_module("configs.openmoji")
    configs = {kind: module.get_config(kind) for kind in KINDS}
    for config in configs.values():
        config.seed = seed
    return configs


def run(configs: Mapping[str, ConfigDict], workdir: str | Path, say: Say = print) -> Report:
    """Trains what is not trained yet, evaluates it and writes the report into the workdir.

    Args:
        configs: one for each of `KINDS`.
        workdir: of the grouper; CLIP and the baseline have sub-folders.
        say: prints a line.
    """
    workdir = Path(workdir)
    # There at once: a folder of that name in or beside the current folder is not meant.
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
    """Announces the stages with the time left, and keeps how long each took."""

    def __init__(self, say: Say):
        """Starts before the first stage."""
        self.seconds: dict[str, float] = {}
        self._say = say
        self._name = ""
        self._start = 0.0

    def stage(self, name: str) -> "StageClock":
        """Announces a stage, to be entered as a context."""
        names = list(STAGE_MINUTES)
        position = names.index(name)
        left = sum(list(STAGE_MINUTES.values())[position:])
        self._say(
            f"[{position + 1}/{len(names)}] {STAGE_NAMES[name]} "
            f"(about {left:.0f} min left on two CPU cores, less where it is trained already)"
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
    """The losses among a line of metrics."""
    return {name: value for name, value in line.items() if name.startswith("loss")}


def draw_sheet(method: Evaluation, baseline: Evaluation) -> Any:
    """Draws validation scenes: image, truth, prediction and the baseline's prediction."""
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
    """Puts everything that was measured into a report."""
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
