"""A student's plans built ahead, and found again by whoever asks for the same."""

import json

import pytest

from engines.ahead import build_ahead
from engines.backends import tensorrt
from engines.backends._tensorrt_build import FACTS
from engines.backends.base import Profile
from tests import tiny_families
from tests.tensorrt import graphs

pytest.importorskip("tensorrt_rtx_bindings", reason="pip install 'fewstep[tensorrt]'")
pytestmark = [pytest.mark.xdist_group("sd"), pytest.mark.timeout(300)]


def test_the_denoiser_of_a_student_gets_a_plan_for_any_weights_and_the_shared_parts_hold_theirs() -> None:
    own, profile = tiny_families.shipped("sd"), Profile((1, 4), "bf16", targets=("SM89",))
    made = build_ahead(own.registry, own.version, profile, graphs.store())
    forms = {role: json.loads((folder / FACTS).read_text())["form"] for role, folder in made.items()}
    assert forms == {"encoder": "constant", "denoiser": "input", "decoder": "constant"}
    denoiser = graphs.case("sd", "denoiser").graph
    assert tensorrt.TensorRt().build(denoiser, profile).folder == made["denoiser"]
