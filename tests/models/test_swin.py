"""Swin against transformers and against attention by definition; its weights from and to files."""

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zegformer_jax.models.backbones import swin
from zegformer_jax.models.backbones.swin import (
    LAYOUTS,
    SWIN,
    PatchMerging,
    SwinBlock,
    SwinTransformer,
)
from zegformer_jax.models.backbones.windows import WindowAttention, relative_index, shift_mask
from zegformer_jax.pretrained import backbones, tables

# Every size differs from every other, so that no two axes can be swapped unseen.
SMALL = {"width": 12, "depths": (2, 1, 2, 1), "heads": (2, 3, 4, 6), "window": 5}
PARAMETERS = {  # with the classifier's final norm and its head of 1000 classes
    "tiny": (SWIN["tiny"], 28_288_354),  # torchvision's Swin_T_Weights
    "small": (SWIN["small"], 49_606_258),  # Swin_S_Weights
    "base, window 7": (SWIN["base"] | {"window": 7}, 87_768_224),  # Swin_B_Weights
    "base": (SWIN["base"], 87.90e6),  # timm's table of results, in millions
    "large": (SWIN["large"], 196.74e6),
    "large, window 7": (SWIN["large"] | {"window": 7}, 196.53e6),
}


def build(sizes, **kwargs):
    """The module of these sizes."""
    return SwinTransformer(**sizes, **kwargs)


def table(sizes, layout, prefix=""):
    """The entries of a file's names."""
    return backbones.entries(swin.names(build(sizes), layout), prefix)


