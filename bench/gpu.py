"""Steps of SDXL-, Sana- and FLUX-shaped denoisers on a GPU: `python -m bench.gpu` writes bench/gpu.json.

Beside each other in one run, bf16 but for the last, on the same inputs, which are on the GPU:
    diffusers           its module as it stands, as a pipeline calls it
    diffusers compiled  the same under torch.compile with CUDA graphs (mode reduce-overhead, UNets channels-last)
    torch_compile, tensorrt   our engines, each call with its copies in and out
    tensorrt fp8        the same with the products of weights in fp8; speed does not depend on the scales either
A cell is a network, a size and a form; each is a process of its own, so that none inherits memory or clocks from the
last, and what was measured is written after each: stop it when you like. `share_of_peak` is the network's arithmetic
(multiplications and additions of its matrix products) per second over what a product of 8192-sized bf16 matrices
reaches on the same card.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bench.gpu_networks import SHAPES
from bench.machine import described, spread
from engines.backends.base import Profile, load_backend
from engines.cache import DiskCache
from engines.errors import FewstepError
from engines.graph import ComponentGraph, ComponentSpec, GraphStore

OUT = Path(__file__).with_name("gpu.json")
CACHE = Path(".fewstep/bench-gpu")
"""Kept between runs: code and plans are made once."""
FORMS = ("diffusers", "diffusers compiled", "torch_compile", "tensorrt", "tensorrt fp8")
_LARGEST = 8.0  # of what layers multiply, as far as fp8 is told
_PEAK = 8192
out = Console()


def cells(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for pixels in given.pixels:
        for network in given.networks:
            for form in given.forms:
                yield {"network": network, "pixels": pixels, "form": form}


def measured(cell: dict[str, Any], given: argparse.Namespace) -> dict[str, Any]:
    """One cell, in this process."""
    spec = SHAPES[cell["network"]].spec(cell["pixels"])
    begun = time.perf_counter()
    try:
        call = call_of(cell["form"], spec, given)
        ready_s = round(time.perf_counter() - begun, 1)
        steps = {str(n): spread(list(_times(call, inputs(spec, n), given.calls)), 2) for n in given.batches}
    except (FewstepError, RuntimeError) as error:
        return cell | {"failed": f"{type(error).__name__}: {str(error)[:1500]}"}
    memory_gb = round(torch.cuda.max_memory_allocated() / 1e9, 1)
    return cell | {"ready_s": ready_s, "step_ms": steps, "memory_gb": memory_gb}


def call_of(form: str, spec: ComponentSpec, given: argparse.Namespace) -> Callable[[dict[str, Tensor]], object]:
    if form.startswith("diffusers"):
        return _diffusers(spec, compiled=form.endswith("compiled"))
    graph = GraphStore(DiskCache(CACHE)).graph(spec)
    profile = Profile(tuple(given.batches), "bf16", device="cuda")
    if form == "tensorrt fp8":
        profile = replace(profile, precision="fp8", weights="constant")
    backend = load_backend(form.removesuffix(" fp8"))
    compiled = backend.build(graph, profile)
    if form == "tensorrt fp8":
        compiled = replace(compiled, largest=dict.fromkeys(graph.shapes, _LARGEST))
    engine = backend.load(compiled, _random(graph))
    gc.collect()
    return lambda inputs: engine.run(**inputs)


def _diffusers(spec: ComponentSpec, *, compiled: bool) -> Callable[[dict[str, Tensor]], object]:
    with torch.device("cuda"):
        network: Any = spec.network().to(torch.bfloat16).eval()
    if compiled and spec.family == "sdxl":
        network.to(memory_format=torch.channels_last)
    if compiled:
        network = torch.compile(network, mode="reduce-overhead", fullgraph=True)

    @torch.no_grad()
    def call(inputs: dict[str, Tensor]) -> object:
        made = network(**inputs)
        torch.cuda.synchronize()
        return made

    return lambda inputs: call({name: value.to(torch.bfloat16) for name, value in inputs.items()})


def _random(graph: ComponentGraph) -> dict[str, Tensor]:
    """Weights that keep values in range through many layers."""
    with torch.device("cuda"):
        network = graph.module()
        for module in network.modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and module.weight.abs().max() == 0:
                nn.init.normal_(module.weight, std=0.02)
    return {name: value.to("cpu", torch.bfloat16) for name, value in network.state_dict().items()}


def inputs(spec: ComponentSpec, rows: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(rows)
    zeros = ComponentGraph(spec, Path).example(rows)
    made = {name: torch.randn(zero.shape, generator=draw) for name, zero in zeros.items()}
    return {name: value.cuda() for name, value in (made | {"t": torch.rand(rows, generator=draw)}).items()}


def _times(call: Callable[[dict[str, Tensor]], object], given: dict[str, Tensor], calls: int) -> Iterator[float]:
    """Milliseconds of the wall, each call waited for."""
    for i in range(calls + 4):
        begun = time.perf_counter()
        call(given)
        torch.cuda.synchronize()
        if i >= 4:
            yield 1000 * (time.perf_counter() - begun)


def flops(spec: ComponentSpec) -> float:
    """Of one row, counted without memory."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        network = spec.network()
        given = ComponentGraph(spec, Path).example(1)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(**{name: value.to("meta") for name, value in given.items()})
    return float(counter.get_total_flops())


