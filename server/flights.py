"""The engine calls that run at this moment, and who waits for them to end."""

from concurrent.futures import Future
from typing import Any


class Flights:
    """Whoever uses it holds its lock."""

    def __init__(self) -> None:
        self._calls: dict[int, list[Any]] = {}
        self._begun = 0
        self._waiting: list[tuple[set[int], Future[None]]] = []

    def __len__(self) -> int:
        return len(self._calls)

    def begin(self, batch: list[Any]) -> int:
        """The number of a call that begins."""
        self._begun += 1
        self._calls[self._begun] = batch
        return self._begun

    def end(self, number: int) -> None:
        del self._calls[number]
        for calls, _ in self._waiting:
            calls.discard(number)
        self._tell()

    def wait(self, future: "Future[None]") -> None:
        """Sets `future` when all that run now have ended."""
        self._waiting.append((set(self._calls), future))
        self._tell()

    def _tell(self) -> None:
        over = [future for calls, future in self._waiting if not calls]
        self._waiting = [one for one in self._waiting if one[0]]
        for future in over:
            future.set_result(None)
