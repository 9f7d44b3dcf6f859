import numpy as np
import pytest

from engines.errors import InvalidRequest
from engines.images import decode, encode

CHANNELS_LAST = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
SMOOTH = np.repeat(np.arange(0, 240, 10, dtype=np.uint8)[None, :, None], 16, axis=0).repeat(3, axis=2)


def test_a_png_is_exactly_its_pixels_whichever_way_the_channels_stand() -> None:
    assert np.array_equal(decode(encode(CHANNELS_LAST)), CHANNELS_LAST)
    assert np.array_equal(decode(encode(CHANNELS_LAST.transpose(2, 0, 1))), CHANNELS_LAST)


@pytest.mark.parametrize(("kind", "magic"), [("webp", b"RIFF"), ("jpeg", b"\xff\xd8"), ("png", b"\x89PNG")])
def test_each_format_is_what_its_name_says_and_near_its_pixels(kind: str, magic: bytes) -> None:
    data = encode(SMOOTH, kind)  # type: ignore[arg-type]
    assert data.startswith(magic)
    assert np.abs(decode(data).astype(int) - SMOOTH).max() <= 12


def test_less_quality_is_fewer_bytes() -> None:
    assert len(encode(CHANNELS_LAST, "jpeg", 20)) < len(encode(CHANNELS_LAST, "jpeg", 95))
    assert len(encode(CHANNELS_LAST, "webp", 20)) < len(encode(CHANNELS_LAST, "webp", 95))


@pytest.mark.parametrize("pixels", [SMOOTH.astype(np.float32), SMOOTH[..., 0], np.zeros((5, 4, 4), np.uint8)])
def test_what_is_no_picture_is_refused(pixels: np.ndarray) -> None:
    with pytest.raises(InvalidRequest, match="uint8"):
        encode(pixels)


def test_an_unknown_format_and_an_impossible_quality_are_refused_by_field() -> None:
    with pytest.raises(InvalidRequest) as unknown:
        encode(SMOOTH, "gif")  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest) as outside:
        encode(SMOOTH, "jpeg", 101)
    assert (unknown.value.param, outside.value.param) == ("output_format", "output_compression")
