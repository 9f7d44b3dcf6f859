"""How many rungs below the default tier `auto` serves: pure, from the predicted wait and the time.

Down at once: a rung when the wait passes `wait_s`, another each time that it has doubled since. Up slowly: a rung when
the wait has stayed below half of `wait_s` for the hold. Where load soon undoes a rise, the hold doubles, so that under
a load between two rungs the tier does not flap; a rise that stands brings it back to `hold_s`.
"""

import math
from dataclasses import dataclass

_LOW = 0.5  # of `wait_s`: below it the load counts as low
_MAX_HOLDS = 16  # a hold doubles up to this many `hold_s`


@dataclass(frozen=True, slots=True)
class Thresholds:
    wait_s: float
    hold_s: float


class Degrader:
    """Of one queue. `rung` 0 is the default tier; `depth` is the lowest rung that a request could be served at."""

    def __init__(self, thresholds: Thresholds) -> None:
        self.rung = 0
        self.depth = 0
        self._thresholds = thresholds
        self._hold_s = thresholds.hold_s
        self._low_since_s: float | None = None
        self._rose_s: float | None = None

    def look(self, wait_s: float, now_s: float) -> int:
        """The rung from now on. Call it at every request and, so that it sees time pass, every second or so."""
        if self._rose_s is not None and now_s - self._rose_s >= 2 * self._hold_s:
            self._rose_s, self._hold_s = None, self._thresholds.hold_s
        wanted = min(self.depth, self._wanted(wait_s))
        if wanted > self.rung:
            self._fall(wanted, now_s)
        if wait_s >= _LOW * self._thresholds.wait_s:
            self._low_since_s = None
        elif self._low_since_s is None:
            self._low_since_s = now_s
        elif self.rung and now_s - self._low_since_s >= self._hold_s:
            self.rung -= 1
            self._low_since_s = self._rose_s = now_s
        return self.rung

    def _wanted(self, wait_s: float) -> int:
        doublings = wait_s / self._thresholds.wait_s
        return 0 if doublings < 1 else 1 + math.floor(math.log2(doublings))

    def _fall(self, rung: int, now_s: float) -> None:
        if self._rose_s is not None:
            self._hold_s = min(2 * self._hold_s, _MAX_HOLDS * self._thresholds.hold_s)
            self._rose_s = None
        self.rung = rung
