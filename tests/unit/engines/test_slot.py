from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from engines import aside
from engines.artefact import make_student
from engines.backends.base import Choice, Profile
from engines.backends.eager import Compiled, Eager, EagerEngine
from engines.errors import Conflict, CorruptBlob, GoldenMismatch, GraphMismatch, StudentNotFound
from engines.graph import GraphStore
from engines.loader import Loader
from engines.manifest import Component, Guidance, Schedule, StudentManifest
from engines.registry.base import Registry
from engines.registry.files import FilesRegistry
from engines.slot import EngineSlot, Staging
from engines.streams import is_alone
from engines.student import sample
from tests import tiny_families, tiny_sd

PHASES = ["staged", "building", "warming", "verifying", "ready"]


@pytest.fixture
def registry(tmp_path: Path) -> FilesRegistry:
    """One of its own with the tiny teacher in it."""
    teacher, own = tiny_sd.teacher(), FilesRegistry(tmp_path)
    for sha in teacher.manifest.blobs:
        own.put_blob(teacher.registry.read_blob(sha))
    own.publish(teacher.manifest)
    return own


@pytest.fixture
def slot(registry: FilesRegistry) -> EngineSlot:
    return EngineSlot(Loader(registry, Choice("eager", "fp32"), Profile((1, 4)), tiny_sd.teacher().graphs))


@pytest.fixture
def teacher() -> str:
    return tiny_sd.teacher().version


def student(registry: FilesRegistry, scale: float = 1.02) -> str:
    base = tiny_sd.teacher().manifest
    weights = load(registry.read_blob(base.components["denoiser"].weights))
    scaled = {name: value * scale for name, value in weights.items()}
    schedules = [Schedule(times=(1.0, 0.5, 0.0))]
    return make_student(registry, base.version, "student", denoiser_weights=scaled, schedules=schedules)


def experts(registry: Registry) -> str:
    """A student of two networks."""
    base = tiny_sd.teacher().manifest
    weights = load(registry.read_blob(base.components["denoiser"].weights))
    first, second = ({name: value * scale for name, value in weights.items()} for scale in (1.02, 0.97))
    schedules = [Schedule(times=(1.0, 0.5, 0.0), nets=("denoiser", "denoiser_2"))]
    return make_student(
        registry,
        base.version,
        "pair",
        denoiser_weights=first,
        experts={"denoiser_2": second},
        schedules=schedules,
        guidance=Guidance(mode="baked", default=3.0, minimum=3.0, maximum=3.0),
    )


def with_denoiser(registry: Registry, version: str, blob: bytes, role: str = "denoiser") -> str:
    """The same student, golden samples and all, over other bytes."""
    manifest = registry.student(version)
    part = Component(weights=registry.put_blob(blob), files=manifest.components[role].files)
    data = manifest.model_dump() | {"components": manifest.components | {role: part}}
    return registry.publish(StudentManifest.model_validate(data))


