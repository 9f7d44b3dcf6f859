"""Plain FastAPI: one uvicorn process, one engine thread beside its loop.

Naive: every request is a whole run of its own, first come, first served. Grouped: a queue and a background task that
makes batches of one step count. Workers: the grouped one in a process per core, as its documentation's page on server
workers says, each with an engine of one thread. Given: `uvicorn[standard]` (uvloop, httptools), no access log, picture
bytes in threads beside the engine, as FastAPI's documentation says for blocking work.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI, Request
from starlette.responses import Response
from torch import Tensor

from bench.peers.adapters._peer import HOST, PATH, Grouped, config
from bench.peers.pictures import Ask, Painter, png


def made() -> FastAPI:
    """What each process serves."""
    told = config()
    return app(Painter(told), grouped=told.grouped)


def app(painter: Painter, *, grouped: bool) -> FastAPI:
    engine = ThreadPoolExecutor(1, thread_name_prefix="engine")

    async def paint(asked: Sequence[Ask]) -> list[Tensor]:
        return await asyncio.get_running_loop().run_in_executor(engine, painter.paint, asked)

    queue = Grouped(painter.config.rows, paint)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        running = asyncio.create_task(queue.run())
        yield
        running.cancel()

    served = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None)

    @served.post(PATH)
    async def generate(request: Request) -> Response:
        asked = Ask(**await request.json())
        picture = await queue.ask(asked) if grouped else (await paint([asked]))[0]
        return Response(await asyncio.to_thread(png, picture), media_type="image/png")

    return served


def main() -> None:
    told = config()
    uvicorn.run(
        f"{__spec__.name}:made",
        factory=True,
        workers=told.processes,
        host=HOST,
        port=told.port,
        log_level="warning",
        access_log=False,
    )


if __name__ == "__main__":
    main()
