"""What a free engine thread calls next, as plain data: live rows most urgent first, or a piece of work behind them.

`engine_loop` asks with its lock held, simulations with a clock of their own.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic

from server.batcher import Batcher, R
from server.behind import Behind, Piece
from server.flights import Flights


@dataclass(slots=True)
class Turns(Generic[R]):
    """`streams()` is how many calls an engine may have at once, of live rows and behind them together."""

    batcher: Batcher[R]
    streams: Callable[[], int] = lambda: 1
    behind: Behind = field(default_factory=Behind)
    flights: Flights = field(default_factory=Flights)

    @property
    def free(self) -> bool:
        """Whether one more call may run."""
        return len(self.flights) + self.behind.running < self.streams()

    @property
    def waiting(self) -> bool:
        return self.behind.ready or len(self.batcher) > 0

    @property
    def lone(self) -> bool:
        """Whether a call that begins now has nothing beside it and nothing that waits: it may have all threads."""
        return not len(self.flights) and not self.behind.running and not self.waiting

    def next(self) -> list[R] | Piece | None:
        """Removes and returns what to call now: rows, of which `flights` has to be told, or a piece that has begun."""
        if not self.free:
            return None
        batch = [] if self.behind.starved else self.batcher.next_batch()
        if batch:
            return batch
        return self.behind.begin() if self.behind.ready else None
