"""Published ResNets against PyTorch's layers, by the names of four publishers."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from array_files import write_pth

from zegformer_jax.models.backbones.resnet import BLOCKS, ResNet, max_pool
from zegformer_jax.models.layers import NORM_EPSILON, multiply
from zegformer_jax.pretrained import backbones
from zegformer_jax.pretrained.formats import read_tensors
from zegformer_jax.pretrained.tables import unflatten
from zegformer_jax.runtime.target import compiling_for

# No two sizes are alike, so that no two axes can be swapped unseen.
SMALL = {"blocks": (2, 1, 3, 1), "stem_width": 6, "bottleneck_width": 5, "stage_width": 12}
# torchvision's counts of parameters without the classifier's 2048 x 1000 + 1000.
PARAMETERS = {50: 25_557_032 - 2_049_000, 101: 44_549_160 - 2_049_000}


def read_resnet(tensors, where):
    """The sizes that differ between ResNets, the arrays and the summary."""
    sizes, arrays, summary = backbones.read(tensors, where)
    assert (sizes.pop("name"), sizes.pop("norm")) == ("resnet", "frozen_batch")
    return sizes, arrays, summary


def torchvision_shapes(blocks, stem_width, bottleneck_width, stage_width):
    """Names and shapes of torchvision's ResNets, written down from its documentation."""
    shapes = {}

    def add(conv, norm, size_out, size_in, side):
        shapes[f"{conv}.weight"] = (size_out, size_in, side, side)
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{norm}.{leaf}"] = (size_out,)

    add("conv1", "bn1", stem_width, 3, 7)
    size_in = stem_width
    for stage, count in enumerate(blocks):
        inner, size_out = bottleneck_width * 2**stage, stage_width * 2**stage
        for index in range(count):
            place = f"layer{stage + 1}.{index}"
            add(f"{place}.conv1", f"{place}.bn1", inner, size_in, 1)
            add(f"{place}.conv2", f"{place}.bn2", inner, inner, 3)
            add(f"{place}.conv3", f"{place}.bn3", size_out, inner, 1)
            if index == 0:
                add(f"{place}.downsample.0", f"{place}.downsample.1", size_out, size_in, 1)
            size_in = size_out
    return shapes


def torchvision_resnet(rng, **sizes):
    """Random tensors, none of them zeros or ones, so that none can be lost unseen."""

    def draw(name, shape):
        if len(shape) == 4:
            return rng.normal(0, np.prod(shape[1:]) ** -0.5, shape)
        if name.endswith(("weight", "var")):
            return rng.uniform(0.5, 1.5, shape)
        return rng.normal(0, 0.3, shape)

    shapes = torchvision_shapes(**sizes)
    return {name: draw(name, shape).astype(np.float32) for name, shape in shapes.items()}


def to_detectron2(tensors):
    """Renames tensors as detectron2's tools/convert-torchvision-to-d2.py does."""
    renamed = {}
    for name, tensor in tensors.items():
        if "layer" not in name:
            name = f"stem.{name}"
        for i in (4, 3, 2, 1):
            name = name.replace(f"layer{i}", f"res{i + 1}").replace(f"bn{i}", f"conv{i}.norm")
        name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        renamed[name] = tensor
    return renamed


def to_caffe2(tensors):
    """Renames tensors as in MSRA's files in detectron2's model zoo."""
    renamed = {}
    norm = {"weight": "gamma", "bias": "beta"}
    for name, tensor in to_detectron2(tensors).items():
        parts = name.split(".")
        leaf = "w" if parts[-2] != "norm" else f"bn_{norm.get(parts[-1], parts[-1])}"
        if parts[0] == "stem":
            place = "conv1" if leaf == "w" else "res_conv1"
        else:
            branch = {"conv1": "2a", "conv2": "2b", "conv3": "2c", "shortcut": "1"}[parts[2]]
            place = f"{parts[0]}_{parts[1]}_branch{branch}"
        renamed[f"{place}_{leaf}"] = tensor
    return renamed


