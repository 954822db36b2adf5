"""The authors' checkpoints: names, sizes, what is left out, and the way back, bit for bit."""

import itertools
import math
import re
import time

import numpy as np
import pytest
from golden_case import GOLDEN, GoldenCase

from zegformer_jax.pretrained import tables, zegformer
from zegformer_jax.pretrained.zegformer_names import PIXEL_DECODER, PREDICTOR

LOGIT_SCALE = f"{PREDICTOR}.logit_scale"
GOLDEN_SIZES = GoldenCase(GOLDEN).sizes
HEADS = GOLDEN_SIZES["heads"]
BLOCKS = {"r50": (3, 4, 6, 3), "r101": (3, 4, 23, 3)}
# Trained numbers and frozen ones, of checkpoints whose sizes are known.
COUNTS = {"r50": (41_348_032, 106_240), "r101": (60_287_936, 210_688)}


def sizes_of(blocks=BLOCKS["r50"], **changes):
    """Sizes of a published model on a ResNet (the papers'), as `infer_sizes` returns them."""
    return {
        "kind": "zegformer",
        "embed_dim": 512,
        "backbone": {
            "name": "resnet",
            "blocks": blocks,
            "stem_width": 64,
            "bottleneck_width": 64,
            "stage_width": 256,
            "norm": "frozen_batch",
        },
        "pixel_decoder": {"width": 256, "mask_width": 256},
        "transformer": {
            "queries": 100,
            "width": 256,
            "layers": 6,
            "heads": 8,
            "mlp_width": 2048,
            "project_input": True,
        },
        "memory": "res5",
    } | changes


def with_encoder():
    sizes = sizes_of()
    encoder = {"encoder_layers": 6, "encoder_heads": 8, "encoder_mlp_width": 2048}
    sizes["pixel_decoder"] |= encoder
    sizes["transformer"] |= {"project_input": False}
    return sizes


def on_swin():
    backbone = {
        "name": "swin",
        "width": 96,
        "depths": (2, 2, 6, 2),
        "heads": (3, 6, 12, 24),
        "window": 7,
    }
    return sizes_of(backbone=backbone)


def baseline():
    sizes = sizes_of(kind="per_pixel")
    del sizes["transformer"], sizes["memory"]
    return sizes


def with_group_norm():
    sizes = sizes_of((1, 1, 1, 1))
    sizes["backbone"] |= {"norm": "group", "stage_width": 64}  # then res2 needs no shortcut
    return sizes


PUBLISHED = {
    "r50": sizes_of(),
    "r101": sizes_of(BLOCKS["r101"]),
    "encoder": with_encoder(),
    "swin": on_swin(),
    "group_norm": with_group_norm(),
    "per_pixel": baseline(),
}


def empty_tensors(sizes):
    """A state dict of the right shapes that takes no memory."""
    zero = np.zeros((), np.float32)
    arrays = {path: np.broadcast_to(zero, x) for path, x in zegformer.shapes(sizes).items()}
    rows = zegformer.table(sizes)
    shapes = {}
    for row in rows:
        parts = [row.layout.to_published(arrays[path]) for path in row.paths]
        shapes[row.names[0]] = (sum(len(x) for x in parts), *parts[0].shape[1:])
    return {name: np.broadcast_to(zero, shape) for name, shape in shapes.items()}


def expand(pattern):
    """`a.{b,c}` to `a.b` and `a.c`."""
    pieces = re.split(r"\{([^{}]*)\}", pattern)
    choices = [x.split(",") if i % 2 else [x] for i, x in enumerate(pieces)]
    return {"".join(choice) for choice in itertools.product(*choices)}


