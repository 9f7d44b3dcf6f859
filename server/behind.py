"""Small pieces of work that the engine threads do behind live rows, such as those of a swap, one at a time."""

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

SHARE = 0.1
"""Of the engine's time, what work behind live rows gets even if they never pause: a swap ends under any load."""
_LEAST_WAIT_S = 0.01


@dataclass(slots=True)
class Piece:
    work: Callable[[], Any]
    future: "Future[Any]"
    since_s: float

    def run(self) -> None:
        """Its errors go to whoever asked for it."""
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            self.future.set_result(self.work())
        except Exception as error:
            self.future.set_exception(error)


class Behind:
    """Whoever uses it holds its lock; times are those of a monotonic clock."""

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self._pieces: deque[Piece] = deque()
        self._begun_s: float | None = None
        self._took_s = 0.0  # the last piece

    @property
    def running(self) -> bool:
        return self._begun_s is not None

    @property
    def ready(self) -> bool:
        """A piece waits and none runs."""
        return bool(self._pieces) and self._begun_s is None

    @property
    def starved(self) -> bool:
        """The next piece has waited so long that live rows have to wait for it."""
        patience_s = max(_LEAST_WAIT_S, self._took_s * (1 / SHARE - 1))
        return self.ready and self._now_s() - self._pieces[0].since_s > patience_s

    def add(self, work: Callable[[], Any], future: "Future[Any]") -> None:
        self._pieces.append(Piece(work, future, self._now_s()))

    def begin(self) -> Piece:
        """The piece to run now; `end` when that is done."""
        self._begun_s = self._now_s()
        return self._pieces.popleft()

    def end(self) -> None:
        now_s = self._now_s()
        self._took_s, self._begun_s = now_s - (self._begun_s or now_s), None
        if self._pieces:
            self._pieces[0].since_s = now_s
