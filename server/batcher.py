"""Step-level batching: which rows the engine evaluates next, as plain data.

A lane holds the rows that could share one engine call: those of one stage, one engine and one shape, never of
one step count, tier or guidance. Work-conserving: whenever a row waits, `next_batch` has an answer, and there is
no batching timer. Time is an argument, so a test needs no clock.

Lanes are kept in order, and a decision looks at the front of each, so that it costs the same whatever waits behind.
"""

from bisect import insort
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

Stage = Literal["encode", "denoise", "decode"]
STRETCH = 64.0
"""After how many times its own cost a row should be done: docs/decisions.md has what was compared."""


@dataclass(frozen=True, slots=True)
class LaneKey:
    """What rows must agree on to be one engine call. `engine` names a component's weights, `shape` one row."""

    stage: Stage
    engine: str
    shape: tuple[int, ...] = ()


@dataclass(slots=True, eq=False, kw_only=True)
class Row:
    """One picture of one request, between two engine calls.

    `due_s` orders rows (see `due`), `deadline_s` ends them, and `needs_s` is the least that what is left of them takes.
    `network_rows` is what the next call weighs: a guided step is two. `alone` rows share no batch with other requests.
    `feeds` is the lane that an encoded row joins.
    """

    request_id: str
    lane: LaneKey
    due_s: float
    deadline_s: float
    needs_s: float = 0.0
    network_rows: int = 1
    alone: bool = False
    feeds: LaneKey | None = None


R = TypeVar("R", bound=Row)
_LOOK = 8
"""Largest batches. So many of a lane's most urgent rows are looked at for those that fit together."""
_ABOUT = 0.95
"""Of the best rate: a larger batch may have so much less, for what is done once a call is not measured in it."""
CostOf = Callable[[LaneKey, int], float | None]
"""Measured seconds of one call of a lane at a warmed size; None where nothing was measured."""


def due(
    *, arrived_s: float, deadline_s: float, cost_s: float, priority: int, ageing_s: float, stretch: float = STRETCH
) -> float:
    """When a row should be done: `stretch` times its own cost after it came, at the latest at its deadline.

    Cheap requests so pass dear ones, by as much as they are cheaper. A unit of priority is worth `ageing_s`. No row
    starves: everything that arrives after its due time (give or take 20 priorities) comes behind it.
    """
    return min(deadline_s, arrived_s + stretch * cost_s) - priority * ageing_s


@dataclass(slots=True)
class Batcher(Generic[R]):
    """Rows waiting for their next engine call. `sizes` are the warmed batch sizes, in network rows."""

    sizes: tuple[int, ...]
    cost_of: CostOf = lambda _lane, _size: None
    _lanes: dict[LaneKey, list[R]] = field(default_factory=dict)  # each most urgent first, then in order of arrival
    _next_late_s: float = float("inf")  # before that none of the waiting rows is too late
    _late: bool = False  # whether all that waited when it was last looked at were

    def __len__(self) -> int:
        return sum(map(len, self._lanes.values()))

    def add(self, row: R) -> None:
        insort(self._lanes.setdefault(row.lane, []), row, key=_due)
        self._next_late_s = float("-inf") if self._late else min(self._next_late_s, _last_s(row))

    def remove(self, request_ids: Iterable[str]) -> list[R]:
        """Removes and returns the waiting rows of these requests."""
        gone = frozenset(request_ids)
        return self._take(lambda row: row.request_id in gone)

    def expire(self, now_s: float) -> list[R]:
        """Removes and returns the rows whose deadline has passed, or will have when they are done.

        Where nothing else waits the latter stay: they keep nobody waiting, and what is measured may be surpassed.
        """
        if now_s < self._next_late_s:
            return []
        late = self._take(lambda row: row.deadline_s <= now_s)
        self._late = bool(self._lanes) and all(_last_s(row) <= now_s for row in self._rows())
        if not self._late:
            late += self._take(lambda row: _last_s(row) <= now_s)
        ends = (row.deadline_s if self._late else _last_s(row) for row in self._rows())
        self._next_late_s = min(ends, default=float("inf"))
        return late

    def next_batch(self) -> list[R]:
        """Removes and returns the rows to evaluate now: the most urgent row and those that may go with it.

        Rows that wait to be encoded go first if the step that they would join has room for them.
        """
        if not self._lanes:
            return []
        first = min((lane[0] for lane in self._lanes.values()), key=_due)
        batch = self._batch(first)
        if first.lane.stage == "denoise" and not first.alone and _weight(batch) < self.sizes[-1]:
            joining = [row for row in self._waiting("encode") if row.feeds == first.lane and not row.alone]
            if joining:
                batch = self._batch(min(joining, key=_due))
        self._remove(batch)
        return batch

    def _batch(self, first: R) -> list[R]:
        lane = self._front(first.lane)
        if first.alone:
            rows = [row for row in lane if row.request_id == first.request_id]
        else:
            rows = [first, *(row for row in lane if row is not first and not row.alone)]
        return _fill(rows, self._size(first.lane, rows))

    def _size(self, key: LaneKey, rows: list[R]) -> int:
        """The largest warmed size of those with about the most rows a second; without measurements the largest."""
        rates = dict[int, float]()
        for size in self.sizes:
            batch = _fill(rows, size)
            rates[size] = _weight(batch) / (self.cost_of(key, size) or float("inf"))
        enough = _ABOUT * max(rates.values())
        return max(size for size, rate in rates.items() if rate >= enough)

    def _front(self, key: LaneKey) -> list[R]:
        return self._lanes[key][: _LOOK * self.sizes[-1]]

    def _waiting(self, stage: Stage) -> list[R]:
        return [row for key in self._lanes if key.stage == stage for row in self._front(key)]

    def _rows(self) -> Iterator[R]:
        return (row for lane in self._lanes.values() for row in lane)

    def _remove(self, batch: list[R]) -> None:
        gone, lane = set(map(id, batch)), self._lanes[batch[0].lane]
        front = self._front(batch[0].lane)
        lane[: len(front)] = [row for row in front if id(row) not in gone]
        if not lane:
            del self._lanes[batch[0].lane]

    def _take(self, which: Callable[[R], bool]) -> list[R]:
        taken: list[R] = []
        for key, lane in list(self._lanes.items()):
            mine = [row for row in lane if which(row)]
            if mine:
                taken += mine
                self._lanes[key] = [row for row in lane if not which(row)]
                if not self._lanes[key]:
                    del self._lanes[key]
        return taken


def _due(row: Row) -> float:
    return row.due_s


def _last_s(row: Row) -> float:
    """When its next call must begin at the latest."""
    return row.deadline_s - row.needs_s


def _weight(rows: Iterable[Row]) -> int:
    return sum(row.network_rows for row in rows)


def _fill(rows: list[R], size: int) -> list[R]:
    """The first row in any case, then in their order those that still fit."""
    batch, room = [rows[0]], size - rows[0].network_rows
    for row in rows[1:]:
        if room <= 0:
            break
        if row.network_rows <= room:
            batch.append(row)
            room -= row.network_rows
    return batch