def torch_maps(tensors, images, blocks):
    """res2 to res5 by PyTorch's functions, from torchvision's names."""
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    weights = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}

    def layer(x, conv, norm, stride=1):
        kernel = weights[f"{conv}.weight"]
        x = functional.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)
        module = torch.nn.BatchNorm2d(len(kernel)).eval()
        state = ("weight", "bias", "running_mean", "running_var")
        module.load_state_dict({key: weights[f"{norm}.{key}"] for key in state}, strict=False)
        return module(x)

    maps = []
    with torch.inference_mode():
        x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
        x = functional.max_pool2d(layer(x, "conv1", "bn1", 2).relu(), 3, 2, 1)
        for stage, count in enumerate(blocks):
            for index in range(count):
                place, stride = f"layer{stage + 1}.{index}", 2 if stage and not index else 1
                y = layer(x, f"{place}.conv1", f"{place}.bn1").relu()
                y = layer(y, f"{place}.conv2", f"{place}.bn2", stride).relu()
                y = layer(y, f"{place}.conv3", f"{place}.bn3")
                if index == 0:
                    x = layer(x, f"{place}.downsample.0", f"{place}.downsample.1", stride)
                x = (x + y).relu()
            maps.append(x.permute(0, 2, 3, 1).numpy())
    return maps


def our_maps(sizes, arrays, images):
    variables = {kind: tree["backbone"] for kind, tree in unflatten(arrays).items()}
    maps = jax.jit(ResNet(**sizes).apply)(variables, jnp.asarray(images))
    return [np.asarray(maps[f"res{stage}"]) for stage in range(2, 6)]


def assert_maps_agree(tensors, sizes, arrays, side):
    images = np.random.default_rng(1).normal(0, 1, (2, side, side, 3)).astype(np.float32)
    expected = torch_maps(tensors, images, sizes["blocks"])
    for found, wanted in zip(our_maps(sizes, arrays, images), expected, strict=True):
        assert found.shape == wanted.shape
        assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()
        assert np.std(wanted) > 0.1  # or they would agree on nothing


