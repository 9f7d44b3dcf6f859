"""Weights compiled in behind a version that serves: the same pictures from other engines, or the engines it had."""

from collections.abc import Iterator, Mapping

import pytest
import torch

from engines.backends.base import Choice, Engine, Profile, tolerance
from engines.errors import GoldenMismatch
from engines.loader import Loader
from engines.manifest import StudentManifest
from engines.slot import EngineSlot
from engines.student import LoadedStudent, sample
from tests import tiny_sd

COMPILING = [Choice("onnxruntime", "fp32"), Choice("openvino", "fp32")]


def slot_of(choice: Choice, kind: type[Loader] = Loader) -> EngineSlot:
    teacher = tiny_sd.teacher()
    slot = EngineSlot(kind(teacher.registry, choice, Profile((1, 2), choice.precision, threads=1), teacher.graphs))
    slot.stage([teacher.version]).run()
    return slot


@pytest.fixture(scope="module", params=COMPILING, ids=lambda choice: choice.backend)
def slot(request: pytest.FixtureRequest) -> Iterator[EngineSlot]:
    made = slot_of(request.param)
    yield made
    made.retire(tiny_sd.teacher().version)


def pictures(student: LoadedStudent) -> torch.Tensor:
    return sample(student, ["a red circle", "two shapes on the left"], [1, 2], 4)


def inside(slot: EngineSlot) -> Engine:
    return slot.loader.engine(tiny_sd.teacher().manifest, "denoiser").engine


def test_a_version_serves_from_its_set_weights_until_the_compiled_ones_reproduce_its_golden_samples(
    slot: EngineSlot,
) -> None:
    version = tiny_sd.teacher().version
    student, set_engine, before = slot.family(version), inside(slot), pictures(slot.family(version))
    staging, seen = slot.specialise(version), []
    for piece in staging:
        seen.append((piece.phase, piece.on_engine))
        if piece.phase != "warming":
            assert inside(slot) is set_engine
        piece.call()
    assert seen[0] == ("specialising", False)
    assert seen.index(("specialising", True)) > seen.index(("verifying", True))
    assert seen[-2:] == [("warming", True)] * 2
    assert inside(slot) is not set_engine
    assert tolerance(student.backend, student.precision).fault(pictures(student), before) is None
    assert not list(slot.specialise(version)), "it is specialised already"


class Muddled(Loader):
    """Compiles other weights in than those of the version."""

    def specialised(self, manifest: StudentManifest, role: str, largest: Mapping[str, float] | None = None) -> Engine:
        compiled = self._backend.build(self.graphs(manifest)[role], Profile((1, 2), threads=1, weights="constant"))
        shapes = self.graphs(manifest)[role].shapes
        torch.manual_seed(0)
        made: Engine = self._backend.load(compiled, {name: 0.1 * torch.randn(shape) for name, shape in shapes.items()})
        return made


def test_an_engine_that_does_not_reproduce_them_never_serves() -> None:
    version = tiny_sd.teacher().version
    slot = slot_of(COMPILING[0], Muddled)
    set_engine, before = inside(slot), pictures(slot.family(version))
    staging = slot.specialise(version)
    with pytest.raises(GoldenMismatch):
        staging.run()
    assert staging.phase == "rejected"
    assert inside(slot) is set_engine
    assert torch.equal(pictures(slot.family(version)), before)


def test_a_version_that_was_retired_begins_with_set_weights_again() -> None:
    teacher = tiny_sd.teacher()
    slot = slot_of(COMPILING[0])
    slot.specialise(teacher.version).run()
    assert slot.loader.unspecialised(teacher.manifest) == []
    slot.retire(teacher.version)
    slot.stage([teacher.version]).run()
    assert slot.loader.unspecialised(teacher.manifest) == ["denoiser"]


def test_a_backend_without_cheaper_constants_has_nothing_to_do() -> None:
    slot = slot_of(Choice("eager", "fp32"))
    assert not list(slot.specialise(tiny_sd.teacher().version))
