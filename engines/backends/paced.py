"""A bench engine that takes a known time and no processor: 20 ms a call and 3.75 ms a row, at most 16 rows.

It measures what the server costs around an engine: 200 pictures a second are its ceiling at one step, so whatever is
missing from that is the server's. `PACED_IMAGES_PER_S` in the environment says another ceiling; the two times shrink
alike. The wait of a denoiser call stands for all three stages; encoder and decoder answer at once. Its pictures are no
pictures, but they follow from the inputs and the weights alone.
"""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from engines.backends.base import Graph, Precision, Profile, Tolerance, check_inputs, check_weights, num_weights
from engines.errors import InvalidRequest

MAX_ROWS = 16
PACE_PER_S = 200.0
TOLERANCE: dict[Precision, Tolerance] = {"fp32": Tolerance(levels=255, share=1.0, psnr_db=0.0)}
"""Golden samples are drawn by a real engine: nothing is asked of this one."""


def automatic_precision(device: str) -> Precision:
    return "fp32"


def call_s(rows: int) -> float:
    """What a call of the denoiser takes."""
    return (4 + 0.75 * rows) / float(os.environ.get("PACED_IMAGES_PER_S", PACE_PER_S))


@dataclass(frozen=True, slots=True)
class Compiled:
    graph: Graph
    profile: Profile


class PacedEngine:
    def __init__(self, graph: Graph, weights: Mapping[str, Tensor]) -> None:
        self.inputs = graph.inputs
        self._outputs = graph.output_shapes
        self._paced = "pred" in self._outputs
        self._mark = sum(value.float().mean().item() for value in weights.values()) / max(1, len(weights))

    def run(self, **inputs: Tensor) -> dict[str, Tensor]:
        check_inputs(self.inputs, inputs)
        rows = len(next(iter(inputs.values())))
        if rows > MAX_ROWS:
            raise InvalidRequest(f"the paced engine takes at most {MAX_ROWS} rows, not {rows}")
        if self._paced:
            time.sleep(call_s(rows))
        shade = self._mark + sum(
            (value.float().reshape(rows, -1).mean(dim=1) for value in inputs.values()), torch.zeros(())
        )
        return {name: _spread(shade, rows, shape, name) for name, shape in self._outputs.items()}

    def close(self) -> None:
        """Nothing is held."""


def _spread(shade: Tensor, rows: int, shape: tuple[int, ...], name: str) -> Tensor:
    column = shade.view(rows, *[1] * len(shape))
    if name == "levels":
        return (column * 997).remainder(256).expand(rows, *shape).clone()
    return column.expand(rows, *shape).clone()


class Paced:
    name = "paced"
    reload: Literal["refit", "recompile"] = "refit"
    constants_pay = False
    concurrent = False
    on_gpu = False

    def available(self) -> bool:
        return True

    def build(self, graph: Graph, profile: Profile) -> Compiled:
        return Compiled(graph, profile)

    def load(self, compiled: Compiled, weights: Mapping[str, Tensor]) -> PacedEngine:
        check_weights(compiled.graph.shapes, weights)
        return PacedEngine(compiled.graph, weights)

    def weight_bytes(self, graph: Graph, profile: Profile) -> int:
        """None are held; told are those that a real engine would hold, so that a bench may run short of memory."""
        return 4 * num_weights(graph)


BACKEND = Paced
