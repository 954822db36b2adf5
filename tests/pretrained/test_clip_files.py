"""CLIPs from OpenAI's and OpenCLIP's files, from the Hub's cache, and back."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from clips import RESNET, VIT, random_params
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from zegformer_jax.models.clip.model import CLIP, CLIP_MEAN, CLIP_STD
from zegformer_jax.pretrained.clip.load import load_clip, save_clip
from zegformer_jax.pretrained.clip.tensors import HUGGING_FACE, OPENAI, published_tensors
from zegformer_jax.text.tokenizer import Tokenizer, train_tokenizer

# OpenAI's files say nothing of heads, so that widths are multiples of 64; and their vocabulary.
OPENAI_SIZES = {"vocab_size": 49408, "text_width": 64, "text_heads": 1, "eos_token_id": None}
OPENAI_VIT = dataclasses.replace(VIT, **OPENAI_SIZES, vision_width=128, vision_heads=2)
OPENAI_RESNET = dataclasses.replace(RESNET, **OPENAI_SIZES, vision_heads=3)
ROOT = Path(__file__).resolve().parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer of at most 530 tokens."""
    return train_tokenizer(["a photo of a sheep", "a photo of a sofa"] * 3, 530, 14)


def assert_trees_equal(one, other):
    """Asserts equal names, shapes and values."""
    one, other = (traverse_util.flatten_dict(x, sep="/") for x in (one, other))
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def open_clip_fields(**changes):
    """Returns OpenCLIP's config of VIT, with other sizes of MLP and heads."""
    model = {
        "embed_dim": 6,
        "vision_cfg": {
            "image_size": 24,
            "layers": 2,
            "width": 12,
            "head_width": 4,
            "mlp_ratio": 4.4,
            "patch_size": 8,
        },
        "text_cfg": {
            "context_length": 14,
            "vocab_size": 530,
            "width": 20,
            "heads": 2,
            "layers": 3,
            "pool_type": "eos",
            "eos_id": 529,
        },
    }
    for path, value in changes.items():
        section, _, key = path.rpartition("__")
        (model[section] if section else model)[key] = value
    return {"model_cfg": model, "preprocess_cfg": {"mean": None}}


def write_open_clip(directory, tensors, fields, weights="open_clip_model.safetensors"):
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / weights)
    (directory / "open_clip_config.json").write_text(json.dumps(fields))


def test_resnet_is_saved_as_open_clip_and_read_back(tmp_path, tokenizer):
    params = random_params(RESNET)
    save_clip(tmp_path, RESNET, params, tokenizer)
    assert not (tmp_path / "config.json").exists()
    fields = json.loads((tmp_path / "open_clip_config.json").read_text())
    assert fields["model_cfg"]["vision_cfg"] == {
        "image_size": 96, "layers": [1, 3, 1, 2], "width": 6, "head_width": 48, "patch_size": None,
    }  # fmt: skip
    np.testing.assert_allclose(
        fields["preprocess_cfg"]["mean"], [0.48145466, 0.4578275, 0.40821073]
    )
    config, loaded, theirs = load_clip(tmp_path)
    assert config == RESNET
    assert_trees_equal(loaded, params)
    np.testing.assert_array_equal(theirs(["sofas!"]), tokenizer(["sofas!"]))


def test_open_clip_directory(tmp_path, tokenizer):
    expected = dataclasses.replace(VIT, activation="gelu", vision_mlp_width=52)
    params = random_params(expected)
    tensors = published_tensors(params, expected, OPENAI)
    text = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_proj")
    tensors = {f"text.{k}" if k.startswith(text) else k: x for k, x in tensors.items()}
    tensors["logit_scale"] = tensors["logit_scale"].reshape(1)
    assert "text.transformer.resblocks.0.ln_1.weight" in tensors
    assert "visual.transformer.resblocks.0.ln_1.weight" in tensors
    write_open_clip(tmp_path, tensors, open_clip_fields(custom_text=True))
    tokenizer.save(tmp_path)
    for source in (tmp_path, tmp_path / "open_clip_model.safetensors"):
        config, loaded, theirs = load_clip(source)
        assert config == expected
        assert_trees_equal(loaded, params)
        assert theirs.vocab_size == tokenizer.vocab_size


