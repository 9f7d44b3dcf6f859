"""How long live rows wait without a live step being completed: what a swap may hardly lengthen.

A gap begins when a row comes to an idle engine or when a live step ends with rows still waiting, and ends with the
next live step. Warm-up and golden steps end no gap. Engine threads write, one at a time; windows are opened and read
elsewhere.
"""

import json
from dataclasses import dataclass
from typing import Any, TextIO


@dataclass(slots=True)
class _Window:
    since_s: float
    peak_s: float = 0.0


class StallMeter:
    """Times are those of the caller's clock. With `log`, every live step is also one JSON line there."""

    def __init__(self, log: TextIO | None = None) -> None:
        self._log = log
        self._since_s: float | None = None
        self._windows: dict[str, _Window] = {}

    def waiting(self, now_s: float) -> None:
        """A live row is there."""
        if self._since_s is None:
            self._since_s = now_s

    def stepped(self, now_s: float, *, still_waiting: bool, **details: Any) -> None:
        """A live engine call has ended."""
        gap_s = now_s - self._since_s if self._since_s is not None else 0.0
        for window in self._windows.values():
            # A gap counts from the opening of the window on: what was before is not its doing.
            window.peak_s = max(window.peak_s, min(gap_s, now_s - window.since_s))
        self._since_s = now_s if still_waiting else None
        if self._log is not None:
            self._log.write(json.dumps({"at_s": now_s, "gap_s": gap_s, **details}) + "\n")

    def idle(self) -> None:
        """No live row waits any more, though none stepped (canceled, expired)."""
        self._since_s = None

    def open(self, name: str, now_s: float) -> None:
        self._windows = {**self._windows, name: _Window(now_s)}

    def close(self, name: str, now_s: float) -> float:
        """The longest gap since `open`, one that still lasts included."""
        window = self._windows[name]
        self._windows = {key: value for key, value in self._windows.items() if key != name}
        lasting_s = now_s - max(self._since_s, window.since_s) if self._since_s is not None else 0.0
        return max(window.peak_s, lasting_s)

    def note(self, **details: Any) -> None:
        """A line of another kind in the log, such as a phase of a swap."""
        if self._log is not None:
            self._log.write(json.dumps(details) + "\n")

    def flush(self) -> None:
        if self._log is not None:
            self._log.flush()
