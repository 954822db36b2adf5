"""Users' images, as viewers show them: one reading of a file for training and prediction.

| in the file | result |
|---|---|
| EXIF orientation | is applied |
| transparency, also of palettes | is laid over white |
| 16 bits | are divided by 257 |
| fractions | 0..1 if none is larger, else 0..255, else 0..65535 |
| an ICC profile | is converted to sRGB |
| several images | the first is taken, with a warning |
"""

import io
import logging
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps

from zegformer_jax.input import decoding
from zegformer_jax.runtime.errors import MissingFile, UserError

OF_8_BITS, OF_16_BITS = 255, 65535
DARK = 1 / 16  # of the range; images whose largest value is smaller are warned of
HUGE = 2**25  # pixels; larger images are read at a reduced size where the format allows it
WITH_ALPHA = ("RGBA", "LA", "PA")
PLAIN_ALPHA = {"RGBa": "RGBA", "La": "LA"}  # modes whose colours are multiplied by their opacity
KEPT_MODES = ("L", "RGB", "CMYK")  # which an ICC profile describes; others are converted first


class Photograph(NamedTuple):
    """An image that was read.

    Attributes:
        pixels: uint8 RGB [h, w, 3].
        size: Height and width of the image, more than those of `pixels` if it was read at a
            reduced size.
    """

    pixels: np.ndarray
    size: tuple[int, int]


Source = str | Path | bytes | IO[bytes] | Image.Image | np.ndarray | Photograph


def read_photograph(source: Source | Any, max_pixels: int | None = None) -> np.ndarray:
    """Reads an image as uint8 RGB [h, w, 3].

    Args:
        source: A path, the bytes of a file, an open file, an image of Pillow, or an array uint8
            [h, w, 3] of any library.
        max_pixels: Most pixels of a file; None: Pillow's limit, `decoding.MAX_PIXELS`.

    Raises:
        MissingFile: There is no such file.
        UserError: The file is not a complete image, or has too many pixels.
        ValueError: The array has another shape or type.
    """
    return read_reduced(source, None, max_pixels).pixels


def read_reduced(
    source: Source | Any, short_side: int | None, max_pixels: int | None = None
) -> Photograph:
    """Reads an image; a JPEG of more than `HUGE` pixels at 1/2, 1/4 or 1/8 of its size.

    Args:
        source: The image, as `read_photograph` takes it; one that was read is returned as it is.
        short_side: The shorter side is not reduced below it; None reads the whole size.
        max_pixels: Most pixels of a file; None: Pillow's limit.

    Raises:
        MissingFile: There is no such file.
        UserError: The file is not a complete image, or has too many pixels.
        ValueError: The array has another shape or type.
    """
    if isinstance(source, Photograph):
        return source
    if isinstance(source, Image.Image):
        return _whole(as_shown(source, "the image"))
    if hasattr(source, "__array__"):
        return _whole(_checked(np.asarray(source)))
    data, where = _read_bytes(source)
    with decoding.pixel_limit(max_pixels):
        image = decoding.open_image(data, where)
        width, height = image.size
        if short_side is not None and width * height > HUGE:
            image.draft(None, (short_side, short_side))  # only JPEG's format has it
        pixels = as_shown(image, where)
    is_turned = image.getexif().get(ExifTags.Base.Orientation) in decoding.SIDEWAYS
    return Photograph(pixels, (width, height) if is_turned else (height, width))


def _whole(pixels: np.ndarray) -> Photograph:
    return Photograph(pixels, pixels.shape[:2])


def _read_bytes(source: Any) -> tuple[bytes, str]:
    """Returns the bytes of a file, and its name for messages."""
    if isinstance(source, bytes | bytearray):
        return bytes(source), "the image's bytes"
    if hasattr(source, "read"):
        return source.read(), getattr(source, "name", "the file")
    text = str(source)
    if "://" in text:
        raise UserError(f"{text}: an address; download the image and name the file")
    if Path(text).is_dir():
        raise UserError(f"{text}: a folder; name an image in it")
    if not Path(text).is_file():
        raise MissingFile(f"{text}: no such image")
    return decoding.read_file(Path(text)), text


