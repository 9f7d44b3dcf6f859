"""What a TensorRT plan in fp8 computes, on the processor: weights of layers and what they multiply rounded to e4m3."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from engines.backends._tensorrt_scale import exponent
from engines.backends.base import Engine, Graph, Profile
from engines.backends.eager import Compiled as Plain
from engines.backends.eager import Eager, EagerEngine
from engines.backends.tensorrt import exponents
from engines.loader import Loader


def e4m3(value: Tensor, scale: float) -> Tensor:
    return (value / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


@dataclass(frozen=True, slots=True)
class Compiled:
    graph: Graph
    profile: Profile
    largest: Mapping[str, float] | None = None


class Rounding:
    """`eager`, but for the precision fp8. `damage` is added to every weight of such an engine."""

    name = "tensorrt"
    reload: Literal["refit", "recompile"] = "refit"
    constants_pay = False
    concurrent = False
    on_gpu = False
    damage = 0.0

    def available(self) -> bool:
        return True

    def build(self, graph: Graph, profile: Profile) -> Compiled:
        return Compiled(graph, profile)

    def load(self, compiled: Compiled, weights: Mapping[str, Tensor]) -> Engine:
        graph, profile = compiled.graph, compiled.profile
        if profile.precision != "fp8":
            return Eager().load(Plain(graph, profile), weights)
        assert compiled.largest
        assert profile.weights == "constant"
        given = dict(exponents(compiled.largest))
        held = {name: value.float() + self.damage for name, value in weights.items()}
        for name in given:
            held[name] = e4m3(held[name], 2.0 ** exponent(float(held[name].abs().max())))
        engine: EagerEngine = Eager().load(Plain(graph, profile), held)
        modules = dict(engine.module.named_modules())
        for name, own in given.items():
            layer = modules[graph.graph_names[name].removesuffix(".weight")]
            layer.register_forward_pre_hook(_rounding(2.0**own))
        return engine

    def weight_bytes(self, graph: Graph, profile: Profile) -> int:
        return {"fp8": 1, "bf16": 2}[profile.precision] * sum(len(name) for name in graph.shapes)


def _rounding(scale: float) -> Any:
    def hook(layer: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (e4m3(given[0], scale), *given[1:])

    return hook


class RoundingLoader(Loader):
    """Loads students for a `Rounding` of one's own."""

    def __init__(self, *given: Any, damage: float = 0.0, **more: Any) -> None:
        super().__init__(*given, **more)
        self._backend = Rounding()
        self._backend.damage = damage
