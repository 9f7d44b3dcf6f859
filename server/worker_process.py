"""Puts a worker together from its settings: broker, registry, engines, metrics port, signals."""

import asyncio
import contextlib
import logging
import math
import os
import signal
import sys
from collections.abc import Iterator

import torch
from prometheus_client import start_http_server

from engines import memory, videos
from engines.backends.base import SCALED, Profile, choose, device_of, is_gpu, load_backend
from engines.cache import DiskCache
from engines.errors import InvalidRequest, NotBuilt
from engines.graph import GraphStore
from engines.loader import Loader
from engines.registry.base import Registry, open_registry
from server import metrics, tracing
from server.brokers.base import new_identity, open_broker
from server.settings import WorkerSettings
from server.stall import StallMeter
from server.students import Students
from server.worker import Worker

log = logging.getLogger(__name__)
SWITCH_S = 0.001
"""Threads hand over the GIL this often: engine threads must not wait five milliseconds after each call."""


async def serve(settings: WorkerSettings) -> None:
    """Runs until SIGTERM or SIGINT, then drains."""
    sys.setswitchinterval(SWITCH_S)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    with contextlib.suppress(NotBuilt):
        videos.check("mp4")  # what that imports would hold up requests later
    registry = open_registry(settings.registry_url)
    measured = metrics.make()
    measured.engine_cache_bytes.set_function(DiskCache(settings.cache_dir).size_bytes)
    measured.engine_cache_limit_bytes.set(settings.cache_bytes)
    broker = open_broker(
        settings.redis_url,
        new_identity(settings.id or "worker"),
        lease_s=settings.lease_s,
        result_ttl_s=settings.result_ttl_s,
    )
    with tracing.opened("worker") as traced, _metrics_port(settings, measured), _meter(settings) as meter:
        await broker.start()
        try:
            loader = await asyncio.to_thread(make_loader, settings, registry)
            students = Students(settings, broker, registry, loader, measured, traced)
            await Worker(settings, broker, students, measured, meter, traced).run(stop)
        finally:
            await broker.close()


def make_loader(settings: WorkerSettings, registry: Registry) -> Loader:
    """Graphs are exported in another process, so that live requests keep the GIL."""
    threads = settings.threads or len(os.sched_getaffinity(0))
    choice = choose(settings.backend, settings.precision, settings.device)
    device = device_of(choice.backend, settings.device)
    overlaps = load_backend(choice.backend).concurrent and not is_gpu(device)
    streams = settings.streams or 1
    if streams > 1 and not overlaps:
        raise InvalidRequest(f"WORKER_STREAMS={streams}: {choice.backend} on {device} makes one call at a time, set 0")
    if streams > threads:
        raise InvalidRequest(f"WORKER_STREAMS={streams}: there are {threads} threads to share, set at most as many")
    if choice.precision in SCALED and settings.specialise_after_s == math.inf:
        raise InvalidRequest(
            f"WORKER_PRECISION={choice.precision} is what versions are specialised in, and they never are here: set "
            f"WORKER_SPECIALISE_AFTER_S, or choose {SCALED[choice.precision]}"
        )
    torch.set_num_threads(1 if overlaps else threads)
    told = {"backend": choice.backend, "precision": choice.precision, "device": device, "threads": threads}
    log.info("engine", extra=told)
    profile = Profile(
        batches=tuple(sorted(settings.batch_sizes)),
        precision=choice.precision,
        threads=threads // streams,
        streams=streams,
        device=device,
        targets=settings.targets,
    )
    cache = DiskCache(settings.cache_dir, settings.cache_bytes)
    tune = settings.streams == 0 and overlaps
    room_bytes = settings.resident_bytes or memory.share(device)
    return Loader(registry, choice, profile, GraphStore(cache, in_process=False), tune=tune, room_bytes=room_bytes)


@contextlib.contextmanager
def _metrics_port(settings: WorkerSettings, measured: metrics.Metrics) -> Iterator[None]:
    if not settings.metrics_port:
        yield
        return
    server, thread = start_http_server(settings.metrics_port, settings.metrics_host, registry=measured.registry)
    try:
        yield
    finally:
        server.shutdown()
        thread.join()


@contextlib.contextmanager
def _meter(settings: WorkerSettings) -> Iterator[StallMeter]:
    with contextlib.ExitStack() as stack:
        log_file = stack.enter_context(settings.steps_log.open("a")) if settings.steps_log else None
        yield StallMeter(log_file)
