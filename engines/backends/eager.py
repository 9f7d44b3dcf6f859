"""The reference backend: plain torch in fp32, no compiler; every other is compared with it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from engines.backends.base import (
    Graph,
    Precision,
    Profile,
    Tolerance,
    check_inputs,
    check_weights,
    exact_products,
    finished,
    num_weights,
    on,
)

TOLERANCE: dict[Precision, Tolerance] = {
    "fp32": Tolerance(levels=1, share=1.0, psnr_db=50.0),
}
"""A picture alone against the same one in a batch: convolutions choose other algorithms by batch size."""


def automatic_precision(device: str) -> Precision:
    return "fp32"


@dataclass(frozen=True, slots=True)
class Compiled:
    graph: Graph
    profile: Profile


class EagerEngine:
    def __init__(self, graph: Graph, module: Any, device: str) -> None:
        self.inputs = graph.inputs
        self._outputs = graph.outputs
        self.module = module
        self._device = device

    @torch.no_grad()
    def run(self, **inputs: Tensor) -> dict[str, Tensor]:
        check_inputs(self.inputs, inputs)
        out = self.module(**on(self._device, inputs))
        finished(self._device)
        return dict(zip(self._outputs, out if isinstance(out, tuple) else (out,), strict=True))

    def close(self) -> None:
        self.module = None


class Eager:
    name = "eager"
    reload: Literal["refit", "recompile"] = "refit"
    constants_pay = False
    concurrent = False
    on_gpu = True

    def available(self) -> bool:
        return True

    def build(self, graph: Graph, profile: Profile) -> Compiled:
        return Compiled(graph, profile)

    def load(self, compiled: Compiled, weights: Mapping[str, Tensor]) -> EagerEngine:
        check_weights(compiled.graph.shapes, weights)
        exact_products(compiled.profile.precision)
        module = compiled.graph.module().to(compiled.profile.device)
        module.load_state_dict({name: value.float() for name, value in weights.items()})
        return EagerEngine(compiled.graph, module.requires_grad_(False).eval(), compiled.profile.device)

    def weight_bytes(self, graph: Graph, profile: Profile) -> int:
        return 4 * num_weights(graph)


BACKEND = Eager
