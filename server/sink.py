"""What the engine threads tell of what they do."""

from collections.abc import Sequence
from typing import Any, Protocol

from engines.errors import FewstepError
from server.batcher import Row
from server.tickets import LatentRow, PictureRow, Ticket


class Sink(Protocol):
    """What the engine threads tell, one at a time: take note and return at once."""

    def moved(self) -> None:
        """There is room for new claims, or soon will be."""

    def recalled(self, known: bool) -> None:
        """A prompt was asked of the cache."""

    def ran(self, rows: Sequence[Row], seconds: float, lone: bool) -> None:
        """A live engine call has ended; a `lone` one was `engines.streams.alone`."""

    def stepped(self, rows: Sequence[PictureRow]) -> None: ...
    def decoded(self, rows: Sequence[LatentRow], pixels: Any) -> None:
        """pixels uint8 [B, 3, H, W], of videos [B, T, 3, H, W], the sink's own."""

    def failed(self, ticket: Ticket, error: FewstepError) -> None: ...
    def expired(self, ticket: Ticket) -> None: ...
    def died(self, error: BaseException) -> None:
        """The thread has ended with an error that nobody foresaw."""
