"""Ray Serve with `@serve.batch`.

Naive: one batched method for all, split by step count inside. Grouped: a batched method per step count, each with a
queue of its own. Given: one replica that holds all cores, `max_batch_size` the largest compiled batch,
`batch_wait_timeout_s` 2 ms (its default of 10 would cost a lone request more than its engine calls),
`max_ongoing_requests` above every load here, OMP_NUM_THREADS as its performance page says, a plain Starlette
response, no dashboard, no access log. Ray's token authentication
is on, and where that can be it runs in a network of its own, since most of its sockets listen everywhere.
"""

import asyncio
import signal
from collections.abc import Awaitable, Callable

import ray
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.schema import LoggingConfig
from starlette.requests import Request
from starlette.responses import Response
from torch import Tensor

from bench.peers.adapters._peer import HOST, config
from bench.peers.pictures import Ask, Config, Painter, png

_WAIT_S = 0.002


class Pictures:
    def __init__(self, told: Config) -> None:
        self._painter = Painter(told)
        groups = list(told.kinds) if told.grouped else [""]
        self._paint = {name: self._batched(told.rows) for name in groups}
        self._grouped = told.grouped

    def _batched(self, rows: int) -> Callable[[Ask], Awaitable[Tensor]]:
        @serve.batch(max_batch_size=rows, batch_wait_timeout_s=_WAIT_S)
        async def paint(asked: list[Ask]) -> list[Tensor]:
            return await asyncio.to_thread(self._painter.paint_split, asked)

        made: Callable[[Ask], Awaitable[Tensor]] = paint
        return made

    async def __call__(self, request: Request) -> Response:
        asked = Ask(**await request.json())
        picture = await self._paint[asked.kind if self._grouped else ""](asked)
        return Response(await asyncio.to_thread(png, picture), media_type="image/png")


def main() -> None:
    told = config()
    ray.init(_node_ip_address=HOST, include_dashboard=False, num_cpus=told.threads, log_to_driver=False)
    serve.start(
        http_options=HTTPOptions(host=HOST, port=told.port), logging_config=LoggingConfig(enable_access_log=False)
    )
    options = {"num_replicas": 1, "max_ongoing_requests": 512, "ray_actor_options": {"num_cpus": told.threads - 0.5}}
    serve.run(serve.deployment(**options)(Pictures).bind(told), route_prefix="/")
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
