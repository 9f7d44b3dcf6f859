"""The contact sheet holds every picture, and survives any caption."""

import io

import numpy as np
from PIL import Image

from distill_jobs.evaluate.sheet import sheet
from distill_jobs.teachers.shapes import data


def opened(png: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(png))
    assert image.format == "PNG"
    return image


def test_it_grows_with_its_rows_and_columns() -> None:
    pictures = data.sample(4, 0).pixels
    captions = ["a red circle"] * 4
    one, two = (opened(sheet([("student", pictures)] * rows, captions)) for rows in (1, 2))
    assert two.height - one.height > 100
    assert one.width == two.width > opened(sheet([("student", pictures)], captions[:2])).width


def test_a_picture_is_shown_in_its_row_and_column() -> None:
    red, blue = np.zeros((1, 3, 16, 16), dtype=np.uint8), np.zeros((1, 3, 16, 16), dtype=np.float32)
    red[:, 0], blue[:, 2] = 200, 199.6
    found = np.asarray(opened(sheet([("a", red), ("b", blue)], ["c"])))
    rows_red = np.flatnonzero((found == (200, 0, 0)).all(-1).any(1))
    rows_blue = np.flatnonzero((found == (0, 0, 200)).all(-1).any(1))
    assert len(rows_red) == len(rows_blue) > 100
    assert rows_red.max() < rows_blue.min()


def test_long_captions_and_labels_are_wrapped() -> None:
    picture = data.sample(1, 0).pixels
    short, long = (opened(sheet([(text, picture)], [text])) for text in ("dot", "an extraordinarily long caption " * 4))
    assert short.width == long.width
    assert long.height > short.height
