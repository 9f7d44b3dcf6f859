"""A request beside a long queue in a real Redis, through the broker that workers use: part (a) of `bench.growth`.

`us_per_request` is by the clock, `server_us_per_request` processor time of the server, which other programs disturb
less. Claims read what is queued once, a little at a time, for messages without a place in the order; `settled` is when
they have read all of it, `fresh` before.
"""

import asyncio
import contextlib
import random
import re
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

from bench.machine import spread
from server.brokers._redis_gateway import publishing
from server.brokers._redis_link import Link
from server.brokers.base import Finished
from server.brokers.redis import RedisBroker
from server.embedded import redis_binary
from server.messages import GenerateRequest, GenerateResult

SHORT = 1000
KEYS = 16
_MODEL, _VERSION = "shapes", f"shapes@{'0' * 64}"
_RESULT_TTL_S = 600.0
_AT_ONCE = 500  # publishes in a round trip
_FILLERS = 2  # connections: one sends while the server works for the other
_BATCH = 8
_TURN = 25  # batches of one queue, before the other has its turn
_LOOKED_AT = 1024
_NO_SLACK_MS = -1_000_000_000


async def queues(*, rows: int, runs: int, batches: int, fill_s: float) -> dict[str, Any]:
    """Short and long queue by turns, so that what else the machine does meets both."""
    with redis_server() as url:
        async with contextlib.AsyncExitStack() as stack:
            both = [await stack.enter_async_context(opened(url, f"rows{length}")) for length in (SHORT, rows)]
            begun_s = time.perf_counter()
            for queue, length in zip(both, (SHORT, rows), strict=True):
                await queue.fill(length, fill_s)
            filled_s = time.perf_counter() - begun_s
            queued = [queue.published for queue in both]
            fresh = await by_turns(both, runs, batches)
            for queue in both:
                await queue.settle()
            settled = await by_turns(both, runs, batches)
            vain = [await in_vain(url, keys, runs) for keys in (1, 8, 64)]
    cells = [
        {"queued": length, "settled": _cell(after), "fresh": _cell(before)}
        for length, after, before in zip(queued, settled, fresh, strict=True)
    ]
    return {
        "claim_and_finish": cells,
        "ratio": _ratio(settled, lambda run: run.us),
        "server_ratio": _ratio(settled, lambda run: run.server_us),
        "fresh_ratio": _ratio(fresh, lambda run: run.us),
        "fresh_server_ratio": _ratio(fresh, lambda run: run.server_us),
        "published_per_s": round(sum(queued) / filled_s),
        "claim_in_vain": vain,
        "runs": runs,
        "batch": _BATCH,
    }


@dataclass(frozen=True, slots=True)
class Served:
    """Microseconds per request of one run."""

    us: float
    server_us: float


