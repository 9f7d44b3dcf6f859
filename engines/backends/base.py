"""What a backend is: a compiler that turns a graph into engines, and how near each must come to `eager`.

An engine is a compiled graph that holds one set of weights. `reload` says what other weights cost:
"refit" sets tensors in milliseconds, "recompile" builds again.
"""

import hashlib
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor

from engines import plugins
from engines.errors import BackendUnavailable, GraphMismatch, InvalidRequest, UnknownPlugin

Precision = Literal["fp32", "bf16", "fp8"]
SCALED: dict[Precision, Precision] = {"fp8": "bf16"}
"""Precisions whose scales are a student's own, and what it goes live in: it is specialised in its precision then."""
BATCHES = (1, 2, 4, 8, 16)


@dataclass(frozen=True, slots=True)
class Profile:
    """What an engine is built for. It only ever sees these batch sizes: `Padded` sees to it.

    `weights`: "set" makes other weights cheap to load, "constant" makes each call cheaper and other weights a build.
    An engine is called by so many threads at once as there are `streams`, and each of its calls has `threads`.
    `device` is where the engine computes and where its outputs are, as torch names it; inputs may be anywhere.
    `targets`: the GPUs to build for where that is done ahead, without one, such as SM89; none means the device here.
    `weight_room`: bytes of an engine's weights that may be on the device at once; a backend that can streams the rest
    from the host at each call. 0: all are.
    """

    batches: tuple[int, ...] = BATCHES
    precision: Precision = "fp32"
    threads: int = 2
    streams: int = 1
    weights: Literal["set", "constant"] = "set"
    device: str = "cpu"
    targets: tuple[str, ...] = ()
    weight_room: int = 0


class Engine(Protocol):
    """One component with its weights. Rows are independent; outputs are the caller's.

    Called from as many threads at once as its profile has streams; a call that is `engines.streams.alone` may take the
    threads of all. Inputs may be on any device; outputs are on the engine's, and computed when the call returns.
    """

    inputs: frozenset[str]

    def run(self, **inputs: Tensor) -> dict[str, Tensor]: ...

    def close(self) -> None: ...


