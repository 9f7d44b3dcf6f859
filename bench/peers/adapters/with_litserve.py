"""LitServe with its own dynamic batching.

Naive: one API, batches as they come, split by step count inside. Grouped: one API with a path, a queue and a worker
process per step count, which is how its documentation serves several models. Given: `max_batch_size` the largest
compiled batch, `batch_timeout` 2 ms (0 makes its loop spin on a core of its own), `fast_queue` (ZeroMQ, which it
recommends beyond 100 requests a second), for the naive one `workers_per_device` the number of cores, as it says for
CPUs, with the engine's threads shared among them.
"""

from collections.abc import Sequence
from typing import Any

import litserve as ls
from starlette.responses import Response
from torch import Tensor

from bench.peers.adapters._peer import HOST, PATH, config
from bench.peers.pictures import Ask, Config, Painter, png

_BATCH_TIMEOUT_S = 0.002


class Pictures(ls.LitAPI):
    """`kind` is the only one that it makes; None: all."""

    def __init__(self, told: Config, kind: str | None, threads: int) -> None:
        path = PATH if kind is None else f"{PATH}/{kind}"
        super().__init__(max_batch_size=told.rows, batch_timeout=_BATCH_TIMEOUT_S, api_path=path)
        self._told, self._kind, self._threads = told, kind, threads

    def setup(self, device: str) -> None:
        self._painter = Painter(self._told, [self._kind] if self._kind else None, self._threads)

    def decode_request(self, request: dict[str, Any]) -> Ask:
        return Ask(**request)

    def batch(self, inputs: Sequence[Ask]) -> list[Ask]:
        return list(inputs)

    def predict(self, x: list[Ask]) -> list[Tensor]:
        return self._painter.paint_split(x)

    def unbatch(self, output: list[Tensor]) -> list[Tensor]:
        return output

    def encode_response(self, output: Tensor) -> Response:
        return Response(png(output), media_type="image/png")


def main() -> None:
    told = config()
    workers = 1 if told.grouped else told.threads
    apis = [Pictures(told, kind, told.threads // workers) for kind in (told.kinds if told.grouped else (None,))]
    server = ls.LitServer(apis, accelerator="cpu", workers_per_device=workers, timeout=60, fast_queue=True)
    server.run(host=HOST, port=told.port, num_api_servers=1, log_level="warning", generate_client_file=False)


if __name__ == "__main__":
    main()
