"""The load generator, a process of its own: `python -m bench.load PLAN.json OUT.msgpack`.

Closed loop: so many clients, each asking again as soon as it is answered. Open loop: Poisson arrivals at a rate,
whatever the answers do, so that a slow server is not given a rest. It runs for `seconds`, or until SIGTERM; a
request without an answer after `timeout_s` is a failure. Times are Unix seconds, as those of a Redis on this machine.
"""

import asyncio
import contextlib
import json
import random
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec

from bench import http11
from bench.http11 import Connection

_HEAD_BYTES = 24  # of a PNG: signature, length and name of its first chunk, width and height


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked and how. Request k sends `bodies[k % len(bodies)]`, to the path of that place if `paths` are given.

    Of every `keep_every`-th answer the picture is kept, of none if it is 0.
    """

    port: int
    bodies: list[str]
    mode: Literal["closed", "open"]
    host: str = "127.0.0.1"
    path: str = "/v1/generations"
    paths: list[str] = []
    accept: str = "image/png"
    concurrency: int = 1
    rate: float = 1.0  # requests a second
    seconds: float | None = None
    timeout_s: float = 30.0
    keep_every: int = 0
    seed: int = 0


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One request. `status` 0: no answer (timeout or broken connection). `head` is how its picture begins."""

    body: int
    sent_s: float
    seconds: float
    status: int
    version: str = ""
    timing: str = ""
    error: str = ""
    head: bytes = b""
    picture: bytes = b""


def arrivals(rate: float, seed: int) -> Iterator[float]:
    """Seconds from the beginning at which Poisson requests come, without end."""
    draw, at_s = random.Random(seed), 0.0
    while True:
        at_s += draw.expovariate(rate)
        yield at_s


class Load:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.records: list[Record] = []
        self.stopped = asyncio.Event()
        self._requests = [
            http11.post(path, body.encode(), host=plan.host, accept=plan.accept)
            for path, body in zip(plan.paths or [plan.path] * len(plan.bodies), plan.bodies, strict=True)
        ]
        self._idle: deque[Connection] = deque()
        self._next = 0

    async def run(self) -> None:
        if self.plan.seconds is not None:
            asyncio.get_running_loop().call_later(self.plan.seconds, self.stopped.set)
        await (self._closed() if self.plan.mode == "closed" else self._open())

    async def _closed(self) -> None:
        async def client() -> None:
            while not self.stopped.is_set():
                await self._one()

        await asyncio.gather(*[client() for _ in range(self.plan.concurrency)])

    async def _open(self) -> None:
        tasks, begun_s = set[asyncio.Task[None]](), time.monotonic()
        for after_s in arrivals(self.plan.rate, self.plan.seed):
            await self._until(begun_s + after_s)
            if self.stopped.is_set():
                break
            task = asyncio.create_task(self._one())
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)

    async def _until(self, at_s: float) -> None:
        wait_s = at_s - time.monotonic()
        if wait_s > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stopped.wait(), wait_s)

    async def _one(self) -> None:
        place = self._next % len(self._requests)
        kept = self.plan.keep_every > 0 and self._next % self.plan.keep_every == 0
        self._next += 1
        sent_s, begun_s = time.time(), time.perf_counter()
        try:
            async with asyncio.timeout(self.plan.timeout_s):
                answer = await self._ask(self._requests[place])
        except (TimeoutError, OSError) as error:
            seconds = time.perf_counter() - begun_s
            self.records.append(Record(body=place, sent_s=sent_s, seconds=seconds, status=0, error=repr(error)))
            await asyncio.sleep(0.01)
            return
        ok = answer.status == 200
        self.records.append(
            Record(
                body=place,
                sent_s=sent_s,
                seconds=time.perf_counter() - begun_s,
                status=answer.status,
                version=answer.headers.get("x-model-version", ""),
                timing=answer.headers.get("server-timing", ""),
                error="" if ok else answer.body[:300].decode(errors="replace"),
                head=answer.body[:_HEAD_BYTES] if ok else b"",
                picture=answer.body if ok and kept else b"",
            )
        )

    async def _ask(self, request: bytes) -> http11.Response:
        while self._idle and not self._idle[-1].open:
            self._idle.pop()  # the server closes what was idle for some seconds
        connection = self._idle.pop() if self._idle else await http11.connect(self.plan.host, self.plan.port)
        answer = await connection.ask(request)
        if connection.open:
            self._idle.append(connection)
        return answer


async def _main(plan: Plan, out: Path) -> None:
    load = Load(plan)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, load.stopped.set)
    await load.run()
    out.write_bytes(msgspec.msgpack.encode(load.records))


def read(out: Path) -> list[Record]:
    return msgspec.msgpack.decode(out.read_bytes(), type=list[Record])


if __name__ == "__main__":
    asyncio.run(_main(msgspec.convert(json.loads(Path(sys.argv[1]).read_text()), Plan), Path(sys.argv[2])))
