"""The names of torchvision's ResNets, which timm's share."""

NORM = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
PARTS = {
    "conv1": ("conv1", "bn1"),
    "conv2": ("conv2", "bn2"),
    "conv3": ("conv3", "bn3"),
    "shortcut": ("downsample.0", "downsample.1"),
}
LEFT_OUT = (
    (r"fc\.(weight|bias)", "ImageNet's classifier"),
    (r".*\.num_batches_tracked", "PyTorch's count of batches"),
)


def layer_names(layer: str) -> dict[str, str]:
    """Gives the published names of a layer's kernel and of its norm's constants.

    Args:
        layer: ours: `stem`, `res2_0/conv1` to `conv3` or `res2_0/shortcut`.
    """
    kernel, norm = "conv1", "bn1"
    if layer != "stem":
        block, part = layer.split("/")
        stage, index = block.removeprefix("res").split("_")
        kernel, norm = (f"layer{int(stage) - 1}.{index}.{name}" for name in PARTS[part])
    return {"kernel": f"{kernel}.weight"} | {leaf: f"{norm}.{name}" for leaf, name in NORM.items()}
