"""Images and captions of single drawings, for contrastive training."""

from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from zegformer_jax.input.openmoji.backgrounds import draw_background
from zegformer_jax.input.openmoji.rasters import Pictures, blend, render
from zegformer_jax.input.openmoji.scenes import MIN_VISIBLE, pick
from zegformer_jax.text.vocabulary import Vocabulary

MASKED_SHARE = 0.75  # of the pairs have everything outside the object's mask filled
FILL_COLOUR = np.array((123, 117, 104), np.uint8)  # CLIP's mean, 0 when normalised
PAIR_SIZE = (22, 60)  # pixels of an object before it is stretched, as in 96-pixel scenes
NEIGHBOUR_SHARE = 0.5  # of the pairs have another drawing beside, in front or behind
CUT_SHARE = 0.3  # of the masks lose a half-plane or a disc
MASK_NOISE = 70  # of 255, the largest standard deviation of what is added to a mask's opacity
MASK_NOISE_CELL = (6, 10)  # pixels, of the noise's coarseness
BOX_JITTER = 0.06  # of the box's side, on each edge
MIN_SHOWN = 0.3  # of an object's pixels
PAIR_BORDER = 20  # pixels of surroundings around the object
PAIR_BACKGROUND_SIZE = (128, 128)  # larger than any rotated object with its border
PAIRS_PER_BACKGROUND = 12
PAIRS_STREAM = 2  # beside the streams of SPLITS


