"""The captioned pictures: what their captions say is what is drawn, and training never sees what is held out."""

import sys
import time
from pathlib import Path

import numpy as np
import pytest

from distill_jobs.tasks.shapes import TASK
from distill_jobs.teachers import contact_sheet
from distill_jobs.teachers.shapes import data


def test_the_same_seed_draws_the_same_pictures_and_another_does_not() -> None:
    first, second, other = data.sample(64, 7), data.sample(64, 7), data.sample(64, 8)
    assert np.array_equal(first.pixels, second.pixels)
    assert first.captions == second.captions
    assert not np.array_equal(first.pixels, other.pixels)


def test_captions_can_be_had_without_drawing() -> None:
    assert TASK.captions(32, 3) == data.sample(32, 3).captions


def test_drawing_is_fast_enough(capsys: pytest.CaptureFixture[str]) -> None:
    started = time.process_time()
    data.sample(2_000, 0)
    rate = 2_000 / (time.process_time() - started)
    with capsys.disabled():
        sys.stdout.write(f"\n{rate:.0f} pictures/s on one core\n")
    assert rate > 500, "far below what an idle core does"


def test_training_never_shows_a_held_out_pair_and_held_out_scenes_always_do() -> None:
    assert not any(scene.heldout for scene in data.scenes(5_000, 1, "train"))
    assert all(scene.heldout for scene in data.scenes(500, 1, "heldout"))
    share = np.mean([scene.heldout for scene in data.scenes(5_000, 1, "all")])
    assert 0.1 < share < 0.5


def test_captions_say_what_the_attributes_say() -> None:
    for scene in data.scenes(2_000, 2, "all"):
        words = scene.caption.split()
        kinds = [data.KINDS[shape.kind] for shape in scene.shapes]
        assert sorted(word for word in words if word in data.KINDS) == sorted(kinds)
        for shape in scene.shapes:
            noun = f"{data.COLOURS[shape.colour]} {data.KINDS[shape.kind]}"
            size = "" if shape.size == data.ABSENT else f"{data.SIZES[shape.size]} "
            assert size + noun in scene.caption
        stated = scene.background != data.ABSENT
        assert stated == any(scene.caption.endswith((f"on a {b}", f"on a {b} background")) for b in data.BACKGROUNDS)


def test_attributes_are_in_range_and_silent_where_the_caption_is() -> None:
    pictures = data.sample(1_000, 4, split="all")
    assert pictures.attributes.shape == (1_000, len(data.ATTRIBUTES))
    assert len(data.CLASSES) == len(data.ATTRIBUTES)
    assert (pictures.attributes >= data.ABSENT).all()
    assert (pictures.attributes < np.array(data.CLASSES)).all()
    alone = pictures.attributes[:, 0] == 0
    assert (pictures.attributes[alone][:, data.ATTRIBUTES.index("kind_1")] == data.ABSENT).all()


def test_captions_fit_the_text_encoder() -> None:
    assert max(len(scene.caption.split()) for scene in data.scenes(20_000, 5, "all")) <= 22


@pytest.mark.parametrize("size", [32, 64])
def test_a_red_circle_on_the_left_is_red_on_the_left(size: int) -> None:
    shape = data.Shape(data.KINDS.index("circle"), data.COLOURS.index("red"), data.SIZES.index("large"), 0)
    scene = data.Scene("a large red circle on the left on a white background", (shape,), 0)
    picture = data.draw([scene], 1, size=size).pixels[0].astype(int)
    red, green, blue = picture[:, size // 2, size // 4]
    assert red > green + 80
    assert red > blue + 80
    assert picture[:, size // 2, -size // 8].min() > 200


def test_another_drawing_of_a_scene_keeps_what_is_said_and_varies_the_rest() -> None:
    scene = data.scenes(1, 9)[0]
    first, second = data.draw([scene], 1), data.draw([scene], 2)
    assert np.array_equal(first.attributes, second.attributes)
    assert not np.array_equal(first.pixels, second.pixels)


def test_every_kind_of_shape_is_drawn_whole() -> None:
    """Nothing of a shape is cut by the patch it is drawn in: its outermost ring stays background."""
    for kind in range(len(data.KINDS)):
        shape = data.Shape(kind, 0, data.SIZES.index("large"), data.PLACES.index("centre"))
        picture = data.draw([data.Scene("", (shape,), 0)] * 20, kind).pixels.astype(int)
        away = np.abs(picture - picture[:, :, :1, :1]).max(axis=1) > 8  # [N, H, W]
        assert not away[:, :14].any()
        assert not away[:, -14:].any()
        assert 200 < away.sum(axis=(1, 2)).mean() < 700


def test_a_sheet_is_a_png(tmp_path: Path) -> None:
    pictures = data.sample(6, 0)
    tiles = contact_sheet.tile(pictures.pixels, 4)
    assert tiles.shape == (3, 128, 256)
    contact_sheet.write_png(tiles, tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")
