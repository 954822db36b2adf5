"""Decoding of images and label images, with errors that name the file."""

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from zegformer_jax.runtime.errors import MissingFile, UserError

# Pillow's modes of one channel of 1, 8 or 16 bits, or a palette.
LABEL_MODES = ("1", "L", "P", "I;16")
COLOUR_MODES = ("RGB", "RGBA")
WIDE_MODES = ("I", "I;16", "I;16B", "F")  # more than 8 bits per channel, which Pillow would clip
PACKED_GREY = ("L;2", "L;4")  # Pillow's raw modes that it stretches to 0..255
TURNED = range(2, 9)  # EXIF orientations other than upright, which is 1
SIDEWAYS = range(5, 9)  # those that swap height and width
STORABLE = {("JPEG", "RGB"), ("JPEG", "L"), ("PNG", "RGB")}  # formats and raw modes
# Pixels that a byte can hold: deflate's largest factor (zlib's manual) times 8 of one bit. The
# other formats here reach less; TIFF's fax pages and WebP's images of one colour reach more.
MAX_PIXELS_PER_BYTE = 1032 * 8
BOUNDED = ("PNG", "JPEG", "GIF", "BMP")
PNG_COMPRESSION = 6  # zlib's usual level
MAX_PIXELS = 178_956_970  # Pillow refuses larger images, unless it is told otherwise


@contextlib.contextmanager
def pillow_errors(where: object) -> Iterator[None]:
    """Turns errors of Pillow while it decodes a file into a `UserError` that names the file.

    Args:
        where: The file, with which error messages start.
    """
    try:
        yield
    except UserError:
        raise
    except Image.UnidentifiedImageError:
        raise UserError(f"{where}: not an image, or damaged at its start") from None
    except Exception as error:  # SyntaxError for PNG, TypeError for TIFF, struct.error for GIF
        raise _unreadable(error, where) from error


def read_file(path: Path) -> bytes:
    """Reads a whole file.

    Raises:
        MissingFile: There is no such file; the message starts with the path.
        UserError: It cannot be read; the message starts with the path.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise MissingFile(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def decode_image(data: bytes, where: object) -> np.ndarray:
    """Decodes an image of a published data set or of a record to uint8 RGB [h, w, 3].

    Neither EXIF orientation nor ICC profiles are applied; `photographs` reads users' images.

    Args:
        data: Content of a file of any kind that Pillow reads.
        where: The file, with which error messages start.

    Raises:
        UserError: The data is no image, damaged, cut off, or has more than 8 bits per channel.
    """
    image, _ = _open(data, where)
    if image.mode in WIDE_MODES:
        raise UserError(f"{where}: an image of mode {image.mode}; save it with 8 bits")
    with pillow_errors(where):
        return np.asarray(loaded(image, where).convert("RGB"))


def is_storable(data: bytes, where: object) -> bool:
    """Returns if an image may be stored unchanged: JPEG in RGB or grey, or PNG in 8-bit RGB.

    Every decoder reads the same pixels from these; decoders disagree about palettes, CMYK,
    transparency and EXIF orientation.

    Raises:
        UserError: The data is no image.
    """
    image, raw_mode = _open(data, where)
    with pillow_errors(where):
        turned = image.getexif().get(ExifTags.Base.Orientation) in TURNED
    return (image.format, raw_mode) in STORABLE and not turned


def decode_label(data: bytes, where: object) -> np.ndarray:
    """Decodes a label image to its pixel values: uint8 or uint16 [h, w].

    Args:
        data: A PNG with one channel of 1, 8 or 16 bits, or with a palette, whose indices are the
            values.
        where: The file, with which error messages start.

    Raises:
        UserError: The data is no PNG, damaged, cut off, in colour, or grey with 2 or 4 bits, whose
            values Pillow changes.
    """
    image, raw_mode = _open(data, where)
    _check_format(image, where)
    if image.mode not in LABEL_MODES:
        advice = (
            "a label image has one channel of ids, or a palette; a folder's classes.json may list "
            'colours, such as "colour": [128, 0, 0]'
        )
        if image.mode in COLOUR_MODES and _is_grey(loaded(image, where)):
            advice = (
                "its three channels are equal: save one of them, with Pillow "
                "Image.open(path).getchannel(0).save(path)"
            )
        raise UserError(f"{where}: an image of mode {image.mode}; {advice}")
    if raw_mode in PACKED_GREY:
        raise UserError(f"{where}: grey with less than 8 bits; save the ids with 8 or 16 bits")
    ids_hw = np.asarray(loaded(image, where))
    return ids_hw.astype(np.uint16 if ids_hw.dtype.itemsize > 1 else np.uint8)


def decode_colours(data: bytes, where: object) -> np.ndarray:
    """Decodes a label image to its colours, as viewers show them: uint8 [h, w, 3].

    Args:
        data: A PNG in colour, grey or with a palette.
        where: The file, with which error messages start.

    Raises:
        UserError: The data is no PNG, damaged, cut off, grey with 16 bits, or transparent.
    """
    image, _ = _open(data, where)
    _check_format(image, where)
    if image.mode in WIDE_MODES:
        raise UserError(f"{where}: grey with more than 8 bits, but classes.json lists colours")
    image = loaded(image, where)
    with pillow_errors(where):
        if image.convert("RGBA").getchannel("A").getextrema()[0] < 255:
            raise UserError(f"{where}: has transparent pixels; save it without transparency")
        return np.asarray(image.convert("RGB"))


def _check_format(image: Image.Image, where: object) -> None:
    """Refuses label images that are not PNG."""
    if image.format == "JPEG":
        raise UserError(f"{where}: a JPEG image, which changes ids; labels must be PNG")
    if image.format != "PNG":
        raise UserError(f"{where}: a {image.format} image; labels must be PNG")


def _is_grey(image: Image.Image) -> bool:
    colours_hw3 = np.asarray(image)[..., :3]
    return bool((colours_hw3 == colours_hw3[..., :1]).all())


def encode_png(pixels: np.ndarray) -> bytes:
    """Encodes uint8 [h, w, 3] or uint8 or uint16 [h, w] as PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png", compress_level=PNG_COMPRESSION)
    return file.getvalue()


