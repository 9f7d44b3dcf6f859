"""8-bit pixels to PNG, WebP or JPEG bytes. Torch-free; Pillow lets go of the GIL while it encodes."""

import io
from typing import Any

import numpy as np
from PIL import Image

from engines.errors import InvalidRequest


def encode(pixels: Any, format: str = "png", compression: int | None = None) -> bytes:
    """Bytes of one picture, uint8 [3, H, W] or [H, W, 3].

    `compression` 0..100 is the quality of WebP and JPEG (100 unless given); PNG is lossless and takes none.

    Raises:
        InvalidRequest: an unknown format, or pixels that are no picture.
    """
    picture = Image.fromarray(_upright(pixels))
    if compression is not None and not 0 <= compression <= 100:
        raise InvalidRequest(f"output_compression={compression} is outside 0..100", param="output_compression")
    quality = 100 if compression is None else compression
    out = io.BytesIO()
    if format == "png":
        picture.save(out, "PNG", compress_level=1)
    elif format == "webp":
        picture.save(out, "WEBP", quality=quality, method=1)
    elif format == "jpeg":
        picture.save(out, "JPEG", quality=quality, subsampling=0 if quality >= 90 else 2)
    else:
        raise InvalidRequest(f"output_format={format!r} is none of png, webp, jpeg", param="output_format")
    return out.getvalue()


def decode(data: bytes) -> Any:
    """uint8 [H, W, 3] of any picture that Pillow reads."""
    with Image.open(io.BytesIO(data)) as picture:
        return np.asarray(picture.convert("RGB"))


def _upright(pixels: Any) -> Any:
    array = np.asarray(pixels)
    if array.dtype != np.uint8 or array.ndim != 3 or 3 not in (array.shape[0], array.shape[2]):
        raise InvalidRequest(f"pixels must be uint8 [3, H, W] or [H, W, 3], not {array.dtype} {array.shape}")
    last = array.shape[2] == 3 and not (array.shape[0] == 3 and array.shape[1] != 3)
    return np.ascontiguousarray(array if last else array.transpose(1, 2, 0))
