"""Requests of one deployment and class that no worker has yet: keys in turn, and of each key's own the most due.

A key that floods so waits behind its own requests and not others behind it. Keys are served in the order of their
`pass`: the engine seconds that a key was handed out, counted from where the least served stood when it came. That is
start-time fair queueing at equal weights: of two keys that both wait, neither is handed out more than the other by
more than the dearest request of each, and, in places kept for what is due soon, a second of engine time. Which of its
requests a key is served is left to the due time. Nobody is refused here: admission predicts waits by this order.

`order.lua` keeps the same order on Redis; a test holds the two together.
"""

from bisect import insort
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import nsmallest
from typing import Generic, TypeVar

from server.messages import CLASSES, RequestClass

K = TypeVar("K")

LEAST_COST_S = 0.001
"""What a row counts for at least, so that keys take turns where nothing was measured."""
LEAD_S = 1.0
"""By how much a key may be ahead of the least served that waits and still be given a kept place."""
LOOKED_AT = 8
"""How many keys, the least served first, are looked at for a kept place: a full worker asks for one at every step."""
_FIRST: tuple[RequestClass, ...] = ("high", "high", "high", "normal", "high", "high", "high", "low")
_ROUNDING_S = 1e-9  # passes are sums


def passed_s(owed_s: Mapping[str, float], owner: str, cost_s: float) -> float:
    """Engine time of what is unfinished and yet comes after a new request of `owner`, which costs `cost_s`.

    `owed_s`: what each owner has unfinished. In turn, each other key gets as much before it as its own has with it.
    """
    turn_s = owed_s.get(owner, 0.0) + cost_s
    return sum(max(0.0, other_s - turn_s) for name, other_s in owed_s.items() if name != owner)


@dataclass(frozen=True, slots=True)
class Waiting(Generic[K]):
    """A request in its queue: `rows` pictures which take `cost_s` of an engine. `owner` is its API key's name."""

    key: K
    owner: str
    rows: int
    came_s: float
    slack_s: float  # in which it should be done
    cost_s: float

    @property
    def due_s(self) -> float:
        return self.came_s + self.slack_s

    @property
    def charge_s(self) -> float:
        return max(self.cost_s, self.rows * LEAST_COST_S)


@dataclass(slots=True)
class FairQueue(Generic[K]):
    """Plain data: no clock, no waiting."""

    _flows: dict[str, list[Waiting[K]]] = field(default_factory=dict)  # by owner, most due first
    _passes: dict[str, float] = field(default_factory=dict)  # engine seconds, until nobody waits

    def __len__(self) -> int:
        return sum(map(len, self._flows.values()))

    def add(self, one: Waiting[K]) -> None:
        if one.owner not in self._flows:
            least = min((self._passes[name] for name in self._flows), default=0.0)
            self._passes[one.owner] = max(least, self._passes.get(one.owner, 0.0))
        insort(self._flows.setdefault(one.owner, []), one, key=lambda each: each.due_s)

    def peek(
        self, slack_below_s: float = float("inf"), left: Callable[[Waiting[K]], bool] | None = None
    ) -> Waiting[K] | None:
        """The request that is next; with less slack than this, of the first keys and of none that is far ahead.

        `left` says which are left to other workers; with it as many of each key are looked at as keys.
        """
        first = nsmallest(LOOKED_AT, self._flows, key=lambda name: (self._passes[name], name))
        for owner in first:
            if self._passes[owner] > self._passes[first[0]] + LEAD_S + _ROUNDING_S:
                continue
            for one in self._flows[owner][: LOOKED_AT if left else 1]:
                if one.slack_s < slack_below_s and not (left and left(one)):
                    return one
        return None

    def pop(self, one: Waiting[K]) -> None:
        """Removes what `peek` found and charges its owner for it."""
        self._passes[one.owner] += one.charge_s
        self._leave(one)

    def remove(self, key: K, owner: str) -> None:
        """Forgets a request that ended before a worker had it; nobody is charged. One that is not here is none."""
        for one in self._flows.get(owner, ()):
            if one.key == key:
                self._leave(one)
                return

    def ahead(self, key: K, owner: str) -> int:
        """How many requests may go before one, were all equally dear; 0 for one that is not here."""
        rank = next((i for i, one in enumerate(self._flows.get(owner, ())) if one.key == key), None)
        if rank is None:
            return 0
        return rank + sum(min(len(flow), rank + 1) for name, flow in self._flows.items() if name != owner)

    def _leave(self, one: Waiting[K]) -> None:
        flow = self._flows[one.owner]
        flow.remove(one)
        if not flow:
            del self._flows[one.owner]
        if not self._flows:  # nobody waits: everybody begins anew
            self._passes.clear()


@dataclass(frozen=True, slots=True)
class Source(Generic[K]):
    """A queue that a worker may take from. `below` is whether it is of a class below high."""

    queue: FairQueue[K]
    below: bool


def in_turn(turn: int, deployments: Sequence[str]) -> list[tuple[str, RequestClass]]:
    """The queues in the order in which a worker's `turn`-th claim, from 1, looks at them.

    Classes by importance, but for two of eight turns, which begin with another, so that none starves whatever floods;
    deployments take turns in each class that comes first. So every queue comes first once in eight turns for each
    deployment. Claims that got nothing are no turns: a full worker makes many, and they would use up the turns of some.
    """
    cycle, place = divmod(turn - 1, len(_FIRST))
    first = _FIRST[place]
    shift = (cycle * _FIRST.count(first) + _FIRST[:place].count(first)) % len(deployments)
    rotated = [*deployments[shift:], *deployments[:shift]]
    return [(name, each) for each in (first, *(each for each in CLASSES if each != first)) for name in rotated]


def take(
    sources: Iterable[Source[K]],
    max_rows: int,
    max_rows_below: int,
    slack_below_s: float = float("-inf"),
    left: Callable[[Waiting[K]], bool] | None = None,
) -> list[Waiting[K]]:
    """Removes and returns the next requests of some queues, in their order, up to a number of rows.

    `max_rows_below` caps rows of classes below high, but for those with less slack than `slack_below_s`. A request with
    more rows than there is room is taken if nothing else has been. What `left` says is left to other workers.
    """
    taken: list[Waiting[K]] = []
    for source in sources:
        while True:
            room = min(max_rows, max_rows_below) if source.below else max_rows
            one = _fitting(source.queue.peek(left=left), room, first=not taken)
            if one is None and source.below:
                one = _fitting(source.queue.peek(slack_below_s, left), max_rows, first=not taken)
            if one is None:
                break
            source.queue.pop(one)
            taken.append(one)
            max_rows -= one.rows
            max_rows_below -= one.rows if source.below else 0
    return taken


def _fitting(one: Waiting[K] | None, room: int, *, first: bool) -> Waiting[K] | None:
    return one if one is not None and room > 0 and (one.rows <= room or first) else None
