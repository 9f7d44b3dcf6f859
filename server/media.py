"""In what form an answer comes: a picture's format or a video's, how many frames, how fast. Pure."""

from dataclasses import dataclass
from typing import Literal

from engines.errors import InvalidRequest
from engines.manifest import StudentManifest, shown

OutputFormat = Literal["png", "webp", "jpeg", "mp4"]
OF_PICTURES: tuple[OutputFormat, ...] = ("png", "webp", "jpeg")
OF_VIDEOS: tuple[OutputFormat, ...] = ("webp", "mp4")  # the first is what a worker writes without an extra


@dataclass(frozen=True, slots=True)
class Media:
    """What a request says of it; `AS_IT_IS` says nothing. None is the student's own.

    `accepted`: where no format is named, the first of these that the student has. `sayable` are those that could be
    named at all.
    """

    output_format: OutputFormat | None = None
    num_frames: int | None = None
    fps: int | None = None
    accepted: tuple[OutputFormat, ...] = ()
    sayable: tuple[OutputFormat, ...] = (*OF_PICTURES, "mp4")


@dataclass(frozen=True, slots=True)
class Form:
    """What the answer is. `fps` is None of a picture."""

    output_format: OutputFormat = "png"
    fps: int | None = None


AS_IT_IS, PNG = Media(), Form()


def formats(manifest: StudentManifest) -> tuple[OutputFormat, ...]:
    """What a student's pictures or videos may be; the first is meant where nothing is said."""
    return OF_VIDEOS if manifest.frames else OF_PICTURES


def form(media: Media, manifest: StudentManifest) -> Form:
    """
    Raises:
        InvalidRequest: the student makes nothing of that form.
    """
    name, frames, asked = shown(manifest.version), manifest.frames, media.num_frames
    known = formats(manifest)
    named = (media.output_format,) if media.output_format else media.accepted or known
    chosen = next((one for one in named if one in known), None)
    if chosen is None:
        kind = "videos" if frames else "single pictures"
        offered = " or ".join(one for one in known if one in media.sayable)
        raise InvalidRequest(
            f"output_format={' or '.join(named)}: {name} makes {kind}, ask for {offered}",
            param="output_format",
        )
    if asked not in (None, frames.number if frames else 1):
        made = f"videos of {frames.number} frames, ask for {frames.number}" if frames else "single pictures, ask for 1"
        raise InvalidRequest(f"num_frames={asked}: {name} makes {made} or leave it out", param="num_frames")
    if frames is None and media.fps is not None:
        raise InvalidRequest(f"fps={media.fps} is of videos: {name} makes single pictures, leave it out", param="fps")
    return Form(chosen, (media.fps or frames.fps) if frames else None)
