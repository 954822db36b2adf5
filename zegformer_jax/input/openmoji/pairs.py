"""Images and captions of single drawings, for contrastive training."""

import dataclasses
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
MASK_NOISE = 70  # of 255, largest standard deviation of the noise added to a mask's opacity
MASK_NOISE_CELL = (6, 10)  # pixels, of the noise's coarseness
BOX_JITTER = 0.06  # of the box's side, on each edge
MIN_SHOWN = 0.3  # of an object's pixels
PAIR_BORDER = 20  # pixels of surroundings around the object
PAIR_BACKGROUND_SIZE = (128, 128)  # larger than any rotated object with its border
PAIRS_PER_BACKGROUND = 12
PAIRS_STREAM = 2  # differs from the streams in SPLITS


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
    """Yields crops of single drawings with captions, for contrastive training.

    A crop is made like the input of the segment classifier: the object's box, stretched to a
    square, in most cases with CLIP's mean colour outside the object's rough mask, which leaks at
    some places; half of the objects have another drawing beside, in front or behind. A batch
    repeats no drawing as long as there are enough, but may show a class several times. Batch k
    depends on (seed, k) alone.

    Args:
        pictures: The drawings, from `load_pictures`.
        vocabulary: Names for the captions; the classes of the drawings, in their order.
        templates: Prompts with one `{}`.
        batch_size: Number b of pairs in a batch.
        image_size: Side s of the crops in pixels.
        seed: Seed of all batches, at least 0.
        start_step: Number of the first batch.
        num_steps: Number of batches.
        seen_only: Leaves out the drawings of unseen classes.
        masked_share: Share of the pairs that have everything outside the object's mask filled.

    Yields:
        `image` uint8 RGB [b, s, s, 3]; `caption`, array of b texts (a template filled with a class
        name, a synonym, or the drawing's lower-cased Unicode name); `picture_class` int32 [b].

    Raises:
        ValueError: The vocabulary has another length than the drawings', or there is no template.
    """
    if len(vocabulary) != len(pictures.vocabulary):
        counts = f"{len(vocabulary)} classes, the drawings {len(pictures.vocabulary)}"
        raise ValueError(f"contrastive_batches: the vocabulary has {counts}")
    if not templates:
        raise ValueError("contrastive_batches: templates is empty")
    pairs = _Pairs(pictures, vocabulary, templates, image_size, masked_share)
    shown = np.asarray(vocabulary.seen)[pictures.picture_class] | (not seen_only)
    candidates = np.flatnonzero(shown)
    rounds = -(-batch_size // len(candidates))
    for step in range(start_step, start_step + num_steps):
        rng = np.random.default_rng([seed, PAIRS_STREAM, step])
        order = np.concatenate([rng.permutation(candidates) for _ in range(rounds)])
        yield pairs.draw(order[:batch_size], rng)


@dataclasses.dataclass(frozen=True)
class _Pairs:
    """Draws crops with captions; see `contrastive_batches` for the fields."""

    pictures: Pictures
    vocabulary: Vocabulary
    templates: Sequence[str]
    image_size: int
    masked_share: float

    def draw(self, chosen: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Returns the batch of the chosen drawings; each one's neighbour is the one before it."""
        backgrounds = [
            draw_background(rng, *PAIR_BACKGROUND_SIZE)
            for _ in range(-(-len(chosen) // PAIRS_PER_BACKGROUND))
        ]
        images, captions = [], []
        neighbour_hw4 = self._render(chosen[-1], rng)
        for picture in chosen:
            captions.append(self._caption(picture, rng))
            patch_hw4 = self._render(picture, rng)
            images.append(
                _crop(
                    patch_hw4, neighbour_hw4, rng, self.image_size, backgrounds, self.masked_share
                )
            )
            neighbour_hw4 = patch_hw4
        return {
            "image": np.stack(images),
            "caption": np.asarray(captions),
            "picture_class": self.pictures.picture_class[chosen],
        }

    def _render(self, picture: int, rng: np.random.Generator) -> np.ndarray:
        return render(self.pictures.levels[picture], rng, rng.uniform(*PAIR_SIZE))

    def _caption(self, picture: int, rng: np.random.Generator) -> str:
        synonyms = self.vocabulary.synonyms(self.pictures.picture_class[picture])
        # Twice the synonyms: the class's names are drawn more often than the drawing's own.
        names = [*synonyms, *synonyms, self.pictures.titles[picture]]
        name = pick(rng, [name for name in names if name])
        return pick(rng, self.templates).replace("{}", name)


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
    """Paints a drawing at a random place; removes from `alpha_hw` the object's hidden pixels."""
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
    """Imitates the object's mask from a segmenter at stride 4: bool [h, w], never empty."""
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