def test_open_clip_quick_gelu_and_openai_tokenizer(tmp_path):
    expected = dataclasses.replace(VIT, eos_token_id=None, vocab_size=49408)
    fields = open_clip_fields(
        quick_gelu=True,
        vision_cfg__mlp_ratio=4.0,
        text_cfg__pool_type="argmax",
        text_cfg__vocab_size=49408,
    )
    tensors = published_tensors(random_params(expected), expected, OPENAI)
    write_open_clip(tmp_path, tensors, fields, "open_clip_pytorch_model.safetensors")
    config, _, tokenizer = load_clip(tmp_path)
    assert config == expected
    assert tokenizer.context_length == 14
    ids = Tokenizer.openai()(["a sheep"])[0, :14]
    np.testing.assert_array_equal(tokenizer(["a sheep"])[0], ids)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_cfg__timm_model_name": "vit_b"}, "vision_cfg.timm_model_name is vit_b: not"),
        ({"text_cfg__no_causal_mask": True}, "text_cfg.no_causal_mask is True: not supported"),
        ({"text_cfg__hf_model_name": "roberta"}, "text_cfg.hf_model_name is roberta: not"),
        ({"text_cfg__mlp_ratio": 2}, "text_cfg.mlp_ratio is 2; only 4.0 is supported"),
        ({"text_cfg__pool_type": "last"}, "text_cfg.pool_type is last: not supported"),
        ({"vision_cfg__pool_type": "avg"}, "vision_cfg.pool_type is avg; only tok is supported"),
        ({"vision_cfg__image_size": [24, 32]}, r"image_size is \[24, 32\]; only square images"),
        ({"init_logit_bias": -10}, "model_cfg.init_logit_bias is -10: not supported"),
        ({"text_cfg__hf_tokenizer_name": "bert"}, "hf_tokenizer_name is bert, but no tokenizer"),
    ],
)
def test_unsupported_open_clip_fields_are_named(tmp_path, changes, message):
    write_open_clip(tmp_path, {"x": np.zeros(1)}, open_clip_fields(**changes))
    with pytest.raises(ValueError, match=rf"open_clip_config.json: .*{message}"):
        load_clip(tmp_path)


@pytest.mark.parametrize("config", [OPENAI_VIT, OPENAI_RESNET], ids=["vit", "resnet"])
@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
def test_openai_state_dict_file(tmp_path, config, suffix):
    params = random_params(config)
    tensors = published_tensors(params, config, OPENAI)
    sizes = {"input_resolution": 24, "context_length": 14, "vocab_size": 49408}
    extra = {name: np.array(value) for name, value in sizes.items()}
    if config.is_resnet:
        extra["visual.layer1.0.bn1.num_batches_tracked"] = np.array(7)
    path = tmp_path / f"clip.{suffix}"
    if suffix == "npz":
        np.savez(path, **tensors, **extra)
    else:
        save_file(tensors | extra, path)
    loaded_config, loaded, tokenizer = load_clip(path)
    assert loaded_config == config
    assert_trees_equal(loaded, params)
    assert (tokenizer.vocab_size, tokenizer.context_length) == (49408, 14)


@pytest.mark.filterwarnings("ignore:`torch.jit.*is deprecated:DeprecationWarning")
@pytest.mark.parametrize("config", [OPENAI_VIT, OPENAI_RESNET], ids=["vit", "resnet"])
def test_openai_torchscript_archive(tmp_path, config):
    """The file is like OpenAI's: TorchScript with most tensors in half precision."""
    torch = pytest.importorskip("torch")
    params = random_params(config)
    root = torch.nn.Module()
    for name, array in published_tensors(params, config, OPENAI).items():
        module = root
        *parents, leaf = name.split(".")
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, torch.nn.Module())
            module = getattr(module, parent)
        tensor = torch.tensor(array)
        if leaf.startswith("running"):
            module.register_buffer(leaf, tensor)
        else:
            module.register_parameter(leaf, torch.nn.Parameter(tensor.half()))
    root.register_buffer("input_resolution", torch.tensor(config.image_size))
    path = tmp_path / "archive.pt"
    torch.jit.save(torch.jit.script(root), path)
    loaded_config, loaded, _ = load_clip(path)
    assert loaded_config == config
    flat, expected = (traverse_util.flatten_dict(x, sep="/") for x in (loaded, params))
    assert flat.keys() == expected.keys()
    for name, array in expected.items():
        half = array if name.endswith(("/mean", "/var")) else array.astype(np.float16)
        np.testing.assert_array_equal(flat[name], half.astype(np.float32), err_msg=name)
        assert flat[name].dtype == np.float32


