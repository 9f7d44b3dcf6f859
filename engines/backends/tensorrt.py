"""TensorRT 10 and 11 and TensorRT-RTX on NVIDIA GPUs, fp32, bf16 or fp8: strongly typed plans, kept on disk by content.

Where the weights of a plan are follows from what is asked:
    set, for the GPU here    in a refittable plan: other weights are a second engine of the same plan with its full
                             weight set refitted, so nothing is built and the engine that serves is not touched
    set, for named targets   inputs of the network: a plan that is built where there is no GPU cannot be refittable,
                             and one that holds no weight serves every student of its graph
    constant                 in the plan: each call is cheapest, other weights are a build. So are those in fp8, whose
                             scales are the student's, and those that do not fit and are streamed from the host
`docs/tensorrt.md` has what was measured and what waits for a GPU.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from engines.backends import _tensorrt_library as libraries
from engines.backends._tensorrt_build import FACTS, PLAN, Form, Order, build_elsewhere
from engines.backends._tensorrt_engine import TensorRtEngine
from engines.backends._tensorrt_library import Gpu, Library
from engines.backends._tensorrt_scale import exponent
from engines.backends.base import SCALED, Graph, Precision, Profile, Tolerance, check_weights, num_weights
from engines.errors import BackendUnavailable, InvalidRequest

TOLERANCE: dict[Precision, Tolerance] = {
    "fp32": Tolerance(levels=1, share=1.0, psnr_db=50.0),
    "bf16": Tolerance(levels=4, share=0.99, psnr_db=42.0),
    "fp8": Tolerance(levels=16, share=0.98, psnr_db=30.0),
}
"""Those of OpenVINO, until they are measured on a GPU. fp32 is fp32: TF32 is switched off. fp8: what passes for the
same picture; whether a student passes is found out when it is specialised."""
_BYTES: dict[Precision, int] = {"fp32": 4, "bf16": 2}
_HEADROOM = 2.0  # of what other rows may make of an activation than the golden ones; of e4m3 it costs no digit
_PLANS = 1  # counts up when the same order would be built otherwise


def automatic_precision(device: str) -> Precision:
    return "bf16"


@dataclass(frozen=True, slots=True)
class Compiled:
    """`folder` holds the plan; None where the weights are constants: then `load` builds.

    `largest`: of each weight, the largest magnitude of what it is multiplied with; fp8 needs it (`engines.scales`).
    """

    graph: Graph
    profile: Profile
    folder: Path | None
    largest: Mapping[str, float] | None = None


class TensorRt:
    name = "tensorrt"
    reload: Literal["refit", "recompile"] = "refit"
    constants_pay = False  # not measured: building beside live calls shares the GPU with them
    on_gpu = True
    concurrent = False

    def available(self) -> bool:
        """Whether plans can be run here; building them ahead takes the library alone."""
        return libraries.installed() and libraries.gpu() is not None

    def build(self, graph: Graph, profile: Profile) -> Compiled:
        """
        Raises:
            BackendUnavailable: no library, or no GPU and no targets either.
            UnsupportedGraph: which node TensorRT cannot take.
            InvalidRequest: a target that the library does not know.
        """
        return Compiled(graph, profile, None if form(graph, profile) == "constant" else plan(graph, profile))

    def load(self, compiled: Compiled, weights: Mapping[str, Tensor]) -> TensorRtEngine:
        """
        Raises:
            BackendUnavailable: no GPU, or one that the plan was not built for.
        """
        graph, profile = compiled.graph, compiled.profile
        check_weights(graph.shapes, weights)
        check_target(profile.targets, libraries.need_gpu("running a plan"))
        folder = compiled.folder or plan(graph, profile, weights, compiled.largest)
        return TensorRtEngine(
            libraries.find(),
            graph,
            (folder / PLAN).read_bytes(),
            weights,
            form=form(graph, profile),
            types=json.loads((folder / FACTS).read_text())["weights"],
            batches=profile.batches,
            room=profile.weight_room if streamed(graph, profile) else None,
        )

    def weight_bytes(self, graph: Graph, profile: Profile) -> int:
        """On the GPU; a strongly typed plan holds nearly all of them in its precision, in fp8 those of products."""
        return profile.weight_room if streamed(graph, profile) else _weight_bytes(graph, profile)


def form(graph: Graph, profile: Profile) -> Form:
    if profile.weights == "constant" or profile.precision in SCALED or streamed(graph, profile):
        return "constant"
    return "input" if profile.targets else "refit"


def streamed(graph: Graph, profile: Profile) -> bool:
    """Whether more weights than may be on the GPU."""
    return 0 < profile.weight_room < _weight_bytes(graph, profile)


def plan(
    graph: Graph,
    profile: Profile,
    weights: Mapping[str, Tensor] | None = None,
    largest: Mapping[str, float] | None = None,
) -> Path:
    """The folder with the plan, from the engine cache or built now. Needs a GPU only where `profile` names no targets.

    `weights` are those of the graph, and needed where they are to be constants, `largest` for fp8: see `Compiled`.

    Raises:
        InvalidRequest: fp8 without a measurement of what is to be rounded.
    """
    if profile.precision in SCALED and not largest:
        raise InvalidRequest(f"{profile.precision} takes the scales of a student: specialise one", param="precision")
    library = libraries.find()
    here = None if profile.targets else libraries.need_gpu("a plan for the GPU here (no targets are named)")
    order = Order(
        form(graph, profile),
        tuple(sorted(profile.batches)),
        profile.precision,
        profile.targets,
        exponents=exponents(largest) if largest and profile.precision in SCALED else (),
        streamed=streamed(graph, profile),
    )
    constants = weights if order.form == "constant" else None
    what = depends_on(library, order, here, constants)
    return graph.kept([graph.id, *what], lambda out: build_elsewhere(graph.onnx(), order, constants, out))


def depends_on(
    library: Library, order: Order, here: Gpu | None, weights: Mapping[str, Tensor] | None
) -> tuple[str, ...]:
    """All that a plan depends on beside its graph: one for another version or device is built, not loaded."""
    device = "" if here is None else json.dumps(dataclasses.astuple(here))
    held = "" if weights is None else _hash(weights)
    return f"{library.name} {library.version} {_PLANS}", order.to_json(), device, held


def check_target(targets: tuple[str, ...], here: Gpu) -> None:
    """
    Raises:
        BackendUnavailable: the plan is for other GPUs than the one here.
    """
    if targets and here.capability not in targets:
        raise BackendUnavailable(
            f"the plan is for {', '.join(targets)} and {here.name} is {here.capability}: name that target too, "
            "or none to build for the GPU here"
        )


def exponents(largest: Mapping[str, float]) -> tuple[tuple[str, int], ...]:
    """Each weight that anything is multiplied with, and the exponent of the scale for that; in order of their names."""
    usable = {name: _HEADROOM * value for name, value in largest.items() if 0 < value < math.inf}
    return tuple((name, exponent(value)) for name, value in sorted(usable.items()))


def _weight_bytes(graph: Graph, profile: Profile) -> int:
    wide = _BYTES[SCALED.get(profile.precision, profile.precision)] * num_weights(graph)
    if profile.precision not in SCALED:
        return wide
    return wide - sum(math.prod(graph.shapes[name]) for name in graph.products)


def _hash(weights: Mapping[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name].contiguous()
        sha.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        sha.update(value.view(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


BACKEND = TensorRt
