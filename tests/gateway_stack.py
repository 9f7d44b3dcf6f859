"""A gateway behind a real uvicorn on a loopback port, with a worker that paints instead of running networks.

Everything but the pictures is the product: HTTP, gateway, broker, registry. Prompts direct the painter:
"wait" holds a request until it is canceled or expires, "fail" answers with an error.
"""

import asyncio
import io
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import httpx
import uvicorn
from fastapi import APIRouter, FastAPI
from PIL import Image

from engines.errors import InvalidRequest
from engines.registry.base import Registry, Revision
from engines.registry.memory import MemoryRegistry
from server import leases
from server.app import Authorise, create_app
from server.brokers.base import Broker, Claim
from server.brokers.memory import MemoryBroker, MemoryServer
from server.messages import ErrorBody, GenerateRequest, GenerateResult, Refined, StepEvent, Timing
from server.settings import GatewaySettings
from server.tracing import Tracing
from tests.eventually import eventually

T = TypeVar("T")
COST = leases.VersionCost(
    encode=leases.StageCost(alone_s=0.001, row_s=0.001),
    step=leases.StageCost(alone_s=0.005, row_s=0.002),
    decode=leases.StageCost(alone_s=0.001, row_s=0.001),
)


def picture(seed: int, width: int, height: int, image_format: str) -> bytes:
    """A small real picture whose colour is its seed."""
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (seed % 256, seed // 256 % 256, 128)).save(buffer, image_format)
    return buffer.getvalue()


class Painter:
    """Answers claims as a worker does, one after another."""

    def __init__(self, broker: Broker, deployments: dict[str, list[str]]) -> None:
        self.broker, self.deployments = broker, deployments
        self.started: list[str] = []
        self.canceled: list[str] = []
        self.edits: list[tuple[GenerateRequest, bytes | None]] = []  # with the picture that is changed

    def lease(self) -> leases.WorkerLease:
        versions = {version for served in self.deployments.values() for version in served}
        return leases.WorkerLease(
            deployments=self.deployments, backend="painter", precision="fp32", costs=dict.fromkeys(versions, COST)
        )

    async def run(self) -> None:
        await asyncio.gather(self._serve(), self._live(), self._hear())

    async def _live(self) -> None:
        while True:
            await self.broker.renew_lease(leases.write(self.lease()))
            await asyncio.sleep(1.0)

    async def _hear(self) -> None:
        async for request_id in self.broker.cancels():
            self.canceled.append(request_id)

    async def _serve(self) -> None:
        while True:
            for claim in await self.broker.claim(list(self.deployments), 16, None):
                for wanted in await self.broker.running([claim]):
                    await self._paint(wanted)

    async def _paint(self, claim: Claim) -> None:
        request = claim.request
        self.started.append(request.id)
        if request.edits_from is not None:
            self.edits.append((request, await self.broker.source(request.id)))
        if "wait" in request.prompt:
            return
        if "fail" in request.prompt:
            error = ErrorBody.of(InvalidRequest("this prompt asked to fail", param="prompt"))
            await self.broker.finish(claim, GenerateResult(id=request.id, status="failed", error=error))
            return
        seeds = [(request.seed + index) % 2**63 for index in range(request.n)]
        await self._show_steps(claim, seeds)
        images = [picture(seed, request.width, request.height, request.output_format) for seed in seeds]
        result = GenerateResult(
            id=request.id,
            status="succeeded",
            version=request.version,
            tier=request.tier,
            steps=request.steps,
            backend="painter",
            worker=self.broker.identity,
            seeds=seeds,
            timing=Timing(queue_ms=1.0, encode_ms=0.5, denoise_ms=4.0, decode_ms=0.5, image_ms=0.25, total_ms=6.25),
            ignored_words=[word for word in request.prompt.split() if word == "xyzzy"],
            text_tokens=len(request.prompt.split()),
            num_images=request.n,
            downgraded_from=request.downgraded_from,
            refined=_refined(request),
        )
        await self.broker.finish(claim, result, images)

    async def _show_steps(self, claim: Claim, seeds: list[int]) -> None:
        request = claim.request
        if not request.events:
            return
        for step in range(1, request.steps + 1):
            await self.broker.emit(StepEvent(id=request.id, kind="step", step=step, total=request.steps))
        for index in range(request.partial_images):
            data = picture(seeds[0], request.width, request.height, request.output_format)
            await self.broker.emit(StepEvent(id=request.id, kind="partial_image", partial_index=index), data)


def _refined(request: GenerateRequest) -> Refined | None:
    asked = request.refinement
    if asked is None or request.teacher is None:
        return None
    return Refined(refine=asked.how, teacher=request.teacher, redone=[0] if asked.how == "redo" else [])


class GatewayStack:
    """`client` calls it; `call` runs a coroutine in its loop."""

    def __init__(self, app: FastAPI, port: int, loop: asyncio.AbstractEventLoop, painter: Painter) -> None:
        self.app, self.painter = app, painter
        self._loop = loop
        self.url = f"http://127.0.0.1:{port}"
        self.client = httpx.Client(base_url=self.url, timeout=10.0)

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    def metric(self, name: str, **labels: str) -> float:
        return self.app.state.gateway.metrics.registry.get_sample_value(name, labels) or 0.0


@contextmanager
def running(
    *revisions: Revision,
    registry: Registry | None = None,
    jobs_router: APIRouter | Callable[[Authorise], APIRouter] | None = None,
    worker: bool = True,
    brokers: tuple[Broker, Broker] | None = None,
    tracing: Tracing | None = None,
    **settings: Any,
) -> Iterator[GatewayStack]:
    """A stack that serves these revisions, whose students must be in `registry`.

    `brokers` are the gateway's and the worker's side; without them both are in memory.
    """
    registry = registry or MemoryRegistry()
    for revision in revisions:
        registry.commit(revision)
    # With its protocol named, asyncio switches Nagle's algorithm off: without, each answer waits 40 ms.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    port: int = listener.getsockname()[1]
    chosen = GatewaySettings(redis_url="memory:", registry_url="memory:", port=port, **{"poll_s": 0.05, **settings})
    memory = MemoryServer()
    gateway_side, worker_side = brokers or (MemoryBroker(memory, "gateway-1"), MemoryBroker(memory, "worker-1"))
    served: dict[str, list[str]] = {}
    for revision in revisions:
        served.setdefault(revision.deployment, []).extend(revision.versions)
    painter = Painter(worker_side, served)
    app = create_app(chosen, gateway_side, registry, jobs_router=jobs_router, tracing=tracing)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on"))
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        await gateway_side.start()
        await worker_side.start()
        painting = asyncio.create_task(painter.run()) if worker else None
        try:
            await server.serve(sockets=[listener])
        finally:
            if painting is not None:
                painting.cancel()
                await asyncio.gather(painting, return_exceptions=True)
            await gateway_side.close()
            await worker_side.close()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
    thread.start()
    try:
        eventually(lambda: server.started, 10)
        stack = GatewayStack(app, port, loop, painter)
        eventually(lambda: not worker or stack.client.get("/readyz").status_code == 200, 10)
        yield stack
        stack.client.close()
    finally:
        server.should_exit = True
        thread.join(10)
        loop.close()