def make_snapshot(cache, name):
    """Returns the directory of a repository's snapshot in the Hub's cache."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    return repository / "snapshots" / COMMIT


@pytest.mark.parametrize("config", [VIT, RESNET], ids=["hugging_face", "open_clip"])
def test_cached_snapshots_are_read_without_a_network(tmp_path, monkeypatch, tokenizer, config):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    params = random_params(config)
    save_clip(make_snapshot(tmp_path, "someone/clip"), config, params, tokenizer)
    loaded_config, loaded, _ = load_clip("someone/clip")
    assert loaded_config == config
    assert_trees_equal(loaded, params)
    with pytest.raises(FileNotFoundError, match="someone/other: neither a local directory nor"):
        load_clip("someone/other")


def test_the_hub_is_asked_for_one_format_of_weights(tmp_path, monkeypatch, tokenizer):
    """The repository has both layouts: only transformers' weights are downloaded."""
    import huggingface_hub

    save_clip(tmp_path / "hub", VIT, random_params(VIT), tokenizer)
    (tmp_path / "hub" / "open_clip_config.json").write_text(json.dumps(open_clip_fields()))
    (tmp_path / "hub" / "open_clip_model.safetensors").write_bytes(b"not to be fetched")
    (tmp_path / "hub" / "pytorch_model.bin").write_bytes(b"not to be fetched")
    local = tmp_path / "local"

    def snapshot(name, allow_patterns):
        local.mkdir(exist_ok=True)
        for pattern in allow_patterns:
            for path in (tmp_path / "hub").glob(pattern):
                (local / path.name).write_bytes(path.read_bytes())
        return str(local)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert load_clip("someone/clip")[0] == VIT
    assert {x.name for x in local.iterdir() if x.suffix in (".safetensors", ".bin")} == {
        "model.safetensors"
    }


DAMAGED = {
    "config.json": {
        "{": "not valid JSON: .* line 1",
        "[" * 100_000: "not valid JSON",
        "[]": "expected a JSON object, got list",
        '{"model_type": "bert"}': "model_type is 'bert', not 'clip'",
        '{"text_config": 3}': "Field 'text_config' with value 3",
        '{"text_config": {"hidden_size": "wide"}}': "'hidden_size' expected int, got str",
        '{"text_config": {"hidden_size": 30}}': r"hidden size \(30\) is not a multiple",
        '{"text_config": {"num_attention_heads": 0}}': "ZeroDivisionError",
        '{"vision_config": {"image_size": [24, 32]}}': r"\[24, 32\]; only square images",
        '{"vision_config": {"patch_size": null}}': "patch_size is None",
    },
    "preprocessor_config.json": {
        "{": "not a valid JSON",
        "[]": "TypeError|AttributeError",
        '{"image_mean": [0.5, 0.5]}': "broadcast",
    },
    "tokenizer.json": {
        "{": "JSONDecodeError",
        "{}": "KeyError",
        '{"model": {"vocab": {"a": 0}, "merges": []}, "added_tokens": []}': "vocabulary lacks <",
    },
    "model.safetensors.index.json": {"{}": "no weight_map"},
}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [(name, *case) for name, cases in DAMAGED.items() for case in cases.items()],
    ids=lambda x: x[:20],
)
def test_a_damaged_file_is_one_line_that_names_it(tmp_path, tokenizer, name, content, message):
    save_clip(tmp_path, VIT, random_params(VIT), tokenizer)
    (tmp_path / name).write_text(content)
    if name.endswith("index.json"):
        (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=message) as error:
        load_clip(tmp_path)
    where = tmp_path if name == "tokenizer.json" else tmp_path / name
    assert str(error.value).startswith(f"{where}: ")
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_a_damaged_open_clip_config_is_named(tmp_path):
    write_open_clip(tmp_path, {"x": np.zeros(1)}, open_clip_fields())
    (tmp_path / "open_clip_config.json").write_text("{")
    with pytest.raises(ValueError, match="open_clip_config.json: not valid JSON"):
        load_clip(tmp_path)


