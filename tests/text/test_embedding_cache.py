"""Text embeddings on disk: bit-identical to the computed ones, and never another experiment's."""

import dataclasses
import io
import logging

import clips
import numpy as np
import pytest

from zegformer_jax.experiment.models import LoadedClip
from zegformer_jax.text import embeddings
from zegformer_jax.text.prompts import load_templates
from zegformer_jax.text.tokenizer import train_tokenizer

VIT = dataclasses.replace(clips.VIT, context_length=40, eos_token_id=None)
NAMES = ("sofa, couch", "cat")
PROMPTS = "single"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a cat", "a sofa"], VIT.vocab_size, VIT.context_length)


@pytest.fixture(scope="module")
def params():
    return clips.random_params(VIT)


@pytest.fixture
def clip(tokenizer, params):
    return LoadedClip(VIT, params, tokenizer)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ZEGFORMER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embeddings, "_warned", [])
    return tmp_path / "cache" / "embeddings"


@pytest.fixture
def computed(monkeypatch):
    """List of the number of classes of each computation."""
    counts, compute = [], LoadedClip.embed_tokens

    def count(self, tokens):
        counts.append(len(tokens))
        return compute(self, tokens)

    monkeypatch.setattr(LoadedClip, "embed_tokens", count)
    return counts


def test_embeddings_are_computed_once_and_read_bit_for_bit(clip, folder, computed):
    module = clip.module()
    expected = embeddings.embed_tokens(
        lambda tokens: module.apply({"params": clip.params}, tokens, method=module.encode_text),
        embeddings.tokenize_classes(clip.tokenizer, NAMES, load_templates(PROMPTS)),
    )
    first = clip.embed(NAMES, PROMPTS)
    np.testing.assert_allclose(first, expected, atol=1e-6)
    (path,) = folder.iterdir()
    np.testing.assert_array_equal(np.load(path)["embeddings"], first)  # readable by NumPy alone
    again = clip.embed(NAMES, PROMPTS)
    assert computed == [2] and again.dtype == np.float32
    np.testing.assert_array_equal(again, first)


def changed(clip, tower, path, **fields):
    """Returns the CLIP with one weight of a tower changed by its last bit, or with other sizes."""
    params = {name: dict(tree) if name == tower else tree for name, tree in clip.params.items()}
    if path:
        params[tower][path] = np.array(params[tower][path])
        params[tower][path].flat[-1] = np.nextafter(params[tower][path].flat[-1], np.inf)
    config = dataclasses.replace(clip.config, **fields)
    return LoadedClip(config, params, clip.tokenizer)


@pytest.mark.slow
def test_everything_that_determines_embeddings_changes_the_key(clip, folder, computed):
    clip.embed(NAMES, PROMPTS)
    others = [
        (changed(clip, "text", "projection"), NAMES, PROMPTS),
        (changed(clip, "text", "", activation="gelu"), NAMES, PROMPTS),
        (changed(clip, "text", "", eos_token_id=257), NAMES, PROMPTS),
        (clip, ("sofa", "couch", "cat"), PROMPTS),  # the same texts in other groups
        (clip, NAMES[::-1], PROMPTS),
        (clip, NAMES, "imagenet_select"),
        (dataclasses.replace(clip, tokenizer=train_tokenizer(
            ["sofa, couch"], VIT.vocab_size, VIT.context_length)), NAMES, PROMPTS),
    ]  # fmt: skip
    for other in others:
        before = len(computed)
        other[0].embed(*other[1:])
        assert len(computed) == before + 1, other[1:]
    assert len(list(folder.iterdir())) == 1 + len(others)


def test_the_image_tower_does_not_change_the_key(clip, folder, computed):
    clip.embed(NAMES, PROMPTS)
    changed(clip, "visual", "projection").embed(NAMES, PROMPTS)
    changed(clip, "text", "", vision_heads=2).embed(NAMES, PROMPTS)
    assert computed == [2]


def npz(array):
    content = io.BytesIO()
    np.savez(content, embeddings=array)
    return content.getvalue()


def flip_the_last_number(data):
    """Changes one bit of an embedding."""
    place = data.rindex(b"PK\1\2") - 2
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"\0" + data[1:],
        lambda data: data.replace(b"{", b"("),
        lambda data: data[:-1],
        lambda data: b"",
        lambda data: npz(np.zeros((3, VIT.embed_dim), np.float32)),
        lambda data: npz(np.zeros((2, VIT.embed_dim))),
        lambda data: npz(np.array([{}], object)),
        flip_the_last_number,
    ],
    ids=["start", "header", "cut off", "empty", "shape", "type", "pickle", "a bit"],
)
def test_a_damaged_file_is_replaced(clip, folder, computed, damage):
    expected = clip.embed(NAMES, PROMPTS)
    (path,) = folder.iterdir()
    sound = path.read_bytes()
    path.write_bytes(damage(sound))
    np.testing.assert_array_equal(clip.embed(NAMES, PROMPTS), expected)
    assert computed == [2, 2]
    assert path.read_bytes() == sound and len(list(folder.iterdir())) == 1


def test_a_folder_that_cannot_be_written_is_one_warning(clip, folder, computed, caplog):
    folder.parent.write_text("a file where the folder would be")
    for names in (NAMES, ("dog",), NAMES):
        assert clip.embed(names, PROMPTS).shape == (len(names), VIT.embed_dim)
    assert computed == [2, 1, 2]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "\n" not in record.message
    assert str(folder.parent) in record.message and "ZEGFORMER_CACHE=DIR" in record.message


def test_embeddings_are_computed_if_the_file_cannot_be_read(clip, folder, computed):
    expected = clip.embed(NAMES, PROMPTS)
    (path,) = folder.iterdir()
    path.unlink()
    path.mkdir()
    np.testing.assert_array_equal(clip.embed(NAMES, PROMPTS), expected)


def test_the_folder_follows_the_environment_variable(monkeypatch):
    monkeypatch.setenv("ZEGFORMER_CACHE", "gs://bucket/x")
    assert str(embeddings.cache_folder()) == "gs://bucket/x/embeddings"
