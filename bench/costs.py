"""The measured cost curve that simulations run on: `python -m bench.costs` writes bench/costs.json.

Seconds of one call of each component of the embedded teacher at each batch size, on the engine that serves. The
teacher and its students share graphs, so the curve is that of a student too.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from bench.machine import described
from bench.system import CACHE, ring
from distill_jobs.tasks import shapes
from engines.backends.base import Profile, choose, device_of
from engines.cache import DiskCache
from engines.cost import CostKey, CostModel
from engines.graph import GraphStore
from engines.loader import Loader
from engines.registry.files import FilesRegistry
from engines.slot import STAGES

OUT = Path(__file__).parent / "costs.json"
SIZES = (1, 2, 4, 8)


def read(path: Path = OUT) -> CostModel:
    """The recorded curve, with stages as blobs: `encode`, `denoise` and `decode`, each of shape ()."""
    return CostModel.restore(json.dumps(json.loads(path.read_text())["costs"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--calls",
        type=int,
        default=100,
        help="at each size; the quickest counts, which other work on the machine slowed least",
    )
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    report = described("bench.costs")
    choice = choose(given.backend)
    with tempfile.TemporaryDirectory(prefix="fewstep-bench-") as folder:
        registry = FilesRegistry(Path(folder))
        [version] = ring(registry, shapes.TASK.pipeline, 1, [1])
        profile = Profile(SIZES, choice.precision, given.threads, device=device_of(choice.backend))
        loader = Loader(registry, choice, profile, GraphStore(DiskCache(CACHE)))
        costs = measured(loader, version, given.calls)
    report |= {"engine": f"{choice.backend} {choice.precision}", "costs": json.loads(costs.snapshot())}
    given.out.write_text(json.dumps(report, indent=1) + "\n")


def measured(loader: Loader, version: str, calls: int) -> CostModel:
    student, costs = loader.load(loader.registry.student(version)), CostModel()
    for role, graph in loader.graphs(student.manifest).items():
        engine, stage = loader.engine(student.manifest, role), STAGES.get(role, "denoise")
        for size in SIZES:
            inputs, seconds = graph.example(size), list[float]()
            for _ in range(calls):
                begun_s = time.perf_counter()
                engine.run(**inputs)
                seconds.append(time.perf_counter() - begun_s)
            costs.observe(CostKey(stage, stage, ()), size, min(seconds))
    return costs


if __name__ == "__main__":
    main()
