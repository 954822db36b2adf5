"""Encoded pictures to arrays: images and label pictures, with errors that name where they lie."""

import io
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from zegformer_jax.runtime.errors import MissingFile, UserError

LABEL_MODES = ("1", "L", "P", "I;16")  # Pillow's: one channel of 1, 8 or 16 bits, or a palette
WIDE_MODES = ("I", "I;16", "I;16B", "F")  # more than 8 bits a channel: Pillow would clip them
PACKED_GREY = ("L;2", "L;4")  # Pillow's raw modes: it stretches such values to 0..255
TURNED = range(2, 9)  # EXIF's orientations but the first, upright
STORABLE = {("JPEG", "RGB"), ("JPEG", "L"), ("PNG", "RGB")}  # formats and raw modes
PNG_COMPRESSION = 6  # zlib's usual level
# What Pillow raises on damaged files; a broken PNG gives a SyntaxError.
PILLOW_ERRORS = (OSError, SyntaxError, EOFError, ValueError, Image.DecompressionBombError)


def read_file(path: Path) -> bytes:
    """Reads a whole file.

    Raises:
        FileNotFoundError: There is none; the message starts with the path.
        ValueError: It cannot be read, likewise.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise MissingFile(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def decode_image(data: bytes, where: object, *, upright: bool = False) -> np.ndarray:
    """Decodes a picture to uint8 RGB [h, w, 3].

    Args:
        data: A file's content, of any kind that Pillow reads.
        where: The file; error messages start with it.
        upright: Turn it as its EXIF orientation says, as viewers and annotation tools do.

    Raises:
        ValueError: Not a picture, damaged, cut off, or with more than 8 bits a channel.
    """
    picture, _ = _open(data, where)
    if picture.mode in WIDE_MODES:
        raise UserError(f"{where}: a picture of mode {picture.mode}; save it with 8 bits")
    picture = _loaded(picture, where)
    return np.asarray((ImageOps.exif_transpose(picture) if upright else picture).convert("RGB"))


def is_storable(data: bytes, where: object) -> bool:
    """Whether a picture may be stored as it is: JPEG in RGB or grey, or PNG in RGB with 8 bits.

    These decode alike everywhere; of palettes, CMYK and transparency every decoder makes its own,
    and of an EXIF orientation.

    Raises:
        ValueError: Not a picture.
    """
    picture, raw_mode = _open(data, where)
    turned = picture.getexif().get(ExifTags.Base.Orientation) in TURNED
    return (picture.format, raw_mode) in STORABLE and not turned


def decode_label(data: bytes, where: object) -> np.ndarray:
    """Decodes a label picture to its pixel values: uint8 or uint16 [h, w].

    Args:
        data: A PNG of one channel, 8 or 16 bits (or 1), or with a palette, whose places are the
            values.
        where: The file; error messages start with it.

    Raises:
        ValueError: Not a PNG, damaged, cut off, in colour, or grey with 2 or 4 bits, whose values
            Pillow does not give.
    """
    picture, raw_mode = _open(data, where)
    if picture.format != "PNG":
        raise UserError(f"{where}: a {picture.format} picture; labels must be PNG")
    if picture.mode not in LABEL_MODES:
        raise UserError(
            f"{where}: a picture of mode {picture.mode}; a label picture has one channel of ids, "
            "or a palette"
        )
    if raw_mode in PACKED_GREY:
        raise UserError(f"{where}: grey with less than 8 bits; save the ids with 8 or 16 bits")
    ids_hw = np.asarray(_loaded(picture, where))
    return ids_hw.astype(np.uint16 if ids_hw.dtype.itemsize > 1 else np.uint8)


def encode_png(pixels: np.ndarray) -> bytes:
    """Encodes uint8 [h, w, 3] or uint8 or uint16 [h, w] as PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png", compress_level=PNG_COMPRESSION)
    return file.getvalue()


def _open(data: bytes, where: object) -> tuple[Image.Image, str]:
    """Reads a picture's header; gives also how its pixels lie in the file, in Pillow's words."""
    try:
        picture = Image.open(io.BytesIO(data))
        if picture.format == "PNG":
            picture.verify()  # when Pillow decodes pixels, it passes over their checksums
            picture = Image.open(io.BytesIO(data))
    except Image.UnidentifiedImageError:
        raise UserError(f"{where}: not a picture, or damaged at its start") from None
    except PILLOW_ERRORS as error:
        raise UserError(f"{where}: damaged or cut off: {error}") from error
    arguments = picture.tile[0].args if picture.tile else ""
    return picture, arguments[0] if isinstance(arguments, tuple) else arguments


def _loaded(picture: Image.Image, where: object) -> Image.Image:
    try:
        picture.load()
    except PILLOW_ERRORS as error:
        raise UserError(f"{where}: damaged or cut off: {error}") from error
    return picture
