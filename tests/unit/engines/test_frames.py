"""The time axis of a student of videos."""

import pytest
from pydantic import ValidationError

from engines.errors import InvalidRequest
from engines.frames import Frames, of

OWN = Frames(number=81, per_latent=4, fps=16)


def test_the_first_latent_is_a_frame_and_each_other_one_several() -> None:
    assert (OWN.latents, Frames(number=5, per_latent=4, fps=16).latents) == (21, 2)
    with pytest.raises(ValidationError, match="multiple of 4"):
        Frames(number=80, per_latent=4, fps=16)


def test_a_student_has_the_pipeline_s_own_frames_or_so_many_as_were_asked_for() -> None:
    assert of(OWN, None) == OWN
    assert of(OWN, 33) == Frames(number=33, per_latent=4, fps=16)
    assert of(OWN, 1) is None
    assert of(None, None) is None
    assert of(None, 1) is None


def test_a_number_that_no_latents_make_is_refused_with_its_neighbours() -> None:
    with pytest.raises(InvalidRequest, match="give 17 or 21"):
        of(OWN, 20)
    with pytest.raises(InvalidRequest, match="single pictures"):
        of(None, 9)