def abstract(sizes):
    """The shapes of its parameters, by path."""
    variables = jax.eval_shape(build(sizes).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    return tables.shapes_of({"params": {"backbone": variables["params"]}})


def random_arrays(sizes, seed=0):
    """Random arrays by path; none is zero or one, so that none can be lost unseen."""
    rng = np.random.default_rng(seed)

    def draw(path, shape):
        if path.endswith("kernel"):
            return rng.normal(0, np.prod(shape[:-1]) ** -0.5, shape)
        return rng.normal(1.0 if path.endswith("scale") else 0.0, 0.3, shape)

    return {path: draw(path, shape).astype(np.float32) for path, shape in abstract(sizes).items()}


def variables_of(arrays):
    """Variables of the module, from flat arrays of a whole model."""
    return {"params": tables.unflatten(arrays)["params"]["backbone"]}


def relative_error(actual, expected):
    """Norm of the difference over the norm of the expected array."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


@pytest.fixture(scope="module")
def images():
    """Two images whose maps are multiples of neither two nor the window."""
    return np.random.default_rng(5).normal(size=(2, 35, 50, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def arrays():
    """Random arrays of SMALL."""
    return random_arrays(SMALL)


@pytest.fixture(scope="module")
def apply():
    """SMALL, compiled once."""
    return jax.jit(build(SMALL).apply)


@pytest.fixture(scope="module")
def maps(apply, arrays, images):
    """Its outputs; no random stream is given."""
    return apply(variables_of(arrays), images)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    sizes, published = PARAMETERS[name]
    shapes = abstract(sizes)
    outputs = [path for path in shapes if path.split("/")[2].endswith("_norm")]
    outputs.remove("params/backbone/patch_norm/scale")
    outputs.remove("params/backbone/patch_norm/bias")
    assert len(outputs) == 8
    backbone = sum(int(np.prod(shape)) for path, shape in shapes.items() if path not in outputs)
    last = 8 * sizes["width"]
    count = backbone + 2 * last + 1000 * last + 1000
    if isinstance(published, int):
        assert count == published
    else:
        assert abs(count - published) <= 0.005e6


def transformers_names(tensors):
    """The names that transformers' SwinBackbone gives the tensors of `detectron2`."""
    named = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("backbone.")
        if name.startswith("norm"):
            stage, kind = int(name[4]) + 1, name.split(".")[1]
            named[f"hidden_states_norms.stage{stage}.{kind}"] = tensor
            continue
        for ours, theirs in (
            ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
            ("patch_embed.norm", "embeddings.norm"),
            ("norm1", "layernorm_before"),
            ("norm2", "layernorm_after"),
            ("attn.relative", "attention.relative_position_bias.relative"),
            ("attn.proj", "attention.o_proj"),
        ):
            name = name.replace(ours, theirs)
        name = f"swin.encoder.{name}" if name.startswith("layers") else f"swin.{name}"
        if "attn.qkv" in name:
            for part, third in zip("qkv", np.split(tensor, 3), strict=True):
                named[name.replace("attn.qkv", f"attention.{part}_proj")] = third
        else:
            named[name] = tensor
    # Of the classifier, not used by the backbone.
    width = tensors["backbone.norm3.weight"].shape
    return named | {f"swin.layernorm.{kind}": np.zeros(width) for kind in ("weight", "bias")}


def maps_of_transformers(sizes, arrays, images):
    """SwinBackbone's: as dense prediction's Swin, it always partitions and always shifts."""
    torch = pytest.importorskip("torch")
    from transformers import SwinBackbone, SwinConfig

    config = SwinConfig(
        embed_dim=sizes["width"],
        depths=list(sizes["depths"]),
        num_heads=list(sizes["heads"]),
        window_size=sizes["window"],
        out_features=[f"stage{stage}" for stage in range(1, 5)],
        layer_norm_eps=1e-5,
    )
    oracle = SwinBackbone(config).eval()
    state = transformers_names(tables.write(table(sizes, "detectron2", "backbone."), arrays))
    oracle.load_state_dict({name: torch.tensor(x) for name, x in state.items()})
    with torch.no_grad():
        maps = oracle(torch.tensor(images.transpose(0, 3, 1, 2))).feature_maps
    names = ("res2", "res3", "res4", "res5")
    return {name: x.numpy().transpose(0, 2, 3, 1) for name, x in zip(names, maps, strict=True)}


@pytest.mark.slow
def test_transformers_gives_the_maps_of_swin_t():
    """At 96x160 every stage has windows that are padded."""
    sizes = SWIN["tiny"]
    arrays = random_arrays(sizes, seed=1)
    images = np.random.default_rng(2).normal(size=(1, 96, 160, 3)).astype(np.float32)
    maps = jax.jit(build(sizes).apply)(variables_of(arrays), images)
    expected = maps_of_transformers(sizes, arrays, images)
    assert maps.keys() == expected.keys()
    for name, actual in maps.items():
        assert relative_error(actual, expected[name]) <= 1e-5, name


def test_transformers_gives_the_maps_of_any_size(arrays, images, maps):
    """Maps of 9x13, 5x7, 3x4 and 2x2: patches, merging and windows go beyond them."""
    expected = maps_of_transformers(SMALL, arrays, images)
    assert maps.keys() == expected.keys()
    for name, actual in maps.items():
        assert relative_error(actual, expected[name]) <= 1e-5, name


def attention_by_definition(x_hwc, params, heads, window, shift):
    """Window attention pixel by pixel: no roll, no mask, no index.

    A shifted window is a cell of the grid whose lines lie at shift, shift + window, ...; at the
    borders of the padded map it is cut off.
    """
    height, width, channels = x_hwc.shape
    depth = channels // heads
    padded = np.pad(x_hwc, ((0, -height % window), (0, -width % window), (0, 0)))
    projected = padded @ params["qkv"]["kernel"] + params["qkv"]["bias"]
    query, key, value = np.split(projected, 3, axis=-1)
    biases = params["relative_position_bias"].reshape(2 * window - 1, 2 * window - 1, heads)
    pixels = list(np.ndindex(padded.shape[:2]))
    attended = np.zeros((height, width, channels))
    for i, j in np.ndindex(height, width):
        cell = (i - shift) // window, (j - shift) // window
        seen = [(m, n) for m, n in pixels if ((m - shift) // window, (n - shift) // window) == cell]
        for head in range(heads):
            part = slice(head * depth, (head + 1) * depth)
            logits = [
                query[i, j, part] @ key[m, n, part] / np.sqrt(depth)
                + biases[i - m + window - 1, j - n + window - 1, head]
                for m, n in seen
            ]
            weights = np.exp(logits - np.max(logits))
            weights /= weights.sum()
            attended[i, j, part] = sum(
                weight * value[m, n, part] for weight, (m, n) in zip(weights, seen, strict=True)
            )
    return attended @ params["out"]["kernel"] + params["out"]["bias"]


@pytest.mark.parametrize(
    ("size", "window", "shift"),
    [
        ((8, 12), 4, 0),
        ((8, 12), 4, 2),
        ((7, 10), 4, 2),  # padded
        ((7, 5), 3, 1),  # an odd window: its halves differ
        ((3, 6), 5, 2),  # a map that is lower than the window
    ],
)
def test_attention_is_what_its_definition_says(size, window, shift):
    rng = np.random.default_rng(3)
    x_bhwc = rng.normal(size=(2, *size, 6)).astype(np.float32)
    module = WindowAttention(heads=2, window=window, shift=shift, dtype=jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x_bhwc)["params"]
    params = jax.tree.map(lambda x: rng.normal(0, 0.7, x.shape).astype(np.float32), shapes)
    actual = jax.jit(module.apply)({"params": params}, x_bhwc)
    for image, x_hwc in enumerate(x_bhwc.astype(np.float64)):
        expected = attention_by_definition(x_hwc, params, 2, window, shift)
        np.testing.assert_allclose(actual[image], expected, rtol=0, atol=1e-5)


def test_relative_index_is_the_published_one():
    # Liu et al.'s relative_position_index for a window of 2: rows of 3 offsets, centre 4.
    np.testing.assert_array_equal(
        relative_index(2), [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]
    )


def test_only_windows_at_the_seam_are_masked():
    mask_nqk = shift_mask(12, 18, window=6, shift=3)
    whole = mask_nqk.all((1, 2)).reshape(2, 3)
    np.testing.assert_array_equal(whole, [[True, True, False], [False, False, False]])
    assert mask_nqk[5].sum() == 4 * 9**2  # the corner: four parts of 9 pixels, each sees itself


def test_merging_joins_pixels_in_the_published_order():
    """The authors' order: top left, bottom left, top right, bottom right; zeros beyond the map."""
    rng = np.random.default_rng(4)
    x_bhwc = rng.normal(size=(2, 3, 5, 4)).astype(np.float32)
    module = PatchMerging(jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x_bhwc)["params"]
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    actual = jax.jit(module.apply)({"params": params}, x_bhwc)
    for i, j in np.ndindex(2, 3):
        pixels = np.zeros((2, 2, 2, 4))
        found = x_bhwc[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
        pixels[:, : found.shape[1], : found.shape[2]] = found
        joined = np.concatenate([pixels[:, m, n] for m, n in ((0, 0), (1, 0), (0, 1), (1, 1))], 1)
        joined -= joined.mean(1, keepdims=True)
        joined /= np.sqrt(np.mean(joined**2, 1, keepdims=True) + 1e-5)
        normed = joined * params["norm"]["scale"] + params["norm"]["bias"]
        expected = normed @ params["reduction"]["kernel"]
        np.testing.assert_allclose(actual[:, i, j], expected, rtol=0, atol=1e-5)


def test_images_do_not_see_each_other(apply, maps, arrays, images):
    changed = apply(variables_of(arrays), np.stack([images[1, ::-1], images[1]]))
    for name, expected in maps.items():
        np.testing.assert_array_equal(changed[name][1], expected[1], err_msg=name)
        assert relative_error(changed[name][0], expected[0]) > 0.01


def test_bfloat16_is_close(maps, arrays, images):
    model = build(SMALL, dtype=jnp.bfloat16)
    for name, coarse in jax.jit(model.apply)(variables_of(arrays), images).items():
        assert coarse.dtype == jnp.bfloat16
        assert 1e-4 < relative_error(coarse, maps[name]) < 0.03, name


@pytest.mark.parametrize("silent", ["attention/out", "mlp_out"])
def test_stochastic_depth_keeps_the_mean(silent):
    """One branch is silenced; the other is dropped, or scaled by 1 / 0.6."""
    rate, draws = 0.4, 2000
    image = np.random.default_rng(6).normal(size=(1, 4, 4, 8)).astype(np.float32)
    x = np.repeat(image, draws, axis=0)  # every image of a batch has its own draw
    block = SwinBlock(heads=2, window=4, shift=2, mlp_ratio=2, drop_path=rate, dtype=jnp.float32)
    params = tables.flatten(jax.jit(block.init, static_argnums=2)(jax.random.key(1), x, True))
    silenced = {path: 0 * a for path, a in params.items() if path.startswith(f"params/{silent}")}
    assert len(silenced) == 2
    variables = tables.unflatten(params | silenced)
    apply = jax.jit(block.apply, static_argnums=2)
    branch = np.asarray(apply(variables, image, True) - image)
    assert np.abs(branch).max() > 1e-3
    drawn = np.asarray(apply(variables, x, False, rngs={"dropout": jax.random.key(2)}) - x)
    kept = np.abs(drawn).max((1, 2, 3)) > 0
    expected = kept[:, None, None, None] * branch / (1 - rate)
    np.testing.assert_allclose(drawn, expected, rtol=0, atol=1e-6)
    deviation = np.sqrt(rate * (1 - rate) / draws)
    np.testing.assert_allclose(kept.mean(), 1 - rate, atol=4 * deviation)
    error = np.abs(drawn.mean(0) - branch[0]).max() / np.abs(branch).max()
    assert error <= 4 * deviation / (1 - rate)


def test_rates_rise_linearly_over_all_blocks(arrays, images):
    blocks = []

    def note(call, args, kwargs, context):
        if isinstance(context.module, SwinBlock):
            blocks.append((context.module, args[1]))
        return call(*args, **kwargs)

    model = build(SMALL, drop_path=0.25)
    for deterministic in (True, False):
        rngs = {} if deterministic else {"dropout": jax.random.key(0)}
        with nn.intercept_methods(note):
            jax.eval_shape(
                lambda x, rngs, deterministic=deterministic: model.apply(
                    variables_of(arrays), x, deterministic=deterministic, rngs=rngs
                ),
                images,
                rngs,
            )
        assert [flag for _, flag in blocks] == [deterministic] * 6
        rates = [block.drop_path for block, _ in blocks]
        np.testing.assert_allclose(rates, [0, 0.05, 0.1, 0.15, 0.2, 0.25], atol=1e-12)
        assert [block.shift for block, _ in blocks] == [0, 2, 0, 0, 2, 0]
        blocks.clear()


def test_initialisation_follows_the_authors():
    model = SwinTransformer(width=64, depths=(1,), heads=(2,), window=7, dtype=jnp.bfloat16)
    params = jax.jit(model.init)(jax.random.key(4), jnp.zeros((1, 8, 8, 3)))["params"]
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
    attention = params["res2_0"]["attention"]
    for array in (
        attention["qkv"]["kernel"],
        attention["out"]["kernel"],
        params["res2_0"]["mlp_in"]["kernel"],
        params["res2_0"]["mlp_out"]["kernel"],
    ):
        np.testing.assert_allclose(np.std(array), 0.02, rtol=0.05)
    np.testing.assert_allclose(np.std(attention["relative_position_bias"]), 0.02, rtol=0.15)
    # PyTorch's convolution: uniform within 1 / sqrt(inputs).
    bound = (3 * 4 * 4) ** -0.5
    patch = np.asarray(params["patch_embedding"]["kernel"])
    assert 0.95 * bound < np.abs(patch).max() <= bound
    np.testing.assert_allclose(np.std(patch), bound / 3**0.5, rtol=0.05)


def test_training_needs_the_random_stream(arrays, images):
    with pytest.raises(flax.errors.InvalidRngError, match="dropout"):
        jax.eval_shape(
            lambda x: build(SMALL).apply(variables_of(arrays), x, deterministic=False), images
        )


def published(sizes, layout):
    """Names and shapes as in the publishers' files, written from those, not from the table."""
    shapes = {"patch_embed.proj.weight": (sizes["width"], 3, 4, 4)}
    for name in ("proj.bias", "norm.weight", "norm.bias"):
        shapes[f"patch_embed.{name}"] = (sizes["width"],)
    for stage, (depth, heads) in enumerate(zip(sizes["depths"], sizes["heads"], strict=True)):
        c = sizes["width"] * 2**stage
        for block in range(depth):
            for name, shape in {
                "norm1.weight": (c,),
                "norm1.bias": (c,),
                "attn.relative_position_bias_table": ((2 * sizes["window"] - 1) ** 2, heads),
                "attn.qkv.weight": (3 * c, c),
                "attn.qkv.bias": (3 * c,),
                "attn.proj.weight": (c, c),
                "attn.proj.bias": (c,),
                "norm2.weight": (c,),
                "norm2.bias": (c,),
                "mlp.fc1.weight": (4 * c, c),
                "mlp.fc1.bias": (4 * c,),
                "mlp.fc2.weight": (c, 4 * c),
                "mlp.fc2.bias": (c,),
            }.items():
                shapes[f"layers.{stage}.blocks.{block}.{name}"] = shape
        if stage < len(sizes["depths"]) - 1:
            merging = f"layers.{stage + 1 if layout == 'timm' else stage}.downsample"
            shapes[f"{merging}.norm.weight"] = shapes[f"{merging}.norm.bias"] = (4 * c,)
            shapes[f"{merging}.reduction.weight"] = (2 * c, 4 * c)
        if layout == "detectron2":
            shapes[f"norm{stage}.weight"] = shapes[f"norm{stage}.bias"] = (c,)
    prefix = "backbone." if layout == "detectron2" else ""
    return {prefix + name: shape for name, shape in shapes.items()}


def random_tensors(layout, sizes=SMALL):
    """Random published tensors."""
    rng = np.random.default_rng(7)
    return {
        name: rng.normal(size=shape).astype(np.float32)
        for name, shape in published(sizes, layout).items()
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_round_trip(layout):
    tensors = random_tensors(layout)
    sizes, arrays, summary = backbones.read(tensors, "here")
    assert sizes == SMALL | {"name": "swin"}
    assert not summary.left_out
    new = set(summary.new)
    assert set(arrays) | new == set(abstract(SMALL))
    norms = {
        f"params/backbone/res{i}_norm/{leaf}" for i in range(2, 6) for leaf in ("scale", "bias")
    }
    assert new == (set() if layout == "detectron2" else norms)
    prefix = "backbone." if layout == "detectron2" else ""
    written = tables.write(table(SMALL, layout, prefix), arrays)
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(written[name], tensor, err_msg=name)


def test_merging_of_the_two_classifier_layouts_is_the_same():
    authors = random_tensors("microsoft")
    timm = {}
    for name, tensor in authors.items():
        stage = int(name.split(".")[1]) if ".downsample." in name else 0
        timm[name.replace(f"{stage}.downsample", f"{stage + 1}.downsample")] = tensor
    expected = backbones.read(authors, "here")[1]
    for path, array in backbones.read(timm, "there")[1].items():
        np.testing.assert_array_equal(array, expected[path], err_msg=path)


def test_what_classifiers_have_more_is_left_out_by_name():
    extra = {
        "norm.weight": (96,),
        "norm.bias": (96,),
        "head.weight": (1000, 96),
        "head.bias": (1000,),
        "head.fc.weight": (1000, 96),
        "head.fc.bias": (1000,),
        "layers.0.blocks.1.attn_mask": (64, 25, 25),
        "layers.0.blocks.0.attn.relative_position_index": (25, 25),
    }
    tensors = random_tensors("microsoft")
    more = tensors | {name: np.zeros(shape) for name, shape in extra.items()}
    _, _, summary = backbones.read(more, "here")
    assert summary.left_out.keys() == extra.keys()
    assert set(summary.used) == set(tensors)
    assert summary.left_out["head.fc.bias"] == "the classifier's head"
    assert summary.left_out["norm.bias"] == "the classifier's final norm"


def test_a_whole_segmenter_gives_its_backbone():
    tensors = random_tensors("detectron2")
    others = {"sem_seg_head.predictor.bg_feature": np.zeros((1, 6)), "norm.weight": np.zeros(96)}
    index = {"backbone.layers.1.blocks.0.attn.relative_position_index": np.zeros((25, 25))}
    _, _, summary = backbones.read(tensors | others | index, "here")
    assert set(summary.used) == set(tensors)
    assert summary.left_out["sem_seg_head.predictor.bg_feature"] == "not of the backbone"
    assert len(summary.left_out) == 3


def damaged(layout, changes):
    """Tensors of a layout, some replaced; None takes one away."""
    tensors = random_tensors(layout) | changes
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


BIAS_TABLE = "layers.0.blocks.0.attn.relative_position_bias_table"


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        (
            "microsoft",
            {"layers.2.blocks.1.norm2.bias": None},
            "here: no tensor 'layers.2.blocks.1.norm2.bias', which "
            "params/backbone/res4_1/norm2/bias needs",
        ),
        (
            "microsoft",
            {"absolute_pos_embed": np.zeros((1, 9, 12))},
            r"here: tensor 'absolute_pos_embed' \[1, 9, 12\] has no place in this model",
        ),
        (
            "microsoft",
            {"layers.1.blocks.0.attn.qkv.weight": np.zeros((24, 72))},
            r"tensor 'layers.1.blocks.0.attn.qkv.weight' is \[24, 72\], "
            r"params/backbone/res3_0/attention/qkv/kernel needs \[72, 24\]",
        ),
        (
            "timm",
            {"layers.3.downsample.reduction.weight": None},
            "no tensor 'layers.3.downsample.reduction.weight', which "
            "params/backbone/res5_merging/reduction/kernel needs",
        ),
        (
            "detectron2",
            {"backbone.norm2.weight": None},
            "no tensor 'backbone.norm2.weight', which params/backbone/res4_norm/scale needs",
        ),
        (
            "detectron2",
            {"backbone.patch_embed.proj.weight": None},
            "here: no backbone is known: there is no tensor .*'patch_embed.proj.weight'",
        ),
        ("timm", {BIAS_TABLE: None}, f"no tensor '{BIAS_TABLE}', which a Swin has and a Swin V2"),
        ("timm", {BIAS_TABLE: np.zeros((80, 2))}, f"'{BIAS_TABLE}' has 80 rows; for a window"),
        ("timm", {BIAS_TABLE: np.zeros(81)}, rf"'{BIAS_TABLE}' is \[81\], it should have 2 axes"),
        (
            "microsoft",
            {BIAS_TABLE.replace("0", "3", 1): np.zeros((169, 6))},
            r"bias_table' is \[169, 6\], params/backbone/res5_0/.* needs \[81, 6\]",
        ),
        (
            "microsoft",
            {"patch_embed.proj.weight": np.zeros((12, 3, 8, 8))},
            r"'patch_embed.proj.weight' is \[12, 3, 8, 8\], .* needs \[12, 3, 4, 4\]",
        ),
    ],
)
def test_what_does_not_fit_is_named(layout, changes, message):
    with pytest.raises(ValueError, match=message):
        backbones.read(damaged(layout, changes), "here")


def test_layouts_are_checked_and_writing_is_strict(arrays):
    with pytest.raises(ValueError, match="layout 'keras': choose one of microsoft, timm, detectr"):
        table(SMALL, "keras")
    with pytest.raises(ValueError, match="params/backbone/res2_norm/bias has no published name"):
        tables.write(table(SMALL, "microsoft"), arrays)
