"""The measured cost curve that simulations run on: `python -m bench.costs` writes bench/costs.json.

Seconds of one call of each component of the embedded teacher at each batch size, on the engine that serves, cut into
the streams that a worker would have: of a lone call, which has all threads, and of calls that overlap, as many at once
as there are streams. The teacher and its students share graphs, so the curve is that of a student too.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from bench.fleet import Fleet
from bench.machine import described
from bench.system import CACHE, ring
from distill_jobs.tasks import shapes
from engines import streams
from engines.backends.base import BATCHES, Profile, choose, device_of
from engines.cache import DiskCache
from engines.cost import CostKey, CostModel
from engines.graph import GraphStore
from engines.loader import Loader
from engines.registry.base import Registry
from engines.registry.files import FilesRegistry
from engines.slot import STAGES

OUT = Path(__file__).parent / "costs.json"
_ROUND = 5


def recorded(workers: int = 1, path: Path = OUT) -> Fleet:
    """Workers as measured, with stages as blobs: `encode`, `denoise` and `decode`, each of shape ()."""
    read = json.loads(path.read_text())
    alone, overlapped = (CostModel.restore(json.dumps(read[name])) for name in ("costs", "overlapped"))
    return Fleet(alone, workers, BATCHES, streams=read["streams"], overlapped=overlapped)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--calls",
        type=int,
        default=100,
        help="at each size; the quickest round counts, which other work on the machine slowed least",
    )
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    report = described("bench.costs")
    with tempfile.TemporaryDirectory(prefix="fewstep-bench-") as folder:
        registry = FilesRegistry(Path(folder))
        [version] = ring(registry, shapes.TASK.pipeline, 1, [1])
        fleet = measured(registry, version, given.backend, given.threads, given.calls)
    choice = choose(given.backend)
    report |= {"engine": f"{choice.backend} {choice.precision}", "threads": given.threads, "streams": fleet.streams}
    report |= {"costs": json.loads(fleet.costs.snapshot()), "overlapped": json.loads(fleet.busy.snapshot())}
    given.out.write_text(json.dumps(report, indent=1) + "\n")


def measured(registry: Registry, version: str, backend: str, threads: int, calls: int) -> Fleet:
    """One worker with a version's engines as a worker has them."""
    choice = choose(backend)
    profile = Profile(BATCHES, choice.precision, threads, device=device_of(choice.backend))
    loader = Loader(registry, choice, profile, GraphStore(DiskCache(CACHE)), tune=True)
    manifest = registry.student(version)
    graphs = loader.graphs(manifest)
    loader.tune(graphs["denoiser"])
    loader.load(manifest)
    at_once, alone, overlapped = loader.profile.streams, CostModel(), CostModel()
    for role, graph in graphs.items():
        engine, stage = loader.engine(manifest, role), STAGES.get(role, "denoise")
        for size in BATCHES:
            call, key = partial(engine.run, **graph.example(size)), CostKey(stage, stage, ())
            alone.observe(key, size, call_s(partial(_alone, call), calls, 1))
            overlapped.observe(key, size, call_s(call, calls, at_once))
    return Fleet(alone, sizes=BATCHES, streams=at_once, overlapped=overlapped)


def _alone(call: Callable[[], object]) -> None:
    with streams.alone():
        call()


def call_s(call: Callable[[], object], calls: int, at_once: int) -> float:
    """Seconds of one call while so many run: the mean of the quickest round."""

    def some() -> None:
        for _ in range(_ROUND):
            call()

    seconds = list[float]()
    with ThreadPoolExecutor(at_once) as pool:
        for _ in range(max(1, calls // _ROUND)):
            begun_s = time.perf_counter()
            for done in [pool.submit(some) for _ in range(at_once)]:
                done.result()
            seconds.append((time.perf_counter() - begun_s) / _ROUND)
    return min(seconds)


if __name__ == "__main__":
    main()
