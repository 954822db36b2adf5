"""The pixel decoder with its transformer encoder, and the decoder that attends to it."""

import jax
import numpy as np
import pytest

from zegformer_jax import models
from zegformer_jax.models.transformer import TransformerEncoder
from zegformer_jax.pretrained import tables, zegformer
from zegformer_jax.pretrained.zegformer_names import PIXEL_DECODER, PREDICTOR

SMALL = {
    "kind": "zegformer",
    "embed_dim": 8,
    "backbone": {
        "name": "resnet",
        "blocks": (1, 1, 1, 1),
        "stem_width": 4,
        "bottleneck_width": 4,
        "stage_width": 8,
        "norm": "group",
        "norm_groups": 2,
    },
    "pixel_decoder": {
        "width": 16,
        "mask_width": 8,
        "norm_groups": 4,
        "encoder_layers": 2,
        "encoder_heads": 4,
        "encoder_mlp_width": 24,
    },
    "transformer": {
        "queries": 6,
        "width": 16,
        "layers": 1,
        "heads": 2,
        "mlp_width": 8,
        "project_input": False,
    },
    "memory": "res5",
}
RES5_CHANNELS = 64  # of SMALL's backbone


def random_variables(sizes, seed=0):
    """Variables whose norms and biases matter too: deviation 1 / sqrt(inputs), norms near 1."""
    rng = np.random.default_rng(seed)

    def draw(path, shape):
        noise = rng.standard_normal(shape, np.float32)
        if path.endswith(("scale", "var")):
            return np.exp(0.2 * noise)
        inputs = np.prod(shape[:-1]) if path.endswith("kernel") and "/out/" not in path else 64
        if path.endswith(("query/kernel", "key/kernel", "value/kernel")):
            inputs = shape[0]
        return noise / np.float32(np.sqrt(inputs))

    return tables.unflatten({p: draw(p, s) for p, s in zegformer.shapes(sizes).items()})


