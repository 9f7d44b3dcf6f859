"""The handwritten digits: the scans are those that the package ships, and pictures show what captions say."""

import numpy as np
import pytest

from distill_jobs.tasks.digits import TASK
from distill_jobs.teachers.digits import data, scans


def test_the_shipped_scans_are_those_of_scikit_learn() -> None:
    pytest.importorskip("sklearn")
    theirs, ours = scans.from_scikit_learn(), scans.load()
    assert np.array_equal(ours.cells, theirs.cells)
    assert np.array_equal(ours.labels, theirs.labels)
    assert ours.cells.max() == scans.MOST_INK


def test_captions_say_what_the_attributes_say() -> None:
    named = (data.DIGITS, data.INKS, data.PAPERS, data.SIZES, data.PLACES)
    for scene in data.scenes(2_000, 2, "all"):
        said = [word for word in scene.caption.split() if any(word in words for words in named)]
        stated = [words[c] for words, c in zip(named, scene.attributes(), strict=True) if c >= 0]
        assert sorted(said) == sorted(stated)


@pytest.mark.parametrize("size", [32, 64])
def test_a_place_and_an_ink_are_drawn_as_they_are_said(size: int) -> None:
    left, right = data.PLACES.index("left"), data.PLACES.index("right")
    scenes = [data.Scene("", 0, data.INKS.index("red"), 0, 0, place) for place in (left, right)] * 20
    pixels = data.draw(scenes, 1, size).pixels.astype(float)
    inked = (pixels[:, 0] - pixels[:, 1]).clip(0)  # red ink on white paper
    centre = (inked.sum(1) * np.arange(size)).sum(1) / inked.sum((1, 2)) / size
    assert (centre[::2] < 0.42).all()
    assert (centre[1::2] > 0.58).all()


def test_a_digit_is_written_in_many_ways() -> None:
    scene = data.Scene("", 3, 0, 0, 1, data.PLACES.index("centre"))
    pixels = data.draw([scene] * 40, 1).pixels.astype(float)
    assert len(np.unique(pixels.reshape(40, -1), axis=0)) == 40
    assert np.abs(pixels[::2] - pixels[1::2]).mean() > 10


def test_no_stroke_is_cut_by_the_picture_s_edge_in_the_middle() -> None:
    scene = data.Scene("", 8, 0, 0, 1, data.PLACES.index("centre"))
    pixels = data.draw([scene] * 100, 2).pixels.astype(int)
    border = np.concatenate([pixels[:, :, 0], pixels[:, :, -1], pixels[:, :, :, 0], pixels[:, :, :, -1]], 2)
    assert np.ptp(border, axis=2).max() <= 2


def test_the_task_draws_pictures_of_its_own_size() -> None:
    assert TASK.sample(2, 0, split="heldout").pixels.shape == (2, 3, 32, 32)
