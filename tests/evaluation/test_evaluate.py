"""Evaluation: its counts against NumPy, whatever the batches and devices; parts of a vocabulary."""

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shrunk
from clips import VIT, random_params

from zegformer_jax import segmenter
from zegformer_jax.evaluation import evaluator, loop, resume
from zegformer_jax.evaluation.counts import OVERLAP, RIGHT_NAMES, RIGHT_SEGMENTS, Evaluation
from zegformer_jax.evaluation.evaluator import Evaluator, SeenAs, parse_sweep, sweep_name
from zegformer_jax.evaluation.metrics.segment_fit import Overlap
from zegformer_jax.evaluation.subsets import load_subsets
from zegformer_jax.experiment import Experiment
from zegformer_jax.experiment.data import load_vocabulary, open_split
from zegformer_jax.experiment.models import load_clip_of
from zegformer_jax.experiment.workdir import load_config
from zegformer_jax.input.transforms import resized_sides
from zegformer_jax.models.clip.model import CLIP_MEAN, CLIP_STD
from zegformer_jax.models.normalise import normalise_images
from zegformer_jax.pretrained.clip.load import save_clip
from zegformer_jax.segmentation import class_scores, label_maps
from zegformer_jax.segmentation.classifiers.one_pass import encode_in_one_pass
from zegformer_jax.segmentation.zegformer import Queries, TextEmbeddings
from zegformer_jax.text.tokenizer import train_tokenizer

HEADLINE = "pascal_voc_20"


def counted(truth, prediction, classes):
    """A confusion matrix, pixel by pixel; truths outside 0..classes - 1 do not count."""
    matrix = np.zeros((classes, classes), np.int64)
    for t, p in zip(truth.ravel(), prediction.ravel(), strict=True):
        if t < classes:
            matrix[t, p] += 1
    return matrix


SHOWN = "clip"  # neither the first method nor the last


@pytest.fixture(scope="module")
def whole(finished):
    """The grouper's evaluation with every label map kept."""
    config = shrunk.get_config().unlock()
    config.eval.scores = SHOWN
    return loop.evaluate(config.lock(), finished.workdir, examples=100, progress=False)


@pytest.mark.slow
def test_crop_styles_that_do_not_exist_are_refused(finished):
    config = shrunk.get_config().unlock()
    config.eval.crop_style = "crops"
    with pytest.raises(ValueError, match="eval.crop_style 'crops': choose one of cropmask, crop"):
        loop.evaluate(config, finished.workdir, progress=False)


@pytest.mark.slow
def test_scores_that_do_not_exist_are_refused(finished):
    config = shrunk.get_config().unlock()
    config.eval.scores = "both"
    with pytest.raises(ValueError, match="eval.scores 'both': choose one of grouper, clip"):
        loop.evaluate(config, finished.workdir, progress=False)


@pytest.fixture
def make_evaluator(tmp_path, monkeypatch):
    """Evaluators of a model without any parameters, with a small CLIP."""
    save_clip(tmp_path / "clip", VIT, random_params(VIT), train_tokenizer(["a"], 530, 14))
    text = TextEmbeddings(*np.zeros((2, 236, VIT.embed_dim), np.float32))
    monkeypatch.setattr("zegformer_jax.evaluation.evaluator.embed_vocabulary", lambda *_: text)
    return lambda config: Evaluator(config, tmp_path, variables={})