def decode_photograph(data: bytes, where: object) -> np.ndarray:
    """Decodes an image file to uint8 RGB [h, w, 3].

    Args:
        data: Content of a file of any kind that Pillow reads.
        where: The file, with which error messages start.

    Raises:
        UserError: The data is no image, damaged or cut off.
    """
    return as_shown(decoding.open_image(data, where), where)


def as_shown(image: Image.Image, where: object) -> np.ndarray:
    """Returns an image of Pillow in any mode as uint8 RGB [h, w, 3]; see the module.

    Args:
        image: The image.
        where: Its name, with which error messages and warnings start.
    """
    count = decoding.count_images(image, where)
    if count > 1:
        _warn(f"{where}: has {count} images; the first is taken")
    with decoding.pillow_errors(where):
        return _convert(decoding.loaded(image, where), where)


def _convert(image: Image.Image, where: object) -> np.ndarray:
    """Returns a decoded image as `as_shown` does."""
    image = ImageOps.exif_transpose(image)
    image = image.convert(PLAIN_ALPHA.get(image.mode, image.mode))
    if image.mode in decoding.WIDE_MODES or image.mode.startswith("I;16"):
        return np.repeat(_to_8_bits(np.asarray(image), where)[..., None], 3, axis=2)
    alpha = None
    if "transparency" in image.info or image.mode in WITH_ALPHA:
        alpha = image.convert("RGBA").getchannel("A")
    colours = _to_srgb(image)
    if alpha is not None:
        colours = Image.composite(colours, Image.new("RGB", colours.size, "white"), alpha)
    return np.asarray(colours)


def is_plain(data: bytes, where: object) -> bool:
    """Returns whether every decoder reads a file's pixels as `decode_photograph` does.

    Raises:
        UserError: The data is no image.
    """
    image = decoding.open_image(data, where)
    is_opaque = "transparency" not in image.info  # PNG can name one colour of RGB transparent
    return decoding.is_storable(data, where) and is_opaque and _profile(image) is None


def _checked(array: np.ndarray) -> np.ndarray:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"image is {array.dtype} {array.shape}: uint8 [H, W, 3] is needed")
    if not array.size:
        raise ValueError(f"image is {array.shape}: it has no pixels")
    return array


def _to_8_bits(grey_hw: np.ndarray, where: object) -> np.ndarray:
    """Returns values of more than 8 bits as uint8."""
    largest = float(np.nanmax(grey_hw, initial=0))
    if grey_hw.dtype.kind == "f":
        full = next((x for x in (1, OF_8_BITS) if largest <= x), OF_16_BITS)
    else:
        full = OF_16_BITS
    if largest < DARK * full:
        _warn(
            f"{where}: the largest value is {largest:g} of {full}, so the image is nearly black; "
            "if its values have fewer bits than the file, stretch them"
        )
    with np.errstate(invalid="ignore"):  # NaNs that signal
        scaled = np.nan_to_num(grey_hw.astype(np.float64)) * (OF_8_BITS / full)
    return np.round(np.clip(scaled, 0, OF_8_BITS)).astype(np.uint8)


def _to_srgb(image: Image.Image) -> Image.Image:
    """Returns the colours, without transparency, in sRGB."""
    profile = _profile(image)
    if profile is None:
        return _opaque(image).convert("RGB")
    kept = _opaque(image)
    kept = kept if kept.mode in KEPT_MODES else kept.convert("RGB")
    try:
        return ImageCms.profileToProfile(
            kept, profile, ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    except ImageCms.PyCMSError:  # the profile is of another colour space than the pixels
        return kept.convert("RGB")


def _opaque(image: Image.Image) -> Image.Image:
    """Returns an image without its transparency, its colours unchanged."""
    if image.mode == "LA":
        return image.getchannel("L")
    if image.mode in WITH_ALPHA or "transparency" in image.info:
        return Image.merge("RGB", image.convert("RGBA").split()[:3])
    return image


def _profile(image: Image.Image) -> ImageCms.ImageCmsProfile | None:
    """Returns an image's ICC profile, unless it is sRGB or unreadable."""
    data = image.info.get("icc_profile")
    if not data:
        return None
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        return None if "srgb" in ImageCms.getProfileDescription(profile).lower() else profile
    except (OSError, ImageCms.PyCMSError):
        return None


def _warn(message: str) -> None:
    logging.getLogger(__name__).warning(message)
