"""Alignment counts what the caption states, and nothing else."""

import numpy as np
import pytest

from distill_jobs.evaluate import alignment
from distill_jobs.teachers.shapes.data import ABSENT, ATTRIBUTES


def test_it_is_the_share_of_stated_attributes_that_were_found() -> None:
    stated = np.array([[0, 1, 2], [1, 1, 1]])
    found = np.array([[0, 1, 0], [1, 1, 0]])
    assert alignment.accuracy(found, stated) == pytest.approx(4 / 6)


def test_what_a_caption_leaves_open_does_not_count() -> None:
    stated = np.array([[0, ABSENT], [1, ABSENT]])
    found = np.array([[0, 3], [0, 4]])
    assert alignment.accuracy(found, stated) == 0.5


def test_nothing_stated_has_no_accuracy() -> None:
    assert alignment.accuracy(np.zeros((0, 3), dtype=np.int64), np.zeros((0, 3), dtype=np.int64)) is None


def test_each_attribute_can_be_seen_apart() -> None:
    stated = np.zeros((4, len(ATTRIBUTES)), dtype=np.int64)
    stated[:, ATTRIBUTES.index("size_2")] = ABSENT
    found = stated.copy()
    found[0, ATTRIBUTES.index("colour_0")] = 5
    apart = alignment.by_attribute(found, stated, ATTRIBUTES)
    assert apart["colour_0"] == 0.75
    assert apart["kind_0"] == 1
    assert apart["size_2"] is None
