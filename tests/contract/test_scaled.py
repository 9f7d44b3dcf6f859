"""A precision with scales of a student's own: live in a wider one, then in its own, if the golden samples allow it."""

import weakref
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from engines import scales
from engines.artefact import make_student
from engines.backends import tensorrt
from engines.backends._tensorrt_fp8 import in_fp8
from engines.backends._tensorrt_graph import in_bf16, weight_types
from engines.backends.base import Choice, Profile, Tolerance
from engines.backends.eager import Eager, EagerEngine
from engines.errors import GoldenMismatch
from engines.golden import Golden
from engines.graph import GraphStore
from engines.loader import Loader
from engines.manifest import Schedule, StudentManifest, shown
from engines.slot import EngineSlot
from engines.student import sample
from tests import tiny_sd
from tests.rounded import RoundingLoader

FP8 = Choice("tensorrt", "fp8")


def slot_of(damage: float = 0.0) -> EngineSlot:
    teacher = tiny_sd.teacher()
    slot = EngineSlot(RoundingLoader(teacher.registry, FP8, Profile((1,), "fp8"), GraphStore(None), damage=damage))
    slot.stage([teacher.version]).run()
    return slot


@pytest.fixture
def coarse(monkeypatch: pytest.MonkeyPatch) -> Tolerance:
    """Random weights make more of rounding than learned ones."""
    made = Tolerance(levels=32, share=0.9, psnr_db=20.0)
    monkeypatch.setitem(tensorrt.TOLERANCE, "fp8", made)
    return made


def test_a_version_goes_live_at_once_and_gets_its_own_scales_behind_that(coarse: Tolerance) -> None:
    teacher = tiny_sd.teacher()
    slot = slot_of()
    student = slot.family(teacher.version)
    before = sample(student, ["a red circle"], [1], 4)
    assert student.precision == "bf16"
    live_bytes = slot.weight_bytes(teacher.version)
    slot.specialise(teacher.version).run()
    after = sample(student, ["a red circle"], [1], 4)
    assert not torch.equal(after, before)
    assert coarse.fault(after, before) is None
    (changed,) = [key for key, size in slot.weight_bytes(teacher.version).items() if size != live_bytes[key]]
    assert slot.weight_bytes(teacher.version)[changed] * 2 == live_bytes[changed]


def sibling(*, spoilt: bool = False) -> StudentManifest:
    """Another student with the teacher's denoiser; `spoilt`, its golden pictures are none that it makes."""
    teacher = tiny_sd.teacher()
    schedules = [Schedule(times=(1.0, 0.5, 0.0))]
    made = teacher.registry.student(make_student(teacher.registry, teacher.version, "sibling", schedules=schedules))
    if not spoilt:
        return made
    golden = Golden.from_bytes(teacher.registry.read_blob(made.golden or ""))
    other = replace(golden, pictures=255 - golden.pictures).to_bytes()
    told = made.model_dump() | {"golden": teacher.registry.put_blob(other)}
    return teacher.registry.student(teacher.registry.publish(StudentManifest.model_validate(told)))


@pytest.mark.usefixtures("coarse")
def test_a_student_that_comes_to_an_engine_in_fp8_is_judged_as_one_in_fp8() -> None:
    slot, other = slot_of(), sibling()
    slot.specialise(tiny_sd.teacher().version).run()
    slot.stage([other.version]).run()
    assert slot.family(other.version).precision == "fp8"
    assert slot.loader.unspecialised(other) == []


@pytest.mark.usefixtures("coarse")
def test_an_engine_that_another_student_uses_is_kept_where_that_would_not_reproduce_its_golden_samples() -> None:
    slot, other = slot_of(), sibling(spoilt=True)
    slot.loader.load(other)
    before = slot.loader.engine(other, "denoiser").engine
    with pytest.raises(GoldenMismatch, match=f"{shown(other.version)} on tensorrt fp8"):
        slot.specialise(tiny_sd.teacher().version).run()
    assert slot.loader.engine(other, "denoiser").engine is before


@pytest.mark.usefixtures("coarse")
def test_a_student_that_was_loaded_meanwhile_is_tried_before_anything_is_replaced() -> None:
    slot, other = slot_of(), sibling()
    before = slot.loader.engine(tiny_sd.teacher().manifest, "denoiser").engine
    after_the_load: list[str] = []
    for piece in slot.specialise(tiny_sd.teacher().version):
        if (piece.phase, piece.on_engine) == ("specialising", True) and not after_the_load:
            slot.stage([other.version]).run()
            piece.call()
            assert slot.loader.engine(other, "denoiser").engine is before
            after_the_load.append("nothing was replaced")
        else:
            piece.call()
            after_the_load += [piece.phase] if after_the_load else []
    assert after_the_load[1:3] == ["verifying", "verifying"]
    assert "specialising" in after_the_load
    assert slot.loader.engine(other, "denoiser").engine is not before


