"""What a gateway has learnt of one queue beside its length, for those whom it refuses: pure, time is an argument."""

from dataclasses import dataclass, field

_SHARE = 0.2  # of a new measurement in the moving mean
_LEAST_S = 0.05  # shorter predictions say nothing
_MOST = 4.0


@dataclass(slots=True)
class Waits:
    """Of the queue of a deployment and class.

    `lump_s`: how long a full batch of the dearest request takes that was admitted since the queue was last empty.
    `stretch`: how much longer than predicted requests waited of late; 1 where they did not.
    """

    lump_s: float = 0.0
    stretch: float = 1.0
    _coming: list[tuple[float, float]] = field(default_factory=list)  # (when, engine seconds)

    def waited(self, predicted_s: float, seconds: float) -> None:
        """A request waited `seconds` for its first engine call."""
        if predicted_s >= _LEAST_S:
            ratio = min(_MOST, max(1.0, seconds / predicted_s))
            self.stretch += _SHARE * (ratio - self.stretch)

    def book(self, at_s: float, engine_s: float) -> None:
        """Somebody was refused and told to come back then; nothing is reserved, but the next is told to come later."""
        self._coming.append((at_s, engine_s))

    def booked_s(self, now_s: float) -> float:
        """Engine seconds of those who were refused and have yet to come."""
        self._coming = [one for one in self._coming if one[0] > now_s]
        return sum(engine_s for _, engine_s in self._coming)
