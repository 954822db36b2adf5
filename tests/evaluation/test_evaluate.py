"""Evaluation: its counts against NumPy, whatever the batches and devices; parts of a vocabulary."""

import os
import signal
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shrunk
from clips import VIT, random_params
from PIL import Image
from semantic_maps import semantic_maps
from toy_experiment import LEVELS, VOCABULARY, Records, ToyExperiment

from zegformer_jax import segmenter
from zegformer_jax.evaluation import evaluator, loop
from zegformer_jax.evaluation import step as evaluation_step
from zegformer_jax.evaluation.evaluation import Interrupted
from zegformer_jax.evaluation.evaluator import Evaluator
from zegformer_jax.evaluation.metric import Prediction, Truth, add, by_key, zeros
from zegformer_jax.evaluation.metrics import confusion
from zegformer_jax.evaluation.metrics.oracles import RIGHT_NAMES, RIGHT_SEGMENTS, RightSegments
from zegformer_jax.evaluation.metrics.segment_fit import BOUNDARY_F, IOU, Fit, Overlap
from zegformer_jax.evaluation.plan import ask, parse_sweep
from zegformer_jax.evaluation.resume import ResumeFile
from zegformer_jax.evaluation.subsets import load_subsets
from zegformer_jax.experiment import Experiment
from zegformer_jax.experiment.workdir import load_config
from zegformer_jax.input.datasets import open_source
from zegformer_jax.input.transforms import padded_sides, resized_sides
from zegformer_jax.models.clip.model import CLIP_MEAN, CLIP_STD
from zegformer_jax.models.normalise import normalise_images
from zegformer_jax.pretrained.clip.load import save_clip
from zegformer_jax.runtime.errors import UserError
from zegformer_jax.runtime.mesh import make_mesh
from zegformer_jax.segmentation import class_scores
from zegformer_jax.segmentation.augmentation import View
from zegformer_jax.segmentation.classifiers.one_pass import encode_in_one_pass
from zegformer_jax.segmentation.label_maps import ClassScores
from zegformer_jax.segmentation.zegformer import Queries, TextEmbeddings, ZegFormer
from zegformer_jax.text.tokenizer import train_tokenizer
from zegformer_jax.text.vocabulary import load_vocabulary
from zegformer_jax.training.loop import train

HEADLINE = "pascal_voc_20"


def counted(truth, prediction, classes):
    """A confusion matrix, pixel by pixel; truths outside 0..classes - 1 do not count."""
    matrix = np.zeros((classes, classes), np.int64)
    for t, p in zip(truth.ravel(), prediction.ravel(), strict=True):
        if t < classes:
            matrix[t, p] += 1
    return matrix


SHOWN = "clip"  # neither the first method nor the last
SHOWN_KEY = f"{HEADLINE}/{SHOWN}"


def experiment_of(finished, kind="zegformer", **fields):
    """The finished experiment with other fields of `eval`."""
    config = shrunk.get_config(kind).unlock()
    config.eval.update(fields)
    workdir = finished.workdir if kind == "zegformer" else finished.workdir / kind
    return Experiment.open(config.lock(), workdir)


@pytest.fixture(scope="module")
def whole(finished):
    """The grouper's evaluation with every label map kept."""
    return loop.evaluate(experiment_of(finished, scores=SHOWN), examples=100, progress=False)


