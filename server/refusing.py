"""An HTTP server that refuses for a while before it stops listening: a balancer sees 503 and not a closed port."""

import time
from collections.abc import Callable

import uvicorn


class RefusingServer(uvicorn.Server):
    """Told to stop, it calls `refuse` and goes on answering for `drain_s`: what is under way ends, new work gets 503.

    A second SIGINT stops it at once.
    """

    def __init__(self, config: uvicorn.Config, refuse: Callable[[], None], drain_s: float) -> None:
        super().__init__(config)
        self._refuse, self._drain_s = refuse, drain_s
        self._stops_s: float | None = None

    async def on_tick(self, counter: int) -> bool:
        if not await super().on_tick(counter):
            return False
        if self._stops_s is None:
            self._refuse()
            self._stops_s = time.monotonic() + self._drain_s
        return self.force_exit or time.monotonic() >= self._stops_s