class Watched(Eager):
    """Tells of each engine call whether it is alone."""

    def __init__(self, seen: list[bool]) -> None:
        self.seen = seen

    def load(self, compiled: Compiled, weights: Mapping[str, torch.Tensor]) -> EagerEngine:
        made, seen = super().load(compiled, weights), self.seen

        class Telling(EagerEngine):
            def run(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
                seen.append(is_alone())
                return super().run(**inputs)

        return Telling(compiled.graph, made.module, compiled.profile.device)


def phases(staging: Staging) -> Iterator[str]:
    for piece in staging:
        yield piece.phase
        piece.call()
    yield staging.phase


def test_a_new_graph_goes_through_every_phase_and_is_warmed_at_every_size(slot: EngineSlot, teacher: str) -> None:
    staging = slot.stage([teacher])
    seen = list(phases(staging))
    assert list(dict.fromkeys(seen)) == PHASES
    assert seen.count("warming") == 3 * 2 * 2  # of two sizes, a first call and one that is measured
    key = slot.cost_key(slot.family(teacher), "denoiser")
    assert slot.cost.seconds(key, 1)
    assert slot.cost.seconds(key, 4)
    assert set(staging.seconds) == set(PHASES) - {"ready"}


def test_each_stream_is_warmed_and_lone_calls_are_timed_apart() -> None:
    own, seen = tiny_sd.teacher(), list[bool]()
    loader = Loader(own.registry, Choice("eager", "fp32"), Profile((1, 4), threads=1, streams=2), own.graphs)
    loader._backend = Watched(seen)
    slot = EngineSlot(loader)
    for piece in slot.stage([own.manifest.version]):
        before = len(seen)
        piece.call()
        if piece.phase == "warming":
            assert len(seen) == before + 1  # live rows wait for one call
            warmed = len(seen)
    assert seen[:warmed] == ([False] * 3 + [True] * 2 + [False] * 3) * 3  # one and four rows of three components
    key = slot.cost_key(slot.family(own.manifest.version), "denoiser")
    assert slot.cost.lone_s(key, 1) != slot.cost.seconds(key, 1)
    assert slot.cost.lone_s(key, 4) == slot.cost.seconds(key, 4)


@pytest.mark.filterwarnings("ignore")
def test_a_decoder_of_videos_takes_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    own, graphs = tiny_families.shipped("wan"), GraphStore(None)
    slot, rows = EngineSlot(Loader(own.registry, Choice("eager", "fp32"), Profile((1, 4)), graphs)), list[int]()
    run = EagerEngine.run

    def counted(engine: EagerEngine, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        if "latents" in inputs:
            rows.append(len(inputs["latents"]))
        return run(engine, **inputs)

    monkeypatch.setattr(EagerEngine, "run", counted)
    slot.stage([own.version]).run()
    made = sample(slot.family(own.version), ["a red circle"] * 3, range(3), tiny_families.STEPS)
    assert made.shape == (3, 9, 3, 16, 16)
    assert set(rows) == {1}
    known = [slot.cost_key(slot.family(own.version), role) for role in ("decoder", "denoiser")]
    assert [slot.cost.seconds(key, 4) is not None for key in known] == [False, True]


def test_of_a_known_graph_only_weights_are_set(slot: EngineSlot, registry: FilesRegistry, teacher: str) -> None:
    slot.stage([teacher]).run()
    version = student(registry)
    seen = list(phases(slot.stage([version])))
    assert seen.count("building") == 1
    assert "warming" not in seen
    made, known = (slot.cost_key(slot.family(v), "denoiser") for v in (version, teacher))
    assert made != known
    assert slot.cost.predict(made, 4) == slot.cost.predict(known, 4)


def test_components_with_the_same_weights_are_one_engine(
    slot: EngineSlot, registry: FilesRegistry, teacher: str
) -> None:
    version = student(registry)
    slot.stage([teacher, version]).run()
    one, two = slot.family(teacher).family, slot.family(version).family
    assert one.encoder is two.encoder  # type: ignore[attr-defined]
    assert one.decoder is two.decoder  # type: ignore[attr-defined]
    assert one.denoisers["denoiser"] is not two.denoisers["denoiser"]  # type: ignore[attr-defined]


def test_of_experts_on_a_known_graph_only_weights_are_set_and_each_has_its_engine_and_its_cost(
    slot: EngineSlot, registry: FilesRegistry, teacher: str
) -> None:
    slot.stage([teacher]).run()
    version = experts(registry)
    seen = list(phases(slot.stage([version])))
    assert seen.count("building") == 1
    assert "warming" not in seen
    pair = slot.family(version)
    one, two = (pair.family.denoisers[net] for net in ("denoiser", "denoiser_2"))  # type: ignore[attr-defined]
    assert one is not two
    known = slot.cost.predict(slot.cost_key(slot.family(teacher), "denoiser"), 4)
    assert [slot.cost.predict(slot.cost_key(pair, net), 4) for net in ("denoiser", "denoiser_2")] == [known, known]
    slot.retire(version)
    assert len(slot.loader._engines) == 3  # the teacher's


def test_an_expert_with_another_s_weights_is_rejected_at_verifying(
    slot: EngineSlot, registry: FilesRegistry, teacher: str
) -> None:
    slot.stage([teacher]).run()
    version = experts(registry)
    first = registry.read_blob(registry.student(version).components["denoiser"].weights)
    with pytest.raises(GoldenMismatch):
        slot.stage([with_denoiser(registry, version, first, role="denoiser_2")]).run()
    assert slot.versions == {teacher}


def test_what_serves_is_not_touched_before_the_switch(slot: EngineSlot, registry: FilesRegistry, teacher: str) -> None:
    slot.stage([teacher]).run()
    slot.switch([teacher])
    before = sample(slot.family(teacher), ["a red circle"], [1], 1)
    version = student(registry)
    for piece in slot.stage([version]):
        assert slot.serving == {teacher}
        with pytest.raises(StudentNotFound):
            slot.family(version)
        piece.call()
        assert torch.equal(sample(slot.family(teacher), ["a red circle"], [1], 1), before)
    slot.switch([version])
    assert (slot.serving, slot.draining) == ({version}, {teacher})
    assert torch.equal(sample(slot.family(teacher), ["a red circle"], [1], 1), before)


def test_a_rollback_stages_nothing(slot: EngineSlot, registry: FilesRegistry, teacher: str) -> None:
    slot.stage([teacher]).run()
    version = student(registry)
    slot.stage([version]).run()
    slot.switch([version])
    assert slot.stage([teacher]).versions == ()
    slot.stage([teacher]).run()
    slot.switch([teacher])
    assert slot.serving == {teacher}


def test_a_retired_version_is_gone_and_what_it_shared_stays(
    slot: EngineSlot, registry: FilesRegistry, teacher: str
) -> None:
    version = student(registry)
    slot.stage([teacher, version]).run()
    slot.switch([version])
    slot.retire(teacher)
    with pytest.raises(StudentNotFound):
        slot.family(teacher)
    assert sample(slot.family(version), ["a red circle"], [1], 2).shape == (1, 3, 16, 16)
    assert slot.draining == frozenset()


def test_what_was_compiled_goes_with_the_last_version_that_uses_it(
    slot: EngineSlot, registry: FilesRegistry, teacher: str
) -> None:
    version = student(registry)
    slot.stage([teacher, version]).run()
    slot.retire(teacher)
    assert list(phases(slot.stage([teacher]))).count("building") == 1  # weights alone
    slot.retire(teacher)
    slot.retire(version)
    assert list(phases(slot.stage([teacher]))).count("building") == 4  # three graphs, then the weights


def test_what_was_compiled_for_a_version_that_is_rejected_goes_with_it(
    slot: EngineSlot, registry: FilesRegistry, teacher: str
) -> None:
    weights = load(registry.read_blob(registry.student(teacher).components["denoiser"].weights))
    weights.pop("conv_in.bias")
    with pytest.raises(GraphMismatch):
        slot.stage([with_denoiser(registry, teacher, save(weights))]).run()
    assert list(phases(slot.stage([teacher]))).count("building") == 4


def test_what_is_served_cannot_be_retired_nor_what_is_not_ready_be_served(slot: EngineSlot, teacher: str) -> None:
    with pytest.raises(StudentNotFound):
        slot.switch([teacher])
    slot.stage([teacher]).run()
    slot.switch([teacher])
    with pytest.raises(Conflict):
        slot.retire(teacher)


def test_a_flipped_byte_is_rejected_at_staged(slot: EngineSlot, registry: FilesRegistry, teacher: str) -> None:
    slot.stage([teacher]).run()
    version = student(registry)
    sha = registry.student(version).components["denoiser"].weights
    path = registry.blob_path(sha)
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    staging = slot.stage([version])
    with pytest.raises(CorruptBlob):
        staging.run()
    assert staging.phase == "rejected"
    assert (staging.reason or "").startswith("corrupt_blob: ")
    assert list(staging.seconds) == ["staged"]
    assert slot.versions == {teacher}


def test_a_permuted_weight_map_is_rejected_at_verifying(
    slot: EngineSlot, registry: FilesRegistry, teacher: str
) -> None:
    slot.stage([teacher]).run()
    version = student(registry)
    weights = load(registry.read_blob(registry.student(version).components["denoiser"].weights))
    one, two = "down_blocks.0.resnets.0.conv1.weight", "down_blocks.0.resnets.0.conv2.weight"
    weights[one], weights[two] = weights[two], weights[one]
    staging = slot.stage([with_denoiser(registry, version, save(weights))])
    with pytest.raises(GoldenMismatch):
        staging.run()
    assert (staging.phase, list(staging.seconds)) == ("rejected", ["staged", "building", "verifying"])
    assert slot.versions == {teacher}


def test_weights_of_another_shape_are_rejected_at_building_and_leave_nothing_behind(
    slot: EngineSlot, registry: FilesRegistry, teacher: str
) -> None:
    slot.stage([teacher]).run()
    engines = set(slot.loader._engines)
    weights = load(registry.read_blob(registry.student(teacher).components["denoiser"].weights))
    weights.pop("conv_in.bias")
    staging = slot.stage([with_denoiser(registry, teacher, save(weights))])
    with pytest.raises(GraphMismatch, match=r"conv_in\.bias"):
        staging.run()
    assert set(staging.seconds) == {"staged", "building"}
    assert set(slot.loader._engines) == engines


def test_a_student_without_golden_samples_never_serves(slot: EngineSlot, registry: FilesRegistry) -> None:
    bare = StudentManifest.model_validate(tiny_sd.teacher().manifest.model_dump() | {"golden": None})
    with pytest.raises(GoldenMismatch, match="no golden samples"):
        slot.stage([registry.publish(bare)]).run()


def test_engine_calls_and_heavy_work_are_told_apart(slot: EngineSlot, teacher: str) -> None:
    """Aside runs in another thread and hands over what it raises."""
    places = {}
    for piece in slot.stage([teacher]):
        places.setdefault(piece.phase, piece.on_engine)
        piece.call() if piece.on_engine else aside.run(piece.call, "aside").result(60)
    assert places == {"staged": False, "building": False, "warming": True, "verifying": True}
    assert slot.family(teacher)


def test_an_error_aside_is_the_caller_s(slot: EngineSlot, registry: FilesRegistry) -> None:
    bare = StudentManifest.model_validate(tiny_sd.teacher().manifest.model_dump() | {"golden": None})
    staging = slot.stage([registry.publish(bare)])
    with pytest.raises(GoldenMismatch):
        aside.run(next(iter(staging)).call, "aside").result(60)


def test_what_weights_take_is_known_before_a_load_and_is_what_is_held_after_it(
    slot: EngineSlot, registry: FilesRegistry, teacher: str
) -> None:
    version = student(registry, 1.01)
    expected = {who: slot.weight_bytes(who) for who in (teacher, version)}
    blobs = registry.student(version).blobs
    assert {key.weights for key in expected[version]} < blobs
    for who in (teacher, version):
        slot.stage([who]).run()
    engines = {key: engine for key, engine in slot.loader._engines.items()}
    for key, size in (expected[teacher] | expected[version]).items():
        module = engines[key].engine.module  # type: ignore[attr-defined]
        assert sum(value.nbytes for value in module.state_dict().values()) == pytest.approx(size, rel=0.01)
    assert slot.loader.loaded_bytes() == sum((expected[teacher] | expected[version]).values())


def test_what_was_evicted_is_gone_though_it_is_served_and_comes_back(
    slot: EngineSlot, registry: FilesRegistry, teacher: str
) -> None:
    version = student(registry, 1.01)
    slot.stage([teacher, version]).run()
    slot.switch([teacher, version])
    before = slot.loader.loaded_bytes()
    own = registry.student(version).components["denoiser"].weights
    close = slot.evict(version)
    assert slot.versions == {teacher}
    assert slot.serving == {teacher}
    assert close() == {own}
    assert before - slot.loader.loaded_bytes() == next(
        size for key, size in slot.weight_bytes(version).items() if key.weights == own
    )
    slot.stage([version]).run()
    assert slot.loader.loaded_bytes() == before
    assert slot.evict("nobody@" + "0" * 64)() == frozenset()


def test_what_encodes_pictures_comes_when_it_is_asked_for_and_goes_with_the_last_that_uses_it(
    slot: EngineSlot, registry: FilesRegistry, teacher: str
) -> None:
    shared = student(registry)
    slot.stage([teacher, shared]).run()
    picture = torch.full((1, 3, 16, 16), 90.0)
    assert len(slot.loader._engines) == 4  # one encoder, two denoisers, one decoder
    codes = slot.family(teacher).family.look(picture)[0]
    assert torch.equal(slot.family(shared).family.look(picture)[0], codes)
    assert len(slot.loader._engines) == 5
    slot.retire(teacher)
    assert torch.equal(slot.family(shared).family.look(picture)[0], codes)
    slot.retire(shared)
    assert not slot.loader._engines
