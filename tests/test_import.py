"""The package and every model without TensorFlow and transformers, in a fresh interpreter."""

import subprocess
import sys
from pathlib import Path

import pytest

import zegformer_jax

ROOT = Path(__file__).resolve().parent.parent
HIDE = "import sys\nfor name in ('tensorflow', 'tensorflow_datasets', 'transformers', 'torch'):\n"
HIDE += "    sys.modules[name] = None  # an import of it raises\n"


def run(code):
    """Runs a program with these packages hidden; returns the words it prints."""
    done = subprocess.run(
        [sys.executable, "-c", HIDE + code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_import_is_light():
    """It takes milliseconds, as nothing that is slow to import comes with it."""
    seconds, *heavy = run(
        "import time; start = time.process_time(); import zegformer_jax\n"
        "print(time.process_time() - start)\n"
        "print(*sys.modules.keys() & {'jax', 'flax', 'orbax', 'matplotlib', 'scipy', 'PIL'})"
    )
    print(f"import zegformer_jax: {float(seconds):.3f} s of processor time")
    assert heavy == []
    assert float(seconds) < 0.5


@pytest.mark.slow
def test_segmenting_needs_no_tensorflow():
    names = "load", "Segmenter", "Segmentation"
    code = f"import zegformer_jax as z; print(*(getattr(z, name).__name__ for name in {names}))"
    assert run(code) == [*names]


def test_every_name_of_the_api_is_there():
    assert {"load", "Segmenter", "Segmentation", "train", "evaluate"} == {*zegformer_jax.__all__}
    for name in zegformer_jax.__all__:
        assert getattr(zegformer_jax, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'typo'"):
        zegformer_jax.typo  # noqa: B018


@pytest.mark.slow
def test_the_models_build_with_the_published_sizes():
    """Counts of a ResNet-50 grouper: 41,348,032 trained, 106,240 in the frozen norms."""
    code = """
import time; start = time.process_time()
import jax, jax.numpy as jnp
from configs import base
from zegformer_jax import models
sizes = base.get_config().model.to_dict()
for kind in models.KINDS:
    model = models.build(kind, sizes, embed_dim=512)
    variables = jax.eval_shape(
        model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)), jnp.zeros((5, 512))
    )
    for collection in ("params", "constants"):
        print(sum(leaf.size for leaf in jax.tree.leaves(variables[collection])))
    if kind == "zegformer":
        print(sum(leaf.size for leaf in jax.tree.leaves(variables["params"]["pixel_decoder"])))
print(time.process_time() - start)
"""
    *counts, classifier, _, seconds = run(code)
    print(f"building the models: {float(seconds):.1f} s of processor time")
    grouper, constants, pixel_decoder, per_pixel, same_constants = map(int, counts)
    assert (grouper, constants) == (41_348_032, 106_240)
    assert pixel_decoder == 7_540_480
    # The baseline has the backbone, the pixel decoder and a projection to CLIP's 512 numbers.
    transformer_and_heads = 10_352_640
    assert per_pixel == grouper - transformer_and_heads + 256 * 512 + 512
    assert same_constants == constants
    # The classifier has the backbone and a projection of res5.
    assert int(classifier) == grouper - transformer_and_heads - pixel_decoder + 2048 * 512 + 512
