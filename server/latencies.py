"""How long requests took of late, by what they were and by how long the queue was when they came.

A gateway keeps this of its own answers. The 95th percentile of those that came to a queue as long as the present one
is what the next one may expect; where too few did lately, there is none, and the caller predicts from engine costs.
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

_KEPT = 128  # answers of one kind and one queue length
_ENOUGH = 8  # fewer say nothing of a 95th percentile
_FRESH_S = 60.0
_SHORT_S = 0.01  # queues up to this long are one length, and from here each doubling is another


@dataclass(frozen=True, slots=True)
class Work:
    """What makes two requests take equally long: one picture of this version, network rows and size."""

    deployment: str
    version: str
    evaluations: float
    size: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Quantiles:
    num_requests: int
    p50_ms: float
    p95_ms: float


class Latencies:
    """The last 128 answers of each (work, queue length). `clock_s` is monotonic."""

    def __init__(self, clock_s: Callable[[], float]) -> None:
        self._clock_s = clock_s
        self._seen: dict[Work, dict[int, deque[tuple[float, float]]]] = {}  # (answered at, ms)

    def add(self, work: Work, wait_s: float, ms: float) -> None:
        """A request took `ms`; when it came, `wait_s` was predicted for it."""
        lengths = self._seen.setdefault(work, {})
        lengths.setdefault(_length(wait_s), deque(maxlen=_KEPT)).append((self._clock_s(), ms))

    def p95_ms(self, work: Work, wait_s: float) -> float | None:
        """Of the last minute, of those that came to a queue as long as this; None where too few did."""
        fresh_s = self._clock_s() - _FRESH_S
        seen = sorted(ms for at_s, ms in self._seen.get(work, {}).get(_length(wait_s), ()) if at_s >= fresh_s)
        return _quantile(seen, 0.95) if len(seen) >= _ENOUGH else None

    def quantiles(self, work: Work) -> Quantiles | None:
        """Of all that is kept, whatever the queue was: what `/v1/capabilities` shows."""
        seen = sorted(ms for lengths in self._seen.get(work, {}).values() for _, ms in lengths)
        if not seen:
            return None
        return Quantiles(len(seen), _quantile(seen, 0.5), _quantile(seen, 0.95))

    def forget(self, deployment: str, version: str) -> None:
        """Drops what is known of a version that no longer serves."""
        gone = [work for work in self._seen if (work.deployment, work.version) == (deployment, version)]
        for work in gone:
            del self._seen[work]


def _length(wait_s: float) -> int:
    return 0 if wait_s <= _SHORT_S else math.ceil(math.log2(wait_s / _SHORT_S))


def _quantile(rising: list[float], q: float) -> float:
    return rising[min(len(rising) - 1, int(len(rising) * q))]
