"""What TensorRT plans cost to build and what other weights cost: `python -m bench.tensorrt` writes bench/tensorrt.json.

Without a GPU: seconds and size of plans that are built ahead, for each graph of the embedded teachers, precision and
place of the weights; of denoisers also in fp8 and with weights that may be streamed. On a GPU also: a refit and weights
as inputs against a build with constants, and milliseconds of a call in each form, which is what decides between them,
in fp8, and with half of the weights streamed. `build_s` is what its own process took after its start,
`cpu_s` its processor time, start included.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor

from bench.machine import described, spread
from distill_jobs.tasks import base as tasks
from distill_jobs.teachers.publish import publish
from engines import scales
from engines.backends import _tensorrt_library as libraries
from engines.backends import tensorrt
from engines.backends._tensorrt_build import FACTS, PLAN
from engines.backends.base import Engine, Precision, Profile, num_weights
from engines.cache import DiskCache
from engines.graph import ComponentGraph, GraphStore, spec
from engines.parts import load_weights, reader
from engines.registry.memory import MemoryRegistry

console = Console(stderr=True)
_OUT = Path(__file__).parent / "tensorrt.json"
_BATCHES = (1, 2, 4, 8)
_CALLS = 50
_FP8 = ("SM89", "SM90", "SM100", "SM103", "SM110", "SM120", "SM121")
"""The capabilities with fp8."""
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
            for part in parts(task, GraphStore(DiskCache(Path(cache)))):
                about = {"task": task, "graph": part.role, "parameters": num_weights(part.graph)}
                for precision in precisions:
                    for profile in forms(part, precision, tuple(given.targets)):
                        plans.append(about | planned(part, profile))
                        console.print(plans[-1])
                    for profile in here(part, precision, library, gpu):
                        reloads.append(about | reloaded(part, profile))
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


@dataclass(frozen=True, slots=True)
class Part:
    """A component of a student; `largest` is what fp8 takes of a denoiser."""

    role: str
    graph: ComponentGraph
    weights: dict[str, Tensor]
    largest: dict[str, float] | None


def forms(part: Part, precision: Precision, targets: tuple[str, ...]) -> list[Profile]:
    """With no targets: for the GPU here."""
    made = [Profile(_BATCHES, precision, weights=place, targets=targets) for place in PLACES]
    if part.largest and precision == "bf16":
        half_bytes = num_weights(part.graph)  # of two bytes each
        able = tuple(name for name in targets if name in _FP8)
        made.append(replace(made[-1], weight_room=half_bytes))
        made += [replace(made[1], precision="fp8", targets=able)] if able or not targets else []
    return made


def here(part: Part, precision: Precision, library: libraries.Library, gpu: libraries.Gpu | None) -> list[Profile]:
    """What runs here: refitted, constant, and weights as inputs where the library builds ahead for this GPU."""
    if gpu is None:
        return []
    ahead = library.rtx and gpu.capability in library.api.ComputeCapability.__members__
    made = forms(part, precision, ()) + (forms(part, precision, (gpu.capability,))[:1] if ahead else [])
    return [profile for profile in made if profile.precision != "fp8" or gpu.capability in _FP8]


def parts(task: str, store: GraphStore) -> Iterator[Part]:
    """Each component of an embedded teacher."""
    registry = MemoryRegistry()
    manifest = registry.student(publish(registry, "bench", task=tasks.load(task)))
    for role, component in manifest.components.items():
        graph = store.graph(spec(manifest, role, reader(registry, manifest)))
        largest = scales.largest(registry, manifest, role, "cpu") if graph.spec.role == "denoiser" else None
        yield Part(role, graph, graph.select(load_weights(registry, component)), largest)


def planned(part: Part, profile: Profile) -> dict[str, Any]:
    part.graph.onnx()  # the export is not what is measured
    begun = time.perf_counter()
    folder = tensorrt.plan(part.graph, profile, part.weights, part.largest)
    facts = json.loads((folder / FACTS).read_text())
    return {
        "precision": profile.precision,
        "weights": facts["form"],
        "streamed": tensorrt.streamed(part.graph, profile),
        "build_s": round(facts["build_s"], 2),
        "cpu_s": round(facts["cpu_s"], 2),
        "with_process_s": round(time.perf_counter() - begun, 2),
        "plan_mb": round((folder / PLAN).stat().st_size / 1e6, 2),
    }


def reloaded(part: Part, profile: Profile) -> dict[str, Any]:
    """On the GPU here: the first engine, then another with other weights, and its calls."""
    backend, graph = tensorrt.TensorRt(), part.graph
    begun = time.perf_counter()
    compiled = replace(backend.build(graph, profile), largest=part.largest)
    backend.load(compiled, part.weights).close()
    first_s = time.perf_counter() - begun
    other = {name: value * 1.01 for name, value in part.weights.items()}
    begun = time.perf_counter()
    engine = backend.load(compiled, other)
    again_s = time.perf_counter() - begun
    calls = {str(rows): spread(list(_calls(engine, graph.example(rows)))) for rows in _BATCHES}
    engine.close()
    return {
        "precision": profile.precision,
        "weights": tensorrt.form(graph, profile),
        "streamed": tensorrt.streamed(graph, profile),
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
