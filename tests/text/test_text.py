"""Tokenizer, prompts and text embeddings against golden numbers and transformers."""

import json
from pathlib import Path

import numpy as np
import pytest

from zegformer_jax.runtime.assets import DATA
from zegformer_jax.text.embeddings import embed_tokens, tokenize_classes
from zegformer_jax.text.prompts import load_templates
from zegformer_jax.text.tokenizer import Tokenizer, train_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "small"
ODD_TEXTS = (
    "a photo of a sheep",
    "don't we'll I'VE it's o'clock",
    "ÜBER straße İstanbul",
    "🙂👍🏽 emoji 👩‍👩‍👧",
    "1234 56 ½ ²",
    "a-b_c!?! ... (x)",
    "日本語 テスト",
    "  tabs\t\nand lines  ",
    "cafe\u0301",
    "'s''s",
    "\u200bzero\u00a0width\u3000",
    "",
)


@pytest.fixture(scope="module")
def openai():
    return Tokenizer.openai()


@pytest.fixture(scope="module")
def small():
    texts = ["a photo of a sheep", "a photo of the sofa", "Don't say 12 words: ÜBER 🙂"]
    return train_tokenizer(texts * 3, 600, 64)


def hash_encoder(tokens):
    """Replaces a text tower: a random vector that depends only on the row's ids."""
    rows = [np.random.default_rng([int(x) for x in row if x]).normal(size=8) for row in tokens]
    return np.array(rows, np.float32)


@pytest.mark.parametrize("kept", ["", "tokenizer.json", "vocab.json"])
def test_odd_texts_have_open_clips_ids(tmp_path, openai, kept):
    """Golden ids of open_clip 3.3.0's SimpleTokenizer, with ftfy 6.3.1; also from saved files."""
    if kept:
        openai.save(tmp_path)
        (tmp_path / {"tokenizer.json": "vocab.json", "vocab.json": "tokenizer.json"}[kept]).unlink()
        openai = Tokenizer.from_directory(tmp_path, openai.context_length)
    cases = json.loads((GOLDEN.parent / "odd_tokens.json").read_text())
    for case in cases:
        row = openai(case["text"])[0]
        assert row[: len(case["ids"])].tolist() == case["ids"], repr(case["text"])
        assert not row[len(case["ids"]) :].any()


def test_random_texts_have_open_clips_ids(openai):
    theirs = pytest.importorskip("open_clip.tokenizer").SimpleTokenizer()
    rng = np.random.default_rng(0)
    pieces = [case["text"] for case in json.loads((GOLDEN.parent / "odd_tokens.json").read_text())]
    for _ in range(1000):
        text = "".join(rng.choice(pieces, 2)) + "".join(map(chr, rng.integers(1, 0x500, 4)))
        ids = [openai.start_id, *theirs.encode(text), openai.end_id]
        if len(ids) <= openai.context_length:
            assert openai(text)[0, : len(ids)].tolist() == ids, repr(text)


@pytest.mark.parametrize("which", ["openai", "small"])
def test_transformers_gives_the_same_ids(request, tmp_path, which):
    """Holds for texts that ftfy, which transformers does not use, leaves unchanged."""
    from transformers import AutoTokenizer, CLIPTokenizerFast

    tokenizer = request.getfixturevalue(which)
    tokenizer.save(tmp_path)
    for theirs in (AutoTokenizer, CLIPTokenizerFast):
        theirs = theirs.from_pretrained(tmp_path)
        assert theirs.model_max_length == tokenizer.context_length
        for text in ODD_TEXTS:
            ids = theirs(text)["input_ids"]
            row = tokenizer(text)[0]
            assert row[: len(ids)].tolist() == ids, text
            assert not row[len(ids) :].any()


