"""What engine calls take, measured: seconds per (stage, blob, shape) and batch size.

Filled at warm-up and refreshed by every live call, it feeds admission, deadlines and tiers. It only ever holds
measurements: what was never measured has no prediction.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass

_SHARE = 0.1  # of a new measurement in the moving mean
_FOLLOW = 0.9  # of a size's change, what the sizes that are not asked for change by


@dataclass(frozen=True, slots=True)
class CostKey:
    """One lane of calls: encode, denoise or decode of one weights blob at one latent shape."""

    stage: str
    blob: str
    shape: tuple[int, ...]


class CostModel:
    """A moving mean per key and batch size. One thread observes a key at a time; others may read, inherit, forget.

    What makes calls of one size slower, such as other calls beside them, makes all sizes slower. So the others follow
    in proportion: a size that was last measured on an idle machine would look cheaper than the one in use. Lone calls,
    which have all threads, are known apart: batches are chosen by what calls take beside others.
    """

    def __init__(self) -> None:
        self._seconds: dict[CostKey, dict[int, float]] = {}
        self._lone: dict[CostKey, dict[int, float]] = {}
        self._least: dict[CostKey, float] = {}

    def observe(self, key: CostKey, size: int, seconds: float, *, lone: bool = False) -> None:
        """A call with a batch of `size` (as the engine saw it, padding included) took this long."""
        self._least[key] = min(seconds, self._least.get(key, seconds))
        known = (self._lone if lone else self._seconds).setdefault(key, {})
        before = known.get(size)
        if before is None:
            known[size] = seconds
            return
        change = _SHARE * (seconds / before - 1)
        for other in list(known):
            known[other] *= 1 + (change if other == size else _FOLLOW * change)

    def inherit(self, key: CostKey, other: CostKey) -> None:
        """Other weights of the same graph take as long, until measured."""
        for table in (self._seconds, self._lone):
            if key not in table and other in table:
                table[key] = dict(table[other])
        if key not in self._least and other in self._least:
            self._least[key] = self._least[other]

    def seconds(self, key: CostKey, size: int) -> float | None:
        """One call of exactly this batch size."""
        return self._seconds.get(key, {}).get(size)

    def lone_s(self, key: CostKey, size: int) -> float | None:
        """The same of a lone call; where none was measured, of any."""
        return self._lone.get(key, {}).get(size) or self.seconds(key, size)

    def least_s(self, key: CostKey) -> float:
        """What the quickest call so far took, of any size; 0 where none was measured."""
        return self._least.get(key, 0.0)

    def predict(self, key: CostKey, rows: int) -> float | None:
        """Seconds for `rows` rows in as few calls as possible; None if nothing of this lane was measured."""
        known = self._seconds.get(key)
        if not known:
            return None
        largest = max(known)
        full, rest = divmod(rows, largest)
        return full * known[largest] + (_between(known, rest) if rest else 0.0)

    def forget(self, blobs: Iterable[str]) -> None:
        """Drops what is known of blobs that are no longer here."""
        gone = frozenset(blobs)
        for table in (self._seconds, self._lone, self._least):
            for key in [key for key in list(table) if key.blob in gone]:
                table.pop(key, None)

    def snapshot(self) -> str:
        """JSON for `restore`, without lone calls."""
        rows = [[key.stage, key.blob, key.shape, sorted(sizes.items())] for key, sizes in list(self._seconds.items())]
        return json.dumps(sorted(rows))

    @classmethod
    def restore(cls, snapshot: str) -> "CostModel":
        model = cls()
        for stage, blob, shape, sizes in json.loads(snapshot):
            model._seconds[CostKey(stage, blob, tuple(shape))] = {size: seconds for size, seconds in sizes}
        return model


def _between(known: dict[int, float], rows: int) -> float:
    """The call that holds `rows` rows: the smallest measured size that does, since batches are padded to sizes."""
    return known[min(size for size in known if size >= rows)]
