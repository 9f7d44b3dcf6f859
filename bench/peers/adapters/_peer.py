"""What the adapters share: their configuration, and a queue that groups requests by kind for those that have none."""

import asyncio
import os
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

from torch import Tensor

from bench.peers.pictures import Ask, Config

PATH = "/generate"
HOST = "127.0.0.1"


def config() -> Config:
    return Config.read(os.environ["PEERS_CONFIG"])


class Grouped:
    """Batches of one kind: the oldest request's, as many as wait, at most `rows`. Nobody waits for an idle engine.

    The pattern of a queue and a background task that users of plain FastAPI write themselves.
    """

    def __init__(self, rows: int, paint: Callable[[Sequence[Ask]], Awaitable[list[Tensor]]]) -> None:
        self._rows, self._paint = rows, paint
        self._waiting: deque[tuple[Ask, asyncio.Future[Tensor]]] = deque()
        self._came = asyncio.Event()

    async def ask(self, asked: Ask) -> Tensor:
        answer: asyncio.Future[Tensor] = asyncio.get_running_loop().create_future()
        self._waiting.append((asked, answer))
        self._came.set()
        return await answer

    async def run(self) -> None:
        while True:
            await self._came.wait()
            batch = self._next()
            try:
                made = await self._paint([asked for asked, _ in batch])
            except Exception as error:  # every request is answered, whatever the engine says
                for _, answer in batch:
                    if not answer.done():
                        answer.set_exception(error)
            else:
                for (_, answer), picture in zip(batch, made, strict=True):
                    if not answer.done():
                        answer.set_result(picture)

    def _next(self) -> list[tuple[Ask, "asyncio.Future[Tensor]"]]:
        kind = self._waiting[0][0].kind
        batch = [one for one in self._waiting if one[0].kind == kind][: self._rows]
        taken = set(map(id, batch))
        self._waiting = deque(one for one in self._waiting if id(one) not in taken)
        if not self._waiting:
            self._came.clear()
        return batch
