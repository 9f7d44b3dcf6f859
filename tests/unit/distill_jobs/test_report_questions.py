"""The evaluation asks every generator the same, and a short one part of a long one."""

import numpy as np
import pytest

from distill_jobs.evaluate.questions import HELD_OUT_EVERY, questions, real_set
from distill_jobs.teachers.shapes.data import HELD_OUT


@pytest.mark.parametrize("n", [7, 80, 250])
def test_a_short_list_is_the_start_of_a_long_one(n: int) -> None:
    short, long = questions(n), questions(400)
    assert short.captions == long.captions[:n]
    assert short.seeds == long.seeds[:n]
    assert short.other_seeds == long.other_seeds[:n]
    np.testing.assert_array_equal(short.attributes, long.attributes[:n])
    np.testing.assert_array_equal(short.groups, long.groups[:n])


def test_every_caption_is_asked_twice_with_different_seeds() -> None:
    asked = questions(200)
    assert asked.captions[::2] == asked.captions[1::2]
    assert len({*asked.seeds, *asked.other_seeds}) == 400
    assert np.bincount(asked.groups).tolist() == [2] * 100


def test_one_caption_in_eight_shows_an_unseen_combination() -> None:
    asked = questions(1600)
    assert asked.heldout.mean() == pytest.approx(1 / HELD_OUT_EVERY)
    for scene, heldout in zip(asked.scenes, asked.heldout, strict=True):
        assert heldout == any((shape.colour, shape.kind) in HELD_OUT for shape in scene.shapes)


def test_another_seed_asks_other_captions() -> None:
    first, second = questions(200, seed=0), questions(200, seed=1)
    assert len({*first.captions} & {*second.captions}) < 60
    assert not {*first.seeds, *first.other_seeds} & {*second.seeds, *second.other_seeds}


def test_real_answers_can_be_drawn_again() -> None:
    asked = questions(20)
    np.testing.assert_array_equal(asked.draw(0, 32), asked.draw(0, 32))
    assert (asked.draw(0, 32) != asked.draw(1, 32)).any()
    assert (asked.draw(0, 32)[0] != asked.draw(0, 32)[1]).any()  # two pictures of one caption


def test_the_real_set_is_fixed() -> None:
    np.testing.assert_array_equal(real_set(10, 32), real_set(10, 32))
