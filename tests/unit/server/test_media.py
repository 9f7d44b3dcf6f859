"""Which form an answer takes, and what is said to who asks for another."""

import pytest

from engines.errors import InvalidRequest
from engines.frames import Frames
from server.media import OF_PICTURES, Form, Media, form
from tests.unit.server.manifests import manifest

PICTURES = manifest("shapes", 4)
VIDEOS = manifest("wan", 4).model_copy(update={"frames": Frames(number=9, per_latent=4, fps=16)})


def test_what_is_not_said_is_the_student_s_own() -> None:
    assert form(Media(), PICTURES) == Form("png", None)
    assert form(Media(), VIDEOS) == Form("webp", 16)
    assert form(Media("jpeg", 1), PICTURES) == Form("jpeg", None)
    assert form(Media("mp4", 9, 24), VIDEOS) == Form("mp4", 24)


def test_of_the_accepted_formats_the_first_that_the_student_has_is_taken() -> None:
    assert form(Media(accepted=("png", "webp", "jpeg")), VIDEOS) == Form("webp", 16)
    assert form(Media(accepted=("png", "mp4")), VIDEOS) == Form("mp4", 16)
    assert form(Media(accepted=("mp4", "jpeg", "png")), PICTURES) == Form("jpeg", None)
    assert form(Media("webp", accepted=("mp4", "webp")), VIDEOS) == Form("webp", 16)


@pytest.mark.parametrize(
    ("media", "student", "said", "param"),
    [
        (Media("mp4"), PICTURES, "single pictures, ask for png or webp or jpeg", "output_format"),
        (Media(accepted=("png", "jpeg")), VIDEOS, "png or jpeg.*videos, ask for webp or mp4", "output_format"),
        (Media("png"), VIDEOS, "videos, ask for webp or mp4", "output_format"),
        (Media(num_frames=9), PICTURES, "single pictures, ask for 1", "num_frames"),
        (Media(num_frames=5), VIDEOS, "num_frames=5.*ask for 9", "num_frames"),
        (Media(num_frames=1), VIDEOS, "num_frames=1.*ask for 9", "num_frames"),
        (Media(fps=8), PICTURES, "fps=8 is of videos", "fps"),
    ],
)
def test_another_form_is_refused_with_the_ones_that_there_are(
    media: Media, student: object, said: str, param: str
) -> None:
    with pytest.raises(InvalidRequest, match=said) as raised:
        form(media, student)  # type: ignore[arg-type]
    assert raised.value.param == param


def test_a_format_that_a_dialect_has_not_is_not_offered() -> None:
    with pytest.raises(InvalidRequest, match=r"ask for webp$"):
        form(Media("png", sayable=OF_PICTURES), VIDEOS)