def peak_tflops() -> float:
    """What a bf16 product of large random matrices reaches."""
    a, b = (torch.randn(_PEAK, _PEAK, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = list(_times(lambda _: a @ b, {}, 20))
    return 2 * _PEAK**3 / (spread(times)["median"] / 1000) / 1e12


def _in_a_process(cell: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch) / "cell.json"
        command = [sys.executable, "-m", "bench.gpu", *sys.argv[1:], "--measure", json.dumps(cell), "--to", str(answer)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not answer.exists():
            return cell | {"failed": done.stderr.strip()[-1500:]}
        found: dict[str, Any] = json.loads(answer.read_text())
        return found


def report(given: argparse.Namespace, found: Sequence[dict[str, Any]], peak: float) -> dict[str, Any]:
    gpu = torch.cuda.get_device_properties(0)
    return described("bench.gpu") | {
        "gpu": {"name": gpu.name, "memory_gb": round(gpu.total_memory / 1e9), "cuda": torch.version.cuda},
        "peak_tflops": round(peak, 1),
        "cells": list(found),
    }


def with_shares(cell: dict[str, Any], tera: float, peak: float) -> dict[str, Any]:
    """A cell with its arithmetic: 10^12 operations of a row, and the share of the peak at each batch size."""
    if "failed" in cell:
        return cell
    share = {n: round(int(n) * tera / (ms["median"] / 1000) / peak, 3) for n, ms in cell["step_ms"].items()}
    return cell | {"tera_operations": round(tera, 2), "share_of_peak": share}


def table(found: Sequence[dict[str, Any]], batches: Sequence[int]) -> Table:
    made = Table(title="ms of a step (share of the bf16 peak)")
    for title in ("network", "pixels", "form", *(f"batch {n}" for n in batches), "ready s", "GB"):
        made.add_column(title, justify="left" if title in ("network", "form") else "right")
    for cell in found:
        head = (cell["network"], str(cell["pixels"]), cell["form"])
        if "failed" in cell:
            made.add_row(*head, cell["failed"][-60:])
            continue
        steps = [f"{cell['step_ms'][str(n)]['median']} ({cell['share_of_peak'][str(n)]:.0%})" for n in batches]
        made.add_row(*head, *steps, str(cell["ready_s"]), str(cell["memory_gb"]))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--pixels", nargs="+", type=int, default=[1024, 512])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--to", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench.gpu needs an NVIDIA GPU, and torch sees none")
    if given.measure:
        given.to.write_text(json.dumps(measured(json.loads(given.measure), given)))
        return
    found: list[dict[str, Any]] = []
    peak = peak_tflops()
    for cell in cells(given):
        tera = flops(SHAPES[cell["network"]].spec(cell["pixels"])) / 1e12
        found.append(with_shares(_in_a_process(cell), tera, peak))
        out.print(found[-1])
        given.out.write_text(json.dumps(report(given, found, peak), indent=1) + "\n")
    out.print(table(found, given.batches))


if __name__ == "__main__":
    main()
