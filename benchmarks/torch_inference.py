"""Inference in PyTorch as users write it, for `inference.py`: whole masks, one batch of crops.

The models are transformers' MaskFormer (as in `torch_step.py`) and CLIP. The image times the mask
at full resolution is cropped by RoIAlign with adaptive sampling, written with `grid_sample` in a
loop over queries, as their numbers of samples differ. All crops are one batch. The scores of all
classes are computed at the padded size, then cut, resized and compared.
"""

import time

import numpy as np
import torch
import transformers
from inference_parts import VIT_B16, Case, Made, config_of, resident_peak
from torch.nn.functional import avg_pool2d, grid_sample, interpolate, normalize
from torch_step import make_model

from zegformer_jax.models.clip.model import CLIP_MEAN, CLIP_STD, INITIAL_LOGIT_SCALE
from zegformer_jax.models.normalise import PIXEL_MEAN, PIXEL_STD
from zegformer_jax.segmentation.class_scores import ENSEMBLE_WEIGHT


def make_clip() -> torch.nn.Module:
    """Makes transformers' image tower of ViT-B/16 with random parameters."""
    return transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(
            image_size=VIT_B16.image_size, patch_size=VIT_B16.patch_size,
            hidden_size=VIT_B16.vision_width, num_hidden_layers=VIT_B16.vision_layers,
            num_attention_heads=VIT_B16.vision_heads, projection_dim=VIT_B16.embed_dim,
            intermediate_size=4 * VIT_B16.vision_width,
        )
    )  # fmt: skip


def boxes_of(segments_qhw: torch.Tensor) -> list[tuple[int, int, int, int]]:
    """Returns each segment's first column and row and last column and row; the image if flat."""
    boxes = []
    height, width = segments_qhw.shape[1:]
    for columns, rows in zip(segments_qhw.any(1).cpu(), segments_qhw.any(2).cpu(), strict=True):
        x, y = columns.nonzero(), rows.nonzero()
        box = (x[0], y[0], x[-1], y[-1]) if len(x) else (0, 0, 0, 0)
        has_area = box[2] > box[0] and box[3] > box[1]
        boxes.append(tuple(int(side) for side in box) if has_area else (0, 0, width, height))
    return boxes


