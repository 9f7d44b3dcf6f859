"""What each backend takes for the networks of the embedded teacher: the figures behind `auto`.

`python -m bench.backends` measures every backend that runs here in a fresh process each, in every precision that needs
no scales of a student's own (`bench.tensorrt` has the others), with weights set and as constants: milliseconds per call
at each batch size, of other weights on the known graph, and seconds of the first build (the graph's export left out,
which all share and which is measured once). `reload_share` is what other weights take of all that a new graph would:
its export, where the backend reads one, its build and its first load. It writes `bench/backends.json` and prints a
table.
The processor's own time stands beside the wall's, because it hardly notices what else the machine does.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.machine import described, spread
from distill_jobs.tasks.shapes import TASK
from distill_jobs.teachers import publish
from engines import plugins
from engines.artefact import import_diffusers
from engines.backends.base import BATCHES, SCALED, Choice, Profile, load_backend
from engines.cache import DiskCache
from engines.graph import ComponentGraph, GraphStore, export
from engines.loader import Loader
from engines.parts import load_weights
from engines.registry.memory import MemoryRegistry

OUT = Path(__file__).with_name("backends.json")
GRAPHS = Path(".fewstep/bench-engines")
"""Kept between runs: graphs are exported once."""
ROLES = ("denoiser", "decoder")
_NO_ENGINE = ("paced",)  # it takes no processor
out = Console()


def cells() -> list[dict[str, str]]:
    """Every backend that can run here, in each of its precisions and with weights as they make a difference."""
    found = []
    for name in plugins.names("engines.backends"):
        backend = load_backend(name)
        if name not in _NO_ENGINE and backend.available():
            kinds = ("set", "constant") if backend.constants_pay else ("set",)
            precisions = [p for p in plugins.load("engines.backends", name, "TOLERANCE") if p not in SCALED]
            found += [{"backend": name, "precision": p, "weights": w} for p in precisions for w in kinds]
    return found


def measured(cell: dict[str, Any], given: argparse.Namespace) -> dict[str, Any]:
    """One cell, in this process, which should be fresh."""
    torch.set_num_threads(given.threads)
    if "export" in cell:
        return cell | {"export_s": _exported(cell["export"])}
    profile = Profile(given.batches, cell["precision"], given.threads, cell["weights"])
    kind = load_backend(cell["backend"]).reload if cell["weights"] == "set" else "recompile"
    return cell | {"reload": kind} | {role: _measured(cell["backend"], role, profile, given) for role in given.roles}


def _exported(role: str) -> float:
    graph, _ = _part(role, None, [])
    with tempfile.TemporaryDirectory() as folder:
        return _timed(lambda: export(graph.spec, Path(folder)))[0]


def with_shares(cell: dict[str, Any], export_s: dict[str, float]) -> dict[str, Any]:
    """A cell that says of each role what other weights take of all that a new graph would take."""
    for role, exported_s in export_s.items():
        whole_s = cell[role]["build_s"] + (exported_s if cell[role]["reads_export"] else 0.0)
        cell[role]["reload_share"] = round(cell[role]["reload_ms"]["median"] / 1000 / whole_s, 4)
    return cell


def _measured(name: str, role: str, profile: Profile, given: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        reads: list[str] = []
        graph, weights = _part(role, DiskCache(Path(scratch)), reads)
        backend = load_backend(name)
        built_s, compiled = _timed(lambda: backend.build(graph, profile))
        first_s, engine = _timed(lambda: backend.load(compiled, weights))
        reads_export = bool(reads)
        reloads = [_timed(lambda: backend.load(compiled, weights))[0] * 1000 for _ in range(given.runs)]
        calls = {
            str(rows): _call(lambda: engine.run(**inputs), given)
            for rows in profile.batches
            if (inputs := _inputs(graph, rows))
        }
    return {
        "build_s": round(built_s + first_s, 4),
        "reads_export": reads_export,
        "reload_ms": spread(reloads, 2),
        "call_ms": calls,
    }


def _part(role: str, built: DiskCache | None, reads: list[str]) -> tuple[ComponentGraph, dict[str, Tensor]]:
    """The graph with its export at hand, and nothing built from it. Who reads the export is noted in `reads`."""
    registry = MemoryRegistry()
    contract = TASK.teacher
    version = import_diffusers(
        TASK.pipeline,
        registry,
        name=contract.name,
        schedules=[publish.uniform(contract.steps)],
        guidance=contract.guidance,
        solver=contract.solver,
    )
    manifest = registry.student(version)
    exports = GraphStore(DiskCache(GRAPHS))
    known = Loader(registry, Choice("eager", "fp32"), Profile(), exports).graphs(manifest)[role]
    if built is not None:
        known.onnx()

    def folder() -> Path:
        reads.append(role)
        return known.folder()

    graph = ComponentGraph(known.spec, folder, built)
    return graph, graph.select(load_weights(registry, manifest.components[role]))


def _call(call: Callable[[], object], given: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of the wall and of this process' processor time."""
    for _ in range(3):
        call()
    wall, cpu = [], []
    for _ in range(given.calls):
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        call()
        wall.append(1000 * (time.perf_counter() - wall_s))
        cpu.append(1000 * (time.process_time() - cpu_s))
    return {"wall": spread(wall, 2), "cpu": spread(cpu, 2)}