def published_names(blocks, encoder_layers):
    """Every name of a grouper on a ResNet, from the description of the published layout."""
    both, norm = "{weight,bias}", "{weight,bias,running_mean,running_var}"
    patterns = ["backbone.stem.conv1.weight", f"backbone.stem.conv1.norm.{norm}"]
    for stage, count in enumerate(blocks, 2):
        for i in range(count):
            convs = "{shortcut,conv1,conv2,conv3}" if i == 0 else "{conv1,conv2,conv3}"
            block = f"backbone.res{stage}.{i}.{convs}"
            patterns += [f"{block}.weight", f"{block}.norm.{norm}"]
    convs = (
        "sem_seg_head.pixel_decoder.{adapter_1,adapter_2,adapter_3,layer_1,layer_2,layer_3,layer_4}"
    )
    patterns += [
        f"{convs}.weight",
        f"{convs}.norm.{both}",
        f"sem_seg_head.pixel_decoder.mask_features.{both}",
        "sem_seg_head.predictor.{query_embed.weight,bg_feature,logit_scale}",
        f"sem_seg_head.predictor.projection_layer.{both}",
        f"sem_seg_head.predictor.mask_embed.layers.{{0,1,2}}.{both}",
        f"sem_seg_head.predictor.transformer.decoder.norm.{both}",
    ]
    attention = "{in_proj_weight,in_proj_bias,out_proj.weight,out_proj.bias}"
    layer = "sem_seg_head.predictor.transformer.decoder.layers.{0,1,2,3,4,5}"
    patterns += [
        f"{layer}.{{self_attn,multihead_attn}}.{attention}",
        f"{layer}.{{linear1,linear2,norm1,norm2,norm3}}.{both}",
    ]
    if not encoder_layers:
        return set().union(*map(expand, [*patterns, f"sem_seg_head.predictor.input_proj.{both}"]))
    layers = ",".join(map(str, range(encoder_layers)))
    layer = f"sem_seg_head.pixel_decoder.transformer.encoder.layers.{{{layers}}}"
    patterns += [
        f"sem_seg_head.pixel_decoder.input_proj.{both}",
        f"{layer}.self_attn.{attention}",
        f"{layer}.{{linear1,linear2,norm1,norm2}}.{both}",
    ]
    return set().union(*map(expand, patterns))


@pytest.fixture(scope="module", params=["segmenter_weights", "per_pixel_weights"])
def given(request):
    """A golden file's tensors and the name of the file."""
    with np.load(GOLDEN / f"{request.param}.npz") as arrays:
        return dict(arrays), request.param


@pytest.fixture(scope="module")
def grouper_tensors():
    with np.load(GOLDEN / "segmenter_weights.npz") as arrays:
        return dict(arrays)


def test_the_way_there_and_back_keeps_every_bit(given):
    tensors, where = given
    checkpoint = zegformer.from_checkpoint(tensors, where, HEADS)
    back = zegformer.to_checkpoint(checkpoint.variables, checkpoint.sizes)
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        assert back[name].dtype == np.float32
        assert back[name].shape == tensor.shape, name
        assert back[name].tobytes() == tensor.astype(np.float32).tobytes(), name
    assert len(checkpoint.summary.left_out) == 1
    assert not checkpoint.summary.new
    assert not checkpoint.clip_tensors


def test_the_golden_sizes_are_read_off(given):
    tensors, where = given
    case = GOLDEN_SIZES
    sizes = zegformer.infer_sizes(tensors, where, HEADS)
    assert sizes["kind"] == ("zegformer" if where.startswith("segmenter") else "per_pixel")
    assert sizes["embed_dim"] == 512
    assert sizes["backbone"] == {
        "name": "resnet",
        "blocks": BLOCKS["r50"],
        "stem_width": case["stem"],
        "bottleneck_width": case["width"],
        "stage_width": case["res2"],
        "norm": "frozen_batch",
    }
    assert sizes["pixel_decoder"] == {"width": case["conv"], "mask_width": case["mask"]}
    if sizes["kind"] == "zegformer":
        assert sizes["memory"] == "res5"
        assert sizes["transformer"] == {
            "queries": case["queries"],
            "width": case["hidden"],
            "layers": case["dec"],
            "heads": case["heads"],
            "mlp_width": case["ff"],
            "project_input": True,
        }


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_sizes_are_read_off(name):
    assert zegformer.infer_sizes(empty_tensors(PUBLISHED[name]), name) == PUBLISHED[name]


@pytest.mark.parametrize(
    ("name", "encoder_layers"), [("r50", 0), ("r101", 0), ("encoder", 6)], ids=str
)
def test_the_names_are_the_published_ones(name, encoder_layers):
    sizes = PUBLISHED[name]
    names = [x for row in zegformer.table(sizes) for x in row.names]
    assert len(names) == len(set(names))
    expected = published_names(sizes["backbone"]["blocks"], encoder_layers)
    assert {*names, LOGIT_SCALE} == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTS)
