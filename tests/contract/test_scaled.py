"""A precision with scales of a student's own: live in a wider one, then in its own, if the golden samples allow it."""

from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import nn

from engines import scales
from engines.backends import tensorrt
from engines.backends.base import Choice, Profile, Tolerance
from engines.errors import GoldenMismatch
from engines.golden import Golden
from engines.graph import GraphStore
from engines.loader import Loader
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


def test_a_version_goes_live_at_once_and_gets_its_own_scales_behind_that(monkeypatch: pytest.MonkeyPatch) -> None:
    coarse = Tolerance(levels=32, share=0.9, psnr_db=20.0)  # random weights make more of rounding than learned ones
    monkeypatch.setitem(tensorrt.TOLERANCE, "fp8", coarse)
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