@dataclass(slots=True)
class Queue:
    """A queue, the worker that claims from it, and the connections that fill it."""

    broker: RedisBroker
    links: Sequence[Link]
    published: int = field(default=0, init=False)

    async def fill(self, rows: int, within_s: float) -> None:
        """Publishes so many more requests, by the command of the broker; those of that time."""
        begins = iter(range(self.published, self.published + rows, _AT_ONCE))
        end, until_s = self.published + rows, time.perf_counter() + within_s

        async def filler(link: Link) -> None:
            for begin in begins:
                if time.perf_counter() > until_s:
                    return
                numbers = range(begin, min(begin + _AT_ONCE, end))
                commands = [publishing(link, request(number), round(_RESULT_TTL_S * 1000)) for number in numbers]
                assert all(queued for queued, *_ in await link.call_many(commands)), "it was queued before"
                self.published += len(numbers)

        await asyncio.gather(*map(filler, self.links))

    async def settle(self) -> None:
        """Claims with no room for any request, until they have looked at all that is queued."""
        for _ in range(self.published // _LOOKED_AT + 1):
            await self.claim_in_vain(_LOOKED_AT // 2)

    async def claim_in_vain(self, rows: int) -> None:
        claims = await self.broker.claim([_MODEL], rows, 0.0, max_rows_below_high=0, slack_below_ms=_NO_SLACK_MS)
        assert not claims

    async def served(self, batches: int) -> Served:
        """Claims and finishes a batch after the other, then publishes as many again."""
        before_us, begun_s = await self.server_us(), time.perf_counter()
        for _ in range(batches):
            claims = await self.broker.claim([_MODEL], _BATCH, 0.0)
            assert len(claims) == _BATCH, "the queue has run empty"
            answers = [Finished(claim, GenerateResult(id=claim.request.id, status="succeeded")) for claim in claims]
            assert all(await self.broker.finish_many(answers))
        requests, seconds = batches * _BATCH, time.perf_counter() - begun_s
        spent_us = await self.server_us() - before_us
        await self.fill(requests, float("inf"))
        return Served(1e6 * seconds / requests, spent_us / requests)

    async def server_us(self) -> float:
        """Processor time of the server since it began."""
        found = re.findall(rb"used_cpu_(?:sys|user):([\d.]+)", await self.links[0].call("INFO", "cpu"))
        return 1e6 * sum(map(float, found))


async def by_turns(both: Sequence[Queue], runs: int, batches: int) -> list[list[Served]]:
    """For each queue its runs, which are the mean of short turns."""
    found: list[list[Served]] = [[] for _ in both]
    for _ in range(runs):
        turns = [[await queue.served(_TURN) for queue in both] for _ in range(batches // _TURN)]
        for runs_of, mine in zip(found, zip(*turns, strict=True), strict=True):
            runs_of.append(Served(fmean(each.us for each in mine), fmean(each.server_us for each in mine)))
    return found


async def in_vain(url: str, keys: int, runs: int) -> dict[str, Any]:
    """Processor time of the server for a claim of a full worker, beside so many keys none of which is urgent."""
    claims, spent_us = 100, []
    async with opened(url, f"keys{keys}") as queue:
        for number in range(keys):
            await queue.broker.publish(request(number, keys))
        for _ in range(runs):
            before_us = await queue.server_us()
            for _ in range(claims):
                await queue.claim_in_vain(4)
            spent_us.append((await queue.server_us() - before_us) / claims)
    return {"keys": keys, "server_us": spread(spent_us, 1)}


@contextlib.contextmanager
def redis_server() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="fewstep-bench-") as folder:
        socket = Path(folder) / "redis.sock"
        command = [redis_binary(), "--port", "0", "--unixsocket", str(socket), "--dir", folder, "--save", ""]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            try:
                while not socket.exists():
                    time.sleep(0.05)
                yield f"unix://{socket}"
            finally:
                process.kill()


@contextlib.asynccontextmanager
async def opened(url: str, namespace: str) -> AsyncIterator[Queue]:
    broker = RedisBroker(url, "bench", namespace=namespace, lease_s=3600.0, result_ttl_s=_RESULT_TTL_S)
    queue = Queue(broker, [Link(url, prefix=f"{namespace}:v1:", patience_s=10.0) for _ in range(_FILLERS)])
    await broker.start()
    try:
        yield queue
    finally:
        for link in queue.links:
            await link.close()
        await broker.close()


def request(number: int, keys: int = KEYS) -> GenerateRequest:
    """Of several keys in turn, three kinds of request by chance."""
    steps = random.Random(number).choice((1, 2, 4))
    return GenerateRequest(
        id=f"gen_{number:028x}",
        model=_MODEL,
        version=_VERSION,
        tier="low",
        steps=steps,
        prompt="a small red circle above a large blue square on a white background",
        width=64,
        height=64,
        seed=number,
        budget_ms=3_600_000,
        reply_to="nobody",
        owner=f"key{number % keys}",
        cost_s=0.004 * steps,
        due_after_s=0.25 * steps,
    )


def _cell(found: Sequence[Served]) -> dict[str, Any]:
    return {
        "us_per_request": spread([each.us for each in found], 1),
        "server_us_per_request": spread([each.server_us for each in found], 1),
    }


def _ratio(found: Sequence[Sequence[Served]], what: Callable[[Served], float]) -> float:
    """The median over the runs of what the long queue took to what the short one did."""
    return round(median(what(long) / what(short) for short, long in zip(*found, strict=True)), 3)
