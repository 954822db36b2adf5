"""The grouper, its losses and matches against golden numbers."""

import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
import pytest

from zegformer_jax import losses, matching
from zegformer_jax.models.normalise import normalise_images
from zegformer_jax.optim import make_optimiser

MASK_WEIGHT, DICE_WEIGHT = 20.0, 1.0


def close(actual, expected, tolerance=1e-4):
    """Compares on the scale of the largest expected number."""
    expected = np.asarray(expected)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(actual) / scale, expected / scale, atol=tolerance)


@pytest.fixture(scope="module")
def case(golden):
    arrays = golden("training")
    sizes = models.CASE["sizes"]
    height, width = np.max(sizes, axis=0)
    images = np.zeros((2, height, width, 3), np.uint8)
    labels = np.full((2, height, width), 255, np.uint8)
    for i, (h, w) in enumerate(sizes):
        images[i, :h, :w] = arrays[f"image{i}"].transpose(1, 2, 0)
        labels[i, :h, :w] = arrays[f"label{i}"]
    images = normalise_images(jnp.asarray(images), jnp.asarray(sizes))
    targets = losses.targets_from_labels(jnp.asarray(labels), len(models.CASE["seen"]), 8)
    text = arrays["text/train_model/text_features"]
    return {"arrays": arrays, "images": images, "targets": targets, "text": jnp.asarray(text)}


def total_loss(params, constants, case):
    output = models.grouper().apply(
        {"params": params, "constants": constants}, case["images"], case["text"]
    )
    terms = []
    for class_logits, mask_logits in zip(*output, strict=True):
        matched = matching.match(
            class_logits, mask_logits, case["targets"], MASK_WEIGHT, DICE_WEIGHT
        )
        sums = losses.set_loss(class_logits, mask_logits, case["targets"], matched)
        count = jnp.maximum(sums.targets, 1)
        terms.append(
            (
                sums.class_sum / sums.class_weight,
                MASK_WEIGHT * sums.mask_sum / count,
                DICE_WEIGHT * sums.dice_sum / count,
            )
        )
    return sum(sum(layer) for layer in terms), (output, terms)


def test_every_stage(case):
    arrays = case["arrays"]
    variables = models.variables("segmenter_weights")
    output, state = models.grouper().apply(
        variables, case["images"], case["text"], capture_intermediates=True
    )
    inner = state["intermediates"]
    for name, actual in inner["backbone"]["__call__"][0].items():
        close(actual, arrays[f"train/backbone/{name}"].transpose(0, 2, 3, 1))
    mask_features = inner["pixel_decoder"]["__call__"][0]
    close(mask_features, arrays["train/mask_features"].transpose(0, 2, 3, 1))
    close(inner["transformer"]["__call__"][0], arrays["train/decoder_states"])
    for layer in range(models.CASE["model"]["dec"]):
        close(output.class_logits_lbqc[layer], arrays[f"train/layer{layer}/class_logits"])
        close(output.mask_logits_lbqhw[layer], arrays[f"train/layer{layer}/mask_logits"])


def test_matches(case):
    """The same queries for the same targets as the published system, in every layer."""
    for layer in range(models.CASE["model"]["dec"]):
        class_logits = jnp.asarray(case["arrays"][f"train/layer{layer}/class_logits"])
        mask_logits = jnp.asarray(case["arrays"][f"train/layer{layer}/mask_logits"])
        matched = matching.match(
            class_logits, mask_logits, case["targets"], MASK_WEIGHT, DICE_WEIGHT
        )
        for image in range(2):
            queries, positions = case["arrays"][f"train/layer{layer}/match_image{image}"]
            assert int(case["targets"].valid_bn[image].sum()) == len(positions)
            np.testing.assert_array_equal(matched[image][positions], queries)


def test_losses_and_gradients(case):
    arrays = case["arrays"]
    variables = models.variables("segmenter_weights")
    gradient_of = jax.value_and_grad(total_loss, has_aux=True)
    (total, (_, terms)), gradients = jax.jit(
        lambda p: gradient_of(p, variables["constants"], case)
    )(variables["params"])
    np.testing.assert_allclose(total, arrays["train/loss/total"], rtol=1e-5)
    last = len(terms) - 1
    for layer, values in enumerate(terms):
        suffix = "" if layer == last else f"_{layer}"
        for name, value in zip(("ce", "mask", "dice"), values, strict=True):
            np.testing.assert_allclose(
                value, arrays[f"train/loss/loss_{name}{suffix}"], rtol=1e-5, err_msg=name
            )
    np.testing.assert_allclose(optax.tree.norm(gradients), arrays["train/grad_norm"], rtol=1e-3)
    names = [name for name in arrays if name.startswith("train/grad/")]
    assert len(names) == 6
    for name in names:
        path, expected = flax_leaf(name.removeprefix("train/grad/"), arrays[name])
        actual = gradients
        for key in path:
            actual = actual[key]
        close(actual, expected, 1e-3)


def flax_leaf(name, array):
    """The path below `params` and the layout of one published tensor."""
    from flax import traverse_util

    from zegformer_jax.pretrained.zegformer import from_detectron2

    tree, _ = from_detectron2({name: array}, models.CASE["model"]["heads"])
    ((path, value),) = traverse_util.flatten_dict(tree["params"]).items()
    return path, value


def test_three_optimiser_steps(case):
    arrays = case["arrays"]
    variables = models.variables("segmenter_weights")
    params = variables["params"]
    optimiser, schedule = make_optimiser(
        learning_rate=1e-4,
        steps=10,
        power=0.9,
        weight_decay=1e-4,
        clip_norm=0.01,
        groups=(
            ("backbone/.*", {"learning_rate": 0.1}),
            (".*norm.*", {"weight_decay": 0.0}),
            ("transformer/query_embedding", {"weight_decay": 0.0}),
        ),
    )
    opt_state = optimiser.init(params)

    @jax.jit
    def step(params, opt_state):
        (total, _), gradients = jax.value_and_grad(total_loss, has_aux=True)(
            params, variables["constants"], case
        )
        updates, opt_state = optimiser.update(gradients, opt_state, params)
        return total, optax.apply_updates(params, updates), opt_state

    for index in range(3):
        np.testing.assert_allclose(schedule(index), arrays["steps/lr"][index], rtol=1e-5)
        total, params, opt_state = step(params, opt_state)
        np.testing.assert_allclose(total, arrays["steps/loss"][index], rtol=1e-4)
    total, _, _ = step(params, opt_state)
    np.testing.assert_allclose(total, arrays["steps/loss"][3], rtol=1e-4)
    names = [name for name in arrays if name.startswith("steps/param/")]
    assert len(names) == 6
    for name in names:
        path, expected = flax_leaf(name.removeprefix("steps/param/"), arrays[name])
        actual = params
        for key in path:
            actual = actual[key]
        np.testing.assert_allclose(actual, expected, atol=1e-5, err_msg=name)


def test_per_pixel(case, golden):
    """The baseline's loss on image 0."""
    arrays = golden("per_pixel")
    labels = jnp.asarray(case["arrays"]["label0"])[None]
    logits = models.per_pixel().apply(
        models.variables("per_pixel_weights"), case["images"][:1], case["text"]
    )
    total, count = losses.per_pixel_loss(logits, labels)
    np.testing.assert_allclose(total / count, arrays["loss/loss_sem_seg"], rtol=1e-5)
