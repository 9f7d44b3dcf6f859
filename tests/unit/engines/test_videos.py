"""Frames as bytes, and back: exactly by WebP, nearly by MP4."""

import io
import sys
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from engines.backends.base import psnr
from engines.errors import InternalError, InvalidRequest, NotBuilt
from engines.videos import check, encode, writes

NOISE = np.random.default_rng(0).integers(0, 256, (5, 3, 16, 24), dtype=np.uint8)
_Y, _X = np.mgrid[0:32, 0:48]
MOVING = np.stack([np.stack([4 * _X + t, 5 * _Y + t, 3 * (_X + _Y)]) for t in range(5)]).astype(np.uint8)


def webp(data: bytes) -> tuple[np.ndarray, list[int]]:
    """Frames uint8 [T, 3, H, W], and how many milliseconds each is shown."""
    frames, shown_ms = [], []
    with Image.open(io.BytesIO(data)) as file:
        for index in range(file.n_frames):  # type: ignore[attr-defined]
            file.seek(index)
            frames.append(np.asarray(file.convert("RGB")).transpose(2, 0, 1))
            shown_ms.append(file.info["duration"])
    return np.stack(frames), shown_ms


def mp4(data: bytes) -> tuple[np.ndarray, Any]:
    """Frames uint8 [T, 3, H, W], and the stream that they were read from."""
    import av

    with av.open(io.BytesIO(data)) as file:
        stream = file.streams.video[0]
        frames = [frame.reformat(format="rgb24").to_ndarray().transpose(2, 0, 1) for frame in file.decode(stream)]
    return np.stack(frames), stream


def test_a_webp_is_exactly_its_frames_and_its_milliseconds_add_up() -> None:
    frames, shown_ms = webp(encode(NOISE, "webp", fps=24))
    assert np.array_equal(frames, NOISE)
    assert shown_ms == [42, 41, 42, 42, 41]  # 1000 / 24 = 41.67: five of them are 208.3


def test_an_mp4_is_h264_of_the_asked_rate_in_the_colours_of_its_frames() -> None:
    pytest.importorskip("av", reason="pip install 'fewstep[video]'")
    frames, stream = mp4(encode(MOVING, "mp4", fps=12))
    assert frames.shape == MOVING.shape
    assert (stream.codec_context.name, stream.average_rate) == ("h264", 12)
    assert (stream.codec_context.colorspace, stream.codec_context.color_range) == (1, 1)
    assert psnr(torch.from_numpy(frames), torch.from_numpy(MOVING)) > 35


def test_an_mp4_begins_with_what_a_player_reads_first() -> None:
    pytest.importorskip("av", reason="pip install 'fewstep[video]'")
    data = encode(MOVING, "mp4", fps=12)
    assert data.index(b"moov") < data.index(b"mdat")


def test_less_quality_is_fewer_bytes() -> None:
    whole, good, bad = (len(encode(MOVING, "webp", fps=8, compression=quality)) for quality in (None, 95, 10))
    assert whole > good > bad
    pytest.importorskip("av", reason="pip install 'fewstep[video]'")
    best, usual, worst = (len(encode(MOVING, "mp4", fps=8, compression=quality)) for quality in (100, None, 10))
    assert best > usual > worst


def test_what_cannot_be_encoded_is_refused_with_what_can() -> None:
    with pytest.raises(InvalidRequest, match="none of webp, mp4"):
        encode(NOISE, "gif", fps=8)
    with pytest.raises(InvalidRequest, match=r"0\.\.100"):
        encode(NOISE, "webp", fps=8, compression=101)
    pytest.importorskip("av", reason="pip install 'fewstep[video]'")
    with pytest.raises(InvalidRequest, match=r"24x15.*webp"):
        encode(NOISE[:, :, 1:], "mp4", fps=8)


def test_without_pyav_an_mp4_is_refused_and_a_webp_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    check("webp")
    with pytest.raises(NotBuilt, match=r"fewstep\[video\]") as raised:
        check("mp4")
    assert raised.value.param == "output_format"


class Broken:
    """PyAV of which a part is missing or fails."""

    class FFmpegError(Exception): ...

    def __init__(self, *codecs: str) -> None:
        self.codecs_available = set(codecs)

    def open(self, *_: object, **__: object) -> None:
        raise self.FFmpegError("no memory")


def test_a_pyav_without_x264_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", Broken("h264", "libopenh264"))
    with pytest.raises(NotBuilt, match="x264"):
        check("mp4")
    assert [writes(one) for one in ("webp", "mp4")] == [True, False]
    monkeypatch.setitem(sys.modules, "av", Broken("libx264"))
    assert writes("mp4")


def test_an_encoder_that_fails_says_so_as_one_of_our_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", Broken("libx264"))
    with pytest.raises(InternalError, match="mp4 failed: no memory"):
        encode(MOVING, "mp4", fps=12)