@pytest.mark.parametrize("own, training", [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_an_evaluation_computes_in_its_own_dtype(make_evaluator, own, training):
    config = shrunk.get_config()
    config.dtype, config.eval.dtype = training, own
    evaluator = make_evaluator(config)
    assert evaluator.model.dtype == evaluator.clip.dtype == own
    assert evaluator.model.backbone.dtype == own


def test_an_evaluator_bounds_what_it_scores(make_evaluator):
    """By every method that is asked for, in every vocabulary."""
    config = shrunk.get_config().unlock()
    config.eval.update(scores="clip", methods=("clip", "grouper"), skip_below=0.5)
    evaluator = make_evaluator(config.lock())
    assert evaluator.shown == "clip"
    assert evaluator.economy.modes == ("clip", "grouper")
    assert evaluator.economy.skip_below == 0.5
    sizes = [(len(indices), len(seen)) for indices, seen in evaluator.economy.vocabularies]
    assert sizes == [(20, 20), (236, 236)]
    config.eval.scores = "ensemble"
    with pytest.raises(ValueError, match="eval.scores 'ensemble': choose one of clip, grouper"):
        make_evaluator(config)


@pytest.mark.parametrize("shown, said", [("grouper", 5), ("clip", 7)])
def test_what_is_shown_swept_and_asked_of_oracles_is_by_eval_scores(make_evaluator, shown, said):
    """A picture of class 3 in one segment, which the grouper takes for 5 and CLIP for 7.

    Of all classes both would take it for 100, and for 9 what the other, empty segment shows.
    """
    config = shrunk.get_config().unlock()
    config.eval.update(scores=shown, sweep_gamma="0:0.1:0.1")
    evaluator = make_evaluator(config.lock())
    classes, shape = np.arange(237), (64, 64)
    queries = Queries(
        class_logits_qc=20.0 * (classes == [[5], [9]])
        + 40.0 * (classes == 100)
        - 20.0 * (classes == 236),
        mask_logits_qhw=np.full((2, 16, 16), [[[10.0]], [[-10.0]]]),
        clip_logits_qc=(50.0 * (classes == [[7], [9]]) + 90.0 * (classes == 100))[:, :236],
        named_q=np.ones(2, bool),
    )
    sizes = {"size": np.array(shape), "original_size": np.array(shape)}
    label = {"label": np.full(shape, 3, np.uint8), "valid": True}
    example = {"image": np.zeros((*shape, 3), np.uint8)} | sizes | label

    @jax.jit
    def count(queries, example):
        return evaluator._count_picture([SeenAs(queries, example["size"], False)], example)

    counts, prediction = count(queries, example)
    assert np.all(prediction == said)
    expected = {"grouper": 5, "clip": 7, RIGHT_NAMES: 3, RIGHT_SEGMENTS: said}
    expected |= {sweep_name(shown, gamma): said for gamma in (0.0, 0.1)}
    for name, place in expected.items():
        matrix = np.asarray(counts[name, HEADLINE])
        assert matrix[3, place] == matrix.sum() == 64 * 64, name
    assert counts[shown, "openmoji_voc"][3, 100] == 64 * 64
    iou_c, boundary_c, present_c = np.asarray(counts[OVERLAP])
    assert (iou_c[3], boundary_c[3]) == (1, 1) and present_c.sum() == present_c[3] == 1


def test_another_clip_is_another_evaluation(make_evaluator, tmp_path):
    """What it has counted is not taken up."""
    config = shrunk.get_config()
    identity = make_evaluator(config).identity(config)
    assert make_evaluator(config).identity(config) == identity
    save_clip(tmp_path / "clip", VIT, random_params(VIT, seed=2), train_tokenizer(["a"], 530, 14))
    assert make_evaluator(config).identity(config) != identity


def test_regions_are_named_by_calibrated_scores(make_evaluator):
    """Of the query that fits best; of all queries where none touches the region."""
    config = shrunk.get_config().unlock()
    config.eval.update(scores="grouper", gamma=0.2)
    evaluator = make_evaluator(config.lock())
    headline = evaluator.subsets[0]
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
    names = np.asarray(evaluator._region_scores(queries, overlap)).argmax(1)
    assert names[:6].tolist() == [unseen, unseen, other, other, other, other]


@pytest.fixture(scope="module")
def records(finished):
    source = open_split(shrunk.get_config(), finished.workdir, "validation")
    return [source[i] for i in range(len(source))]


@pytest.mark.slow
def test_the_confusion_is_that_of_the_label_maps(whole, records):
    assert len(whole.examples) == len(records) == shrunk.VALIDATION_SCENES
    expected = sum(counted(truth, prediction, 20) for _, truth, prediction in whole.examples)
    np.testing.assert_array_equal(whole.confusion[SHOWN, HEADLINE], expected)
    scenes = {image.tobytes() for image, _, _ in whole.examples}
    assert scenes == {record["image"].tobytes() for record in records}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["grouper", "clip", "ensemble"])
def test_every_labelled_pixel_counts_once(whole, records, method):
    """Fill rows, padding and ignored pixels do not count; the headline has its classes only."""
    labels = np.concatenate([record["label"].ravel() for record in records])
    for subset in whole.subsets:
        rows = whole.confusion[method, subset.name].sum(1)
        expected = [(labels == index).sum() for index in subset.indices]
        np.testing.assert_array_equal(rows, expected)


@pytest.mark.slow
def test_every_class_in_every_scene_has_an_overlap(whole, records):
    total, boundary, count = whole.overlap
    present = sum(np.isin(np.arange(236), record["label"]) for record in records)
    np.testing.assert_array_equal(count, present)
    for sums in (total, boundary):
        assert np.all(sums <= count) and np.all(sums >= 0) and sums.sum() > 0


@pytest.mark.slow
@pytest.mark.parametrize("devices, batch_size", [(1, 1), (1, 3), (2, 4)])
def test_neither_batches_nor_devices_matter(finished, monkeypatch, devices, batch_size):
    """For the baseline; for the whole method see test_runs.py."""
    folder = finished.workdir / "per_pixel"
    make_mesh = evaluator.make_local_mesh
    reference = loop.evaluate(shrunk.get_config("per_pixel"), folder, progress=False)
    monkeypatch.setattr(evaluator, "make_local_mesh", lambda: make_mesh(devices))
    config = shrunk.get_config("per_pixel")
    config.eval.batch_size = batch_size
    actual = loop.evaluate(config, folder, progress=False)
    assert actual.confusion.keys() == reference.confusion.keys()
    for key, expected in reference.confusion.items():
        assert expected.sum() > 0
        np.testing.assert_array_equal(actual.confusion[key], expected, err_msg=str(key))


@pytest.mark.slow
def test_a_row_that_is_not_valid_does_not_count(finished):
    config = shrunk.get_config("per_pixel")
    workdir = finished.workdir / "per_pixel"
    evaluator = Evaluator(config, workdir)
    source = open_split(config, workdir, "validation")
    vocabulary = load_vocabulary(config.dataset.vocabulary)
    batches = loop.validation_batches(config, source, vocabulary)
    batch = next(batch for batch in batches if batch["valid"].all())
    both, _ = evaluator(batch)
    second, predictions = evaluator(batch | {"valid": np.array([False, True])})
    height, width = batch["original_size"][1]
    truth = evaluator.subsets[0].table(255)[batch["label"][1, :height, :width]]
    expected = counted(truth, predictions[1, :height, :width], 20)
    np.testing.assert_array_equal(second["per_pixel", HEADLINE], expected)
    assert both["per_pixel", HEADLINE].sum() > second["per_pixel", HEADLINE].sum()


@pytest.mark.slow
def test_only_rows_with_a_picture_are_worked_on(finished, monkeypatch):
    """Five pictures in batches of four, on two devices."""
    looked_at = []

    def run_models(*arguments, **settings):
        jax.debug.callback(lambda: looked_at.append(1))
        return queries_by_colour(*arguments, **settings)

    monkeypatch.setattr("zegformer_jax.evaluation.evaluator.run_models", run_models)
    config = shrunk.get_config().unlock()
    config.eval.batch_size = 4
    result = loop.evaluate(config.lock(), finished.workdir, progress=False)
    jax.effects_barrier()
    assert len(looked_at) == result.pictures == shrunk.VALIDATION_SCENES


@pytest.mark.slow
def test_the_headline_is_what_the_segmenter_says_with_its_classes(finished, whole):
    """Columns of the full vocabulary's scores, or a run with the 20 names: the same label map."""
    config = load_config(finished.workdir).unlock()
    config.eval.scores = SHOWN
    segment = segmenter.Segmenter(Experiment(config.lock(), finished.workdir))
    agreeing = [
        (segment(image, whole.subsets[0].vocabulary.names).labels == prediction).mean()
        for image, _, prediction in whole.examples[:2]
    ]
    assert min(agreeing) > 0.99, agreeing


def queries_by_colour(grouper, clip, variables, clip_params, text, version, **_):
    """Stands for the models: masks are mixtures of the picture's colours, 4 pixels wide."""
    rng = np.random.default_rng(0)
    image = version.image_hwc.astype(np.float32) / 255
    height, width, _ = image.shape
    means = image.reshape(height // 4, 4, width // 4, 4, 3).mean((1, 3)) - 0.5
    masks = 15 * jnp.einsum("hwc,qc->qhw", means, rng.normal(size=(8, 3)))
    logits = 5 * jnp.sin(1000 * text.grouper_cd[:, :8].T)  # as good as random, of each class
    no_object = jnp.zeros((8, 1))
    return Queries(jnp.concatenate([logits, no_object], -1), masks, -logits, jnp.ones(8, bool))


@pytest.mark.slow
def test_augmented_maps_are_averages_of_plain_ones(finished, monkeypatch):
    """Of two sizes, as they are and mirrored; evaluation and prediction agree on them."""
    for module in ("evaluator", "segmenter"):
        monkeypatch.setattr(f"zegformer_jax.{module}.run_models", queries_by_colour)
    config = load_config(finished.workdir).unlock()
    config.eval.update(scores=SHOWN, methods=(SHOWN,), vocabularies=(HEADLINE,), gamma=1e-4)
    sides = shrunk.SIDE, 2 * shrunk.SIDE
    source = open_split(config, finished.workdir, "validation")
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
            view = label_maps.View(mask_logits, np.array(size))
            question = label_maps.Question([scores[None]], seen)
            original = {"original_size": np.array(picture.shape[:2]), "out_size": picture.shape[:2]}
            (map_,) = label_maps.semantic_maps([view], [question], **original)
            maps.append(np.asarray(map_[0, 0])[..., ::step])
    expected = (np.mean(maps, 0) - 1e-4 * seen[:, None, None]).argmax(0)
    assert (maps[0].argmax(0) != expected).mean() > 0.01

    config.eval.update(short_side=sides[0], more_short_sides=sides[1:], flip=True)
    augmented = segmenter.Segmenter(Experiment(config, finished.workdir))(picture, names).labels
    kept = {}
    loop.evaluate(config, finished.workdir, progress=False, keep=kept.__setitem__)
    for labels in (augmented, kept[str(source[0]["id"])]):
        assert (labels == expected).mean() > 0.998


@pytest.mark.slow
def test_in_one_pass_clip_alone_says_something_else(finished):
    """And it says what `encode_in_one_pass` gives."""
    config = load_config(finished.workdir).unlock()
    source = open_split(config, finished.workdir, "validation")
    picture, names = source[0]["image"], load_vocabulary(HEADLINE).names
    crops = segmenter.Segmenter(Experiment(config, finished.workdir)).queries(picture, names)
    config.eval.update(segment_classifier="one_pass", one_pass_layers=1)
    segment = segmenter.Segmenter(Experiment(config, finished.workdir))
    once = segment.queries(picture, names)
    for array, same in zip(once[:2], crops[:2], strict=True):
        np.testing.assert_array_equal(array, same)
    assert np.abs(once.clip_logits_qc - crops.clip_logits_qc).max() > 1e-3

    clip = load_clip_of(config, finished.workdir)
    batch = {"image": picture[None], "size": np.array([picture.shape[:2]])}
    images = normalise_images(jnp.asarray(batch["image"]), batch["size"], CLIP_MEAN, CLIP_STD)
    features = encode_in_one_pass(
        clip.module(), clip.params, images[0], batch["size"][0], once.mask_logits_qhw, 1
    )
    text = clip.embed(names, config.clip.classifier_prompts)
    expected = class_scores.clip_logits(features, text, clip.params["logit_scale"])
    np.testing.assert_allclose(once.clip_logits_qc, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_the_report_has_these_scores(finished, whole):
    for subset in whole.subsets:
        scores = whole.scores("ensemble", subset)
        result = finished.report.find("ZegFormer (ensemble)", subset.name)
        assert result.seen == scores.seen_iou and result.pixel_accuracy == scores.pixel_accuracy
        matrix = whole.confusion["ensemble", subset.name]
        union = matrix.sum(0) + matrix.sum(1) - np.diag(matrix)
        present = matrix.sum(1) > 0
        seen = np.asarray(subset.vocabulary.seen)
        iou = np.diag(matrix)[present & seen] / union[present & seen]
        np.testing.assert_allclose(result.seen, iou.mean())


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
    with pytest.raises(ValueError, match="eval.vocabularies: 'ade20k_150' has '.*', the data set"):
        load_subsets(["ade20k_150"], vocabulary, "whole")


def test_counts_add_up_in_64_bits():
    vocabulary = load_vocabulary(HEADLINE)
    subset = load_subsets([HEADLINE], vocabulary, "whole")[0]
    result = Evaluation((subset,), vocabulary, "clip")
    for _ in range(3):
        result.add({("clip", HEADLINE): jax.device_get(np.full((20, 20), 2**31 - 1, np.int32))})
    assert result.confusion["clip", HEADLINE][0, 0] == 3 * (2**31 - 1)


def scored(result):
    return {key: matrix.tolist() for key, matrix in result.confusion.items()}


@pytest.fixture
def shown_clip():
    config = shrunk.get_config().unlock()
    config.eval.scores = SHOWN
    return config.lock()


def interrupting(monkeypatch, where, ids):
    """What takes label maps and interrupts in the second batch of two; notes pictures' ids."""
    add, full = Evaluation.add, []

    def keep(id_, labels_hw):
        ids.append((id_, labels_hw))
        if where == "before its counts" and len(ids) == 3:
            raise KeyboardInterrupt
        if where == "by SIGTERM" and len(ids) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def add_a_part(self, sums):
        full.append(sums)
        if where == "amid its counts" and len(full) == 2:
            add(self, dict(list(sums.items())[:3]))
            raise KeyboardInterrupt
        add(self, sums)

    monkeypatch.setattr(Evaluation, "add", add_a_part)
    return keep


@pytest.mark.slow
@pytest.mark.parametrize("where", ["before its counts", "amid its counts", "by SIGTERM"])
def test_an_interrupted_evaluation_goes_on_with_what_it_had(
    finished, whole, records, shown_clip, tmp_path, monkeypatch, where
):
    """The batch that was counted is in the result and in the file, the one after in neither."""
    ids, arguments = [], dict(progress=False, partial=tmp_path)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt) as stopped:
        keep = interrupting(patched, where, ids)
        loop.evaluate(shown_clip, finished.workdir, keep=keep, **arguments)
    part = stopped.value.result
    assert part.partial and (part.pictures, part.of) == (2, shrunk.VALIDATION_SCENES)
    truths = {record["id"]: record["label"] for record in records}
    table = part.subsets[0].table(255)
    expected = sum(counted(table[truths[id_]], labels, 20) for id_, labels in ids[:2])
    np.testing.assert_array_equal(part.confusion[SHOWN, HEADLINE], expected)
    (file,) = tmp_path.iterdir()
    assert file.match("partial_*_0_of_1.npz")
    rest = []
    keep = lambda id_, labels_hw: rest.append(id_)  # noqa: E731
    result = loop.evaluate(shown_clip, finished.workdir, keep=keep, **arguments)
    assert result.pictures == shrunk.VALIDATION_SCENES and not result.partial
    assert list(tmp_path.iterdir()) == [file]  # its tables are not written yet
    result.finish()
    assert not list(tmp_path.iterdir())
    assert len(rest) == shrunk.VALIDATION_SCENES - 2 and not set(rest) & {id_ for id_, _ in ids[:2]}
    assert scored(result) == scored(whole)
    np.testing.assert_allclose(result.overlap, whole.overlap, rtol=1e-6)


@pytest.mark.slow
def test_an_interruption_before_the_first_picture_leaves_nothing(finished, shown_clip, tmp_path):
    def stop(id_, labels_hw):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as stopped:
        loop.evaluate(shown_clip, finished.workdir, progress=False, keep=stop, partial=tmp_path)
    assert stopped.value.result is None and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_notes_are_written_in_between(finished, shown_clip, tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "SECONDS_BETWEEN_NOTES", 0.0)
    written, write = [], resume.write_bytes
    monkeypatch.setattr(
        resume, "write_bytes", lambda *args: [written.append(args[0]), write(*args)]
    )
    result = loop.evaluate(shown_clip, finished.workdir, progress=False, partial=tmp_path)
    assert len(written) == 3 and list(tmp_path.iterdir()) == written[:1]  # batches of 2, 2 and 1
    result.finish()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_sweep_of_gamma_is_as_many_evaluations(finished, whole):
    config = shrunk.get_config().unlock()
    config.eval.update(scores=SHOWN, sweep_gamma="0:0.2:0.1", methods=(SHOWN,), oracles=False)
    result = loop.evaluate(config.lock(), finished.workdir, progress=False)
    names = [f"{SHOWN}, gamma {gamma}" for gamma in ("0", "0.1", "0.2")]
    assert result.methods(result.subsets[0]) == [SHOWN, *names]
    np.testing.assert_array_equal(
        result.confusion[names[1], HEADLINE], whole.confusion[SHOWN, HEADLINE]
    )
    config.unlock().eval.update(gamma=0.2, sweep_gamma="")
    other = loop.evaluate(config, finished.workdir, progress=False)
    np.testing.assert_array_equal(
        result.confusion[names[2], HEADLINE], other.confusion[SHOWN, HEADLINE]
    )


NO_SWEEPS = ["0.1", "a:b:c", "0:1:0", "0.3:0:0.05", "1:0:1", "0:1:-0.1", "0:inf:0.1", "nan:1:0.1"]


@pytest.mark.parametrize("text", NO_SWEEPS)
def test_a_sweep_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="eval.sweep_gamma .*give first:last:step"):
        parse_sweep(text)
    assert parse_sweep("0:0.3:0.1") == (0.0, 0.1, 0.2, 0.3)


@pytest.mark.slow
def test_with_all_segments_named_nothing_is_lost(finished, whole):
    """A bound that no weight is below, and room for every query: not a bit changes."""
    config = shrunk.get_config().unlock()
    config.eval.update(scores=SHOWN, skip_below=1e-30, top_segments=8, clip_chunk=3)
    result = loop.evaluate(config.lock(), finished.workdir, progress=False)
    assert scored(result) == scored(whole)


def test_all_kinds_of_background_count_as_one():
    vocabulary = load_vocabulary("pascal_voc_20b")
    (subset,) = load_subsets((), vocabulary, "pascal_voc_20b")
    result = Evaluation((subset,), vocabulary, "clip")
    confusion = np.zeros((59, 59), np.int64)
    confusion[3, 3], confusion[20, 20], confusion[20, 41], confusion[20, 3] = 5, 1, 7, 2
    result.add({("clip", "pascal_voc_20b"): confusion})
    scores = result.scores("clip", subset)
    assert subset.reported[0][20] == "background" and len(scores.iou_c) == 21
    np.testing.assert_allclose(scores.iou_c[[3, 20]], [5 / 7, 8 / 10])
