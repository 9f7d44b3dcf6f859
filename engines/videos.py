"""8-bit frames to an animated WebP or an MP4. Torch-free; both encoders let go of the GIL while they work.

Pillow writes WebP by itself. MP4 is H.264 by PyAV, an extra (`fewstep[video]`) because its wheels hold x264, which is
under the GPL.
"""

import io
from typing import Any

import numpy as np
from PIL import Image

from engines.errors import InternalError, InvalidRequest, NotBuilt

_H264 = "libx264"
_BT709 = 1  # matrix, primaries and curve alike, by the numbers of ITU-T H.273
_LIMITED = 1  # levels 16..235
_CRF = 18  # x264's scale of 0 (lossless) to 51; from 18 on a difference is hard to see
_WORST_CRF = 51


def check(format: str) -> None:
    """
    Raises:
        NotBuilt: this process lacks what the format needs.
    """
    if format == "mp4":
        _av()


def writes(format: str) -> bool:
    """Whether `check` lets it pass."""
    try:
        check(format)
    except NotBuilt:
        return False
    return True


def encode(frames: Any, format: str, *, fps: int, compression: int | None = None) -> bytes:
    """Bytes of one video, frames uint8 [T, 3, H, W].

    `compression` 0..100 is the quality. Without it WebP is lossless, and MP4 such that a difference is hard to see.

    Raises:
        InvalidRequest: an unknown format, or a size that it cannot hold.
        NotBuilt: as `check`.
        InternalError: the encoder of MP4 failed.
    """
    if compression is not None and not 0 <= compression <= 100:
        raise InvalidRequest(f"output_compression={compression} is outside 0..100", param="output_compression")
    pixels = np.ascontiguousarray(np.asarray(frames).transpose(0, 2, 3, 1))
    if format == "webp":
        return _webp(pixels, fps, compression)
    if format == "mp4":
        return _mp4(pixels, fps, compression)
    raise InvalidRequest(f"output_format={format!r} is none of webp, mp4", param="output_format")


def _webp(pixels: Any, fps: int, compression: int | None) -> bytes:
    """Its times are whole milliseconds: rounded where each frame ends, so that errors do not add up."""
    first, *rest = [Image.fromarray(frame) for frame in pixels]
    ends = [round(1000 * (k + 1) / fps) for k in range(len(pixels))]
    shown_ms = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
    how = {"lossless": True, "quality": 0} if compression is None else {"quality": compression}
    out = io.BytesIO()
    first.save(out, "WEBP", save_all=True, append_images=rest, duration=shown_ms, loop=0, method=0, **how)
    return out.getvalue()


def _mp4(pixels: Any, fps: int, compression: int | None) -> bytes:
    """H.264 with 4:2:0 chroma, which is what every player knows."""
    av = _av()
    height, width = pixels.shape[1:3]
    if height % 2 or width % 2:
        raise InvalidRequest(f"an MP4 has even sides, not {width}x{height}: ask for webp", param="output_format")
    # At 0, x264 is lossless in a profile that players do not know.
    crf = _CRF if compression is None else max(1, round(_WORST_CRF * (100 - compression) / 100))
    try:
        return _h264(av, pixels, fps, crf)
    except av.FFmpegError as error:
        raise InternalError(f"the encoder of mp4 failed: {error}") from error


def _h264(av: Any, pixels: Any, fps: int, crf: int) -> bytes:
    """One thread: another encodes beside it. What a player needs first comes first, so that it begins at once."""
    height, width = pixels.shape[1:3]
    out = io.BytesIO()

    def again(*_: object) -> io.BytesIO:
        """Frames are read once more, to be moved behind their index."""
        return io.BytesIO(out.getvalue())

    with av.open(out, "w", format="mp4", options={"movflags": "faststart"}, io_open=again) as file:
        stream = file.add_stream(_H264, rate=fps, options={"crf": str(crf), "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt, stream.thread_count = width, height, "yuv420p", 1
        coded = stream.codec_context
        coded.colorspace = coded.color_primaries = coded.color_trc = _BT709
        coded.color_range = _LIMITED
        for frame in pixels:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            file.mux(stream.encode(picture.reformat(format="yuv420p", dst_colorspace=_BT709, dst_color_range=_LIMITED)))
        file.mux(stream.encode())
    return out.getvalue()


def _av() -> Any:
    """PyAV, once it is known to write H.264: builds of other hands may lack x264."""
    try:
        import av
    except ImportError:
        av = None
    if av is None or _H264 not in av.codecs_available:
        raise NotBuilt(
            "this worker writes no mp4, which needs PyAV with x264: install fewstep[video] there, or ask for "
            "output_format=webp",
            param="output_format",
        )
    return av
