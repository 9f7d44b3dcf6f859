"""A worker in a simulation: what it holds, what it calls next, and how long its calls take beside each other.

A call that began alone has all threads for as long as it is. Any other has those of its stream, and takes what calls
take that overlap: that one ends beside it hardly makes a call of one thread faster.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from bench.fleet import Fleet, SimRow, Told
from engines.cost import CostKey, CostModel
from server.batcher import Batcher, CostOf, LaneKey
from server.intake import Room, held_at_most, room
from server.turns import Turns


@dataclass(slots=True, eq=False)
class Call:
    """One engine call, which may have begun alone. `left` is the share of it that is not done."""

    rows: Sequence[SimRow]
    number: int  # of its flight
    lone: bool
    begun_s: float
    left: float = 1.0
    seconds: float = 0.0  # of the whole call, at the pace that its end was last reckoned with
    reckoned: int = 0  # how often that was: an earlier reckoning is void

    @property
    def weight(self) -> int:
        return sum(row.network_rows for row in self.rows)


@dataclass(slots=True, eq=False)
class Worker:
    """`turns` decides as in an engine thread, by what the calls of this worker took (`costs`)."""

    number: int
    fleet: Fleet
    batcher: Callable[[tuple[int, ...], CostOf], Batcher[SimRow]]
    held: dict[Told, int] = field(default_factory=dict)  # rows that need a place after the calls that run now
    calls: list[Call] = field(default_factory=list)
    costs: CostModel = field(init=False)
    turns: Turns[SimRow] = field(init=False)
    _since_s: float = 0.0  # up to when the calls' shares are counted

    def __post_init__(self) -> None:
        self.costs = CostModel.restore(self.fleet.busy.snapshot())
        self.turns = Turns(self.batcher(self.fleet.sizes, self._call_s), lambda: self.fleet.streams)

    def _call_s(self, lane: LaneKey, size: int) -> float | None:
        return self.costs.seconds(_key(lane), size)

    def room(self, now_s: float, due_s: Callable[[Told], float]) -> Room:
        high = sum(rows for told, rows in self.held.items() if told.asked.request_class == "high")
        latest_s = max((due_s(told) for told in self.held), default=None)
        slack_ms = None if latest_s is None else int(1000 * (latest_s - now_s)) - 1
        limit = held_at_most(self.fleet.streams, self.fleet.sizes[-1])
        return room(limit, high, sum(self.held.values()) - high, slack_below_ms=slack_ms)

    def begin(self, now_s: float) -> Call | None:
        """The next call, if a stream is free and a row waits."""
        batch = self.turns.next()
        if not isinstance(batch, list):
            return None
        lone = self.turns.lone
        self._count(now_s)
        call = Call(batch, self.turns.flights.begin(batch), lone, now_s)
        self.calls.append(call)
        return call

    def end(self, call: Call, now_s: float) -> None:
        self._count(now_s)
        self.calls.remove(call)
        self.turns.flights.end(call.number)
        if not call.lone or self.fleet.streams == 1:  # as a worker does
            self.costs.observe(_key(call.rows[0].lane), self.fleet.padded(call.weight), now_s - call.begun_s)

    def reckon(self, now_s: float) -> list[tuple[float, Call]]:
        """When calls will end whose pace has changed, as far as nothing changes it again."""
        changed = [call for call in self.calls if call.seconds != self._seconds(call)]
        for call in changed:
            call.seconds = self._seconds(call)
            call.reckoned += 1
        return [(now_s + max(0.0, call.left) * call.seconds, call) for call in changed]

    def _count(self, now_s: float) -> None:
        if now_s > self._since_s:  # calls that begin at one moment are reckoned after all of them
            for call in self.calls:
                call.left -= (now_s - self._since_s) / call.seconds
        self._since_s = now_s

    def _seconds(self, call: Call) -> float:
        pace_s = self.fleet.seconds if call.lone and len(self.calls) == 1 else self.fleet.busy_s
        return pace_s(call.rows[0].lane.stage, call.weight)


def _key(lane: LaneKey) -> CostKey:
    """Recorded costs are those of a stage, whatever weights it runs with."""
    return CostKey(lane.stage, lane.stage, ())
