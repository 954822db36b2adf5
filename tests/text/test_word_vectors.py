"""Word vectors: the file, and the baseline that is trained and evaluated on them."""

import numpy as np
import pytest
import shrunk

from zegformer_jax.experiment import Experiment
from zegformer_jax.experiment.models import embed_classes
from zegformer_jax.experiment.workdir import load_variables
from zegformer_jax.text.vocabulary import load_vocabulary
from zegformer_jax.text.word_vectors import load_word_vectors
from zegformer_jax.training.loop import train

WIDTH = 600  # fastText and word2vec, 300 each


@pytest.fixture
def write(tmp_path):
    """Writes an .npz file and returns its path."""

    def save(**arrays):
        np.savez(tmp_path / "words.npz", **arrays)
        return tmp_path / "words.npz"

    return save


def test_a_class_has_its_own_vector_or_the_mean_of_its_synonyms(write):
    names = np.array(["cat", "sofa", "couch", "tv, monitor", "tv", "monitor"])
    vectors = np.array([[3, 4], [2, 0], [0, 5], [0, -1], [1, 0], [1, 0]], np.float64)
    rows = load_word_vectors(
        write(names=names, vectors=vectors), ["sofa, couch", "cat", "tv, monitor"]
    )
    half = np.sqrt(0.5)
    np.testing.assert_allclose(rows, [[half, half], [0.6, 0.8], [0, -1]], rtol=1e-6)
    assert rows.dtype == np.float32


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"names": np.array(["cat"])}, "needs an .npz with 'names'"),
        ({"names": np.array(["cat"]), "vectors": np.ones((2, 3))}, r"vectors \[2, 3\]"),
        ({"names": np.array(["dog"]), "vectors": np.ones((1, 3))}, "no vector for 'cat'"),
        ({"names": np.array(["cat"]), "vectors": np.zeros((1, 3))}, "no direction"),
        ({"names": np.array(["cat"], object), "vectors": np.ones((1, 3))}, "needs an .npz"),
    ],
)
def test_other_files_are_refused(write, arrays, message):
    with pytest.raises(ValueError, match=message):
        load_word_vectors(write(**arrays), ["cat"])


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="words.npz: no such file"):
        load_word_vectors(tmp_path / "words.npz", ["cat"])
    (tmp_path / "words.npz").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="words.npz: .*needs an .npz"):
        load_word_vectors(tmp_path / "words.npz", ["cat"])


def test_only_the_baseline_takes_word_vectors(tmp_path):
    config = shrunk.get_config().unlock()
    config.model.word_vectors = "words.npz"
    with pytest.raises(ValueError, match="for model.kind 'per_pixel', not 'zegformer'"):
        embed_classes(config, tmp_path, None, ("cat",))


@pytest.mark.slow
def test_the_baseline_on_word_vectors_needs_no_clip(tmp_path, write):
    names = np.array(load_vocabulary("openmoji_voc").names)
    vectors = np.random.default_rng(0).normal(size=(len(names), WIDTH))
    config = shrunk.get_config("per_pixel").unlock()
    config.model.word_vectors = str(write(names=names, vectors=vectors))
    config.model.start_from, config.clip.source = "", "nowhere"
    history = train(Experiment.open(config, tmp_path / "run"), progress=False)
    assert np.isfinite(history[-1]["loss"])
    variables = load_variables(tmp_path / "run")
    assert variables["params"]["class_projection"]["kernel"].shape[-1] == WIDTH
    text = Experiment.open(config, tmp_path / "run").text_embeddings(tuple(names[:2]))
    lengths = np.linalg.norm(vectors[:2], axis=1, keepdims=True)
    np.testing.assert_allclose(text.grouper_cd, vectors[:2] / lengths, rtol=1e-5)
    assert text.classifier_cd is None
