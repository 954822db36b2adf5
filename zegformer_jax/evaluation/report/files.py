"""Files that an evaluation writes: CSV, NPZ, PNG, RLE.

Axes: c class, h w pixels.
"""

import csv
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from zegformer_jax.evaluation.metrics.confusion import Scores
from zegformer_jax.runtime.files import write_bytes

CLASS_COLUMNS = ("class", "kind", "iou", "accuracy", "labelled_pixels", "predicted_pixels")
PAIRS = 20  # most confused pairs that are told


def write_classes(
    path: epath.PathLike,
    names: Sequence[str],
    seen: Sequence[bool],
    scores: Scores,
    confusion_cc: np.ndarray,
) -> None:
    """Writes the per-class table as CSV, a line for each class in the vocabulary's order.

    Columns are ``CLASS_COLUMNS``: kind is "seen" or "unseen"; IoU and accuracy are fractions with
    six decimals, empty where the class is not in the labels.

    Args:
        path: of the file.
        names: c class names.
        seen: c flags, whether each was seen in training.
        scores: of these classes, from ``metrics.scores_from_confusion``.
        confusion_cc: integer [c, c], indexed [label, prediction], that they are of.

    Raises:
        ValueError: if the numbers of classes differ.
    """
    confusion_cc = _checked(confusion_cc, names)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CLASS_COLUMNS)
    columns = (
        names,
        ["seen" if flag else "unseen" for flag in seen],
        ["" if np.isnan(value) else f"{value:.6f}" for value in scores.iou_c],
        ["" if np.isnan(value) else f"{value:.6f}" for value in scores.accuracy_c],
        confusion_cc.sum(axis=1).tolist(),
        confusion_cc.sum(axis=0).tolist(),
    )
    writer.writerows(zip(*columns, strict=True))
    write_bytes(path, text.getvalue().encode())


def write_confusion(
    path: epath.PathLike, confusion_cc: np.ndarray, names: Sequence[str], seen: Sequence[bool]
) -> None:
    """Writes a confusion matrix as compressed NPZ.

    The file holds ``confusion`` int64 [c, c], indexed [label, prediction], ``names`` text [c]
    and ``seen`` bool [c]; ``np.load`` reads it without pickles.

    Raises:
        ValueError: if the numbers of classes differ.
    """
    confusion_cc, seen_c = _checked(confusion_cc, names), np.asarray(seen, bool)
    if len(seen_c) != len(names):
        raise ValueError(f"write_confusion: {len(seen_c)} seen flags for {len(names)} classes")
    data = io.BytesIO()
    np.savez_compressed(data, confusion=confusion_cc, names=np.asarray(names, str), seen=seen_c)
    write_bytes(path, data.getvalue())


def confused_pairs(
    confusion_cc: np.ndarray, names: Sequence[str], count: int = PAIRS
) -> list[dict[str, Any]]:
    """Lists the pairs of classes with the most pixels of one predicted as the other.

    Args:
        confusion_cc: integer [c, c], indexed [label, prediction].
        names: c class names.
        count: pairs at most; those without a pixel are left out.

    Returns:
        dicts of ``label`` and ``prediction`` (names), ``pixels``, and ``share``, the pixels as
        a fraction of the label's. Most pixels first; on equality in the vocabulary's order.

    Raises:
        ValueError: if the numbers of classes differ.
    """
    confusion_cc = _checked(confusion_cc, names)
    labelled_c = confusion_cc.sum(axis=1)
    wrong_cc = confusion_cc.copy()
    np.fill_diagonal(wrong_cc, 0)
    order = np.argsort(-wrong_cc, axis=None, kind="stable")[:count]
    pairs = [divmod(place, len(names)) for place in order.tolist()]
    return [
        {
            "label": names[label],
            "prediction": names[prediction],
            "pixels": int(wrong_cc[label, prediction]),
            "share": float(wrong_cc[label, prediction] / labelled_c[label]),
        }
        for label, prediction in pairs
        if wrong_cc[label, prediction] > 0
    ]


def _checked(confusion_cc: np.ndarray, names: Sequence[str]) -> np.ndarray:
    confusion_cc = np.asarray(confusion_cc, np.int64)
    if confusion_cc.shape != (len(names), len(names)):
        raise ValueError(f"confusion matrix is {confusion_cc.shape}, classes are {len(names)}")
    return confusion_cc


def encode_rle(mask_hw: np.ndarray) -> dict[str, list[int]]:
    """Encodes a mask as COCO's uncompressed run lengths (pycocotools, ``frUncompressedRLE``).

    Args:
        mask_hw: bool or integer [h, w]; what is not 0 is inside.

    Returns:
        ``size``: [h, w]; ``counts``: lengths of the runs down the columns, from left to right,
        outside and inside by turns; the first is 0 where the first pixel is inside.

    Raises:
        ValueError: if the mask has not two axes.
    """
    if np.ndim(mask_hw) != 2:
        raise ValueError(f"encode_rle: a mask is [h, w], not {np.shape(mask_hw)}")
    inside = np.asarray(mask_hw, bool).ravel(order="F")
    turns = np.flatnonzero(inside[1:] != inside[:-1]) + 1
    first = [0] if inside[:1].any() else []  # a run of no pixels outside
    edges = np.concatenate([first, [0], turns, [inside.size]]).astype(np.int64)
    return {"size": list(np.shape(mask_hw)), "counts": np.diff(edges).tolist()}


def prediction_json(labels_hw: np.ndarray, image_id: str) -> list[dict[str, Any]]:
    """Gives a label map as COCO's results have it, a segment for each class that is present.

    Args:
        labels_hw: integer [h, w], places in the vocabulary.
        image_id: the picture's.

    Returns:
        what ``json.dump`` takes: dicts of ``image_id``, ``category_id`` (the class's place
        in the vocabulary, from 0, not an id of the data set's files) and ``segmentation`` (see
        ``encode_rle``), by rising place.
    """
    return [
        {
            "image_id": image_id,
            "category_id": place,
            "segmentation": encode_rle(labels_hw == place),
        }
        for place in np.unique(labels_hw).tolist()
    ]


def write_label_png(path: epath.PathLike, labels_hw: np.ndarray) -> None:
    """Writes a label map as a PNG of one channel, whose values are the labels.

    Args:
        path: of the file.
        labels_hw: integer [h, w]. uint8 gives 8 bits and uint16 gives 16; any other type gives 8
            where all labels fit, else 16. Cast to the vocabulary's ``label_dtype`` to have all
            pictures alike.

    Raises:
        ValueError: if a label is not in 0..65535.
    """
    labels_hw = np.asarray(labels_hw)
    if labels_hw.dtype not in (np.uint8, np.uint16):
        least, most = int(labels_hw.min(initial=0)), int(labels_hw.max(initial=0))
        if least < 0 or most > np.iinfo(np.uint16).max:
            raise ValueError(f"{path}: labels {least}..{most}, but a PNG holds 0..65535")
        labels_hw = labels_hw.astype(np.uint8 if most <= np.iinfo(np.uint8).max else np.uint16)
    data = io.BytesIO()
    Image.fromarray(labels_hw).save(data, format="PNG")
    write_bytes(path, data.getvalue())
