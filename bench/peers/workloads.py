"""What is asked: mixes of step counts, and how fast requests come. Pure, and the same for the same seed."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from bench.peers.models import LARGE, TEACHER
from bench.peers.pictures import Ask

MIXES: Mapping[str, Mapping[str, float]] = {
    "1-step": {"1": 1.0},
    "50/30/20": {"1": 0.5, "2": 0.3, "4": 0.2},
    "90/10": {"1": 0.9, TEACHER: 0.1},
    "400 KB": {LARGE: 1.0},
}
"""Shares of the kinds of `models`."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One mix under one load: `amount` clients in a closed loop, or Poisson at `amount` % of the best peer's rate."""

    mix: str
    mode: Literal["closed", "poisson"]
    amount: int

    @property
    def load(self) -> str:
        return f"closed, {self.amount} clients" if self.mode == "closed" else f"Poisson, {self.amount} %"

    @property
    def name(self) -> str:
        return f"{self.mix}, {self.load}"

    @property
    def mixed(self) -> bool:
        return len(MIXES[self.mix]) > 1


CAPACITY_CLIENTS = 64
CELLS = (
    *(Cell(mix, "closed", clients) for mix in ("1-step", "50/30/20") for clients in (1, 16, CAPACITY_CLIENTS)),
    Cell("90/10", "closed", CAPACITY_CLIENTS),  # what the Poisson loads of this mix are percents of
    Cell("400 KB", "closed", 16),
    *(Cell(mix, "poisson", percent) for mix in ("50/30/20", "90/10") for percent in (60, 90, 120)),
)
QUICK = (
    Cell("1-step", "closed", 1),
    Cell("50/30/20", "closed", CAPACITY_CLIENTS),
    Cell("90/10", "closed", CAPACITY_CLIENTS),
    Cell("50/30/20", "poisson", 90),
    Cell("90/10", "poisson", 90),
)
LONE = Cell("1-step", "closed", 1)


def capacity_cell(cell: Cell) -> Cell:
    """The closed loop that says what a server can take of this cell's mix."""
    return Cell(cell.mix, "closed", CAPACITY_CLIENTS)


def requests(mix: Mapping[str, float], captions: Sequence[str], seed: int) -> list[Ask]:
    """One request per caption, each of a kind drawn by its share and with a seed of its own."""
    draw = random.Random(seed)
    kinds = draw.choices(list(mix), weights=list(mix.values()), k=len(captions))
    return [Ask(kind, caption, draw.randrange(2**31)) for kind, caption in zip(kinds, captions, strict=True)]
