"""Captioned pictures of flat shapes, drawn from signed distances: the endless, exactly checkable data of the teacher.

A `Scene` is what a caption says and nothing else. Drawing fills in what the caption leaves open (jitter, an unnamed
size, place or background), so that several drawings of one scene are the real pictures of one caption.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from distill_jobs.tasks.base import ABSENT, Pictures, Split, pictures_of
from distill_jobs.teachers.shapes import outlines

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

KINDS = outlines.KINDS
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SIZES = ("small", "large")
PLACES = ("left", "right", "top", "bottom", "centre")
BACKGROUNDS = ("white", "grey", "black", "white over grey", "grey over black")
MAX_SHAPES = 3

SLOT_ATTRIBUTES = ("kind", "colour", "size", "place")
ATTRIBUTES = ("count", "background", *(f"{name}_{slot}" for slot in range(MAX_SHAPES) for name in SLOT_ATTRIBUTES))
"""Columns of `Pictures.attributes`; slots are in reading order: left before right, top before bottom."""
CLASSES = (MAX_SHAPES, len(BACKGROUNDS), *(len(KINDS), len(COLOURS), len(SIZES), len(PLACES)) * MAX_SHAPES)
"""Number of classes of each column; `count` is stored as shapes − 1."""
WORDS = ((), BACKGROUNDS, *(KINDS, COLOURS, SIZES, PLACES) * MAX_SHAPES)
"""Names of those classes in captions."""

HELD_OUT = frozenset(
    (COLOURS.index(colour), KINDS.index(kind))
    for colour, kind in (
        ("orange", "circle"),
        ("purple", "square"),
        ("green", "triangle"),
        ("blue", "ring"),
        ("yellow", "cross"),
        ("pink", "triangle"),
    )
)
"""(colour, kind) pairs that the split "train" never shows."""

_RGB = np.array(
    [
        [214, 56, 48],
        [240, 140, 40],
        [240, 214, 60],
        [60, 164, 76],
        [72, 200, 214],
        [56, 92, 206],
        [134, 70, 176],
        [240, 140, 190],
    ],
    dtype=np.float32,
)
_WHITE, _GREY, _BLACK = ((level,) * 3 for level in (236.0, 150.0, 40.0))
_BACKGROUND_RGB = np.array(  # upper and lower half
    [[_WHITE, _WHITE], [_GREY, _GREY], [_BLACK, _BLACK], [_WHITE, _GREY], [_GREY, _BLACK]], dtype=np.float32
)
# Everything below is a share of the picture's side, so that a scene looks the same at any size.
_RADII = np.array([[8.0, 9.0], [12.0, 13.5]], dtype=np.float32) / 64
_CENTRES = np.array([[17, 32], [47, 32], [32, 17], [32, 47], [32, 32]], dtype=np.float32) / 64
_WIDE_CENTRES = np.array([[12, 32], [52, 32], [32, 12], [32, 52], [32, 32]], dtype=np.float32) / 64
_JITTER = 2.0 / 64
_PATCH = 0.5  # side of the square in which a shape is drawn; holds the largest radius, its edge and its jitter
_CHUNK = 64  # pictures drawn at once: small enough to stay in the cache

_ROW = tuple(PLACES.index(name) for name in ("left", "centre", "right"))
_COLUMN = tuple(PLACES.index(name) for name in ("top", "centre", "bottom"))


@dataclass(frozen=True, slots=True)
class Shape:
    """One shape as its caption has it: class indices, `ABSENT` where the caption is silent."""

    kind: int
    colour: int
    size: int
    place: int


@dataclass(frozen=True, slots=True)
class Scene:
    """What one caption says: its shapes in reading order and its background."""

    caption: str
    shapes: tuple[Shape, ...]
    background: int

    @property
    def heldout(self) -> bool:
        return any((shape.colour, shape.kind) in HELD_OUT for shape in self.shapes)

    def attributes(self) -> list[int]:
        slots = [value for s in self.shapes for value in (s.kind, s.colour, s.size, s.place)]
        missing = MAX_SHAPES - len(self.shapes)
        return [len(self.shapes) - 1, self.background, *slots, *[ABSENT] * (len(SLOT_ATTRIBUTES) * missing)]


def sample(n: int, seed: int, *, size: int = 64, split: Split = "train") -> Pictures:
    """Draws `n` pictures of `n` new scenes."""
    return draw(scenes(n, seed, split), seed, size)


def scenes(n: int, seed: int, split: Split = "train") -> list[Scene]:
    rng = np.random.default_rng([seed, 1])
    pools = {name: _combinations(name) for name in ("train", "heldout", "all")}
    counts = rng.choice(MAX_SHAPES, size=n, p=(0.45, 0.45, 0.10)) + 1
    dice = rng.random((n, 4 + 4 * MAX_SHAPES)).tolist()
    return [_scene(int(count), row, pools, split) for count, row in zip(counts, dice, strict=True)]


def draw(batch: Sequence[Scene], seed: int, size: int = 64) -> Pictures:
    """Draws each scene once; another seed fills in differently what the captions leave open."""
    rng = np.random.default_rng([seed, 2])
    pixels = np.empty((len(batch), 3, size, size), dtype=np.uint8)
    drawn = pictures_of(pixels, batch)
    for start in range(0, len(batch), _CHUNK):
        part = slice(start, start + _CHUNK)
        pixels[part] = _paint(drawn.attributes[part], rng, size)
    return drawn


# --- scenes and captions ---------------------------------------------------------------------------------------------


def _combinations(split: Split) -> list[tuple[int, int]]:
    everything = [(colour, kind) for colour in range(len(COLOURS)) for kind in range(len(KINDS))]
    return [pair for pair in everything if split == "all" or (pair in HELD_OUT) == (split == "heldout")]


def _pick(die: float, n: int) -> int:
    return min(int(die * n), n - 1)


def _scene(count: int, dice: list[float], pools: dict[str, list[tuple[int, int]]], split: Split) -> Scene:
    """One scene from uniform dice; "heldout" promises one unseen pair, the other shapes are free."""
    places = _places(count, dice[0])
    unseen = _pick(dice[1], count)
    shapes = []
    for slot in range(count):
        pair_die, size_die, say_size = dice[4 + 4 * slot : 7 + 4 * slot]
        pool = pools["all" if split == "heldout" and slot != unseen else split]
        colour, kind = pool[_pick(pair_die, len(pool))]
        named = count < MAX_SHAPES and say_size < 0.75
        shapes.append(Shape(kind, colour, _pick(size_die, len(SIZES)) if named else ABSENT, places[slot]))
    background = _pick(dice[2] / 0.8, len(BACKGROUNDS)) if dice[2] < 0.8 else ABSENT
    return Scene(_caption(shapes, background, _pick(dice[3], 4)), tuple(shapes), background)


def _places(count: int, die: float) -> list[int]:
    if count == 1:  # a lone shape may be anywhere, and its caption may leave that open
        return [_pick(die / 0.8, len(PLACES)) if die < 0.8 else ABSENT]
    line = _ROW if die < 0.5 else _COLUMN
    return list(line) if count == MAX_SHAPES else [line[0], line[2]]


def _caption(shapes: list[Shape], background: int, wording: int) -> str:
    """One of the phrasings of a scene, at most 22 words."""
    nouns = [_noun(shape) for shape in shapes]
    in_row = shapes[0].place == _ROW[0]
    if len(shapes) == 1:
        text = nouns[0] + _where(shapes[0].place, wording)
    elif len(shapes) == MAX_SHAPES:
        text = " and ".join(nouns) + (" in a row" if in_row else " in a column")
    elif wording % 2:
        text = f"{nouns[1]} {'right of' if in_row else 'below'} {nouns[0]}"
    else:
        text = f"{nouns[0]} {'left of' if in_row else 'above'} {nouns[1]}"
    if background == ABSENT:
        return text
    return f"{text} on a {BACKGROUNDS[background]}" + (" background" if wording < 3 else "")


def _noun(shape: Shape) -> str:
    size = "" if shape.size == ABSENT else f"{SIZES[shape.size]} "
    colour = COLOURS[shape.colour]
    article = "an" if not size and colour[0] in "aeiou" else "a"
    return f"{article} {size}{colour} {KINDS[shape.kind]}"


def _where(place: int, wording: int) -> str:
    if place == ABSENT:
        return ""
    name = PLACES[place]
    return f" in the {name}" if name == "centre" else f" {'at' if wording % 2 else 'on'} the {name}"


# --- drawing ---------------------------------------------------------------------------------------------------------


def _paint(attributes: Ints, rng: np.random.Generator, size: int) -> npt.NDArray[np.uint8]:
    """Draws one chunk: the background, then slot after slot, so that a later shape lies on top."""
    n = len(attributes)
    filled = _fill(attributes, rng)
    jitter = rng.uniform(-1, 1, size=(n, MAX_SHAPES, 2)).astype(np.float32) * _JITTER
    grow = rng.random((n, MAX_SHAPES), dtype=np.float32)
    canvas = _backdrop(filled[:, 1], rng, size)  # [n, H, W, 3]
    for slot in range(MAX_SHAPES):
        rows = np.flatnonzero(attributes[:, 0] >= slot)
        kind, colour, big, place = filled[rows, 2 + 4 * slot : 6 + 4 * slot].T
        spread = (filled[rows, 0] == MAX_SHAPES - 1)[:, None]
        centre = np.where(spread, _WIDE_CENTRES[place], _CENTRES[place]) + jitter[rows, slot]
        low, high = _RADII[big].T
        radius = low + (high - low) * grow[rows, slot]
        _stamp(canvas, rows, kind, _RGB[colour], centre * size, radius * size)
    return np.ascontiguousarray((canvas + 0.5).astype(np.uint8).transpose(0, 3, 1, 2))


def _fill(attributes: Ints, rng: np.random.Generator) -> Ints:
    """Attributes with every silent one drawn at random; three shapes are always small, or they would not fit."""
    random = rng.integers(0, np.array(CLASSES), size=attributes.shape)
    filled = np.where(attributes == ABSENT, random, attributes)
    three = attributes[:, 0] == MAX_SHAPES - 1
    sizes = [ATTRIBUTES.index(f"size_{slot}") for slot in range(MAX_SHAPES)]
    filled[np.ix_(three, sizes)] = SIZES.index("small")
    return filled


def _backdrop(background: Ints, rng: np.random.Generator, size: int) -> Floats:
    horizon = (0.5 + rng.uniform(-1, 1, size=len(background)) * _JITTER) * size
    rows = np.arange(size, dtype=np.float32) + 0.5
    lower = outlines.coverage((horizon[:, None] - rows).astype(np.float32))[:, :, None]  # [n, H, 1]
    top, bottom = _BACKGROUND_RGB[background].transpose(1, 0, 2)
    column = top[:, None] * (1 - lower) + bottom[:, None] * lower  # [n, H, 3]
    return np.repeat(column[:, :, None, :], size, axis=2)


def _stamp(canvas: Floats, rows: Ints, kind: Ints, rgb: Floats, centre: Floats, radius: Floats) -> None:
    """Blends one shape into each named row of `canvas`, touching only the patch round its centre."""
    size = canvas.shape[1]
    patch = int(_PATCH * size)
    corner = np.clip(np.rint(centre - patch / 2).astype(np.int64), 0, size - patch)  # [m, (x, y)]
    steps = np.arange(patch)
    offset = (corner - centre).astype(np.float32) + 0.5
    x = (steps + offset[:, 0, None])[:, None, :].astype(np.float32)  # [m, 1, P]
    y = (steps + offset[:, 1, None])[:, :, None].astype(np.float32)  # [m, P, 1]
    alpha = np.empty((len(rows), patch, patch), dtype=np.float32)
    for index in range(len(KINDS)):
        chosen = kind == index
        alpha[chosen] = outlines.coverage(outlines.distance(index, x[chosen], y[chosen], radius[chosen, None, None]))
    for i, row in enumerate(rows):
        left, top = corner[i]
        window = canvas[row, top : top + patch, left : left + patch]
        window += alpha[i, :, :, None] * (rgb[i] - window)