@pytest.mark.parametrize("kept", ["tokenizer.json", "vocab.json"])
def test_directory_round_trip(tmp_path, small, kept):
    small.save(tmp_path)
    for name in {"tokenizer.json", "vocab.json"} - {kept}:
        (tmp_path / name).unlink()
    loaded = Tokenizer.from_directory(tmp_path, 64)
    assert (loaded.start_id, loaded.end_id) == (small.start_id, small.end_id)
    assert loaded.context_length == 64
    np.testing.assert_array_equal(loaded(ODD_TEXTS), small(ODD_TEXTS))


def test_directory_without_files_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither tokenizer.json nor"):
        Tokenizer.from_directory(tmp_path, 77)


def test_cleaning_follows_openai(openai):
    expected = openai("a cat & a <dog>")
    np.testing.assert_array_equal(openai(" A  CAT &amp;amp; a &lt;Dog&gt;\n"), expected)


def test_trained_tokenizer_has_clips_layout(small):
    assert small.vocab_size <= 600
    assert (small.start_id, small.end_id) == (small.vocab_size - 2, small.vocab_size - 1)
    assert small("!")[0, :3].tolist() == [small.start_id, 256, small.end_id]  # "!</w>"
    assert small("sheep")[0, 2] == small.end_id  # a frequent word is one token
    assert small("qqq")[0, 4] == small.end_id  # an unknown one is its bytes


def test_the_same_texts_give_the_same_tokenizer():
    """Nearly all pairs of these texts are equally frequent."""
    words = [f"{a}{b}{c}" for a in "cbdpt" for b in "aeiou" for c in "tnrgd"]
    tokens = [train_tokenizer(words, 560, 77)(words) for _ in range(6)]
    for others in tokens[1:]:
        np.testing.assert_array_equal(others, tokens[0])


def test_too_small_vocabulary_raises():
    with pytest.raises(ValueError, match="vocab_size 513: .* at least 514"):
        train_tokenizer(["a"], 513)


def test_too_long_text_is_named(openai):
    long = "very " * 80 + "long"
    with pytest.raises(ValueError, match=r"very long' has 83 tokens, at most 77 fit"):
        openai(["short", long])
    with pytest.raises(ValueError, match="class 'very very"):
        tokenize_classes(openai, ["cat", long], ["a {}"])


def test_embeddings_are_means_over_synonyms_and_templates(openai):
    templates = ("a {}", "the {}.")
    tokens = tokenize_classes(openai, ["sofa, couch", "cat"], templates)
    features = embed_tokens(hash_encoder, tokens)
    for name, feature in zip((["sofa", "couch"], ["cat"]), features, strict=True):
        rows = hash_encoder(openai([t.format(x) for x in name for t in templates]))
        mean = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).mean(axis=0)
        np.testing.assert_allclose(feature, mean / np.linalg.norm(mean), rtol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 7, 64, 256])
def test_batches_have_one_shape_and_do_not_matter(openai, batch_size):
    names = [f"thing number {i}" for i in range(40)]
    groups = tokenize_classes(openai, names, ["a {}", "the {}"])
    shapes = set()

    def encode(tokens):
        shapes.add(tokens.shape)
        return hash_encoder(tokens)

    features = embed_tokens(encode, groups, batch_size)
    assert len(shapes) == 1 and shapes.pop()[0] <= batch_size
    expected = embed_tokens(hash_encoder, groups)
    np.testing.assert_allclose(features, expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["", " , "])
def test_empty_name_raises(openai, name):
    with pytest.raises(ValueError, match=f"class '{name}': nothing to embed"):
        tokenize_classes(openai, ["cat", name], ["a {}"])


def test_prompt_sets():
    assert load_templates("single") == ("A photo of a {} in the scene",)
    sets = json.loads((DATA / "prompts.json").read_text())
    for name in sets:
        assert all(template.count("{}") == 1 for template in load_templates(name))
    with pytest.raises(ValueError, match="no prompt set 'imagnet'; there are .*imagenet_select"):
        load_templates("imagnet")