def roi_align(image_chw: torch.Tensor, box: tuple[int, ...], side: int) -> torch.Tensor:
    """Returns [C, side, side] of torchvision's RoIAlign, `aligned=True`, adaptive sampling."""

    def positions(start: int, end: int, length: int) -> tuple[torch.Tensor, int]:
        samples = -(-(end - start) // side)
        steps = torch.arange(side * samples, device=image_chw.device) + 0.5
        pixels = start - 0.5 + (end - start) * steps / (side * samples)
        return 2 * pixels / (length - 1) - 1, samples

    left, top, right, bottom = box
    y, down = positions(top, bottom, image_chw.shape[1])
    x, across = positions(left, right, image_chw.shape[2])
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[None]
    samples = grid_sample(image_chw[None], grid, padding_mode="border", align_corners=True)
    return avg_pool2d(samples, (down, across))[0]


class TorchPipeline:
    """Inference in PyTorch on the same image, segments and sizes."""

    def __init__(self, case: Case, made: Made, compiles: bool = False):
        """Makes the models with random parameters, and the arrays."""
        torch.backends.cuda.matmul.allow_tf32 = True  # as XLA does
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.case = case
        self.grouper = make_model(config_of(case), made.text_cd).eval()
        self.grouper.to(self.device, memory_format=torch.channels_last)
        self.clip = make_clip().eval().to(self.device)
        if compiles:
            self.grouper.model.compile()
            self.clip.compile()
        self.image, self.class_logits, self.masks, self.text, self.seen = (
            torch.from_numpy(array).to(self.device) for array in made
        )
        self._autocast = torch.autocast(
            self.device, torch.bfloat16, enabled=case.dtype == "bfloat16"
        )

    def _normalised(self, mean: tuple, std: tuple) -> torch.Tensor:
        """Returns the image [3, H, W], zero in the padding."""
        mean, std = (torch.tensor(x, device=self.device)[:, None, None] for x in (mean, std))
        image = (self.image.permute(2, 0, 1) - mean) / std
        height, width = self.case.size
        image[:, height:], image[:, :, width:] = 0, 0
        return image

    def group(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns class and mask logits of the last layer; later parts take the synthetic ones."""
        model = self.grouper
        image = self._normalised(PIXEL_MEAN, PIXEL_STD)[None]
        with self._autocast:
            output = model.model(image.contiguous(memory_format=torch.channels_last))
            states = output.transformer_decoder_last_hidden_state
            pixels = output.pixel_decoder_last_hidden_state
            masks = torch.einsum("bqc,bchw->bqhw", model.mask_embedder(states), pixels)
            return model.class_predictor(states), masks

    def crop(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns CLIP's inputs [Q, 3, 224, 224] and the upsampled mask logits [Q, H, W]."""
        masks = interpolate(self.masks[None], self.case.padded, mode="bilinear")[0]
        segments = masks.sigmoid() > 0.5
        images = self._normalised(CLIP_MEAN, CLIP_STD)[None] * segments[:, None]
        side = VIT_B16.image_size
        boxes = boxes_of(segments)
        crops = [roi_align(image, box, side) for image, box in zip(images, boxes, strict=True)]
        return torch.stack(crops), masks

    def encode(self, crops: torch.Tensor) -> torch.Tensor:
        """Returns CLIP's features [N, D]."""
        with self._autocast:
            return self.clip(crops).image_embeds.float()

    def scores(self, features: torch.Tensor) -> torch.Tensor:
        """Returns the ensemble's scores [Q, C]."""
        cosines = normalize(features) @ self.text.T
        logits = torch.cat(
            [np.exp(INITIAL_LOGIT_SCALE) * cosines, self.class_logits[:, -1:]], dim=1
        )
        clip, grouper = (x.softmax(-1)[:, :-1] for x in (logits, self.class_logits))
        mean = clip[:, self.seen].mean(1, keepdim=True)
        weight = ENSEMBLE_WEIGHT
        seen = grouper**weight * mean ** (1 - weight)
        return torch.where(self.seen, seen, grouper ** (1 - weight) * clip**weight)

    def label_map(self, scores: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """Returns every pixel's class at the original size."""
        height, width = self.case.size
        maps = torch.einsum("qc,qhw->chw", scores, masks.sigmoid())[:, :height, :width]
        return interpolate(maps[None], self.case.original, mode="bilinear")[0].argmax(0)

    @torch.inference_mode()
    def __call__(self) -> dict[str, float]:
        """Returns the seconds of one image by part and in total."""
        start = self._now()
        self.group()
        grouped = self._now()
        crops, masks = self.crop()
        cropped = self._now()
        features = self.encode(crops)
        encoded = self._now()
        self.label_map(self.scores(features), masks)
        end = self._now()
        return {
            "grouper": grouped - start,
            "crops": cropped - grouped,
            "CLIP": encoded - cropped,
            "map": end - encoded,
            "all": end - start,
        }

    @torch.inference_mode()
    def encode_seconds(self, count: int) -> float:
        """Returns the seconds of CLIP on a batch of `count` crops."""
        crops = torch.randn(count, 3, *[VIT_B16.image_size] * 2, device=self.device)
        start = self._now()
        self.encode(crops)
        return self._now() - start

    def peak_bytes(self) -> float:
        """Returns the peak memory of one image, in addition to the models."""
        if self.device == "cpu":
            return resident_peak(self)
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        self()
        return torch.cuda.max_memory_allocated() - held

    def multiply_seconds(self, side: int) -> float:
        """Returns the seconds of a matmul of large square matrices in the case's dtype."""
        x = torch.randn(side, side, device=self.device, dtype=getattr(torch, self.case.dtype))
        start = self._now()
        torch.matmul(x, x)
        return self._now() - start

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()
