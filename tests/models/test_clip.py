"""CLIP against golden numbers and transformers, and its weights from and to files."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clips import CLIPS, random_params
from clips import VIT as SMALL
from flax import serialization, traverse_util
from safetensors.numpy import load_file, save_file
from slow_but import slow_but

from zegformer_jax.models.clip.model import CLIP, CLIP_MEAN, CLIP_STD, ClipConfig
from zegformer_jax.models.normalise import normalise_images
from zegformer_jax.pretrained.clip.configs import from_hugging_face
from zegformer_jax.pretrained.clip.load import from_openai_state_dict, load_clip, save_clip
from zegformer_jax.pretrained.clip.tensors import (
    HUGGING_FACE,
    OPENAI,
    parameter_shapes,
    published_tensors,
    read_parameters,
)
from zegformer_jax.text.tokenizer import train_tokenizer

# Parameters and running statistics, as PyTorch counts open_clip 3.3.0's and openai/CLIP's models.
COUNTS = {
    "RN50": (102_007_137, 53_248),
    "RN101": (119_688_033, 105_472),
    "RN50x4": (178_300_601, 109_760),
    "RN50x16": (290_979_217, 193_920),
    "RN50x64": (623_258_305, 410_624),
    "ViT-B/32": (151_277_313, 0),
    "ViT-B/16": (149_620_737, 0),
    "ViT-L/14": (427_616_513, 0),
    "ViT-L/14@336px": (427_944_193, 0),
    "ViT-H/14": (986_109_441, 0),
    "ViT-g/14": (1_366_678_273, 0),
    "ViT-bigG/14": (2_539_567_105, 0),
}


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer of at most 530 tokens."""
    return train_tokenizer(["a photo of a sheep", "a photo of a sofa"] * 3, 530, 14)


@pytest.fixture(scope="module")
def params():
    """Random parameters of SMALL."""
    return random_params(SMALL)


@pytest.fixture(scope="module")
def inputs():
    """Two images and two rows of tokens, of unequal length."""
    rng = np.random.default_rng(2)
    images = rng.normal(size=(2, 24, 24, 3)).astype(np.float32)
    tokens = np.zeros((2, 14), np.int32)
    tokens[0, :5] = [528, 7, 300, 21, 529]
    tokens[1, :9] = [528, 400, 8, 9, 9, 511, 3, 77, 529]
    return images, tokens


def encode(config, params, inputs, dtype=jnp.float32):
    """Both towers' features, as NumPy."""
    model, variables = CLIP(config, dtype), {"params": params}
    encode_image = jax.jit(lambda x: model.apply(variables, x, method="encode_image"))
    encode_text = jax.jit(lambda x: model.apply(variables, x, method="encode_text"))
    images, tokens = inputs
    return np.asarray(encode_image(images)), np.asarray(encode_text(tokens))


def assert_trees_equal(one, other):
    """Same names, shapes and numbers."""
    one, other = (traverse_util.flatten_dict(x, sep="/") for x in (one, other))
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.mark.parametrize("name", slow_but(["RN50", "ViT-B/16"], CLIPS))
def test_parameter_counts(name):
    """Only trained parameters count; a ResNet's running means and variances are further leaves."""
    shapes = parameter_shapes(CLIPS[name])
    sizes = {path: math.prod(shape) for path, shape in shapes.items()}
    statistics = sum(n for path, n in sizes.items() if path.endswith(("/mean", "/var")))
    assert sum(sizes.values()) - statistics == COUNTS[name][0]
    assert statistics == COUNTS[name][1]


def test_golden_config_is_read_from_shapes(golden):
    config, params = from_openai_state_dict(golden("clip_weights"))
    assert config == ClipConfig(
        image_size=224,
        patch_size=32,
        vision_width=64,
        vision_layers=2,
        vision_heads=1,
        text_width=64,
        text_layers=2,
        text_heads=1,
        embed_dim=512,
    )
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(params))


def test_openai_names_round_trip(params):
    tensors = published_tensors(params, SMALL, OPENAI)
    assert tensors["visual.conv1.weight"].shape == (12, 3, 8, 8)
    sizes = {"input_resolution": np.array(24), "context_length": np.array(14)}
    assert_trees_equal(read_parameters(tensors | sizes, SMALL, OPENAI, "here"), params)


def test_call_gives_normalised_features_and_scale(params, inputs):
    image, text, scale = CLIP(SMALL).apply({"params": params}, *inputs)
    raw_image, raw_text = encode(SMALL, params, inputs)
    for unit, raw in ((image, raw_image), (text, raw_text)):
        np.testing.assert_allclose(
            unit, raw / np.linalg.norm(raw, axis=1, keepdims=True), rtol=1e-5
        )
    np.testing.assert_allclose(scale, np.exp(params["logit_scale"]), rtol=1e-6)


