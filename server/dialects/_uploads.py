"""What the forms of both dialects say of a picture to change: the picture, its mask, and how much."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

from engines.errors import InvalidRequest
from server.uploads import Upload

IMAGE = "The picture to change: PNG, WebP or JPEG. It is scaled until it covers the size, and cut. May be named image[]"
MASK = "A PNG or WebP as large as the image, transparent where it may change; the rest of the picture stays"
Strength = Annotated[
    float, Meta(gt=0, le=1, description="The share of the steps that is taken, rounded down: 1 changes most")
]
_CHANGED, _MASKED = 0.75, 1.0
"""The strength that is meant where none is given: of a whole picture, and of what a mask leaves open."""


@dataclass(frozen=True, slots=True)
class Changed:
    upload: Upload
    strength: float


def upload_of(files: Mapping[str, bytes], strength: float | None, max_pixels: int) -> Changed:
    """The picture of a form.

    Raises:
        InvalidRequest and below: it is missing, no picture or too large.
    """
    if "image" not in files:
        raise InvalidRequest("field 'image' is required: send the picture to change as a file", param="image")
    upload = Upload(files["image"], files.get("mask"))
    upload.check(max_pixels)
    return Changed(upload, strength if strength is not None else _CHANGED if upload.mask is None else _MASKED)