@pytest.mark.slow
def test_a_clip_is_saved_and_loaded_silently_and_without_pytorch(tmp_path, tokenizer):
    save_clip(tmp_path / "one", VIT, random_params(VIT), tokenizer)
    code = f"""
import sys
for name in ("torch", "torchvision", "tensorflow"):
    sys.modules[name] = None  # an import of it raises
from zegformer_jax.pretrained.clip.load import load_clip, save_clip
assert "transformers" not in sys.modules
save_clip({str(tmp_path / "two")!r}, *load_clip({str(tmp_path / "one")!r}))
assert "transformers" in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "vocab.json"} <= names
    # transformers notes in tokenizer_config.json that it was read from a directory.
    for path in (tmp_path / "one" / name for name in names - {"tokenizer_config.json"}):
        assert (tmp_path / "two" / path.name).read_bytes() == path.read_bytes(), path.name


def test_files_that_need_a_config_beside_them_are_refused(tmp_path):
    tensors = {"x": np.zeros(1)}
    save_file(tensors, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(FileNotFoundError, match="open_clip_config.json, which holds .* beside it"):
        load_clip(tmp_path / "open_clip_model.safetensors")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="model.safetensors: pass the directory .* config.json"):
        load_clip(tmp_path / "model.safetensors")
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no tensor 'token_embedding.weight': not a CLIP in"):
        load_clip(tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError, match="clips/ViT-B-16.pt: no CLIP here"):
        load_clip("clips/ViT-B-16.pt")  # by its suffix a file, not a name on the Hub
    (tmp_path / "open_clip_model.safetensors").unlink()
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="open_clip_model.safetensors: no such file"):
        load_clip(tmp_path)


def test_surplus_tensors_of_a_resnet_are_named(tmp_path, tokenizer):
    save_clip(tmp_path, RESNET, random_params(RESNET), tokenizer)
    path = tmp_path / "open_clip_model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"logit_bias": np.zeros(())}, path)
    with pytest.raises(ValueError, match=r"tensor 'logit_bias' \[\] has no place"):
        load_clip(tmp_path)


def test_transformers_has_no_names_for_a_resnet():
    with pytest.raises(ValueError, match="transformers has no CLIP with a ResNet"):
        published_tensors(random_params(RESNET), RESNET, HUGGING_FACE)


def test_a_model_trained_with_another_normalisation_is_converted(tmp_path, tokenizer):
    mean, std = [0.5, 0.4, 0.6], [0.5, 0.3, 0.2]
    params = random_params(VIT)
    save_clip(tmp_path, VIT, params, tokenizer)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({"image_mean": mean, "image_std": std}))
    _, converted, _ = load_clip(tmp_path)
    path.unlink()  # transformers 5 may write both processors into one file
    nested = {"image_processor": {"image_mean": mean, "image_std": std}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    assert_trees_equal(load_clip(tmp_path)[1], converted)

    pixels = np.random.default_rng(0).integers(0, 256, (2, 24, 24, 3))
    features = [
        CLIP(VIT).apply({"params": p}, x.astype(np.float32), method="encode_image")
        for p, x in (
            (params, (pixels / 255 - mean) / std),
            (converted, (pixels - CLIP_MEAN) / np.array(CLIP_STD)),
        )
    ]
    np.testing.assert_allclose(features[0], features[1], rtol=0, atol=2e-5)
    assert_trees_equal(converted["text"], params["text"])

    save_clip(tmp_path / "resnet", RESNET, random_params(RESNET), tokenizer)
    path = tmp_path / "resnet" / "open_clip_config.json"
    fields = json.loads(path.read_text())
    fields["preprocess_cfg"] = {"mean": mean, "std": std}
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="differ from OpenAI's; that is supported for ViTs only"):
        load_clip(tmp_path / "resnet")
