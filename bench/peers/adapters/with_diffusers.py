"""diffusers' own asynchronous server (its `examples/server` and `examples/server-async`), over our engine.

Its pattern: one shared pipeline, and per request a shallow copy with a scheduler of its own, called in FastAPI's
thread pool. Here a request's run is that copy (`engines.student.sampling` holds the latents and the plan), the compiled
engine is what is shared, and a lock around each engine call stands where its locks stand: requests interleave step by
step. Naive: a run per request, as the example has it. Grouped: a pipeline takes a list of prompts, so a queue per step
count makes lists, and the runs of different counts interleave. Given: as plain FastAPI; answers are bytes, where
the example writes a file and answers with its url; without its `gc.collect()` per request, which is for GPU memory.
"""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from starlette.responses import Response
from torch import Tensor

from bench.peers.adapters._peer import HOST, PATH, Grouped, config
from bench.peers.pictures import Ask, Painter, png


def app(painter: Painter, *, grouped: bool) -> FastAPI:
    async def paint(asked: Sequence[Ask]) -> list[Tensor]:
        return await run_in_threadpool(painter.paint_interleaved, asked)

    queues: defaultdict[str, Grouped] = defaultdict(lambda: Grouped(painter.config.rows, paint))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        running = [asyncio.create_task(queues[kind].run()) for kind in painter.config.kinds]
        yield
        for task in running:
            task.cancel()

    made = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None)

    @made.post(PATH)
    async def generate(request: Request) -> Response:
        asked = Ask(**await request.json())
        if grouped:
            content = await run_in_threadpool(png, await queues[asked.kind].ask(asked))
        else:
            content = await run_in_threadpool(lambda: png(painter.paint_interleaved([asked])[0]))
        return Response(content, media_type="image/png")

    return made


def main() -> None:
    told = config()
    made = app(Painter(told), grouped=told.grouped)
    uvicorn.run(made, host=HOST, port=told.port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
