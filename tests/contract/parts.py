"""One component on one backend beside the same on `eager`, which is what every contract of a backend compares."""

import contextlib
import dataclasses
import pkgutil
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from engines.backends.base import Choice, Engine, Padded, Profile, load_backend
from engines.graph import ComponentGraph

PROFILE = Profile(batches=(1, 4), threads=1)
# Of a component's output, relative to its deviation.
RELATIVE = {"fp32": 1e-5, "bf16": 0.03}
# A bias of attention keys adds the same to every score of a query, which softmax does not see.
NO_EFFECT = ("k_proj.bias", "to_k.bias")
EXPORTERS = ("torch.export.export", "torch.onnx.export")
# What each backend makes a compiled graph with, wherever in the code it is called.
COMPILERS = {
    "eager": (),
    "onnxruntime": ("onnxruntime.InferenceSession",),
    "tensorrt": ("subprocess.run",),
    "openvino": ("openvino.Core.read_model", "openvino.Core.compile_model", "openvino.Core.import_model"),
    "torch_compile": ("subprocess.run",),
}


@contextlib.contextmanager
def counting(*names: str) -> Iterator[Counter[str]]:
    """The calls of these functions while the block runs. Each does what it always does."""
    made: Counter[str] = Counter()
    kept = []
    for name in names:
        owner, attribute = pkgutil.resolve_name(name.rpartition(".")[0]), name.rpartition(".")[2]
        kept.append((owner, attribute, getattr(owner, attribute)))
        setattr(owner, attribute, _counted(getattr(owner, attribute), name, made))
    try:
        yield made
    finally:
        for owner, attribute, function in kept:
            setattr(owner, attribute, function)


def _counted(function: Any, name: str, made: Counter[str]) -> Any:
    def call(*args: Any, **options: Any) -> Any:
        made[name] += 1
        return function(*args, **options)

    return call


@dataclasses.dataclass(frozen=True, slots=True)
class Built:
    compiled: Any
    calls: Counter[str]


class Part:
    """Compiled once per choice and graph in a test run; `calls` says what that took."""

    def __init__(self, choice: Choice, graph: ComponentGraph, weights: dict[str, Tensor]) -> None:
        self.choice, self.graph, self.weights = choice, graph, weights
        self.watched = (*EXPORTERS, *COMPILERS[choice.backend])
        self._backend = load_backend(choice.backend)
        self._profile = dataclasses.replace(PROFILE, precision=choice.precision)
        self._built = self._build(choice)
        self._eager = load_backend("eager")
        self.inputs = _inputs(graph)

    @property
    def calls(self) -> Counter[str]:
        return self._built.calls

    def _build(self, choice: Choice) -> Built:
        key = (choice, self.graph.key)
        if key not in _BUILT:
            with counting(*self.watched) as calls:
                _BUILT[key] = Built(self._backend.build(self.graph, self._profile), calls)
        return _BUILT[key]

    def constant(self) -> Engine:
        compiled = self._backend.build(self.graph, dataclasses.replace(self._profile, weights="constant"))
        return Padded(self._backend.load(compiled, self.weights), PROFILE.batches)

    def load(self, weights: dict[str, Tensor]) -> Engine:
        return Padded(self._backend.load(self._built.compiled, weights), PROFILE.batches)

    def run(self, weights: dict[str, Tensor]) -> Tensor:
        engine = self.load(weights)
        made = output(engine, self.inputs)
        engine.close()
        return made

    def expected(self, weights: dict[str, Tensor]) -> Tensor:
        return output(self._eager.load(self._eager.build(self.graph, PROFILE), weights), self.inputs)

    @cached_property
    def perturbed(self) -> dict[str, Tensor]:
        """What `eager` answers when one weight is another, by its name. Made once: it is the same for every backend."""
        if self.graph.key not in _PERTURBED:
            module = self.graph.module().eval()
            module.load(self.weights)
            own, found = module.state_dict(), {}
            for name, value in own.items():
                kept = value.clone()
                value.copy_(perturbed(kept, name))
                with torch.no_grad():
                    found[name] = module(**self.inputs)
                value.copy_(kept)
            _PERTURBED[self.graph.key] = found
        return _PERTURBED[self.graph.key]

    def follows_each_weight(self) -> None:
        """A tensor under another's name, or one that never arrived, leaves the output where it was or astray."""
        base = self.expected(self.weights)
        for name, expected in self.perturbed.items():
            made = self.run(self.weights | {name: perturbed(self.weights[name], name)})
            assert_close(made, expected, self.choice)
            assert not torch.equal(expected, base) or name.endswith(NO_EFFECT), f"{name} changes nothing"

    def tells_weights_apart(self) -> None:
        """The same in few runs. Any two weights are, in some run, one changed and one not: what is set under another's
        name, or not at all, leaves the output elsewhere."""
        names = sorted(self.weights)
        for bit in range(len(names).bit_length()):
            for side in (0, 1):
                changed = {n: perturbed(self.weights[n], n, 0.05) for i, n in enumerate(names) if i >> bit & 1 == side}
                given = self.weights | changed
                assert_close(self.run(given), self.expected(given), self.choice)


_PERTURBED: dict[str, dict[str, Tensor]] = {}
_BUILT: dict[tuple[Choice, str], Built] = {}


def assert_close(made: Tensor, expected: Tensor, choice: Choice) -> None:
    error = (made.float() - expected.float()).square().mean().sqrt()
    allowed = RELATIVE[choice.precision] * expected.float().std()
    levels = 0.05 if expected.dtype == torch.uint8 else 0.0  # a rounded value may fall to either side
    assert error <= allowed + levels, f"{error:.2e} instead of at most {allowed + levels:.2e}"


def output(engine: Engine, inputs: dict[str, Tensor]) -> Tensor:
    (out,) = engine.run(**inputs).values()
    return out


def perturbed(weight: Tensor, name: str, by: float = 0.3) -> Tensor:
    generator = torch.Generator().manual_seed(sum(name.encode()))
    return weight + by * torch.randn(weight.shape, generator=generator)


def _inputs(graph: ComponentGraph) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    found = {}
    for name, zero in graph.example(3).items():
        if name == "mask":
            found[name] = _mask(zero.shape[1]).to(zero.dtype).repeat(3, 1)
        elif name == "ids":
            found[name] = torch.randint(3, 20, zero.shape, generator=generator)
        else:
            found[name] = torch.randn(zero.shape, generator=generator)
    packing = getattr(graph.module(), "packing", None)
    if packing is not None and "cond" in found:
        hidden, *extras = packing.unpack(found["cond"])
        masked = [_mask(packing.tokens).repeat(3, 1) if one.shape[1] == packing.tokens else one for one in extras]
        found["cond"] = packing.pack(hidden, *masked)
    return found | ({"t": torch.tensor([0.701, 0.3, 0.999])} if "t" in found else {})


def _mask(tokens: int) -> Tensor:
    """Of prompts that fill three quarters."""
    return (torch.arange(tokens) < 0.75 * tokens).float()
