"""A version that fails in any phase leaves what serves as it was and nothing of itself; so do two swaps at once."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from engines.artefact import make_student
from engines.backends.base import Choice, Profile
from engines.backends.eager import Compiled, Eager, EagerEngine
from engines.errors import CorruptBlob, GoldenMismatch, GraphMismatch
from engines.graph import GraphStore
from engines.loader import Loader
from engines.manifest import Guidance, Schedule, StudentManifest
from engines.parts import load_weights
from engines.registry.base import Registry
from engines.registry.memory import MemoryRegistry
from engines.slot import EngineSlot, Staging
from engines.student import sample
from tests import tiny_sd

ONE = [Schedule(times=(1.0, 0.0))]
EMBEDDED = Guidance(mode="embedded", default=2.0, minimum=1.0, maximum=4.0)


class NoKernel(Exception):
    """Libraries raise what they like."""


class Unrunnable(EagerEngine):
    def run(self, **inputs: Tensor) -> dict[str, Tensor]:
        raise NoKernel("not for this device")


class Choosy(Eager):
    """Loads networks that read a guidance weight, and cannot run them."""

    def load(self, compiled: Compiled, weights: Mapping[str, Tensor]) -> EagerEngine:
        made = super().load(compiled, weights)
        return (
            Unrunnable(compiled.graph, made.module, compiled.profile.device) if "w" in compiled.graph.inputs else made
        )


@pytest.fixture
def registry() -> MemoryRegistry:
    """One of its own with the tiny teacher in it."""
    teacher, own = tiny_sd.teacher(), MemoryRegistry()
    for sha in teacher.manifest.blobs:
        own.put_blob(teacher.registry.read_blob(sha))
    own.publish(teacher.manifest)
    return own


@pytest.fixture
def slot(registry: MemoryRegistry) -> EngineSlot:
    """It serves the teacher."""
    made = EngineSlot(Loader(registry, Choice("eager", "fp32"), Profile((1, 2), threads=1), GraphStore(None)))
    made.stage([tiny_sd.teacher().version]).run()
    made.switch([tiny_sd.teacher().version])
    return made


def weighted(registry: Registry, scale: float = 1.02) -> str:
    """A student on a graph of its own: its denoiser reads the guidance weight."""
    base = tiny_sd.teacher().manifest
    weights = load_weights(registry, base.components["denoiser"])
    scaled = {name: scale * value for name, value in weights.items()}
    return make_student(
        registry, base.version, "weighted", denoiser_weights=scaled, schedules=ONE, guidance=EMBEDDED, inputs=("w",)
    )


def changed(registry: Registry, version: str, **fields: Any) -> str:
    """The same student with other fields of its denoiser."""
    manifest = registry.student(version)
    part = manifest.components["denoiser"].model_copy(update=fields)
    data = manifest.model_dump() | {"components": manifest.components | {"denoiser": part}}
    return registry.publish(StudentManifest.model_validate(data))


def configured(registry: Registry, version: str, **fields: Any) -> str:
    files = registry.student(version).components["denoiser"].files
    config = json.loads(registry.read_blob(files["config.json"])) | fields
    return changed(registry, version, files=files | {"config.json": registry.put_blob(json.dumps(config).encode())})


def corrupt(registry: MemoryRegistry, slot: EngineSlot) -> str:
    version = weighted(registry)
    registry._store.replace(f"blobs/{registry.student(version).components['denoiser'].weights}", b"rotten")
    return version


def unsupported(registry: MemoryRegistry, slot: EngineSlot) -> str:
    return configured(registry, weighted(registry), down_block_types=["NoSuchBlock", "DownBlock2D"])


def of_another_shape(registry: MemoryRegistry, slot: EngineSlot) -> str:
    return configured(registry, weighted(registry), block_out_channels=[8, 32])


def unrunnable(registry: MemoryRegistry, slot: EngineSlot) -> str:
    slot.loader._backend = Choosy()
    return weighted(registry)


def astray(registry: MemoryRegistry, slot: EngineSlot) -> str:
    version = weighted(registry)
    weights = load(registry.read_blob(registry.student(version).components["denoiser"].weights))
    return changed(registry, version, weights=registry.put_blob(save({n: -w for n, w in weights.items()})))


def kept(slot: EngineSlot) -> dict[str, Any]:
    """All that a slot and its loader know, engines by identity."""
    loader = slot.loader
    return {
        "loaded": dict(slot._loaded),
        "serving": (slot.serving, slot.draining),
        "held": (dict(loader._holders), sorted(loader._held)),
        "engines": {key: (id(one), id(one.engine)) for key, one in loader._engines.items()},
        "compiled": {key: id(one) for key, one in loader._compiled.items()},
        "graphs": sorted(loader._graphs._known),
        "costs": {key: dict(sizes) for key, sizes in slot.cost._seconds.items()},
    }


def picture(slot: EngineSlot, version: str) -> Tensor:
    return sample(slot.family(version), ["a red circle"], [1], 1)


@pytest.mark.parametrize(
    ("bad", "phase", "error"),
    [
        (corrupt, "staged", CorruptBlob),
        (unsupported, "building", ValueError),
        (of_another_shape, "building", GraphMismatch),
        (unrunnable, "warming", NoKernel),
        (astray, "verifying", GoldenMismatch),
    ],
)
def test_a_version_that_fails_in_a_phase_is_let_go_of_whole(
    slot: EngineSlot,
    registry: MemoryRegistry,
    bad: Callable[[MemoryRegistry, EngineSlot], str],
    phase: str,
    error: type[Exception],
) -> None:
    serving = tiny_sd.teacher().version
    version = bad(registry, slot)
    before, answer = kept(slot), picture(slot, serving)
    staging = slot.stage([version])
    with pytest.raises(error):
        staging.run()
    assert (staging.phase, list(staging.seconds)[-1]) == ("rejected", phase)
    assert kept(slot) == before
    assert torch.equal(picture(slot, serving), answer)


def test_where_one_of_two_fails_the_other_is_let_go_of_too(slot: EngineSlot, registry: MemoryRegistry) -> None:
    good, bad = weighted(registry), astray(registry, slot)
    before = kept(slot)
    with pytest.raises(GoldenMismatch):
        slot.stage([good, bad]).run()
    assert kept(slot) == before


def until(staging: Staging, phase: str) -> None:
    """Does the pieces up to the first of a phase."""
    for piece in staging:
        piece.call()
        if piece.phase == phase:
            return


def finish(staging: Staging) -> None:
    for piece in staging:
        piece.call()


def test_of_two_swaps_at_once_one_fails_and_the_other_keeps_the_graph_that_both_compiled(
    slot: EngineSlot, registry: MemoryRegistry
) -> None:
    bad, good = astray(registry, slot), weighted(registry, 0.98)
    before = kept(slot)
    one, two = slot.stage([bad]), slot.stage([good])
    until(one, "verifying")
    until(two, "verifying")
    compiled = dict(slot.loader._compiled)
    assert len(compiled) == len(before["compiled"]) + 1
    one.reject(GoldenMismatch("does not reproduce sample 0"))
    assert slot.loader._compiled == compiled
    finish(two)
    assert slot.versions == {tiny_sd.teacher().version, good}
    picture(slot, good)
    slot.retire(good)
    assert kept(slot) == before


@pytest.mark.parametrize("second_ends", ["ready", "rejected"])
def test_two_swaps_to_the_same_version_at_once_leave_it_once(
    slot: EngineSlot, registry: MemoryRegistry, second_ends: str
) -> None:
    version = weighted(registry)
    before = kept(slot)
    one, two = slot.stage([version]), slot.stage([version])
    until(one, "verifying")
    until(two, "verifying")
    finish(one)
    answer = picture(slot, version)
    if second_ends == "ready":
        finish(two)
    else:
        two.reject(GoldenMismatch("does not reproduce sample 0"))
    assert torch.equal(picture(slot, version), answer)
    slot.retire(version)
    assert kept(slot) == before


def test_a_retired_version_leaves_its_blobs_to_those_who_share_them(slot: EngineSlot, registry: MemoryRegistry) -> None:
    version = weighted(registry)
    before = kept(slot)
    slot.stage([version]).run()
    assert slot.retire(version) == {registry.student(version).components["denoiser"].weights}
    assert kept(slot) == before


def test_a_version_is_retired_though_the_registry_cannot_be_reached(slot: EngineSlot, registry: MemoryRegistry) -> None:
    version = weighted(registry)
    before = kept(slot)
    slot.stage([version]).run()
    slot.loader.registry = MemoryRegistry()  # it has nothing of this
    slot.retire(version)
    assert kept(slot) == before


def test_a_version_takes_its_costs_from_another_deployment_s_that_runs_the_same_graph(
    slot: EngineSlot, registry: MemoryRegistry
) -> None:
    other = EngineSlot(slot.loader, slot.cost)
    one, two = weighted(registry), weighted(registry, 0.98)
    slot.stage([one]).run()
    other.stage([two]).run()
    mine, known = (each.cost_key(each.family(v), "denoiser") for each, v in ((other, two), (slot, one)))
    assert mine != known
    assert slot.cost.predict(mine, 2) == slot.cost.predict(known, 2)
    slot.retire(one)
    assert slot.cost.predict(known, 2) is None
    assert slot.cost.predict(mine, 2) is not None
