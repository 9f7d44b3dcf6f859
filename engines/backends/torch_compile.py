"""torch's own compiler: AOTInductor code for this processor, or for a GPU, where calls are CUDA graphs.

A component is compiled once for all batch sizes of a profile and kept in the engine cache, so neither another process
nor other weights compile it again: an engine is the package loaded once more and its constants set by name.
Milliseconds of processor time, one thread, EPYC Zen 4, the embedded teacher's denoiser (4.0 M parameters, 168 tensors):
batch 1 4.7, batch 8 18.9, eager 9.1 and 21.4; other weights cost 100, the first compilation three minutes beside other
work. Constants cannot be compiled in more deeply, so `Profile.weights` makes no difference here.

On a GPU each batch size is captured as a CUDA graph when it is first asked for, which is when a slot warms it.
bf16 is autocast, written into the code; weights of products are given in bf16, so that no call casts them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from engines.backends import _inductor
from engines.backends.base import (
    Graph,
    Precision,
    Profile,
    Tolerance,
    check_inputs,
    check_weights,
    exact_products,
    finished,
    is_gpu,
    machine,
    num_weights,
    on,
    tolerance,
)
from engines.errors import BackendUnavailable

TOLERANCE: dict[Precision, Tolerance] = {
    "fp32": Tolerance(levels=1, share=1.0, psnr_db=50.0),
    "bf16": Tolerance(levels=4, share=0.99, psnr_db=42.0),
}
"""bf16: that of OpenVINO, until it is measured on a GPU."""
_WARM_UPS = 3  # before a capture, as torch.cuda.graph's documentation does
Call = Callable[..., Any]


def automatic_precision(device: str) -> Precision:
    return "bf16" if is_gpu(device) else "fp32"


@dataclass(frozen=True, slots=True)
class Compiled:
    graph: Graph
    profile: Profile
    folder: Path


class TorchCompileEngine:
    """A package with its own copy of the weights."""

    def __init__(self, graph: Graph, package: Call, device: str) -> None:
        self.inputs = graph.inputs
        self._outputs = graph.outputs
        self._package: Call | None = package
        self._device = device
        self._captured: dict[int, CudaGraph] | None = {} if is_gpu(device) else None

    @torch.no_grad()
    def run(self, **inputs: Tensor) -> dict[str, Tensor]:
        check_inputs(self.inputs, inputs)
        assert self._package is not None
        if self._captured is None:
            out = self._package(**inputs)
        else:
            rows = len(next(iter(inputs.values())))
            if rows not in self._captured:
                self._captured[rows] = CudaGraph(self._package, on(self._device, inputs))
            out = self._captured[rows](inputs)
            finished(self._device)
        return {name: part.float() for name, part in zip(self._outputs, _parts(out), strict=True)}

    def close(self) -> None:
        self._package = None
        self._captured = None


class CudaGraph:
    """A call of fixed shapes, captured: one launch instead of one per kernel."""

    def __init__(self, call: Call, example: Mapping[str, Tensor]) -> None:
        self._inputs = {name: value.clone() for name, value in example.items()}
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                call(**self._inputs)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads load weights meanwhile: only what this one does belongs to the graph.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._out = _parts(call(**self._inputs))

    def __call__(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        for name, value in inputs.items():
            self._inputs[name].copy_(value, non_blocking=True)
        self._graph.replay()
        return tuple(part.clone() for part in self._out)


class TorchCompile:
    name = "torch_compile"
    reload: Literal["refit", "recompile"] = "refit"
    constants_pay = False
    concurrent = False
    on_gpu = True

    def available(self) -> bool:
        try:
            _inductor.cxx()
        except BackendUnavailable:
            return False
        return True

    def build(self, graph: Graph, profile: Profile) -> Compiled:
        tolerance(self.name, profile.precision)
        order = _inductor.Order(max(profile.batches), profile.threads, profile.device, profile.precision)
        what = (self.name, str(order), machine(profile.device), _inductor.cxx())
        made = graph.kept(what, lambda folder: _inductor.compile_elsewhere(graph.spec, order, folder))
        return Compiled(graph, profile, made)

    def load(self, compiled: Compiled, weights: Mapping[str, Tensor]) -> TorchCompileEngine:
        from safetensors.torch import load_file

        graph, device = compiled.graph, compiled.profile.device
        check_weights(graph.shapes, weights)
        exact_products(compiled.profile.precision)
        package = torch._inductor.aoti_load_package(str(compiled.folder / _inductor.PACKAGE))
        inner, narrow = graph.graph_names, _inductor.narrowed(compiled.folder)
        given = load_file(compiled.folder / _inductor.CONSTANTS)
        read = package.get_constant_fqns()
        given |= {inner[n]: v.to(device, narrow.get(inner[n], torch.float32)) for n, v in weights.items()}
        package.load_constants({name: given[name].to(device).contiguous() for name in read}, check_full_update=True)
        return TorchCompileEngine(graph, package, device)

    def weight_bytes(self, graph: Graph, profile: Profile) -> int:
        """In bf16 nearly all are those of products, which are bf16 then."""
        return (2 if profile.precision == "bf16" else 4) * num_weights(graph)


def _parts(out: Any) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


BACKEND = TorchCompile
