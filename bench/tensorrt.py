"""What TensorRT plans cost to build and what other weights cost: `python -m bench.tensorrt` writes bench/tensorrt.json.

Without a GPU: seconds and size of plans that are built ahead, for each graph of the embedded teachers, precision and
place of the weights. On a GPU also: a refit and weights as inputs against a build with constants, and milliseconds of a
call in each form, which is what decides between them. `build_s` is what its own process took after its start,
`cpu_s` its processor time, start included.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor

from bench.machine import described, spread
from distill_jobs.tasks import base as tasks
from distill_jobs.teachers.publish import publish
from engines.backends import _tensorrt_library as libraries
from engines.backends import tensorrt
from engines.backends._tensorrt_build import FACTS, PLAN
from engines.backends.base import Engine, Precision, Profile
from engines.cache import DiskCache
from engines.graph import ComponentGraph, GraphStore, spec
from engines.loader import load_weights, reader
from engines.registry.memory import MemoryRegistry

console = Console(stderr=True)
_OUT = Path(__file__).parent / "tensorrt.json"
_BATCHES = (1, 2, 4, 8)
_CALLS = 50
PLACES: tuple[Literal["set", "constant"], ...] = ("set", "constant")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--targets", nargs="+", default=["SM80", "SM86", "SM89", "SM120"])
    parser.add_argument("--tasks", nargs="+", default=["shapes", "digits"])
    parser.add_argument("--quick", action="store_true", help="one teacher, one precision")
    given = parser.parse_args()
    precisions: tuple[Precision, ...] = ("bf16",) if given.quick else ("fp32", "bf16")
    library, gpu = libraries.find(), libraries.gpu()
    plans, reloads = [], []
    with tempfile.TemporaryDirectory() as cache:
        for task in given.tasks[:1] if given.quick else given.tasks:
            for role, graph, weights in graphs(task, GraphStore(DiskCache(Path(cache)))):
                about = {"task": task, "graph": role, "parameters": sum(value.numel() for value in weights.values())}
                for precision in precisions:
                    for profile in forms(precision, tuple(given.targets)):
                        plans.append(about | planned(graph, profile, weights))
                        console.print(plans[-1])
                    for profile in here(precision, library, gpu):
                        reloads.append(about | reloaded(graph, profile, weights))
                        console.print(reloads[-1])
    report = described("bench.tensorrt") | {
        "library": f"{library.name} {library.version}",
        "targets": given.targets,
        "plans": plans,
        "gpu": gpu and f"{gpu.name} {gpu.capability}",
        "reloads": reloads if gpu else "not measured: no GPU here",
    }
    _OUT.write_text(json.dumps(report, indent=1) + "\n")
    console.print(f"wrote {_OUT}")


def forms(precision: Precision, targets: tuple[str, ...]) -> list[Profile]:
    return [Profile(_BATCHES, precision, weights=place, targets=targets) for place in PLACES]


def here(precision: Precision, library: libraries.Library, gpu: libraries.Gpu | None) -> list[Profile]:
    """What runs here: refitted, constant, and weights as inputs where the library builds ahead for this GPU."""
    if gpu is None:
        return []
    ahead = library.rtx and gpu.capability in library.api.ComputeCapability.__members__
    return forms(precision, ()) + (forms(precision, (gpu.capability,))[:1] if ahead else [])


def graphs(task: str, store: GraphStore) -> Iterator[tuple[str, ComponentGraph, dict[str, Tensor]]]:
    """Each component of an embedded teacher with its weights."""
    registry = MemoryRegistry()
    manifest = registry.student(publish(registry, "bench", task=tasks.load(task)))
    for role, part in manifest.components.items():
        graph = store.graph(spec(manifest, role, reader(registry, manifest)))
        yield role, graph, graph.select(load_weights(registry, part))


def planned(graph: ComponentGraph, profile: Profile, weights: dict[str, Tensor]) -> dict[str, Any]:
    graph.onnx()  # the export is not what is measured
    begun = time.perf_counter()
    folder = tensorrt.plan(graph, profile, weights)
    facts = json.loads((folder / FACTS).read_text())
    return {
        "precision": profile.precision,
        "weights": facts["form"],
        "build_s": round(facts["build_s"], 2),
        "cpu_s": round(facts["cpu_s"], 2),
        "with_process_s": round(time.perf_counter() - begun, 2),
        "plan_mb": round((folder / PLAN).stat().st_size / 1e6, 2),
    }


def reloaded(graph: ComponentGraph, profile: Profile, weights: dict[str, Tensor]) -> dict[str, Any]:
    """On the GPU here: the first engine, then another with other weights, and its calls."""
    backend = tensorrt.TensorRt()
    begun = time.perf_counter()
    compiled = backend.build(graph, profile)
    backend.load(compiled, weights).close()
    first_s = time.perf_counter() - begun
    other = {name: value * 1.01 for name, value in weights.items()}
    begun = time.perf_counter()
    engine = backend.load(compiled, other)
    again_s = time.perf_counter() - begun
    calls = {str(rows): spread(list(_calls(engine, graph.example(rows)))) for rows in _BATCHES}
    engine.close()
    return {
        "precision": profile.precision,
        "weights": tensorrt.form(profile),
        "first_s": round(first_s, 3),
        "other_weights_s": round(again_s, 3),
        "call_ms": calls,
    }


def _calls(engine: Engine, inputs: dict[str, Tensor]) -> Iterator[float]:
    """Milliseconds, inputs and outputs on the GPU, after warm calls."""
    held = {name: value.to("cuda") for name, value in inputs.items()}
    for i in range(_CALLS + 5):
        begun = time.perf_counter()
        engine.run(**held)
        torch.cuda.synchronize()
        if i >= 5:
            yield (time.perf_counter() - begun) * 1e3


if __name__ == "__main__":
    main()