def error(actual, expected):
    """The largest difference, on the scale of the largest expected number."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    return np.abs(actual - expected).max() / np.abs(expected).max()


def part(name, variables):
    return {"params": variables["params"][name]}


def encode_in_numpy(tensors, res5_bhwc, layers, heads):
    """The encoder in float64, from the published tensors, one head at a time (DETR, A.3)."""
    tensors = {name: np.float64(x) for name, x in tensors.items()}

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    def linear(x, name):
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    def attend(keyed, x, name):
        q, k, v = (
            source @ weight.T + bias
            for source, weight, bias in zip(
                (keyed, keyed, x),
                np.split(tensors[f"{name}.in_proj_weight"], 3),
                np.split(tensors[f"{name}.in_proj_bias"], 3),
                strict=True,
            )
        )
        outputs = []
        for columns in np.split(np.arange(q.shape[-1]), heads):
            logits = q[..., columns] @ k[..., columns].swapaxes(1, 2) / np.sqrt(len(columns))
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            outputs.append(weights / weights.sum(-1, keepdims=True) @ v[..., columns])
        return linear(np.concatenate(outputs, -1), f"{name}.out_proj")

    batch, height, width, _ = res5_bhwc.shape
    kernel = tensors[f"{PIXEL_DECODER}.input_proj.weight"][:, :, 0, 0]
    x = res5_bhwc @ kernel.T + tensors[f"{PIXEL_DECODER}.input_proj.bias"]
    half = x.shape[-1] // 2
    positions = np.zeros((height, width, 2 * half))
    for row, column, channel in np.ndindex(positions.shape):
        place = (row + 1) / height if channel < half else (column + 1) / width
        index = channel % half
        angle = 2 * np.pi * place / 10_000 ** (index // 2 * 2 / half)
        positions[row, column, channel] = np.cos(angle) if index % 2 else np.sin(angle)
    positions = positions.reshape(-1, 2 * half)
    x = x.reshape(batch, height * width, 2 * half)
    for i in range(layers):
        name = f"{PIXEL_DECODER}.transformer.encoder.layers.{i}"
        x = norm(x + attend(x + positions, x, f"{name}.self_attn"), f"{name}.norm1")
        hidden = np.maximum(linear(x, f"{name}.linear1"), 0)
        x = norm(x + linear(hidden, f"{name}.linear2"), f"{name}.norm2")
    return x.reshape(batch, height, width, -1)


@pytest.fixture(scope="module")
def small():
    variables = random_variables(SMALL)
    rng = np.random.default_rng(1)
    images = rng.normal(size=(2, 64, 96, 3)).astype(np.float32)
    text = rng.normal(size=(3, 8)).astype(np.float32)
    return models.build("zegformer", SMALL, 8), variables, images, text


def test_the_encoder_against_float64(small):
    _, variables, _, _ = small
    arrays = tables.flatten(part("pixel_decoder", variables))
    arrays = {p.replace("params", "params/pixel_decoder", 1): x for p, x in arrays.items()}
    rows = [row for row in zegformer.table(SMALL) if row.paths[0] in arrays]
    tensors = tables.write(rows, arrays)
    rng = np.random.default_rng(2)
    maps = {
        f"res{i + 2}": rng.normal(size=(2, 24 // 2**i, 40 // 2**i, 8 * 2**i)).astype(np.float32)
        for i in range(4)
    }
    module = models.build("zegformer", SMALL, 8).pixel_decoder
    output = module.apply(part("pixel_decoder", variables), maps)
    expected = encode_in_numpy(tensors, np.float64(maps["res5"]), layers=2, heads=4)
    assert error(output.res5_bhwc, expected) < 1e-5
    assert output.mask_features_bhwd.shape == (2, 24, 40, 8)


@pytest.mark.slow
def test_the_queries_attend_to_the_encoders_output(small):
    """The pyramid starts from it too: res5 reaches the output in no other way."""
    model, variables, images, text = small
    _, state = model.apply(variables, images, text, capture_intermediates=True)
    inner = state["intermediates"]
    encoded = inner["pixel_decoder"]["__call__"][0].res5_bhwc
    states = model.transformer.apply(part("transformer", variables), encoded)
    np.testing.assert_allclose(states, inner["transformer"]["__call__"][0], atol=1e-5)
    plain = models.build(
        "zegformer", SMALL | {"pixel_decoder": SMALL["pixel_decoder"] | {"encoder_layers": 0}}, 8
    ).pixel_decoder
    maps = inner["backbone"]["__call__"][0] | {"res5": encoded}
    pyramid = plain.apply(part("pixel_decoder", variables), maps).mask_features_bhwd
    expected = inner["pixel_decoder"]["__call__"][0].mask_features_bhwd
    np.testing.assert_allclose(pyramid, expected, atol=1e-5)


def test_another_memory_stays_that_of_the_backbone(small):
    _, _, images, text = small
    sizes = SMALL | {
        "memory": "res4",
        "transformer": SMALL["transformer"] | {"project_input": True},
    }
    shapes = jax.eval_shape(
        models.build("zegformer", sizes, 8).init, jax.random.key(0), images, text
    )
    kernel = shapes["params"]["transformer"]["input_projection"]["kernel"]
    assert kernel.shape == (1, 1, RES5_CHANNELS // 2, 16)


def test_a_map_of_another_width_must_be_projected(small):
    _, _, images, text = small
    sizes = SMALL | {"pixel_decoder": SMALL["pixel_decoder"] | {"encoder_layers": 0}}
    with pytest.raises(ValueError, match="project_input is off, but the map has 64 channels"):
        jax.eval_shape(models.build("zegformer", sizes, 8).init, jax.random.key(0), images, text)


def test_dropout_acts_in_the_encoder_in_training_alone(small):
    variables = small[1]["params"]["pixel_decoder"]["encoder"]
    features = np.random.default_rng(3).normal(size=(1, 2, 3, 16)).astype(np.float32)

    def run(rate, seed=None):
        encoder = TransformerEncoder(layers=2, heads=4, mlp_width=24, dropout=rate)
        rngs = {} if seed is None else {"dropout": jax.random.key(seed)}
        return encoder.apply({"params": variables}, features, seed is None, rngs=rngs)

    expected = run(0.5)
    np.testing.assert_array_equal(run(0.0, seed=0), expected)
    first, other = run(0.5, seed=0), run(0.5, seed=1)
    assert error(first, expected) > 1e-2
    assert error(other, first) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zegformer", "per_pixel"])
def test_training_reaches_the_encoder(small, kind):
    """The decoder's dropout is off, so only the encoder's can move the output."""
    _, _, images, text = small
    sizes = SMALL | {"kind": kind, "transformer": SMALL["transformer"] | {"dropout": 0.0}}
    variables = random_variables(sizes)
    model = models.build(kind, sizes, 8)
    expected = model.apply(variables, images, text)
    training = model.apply(
        variables, images, text, deterministic=False, rngs={"dropout": jax.random.key(0)}
    )
    for actual, quiet in zip(jax.tree.leaves(training), jax.tree.leaves(expected), strict=True):
        assert error(actual, quiet) > 1e-2


FULL = {
    "kind": "zegformer",
    "embed_dim": 512,
    "backbone": {"name": "resnet", "blocks": (1, 1, 1, 1)},
    "memory": "res5",
}
FULL_VARIANTS = {
    "plain": FULL | {"pixel_decoder": {}, "transformer": {"layers": 6}},
    "encoder": FULL
    | {
        "pixel_decoder": {"encoder_layers": 6},
        "transformer": {"layers": 6, "project_input": False},
    },
}


class PublishedInTransformers:
    """transformers' modules of MaskFormer and DETR, filled from a checkpoint's tensors."""

    def __init__(self, tensors, has_encoder):
        torch = pytest.importorskip("torch")
        from transformers import DetrConfig, MaskFormerConfig
        from transformers.models.detr.modeling_detr import DetrEncoder
        from transformers.models.maskformer import modeling_maskformer as hub

        detr = DetrConfig(
            encoder_layers=6,
            decoder_layers=6,
            dropout=0.0,
            attention_dropout=0.0,
            use_pretrained_backbone=False,
        )
        width = 256 if has_encoder else 2048
        self.tensors = {name: torch.from_numpy(x) for name, x in tensors.items()}
        self.pixel_decoder = self.fill(
            hub.MaskFormerPixelDecoder(in_features=width, lateral_widths=[256, 512, 1024]),
            self.pyramid_names(),
        )
        decoder = MaskFormerConfig(decoder_config=detr.to_dict())
        self.transformer = self.fill(
            hub.MaskFormerTransformerModule(width, decoder), self.decoder_names(has_encoder)
        )
        self.encoder = None
        if has_encoder:
            self.input_proj = self.fill(
                torch.nn.Conv2d(2048, 256, 1), self.pair("", f"{PIXEL_DECODER}.input_proj")
            )
            rows = [
                row
                for i in range(6)
                for row in self.layer_names(
                    f"layers.{i}", f"{PIXEL_DECODER}.transformer.encoder.layers.{i}", ("norm2",)
                )
            ]
            self.encoder = self.fill(DetrEncoder(detr), rows)
            self.positions = hub.MaskFormerSinePositionEmbedding(128, normalize=True)

    def fill(self, module, rows):
        module.load_state_dict(dict(rows), strict=True)
        return module.eval()

    def pair(self, theirs, name):
        dot = "." if theirs else ""
        return [(f"{theirs}{dot}{x}", self.tensors[f"{name}.{x}"]) for x in ("weight", "bias")]

    def attention(self, theirs, name):
        rows = self.pair(f"{theirs}.o_proj", f"{name}.out_proj")
        for kind in ("weight", "bias"):
            parts = self.tensors[f"{name}.in_proj_{kind}"].chunk(3)
            rows += [(f"{theirs}.{x}_proj.{kind}", p) for x, p in zip("qkv", parts, strict=True)]
        return rows

    def layer_names(self, theirs, name, last_norms):
        rows = self.attention(f"{theirs}.self_attn", f"{name}.self_attn")
        rows += self.pair(f"{theirs}.self_attn_layer_norm", f"{name}.norm1")
        if len(last_norms) == 2:
            rows += self.attention(f"{theirs}.encoder_attn", f"{name}.multihead_attn")
            rows += self.pair(f"{theirs}.encoder_attn_layer_norm", f"{name}.norm2")
        rows += self.pair(f"{theirs}.mlp.fc1", f"{name}.linear1")
        rows += self.pair(f"{theirs}.mlp.fc2", f"{name}.linear2")
        return rows + self.pair(f"{theirs}.final_layer_norm", f"{name}.{last_norms[-1]}")

    def pyramid_names(self):
        rows = self.pair("mask_projection", f"{PIXEL_DECODER}.mask_features")
        convolutions = {"fpn.stem.{}": "layer_4"}
        for i in range(3):
            convolutions[f"fpn.layers.{i}.proj.{{}}"] = f"adapter_{3 - i}"
            convolutions[f"fpn.layers.{i}.block.{{}}"] = f"layer_{3 - i}"
        for theirs, name in convolutions.items():
            weight = self.tensors[f"{PIXEL_DECODER}.{name}.weight"]
            rows.append((theirs.format("0.weight"), weight))
            rows += self.pair(theirs.format("1"), f"{PIXEL_DECODER}.{name}.norm")
        return rows

    def decoder_names(self, has_encoder):
        queries = self.tensors[f"{PREDICTOR}.query_embed.weight"]
        rows = [("queries_embedder.weight", queries)]
        name = f"{PREDICTOR}.transformer.decoder"
        rows += self.pair("decoder.layernorm", f"{name}.norm")
        if not has_encoder:
            rows += self.pair("input_projection", f"{PREDICTOR}.input_proj")
        for i in range(6):
            rows += self.layer_names(
                f"decoder.layers.{i}", f"{name}.layers.{i}", ("norm2", "norm3")
            )
        return rows

    def run(self, maps):
        """Mask features [B, H, W, 256], res5 [B, H/8, W/8, C], normed states [L, B, Q, 256]."""
        import torch

        maps = [
            torch.from_numpy(maps[f"res{i}"].transpose(0, 3, 1, 2).copy()) for i in (2, 3, 4, 5)
        ]
        states = []
        for layer in self.transformer.decoder.layers:
            layer.register_forward_hook(lambda module, given, result: states.append(result))
        with torch.no_grad():
            if self.encoder is not None:
                x = self.input_proj(maps[3])
                positions = self.positions(x.shape, x.device, x.dtype)
                encoded = self.encoder(
                    inputs_embeds=x.flatten(2).transpose(1, 2),
                    spatial_position_embeddings=positions.flatten(2).transpose(1, 2),
                ).last_hidden_state
                maps[3] = encoded.transpose(1, 2).reshape(x.shape).contiguous()
            features = self.pixel_decoder(maps).last_hidden_state
            self.transformer(maps[3])
            normed = torch.stack([self.transformer.decoder.layernorm(x) for x in states])
        return features.permute(0, 2, 3, 1), maps[3].permute(0, 2, 3, 1), normed


@pytest.mark.slow
@pytest.mark.parametrize("variant", FULL_VARIANTS)
def test_against_transformers_at_full_size(variant):
    """Random weights of the published sizes, through the published names."""
    sizes = FULL_VARIANTS[variant]
    variables = random_variables(sizes)
    tensors = zegformer.to_checkpoint(variables, sizes)
    oracle = PublishedInTransformers(tensors, has_encoder=variant == "encoder")
    rng = np.random.default_rng(3)
    maps = {
        f"res{i + 2}": rng.normal(size=(2, 72 // 2**i, 104 // 2**i, 256 * 2**i)).astype(np.float32)
        for i in range(4)
    }
    model = models.build("zegformer", sizes, 512)
    features, res5 = model.pixel_decoder.apply(part("pixel_decoder", variables), maps)
    states = model.transformer.apply(part("transformer", variables), res5)
    errors = [
        error(actual, expected)
        for actual, expected in zip((features, res5, states), oracle.run(maps), strict=True)
    ]
    print(f"{variant}: relative errors {', '.join(f'{x:.1e}' for x in errors)}")
    assert max(errors) <= 1e-4
