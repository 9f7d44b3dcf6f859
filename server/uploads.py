"""Pictures that clients send to be changed: what they are, and how they reach a worker.

Nothing in them is trusted. A picture is known by its first bytes, never by its name; its size is read from its head and
held against a limit before a pixel is unpacked; and what goes on is raw pixels of the size that is made, so that a
worker unpacks nothing and no upload is larger in the queue than the picture it becomes.
"""

import asyncio
import io
import struct
import zlib
from dataclasses import dataclass

from PIL import Image, ImageOps

from engines.errors import ImageTooLarge, InvalidRequest, UnsupportedImage

FORMATS = ("PNG", "WEBP", "JPEG")
CHANGES_BELOW = 128
"""A pixel may change whose share that stays is below this, of 255."""
# What Pillow raises over bytes that are no picture, of its own or not.
_BROKEN = (OSError, SyntaxError, ValueError, LookupError, EOFError, struct.error, zlib.error)
_WHITE = (255, 255, 255, 255)
_AT_ONCE = 2  # an upload of the largest size takes 64 MiB while it is unpacked


@dataclass(frozen=True, slots=True)
class Upload:
    """The bytes of a picture to change and, where a mask came with it, of that: transparent is what may change."""

    image: bytes
    mask: bytes | None = None

    def check(self, max_pixels: int) -> None:
        """Looks at the heads of both.

        Raises:
            UnsupportedImage, ImageTooLarge, InvalidRequest: which of the two, and what is wrong with it.
        """
        size = _opened(self.image, "image", max_pixels).size
        if self.mask is not None:
            mask = _opened(self.mask, "mask", max_pixels)
            if sorted(mask.size) != sorted(size):  # which way up they are is known once they are unpacked
                raise _differ(mask.size, size)

    def fitted(self, width: int, height: int, max_pixels: int) -> bytes:
        """Raw levels of what a worker changes: [height, width, 3], or with a mask [height, width, 4], whose last is the
        share that stays.

        A picture stands as its EXIF says, on white where it is transparent; it is scaled until it covers the size, and
        what is over at two sides is cut off.

        Raises:
            InvalidRequest: it cannot be unpacked, or the mask is none.
        """
        picture = _upright(self.image, "image", max_pixels)
        whole = Image.alpha_composite(Image.new("RGBA", picture.size, _WHITE), picture.convert("RGBA")).convert("RGB")
        scaled = ImageOps.fit(whole, (width, height), Image.Resampling.LANCZOS)
        if self.mask is None:
            return scaled.tobytes()
        stays = _stays(self.mask, picture.size, max_pixels)
        share = ImageOps.fit(stays, (width, height), Image.Resampling.BILINEAR)
        if not any(share.histogram()[:CHANGES_BELOW]):
            raise InvalidRequest(
                "the mask is transparent nowhere: nothing may change. Make transparent what is to be changed",
                param="mask",
            )
        scaled.putalpha(share)
        return scaled.tobytes()


class Unpacking:
    """Unpacks uploads beside the event loop, a few at a time."""

    def __init__(self, max_pixels: int) -> None:
        self.max_pixels = max_pixels
        self._places = asyncio.Semaphore(_AT_ONCE)

    async def fitted(self, upload: Upload, width: int, height: int) -> bytes:
        """`Upload.fitted`, which raises the same."""
        async with self._places:
            return await asyncio.to_thread(upload.fitted, width, height, self.max_pixels)


def _opened(data: bytes, field: str, max_pixels: int) -> Image.Image:
    """A picture of which no more than the head was read."""
    try:
        found: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(field, str(error), max_pixels) from None
    except _BROKEN:
        begins = f"it begins with {data[:8].hex(' ')}" if data else "it is empty"
        raise UnsupportedImage(f"{field} is no PNG, WebP or JPEG: {begins}", param=field) from None
    if found.width * found.height > max_pixels:
        raise _too_large(field, f"it has {found.width} x {found.height} pixels", max_pixels)
    if found.mode.startswith(("I", "F")):
        raise UnsupportedImage(f"{field} has more than 8 bits a channel ({found.mode}): send 8", param=field)
    return found


def _upright(data: bytes, field: str, max_pixels: int) -> Image.Image:
    """A picture unpacked, as its EXIF says that it stands."""
    found = _opened(data, field, max_pixels)
    try:
        found.load()
        return ImageOps.exif_transpose(found)
    except _BROKEN as error:
        raise InvalidRequest(f"{field} is a broken {found.format}: {error}", param=field) from None


def _stays(data: bytes, size: tuple[int, int], max_pixels: int) -> Image.Image:
    """The share of each pixel that stays: the mask's opacity."""
    mask = _upright(data, "mask", max_pixels)
    if mask.size != size:
        raise _differ(mask.size, size)
    if not mask.has_transparency_data:
        raise InvalidRequest(
            f"the mask has no transparency ({mask.format} {mask.mode}): it is a PNG or WebP that is transparent where "
            "the picture may change, whatever its colours",
            param="mask",
        )
    return mask.convert("RGBA").getchannel("A")


def _differ(mask: tuple[int, int], image: tuple[int, int]) -> InvalidRequest:
    return InvalidRequest(
        f"the mask has {mask[0]} x {mask[1]} pixels and the image {image[0]} x {image[1]}: they must be as large",
        param="mask",
    )


def _too_large(field: str, what: str, max_pixels: int) -> ImageTooLarge:
    return ImageTooLarge(f"{field} is too large: {what}, {max_pixels} are taken at most; scale it down", param=field)