class Graph(Protocol):
    """What a backend is given: see `engines.graph`."""

    @property
    def id(self) -> str:
        """Hash of ops, attributes and shapes, without weights."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Weight name -> shape: exactly what `load` must be given."""

    @property
    def products(self) -> frozenset[str]:
        """The weights of linear layers and of convolutions that are not in groups."""

    @property
    def key(self) -> str:
        """Hash of the configs: like `id`, but known without an export."""

    @property
    def inputs(self) -> frozenset[str]: ...

    @property
    def outputs(self) -> tuple[str, ...]: ...

    @property
    def output_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name -> shape without the batch."""

    def module(self) -> Any:
        """A new torch module (`families.base.ComponentNetwork`) of this graph with random weights."""

    def onnx(self) -> bytes:
        """The ONNX model with its weights as inputs, named `weight:<name>`."""

    @property
    def spec(self) -> Any:
        """`engines.graph.ComponentSpec`: the whole of it, for a process that builds elsewhere."""

    @property
    def graph_names(self) -> Mapping[str, str]:
        """Weight name -> name of the parameter in `module()`."""

    def example(self, rows: int) -> dict[str, Tensor]:
        """Zero inputs."""

    def kept(self, what: Sequence[str], build: Callable[[Path], None]) -> Path:
        """The folder of something built from this graph, by `build` if the engine cache has it not.

        `what` is all that it depends on besides: backend, profile, device and the versions of what builds it.
        """


class Compiled(Protocol):
    graph: Graph
    profile: Profile


class Backend(Protocol):
    """`constants_pay` says whether calls are cheaper where `Profile.weights` is "constant".

    `on_gpu` says whether its engines can compute on a GPU, as it is installed here, `concurrent` whether calls of one
    engine overlap on a processor; where they do not, a profile has one stream.
    """

    name: str
    reload: Literal["refit", "recompile"]
    constants_pay: bool
    on_gpu: bool
    concurrent: bool

    def available(self) -> bool: ...

    def build(self, graph: Graph, profile: Profile) -> Any:
        """The heavy part, without weights. May run in any thread."""

    def load(self, compiled: Any, weights: Mapping[str, Tensor]) -> Engine:
        """An engine with these weights, which are exactly `compiled.graph.shapes`.

        Raises:
            GraphMismatch: they are not.
        """

    def weight_bytes(self, graph: Graph, profile: Profile) -> int:
        """Memory that the weights of one engine take, known before it is loaded."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How near to `eager` fp32, and a picture in a batch to the same one alone, an engine must stay.

    Of all 8-bit values at least `share` within `levels`, and the PSNR at least `psnr_db`.
    """

    levels: int
    share: float
    psnr_db: float

    def fault(self, pixels: Tensor, reference: Tensor) -> str | None:
        """What is wrong with `pixels` (uint8, both alike in shape), or None."""
        if pixels.shape != reference.shape:
            return f"pictures of {tuple(pixels.shape)} instead of {tuple(reference.shape)}"
        error = (pixels.to(torch.int16) - reference.to(torch.int16)).abs()
        share = (error <= self.levels).float().mean().item()
        psnr_db = psnr(pixels, reference)
        if share >= self.share and psnr_db >= self.psnr_db:
            return None
        return (
            f"{100 * share:.3f} % of the values within {self.levels} levels (at least {100 * self.share} %), "
            f"PSNR {psnr_db:.1f} dB (at least {self.psnr_db})"
        )


def psnr(pixels: Tensor, reference: Tensor) -> float:
    """Of 8-bit pictures, in dB; infinite where they are equal."""
    mse = (pixels.float() - reference.float()).square().mean()
    return float("inf") if mse == 0 else (20 * torch.log10(255 / mse.sqrt())).item()


@dataclass(slots=True)
class Padded:
    """An engine for any number of rows over one that only takes the batch sizes of its profile.

    Rows above the largest size go in several calls; a last partial batch is filled with copies of its last row.
    """

    engine: Engine
    batches: tuple[int, ...]
    inputs: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        self.batches = tuple(sorted(self.batches))
        self.inputs = self.engine.inputs

    def run(self, **inputs: Tensor) -> dict[str, Tensor]:
        rows = len(next(iter(inputs.values())))
        largest = self.batches[-1]
        if rows in self.batches:
            return self.engine.run(**inputs)
        parts = [self._filled(inputs, start, min(start + largest, rows)) for start in range(0, rows, largest)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def close(self) -> None:
        self.engine.close()

    def _filled(self, inputs: Mapping[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
        rows = stop - start
        size = fitting(rows, self.batches)
        index = torch.arange(start, start + size).clamp(max=stop - 1)
        return {name: out[:rows] for name, out in self.engine.run(**{n: v[index] for n, v in inputs.items()}).items()}


def fitting(rows: int, batches: Sequence[int]) -> int:
    """The smallest batch size that holds `rows`; the largest where none does."""
    return min((size for size in batches if size >= rows), default=max(batches))


def num_weights(graph: Graph) -> int:
    """Numbers in all weights of a graph."""
    return sum(math.prod(shape) for shape in graph.shapes.values())


def check_weights(shapes: Mapping[str, tuple[int, ...]], weights: Mapping[str, Tensor]) -> None:
    """Refuses a weight set that is not exactly `shapes`.

    Raises:
        GraphMismatch: with the first names at fault.
    """
    missing, surplus = sorted(set(shapes) - set(weights)), sorted(set(weights) - set(shapes))
    if missing or surplus:
        raise GraphMismatch(
            f"the weights are not those of this graph: {len(missing)} missing {missing[:3]}, "
            f"{len(surplus)} surplus {surplus[:3]}; export the student again from its own teacher"
        )
    wrong = [n for n, shape in sorted(shapes.items()) if tuple(weights[n].shape) != tuple(shape)]
    if wrong:
        name = wrong[0]
        raise GraphMismatch(
            f"{len(wrong)} weights have another shape than their graph, first {name}: "
            f"{tuple(weights[name].shape)} instead of {tuple(shapes[name])}"
        )


def check_inputs(asked: frozenset[str], given: Mapping[str, Tensor]) -> None:
    """Refuses an input that the graph lacks, and to run without one that it has."""
    if asked != given.keys():
        missing, surplus = sorted(asked - given.keys()), sorted(given.keys() - asked)
        raise InvalidRequest(f"this network reads {sorted(asked)}: missing {missing}, not read {surplus}")


def tolerance(backend: str, precision: str) -> Tolerance:
    """From the backend's own file.

    Raises:
        UnknownPlugin: the backend has no such precision.
    """
    table: dict[str, Tolerance] = plugins.load("engines.backends", backend, "TOLERANCE")
    if precision not in table:
        raise UnknownPlugin(f"{backend} has no {precision}: choose from {', '.join(table)}")
    return table[precision]


def device_of(backend: str, device: str = "auto") -> str:
    """Where engines of a backend compute: on `device`, or by itself on the GPU that torch sees, if they can.

    Raises:
        BackendUnavailable: a GPU is asked of a backend that uses none.
    """
    on_gpu = load_backend(backend).on_gpu
    if device == "auto":
        return "cuda" if on_gpu and torch.cuda.is_available() else "cpu"
    if is_gpu(device) and not on_gpu:
        raise BackendUnavailable(f"{backend} computes on the processor here, not on {device}: ask for device 'auto'")
    return device


def is_gpu(device: str) -> bool:
    return torch.device(device).type == "cuda"


def machine(device: str) -> str:
    """What code and timings are made for: the GPU, or all that this processor says it can do."""
    if is_gpu(device):
        return str(torch.cuda.get_device_properties(device))
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        flags = platform.processor()
    return hashlib.sha256(flags.encode()).hexdigest()


def on(device: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors there. Only copies to a GPU may be under way when this returns."""
    return {name: value.to(device, non_blocking=is_gpu(device)) for name, value in inputs.items()}