@pytest.mark.parametrize("name, is_warned", [("folder", True), ("pascal_voc", False)])
def test_validation_labels_without_a_class_give_a_warning(name, is_warned, tmp_path, caplog):
    """Of a user's folder: published labels may lack some of their many classes."""
    for kind in ("images", "annotations"):
        (tmp_path / "validation" / kind).mkdir(parents=True)
    Image.new("RGB", (9, 8)).save(tmp_path / "validation/images/x.png")
    Image.new("L", (9, 8), 1).save(tmp_path / "validation/annotations/x.png")
    experiment = ToyExperiment(
        open_source("folder", "validation", data_dir=tmp_path, vocabulary=VOCABULARY)
    )
    experiment.dataset = SimpleNamespace(name=name, directory="mine")
    result = loop.evaluate(experiment, progress=False)
    assert result.images == 1
    warned = "WARNING: mine: validation: no pixel shows 2 of 3 classes: 'a' (id 0), 'c' (id 2)"
    assert caplog.messages == [warned] * is_warned
    caplog.clear()
    validation = loop.Validation(experiment)
    for _ in range(3):
        validation({"shift": np.int32(1)})
    assert caplog.messages == [warned] * is_warned


@pytest.mark.slow
@pytest.mark.parametrize(
    "field, value, message",
    [
        ("segment_classifier", "crop", "eval.segment_classifier 'crop': choose one of crops"),
        ("scores", "both", "eval.scores 'both': choose one of grouper, clip"),
        ("methods", ("clip", "both"), "eval.methods 'both': choose one of grouper, clip"),
    ],
)
def test_choices_that_do_not_exist_are_refused(finished, field, value, message):
    with pytest.raises(ValueError, match=message):
        loop.evaluate(experiment_of(finished, **{field: value}), progress=False)


@pytest.fixture
def make_evaluator(tmp_path, monkeypatch):
    """Evaluators of a model without any parameters, with a small CLIP."""
    save_clip(tmp_path / "clip", VIT, random_params(VIT), train_tokenizer(["a"], 530, 14))
    text = TextEmbeddings(*np.zeros((2, 236, VIT.embed_dim), np.float32))
    monkeypatch.setattr(Experiment, "text_embeddings", lambda *_: text)

    def make(**fields):
        config = shrunk.get_config().unlock()
        config.dtype = fields.pop("training", "float32")
        config.eval.update(fields)
        return Evaluator(Experiment.open(config.lock(), tmp_path), variables={})

    return make