def test_bfloat16_is_close_and_gives_float32(params, inputs):
    for exact, coarse in zip(
        encode(SMALL, params, inputs), encode(SMALL, params, inputs, jnp.bfloat16), strict=True
    ):
        assert coarse.dtype == np.float32
        cosine = np.sum(exact * coarse, 1)
        cosine /= np.linalg.norm(exact, axis=1) * np.linalg.norm(coarse, axis=1)
        assert cosine.min() > 0.999
        assert np.any(coarse != exact)


def test_padding_and_what_follows_the_end_do_not_matter(params, inputs):
    images, tokens = inputs
    _, expected = encode(SMALL, params, inputs)
    changed = np.where(np.arange(14)[None] > 8, 55, tokens)
    for variant in (tokens[:, :9], changed):
        _, text = encode(SMALL, params, (images, variant))
        np.testing.assert_allclose(text, expected, rtol=0, atol=1e-6)


def test_end_of_text_rules(params, inputs):
    images, _ = inputs
    tokens = np.zeros((1, 14), np.int32)
    tokens[0, :6] = [528, 7, 20, 8, 529, 529]
    features = {
        eos: encode(dataclasses.replace(SMALL, eos_token_id=eos), params, (images, tokens))[1]
        for eos in (None, 529, 20)
    }
    np.testing.assert_array_equal(features[None], features[529])  # the first of the two ends
    _, cut = encode(SMALL, params, (images, tokens[:, :5]))
    np.testing.assert_allclose(features[529], cut, rtol=0, atol=1e-6)
    assert np.abs(features[20] - features[529]).max() > 1e-3  # read at position 2


def test_initialisation_follows_clip():
    config = ClipConfig(
        image_size=32, patch_size=16, vision_width=64, vision_layers=2, vision_heads=2,
        text_width=128, text_layers=3, text_heads=2, vocab_size=2000, context_length=16,
        embed_dim=64,
    )  # fmt: skip
    params = jax.jit(CLIP(config).init)(
        jax.random.key(3), jnp.zeros((1, 32, 32, 3)), jnp.zeros((1, 16), jnp.int32)
    )["params"]
    text = params["text"]
    expected = {
        0.02: text["token_embedding"]["embedding"],
        0.01: text["position_embedding"],
        128**-0.5: text["block_0"]["attention"]["qkv"]["kernel"],
        128**-0.5 * 6**-0.5: text["block_2"]["mlp_out"]["kernel"],
        256**-0.5: text["block_1"]["mlp_in"]["kernel"],
        (3 * 768) ** -0.5: params["visual"]["patch_embedding"]["kernel"],
    }
    for std, array in expected.items():
        np.testing.assert_allclose(np.std(array), std, rtol=0.05)
    np.testing.assert_allclose(np.exp(params["logit_scale"]), 1 / 0.07, rtol=1e-5)


def test_images_are_normalised_as_by_clips_processor():
    image = np.array([[[0, 128, 255]]], np.uint8)
    # transformers' CLIPImageProcessor: rescale by 1 / 255, then its mean and std
    mean = np.array([0.48145466, 0.4578275, 0.40821073])
    std = np.array([0.26862954, 0.26130258, 0.27577711])
    np.testing.assert_allclose(
        normalise_images(jnp.asarray(image)[None], None, CLIP_MEAN, CLIP_STD)[0],
        (image / 255 - mean) / std,
        rtol=1e-6,
    )


def test_wrong_sizes_raise(params, inputs):
    images, tokens = inputs
    with pytest.raises(ValueError, match=r"takes \[B, 24, 24, 3\], got \[2, 16, 24, 3\]"):
        encode(SMALL, params, (images[:, :16], tokens))
    with pytest.raises(ValueError, match="at most 14 tokens, got 15"):
        encode(SMALL, params, (images, np.pad(tokens, ((0, 0), (0, 1)))))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("patch_size", 7, "image_size 24 is not a multiple of patch_size 7"),
        ("text_heads", 3, "text_width 20 is not a multiple of text_heads 3"),
        ("activation", "relu", "activation 'relu' is not one of quick_gelu, gelu"),
    ],
)
def test_config_checks(field, value, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **{field: value})


