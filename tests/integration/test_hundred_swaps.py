"""A hundred swaps of students with other graphs, sizes and weights: memory returns to where it was after each."""

import ctypes
import gc
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from engines.artefact import import_diffusers, make_student
from engines.backends.base import Choice, Profile, tolerance
from engines.graph import GraphStore
from engines.loader import Loader, load_student
from engines.manifest import Guidance, Schedule
from engines.parts import load_weights
from engines.registry.base import Registry
from engines.registry.memory import MemoryRegistry
from engines.slot import EngineSlot
from engines.student import sample
from tests import tiny_sd
from tests.exported import graphs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ONE = [Schedule(times=(1.0, 0.0))]
PROMPT = "a red circle"
SWAPS, SETTLED = 100, 20


@dataclass(frozen=True)
class Footprint:
    """All that a worker keeps of the students that are or were on it."""

    loaded: int
    held: int
    holders: int
    engines: int
    specialised: int
    compiled: int
    graphs: int
    costs: int
    open_files: int
    modules: int  # of torch, anywhere in the process
    tensor_bytes: int  # likewise

    @classmethod
    def of(cls, slot: EngineSlot) -> "Footprint":
        loader = slot.loader
        gc.collect()
        alive = gc.get_objects()
        tensors = [one for one in alive if type(one) in (torch.Tensor, torch.nn.Parameter) and not one.is_meta]
        storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
        return cls(
            loaded=len(slot.versions),
            held=len(loader._held),
            holders=len(loader._holders),
            engines=len(loader._engines),
            specialised=len(loader._specialised),
            compiled=len(loader._compiled),
            graphs=len(loader._graphs._known),
            costs=len(slot.cost._seconds),
            open_files=psutil.Process().num_fds(),
            modules=sum(issubclass(type(one), torch.nn.Module) for one in alive),
            tensor_bytes=sum(storages.values()),
        )


def resident_bytes() -> int:
    """Of this process, without what the allocator only keeps for later."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss


@pytest.fixture(scope="module")
def registry() -> MemoryRegistry:
    return MemoryRegistry()


@pytest.fixture(scope="module")
def base(registry: MemoryRegistry) -> str:
    return import_diffusers(tiny_sd.teacher().directory, registry, name="base", schedules=ONE)


def moved(registry: Registry, base: str, **given: Any) -> str:
    weights = load_weights(registry, registry.student(base).components["denoiser"])
    scaled = {name: 1.02 * value for name, value in weights.items()}
    return make_student(registry, base, "moved", denoiser_weights=scaled, schedules=ONE, **given)


def swap(slot: EngineSlot, version: str) -> Iterator[None]:
    """To `version`, with a pause as each phase begins; what served before is retired."""
    staging, phase = slot.stage([version]), ""
    for piece in staging:
        if piece.phase != phase:
            phase = piece.phase
            yield
        piece.call()
    slot.switch([version])
    yield
    for left in slot.draining:
        slot.retire(left)


def goes_round(slot: EngineSlot, ring: Sequence[str], pictures: dict[str, torch.Tensor]) -> None:
    """A hundred swaps, each under requests; every picture is that of the version that serves."""
    allowed = tolerance(slot.loader.choice.backend, "fp32")
    first = SWAPS - (SWAPS - SETTLED) // len(ring) * len(ring)  # the same version serves then as in the end
    seen: list[Footprint] = []
    resident: list[int] = []
    for count, version in enumerate(islice(cycle(ring), SWAPS), start=1):
        for _ in swap(slot, version):
            for serving in slot.serving:
                made = sample(slot.family(serving), [PROMPT], [7], 1)
                assert allowed.fault(made, pictures[serving]) is None, (count, serving)
        if count in (first, SWAPS):
            seen.append(Footprint.of(slot))
            resident.append(resident_bytes())
    assert seen[1] == seen[0]
    assert resident[1] <= 1.01 * resident[0]


def answers(registry: Registry, ring: Sequence[str]) -> dict[str, torch.Tensor]:
    """By the reference backend."""
    students = {version: load_student(registry, registry.student(version)) for version in ring}
    return {version: sample(student, [PROMPT], [7], 1) for version, student in students.items()}


def test_memory_returns_to_its_start_with_other_weights_sizes_and_graphs(
    registry: MemoryRegistry, base: str, tmp_path: Path
) -> None:
    directory, slim = tiny_sd.teacher().directory, tiny_sd.write(tmp_path, channels=(8, 16))
    wide = import_diffusers(directory, registry, name="wide", schedules=ONE, resolution=(32, 16))
    other = import_diffusers(slim, registry, name="slim", schedules=ONE)
    ring = [base, moved(registry, base), wide, other]
    slot = EngineSlot(Loader(registry, Choice("eager", "fp32"), Profile((1, 2), threads=1), GraphStore(None)))
    goes_round(slot, ring, answers(registry, ring))


def test_memory_returns_to_its_start_where_graphs_are_compiled_anew_from_what_is_kept_on_disk(
    registry: MemoryRegistry, base: str
) -> None:
    guidance = Guidance(mode="embedded", default=2.0, minimum=1.0, maximum=4.0)
    ring = [base, moved(registry, base), moved(registry, base, guidance=guidance, inputs=("w",))]
    store = GraphStore(graphs()._cache)
    slot = EngineSlot(Loader(registry, Choice("onnxruntime", "fp32"), Profile((1, 2), threads=1), store))
    goes_round(slot, ring, answers(registry, ring))
