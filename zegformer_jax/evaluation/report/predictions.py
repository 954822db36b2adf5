"""Files of an evaluation's label maps: PNG, and COCO's results, instances and panoptic form.

Axes: h w pixels.
"""

import hashlib
import io
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from zegformer_jax.evaluation.report.coco import (
    class_segments,
    connected_segments,
    encode_segments,
    number_images,
)
from zegformer_jax.evaluation.resume import ResumeFile
from zegformer_jax.runtime.errors import UserError
from zegformer_jax.runtime.files import write_bytes

PNG, PANOPTIC = "png", "panoptic"
# Kinds of COCO's files, and the segments that they list.
COCO_KINDS = {
    "rle": class_segments,
    "instances": connected_segments,
    PANOPTIC: connected_segments,
}
KINDS = (PNG, *COCO_KINDS)
INDEX_FILE = "images_and_categories.json"
SCORE = 1.0  # of every segment: a label map has no scores
READERS = 16  # threads that read the files of single images, which may be remote


def parse_kinds(text: str) -> tuple[str, ...]:
    """Reads kinds of files of label maps, by commas.

    Raises:
        UserError: There is no such kind.
    """
    kinds = tuple(kind.strip() for kind in text.split(",") if kind.strip())
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f"--predictions: no '{kind}'; choose of {', '.join(KINDS)}")
    return kinds


class LabelMapWriter:
    """Writes images' label maps: PNG files by the images' ids, and COCO's files of all images.

    An image's part of COCO's files is in a file of its own beside the resume file, until `finish`
    joins the files of all processes and of the runs before an interruption.
    """

    def __init__(
        self,
        folder: epath.Path,
        kinds: Sequence[str],
        categories: Sequence[dict[str, Any]],
        resume: ResumeFile,
    ):
        """Sets what is written.

        Args:
            folder: Gets the folders `png` and `panoptic`, and a JSON file for each of COCO's kinds.
            kinds: Kinds of files, of `KINDS`.
            categories: The categories of the classes in label maps, see `coco.make_categories`.
            resume: Has the folder for the files of single images.
        """
        self._folder, self._categories, self._resume = folder, list(categories), resume
        self._writes_png = PNG in kinds
        self._coco_kinds = [kind for kind in COCO_KINDS if kind in kinds]

    def __call__(self, id_: str, labels_hw: np.ndarray) -> None:
        """Writes an image's label map, integer [h, w]."""
        if self._writes_png:
            write_label_png(self._folder / PNG / f"{id_}.png", labels_hw)
        if self._coco_kinds:
            height, width = labels_hw.shape
            part = {"image": {"file_name": id_, "height": height, "width": width}}
            part |= {kind: self._list_segments(kind, id_, labels_hw) for kind in self._coco_kinds}
            name = hashlib.sha256(id_.encode()).hexdigest()  # ids can be paths
            _write_json(self._resume.parts / f"{name}.json", part)

    def finish(self, count: int) -> None:
        """Joins the files of single images; to be called in one process, after all the others.

        Args:
            count: Number of images.

        Raises:
            UserError: There are fewer files.
        """
        if not self._coco_kinds:
            return
        parts = self._read_parts()
        if len(parts) != count:
            raise UserError(
                f"{self._folder}: {len(parts)} of {count} images are in {self._resume.parts.name}: "
                "name an --output that all processes share"
            )
        numbers = number_images([part["image"]["file_name"] for part in parts])
        images = [
            {"id": number} | part["image"] for number, part in zip(numbers, parts, strict=True)
        ]
        index = {"images": images, "categories": self._categories}
        _write_json(self._folder / INDEX_FILE, index)
        for kind in self._coco_kinds:
            segments = [part[kind] for part in parts]
            if kind == PANOPTIC:
                content = index | {"annotations": _panoptic_annotations(images, segments)}
            else:
                content = _results(images, segments)
            _write_json(self._folder / f"{kind}.json", content)

    def _list_segments(self, kind: str, id_: str, labels_hw: np.ndarray) -> list[dict[str, Any]]:
        """Returns an image's segments without the image's number, which follows from all ids."""
        ids_hw, classes_s = COCO_KINDS[kind](labels_hw)
        category_ids = [self._categories[index]["id"] for index in classes_s]
        if kind == PANOPTIC:
            write_segment_png(self._folder / PANOPTIC / f"{id_}.png", ids_hw)
            return [{"id": i, "category_id": x} for i, x in enumerate(category_ids, 1)]
        return [
            {"category_id": x, "segmentation": run_lengths, "score": SCORE}
            for x, run_lengths in zip(category_ids, encode_segments(ids_hw), strict=True)
        ]

    def _read_parts(self) -> list[dict[str, Any]]:
        """Returns the content of the files of single images, sorted by the images' ids."""
        with ThreadPoolExecutor(READERS) as pool:
            texts = pool.map(lambda path: path.read_bytes(), self._resume.parts.glob("*.json"))
            return sorted(map(json.loads, texts), key=lambda part: part["image"]["file_name"])


def write_label_png(path: epath.PathLike, labels_hw: np.ndarray) -> None:
    """Writes a label map as a PNG of one channel, whose values are the labels.

    Args:
        path: The file.
        labels_hw: Integer [h, w]. uint8 gives 8 bits and uint16 gives 16; any other type gives 8
            if all labels fit, else 16. Cast to the vocabulary's `label_dtype` to have all images
            alike.

    Raises:
        ValueError: A label is not in 0..65535.
    """
    labels_hw = np.asarray(labels_hw)
    if labels_hw.dtype not in (np.uint8, np.uint16):
        least, most = int(labels_hw.min(initial=0)), int(labels_hw.max(initial=0))
        if least < 0 or most > np.iinfo(np.uint16).max:
            raise ValueError(f"{path}: labels {least}..{most}, but a PNG holds 0..65535")
        labels_hw = labels_hw.astype(np.uint8 if most <= np.iinfo(np.uint8).max else np.uint16)
    _write_png(path, labels_hw)


def write_segment_png(path: epath.PathLike, ids_hw: np.ndarray) -> None:
    """Writes segments as COCO's panoptic PNG, with id = R + 256 G + 256 * 256 B.

    Args:
        path: The file.
        ids_hw: Integer [h, w], each pixel's segment, below 2^24.
    """
    ids_hw3 = np.stack([ids_hw >> shift & 255 for shift in (0, 8, 16)], axis=-1)
    _write_png(path, ids_hw3.astype(np.uint8))


def _results(
    images: Sequence[dict[str, Any]], segments: Sequence[list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Returns COCO's list of results, of each image its segments."""
    return [
        {"image_id": image["id"]} | segment
        for image, of_image in zip(images, segments, strict=True)
        for segment in of_image
    ]


def _panoptic_annotations(
    images: Sequence[dict[str, Any]], segments: Sequence[list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Returns the annotations of COCO's panoptic form, one for each image."""
    return [
        {
            "image_id": image["id"],
            "file_name": f"{image['file_name']}.png",
            "segments_info": of_image,
        }
        for image, of_image in zip(images, segments, strict=True)
    ]


def _write_png(path: epath.PathLike, pixels: np.ndarray) -> None:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, format="PNG")
    write_bytes(path, data.getvalue())


def _write_json(path: epath.PathLike, content: Any) -> None:
    write_bytes(path, json.dumps(content).encode())
