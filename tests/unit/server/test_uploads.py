"""What clients send to be changed is known by its bytes, held against limits, and goes on as plain pixels."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engines.errors import FewstepError, ImageTooLarge, InvalidRequest, UnsupportedImage
from server.sources import Source
from server.uploads import Upload

MAX = 10_000


def encoded(picture: Image.Image, image_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, image_format, **options)
    return buffer.getvalue()


def stripes(width: int, height: int) -> Image.Image:
    """Left half red, right half blue."""
    made = Image.new("RGB", (width, height), "red")
    made.paste("blue", (width // 2, 0, width, height))
    return made


def masked(width: int, height: int, box: tuple[int, int, int, int]) -> bytes:
    """Transparent in the box."""
    made = Image.new("RGBA", (width, height), "black")
    made.paste((0, 0, 0, 0), box)
    return encoded(made)


def pixels(data: bytes, width: int, height: int) -> Any:
    return np.frombuffer(data, np.uint8).reshape(height, width, -1)


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "JPEG"])
def test_a_picture_goes_on_as_pixels_of_the_size_that_is_made(image_format: str) -> None:
    upload = Upload(encoded(stripes(40, 40), image_format))
    upload.check(MAX)
    made = pixels(upload.fitted(16, 16, MAX), 16, 16)
    assert made.shape == (16, 16, 3)
    assert np.abs(made[8, 2].astype(int) - (255, 0, 0)).max() <= 8
    assert np.abs(made[8, 13].astype(int) - (0, 0, 255)).max() <= 8


def test_what_is_over_at_two_sides_is_cut_off_and_nothing_is_stretched() -> None:
    wide = Image.new("RGB", (64, 16), "white")
    wide.paste("red", (24, 0, 40, 16))  # the middle square
    assert (pixels(Upload(encoded(wide)).fitted(16, 16, MAX), 16, 16) == (255, 0, 0)).all()


def test_a_picture_of_the_size_is_not_touched() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    assert (pixels(Upload(encoded(Image.fromarray(noise))).fitted(16, 16, MAX), 16, 16) == noise).all()


def test_a_picture_stands_as_its_exif_says() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter to the right
    data = encoded(stripes(32, 32), "JPEG", exif=exif, quality=100)
    made = pixels(Upload(data).fitted(32, 32, MAX), 32, 32).astype(int)
    assert np.abs(made[4] - (255, 0, 0)).max() <= 12
    assert np.abs(made[28] - (0, 0, 255)).max() <= 12


def test_what_is_transparent_in_a_picture_is_white() -> None:
    made = pixels(Upload(encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 0)))).fitted(8, 8, MAX), 8, 8)
    assert (made == 255).all()


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "LA", "1"])
def test_pictures_of_every_mode_become_colours(mode: str) -> None:
    image_format = "JPEG" if mode == "CMYK" else "PNG"
    made = pixels(
        Upload(encoded(Image.new("RGB", (8, 8), "white").convert(mode), image_format)).fitted(8, 8, MAX), 8, 8
    )
    assert made.shape == (8, 8, 3)
    assert (made >= 250).all()


def test_a_mask_says_which_share_of_each_pixel_stays() -> None:
    upload = Upload(encoded(stripes(32, 32)), masked(32, 32, (0, 0, 16, 32)))
    upload.check(MAX)
    source = Source.read(upload.fitted(16, 16, MAX), 16, 16)
    assert source.stays is not None
    assert (source.stays[:, :7] == 0).all()
    assert (source.stays[:, 9:] == 255).all()
    changes = source.changes(4)
    assert changes is not None
    assert changes.tolist() == [[[1.0, 1.0, 0.0, 0.0]] * 4]


def test_a_position_of_the_latents_may_change_if_any_of_its_pixels_may() -> None:
    source = Source(np.zeros((8, 8, 3), np.uint8), np.full((8, 8), 255, np.uint8))
    assert source.stays is not None
    source.stays[5, 2] = 127
    changes = source.changes(4)
    assert changes is not None
    assert changes.tolist() == [[[0.0, 0.0], [1.0, 0.0]]]


def test_what_stays_is_the_picture_s_own_and_what_was_made_the_rest() -> None:
    picture, made = np.full((2, 3, 3), 10, np.uint8), np.full((3, 2, 3), 200, np.uint8)
    source = Source(picture, np.array([[255, 0, 51]] * 2, np.uint8))
    assert source.kept(made)[:, 0].tolist() == [[10, 200, 162]] * 3  # a fifth of the last stays
    assert Source(picture, None).kept(made) is made


def png_of(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose head says that it is so large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


WHOLE = encoded(stripes(32, 32))


@pytest.mark.parametrize(
    ("upload", "error", "param", "says"),
    [
        (Upload(b""), UnsupportedImage, "image", "it is empty"),
        (Upload(b"%PDF-1.7 and so on"), UnsupportedImage, "image", "25 50 44 46"),
        (Upload(encoded(stripes(8, 8), "GIF")), UnsupportedImage, "image", "no PNG, WebP or JPEG"),
        (Upload(encoded(stripes(8, 8), "TIFF")), UnsupportedImage, "image", "no PNG, WebP or JPEG"),
        (Upload(encoded(Image.new("I;16", (8, 8)))), UnsupportedImage, "image", "8 bits"),
        (Upload(png_of(101, 100)), ImageTooLarge, "image", "101 x 100.*10000"),
        (Upload(png_of(50_000, 50_000)), ImageTooLarge, "image", "10000"),
        (Upload(WHOLE, png_of(101, 100)), ImageTooLarge, "mask", "101 x 100"),
        (Upload(WHOLE[: len(WHOLE) // 2]), InvalidRequest, "image", "broken PNG"),
        (Upload(encoded(stripes(96, 96), "JPEG")[:-200]), InvalidRequest, "image", "broken JPEG"),
        (Upload(WHOLE, b"nothing"), UnsupportedImage, "mask", "6e 6f"),
        (Upload(WHOLE, masked(16, 16, (0, 0, 8, 8))), InvalidRequest, "mask", "16 x 16.*32 x 32"),
        (Upload(WHOLE, encoded(stripes(32, 32))), InvalidRequest, "mask", "no transparency"),
        (Upload(WHOLE, masked(32, 32, (0, 0, 0, 0))), InvalidRequest, "mask", "transparent nowhere"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_cannot_be_changed_is_refused_by_name(
    upload: Upload, error: type[FewstepError], param: str, says: str
) -> None:
    with pytest.raises(error, match=says) as raised:
        _taken(upload)
    assert type(raised.value) is error
    assert raised.value.param == param


def _taken(upload: Upload) -> None:
    upload.check(MAX)
    upload.fitted(16, 16, MAX)
