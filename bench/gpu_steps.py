"""A cell of `bench.gpu`: steps of one denoiser in one form, by batch size."""

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.gpu_networks import SHAPES
from bench.gpu_students import example, network
from bench.machine import spread
from engines.backends.base import Precision, Profile, finished, is_gpu, load_backend
from engines.cache import DiskCache
from engines.graph import ComponentGraph, ComponentSpec, GraphStore

FORMS = ("diffusers", "diffusers compiled", "eager", "torch_compile", "tensorrt", "tensorrt fp8")
_LARGEST = 8.0  # of what layers multiply, as far as fp8 is told
_WARM_UPS = 4
_PEAK = {True: 8192, False: 512}  # on a GPU or not
Call = Callable[[dict[str, Tensor]], object]


def measured(cell: dict[str, Any], given: argparse.Namespace) -> dict[str, Any]:
    spec = SHAPES[cell["network"]].spec(cell["pixels"])
    begun_s = time.perf_counter()
    call = _call_of(cell["form"], spec, given)
    ready_s = round(time.perf_counter() - begun_s, 1)
    steps = {
        str(n): spread(list(times_ms(call, example(spec, n, given.device), given.device, given.calls)), 2)
        for n in given.batches
    }
    return {"ready_s": ready_s, "step_ms": steps}


def times_ms(call: Call, inputs: dict[str, Tensor], device: str, calls: int) -> Iterator[float]:
    """Milliseconds of the wall, each call waited for."""
    for i in range(calls + _WARM_UPS):
        begun_s = time.perf_counter()
        call(inputs)
        finished(device)
        if i >= _WARM_UPS:
            yield 1000 * (time.perf_counter() - begun_s)


def peak_tflops(device: str) -> float:
    """What a bf16 product of large random matrices reaches."""
    size = _PEAK[is_gpu(device)]
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    times = list(times_ms(lambda _: a @ b, {}, device, 20))
    return 2 * size**3 / (spread(times)["median"] / 1000) / 1e12


def tera_operations(spec: ComponentSpec) -> float:
    """10^12 multiplications and additions of one row's matrix products, counted without memory."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        made = spec.network()
        inputs = ComponentGraph(spec, Path).example(1)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        made(**inputs)
    return float(counter.get_total_flops()) / 1e12


class Module:
    """A network of diffusers as a pipeline calls it, with the face of an engine."""

    def __init__(self, made: Any, device: str, *, compiled: bool) -> None:
        self.inputs = frozenset(port.name for port in made.ports)
        self._outputs: tuple[str, ...] = made.outputs
        self._device = device
        self._dtype = torch.bfloat16 if is_gpu(device) else torch.float32
        self._network = made.to(self._dtype).eval()
        if compiled and hasattr(made, "unet"):
            self._network.to(memory_format=torch.channels_last)
        if compiled:
            self._network = torch.compile(self._network, mode="reduce-overhead", fullgraph=True, dynamic=False)

    @torch.no_grad()
    def run(self, **inputs: Tensor) -> dict[str, Tensor]:
        cast = {n: v.to(self._device, self._dtype if v.is_floating_point() else v.dtype) for n, v in inputs.items()}
        out = self._network(**cast)
        parts = out if isinstance(out, tuple) else (out,)
        made = {name: part.float() for name, part in zip(self._outputs, parts, strict=True)}
        finished(self._device)
        return made

    def close(self) -> None:
        self._network = None


def _call_of(form: str, spec: ComponentSpec, given: argparse.Namespace) -> Call:
    if form.startswith("diffusers"):
        module = Module(network(spec, given.device), given.device, compiled=form.endswith("compiled"))
        return lambda inputs: module.run(**inputs)
    graph = GraphStore(DiskCache(given.cache)).graph(spec)
    backend = load_backend(form.removesuffix(" fp8"))
    precision: Precision = "bf16" if is_gpu(given.device) and form != "eager" else "fp32"
    profile = Profile(tuple(given.batches), precision, device=given.device)
    if form == "tensorrt fp8":
        profile = replace(profile, precision="fp8", weights="constant")
    compiled = backend.build(graph, profile)
    if form == "tensorrt fp8":
        compiled = replace(compiled, largest=dict.fromkeys(graph.shapes, _LARGEST))
    weights = network(spec, given.device).state_dict()
    engine = backend.load(compiled, {name: value.to("cpu", torch.bfloat16) for name, value in weights.items()})
    del weights
    gc.collect()
    return lambda inputs: engine.run(**inputs)