def _open(data: bytes, where: object) -> tuple[Image.Image, str]:
    """Opens an image; returns it and Pillow's raw mode, the layout of its pixels in the file."""
    with pillow_errors(where):
        image = Image.open(io.BytesIO(data))
        width, height = image.size
        if image.format in BOUNDED and width * height > MAX_PIXELS_PER_BYTE * len(data):
            raise ValueError(f"{width}x{height} pixels are more than {len(data):,} bytes hold")
        if image.format == "PNG":
            image.verify()  # Pillow does not check the checksums when it decodes
            image = Image.open(io.BytesIO(data))
    arguments = image.tile[0].args if image.tile else ""
    return image, arguments[0] if isinstance(arguments, tuple) else arguments


def _unreadable(error: Exception, where: object) -> UserError:
    if isinstance(error, Image.DecompressionBombError):
        most = int(2 * Image.MAX_IMAGE_PIXELS)
        whose = "Pillow's limit" if most == MAX_PIXELS else "the limit"
        return UserError(
            f"{where}: more than {most:,} pixels, {whose} against files that fill the memory: "
            "reduce the image, or let predict take it by --max-pixels (max_pixels in Python)"
        )
    return UserError(f"{where}: damaged or cut off: {error}")


@contextlib.contextmanager
def pixel_limit(most: int | None) -> Iterator[None]:
    """Lets images have at most this many pixels, in all threads; None leaves Pillow's limit."""
    if most is None:
        yield
        return
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, most / 2
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def open_image(data: bytes, where: object) -> Image.Image:
    """Opens an image file; its pixels are not decoded yet.

    Raises:
        UserError: The data is no image, or damaged at its start.
    """
    return _open(data, where)[0]


def count_images(image: Image.Image, where: object) -> int:
    """Returns the number of images in a file, such as an animation's.

    Raises:
        UserError: The data is damaged or cut off.
    """
    with pillow_errors(where):
        return getattr(image, "n_frames", 1)


def loaded(image: Image.Image, where: object) -> Image.Image:
    """Returns an image with its pixels decoded.

    Raises:
        UserError: The data is damaged or cut off.
    """
    with pillow_errors(where):
        image.load()
    return image