def _inputs(graph: ComponentGraph, rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return {
        name: torch.rand(zero.shape, generator=generator).to(zero.dtype) for name, zero in graph.example(rows).items()
    }


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    begun_s = time.perf_counter()
    made = work()
    return time.perf_counter() - begun_s, made


def table(report: dict[str, Any], role: str) -> Table:
    made = Table(title=f"{role}: ms of processor time a call (median), {report['threads']} threads")
    for title in ("backend", "weights", *(f"batch {n}" for n in report["batches"]), "reload ms", "of all", "build s"):
        made.add_column(title, justify="left" if title in ("backend", "weights") else "right")
    for cell in report["cells"]:
        figures = cell[role]
        calls = [f"{one['cpu']['median']:.2f}" for one in figures["call_ms"].values()]
        name = f"{cell['backend']} {cell['precision']}"
        reload = f"{figures['reload_ms']['median']:.1f}", f"{figures['reload_share']:.1%}"
        made.add_row(name, cell["weights"], *calls, *reload, f"{figures['build_s']:.1f}")
    return made


def _in_a_process(cell: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.backends", *sys.argv[1:], "--measure", json.dumps(cell)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, Any] = json.loads(done.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--roles", nargs="+", choices=ROLES, default=ROLES)
    parser.add_argument("--backends", nargs="+", help="only these")
    parser.add_argument("--calls", type=int, default=50)
    parser.add_argument("--runs", type=int, default=5, help="reloads")
    parser.add_argument(
        "--quick", action="store_true", help="few calls of the denoiser at two sizes: the script itself"
    )
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.batches = tuple(given.batches)
    if given.quick:
        given.calls, given.runs, given.batches, given.roles = 5, 2, (1, 4), ("denoiser",)
    if given.measure:
        sys.stdout.write(json.dumps(measured(json.loads(given.measure), given)) + "\n")
        return
    wanted = [cell for cell in cells() if given.backends is None or cell["backend"] in given.backends]
    export_s = {role: _in_a_process({"export": role})["export_s"] for role in given.roles}
    made = [with_shares(_in_a_process(cell), export_s) for cell in wanted]
    about = {"threads": given.threads, "batches": given.batches, "export_s": export_s}
    report = described("bench.backends") | about | {"cells": made}
    given.out.write_text(json.dumps(report, indent=1) + "\n")
    for role in given.roles:
        out.print(table(report, role))


if __name__ == "__main__":
    main()