def finished(device: str) -> None:
    """Waits until what this thread has asked of a GPU is done, so that whoever times a call times its work."""
    if is_gpu(device):
        torch.cuda.current_stream().synchronize()


def exact_products(precision: Precision) -> None:
    """Convolutions in fp32 where fp32 is asked for: on a GPU torch makes them TF32 by itself."""
    if precision == "fp32":
        torch.backends.cudnn.allow_tf32 = False


def load_backend(name: str) -> Backend:
    backend: Backend = plugins.load("engines.backends", name, "BACKEND")()
    return backend


@dataclass(frozen=True, slots=True)
class Choice:
    backend: str
    precision: Precision


def choose(backend: str = "auto", precision: str = "auto", device: str = "auto") -> Choice:
    """The fastest backend that is installed here, and the precision that pays where it computes (see `device_of`).

    Raises:
        UnknownPlugin: no such backend or precision, or it cannot run here.
        BackendUnavailable: not on this device.
    """
    name = backend
    if backend == "auto":
        gpu = torch.cuda.is_available() if device == "auto" else is_gpu(device)
        fastest = ("tensorrt", "torch_compile", "eager") if gpu else ("openvino", "eager")
        name = next(name for name in fastest if load_backend(name).available())
    elif not load_backend(name).available():
        raise UnknownPlugin(f"backend {name!r} cannot run here: install its package, or choose 'auto'")
    automatic = plugins.load("engines.backends", name, "automatic_precision")
    wanted = automatic(device_of(name, device)) if precision == "auto" else precision
    tolerance(name, wanted)
    return Choice(name, cast(Precision, wanted))