@pytest.mark.parametrize(
    "config",
    [SMALL, dataclasses.replace(SMALL, activation="gelu", eos_token_id=None)],
    ids=["eos", "argmax"],
)
def test_directory_round_trip_is_exact(tmp_path, params, tokenizer, config):
    save_clip(tmp_path / "clip", config, params, tokenizer)
    loaded_config, loaded_params, loaded_tokenizer = load_clip(tmp_path / "clip")
    assert loaded_config == config
    assert_trees_equal(loaded_params, params)
    texts = ["a photo of a sheep", "sofas!"]
    np.testing.assert_array_equal(loaded_tokenizer(texts), tokenizer(texts))


def test_transformers_reads_the_saved_config(tmp_path, params, tokenizer):
    from transformers import CLIPConfig

    save_clip(tmp_path, SMALL, params, tokenizer)
    config = CLIPConfig.from_pretrained(tmp_path)
    assert config.projection_dim == 6
    text, vision = config.text_config, config.vision_config
    assert (text.hidden_size, text.num_hidden_layers, text.num_attention_heads) == (20, 3, 2)
    assert (text.intermediate_size, text.vocab_size, text.eos_token_id) == (80, 530, 529)
    assert (text.max_position_embeddings, text.hidden_act) == (14, "quick_gelu")
    assert (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads) == (12, 2, 3)
    assert (vision.image_size, vision.patch_size, vision.hidden_act) == (24, 8, "quick_gelu")
    processor = json.loads((tmp_path / "preprocessor_config.json").read_text())
    np.testing.assert_allclose(processor["image_mean"], [0.48145466, 0.4578275, 0.40821073])
    assert processor["crop_size"] == {"height": 24, "width": 24}


def test_absent_fields_have_transformers_defaults(tmp_path):
    from transformers import CLIPConfig

    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    defaults = CLIPConfig()
    loaded = from_hugging_face(tmp_path / "config.json")
    assert loaded.vision_width == defaults.vision_config.hidden_size
    assert loaded.vision_layers == defaults.vision_config.num_hidden_layers
    assert loaded.vision_heads == defaults.vision_config.num_attention_heads
    assert loaded.image_size == defaults.vision_config.image_size
    assert loaded.patch_size == defaults.vision_config.patch_size
    assert loaded.text_width == defaults.text_config.hidden_size
    assert loaded.text_layers == defaults.text_config.num_hidden_layers
    assert loaded.text_heads == defaults.text_config.num_attention_heads
    assert loaded.vocab_size == defaults.text_config.vocab_size
    assert loaded.context_length == defaults.text_config.max_position_embeddings
    assert loaded.eos_token_id == defaults.text_config.eos_token_id
    assert loaded.vision_mlp_width is None  # four times the default width
    assert defaults.vision_config.intermediate_size == 4 * loaded.vision_width
    assert loaded.activation == defaults.text_config.hidden_act
    assert loaded.embed_dim == defaults.projection_dim