def test_the_counts_of_numbers(name):
    """Counts our numbers and the published ones, in the pixel decoder and in the rest."""
    shapes = zegformer.shapes(PUBLISHED[name])

    def count(prefix):
        return sum(math.prod(shape) for path, shape in shapes.items() if path.startswith(prefix))

    assert (count("params/"), count("constants/")) == COUNTS[name]
    assert count("params/pixel_decoder/") == 7_540_480
    others = count("params/") - count("params/pixel_decoder/") - count("params/backbone/")
    assert others == 10_352_640
    tensors = empty_tensors(PUBLISHED[name])
    assert sum(x.size for x in tensors.values()) == sum(COUNTS[name])
    decoder = sum(x.size for key, x in tensors.items() if key.startswith(PIXEL_DECODER))
    assert decoder == 7_540_480


def test_clip_inside_is_given_apart(grouper_tensors, golden):
    """Each other tensor that a checkpoint may hold is left out for a reason."""
    clip = golden("clip_weights")
    prefix = f"{PREDICTOR}.clip_model."
    others = {
        "criterion.empty_weight": np.ones(6, np.float32),
        "pixel_mean": np.array([123.675, 116.28, 103.53], np.float32).reshape(3, 1, 1),
        "pixel_std": np.array([58.395, 57.12, 57.375], np.float32).reshape(3, 1, 1),
        "backbone.stem.conv1.norm.num_batches_tracked": np.array(7),
        f"{PREDICTOR}.text_features": np.ones((5, 512), np.float32),
    }
    tensors = grouper_tensors | others | {prefix + name: x for name, x in clip.items()}
    expected = zegformer.from_checkpoint(grouper_tensors, "golden", HEADS)
    checkpoint = zegformer.from_checkpoint(tensors, "golden", HEADS)
    assert checkpoint.sizes == expected.sizes
    plain, arrays = tables.flatten(expected.variables), tables.flatten(checkpoint.variables)
    assert plain.keys() == arrays.keys()
    for path in plain:
        np.testing.assert_array_equal(arrays[path], plain[path])
    assert checkpoint.clip_tensors.keys() == clip.keys()
    for name, tensor in clip.items():
        assert checkpoint.clip_tensors[name] is tensor
    left_out = {LOGIT_SCALE, *others, *(prefix + name for name in clip)}
    assert checkpoint.summary.left_out.keys() == left_out
    assert set(checkpoint.summary.used) | left_out == set(tensors)


def maskformer_tensors(tensors):
    """MaskFormer's, for semantic segmentation of 150 classes: a linear layer to their logits."""
    width = tensors[f"{PREDICTOR}.query_embed.weight"].shape[1]
    replaced = ("projection_layer.weight", "projection_layer.bias", "bg_feature", "logit_scale")
    kept = {k: x for k, x in tensors.items() if k.removeprefix(f"{PREDICTOR}.") not in replaced}
    return kept | {
        f"{PREDICTOR}.class_embed.weight": np.ones((151, width), np.float32),
        f"{PREDICTOR}.class_embed.bias": np.ones(151, np.float32),
        "criterion.empty_weight": np.ones(151, np.float32),
    }


def test_maskformers_classes_are_left_out(grouper_tensors):
    tensors = maskformer_tensors(grouper_tensors)
    checkpoint = zegformer.from_checkpoint(tensors, "maskformer", HEADS, embed_dim=24)
    assert checkpoint.sizes["embed_dim"] == 24
    new = {
        "params/class_projection/kernel",
        "params/class_projection/bias",
        "params/no_object",
    }
    assert checkpoint.summary.new.keys() == new
    assert set(checkpoint.summary.left_out) == {name for name in tensors if name[0] == "c"} | {
        f"{PREDICTOR}.class_embed.weight",
        f"{PREDICTOR}.class_embed.bias",
    }
    arrays = tables.flatten(checkpoint.variables)
    assert arrays.keys() | new == zegformer.shapes(checkpoint.sizes).keys()
    assert not arrays.keys() & new