def test_one_whose_pictures_suffer_serves_on_in_the_wider_precision_and_the_reason_is_said() -> None:
    teacher = tiny_sd.teacher()
    slot = slot_of(damage=0.2)
    before = sample(slot.family(teacher.version), ["a red circle"], [1], 4)
    staging = slot.specialise(teacher.version)
    with pytest.raises(GoldenMismatch, match="tensorrt fp8 does not reproduce its golden sample"):
        staging.run()
    assert staging.phase == "rejected"
    assert torch.equal(sample(slot.family(teacher.version), ["a red circle"], [1], 4), before)


def test_scales_are_of_what_the_layers_multiply_over_all_golden_samples() -> None:
    teacher = tiny_sd.teacher()
    found = scales.largest(teacher.registry, teacher.manifest, "denoiser", "cpu")
    loader = Loader(teacher.registry, Choice("eager", "fp32"), Profile(), GraphStore(None))
    module = loader.graphs(teacher.manifest)["denoiser"].module()
    assert len(found) == len([one for one in module.modules() if isinstance(one, nn.Linear | nn.Conv2d)])
    first = found["conv_in.weight"]
    drawn = Golden.from_bytes(teacher.registry.read_blob(teacher.manifest.golden or "")).noise
    assert first >= drawn.abs().max()


def test_what_the_measurement_took_is_given_back_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, modules, alive = tiny_sd.teacher(), [], []
    load = Eager.load

    def watched(self: Eager, compiled: Any, weights: Mapping[str, Tensor]) -> EagerEngine:
        engine = load(self, compiled, weights)
        modules.append(weakref.ref(engine.module))
        return engine

    monkeypatch.setattr(Eager, "load", watched)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive.append([one() for one in modules]))
    scales.largest(teacher.registry, teacher.manifest, "denoiser", "cpu")
    assert alive == [[None, None, None]]


def test_what_weights_take_in_fp8_is_what_its_graph_holds() -> None:
    teacher = tiny_sd.teacher()
    loader = Loader(teacher.registry, Choice("eager", "fp32"), Profile(), teacher.graphs)
    graph = loader.graphs(teacher.manifest)["denoiser"]
    model = in_bf16(onnx.load_from_string(graph.onnx()))
    held = {name: np.ones(graph.shapes[name], np.float32) for name in weight_types(model)}
    in_fp8(model, held, dict.fromkeys(held, 0))
    sizes = {
        name: held[name].size * {"fp32": 4, "bf16": 2, "fp8": 1}[kind] for name, kind in weight_types(model).items()
    }
    told = tensorrt.TensorRt().weight_bytes(graph, Profile(precision="fp8", weights="constant"))
    assert told == pytest.approx(sum(sizes.values()), rel=0.01)


def test_while_it_is_specialised_the_new_engine_and_the_student_in_fp32_are_there_too() -> None:
    teacher = tiny_sd.teacher()
    (parts,) = slot_of().specialising_bytes(teacher.version).values()
    loader = Loader(teacher.registry, Choice("eager", "fp32"), Profile(), GraphStore(None))
    assert parts.pop("measured") == sum(loader.weight_bytes(teacher.manifest).values())
    slot = slot_of()
    assert list(parts.values()) == [size for key, size in slot.weight_bytes(teacher.version, specialised=True).items()
                                    if key.weights == teacher.manifest.components["denoiser"].weights]  # fmt: skip


def test_scales_may_be_measured_on_the_processor_where_the_gpu_has_no_room() -> None:
    teacher, slot = tiny_sd.teacher(), slot_of()
    slot.loader.profile = replace(slot.loader.profile, device="cuda")
    choices = slot.specialising_bytes(teacher.version)
    assert list(choices) == ["cuda", "cpu"]
    assert choices["cuda"].keys() - choices["cpu"].keys() == {"measured"}


def test_hooks_are_gone_when_the_measurement_is() -> None:
    layer = nn.Sequential(nn.Linear(2, 2))
    calls: list[AbstractContextManager[Any]] = []
    found = scales.watched(layer, {"w": "0.weight"}, calls.append)
    layer(torch.tensor([[1.0, -3.0]]))
    layer(torch.tensor([[2.0, 0.5]]))
    assert found["w"].item() == 3.0
    calls[0].__exit__(None, None, None)
    layer(torch.tensor([[9.0, 0.0]]))
    assert found["w"].item() == 3.0
