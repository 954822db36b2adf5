"""Users' images of every kind: the rule for each, and one reading for all commands."""

import io
import struct
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageCms

from zegformer_jax.input import decoding, photographs
from zegformer_jax.input.folder import Folder
from zegformer_jax.input.photographs import decode_photograph, read_photograph, read_reduced
from zegformer_jax.runtime.errors import UserError


@pytest.fixture
def rgb():
    return np.random.default_rng(0).integers(0, 256, (40, 36, 3), np.uint8)


def saved(image, folder, name, **options):
    path = folder / name
    image.save(path, **options)
    return path


def test_grey_is_three_equal_channels(rgb, tmp_path):
    grey = rgb[..., 0]
    actual = read_photograph(saved(Image.fromarray(grey), tmp_path, "grey.png"))
    np.testing.assert_array_equal(actual, np.stack([grey] * 3, -1))


def test_transparent_pixels_become_white(rgb, tmp_path):
    alpha = np.full((40, 36, 1), 255, np.uint8)
    alpha[:20], alpha[20:25] = 0, 128
    image = Image.fromarray(np.concatenate([rgb, alpha], -1))
    actual = read_photograph(saved(image, tmp_path, "rgba.png")).astype(int)
    opacity = alpha / 255
    expected = rgb * opacity + 255 * (1 - opacity)
    assert np.abs(actual - expected).max() <= 1
    assert np.all(actual[:20] == 255)


def test_a_palette_with_a_transparent_entry(tmp_path):
    image = Image.new("P", (36, 40), 1)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.paste(0, (0, 0, 36, 20))
    actual = read_photograph(saved(image, tmp_path, "palette.png", transparency=0))
    assert actual.shape == (40, 36, 3)
    assert np.all(actual[:20] == 255) and np.all(actual[20:] == [200, 100, 50])


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_become_eight(tmp_path, suffix):
    wide = np.linspace(0, 65535, 40 * 36).astype(np.uint16).reshape(40, 36)
    actual = read_photograph(saved(Image.fromarray(wide), tmp_path, f"wide.{suffix}"))
    assert actual.dtype == np.uint8
    np.testing.assert_array_equal(actual[..., 1], np.round(wide / 257))


def test_cmyk(tmp_path):
    ink = Image.new("CMYK", (36, 40), (0, 255, 0, 0))
    actual = read_photograph(saved(ink, tmp_path, "ink.tif"))
    assert np.all(actual == [255, 0, 255])