@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (2, 3), (3, 1)])
def test_a_1x1_convolution_is_a_product(strides):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 7, 10, 5)), rng.normal(size=(1, 1, 5, 4))
    x, kernel = x.astype(np.float32), kernel.astype(np.float32)
    expected = jax.lax.conv_general_dilated(
        x, kernel, strides, [(0, 0), (0, 0)], dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    found = multiply(jnp.asarray(x), jnp.asarray(kernel), strides, [(0, 0), (0, 0)])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_full_size_against_torch(tmp_path):
    sizes = {"blocks": BLOCKS[50], "stem_width": 64, "bottleneck_width": 64, "stage_width": 256}
    tensors = torchvision_resnet(np.random.default_rng(0), **sizes)
    write_pth(tmp_path / "resnet50.pth", tensors)
    found, arrays, _ = read_resnet(read_tensors(tmp_path / "resnet50.pth"), "resnet50.pth")
    assert found == sizes
    assert_maps_agree(tensors, sizes, arrays, 64)


@pytest.mark.parametrize("depth", PARAMETERS)
def test_full_sizes(depth):
    sizes = {"blocks": BLOCKS[depth], "stem_width": 64, "bottleneck_width": 64, "stage_width": 256}
    shapes = torchvision_shapes(**sizes)
    tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    found, arrays, summary = read_resnet(tensors, "resnet.pth")
    assert found == sizes
    assert set(summary.used) == set(tensors)
    counted = [x for path, x in arrays.items() if not path.endswith(("/mean", "/var"))]
    assert sum(x.size for x in counted) == PARAMETERS[depth]


RENAMINGS = {
    "torchvision": lambda tensors: tensors,
    "detectron2": to_detectron2,
    "detectron2, in a model": lambda tensors: {
        f"backbone.{name}": tensor for name, tensor in to_detectron2(tensors).items()
    },
    "Caffe2": to_caffe2,
}


@pytest.fixture(scope="module")
def small():
    return torchvision_resnet(np.random.default_rng(0), **SMALL)


def test_torchvisions_names_give_torchs_maps(small):
    sizes, arrays, _ = read_resnet(small, "x")
    assert sizes == SMALL
    assert_maps_agree(small, sizes, arrays, 64)


@pytest.mark.parametrize("renaming", RENAMINGS)
def test_every_publishers_names_give_the_same_arrays(small, renaming):
    sizes, arrays, summary = read_resnet(RENAMINGS[renaming](small), "x")
    assert sizes == SMALL
    np.testing.assert_equal(arrays, read_resnet(small, "x")[1])
    assert len(summary.used) == len(small) and not summary.left_out and not summary.new


@pytest.mark.parametrize("renaming", RENAMINGS)
def test_what_is_no_part_of_the_backbone_is_left_out(small, renaming):
    others = {
        "torchvision": ["fc.weight", "fc.bias", "bn1.num_batches_tracked"],
        "detectron2": ["stem.fc.weight", "fc1000.bias", "linear.weight", "stem.conv1.bias"],
        "detectron2, in a model": ["sem_seg_head.predictor.bg_feature", "backbone.linear.bias"],
        "Caffe2": ["fc1000_w", "pred_b", "conv1_b", "res2_0_branch2a_b", "conv1_w_momentum"],
    }[renaming]
    tensors = RENAMINGS[renaming](small)
    extended = tensors | {name: np.ones(3, np.float32) for name in others}
    _, arrays, summary = read_resnet(extended, "x")
    assert set(summary.left_out) == set(others)
    np.testing.assert_equal(arrays, read_resnet(tensors, "x")[1])
    with pytest.raises(ValueError, match="x: tensor '.*odd' .* has no place in this model"):
        prefix = "backbone." if "in a model" in renaming else ""
        read_resnet(tensors | {f"{prefix}odd": np.ones(3, np.float32)}, "x")


def fold(tensors):
    """Moves mean and variance into scale and bias, as Caffe2's affine channels have them."""
    folded = dict(tensors)
    for name in tensors:
        if name.endswith(".running_mean"):
            norm = name.removesuffix(".running_mean")
            factor = 1 / np.sqrt(tensors[f"{norm}.running_var"] + np.float32(1e-5))
            folded[f"{norm}.weight"] = tensors[f"{norm}.weight"] * factor
            mean = folded.pop(name)
            folded[f"{norm}.bias"] = tensors[f"{norm}.bias"] - mean * folded[f"{norm}.weight"]
            del folded[f"{norm}.running_var"]
    return folded


def to_affine_channels(tensors):
    """Renames tensors as in MSRA's files in Detectron's model zoo: scale and bias alone."""
    ends = {"gamma": "s", "beta": "b"}
    renamed = {}
    for name, tensor in to_caffe2(tensors).items():
        start, _, end = name.rpartition("_")
        renamed[f"{start}_{ends.get(end, end)}"] = tensor
    return renamed


def test_folded_statistics_give_the_same_maps(small):
    folded = fold(small)
    sizes, arrays, summary = read_resnet(to_affine_channels(folded), "x")
    statistics = {path for path in arrays if path.endswith(("/mean", "/var"))}
    assert set(summary.new) == statistics
    for path in statistics:
        wanted = 0 if path.endswith("mean") else 1 - NORM_EPSILON
        np.testing.assert_allclose(arrays[path], wanted, rtol=0, atol=1e-7)
    assert_maps_agree(small, sizes, arrays, 64)
    for renaming in (to_detectron2, to_caffe2):
        np.testing.assert_equal(arrays, read_resnet(renaming(folded), "x")[1])


def without(name):
    return lambda tensors: {key: x for key, x in tensors.items() if key != name}


def grouped(tensors):
    return tensors | {"layer1.0.conv2.weight": tensors["layer1.0.conv2.weight"][:, :1]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("conv1.weight"), "x: no backbone is known: .* no tensor 'stem.conv1.weight'"),
        (without("bn1.weight"), "x: a ResNet without batch norm: .* 'bn1.weight'"),
        (without("bn1.running_var"), "x: no tensor 'bn1.running_var'"),
        (without("layer3.1.bn2.running_mean"), "x: no tensor 'layer3.1.bn2.running_mean'"),
        (without("layer3.2.conv1.weight"), "x: tensor 'layer3.2.* has no place"),
        (without("layer1.0.conv3.weight"), "only ResNets of bottleneck blocks"),
        (without("layer2.0.downsample.0.weight"), "x: no tensor 'layer2.0.downsample.0.weight'"),
        (grouped, r"'layer1.0.conv2.weight' is \[5, 1, 3, 3\], .* needs \[5, 5, 3, 3\]"),
    ],
)
def test_other_networks_are_refused(small, change, message):
    with pytest.raises(ValueError, match=message):
        read_resnet(change(small), "x")


def test_pooling_is_the_same_for_a_tpu():
    """Values and gradient; no two numbers of a window are equal."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.permutation(2 * 8 * 12 * 3).reshape(2, 8, 12, 3), jnp.float32)
    weights = jnp.asarray(rng.integers(1, 9, (2, 4, 6, 3)), jnp.float32)  # exact sums

    def pool(x):
        return (max_pool(x) * weights).sum(), max_pool(x)

    slices = jax.value_and_grad(pool, has_aux=True)(x)
    with compiling_for(SimpleNamespace(platform="tpu")):
        assert "reduce_window" in str(jax.make_jaxpr(max_pool)(x))
        windows = jax.value_and_grad(pool, has_aux=True)(x)
    jax.tree.map(np.testing.assert_array_equal, windows, slices)
