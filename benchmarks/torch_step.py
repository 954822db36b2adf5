"""The training step in PyTorch, for `train_step.py`: transformers' MaskFormer and its losses.

It has the sizes, class logits, losses and weights of a config, SciPy's matching, and torch's AdamW
and clipping. Images have channels last, PyTorch's faster layout, and targets are made before the
step, as in its data loaders.
"""

from typing import Any

import numpy as np
import torch
import transformers

from zegformer_jax.models.grouper import CLASS_LOGIT_SCALE
from zegformer_jax.models.normalise import PIXEL_MEAN, PIXEL_STD

BACKBONE_RATE = 0.1  # factor of the learning rate; configs/base.py


class ClassLogits(torch.nn.Module):
    """Cosines of the projected states and the text embeddings, equal to the grouper's."""

    def __init__(self, width: int, text: np.ndarray):
        """Makes the projection to the size of text embeddings [C, D]."""
        super().__init__()
        self.project = torch.nn.Linear(width, text.shape[1])
        self.no_object = torch.nn.Parameter(0.02 * torch.randn(1, text.shape[1]))
        self.register_buffer("text", torch.from_numpy(text))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Maps states [..., width] to class logits [..., C + 1]."""
        names = torch.cat([self.text, self.no_object])
        unit = torch.nn.functional.normalize(self.project(states).float(), dim=-1)
        return CLASS_LOGIT_SCALE * unit @ names.T


def make_model(config: Any, text: np.ndarray) -> torch.nn.Module:
    """Makes transformers' MaskFormer with the config's sizes, our class logits and frozen norms."""
    backbone, decoder, loss = config.model.backbone, config.model.transformer, config.loss
    resnet = transformers.ResNetConfig(
        embedding_size=backbone.stem_width,
        hidden_sizes=[backbone.stage_width * 2**stage for stage in range(4)],
        depths=list(backbone.blocks),
        out_features=[f"stage{stage}" for stage in range(1, 5)],
    )
    detr = transformers.MaskFormerDetrConfig(
        backbone_config=resnet, num_queries=decoder.queries, d_model=decoder.width,
        decoder_layers=decoder.layers, decoder_attention_heads=decoder.heads,
        decoder_ffn_dim=decoder.mlp_width, dropout=decoder.dropout,
        attention_dropout=decoder.dropout, activation_dropout=decoder.dropout,
    )  # fmt: skip
    model = transformers.MaskFormerForInstanceSegmentation(
        transformers.MaskFormerConfig(
            backbone_config=resnet, decoder_config=detr, num_labels=len(text),
            fpn_feature_size=config.model.pixel_decoder.width,
            mask_feature_size=config.model.pixel_decoder.mask_width,
            mask_weight=loss.mask_weight, dice_weight=loss.dice_weight,
            cross_entropy_weight=loss.class_weight, no_object_weight=loss.no_object_weight,
        )
    )  # fmt: skip

    model.class_predictor = ClassLogits(decoder.width, text)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval().requires_grad_(False)
    return model


class TorchStep:
    """The same step in PyTorch."""

    def __init__(
        self,
        config: Any,
        dtype: str,
        batch: dict[str, np.ndarray],
        text: np.ndarray,
        compiles: bool = False,
    ):
        """Makes the model, its optimiser and the targets."""
        torch.backends.cuda.matmul.allow_tf32 = True  # as XLA does
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._held = torch.cuda.memory_allocated()  # by others; 0 without a GPU
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.device, self.model = device, make_model(config, text)
        self.model.to(device, memory_format=torch.channels_last)
        self.images = torch.from_numpy(batch["image"]).to(device).permute(0, 3, 1, 2)
        labels = [torch.from_numpy(label.astype(np.int64)).to(device) for label in batch["label"]]
        self.ids = [label.unique() for label in labels]
        self.masks = [
            (label[None] == ids[:, None, None]).float()
            for label, ids in zip(labels, self.ids, strict=True)
        ]
        self._logits = torch.compile(self._run) if compiles else self._run
        self._autocast = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")
        self._clip_norm = config.optimiser.clip_norm
        self._optimiser, self._schedule = self._make_optimiser(config)

    def _make_optimiser(self, config: Any) -> tuple[Any, Any]:
        """Returns AdamW with the recipe's groups of parameters, and its schedule."""
        rates, groups = config.optimiser, {}
        norms = (torch.nn.GroupNorm, torch.nn.LayerNorm)
        for prefix, module in self.model.named_modules():
            for name, parameter in module.named_parameters(prefix, recurse=False):
                if parameter.requires_grad:
                    decays = not isinstance(module, norms) and "queries_embedder" not in name
                    groups.setdefault((".encoder." in name, decays), []).append(parameter)
        self.parameters = [x for group in groups.values() for x in group]
        optimiser = torch.optim.AdamW(
            {
                "params": parameters,
                "lr": rates.learning_rate * (BACKBONE_RATE if is_backbone else 1.0),
                "weight_decay": rates.weight_decay * decays,
            }
            for (is_backbone, decays), parameters in groups.items()
        )
        steps, power = config.train.steps, rates.power
        return optimiser, torch.optim.lr_scheduler.PolynomialLR(optimiser, steps, power)

    def _run(self, images: Any) -> tuple[Any, Any]:
        """Returns all layers' class logits [L, B, Q, C + 1] and mask logits [L, B, Q, H/4, W/4]."""
        model = self.model
        mean, std = (images.new_tensor(x, dtype=torch.float32) for x in (PIXEL_MEAN, PIXEL_STD))
        pixels = (images - mean[:, None, None]) / std[:, None, None]
        with self._autocast:
            output = model.model(pixels, output_hidden_states=True)
            # The first state is the decoder's input; the last is normalised already.
            *states, last = output.transformer_decoder_hidden_states[1:]
            norm = model.model.transformer_module.decoder.layernorm
            states = torch.stack([*map(norm, states), last])
            masks = torch.einsum(
                "lbqc,bchw->lbqhw",
                model.mask_embedder(states),
                output.pixel_decoder_last_hidden_state,
            )
            return model.class_predictor(states).float(), masks.float()

    def __call__(self) -> None:
        """Takes a step."""
        classes, masks = self._logits(self.images)
        others = [
            {"masks_queries_logits": mask, "class_queries_logits": of_class}
            for mask, of_class in zip(masks[:-1], classes[:-1], strict=True)
        ]
        parts = self.model.get_loss_dict(masks[-1], classes[-1], self.masks, self.ids, others)
        self.loss = self.model.get_loss(parts)
        self.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self._clip_norm)
        self._optimiser.step()
        self._schedule.step()
        self._optimiser.zero_grad()

    def wait(self) -> None:
        """Waits for the last step."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def memory(self) -> float:
        """Returns the peak memory in bytes on a GPU; NaN on a CPU."""
        if self.device == "cpu":
            return float("nan")
        return torch.cuda.max_memory_allocated() - self._held
