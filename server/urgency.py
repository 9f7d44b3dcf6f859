"""How urgent what has not been answered yet is, for whoever predicts the wait of one more request: pure.

Of one key's requests the most due goes first, so what may take far longer waits behind what must be quick: a request
does not wait for all that is queued. Kept by powers of two of the time in which each should be done, counted from when
it came. How long it has waited since then makes it more urgent; so only what has several times as long counts as later.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from heapq import heappop, heappush
from math import frexp

_APART = 2
"""Powers of two between requests of which the second surely waits for the first."""


@dataclass(slots=True)
class Urgency:
    """Of the requests of one queue that somebody asked for; one that is never said to have ended is, at its end."""

    _costs_s: dict[int, float] = field(default_factory=lambda: defaultdict(float))  # by power of two
    _known: dict[str, tuple[int, float]] = field(default_factory=dict)
    _ends: list[tuple[float, str]] = field(default_factory=list)

    def add(self, key: str, slack_s: float, cost_s: float, ends_s: float) -> None:
        """A request that should be done in `slack_s`, costs `cost_s` of an engine and has ended by `ends_s`."""
        power = _power(slack_s)
        self._known[key] = power, cost_s
        self._costs_s[power] += cost_s
        heappush(self._ends, (ends_s, key))

    def remove(self, key: str) -> None:
        if known := self._known.pop(key, None):
            power, cost_s = known
            self._costs_s[power] -= cost_s
            if not self._known:  # sums of differences drift
                self._costs_s.clear()

    def later_share(self, slack_s: float, now_s: float) -> float:
        """Which part of the engine time that is left comes after a new request with so much time; 0 of nothing."""
        while self._ends and self._ends[0][0] <= now_s:
            self.remove(heappop(self._ends)[1])
        all_s = sum(self._costs_s.values())
        if all_s <= 0:
            return 0.0
        least = _power(slack_s) + _APART
        return sum(cost_s for power, cost_s in self._costs_s.items() if power >= least) / all_s


def _power(slack_s: float) -> int:
    """Of what is overdue (priority may make it so), that of a nanosecond."""
    return frexp(max(slack_s, 1e-9))[1]