def test_the_cameras_orientation_is_applied(rgb, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    path = saved(Image.fromarray(rgb), tmp_path, "turned.png", exif=exif)
    np.testing.assert_array_equal(read_photograph(path), np.rot90(rgb, -1))


def test_a_missing_file():
    with pytest.raises(FileNotFoundError, match="^nowhere/x.png: no such image$"):
        read_photograph("nowhere/x.png")


def test_an_image_over_pillows_limit_is_not_damaged(tmp_path):
    path = saved(Image.new("1", (14000, 13000)), tmp_path, "map.png")
    with pytest.raises(UserError, match="map.png: more than 178,956,970 pixels, Pillow's limit .*"):
        read_photograph(path)


def test_max_pixels_raises_the_limit_for_one_image(rgb, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    path = saved(Image.fromarray(rgb), tmp_path, "map.png")
    with pytest.raises(UserError, match="map.png: more than 1,000 pixels, .*--max-pixels"):
        read_photograph(path)
    np.testing.assert_array_equal(read_photograph(path, max_pixels=40 * 36), rgb)
    with pytest.raises(UserError, match="map.png: more than 1,439 pixels, the limit"):
        read_photograph(path, max_pixels=40 * 36 - 1)
    assert Image.MAX_IMAGE_PIXELS == 500


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_huge_jpeg_is_read_at_reduced_size(tmp_path, monkeypatch, orientation):
    """The sides stay at least the wanted one; the pixels are means of the whole size's."""
    monkeypatch.setattr(photographs, "HUGE", 400 * 300 - 1)
    colours = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    image = Image.fromarray(colours).resize((404, 300), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(image, tmp_path, "huge.jpg", exif=exif, quality=95)
    whole = read_photograph(path)
    assert whole.shape == ((404, 300, 3) if orientation == 6 else (300, 404, 3))
    expected = np.asarray(Image.fromarray(whole).reduce(4)).astype(int)
    pixels, size = read_reduced(path, 75)
    assert size == whole.shape[:2] and pixels.shape == expected.shape
    assert np.abs(pixels - expected).mean() < 1
    for side, factor in ((76, 2), (150, 2), (151, 1), (37, 8)):
        pixels, size = read_reduced(path, side)
        assert size == whole.shape[:2]
        assert pixels.shape[:2] == tuple(-(-x // factor) for x in whole.shape[:2])


def test_other_images_are_read_whole(rgb, tmp_path, monkeypatch):
    jpeg, png = (saved(Image.fromarray(rgb), tmp_path, f"image.{x}") for x in ("jpg", "png"))
    assert read_reduced(jpeg, 5).pixels.shape == (40, 36, 3), "it is not huge"
    monkeypatch.setattr(photographs, "HUGE", 1)
    for source in (png, rgb, Image.open(jpeg)):
        pixels, size = read_reduced(source, 5)
        assert pixels.shape == (40, 36, 3) and size == (40, 36)
    assert read_reduced(jpeg, 5).pixels.shape == (10, 9, 3)


def test_a_truncated_file(rgb, tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(np.tile(rgb, (4, 4, 1))).save(buffer, "jpeg")
    path = tmp_path / "half.jpg"
    path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    with pytest.raises(ValueError, match=r"half.jpg: damaged or cut off: "):
        read_photograph(path)


def test_a_file_that_is_no_image(tmp_path):
    path = tmp_path / "notes.png"
    path.write_text("no image")
    with pytest.raises(ValueError, match="notes.png: not an image"):
        read_photograph(path)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_an_array_of_another_kind(array):
    with pytest.raises(ValueError, match="^image is .*(needed|no pixels)$"):
        read_photograph(array)


def test_other_sources_of_an_image(rgb, tmp_path):
    path = saved(Image.fromarray(rgb), tmp_path, "image.png")
    data = path.read_bytes()
    with path.open("rb") as file:
        sources = [
            path,
            str(path),
            data,
            io.BytesIO(data),
            file,
            Image.open(path),
            jnp.asarray(rgb),
        ]
        for source in sources:
            np.testing.assert_array_equal(read_photograph(source), rgb)


def test_what_is_no_file(tmp_path):
    with pytest.raises(ValueError, match="^https://a.org/x.png: an address; download the image"):
        read_photograph("https://a.org/x.png")
    with pytest.raises(ValueError, match=f"^{tmp_path}: a folder; name an image in it$"):
        read_photograph(tmp_path)


@pytest.mark.parametrize(
    "largest, scale", [(1.0, 255), (0.02, 255), (200.0, 1), (3000.0, 255 / 65535)]
)
def test_fractions(tmp_path, largest, scale, caplog):
    grey = np.linspace(0, largest, 40 * 36, dtype=np.float32).reshape(40, 36)
    actual = read_photograph(saved(Image.fromarray(grey), tmp_path, "grey.tif"))
    np.testing.assert_array_equal(actual[..., 2], np.round(grey * scale))
    assert ("nearly black" in caplog.text) == (largest in (0.02, 3000.0))


def test_twelve_bits_in_sixteen_are_warned_of(tmp_path, caplog):
    grey = np.linspace(0, 4000, 40 * 36).astype(np.uint16).reshape(40, 36)
    actual = read_photograph(saved(Image.fromarray(grey), tmp_path, "grey.png"))
    np.testing.assert_array_equal(actual[..., 0], np.round(grey / 257))
    assert (
        "grey.png: the largest value is 4000 of 65535, so the image is nearly black" in caplog.text
    )


def test_the_first_of_several_images(rgb, tmp_path, caplog):
    frames = [Image.fromarray(x) for x in (rgb, 255 - rgb)]
    path = saved(frames[0], tmp_path, "two.tif", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(read_photograph(path), rgb)
    assert "two.tif: has 2 images; the first is taken" in caplog.text


def test_a_small_file_does_not_make_a_large_image(tmp_path):
    path = saved(Image.new("L", (100, 100)), tmp_path, "x.png")
    data = bytearray(path.read_bytes())
    data[16:24] = struct.pack(">II", 12_000, 7_000)  # of the header, whose check sum is at 29
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    with pytest.raises(UserError, match="x.png: damaged or cut off: 12000x7000 pixels are more"):
        decode_photograph(bytes(data), "x.png")


@pytest.mark.slow
def test_the_smallest_file_of_an_image_is_read(tmp_path):
    path = saved(Image.new("1", (8000, 8000)), tmp_path, "x.png", optimize=True)
    assert read_photograph(path).shape == (8000, 8000, 3)


def swapped_profile():
    """sRGB with red and green swapped, so that a conversion is plain to see."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    tags = {bytes(data[i : i + 4]): i for i in range(132, 132 + 12 * data[131], 12)}
    red, green = tags[b"rXYZ"], tags[b"gXYZ"]
    data[red + 4 : red + 12], data[green + 4 : green + 12] = (
        data[green + 4 : green + 12],
        data[red + 4 : red + 12],
    )
    return (
        bytes(data).replace(b"s\0R\0G\0B", b"s\0w\0a\0p").replace(b"\0s\0R\0G\0B", b"\0s\0w\0a\0p")
    )


KINDS = {
    "RGB.png": lambda image: (image, {}),
    "RGB.jpg": lambda image: (image, {}),
    "grey.png": lambda image: (image.convert("L"), {}),
    "grey.jpg": lambda image: (image.convert("L"), {}),
    "two values.png": lambda image: (image.convert("1"), {}),
    "grey and alpha.png": lambda image: (with_alpha(image).convert("LA"), {}),
    "RGB and alpha.png": lambda image: (with_alpha(image), {}),
    "transparent colour.png": lambda image: (image, {"transparency": image.getpixel((0, 0))}),
    "transparent grey.png": lambda image: (image.convert("L"), {"transparency": 7}),
    "palette.png": lambda image: (image.quantize(16), {}),
    "transparent entry.png": lambda image: (image.quantize(16), {"transparency": 3}),
    "alpha of entries.png": lambda image: (image.quantize(4), {"transparency": b"\0\x40\x80\xff"}),
    "palette of 2 bits.png": lambda image: (image.quantize(4), {"bits": 2}),
    "16 bits.png": lambda image: (Image.fromarray(np.asarray(image)[..., 0] * np.uint16(257)), {}),
    "dark 16 bits.png": lambda image: (
        Image.fromarray(np.asarray(image)[..., 0] * np.uint16(9)),
        {},
    ),
    "CMYK.jpg": lambda image: (image.convert("CMYK"), {}),
    "turned.jpg": lambda image: (image, {"exif": orientation(6)}),
    "mirrored.png": lambda image: (image, {"exif": orientation(2)}),
    "profile.png": lambda image: (image, {"icc_profile": swapped_profile()}),
    "profile.jpg": lambda image: (image, {"icc_profile": swapped_profile()}),
    "profile and alpha.png": lambda image: (with_alpha(image), {"icc_profile": swapped_profile()}),
    "broken profile.png": lambda image: (image, {"icc_profile": b"no profile"}),
    "animation.png": lambda image: (image, {"save_all": True, "append_images": [image.rotate(90)]}),
}


def with_alpha(image):
    alpha = np.linspace(0, 255, image.width * image.height).astype(np.uint8)
    image = image.copy()
    image.putalpha(Image.fromarray(alpha.reshape(image.height, image.width)))
    return image


def orientation(number):
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


@pytest.mark.parametrize("name", KINDS)
def test_prepared_records_have_the_pixels_that_prediction_reads(tmp_path, rgb, name):
    for folder in ("train/images", "train/annotations"):
        (tmp_path / folder).mkdir(parents=True)
    image, options = KINDS[name](Image.fromarray(rgb))
    path = saved(image, tmp_path / "train/images", name, **options)
    expected = read_photograph(path)
    label = Image.new("L", expected.shape[1::-1])
    saved(label, tmp_path / "train/annotations", f"{path.stem}.png")
    (tmp_path / "classes.json").write_text('["sky"]')
    folder = Folder.open(tmp_path, splits=("train",))
    (example,) = folder.examples(tmp_path, "train")
    pixels, _ = folder.read(example)
    np.testing.assert_array_equal(pixels, expected)
    stored = folder.encoded_image(example) or decoding.encode_png(pixels)
    np.testing.assert_array_equal(decoding.decode_image(stored, name), expected)


def test_a_profile_changes_the_colours(rgb, tmp_path):
    path = saved(Image.fromarray(rgb), tmp_path, "p.png", icc_profile=swapped_profile())
    difference = np.abs(read_photograph(path).astype(int) - rgb[..., [1, 0, 2]])
    assert np.median(difference) <= 2
    broken = saved(Image.fromarray(rgb), tmp_path, "b.png", icc_profile=b"no profile")
    np.testing.assert_array_equal(read_photograph(broken), rgb)