def test_sharded_and_flax_weights_are_read(tmp_path, params, tokenizer):
    save_clip(tmp_path, SMALL, params, tokenizer)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()

    (tmp_path / "flax_model.msgpack").write_bytes(serialization.to_bytes(flax_tree(tensors)))
    assert_trees_equal(load_clip(tmp_path)[1], params)
    (tmp_path / "flax_model.msgpack").unlink()

    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for part, group in parts.items():
        save_file({name: tensors[name] for name in group}, tmp_path / part)
    index = {"weight_map": {name: part for part, group in parts.items() for name in group}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_trees_equal(load_clip(tmp_path)[1], params)


def flax_tree(tensors):
    """The tree that transformers 4's FlaxCLIPModel keeps (modeling_flax_clip.py)."""
    flat = {}
    for name, array in tensors.items():
        parent, _, leaf = name.rpartition(".")
        if leaf == "weight" and "norm" in parent.split(".")[-1].replace("pre_layrnorm", "norm"):
            leaf = "scale"
        elif leaf == "weight" and parent.endswith(("token_embedding", "position_embedding")):
            leaf = "embedding"
        elif leaf == "weight":
            leaf = "kernel"
            array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
        flat[f"{parent}.{leaf}" if parent else leaf] = array
    return traverse_util.unflatten_dict(flat, sep=".")


def test_tensors_that_do_not_fit_are_named(tmp_path, params, tokenizer):
    save_clip(tmp_path, SMALL, params, tokenizer)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = "text_model.encoder.layers.2.self_attn.k_proj.weight"

    save_file({k: v for k, v in tensors.items() if k != name}, path)
    with pytest.raises(ValueError, match=f"no tensor '{name}', which text/block_2"):
        load_clip(tmp_path)
    save_file(tensors | {"extra.weight": np.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"tensor 'extra.weight' \[3\] has no place"):
        load_clip(tmp_path)
    save_file(tensors | {name: np.zeros((20, 19), np.float32)}, path)
    with pytest.raises(ValueError, match=rf"'{name}' is \[20, 19\], .*qkv/kernel needs \[20, 20\]"):
        load_clip(tmp_path)
    position_ids = {"text_model.embeddings.position_ids": np.arange(14)[None]}
    save_file(tensors | position_ids, path)
    assert_trees_equal(load_clip(tmp_path)[1], params)


def test_missing_files_are_named(tmp_path, params, tokenizer):
    with pytest.raises(FileNotFoundError, match="no-such-place: no CLIP here"):
        load_clip(tmp_path / "no-such-place")
    with pytest.raises(FileNotFoundError, match="config.json: no such file"):
        load_clip(tmp_path)
    save_clip(tmp_path, SMALL, params, tokenizer)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors: no such file; convert"):
        load_clip(tmp_path)


def test_hub_failure_is_one_line(monkeypatch):
    import huggingface_hub

    def fail(*args, **kwargs):
        raise OSError("no network\nand much more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(FileNotFoundError, match="openai/clip: neither a local directory") as error:
        load_clip("openai/clip")
    assert "\n" not in str(error.value)
    files = "config.json, model.safetensors and tokenizer.json"
    assert f"(OSError: no network); download its {files}" in str(error.value)


def test_unsupported_fields_are_named(tmp_path, params, tokenizer):
    save_clip(tmp_path, SMALL, params, tokenizer)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["text_config"]["intermediate_size"] = 50
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="text_config.intermediate_size is 50; only 80"):
        load_clip(tmp_path)


@pytest.mark.parametrize("eos", [529, None])
def test_transformers_model_gives_the_same_features(tmp_path, params, tokenizer, inputs, eos):
    torch = pytest.importorskip("torch")
    from transformers import CLIPModel

    config = dataclasses.replace(SMALL, eos_token_id=eos)
    save_clip(tmp_path, config, params, tokenizer)
    model = CLIPModel.from_pretrained(tmp_path).eval()
    images, tokens = inputs
    with torch.no_grad():
        output = model(
            input_ids=torch.tensor(tokens),
            pixel_values=torch.tensor(images.transpose(0, 3, 1, 2)),
        )
    image, text, scale = CLIP(config).apply({"params": params}, *inputs)
    np.testing.assert_allclose(image, output.image_embeds.numpy(), rtol=0, atol=1e-5)
    np.testing.assert_allclose(text, output.text_embeds.numpy(), rtol=0, atol=1e-5)
    logits = scale * image @ text.T
    np.testing.assert_allclose(logits, output.logits_per_image.numpy(), rtol=1e-4, atol=1e-5)

    model.save_pretrained(tmp_path / "theirs")  # and back
    tokenizer.save(tmp_path / "theirs")
    loaded_config, loaded_params, _ = load_clip(tmp_path / "theirs")
    assert loaded_config == config
    assert_trees_equal(loaded_params, params)
    assert set(load_file(tmp_path / "theirs" / "model.safetensors")) == set(
        published_tensors(params, config, HUGGING_FACE)
    )


@pytest.mark.slow
def test_vit_b32_at_full_size_is_transformers():
    torch = pytest.importorskip("torch")
    from transformers import CLIPConfig, CLIPModel

    theirs = CLIPModel(CLIPConfig(projection_dim=512)).eval()  # its defaults are ViT-B/32's
    config = dataclasses.replace(CLIPS["ViT-B/32"], eos_token_id=49407)
    tensors = {name: x.numpy() for name, x in theirs.state_dict().items()}
    params = read_parameters(tensors, config, HUGGING_FACE, "transformers")
    rng = np.random.default_rng(0)
    images = rng.normal(size=(2, 224, 224, 3)).astype(np.float32)
    tokens = rng.integers(1, 49406, (2, 77)).astype(np.int32)
    tokens[:, 0], tokens[0, 8], tokens[1, 76] = 49406, 49407, 49407
    with torch.no_grad():
        output = theirs(
            input_ids=torch.tensor(tokens),
            pixel_values=torch.tensor(images.transpose(0, 3, 1, 2)),
        )
    image, text, _ = jax.jit(CLIP(config).apply)({"params": params}, images, tokens)
    np.testing.assert_allclose(image, output.image_embeds.numpy(), rtol=0, atol=1e-6)
    np.testing.assert_allclose(text, output.text_embeds.numpy(), rtol=0, atol=1e-6)