def contrastive_batches(
    pictures: Pictures,
    *,
    vocabulary: Vocabulary,
    templates: Sequence[str],
    batch_size: int,
    image_size: int = 48,
    seed: int,
    start_step: int = 0,
    num_steps: int,
    seen_only: bool = False,
    masked_share: float = MASKED_SHARE,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields (crop, caption) pairs of single pictures, of all classes unless told otherwise.

    A crop is made as the segment classifier makes its input: the object's box, stretched to a
    square, in most cases with CLIP's mean colour outside the object's rough mask, which leaks
    here and there; half of the objects have another drawing beside, in front or behind. A batch
    of at most n rows repeats no picture, but may show a class several times. Batch k depends on
    (seed, k) alone.

    Args:
        pictures: What `load_pictures` gives.
        vocabulary: Names for the captions; the same classes in the same order as the pictures'.
        templates: Prompts with one `{}`.
        batch_size: Pairs in a batch.
        image_size: Pixels of a side.
        seed: At least 0.
        start_step: Number of the first batch.
        num_steps: How many batches.
        seen_only: Leaves out the pictures of unseen classes.
        masked_share: Of the pairs have everything outside the object's mask filled.

    Yields:
        `image` uint8 RGB [b, s, s, 3], `caption` array of b texts (a template filled with a class
        name, a synonym, or the picture's lower-cased Unicode name), `picture_class` int32 [b].

    Raises:
        ValueError: The vocabulary is not as long as the pictures', or there is no template.
    """
    if len(vocabulary) != len(pictures.vocabulary):
        counts = f"{len(vocabulary)} classes, the pictures {len(pictures.vocabulary)}"
        raise ValueError(f"contrastive_batches: the vocabulary has {counts}")
    if not templates:
        raise ValueError("contrastive_batches: templates is empty")
    shown = np.asarray(vocabulary.seen)[pictures.picture_class] | (not seen_only)
    candidates = np.flatnonzero(shown)
    for step in range(start_step, start_step + num_steps):
        rng = np.random.default_rng([seed, PAIRS_STREAM, step])
        rounds = -(-batch_size // len(candidates))
        order = np.concatenate([rng.permutation(candidates) for _ in range(rounds)])
        chosen = order[:batch_size]
        images, captions = [], []
        backgrounds = [
            draw_background(rng, *PAIR_BACKGROUND_SIZE)
            for _ in range(-(-batch_size // PAIRS_PER_BACKGROUND))
        ]
        last = chosen[-1]
        neighbour_hw4 = render(pictures.levels[last], rng, rng.uniform(*PAIR_SIZE))
        for picture in chosen:
            synonyms = vocabulary.synonyms(pictures.picture_class[picture])
            names = [*synonyms, *synonyms, pictures.titles[picture]]  # the class's mostly
            name = pick(rng, [name for name in names if name])
            captions.append(pick(rng, templates).replace("{}", name))
            patch_hw4 = render(pictures.levels[picture], rng, rng.uniform(*PAIR_SIZE))
            images.append(
                _crop(patch_hw4, neighbour_hw4, rng, image_size, backgrounds, masked_share)
            )
            neighbour_hw4 = patch_hw4
        yield {
            "image": np.stack(images),
            "caption": np.asarray(captions),
            "picture_class": pictures.picture_class[chosen],
        }


def _crop(
    patch_hw4: np.ndarray,
    neighbour_hw4: np.ndarray,
    rng: np.random.Generator,
    image_size: int,
    backgrounds: Sequence[np.ndarray],
    masked_share: float,
) -> np.ndarray:
    height, width = (side + 2 * PAIR_BORDER for side in patch_hw4.shape[:2])
    top = int(rng.integers(PAIR_BACKGROUND_SIZE[0] - height + 1))
    left = int(rng.integers(PAIR_BACKGROUND_SIZE[1] - width + 1))
    image_hw3 = pick(rng, backgrounds)[top : top + height, left : left + width].copy()
    inner = (slice(PAIR_BORDER, -PAIR_BORDER),) * 2
    alpha_hw = np.zeros((height, width), np.uint8)
    alpha_hw[inner] = patch_hw4[..., 3]
    near, in_front = rng.random() < NEIGHBOUR_SHARE, rng.random() < 0.5
    if near and not in_front:
        _paste(neighbour_hw4, rng, image_hw3, None)
    blend(patch_hw4, image_hw3[inner])
    if near and in_front:
        _paste(neighbour_hw4, rng, image_hw3, alpha_hw)
    mask_hw = alpha_hw > 127
    if rng.random() < masked_share:
        mask_hw = _rough_mask(alpha_hw, rng)
        image_hw3 = np.where(mask_hw[..., None], image_hw3, FILL_COLOUR)
    rows, columns = np.flatnonzero(mask_hw.any(1)), np.flatnonzero(mask_hw.any(0))
    jitter = rng.uniform(-BOX_JITTER, BOX_JITTER, 4)
    box_width, box_height = columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]
    left = max(columns[0] + jitter[0] * box_width, 0)
    right = min(columns[-1] + 1 + jitter[1] * box_width, width)
    top = max(rows[0] + jitter[2] * box_height, 0)
    bottom = min(rows[-1] + 1 + jitter[3] * box_height, height)
    image, size = Image.fromarray(image_hw3), (image_size, image_size)
    box = (left, top, right, bottom)
    return np.asarray(image.resize(size, Image.Resampling.BILINEAR, box=box))


def _paste(
    patch_hw4: np.ndarray,
    rng: np.random.Generator,
    image_hw3: np.ndarray,
    alpha_hw: np.ndarray | None,
) -> None:
    """Paints a drawing somewhere; what it hides of the object leaves `alpha_hw`, if given."""
    height, width = patch_hw4.shape[:2]
    top = int(rng.integers(1 - height, image_hw3.shape[0]))
    left = int(rng.integers(1 - width, image_hw3.shape[1]))
    rows = slice(max(top, 0), min(top + height, image_hw3.shape[0]))
    columns = slice(max(left, 0), min(left + width, image_hw3.shape[1]))
    visible_hw4 = patch_hw4[
        rows.start - top : rows.stop - top, columns.start - left : columns.stop - left
    ]
    if alpha_hw is not None:
        rest_hw = np.where(visible_hw4[..., 3] > 127, 0, alpha_hw[rows, columns])
        hidden = np.count_nonzero(alpha_hw[rows, columns] > 127) - np.count_nonzero(rest_hw > 127)
        if hidden > (1 - MIN_VISIBLE) * np.count_nonzero(alpha_hw > 127):
            return
        alpha_hw[rows, columns] = rest_hw
    blend(visible_hw4, image_hw3[rows, columns])


def _rough_mask(alpha_hw: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The object's mask as a segmenter at stride 4 might give it: bool [h, w], never empty."""
    height, width = alpha_hw.shape
    exact_hw = alpha_hw > 127
    coarseness = rng.uniform(1.5, 4.0)
    coarse_size = (max(int(width / coarseness), 2), max(int(height / coarseness), 2))
    coarse = Image.fromarray(alpha_hw).resize(coarse_size, Image.Resampling.BILINEAR)
    smooth = coarse.resize((width, height), Image.Resampling.BILINEAR)
    cell = rng.uniform(*MASK_NOISE_CELL)
    cells = rng.standard_normal((int(height / cell) + 2, int(width / cell) + 2))
    noise = Image.fromarray(cells.astype(np.float32))
    noise_hw = np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC))
    amount = rng.uniform(0, MASK_NOISE)
    mask_hw = np.asarray(smooth) + amount * noise_hw > rng.uniform(60, 150)
    if rng.random() < CUT_SHARE:
        y, x = rng.random(2) * (height, width)
        rows, columns = np.arange(height)[:, None] - y, np.arange(width)[None] - x
        if rng.random() < 0.5:
            angle = rng.random() * 2 * np.pi
            cut_hw = rows * np.sin(angle) + columns * np.cos(angle) > 0
        else:
            cut_hw = rows**2 + columns**2 < (rng.uniform(0.15, 0.4) * min(height, width)) ** 2
        mask_hw &= ~cut_hw
    enough = np.count_nonzero(mask_hw & exact_hw) > MIN_SHOWN * np.count_nonzero(exact_hw)
    return mask_hw if enough else exact_hw
