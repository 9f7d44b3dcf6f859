"""The programs of a system: gateway, worker, distiller and the seeding of a new registry.

`fewstep up` starts them all; a cluster runs each alone. This is where serving and distillation are put together.
"""

import contextlib
import signal
import threading
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engines import aside
from engines.errors import RevisionConflict
from engines.registry.base import open_registry
from server import logs, tracing
from server.settings import GatewaySettings, WorkerSettings, load
from server.tracing import Tracing

if TYPE_CHECKING:
    from distill_jobs.jobs import DistillJob

_GRACE_S = 30


def gateway() -> None:
    """Run the HTTP gateway. It is told by GATEWAY_* variables: GATEWAY_REDIS_URL, GATEWAY_REGISTRY_URL …"""
    import uvicorn

    from server.refusing import RefusingServer

    settings = load(GatewaySettings)
    logs.configure("gateway", settings.log_level)
    logs.log_settings(settings)
    with tracing.opened("gateway") as traced:
        app = _gateway_app(settings, traced)
        config = uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_GRACE_S,
        )
        RefusingServer(config, app.state.gateway.refuse, settings.drain_s).run()


def _gateway_app(settings: GatewaySettings, traced: Tracing | None) -> Any:
    from distill_jobs import api
    from distill_jobs.queue import JobQueue, connect
    from distill_jobs.records import JobRecords
    from server.app import create_app
    from server.brokers.base import new_identity, open_broker

    redis_url = settings.redis_url
    registry = open_registry(settings.registry_url)
    broker = open_broker(redis_url, new_identity(settings.id or "gateway"), result_ttl_s=settings.result_ttl_s)
    app = create_app(settings, broker, registry, tracing=traced)
    app.include_router(api.router(JobQueue(connect(redis_url), JobRecords(registry)), app.state.gateway.authorise))
    serving = app.router.lifespan_context

    @contextlib.asynccontextmanager
    async def lifespan(application: Any) -> AsyncIterator[None]:
        await broker.start()
        try:
            async with serving(application):
                yield
        finally:
            await broker.close()

    app.router.lifespan_context = lifespan
    return app


def worker() -> None:
    """Run one worker. It is told by WORKER_* variables: WORKER_REDIS_URL, WORKER_REGISTRY_URL, WORKER_BACKEND …

    Graphs and engines are kept in WORKER_CACHE_DIR, at most WORKER_CACHE_BYTES of those that no process reads.
    """
    import uvloop

    from server.worker import run

    settings = load(WorkerSettings)
    logs.configure("worker", settings.log_level)
    logs.log_settings(settings)
    uvloop.run(run(settings))
    aside.leave()


def distiller() -> None:
    """Run one distiller: it takes a job at a time. It is told by DISTILLER_* variables."""
    from distill_jobs.queue import JobQueue, connect
    from distill_jobs.records import JobRecords
    from distill_jobs.service import Service
    from distill_jobs.settings import DistillerSettings

    settings = load(DistillerSettings)
    logs.configure("distiller", settings.log_level)
    logs.log_settings(settings)
    registry = open_registry(settings.registry_url)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    queue = JobQueue(connect(settings.redis_url), JobRecords(registry))
    with tracing.opened("distiller") as traced:
        ended = partial(trace_job, traced)
        Service(settings, registry, queue, working=log_job, ended=ended).run_forever(stop)


@contextlib.contextmanager
def log_job(job: "DistillJob") -> Iterator[None]:
    """Every line meanwhile names the job and its trace."""
    tokens = logs.job_id.set(job.id), logs.trace_id.set(job.trace_id)
    try:
        yield
    finally:
        logs.trace_id.reset(tokens[1])
        logs.job_id.reset(tokens[0])


def trace_job(traced: Tracing | None, job: "DistillJob") -> None:
    """A job as a span, with a part for each state that it was in."""
    if traced is not None:
        told = {"fewstep.job.id": job.id, "fewstep.job.status": str(job.state)}
        error = job.log[-1].error
        said = f"{error['code']}: {error['message']}" if error else None
        traced.record("job", job.marks, job.traceparent, attributes=told, error=said)


def seed(
    registry_url: Annotated[str, typer.Option(help="A folder or fsspec URL.")],
    task: Annotated[str, typer.Option(help="Whose embedded teacher: shapes, or digits.")] = "shapes",
    deployment: Annotated[str | None, typer.Option(help="What it serves; called like the task if missing.")] = None,
) -> None:
    """Publish an embedded teacher; does nothing where the deployment exists.

    Example: fewstep seed --registry-url .fewstep/registry --task digits
    """
    name = deployment or task
    registry = open_registry(registry_url)
    if name in registry.deployments():
        return
    from distill_jobs.tasks import base as tasks
    from distill_jobs.teachers.publish import publish

    with contextlib.suppress(RevisionConflict):  # another one was first with the same
        publish(registry, name, task=tasks.load(task))