@pytest.mark.parametrize("own, training", [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_an_evaluation_computes_in_its_own_dtype(make_evaluator, own, training):
    model = make_evaluator(dtype=own, training=training).model
    assert model.grouper.dtype == model.classifier.clip.dtype == own
    assert model.grouper.backbone.dtype == own


def test_an_evaluator_asks_for_all_that_it_scores(make_evaluator):
    """Every method that is asked for, in every vocabulary; the rule of skipping bounds these."""
    fields = {"methods": ("clip", "grouper"), "skip_below": 0.5, "gamma": 0.3}
    evaluator = make_evaluator(scores="clip", **fields)
    assert evaluator.plan.shown == "clip" and evaluator.model.skipping.skip_below == 0.5
    questions = evaluator.plan.questions
    assert [(q.methods, q.gammas) for q in questions] == [(("clip", "grouper"), (0.3,))] * 2
    assert [(len(q.indices), len(q.seen_c)) for q in questions] == [(20, 20), (236, 236)]
    with pytest.raises(ValueError, match="eval.scores 'ensemble': choose one of clip, grouper"):
        make_evaluator(scores="ensemble", **fields)


def test_tiles_are_for_prediction(make_evaluator):
    with pytest.raises(UserError, match=r"^eval.tile 512: an evaluation takes whole images"):
        make_evaluator(tile=512)


@pytest.mark.parametrize(
    "field, value", [("tile", 64), ("scores", "both"), ("sweep_gamma", "1"), ("vocabularies", "x")]
)
def test_a_wrong_setting_of_a_validation_stops_a_training_at_its_start(tmp_path, field, value):
    """Not at the first validation, which may be hours later; nothing is written."""
    save_clip(tmp_path / "clip", VIT, random_params(VIT), train_tokenizer(["a"], 530, 14))
    config = shrunk.get_config().unlock()
    config.clip.source, config.model.start_from = str(tmp_path / "clip"), ""
    config.train.validate_every = 1
    config.eval[field] = (value,) if field == "vocabularies" else value
    with pytest.raises(UserError, match=f"{field}|'x'|no vocabulary"):
        train(Experiment.open(config.lock(), tmp_path / "run"), progress=False)
    assert not (tmp_path / "run").exists()


def test_two_metrics_of_one_name_are_refused():
    metrics = list(Evaluator(ToyExperiment()).metrics.values())
    with pytest.raises(ValueError, match="two metrics are named 'shift' in 'words'"):
        by_key([*metrics, metrics[0]])


@pytest.mark.parametrize("shown, said", [("grouper", 5), ("clip", 7)])
def test_what_is_shown_swept_and_asked_of_oracles_is_by_eval_scores(
    make_evaluator, monkeypatch, shown, said
):
    """An image of class 3 in one segment, which the grouper takes for 5 and CLIP for 7.

    Of all classes both would take it for 100, and for 9 what the other, empty segment shows.
    """
    evaluator = make_evaluator(scores=shown, sweep_gamma="0:0.1:0.1")
    classes, shape = np.arange(237), (64, 64)
    queries = Queries(
        class_logits_qc=20.0 * (classes == [[5], [9]])
        + 40.0 * (classes == 100)
        - 20.0 * (classes == 236),
        mask_logits_qhw=jnp.full((2, 16, 16), jnp.array([[[10.0]], [[-10.0]]])),
        clip_logits_qc=(50.0 * (classes == [[7], [9]]) + 90.0 * (classes == 100))[:, :236],
        named_q=np.ones(2, bool),
    )
    monkeypatch.setattr(ZegFormer, "run", lambda *_: jax.tree.map(jnp.asarray, queries))
    example = {
        "views": ((np.zeros((*shape, 3), np.uint8), np.array(shape)),),
        "original_size": np.array(shape),
        "label": np.full(shape, 3, np.uint8),
    }
    states, labels = jax.jit(evaluator.step.count_image)(None, None, example)
    assert np.all(labels == said)
    expected = {"grouper": 5, "clip": 7, RIGHT_NAMES: 3, RIGHT_SEGMENTS: said}
    expected |= {f"{shown}, gamma {gamma}": said for gamma in ("0", "0.1")}
    for name, place in expected.items():
        matrix = np.asarray(states[f"{HEADLINE}/{name}"])
        assert matrix[3, place] == matrix.sum() == 64 * 64, name
    assert states[f"openmoji_voc/{shown}"][3, 100] == 64 * 64
    for name in (f"{HEADLINE}/{IOU}", f"openmoji_voc/{IOU}", f"{HEADLINE}/{BOUNDARY_F}"):
        fit = states[name]
        assert fit.sum_c[3] == fit.sum_c.sum() == fit.regions_c[3] == fit.regions_c.sum() == 1
    kept = {f"{HEADLINE}/{name}" for name in (*expected, "ensemble", "ensemble_all")}
    assert {key for key in states if key.startswith(HEADLINE)} - kept == {
        f"{HEADLINE}/{IOU}",
        f"{HEADLINE}/{BOUNDARY_F}",
    }


def test_another_clip_is_another_evaluation(make_evaluator, tmp_path):
    """The counts of one are not resumed with the other."""
    identity = make_evaluator().identity()
    assert make_evaluator().identity() == identity
    save_clip(tmp_path / "clip", VIT, random_params(VIT, seed=2), train_tokenizer(["a"], 530, 14))
    assert make_evaluator().identity() != identity


def test_regions_are_named_by_calibrated_scores(make_evaluator):
    """The scores are the best-fitting query's, or all queries' if none touches the region."""
    evaluator = make_evaluator(scores="grouper", gamma=0.2)
    headline = evaluator.plan.subsets[0]
    seen = np.asarray(headline.vocabulary.seen)
    (one, other), unseen = np.flatnonzero(seen)[:2], np.flatnonzero(~seen)[0]
    probabilities = np.zeros((5, 20))
    probabilities[0, [one, unseen]] = 0.55, 0.45
    probabilities[1, unseen] = 1.0
    probabilities[2:, other] = 1.0
    class_logits = np.full((5, 237), -50.0)
    class_logits[:, headline.indices] = np.log(np.maximum(probabilities, 1e-20))
    queries = Queries(class_logits, None, np.zeros((5, 236)), np.ones(5, bool))
    overlap = Overlap(jnp.eye(5, 20), jnp.ones(20))
    (metric,) = (x for x in evaluator.metrics.values() if isinstance(x, RightSegments))
    names = np.asarray(metric.name_regions(queries, overlap))
    assert names[:6].tolist() == [unseen, unseen, other, other, other, other]


def test_labels_at_the_networks_input_are_the_nearest():
    """5 by 3 pixels resized to 10 by 6, and to 2 by 2; padding is ignored."""
    label_yx = np.full((8, 8), 255)
    label_yx[:5, :3] = np.arange(15).reshape(5, 3)

    def resized(*size):
        truth = Truth(jnp.asarray(label_yx), jnp.array([5, 3]), jnp.array(size), (12, 8), 255)
        return np.asarray(truth.resized())

    doubled = np.full((12, 8), 255)
    doubled[:10, :6] = np.repeat(np.repeat(label_yx[:5, :3], 2, 0), 2, 1)
    np.testing.assert_array_equal(resized(10, 6), doubled)
    # Centres of the halves: rows 1.25 and 3.75, columns 0.75 and 2.25.
    assert resized(2, 2)[:2, :2].tolist() == [[3, 5], [9, 11]] and resized(2, 2)[2:].min() == 255


@pytest.fixture(scope="module")
def records(finished):
    source = experiment_of(finished).open_split("validation")
    return [source[i] for i in range(len(source))]


@pytest.mark.slow
def test_the_confusion_is_that_of_the_label_maps(whole, records):
    assert len(whole.examples) == len(records) == shrunk.VALIDATION_SCENES
    expected = sum(counted(truth, prediction, 20) for _, truth, prediction in whole.examples)
    np.testing.assert_array_equal(whole.states[SHOWN_KEY], expected)
    scenes = {image.tobytes() for image, _, _ in whole.examples}
    assert scenes == {record["image"].tobytes() for record in records}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["grouper", "clip", "ensemble"])
def test_every_labelled_pixel_counts_once(whole, records, method):
    """Fill rows, padding and ignored pixels do not count; the headline has its classes only."""
    labels = np.concatenate([record["label"].ravel() for record in records])
    for subset in whole.plan.subsets:
        rows = whole.states[f"{subset.stem}/{method}"].sum(1)
        expected = [(labels == index).sum() for index in subset.indices]
        np.testing.assert_array_equal(rows, expected)


@pytest.mark.slow
def test_every_class_in_every_image_has_an_overlap(whole, records):
    present = sum(np.isin(np.arange(236), record["label"]) for record in records)
    for name in (IOU, BOUNDARY_F):
        fit = whole.states[f"{HEADLINE}/{name}"]
        np.testing.assert_array_equal(fit.regions_c, present)
        assert np.all(fit.sum_c <= present) and np.all(fit.sum_c >= 0) and fit.sum_c.sum() > 0


def assert_same_states(actual, expected):
    """Counts exactly; sums of fractions to their rounding, which depends on the order."""
    assert actual.states.keys() == expected.states.keys() and actual.images == expected.images
    for key, state in expected.states.items():
        leaves = zip(jax.tree.leaves(actual.states[key]), jax.tree.leaves(state), strict=True)
        for one, other in leaves:
            exact = other.dtype == np.int64
            np.testing.assert_allclose(one, other, rtol=0 if exact else 1e-6, err_msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("devices, batch_size", [(1, 1), (1, 3), (2, 4)])
def test_neither_batches_nor_devices_matter(finished, monkeypatch, devices, batch_size):
    """This is the per-pixel baseline; `test_runs.py` has the whole method."""
    larger = {"short_side": shrunk.SIDE}  # square, wide and tall images have their own shapes
    reference = loop.evaluate(experiment_of(finished, "per_pixel", **larger), progress=False)
    monkeypatch.setattr(evaluator, "make_local_mesh", lambda: make_mesh(jax.devices()[:devices]))
    experiment = experiment_of(finished, "per_pixel", batch_size=batch_size, **larger)
    assert_same_states(loop.evaluate(experiment, progress=False), reference)
    assert all(state.sum() > 0 for state in reference.states.values())


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("valid", [[True, True], [False, True], [False, False]])
def test_a_row_that_is_not_valid_does_not_count(monkeypatch, valid, together):
    monkeypatch.setattr(evaluation_step, "IMAGES_TOGETHER_ON", {"cpu": together})
    experiment = ToyExperiment(batch_size=2)
    evaluator = Evaluator(experiment)
    source = experiment.open_split("validation")
    batch = next(loop.validation_batches(experiment, source))
    states, shown = evaluator(batch | {"valid": np.array(valid)})
    labels = [source.labels[place] for place in (0, 1) if valid[place]]
    expected = sum((counted(x, (x + 1) % 3, 3) for x in labels), np.zeros((3, 3), int))
    np.testing.assert_array_equal(states["words/shift"], expected)
    for place in np.flatnonzero(valid):
        height, width = source.labels[place].shape
        red = source.images[place][..., 0].astype(int)
        np.testing.assert_array_equal(shown[place, :height, :width], (red // LEVELS + 1) % 3)


def test_only_rows_with_an_image_are_worked_on(monkeypatch):
    """Five images in batches of four, on two devices."""
    worked_on, run = [], ToyExperiment.segmentation_model.run

    def watched(self, weights, text, view, questions):
        jax.debug.callback(lambda: worked_on.append(1))
        return run(weights, text, view, questions)

    monkeypatch.setattr(type(ToyExperiment.segmentation_model), "run", watched)
    result = loop.evaluate(ToyExperiment(Records(5), batch_size=4), progress=False)
    jax.effects_barrier()
    assert len(worked_on) == result.images == 5


@pytest.mark.slow
def test_the_headline_is_what_the_segmenter_says_with_its_classes(finished, whole):
    """Columns of the full vocabulary's scores, or a run with the 20 names: the same label map."""
    segment = segmenter.Segmenter(experiment_of(finished, scores=SHOWN))
    agreeing = [
        (segment(image, whole.plan.subsets[0].vocabulary.names).labels == prediction).mean()
        for image, _, prediction in whole.examples[:2]
    ]
    assert min(agreeing) > 0.99, agreeing


def queries_by_colour(self, weights, text, view, questions):
    """Stands for the models: masks are mixtures of the image's colours, 4 pixels wide."""
    rng = np.random.default_rng(0)
    image = view.image_hwc.astype(np.float32) / 255
    height, width, _ = image.shape
    means = image.reshape(height // 4, 4, width // 4, 4, 3).mean((1, 3)) - 0.5
    masks = 15 * jnp.einsum("hwc,qc->qhw", means, rng.normal(size=(8, 3)))
    logits = 5 * jnp.sin(1000 * text.grouper_cd[:, :8].T)  # as good as random, of each class
    no_object = jnp.zeros((8, 1))
    return Queries(jnp.concatenate([logits, no_object], -1), masks, -logits, jnp.ones(8, bool))


@pytest.mark.slow
def test_augmented_maps_are_averages_of_plain_ones(finished, monkeypatch):
    """The plain maps are of two sizes, each mirrored too; evaluation and prediction agree."""
    monkeypatch.setattr(ZegFormer, "run", queries_by_colour)
    config = load_config(finished.workdir).unlock()
    config.eval.update(scores=SHOWN, methods=(SHOWN,), vocabularies=(HEADLINE,), gamma=1e-4)
    sides = shrunk.SIDE, 2 * shrunk.SIDE
    source = Experiment(config, finished.workdir).open_split("validation")
    picture, names = source[0]["image"], load_vocabulary(HEADLINE).names
    maps = []
    for side in sides:
        config.eval.short_side = side
        plain = segmenter.Segmenter(Experiment(config, finished.workdir))
        seen = np.asarray(plain.vocabulary(names).seen)
        for step in (1, -1):
            queries = plain.queries(np.ascontiguousarray(picture[:, ::step]), names)
            class_logits, mask_logits, clip_logits, _ = (np.asarray(x) for x in queries)
            scores = class_scores.class_scores(class_logits, clip_logits, seen, mode=SHOWN)
            size = resized_sides(*picture.shape[:2], side, config.eval.max_long_side)
            original = {"original_size": np.array(picture.shape[:2]), "out_size": picture.shape[:2]}
            view, question = View(None, np.array(size)), ClassScores([scores[None]], seen)
            (map_,) = semantic_maps([mask_logits], [view], [question], **original)
            maps.append(np.asarray(map_[0, 0])[..., ::step])
    expected = (np.mean(maps, 0) - 1e-4 * seen[:, None, None]).argmax(0)
    assert (maps[0].argmax(0) != expected).mean() > 0.01

    config.eval.update(short_side=sides[0], more_short_sides=sides[1:], flip=True)
    experiment = Experiment(config, finished.workdir)
    augmented, kept = segmenter.Segmenter(experiment)(picture, names).labels, {}
    loop.evaluate(experiment, progress=False, keep=kept.__setitem__)
    for labels in (augmented, kept[str(source[0]["id"])]):
        assert (labels == expected).mean() > 0.998


@pytest.mark.slow
def test_in_one_pass_clip_alone_says_something_else(finished):
    """Its answer follows from the features of `encode_in_one_pass`."""
    config = load_config(finished.workdir).unlock()
    experiment = Experiment(config, finished.workdir)
    picture = experiment.open_split("validation")[0]["image"]
    names = load_vocabulary(HEADLINE).names
    crops = segmenter.Segmenter(experiment).queries(picture, names)
    config.eval.update(segment_classifier="one_pass", one_pass_layers=1)
    once = segmenter.Segmenter(Experiment(config, finished.workdir)).queries(picture, names)
    for array, same in zip(once[:2], crops[:2], strict=True):
        np.testing.assert_array_equal(array, same)
    assert np.abs(once.clip_logits_qc - crops.clip_logits_qc).max() > 1e-3

    clip, size = experiment.clip, np.array(picture.shape[:2])
    padded = np.zeros((1, *padded_sides(*size), 3), np.uint8)
    padded[0, : size[0], : size[1]] = picture
    images = normalise_images(jnp.asarray(padded), size[None], CLIP_MEAN, CLIP_STD)
    features = encode_in_one_pass(
        clip.module(), clip.params, images[0], size, once.mask_logits_qhw, 1
    )
    text = clip.embed(names, config.clip.classifier_prompts)
    expected = class_scores.clip_logits(features, text, clip.params["logit_scale"])
    np.testing.assert_allclose(once.clip_logits_qc, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_the_report_has_these_scores(finished, whole):
    for subset in whole.plan.subsets:
        row = finished.report.find("ZegFormer (ensemble)", subset.stem)
        matrix = whole.states[f"{subset.stem}/ensemble"]
        union = matrix.sum(0) + matrix.sum(1) - np.diag(matrix)
        present = matrix.sum(1) > 0
        seen = np.asarray(subset.vocabulary.seen)
        iou = np.diag(matrix)[present & seen] / union[present & seen]
        np.testing.assert_allclose(row.values["seen"], iou.mean())
        pixels = np.diag(matrix).sum() / matrix.sum()
        np.testing.assert_allclose(row.values["pixels"], pixels)


def test_a_subset_renumbers_its_classes_and_ignores_the_others():
    vocabulary = load_vocabulary("openmoji_voc")
    subset = load_subsets([HEADLINE], vocabulary, "whole")[0]
    assert [vocabulary.names[i] for i in subset.indices] == list(subset.vocabulary.names)
    assert subset.vocabulary.seen == tuple(vocabulary.seen[i] for i in subset.indices)
    table = subset.table(255)
    labels = np.array([*subset.indices, 20, 235, 255])
    np.testing.assert_array_equal(table[labels], [*range(20), 255, 255, 255])


def test_a_vocabulary_with_other_classes_is_refused():
    vocabulary = load_vocabulary("openmoji_voc")
    with pytest.raises(
        ValueError, match="eval.vocabularies: 'ade20k_150' has the class '.*', which"
    ):
        load_subsets(["ade20k_150"], vocabulary, "whole")


def test_states_add_up_in_64_bits():
    """Counts beyond 32 bits, and fractions of more images than float32 tells apart."""
    state = Fit(np.full(3, 2.0**24, np.float32), np.full(3, 2**31 - 1, np.int32))
    one = Fit(np.ones(3, np.float32), np.ones(3, np.int32))
    total = zeros({"a": state})
    for more in (state, one, one, one):
        total = add(total, {"a": more})
    assert total["a"].sum_c.dtype == np.float64 and total["a"].regions_c.dtype == np.int64
    assert np.all(total["a"].sum_c == 2**24 + 3) and np.all(total["a"].regions_c == 2**31 + 2)


WHERE = ["before its counts", "amid its counts", "by SIGTERM"]


@pytest.mark.parametrize("where", WHERE)
def test_an_interrupted_evaluation_resumes(tmp_path, monkeypatch, where):
    """The batch that was counted is in the result and in the file, the one after in neither."""
    experiment, kept, added = ToyExperiment(batch_size=2), [], []

    def keep(id_, labels_hw):
        kept.append((id_, labels_hw))
        if where == "before its counts" and len(kept) == 3:
            raise KeyboardInterrupt
        if where == "by SIGTERM" and len(kept) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def add_a_part(total, more):
        added.append(1)
        if where == "amid its counts" and len(added) == 2:
            add(total["words/shift"], more["words/shift"])
            raise KeyboardInterrupt
        return add(total, more)

    def evaluate(keep):
        with ResumeFile(tmp_path) as resume:
            return loop.evaluate(experiment, keep=keep, resume=resume, progress=False)

    with monkeypatch.context() as patched, pytest.raises(Interrupted) as stopped:
        patched.setattr(loop, "add", add_a_part)
        evaluate(keep)
    part, source = stopped.value.evaluation, experiment.source
    assert part.partial and (part.images, part.of) == (2, len(source))
    truths = dict(zip(source.ids, source.labels, strict=True))
    expected = sum(counted(truths[id_], labels, 3) for id_, labels in kept[:2])
    np.testing.assert_array_equal(part.states["words/shift"], expected)
    (file,) = tmp_path.iterdir()
    assert file.match("partial_*_0_of_1.npz")
    rest = []
    result = evaluate(lambda id_, labels_hw: rest.append(id_))
    assert not list(tmp_path.iterdir())
    assert len(rest) == len(source) - 2 and not set(rest) & {id_ for id_, _ in kept[:2]}
    assert_same_states(result, loop.evaluate(experiment, progress=False))


def test_an_interruption_before_the_first_image_leaves_nothing(tmp_path):
    def stop(id_, labels_hw):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as stopped, ResumeFile(tmp_path) as resume:
        loop.evaluate(ToyExperiment(), progress=False, keep=stop, resume=resume)
    assert stopped.value.evaluation is None and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_whole_method_resumes(finished, whole, tmp_path):
    """Its counts are those of an uninterrupted evaluation."""
    experiment, kept = experiment_of(finished, scores=SHOWN), []

    def stop(id_, labels_hw):
        kept.append(id_)
        if len(kept) == 3:
            raise KeyboardInterrupt

    def evaluate(keep=None):
        with ResumeFile(tmp_path) as resume:
            return loop.evaluate(experiment, keep=keep, resume=resume, progress=False)

    with pytest.raises(Interrupted) as stopped:
        evaluate(stop)
    assert stopped.value.evaluation.images == 2
    assert_same_states(evaluate(), whole)


@pytest.mark.slow
def test_a_sweep_of_gamma_counts_every_gamma(finished, whole):
    """One is the evaluation's own; one above every score leaves no pixel to a seen class."""
    fields = {"scores": SHOWN, "methods": (SHOWN,), "oracles": False}
    experiment = experiment_of(finished, sweep_gamma="0.1:20.1:10", **fields)
    result = loop.evaluate(experiment, progress=False)
    names = [f"{SHOWN}, gamma {gamma}" for gamma in ("0.1", "10.1", "20.1")]
    assert [x.name for x in result.metrics.values()] == [SHOWN, *names, SHOWN]
    assert [x.vocabulary for x in result.metrics.values()] == [HEADLINE] * 4 + ["openmoji_voc"]
    swept = [result.states[f"{HEADLINE}/{name}"] for name in names]
    np.testing.assert_array_equal(swept[0], whole.states[SHOWN_KEY])
    seen = np.asarray(result.plan.subsets[0].vocabulary.seen)
    named_seen = [matrix[:, : len(seen)][:, seen].sum() for matrix in swept]
    assert named_seen[0] > 0 and named_seen[1:] == [0, 0]


NO_SWEEPS = ["0.1", "a:b:c", "0:1:0", "0.3:0:0.05", "1:0:1", "0:1:-0.1", "0:inf:0.1", "nan:1:0.1"]


@pytest.mark.parametrize("text", NO_SWEEPS)
def test_a_sweep_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="eval.sweep_gamma .*give first:last:step"):
        parse_sweep(text)
    assert parse_sweep("0:0.3:0.1") == (0.0, 0.1, 0.2, 0.3)


@pytest.mark.slow
def test_with_all_segments_named_nothing_is_lost(finished, whole):
    """A bound that no weight is below, and room for every query: not a bit changes."""
    experiment = experiment_of(
        finished, scores=SHOWN, skip_below=1e-30, top_segments=8, clip_chunk=3
    )
    assert_same_states(loop.evaluate(experiment, progress=False), whole)


def test_all_kinds_of_background_count_as_one():
    vocabulary = load_vocabulary("pascal_voc_20b")
    (subset,) = load_subsets((), vocabulary, "pascal_voc_20b")
    question = ask(subset, ("clip",), (0.0,))
    metric = confusion.Confusion("clip", subset, question, "clip", 0.0)
    pixels = {(3, 3): 5, (20, 20): 1, (20, 41): 7, (20, 3): 2}
    label, predicted = np.repeat(list(pixels), list(pixels.values()), axis=0).T
    prediction = Prediction([], question, jnp.asarray(predicted)[None, None, None])
    truth = Truth(jnp.asarray(label)[None], None, None, (1, 15), 255)
    scores = metric.scores(np.asarray(metric.count(prediction, truth)))
    assert list(subset.reported)[20] == "background" and len(scores.iou_c) == 21
    np.testing.assert_allclose(scores.iou_c[[3, 20]], [5 / 7, 8 / 10])


@pytest.mark.parametrize("images, together", [(1, 1), (2, 2), (6, 3), (7, 1), (8, 4)])
def test_a_batch_is_divided_into_equal_groups(monkeypatch, images, together):
    monkeypatch.setattr(evaluation_step, "IMAGES_TOGETHER_ON", {})
    assert evaluation_step.images_together(images) == together
