"""A user's own prompt sets: files that are read, files that are refused, fields that take them."""

import dataclasses
import json
from types import SimpleNamespace

import clips
import numpy as np
import pytest
import shrunk

from zegformer_jax.experiment import Experiment, LoadedClip
from zegformer_jax.runtime.errors import MissingFile, UserError
from zegformer_jax.text import embeddings
from zegformer_jax.text.prompts import load_templates
from zegformer_jax.text.tokenizer import train_tokenizer
from zegformer_jax.text.vocabulary import Vocabulary
from zegformer_jax.training.objectives.clip import ClipObjective

MINE = ["a {}", "the {}."]
VIT = dataclasses.replace(clips.VIT, context_length=40, eos_token_id=None)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps({"mine": MINE, "photo": ["a photo: {}"]}), "utf-8")
    return path


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_file_has_sets_by_name(file, mark):
    file.write_text(mark + file.read_text("utf-8"), "utf-8")
    assert load_templates(f"{file}:mine") == ("a {}", "the {}.")
    assert load_templates(f"{file}:photo") == ("a photo: {}",)


@pytest.mark.parametrize(
    "set_, message",
    [
        ("a {}", "prompt set 'mine': expected a list of templates, as in .*, got 'a {}'"),
        ([], "prompt set 'mine': expected a list of templates, as in .*, got \\[\\]"),
        (["a {}", 3], "prompt set 'mine': template 2 must be text, got 3"),
        (["a {}", "a"], "template 2, 'a', needs exactly one {} in place of the class name, and no"),
        (["{} {}"], "template 1, '{} {}', needs exactly one {}"),
        (["{0}"], "template 1, '{0}', needs exactly one {}"),
        (["{name}"], "template 1, '{name}', needs exactly one {}"),
        (["{} {name}"], "template 1, '{} {name}', needs exactly one {} .*, and no other braces"),
        (["{{}}"], "template 1, '{{}}', needs exactly one {}"),
        (["a {} }"], "template 1, 'a {} }', needs exactly one {}"),
    ],
)
def test_a_set_that_is_none_is_refused(file, set_, message):
    file.write_text(json.dumps({"mine": set_, "photo": ["a photo: {}"]}))
    with pytest.raises(UserError, match=message.replace("{", r"\{").replace("}", r"\}")) as caught:
        load_templates(f"{file}:mine")
    assert str(caught.value).startswith(f"{file}: prompt set 'mine'")
    assert load_templates(f"{file}:photo") == ("a photo: {}",)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"{", "not valid JSON: .*line 1"),
        (b"[" * 100_000, "not valid JSON"),
        (b'["a {}"]', "expected an object of prompt sets, such as"),
        (b"{}", "expected an object of prompt sets, such as"),
        ('{"mine": ["a {}"]}'.encode("utf-16"), "text in UTF-16"),
    ],
)
def test_a_file_without_sets_is_refused(file, content, message):
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"^{file}: {message}"):
        load_templates(f"{file}:mine")


def test_a_set_that_is_not_there_is_told_with_those_that_are(file):
    with pytest.raises(UserError, match=f"^{file}: no prompt set 'my'; there are mine, photo$"):
        load_templates(f"{file}:my")
    for text in (str(file), f"{file}:"):
        with pytest.raises(UserError, match=f"name a prompt set, {file}:NAME; there are mine, ph"):
            load_templates(text)
    with pytest.raises(UserError, match="data/prompts.json: name a prompt set; there are .*single"):
        load_templates("")
    with pytest.raises(MissingFile, match=r"^none.json: no such file$"):
        load_templates("none.json:mine")


@pytest.mark.parametrize("place", ["workdir", "current folder", "absolute"])
def test_every_field_of_prompts_takes_a_file(file, tmp_path, monkeypatch, place):
    """Embeddings are those of the templates in the file, by hand."""
    workdir = tmp_path / "run"
    workdir.mkdir()
    monkeypatch.chdir(tmp_path)
    if place == "workdir":
        file = file.rename(workdir / file.name)
    prompts = f"{file if place == 'absolute' else file.name}:mine"
    tokenizer = train_tokenizer(["a cat", "a sofa"], VIT.vocab_size, VIT.context_length)
    clip = LoadedClip(VIT, clips.random_params(VIT), tokenizer)
    tokens = embeddings.tokenize_classes(tokenizer, ("cat",), MINE)
    module = clip.module()
    expected = embeddings.embed_tokens(
        lambda tokens: module.apply({"params": clip.params}, tokens, method=module.encode_text),
        tokens,
    )

    def embed(**fields):
        config = shrunk.get_config().unlock()
        config.update_from_flattened_dict(fields)
        experiment = Experiment(config.lock(), workdir)
        experiment.clip = clip
        return experiment.text_embeddings(("cat",))

    of_both = embed(**{"clip.grouper_prompts": prompts, "clip.classifier_prompts": prompts})
    np.testing.assert_allclose(of_both.grouper_cd, expected, atol=1e-6)
    np.testing.assert_allclose(of_both.classifier_cd, expected, atol=1e-6)
    of_evaluation = embed(**{"eval.grouper_prompts": prompts})
    np.testing.assert_allclose(of_evaluation.grouper_cd, expected, atol=1e-6)
    assert np.abs(of_evaluation.classifier_cd - expected).max() > 1e-3


def test_a_small_clip_is_trained_on_captions_of_own_prompts(file, tmp_path, monkeypatch):
    drawings = SimpleNamespace(vocabulary=Vocabulary.from_names(["cat"]), titles=["red cat"])
    monkeypatch.setattr(
        "zegformer_jax.input.openmoji.rasters.load_pictures", lambda directory: drawings
    )
    config = shrunk.get_config("clip").unlock()
    config.clip.update(grouper_prompts=f"{file.name}:mine", classifier_prompts=f"{file.name}:photo")
    objective = ClipObjective(Experiment(config.lock(), tmp_path))
    assert objective._templates == ("a {}", "the {}.", "a photo: {}")
