"""A metric is one module and one line; it is counted, resumed and reported like the others."""

import json
import sys

import jax
import pytest
from toy_experiment import LEVELS, Records, ToyExperiment

from zegformer_jax.evaluation import evaluator, loop, step
from zegformer_jax.evaluation.evaluation import Interrupted
from zegformer_jax.evaluation.report import files, tables
from zegformer_jax.evaluation.report.schema import describe
from zegformer_jax.evaluation.resume import ResumeFile
from zegformer_jax.runtime.mesh import make_mesh

MODULE = '''
"""Share of images in which a pixel is right."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp


@dataclass(frozen=True, eq=False)
class AnyRight:
    question: Any
    subset: Any
    method: str
    gamma: float
    vocabulary: str
    name: str

    def count(self, prediction, truth):
        # Label maps are in the question's classes, labels in the data set's.
        label_yx = jnp.asarray(self.subset.table(truth.ignore_label))[truth.label_yx]
        right_yx = prediction.label_map(self.method, self.gamma) == label_yx
        labelled_yx = label_yx != truth.ignore_label
        pixels = {"right": right_yx & labelled_yx, "all": labelled_yx}
        return {name: map_yx.any().astype(jnp.int32) for name, map_yx in pixels.items()}

    def report(self, state):
        return {"share": state["right"] / state["all"]}


def make(plan):
    question, subset = plan.questions[0], plan.subsets[0]
    return [
        AnyRight(question, subset, method, plan.gamma, subset.stem, f"a right pixel by {method}")
        for method in question.methods
    ]
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Adds a module with a metric."""
    (tmp_path / "any_right.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    import any_right

    monkeypatch.setattr(step, "METRICS", (*step.METRICS, any_right.make))
    yield
    del sys.modules["any_right"]


def make_experiment():
    """Makes five images: the shifted classes are right in two, the plain ones in the others."""
    source = Records()
    for place in (1, 3):
        source.images[place][..., 0] = LEVELS * ((source.images[place][..., 0] // LEVELS + 2) % 3)
    return ToyExperiment(source, gamma=0.0, batch_size=2)


def assert_reported(evaluation, tmp_path):
    """Asserts that the metric is on the screen, in report.json and in report.md."""
    report = describe(evaluation, "words")
    text = files.write_evaluation(tmp_path / "out", evaluation, report)
    assert "a right pixel by shift: share 40.0\n" in text
    assert "a right pixel by stay: share 60.0\n" in text
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    assert content["metrics"] == [
        {"name": "a right pixel by shift", "vocabulary": "words", "share": 0.4, **CLASSLESS},
        {"name": "a right pixel by stay", "vocabulary": "words", "share": 0.6, **CLASSLESS},
    ]
    rows = [line.strip("| ").split("|") for line in tables.markdown(report).splitlines()]
    rows = [[cell.strip() for cell in row] for row in rows]
    assert ["metric", "vocabulary", "share"] in rows
    assert ["a right pixel by shift", "words", "40.0"] in rows


CLASSLESS = {"class_iou": {}, "class_accuracy": {}}


@pytest.mark.parametrize("devices", [1, 2])
def test_a_new_metric_is_counted_and_reported(toy, tmp_path, monkeypatch, devices):
    monkeypatch.setattr(evaluator, "make_local_mesh", lambda: make_mesh(jax.devices()[:devices]))
    assert_reported(loop.evaluate(make_experiment(), progress=False), tmp_path)


def test_a_new_metric_resumes(toy, tmp_path):
    counted, seen = [], []

    def stop(id_, labels_hw):
        seen.append(id_)
        if len(seen) == 3:
            raise KeyboardInterrupt

    def evaluate(keep):
        with ResumeFile(tmp_path) as resume:
            counted.append(
                loop.evaluate(make_experiment(), keep=keep, resume=resume, progress=False)
            )

    with pytest.raises(Interrupted) as stopped:
        evaluate(stop)
    part = stopped.value.evaluation
    state = part.states["words/a right pixel by shift"]
    assert part.images == 2 and (state["right"], state["all"]) == (1, 2)
    rest = []
    evaluate(lambda id_, labels_hw: rest.append(id_))
    assert len(rest) == 3 and not set(rest) & set(seen[:2])
    assert_reported(counted[0], tmp_path)
