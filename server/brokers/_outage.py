"""What is tried again many times a second, and would fill the log while Redis is away."""

import logging
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)
_AGAIN_S = 10.0


class Outage:
    """Logs that something fails: at first, every ten seconds while it goes on, and when it is over.

    `what` is the beginning of the messages: `<what>_interrupted`, `<what>_resumed`.
    """

    def __init__(self, what: str, now_s: Callable[[], float] = time.monotonic) -> None:
        self._what, self._now_s = what, now_s
        self._since_s: float | None = None
        self._said_s = float("-inf")

    def failed(self, error: BaseException) -> None:
        now_s = self._now_s()
        if self._since_s is None:
            self._since_s, self._said_s = now_s, float("-inf")
        if now_s - self._said_s >= _AGAIN_S:
            self._said_s = now_s
            said = {"error": str(error), "for_s": round(now_s - self._since_s, 1)}
            logger.warning("%s_interrupted", self._what, extra=said)

    def worked(self) -> None:
        if self._since_s is not None:
            logger.info("%s_resumed", self._what, extra={"after_s": round(self._now_s() - self._since_s, 1)})
            self._since_s = None
