"""Evaluation: its counts against NumPy, whatever the batches and devices; parts of a vocabulary."""

import jax
import numpy as np
import pytest
import shrunk

from zegformer_jax import evaluate, experiment, segmenter, sharding

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
    return evaluate.evaluate(config.lock(), finished.workdir, examples=100, progress=False)


def test_scores_that_do_not_exist_are_refused(finished):
    config = shrunk.get_config().unlock()
    config.eval.scores = "both"
    with pytest.raises(ValueError, match="eval.scores 'both': choose one of grouper, clip"):
        evaluate.evaluate(config, finished.workdir, progress=False)


@pytest.fixture(scope="module")
def records(finished):
    source = experiment.open_split(shrunk.get_config(), finished.workdir, "validation")
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
    total, count = whole.overlap
    present = sum(np.isin(np.arange(236), record["label"]) for record in records)
    np.testing.assert_array_equal(count, present)
    assert np.all(total <= count) and np.all(total >= 0) and total.sum() > 0


@pytest.mark.slow
@pytest.mark.parametrize("devices, batch_size", [(1, 1), (1, 3), (2, 4)])
def test_neither_batches_nor_devices_matter(finished, monkeypatch, devices, batch_size):
    """For the baseline: the counts of one device, three pictures at a time, and so on."""
    folder = finished.workdir / "per_pixel"
    make_mesh = sharding.make_mesh
    reference = evaluate.evaluate(shrunk.get_config("per_pixel"), folder, progress=False)
    monkeypatch.setattr(sharding, "make_mesh", lambda: make_mesh(devices))
    config = shrunk.get_config("per_pixel")
    config.eval.batch_size = batch_size
    actual = evaluate.evaluate(config, folder, progress=False)
    assert actual.confusion.keys() == reference.confusion.keys()
    for key, expected in reference.confusion.items():
        assert expected.sum() > 0
        # Two shapes of batches may round differently: a few pixels may be of another class.
        moved = np.abs(actual.confusion[key] - expected).sum() / 2
        assert moved <= 0.001 * expected.sum(), key
        np.testing.assert_array_equal(actual.confusion[key].sum(1), expected.sum(1))


@pytest.mark.slow
def test_a_row_that_is_not_valid_does_not_count(finished):
    config = shrunk.get_config("per_pixel")
    workdir = finished.workdir / "per_pixel"
    evaluator = evaluate.Evaluator(config, workdir)
    source = experiment.open_split(config, workdir, "validation")
    vocabulary = experiment.load_vocabulary(config.dataset.vocabulary)
    batches = evaluate.validation_batches(config, source, vocabulary)
    batch = next(batch for batch in batches if batch["valid"].all())
    both, _ = evaluator(batch)
    second, predictions = evaluator(batch | {"valid": np.array([False, True])})
    height, width = batch["original_size"][1]
    truth = evaluator.subsets[0].table(255)[batch["label"][1, :height, :width]]
    expected = counted(truth, predictions[1, :height, :width], 20)
    np.testing.assert_array_equal(second["per_pixel", HEADLINE], expected)
    assert both["per_pixel", HEADLINE].sum() > second["per_pixel", HEADLINE].sum()


@pytest.mark.slow
def test_the_headline_is_what_the_segmenter_says_with_its_classes(finished, whole):
    """Columns of the full vocabulary's scores, or a run with the 20 names: the same label map."""
    segment = segmenter.load(finished.workdir)
    agreeing = [
        (segment(image, whole.subsets[0].vocabulary.names).labels == prediction).mean()
        for image, _, prediction in whole.examples[:2]
    ]
    assert min(agreeing) > 0.99, agreeing


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
    vocabulary = experiment.load_vocabulary("openmoji_voc")
    subset = evaluate.load_subset(HEADLINE, vocabulary)
    assert [vocabulary.names[i] for i in subset.indices] == list(subset.vocabulary.names)
    assert subset.vocabulary.seen == tuple(vocabulary.seen[i] for i in subset.indices)
    table = subset.table(255)
    labels = np.array([*subset.indices, 20, 235, 255])
    np.testing.assert_array_equal(table[labels], [*range(20), 255, 255, 255])


def test_a_vocabulary_with_other_classes_is_refused():
    vocabulary = experiment.load_vocabulary("openmoji_voc")
    with pytest.raises(ValueError, match="eval.vocabularies: 'ade20k_150' has '.*', the data set"):
        evaluate.load_subset("ade20k_150", vocabulary)


def test_counts_add_up_in_64_bits():
    vocabulary = experiment.load_vocabulary(HEADLINE)
    subset = evaluate.load_subset(HEADLINE, vocabulary)
    result = evaluate.Evaluation((subset,), vocabulary, "clip")
    for _ in range(3):
        result.add({("clip", HEADLINE): jax.device_get(np.full((20, 20), 2**31 - 1, np.int32))})
    assert result.confusion["clip", HEADLINE][0, 0] == 3 * (2**31 - 1)
