"""How long requests took of late, per deployment and tier: what `/v1/capabilities` shows.

Kept by the gateway from its own answers, a few hundred numbers per tier and no more.
"""

from collections import deque
from dataclasses import dataclass

_KEPT = 512


@dataclass(frozen=True, slots=True)
class Quantiles:
    num_requests: int
    p50_ms: float
    p95_ms: float


class Latencies:
    """The last 512 answers of each (deployment, tier)."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], deque[float]] = {}

    def add(self, deployment: str, tier: str, ms: float) -> None:
        self._seen.setdefault((deployment, tier), deque(maxlen=_KEPT)).append(ms)

    def quantiles(self, deployment: str, tier: str) -> Quantiles | None:
        seen = sorted(self._seen.get((deployment, tier), ()))
        if not seen:
            return None
        return Quantiles(len(seen), seen[len(seen) // 2], seen[min(len(seen) - 1, int(len(seen) * 0.95))])