CHANGES = {
    "no tensor 'sem_seg_head.predictor.projection_layer.weight'": {
        f"{PREDICTOR}.projection_layer.weight": None
    },
    "no tensor 'sem_seg_head.predictor.bg_feature', which params/no_object needs": {
        f"{PREDICTOR}.bg_feature": None
    },
    r"tensor 'extra' \[2\] has no place": {"extra": np.ones(2)},
    r"'sem_seg_head.predictor.logit_scale' is \[3.5\]; only \[4.605": {
        LOGIT_SCALE: np.array([3.5])
    },
    r"'pixel_mean' is \[103.53, 116.28, 123.675\]; only \[123.675,": {
        "pixel_mean": np.array([103.53, 116.28, 123.675]).reshape(3, 1, 1)
    },
    r"'pixel_std' is \[1.0, 1.0, 1.0\]; only \[58.395,": {"pixel_std": np.ones((3, 1, 1))},
    r"layer_4.norm.weight' is \[3\], .*output_res5/norm/scale needs \[64\]": {
        f"{PIXEL_DECODER}.layer_4.norm.weight": np.ones(3)
    },
    "no tensor 'backbone.stem.conv1.weight'": {"backbone.stem.conv1.weight": None},
}


@pytest.mark.parametrize(("message", "change"), CHANGES.items())
def test_what_is_wrong_is_named(grouper_tensors, message, change):
    tensors = {k: x for k, x in (grouper_tensors | change).items() if x is not None}
    with pytest.raises(ValueError, match=f"here.pth: .*{message}"):
        zegformer.from_checkpoint(tensors, "here.pth", HEADS)


def test_heads_must_divide_the_width(grouper_tensors):
    """They are 1 for each 32 channels where nobody says."""
    sizes = zegformer.infer_sizes(grouper_tensors, "here.pth")
    assert sizes["transformer"]["heads"] == GOLDEN_SIZES["hidden"] // 32
    with pytest.raises(ValueError, match="32 channels cannot be split among 3 attention heads"):
        zegformer.infer_sizes(grouper_tensors, "here.pth", heads=3)


@pytest.mark.parametrize(
    ("message", "change"),
    {
        "model.memory is res4": {"memory": "res4"},
        "model.pixel_decoder.norm_groups is 4": {"pixel_decoder": {"norm_groups": 4}},
        "model.backbone.norm_groups is 4": {
            "backbone": {"name": "resnet", "norm": "group", "norm_groups": 4}
        },
        "model.kind 'classifier' has no published form": {"kind": "classifier"},
    }.items(),
)
def test_a_model_that_the_published_modules_are_not_is_refused(message, change):
    with pytest.raises(ValueError, match=message):
        zegformer.to_checkpoint({}, sizes_of() | change)


def random_variables(sizes):
    rng = np.random.default_rng(0)
    shapes = zegformer.shapes(sizes)
    return tables.unflatten({p: rng.standard_normal(s, np.float32) for p, s in shapes.items()})


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_way_back_at_full_size(name):
    """Random arrays are bit-identical after the way to a checkpoint and back."""
    sizes = PUBLISHED[name]
    variables = random_variables(sizes)
    start = time.process_time()
    tensors = zegformer.to_checkpoint(variables, sizes)
    written = time.process_time()
    checkpoint = zegformer.from_checkpoint(tensors, name)
    read = time.process_time()
    print(f"{name}: {written - start:.1f} s to write, {read - written:.1f} s to read")
    assert checkpoint.sizes == sizes
    expected, actual = tables.flatten(variables), tables.flatten(checkpoint.variables)
    assert expected.keys() == actual.keys()
    for path, array in expected.items():
        assert array.tobytes() == actual[path].tobytes(), path


@pytest.mark.slow
@pytest.mark.parametrize("is_decoder", [False, True])
def test_pytorchs_layers_load_what_is_written(is_decoder):
    """torch.nn's own layers have the published names and shapes, and load them strictly."""
    torch = pytest.importorskip("torch")
    sizes = PUBLISHED["encoder"]
    tensors = zegformer.to_checkpoint(random_variables(sizes), sizes)
    kind = torch.nn.TransformerDecoderLayer if is_decoder else torch.nn.TransformerEncoderLayer
    name = (
        f"{PREDICTOR}.transformer.decoder" if is_decoder else f"{PIXEL_DECODER}.transformer.encoder"
    )
    for i in range(6):
        prefix = f"{name}.layers.{i}."
        given = {
            k.removeprefix(prefix): torch.from_numpy(x)
            for k, x in tensors.items()
            if k.startswith(prefix)
        }
        assert given
        kind(256, 8, 2048).load_state_dict(given, strict=True)
