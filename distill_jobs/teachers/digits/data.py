"""Captioned pictures of handwritten digits: real scans in coloured ink on coloured paper.

What is real is the writing: which scan is shown is drawn at random, and that is most of what a caption leaves open. A
scan counts the ink in cells of 4×4 pixels; interpolated and cut at about half it becomes a stroke again. It is turned,
slanted and moved a little, so that there are more pictures than scans.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from distill_jobs.tasks.base import ABSENT, Pictures, Split, pictures_of
from distill_jobs.teachers.digits import scans

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
INKS = ("red", "orange", "green", "cyan", "purple", "pink")
PAPERS = ("white", "yellow", "grey", "black")
SIZES = ("small", "large")
PLACES = ("left", "right", "top", "bottom", "centre")

ATTRIBUTES = ("digit", "ink", "paper", "size", "place")
CLASSES = (len(DIGITS), len(INKS), len(PAPERS), len(SIZES), len(PLACES))
WORDS = (DIGITS, INKS, PAPERS, SIZES, PLACES)

HELD_OUT = frozenset(
    (DIGITS.index(digit), INKS.index(ink))
    for digit, ink in (
        ("zero", "purple"),
        ("two", "pink"),
        ("three", "red"),
        ("four", "cyan"),
        ("five", "green"),
        ("seven", "orange"),
        ("eight", "cyan"),
        ("nine", "purple"),
    )
)
"""(digit, ink) pairs that the split "train" never shows."""

_INK_RGB = np.array(
    [[204, 44, 40], [226, 120, 20], [30, 140, 66], [24, 160, 190], [122, 62, 176], [228, 96, 160]], dtype=np.float32
)
_PAPER_RGB = np.array([[238, 238, 236], [244, 226, 150], [172, 174, 178], [34, 34, 38]], dtype=np.float32)
_SHADE_LEVELS = 8.0  # of ink and paper, each from picture to picture
# Shares of the picture's side, so that a picture looks the same at any size.
_SIDES = np.array([[0.50, 0.56], [0.74, 0.82]], dtype=np.float32)  # of a whole scan, small and large
_PLACE_XY = np.array([[-1, 0], [1, 0], [0, -1], [0, 1], [0, 0]], dtype=np.float32)
_REACH = np.array([0.19, 0.08], dtype=np.float32)  # how far a place is from the middle, small and large
_JITTER = 0.02
_TURN, _SLANT = 0.12, 0.15  # radians, and width per height
_CUT, _CUT_SPREAD = 0.42, 0.06  # share of ink at which a stroke ends: thinner and thicker pens
_EDGE_CELLS = 0.55  # width of a stroke's edge
_CHUNK = 256


@dataclass(frozen=True, slots=True)
class Scene:
    """What one caption says: class indices, `ABSENT` where it is silent."""

    caption: str
    digit: int
    ink: int
    paper: int
    size: int
    place: int

    @property
    def heldout(self) -> bool:
        return (self.digit, self.ink) in HELD_OUT

    def attributes(self) -> list[int]:
        return [self.digit, self.ink, self.paper, self.size, self.place]


def scenes(n: int, seed: int, split: Split = "train") -> list[Scene]:
    rng = np.random.default_rng([seed, 3])
    everything = [(digit, ink) for digit in range(len(DIGITS)) for ink in range(len(INKS))]
    pool = [pair for pair in everything if split == "all" or (pair in HELD_OUT) == (split == "heldout")]
    pairs = rng.integers(len(pool), size=n).tolist()
    rest = rng.integers(0, CLASSES[2:], size=(n, 3))
    said = np.where(rng.random((n, 3)) < (0.7, 0.6, 0.6), rest, ABSENT).tolist()
    wordings = rng.integers(3, size=n).tolist()
    return [_scene(pool[pair], row, wording) for pair, row, wording in zip(pairs, said, wordings, strict=True)]


def draw(batch: Sequence[Scene], seed: int, size: int = 32) -> Pictures:
    """One picture of each scene; another seed shows another scan and fills in what the caption leaves open."""
    rng = np.random.default_rng([seed, 4])
    pixels = np.empty((len(batch), 3, size, size), dtype=np.uint8)
    drawn = pictures_of(pixels, batch)
    for start in range(0, len(batch), _CHUNK):
        part = slice(start, start + _CHUNK)
        pixels[part] = _paint(drawn.attributes[part], rng, size)
    return drawn


# --- captions --------------------------------------------------------------------------------------------------------


def _scene(pair: tuple[int, int], said: Sequence[int], wording: int) -> Scene:
    (digit, ink), (paper, size, place) = pair, said
    return Scene(_caption(digit, ink, paper, size, place, wording), digit, ink, paper, size, place)


def _caption(digit: int, ink: int, paper: int, size: int, place: int, wording: int) -> str:
    """One of the phrasings of a scene, at most 14 words."""
    big = "" if size == ABSENT else f"{SIZES[size]} "
    if wording == 0:
        text = f"{_article(big or INKS[ink])} {big}{INKS[ink]} {DIGITS[digit]}"
    elif wording == 1:
        text = f"a {big}handwritten {DIGITS[digit]} in {INKS[ink]}"
    else:
        text = f"the {big}digit {DIGITS[digit]} in {INKS[ink]} ink"
    if place != ABSENT:
        text += f" {'in' if PLACES[place] == 'centre' else 'at' if wording else 'on'} the {PLACES[place]}"
    return text if paper == ABSENT else f"{text} on {PAPERS[paper]} paper"


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


# --- pictures --------------------------------------------------------------------------------------------------------


def _paint(attributes: Ints, rng: np.random.Generator, size: int) -> npt.NDArray[np.uint8]:
    """[n, 3, size, size] of attributes [n, A]: paper, and ink where the stroke covers it."""
    n = len(attributes)
    random = rng.integers(0, np.array(CLASSES), size=attributes.shape)
    digit, ink, paper, big, place = np.where(attributes == ABSENT, random, attributes).T
    known = scans.load()
    rows = [known.rows(int(one)) for one in digit]
    chosen = np.array([row[int(die * len(row))] for row, die in zip(rows, rng.random(n), strict=True)], dtype=np.int64)
    stroke = _stroke(known.cells[chosen], _placed(big, place, rng), rng, size)[:, None]  # [n, 1, H, W]
    shades = rng.uniform(-_SHADE_LEVELS, _SHADE_LEVELS, size=(2, n, 1)).astype(np.float32)
    ground, colour = _PAPER_RGB[paper] + shades[0], _INK_RGB[ink] + shades[1]  # [n, 3]
    mixed = ground[:, :, None, None] * (1 - stroke) + colour[:, :, None, None] * stroke
    painted: npt.NDArray[np.uint8] = (mixed + 0.5).clip(0, 255).astype(np.uint8)
    return painted


def _placed(big: Ints, place: Ints, rng: np.random.Generator) -> Floats:
    """[n, 2, 3]: from the picture's coordinates, −1..1 across, to the scan's."""
    n = len(big)
    low, high = _SIDES[big].T
    side = low + (high - low) * rng.random(n, dtype=np.float32)
    jitter = rng.uniform(-_JITTER, _JITTER, size=(n, 2)).astype(np.float32)
    centre = 2 * (_PLACE_XY[place] * _REACH[big][:, None] + jitter)
    turn = rng.uniform(-_TURN, _TURN, size=n).astype(np.float32)
    slant = rng.uniform(-_SLANT, _SLANT, size=n).astype(np.float32)
    cos, sin = np.cos(turn), np.sin(turn)
    linear = np.stack([cos, sin + slant * cos, -sin, cos - slant * sin], 1).reshape(n, 2, 2) / side[:, None, None]
    return np.concatenate([linear, -linear @ centre[:, :, None]], 2).astype(np.float32)


def _stroke(cells: npt.NDArray[np.uint8], affine: Floats, rng: np.random.Generator, size: int) -> Floats:
    """How much of each pixel is inked [n, size, size]."""
    share = torch.from_numpy(cells[:, None].astype(np.float32) / scans.MOST_INK)
    grid = F.affine_grid(torch.from_numpy(affine), [len(cells), 1, size, size], align_corners=False)
    found = F.grid_sample(share, grid, mode="bicubic", padding_mode="zeros", align_corners=False)[:, 0]
    cut = (_CUT + _CUT_SPREAD * rng.uniform(-1, 1, size=(len(cells), 1, 1))).astype(np.float32)
    inked: Floats = (0.5 + (found.numpy() - cut) / _EDGE_CELLS).clip(0, 1)
    return inked
