"""What a live run says of the costs that a simulation of it is given."""

import pytest

from bench.fidelity import Called, met
from bench.fleet import STAGES, Fleet
from engines.cost import CostKey, CostModel


def test_sizes_that_were_hardly_called_are_as_much_dearer_as_the_others_of_their_stage() -> None:
    curve = CostModel()
    for stage in STAGES:
        for size in (1, 2, 4):
            curve.observe(CostKey(stage, stage, ()), size, 0.01 * size)
    calls = [Called(0.0, "denoise", 2, seconds) for seconds in (*[0.03] * 20, 1.0)]
    calls += [Called(0.0, "denoise", 3, 0.06), Called(0.0, "denoise", 4, 0.5)]
    fleet = met(Fleet(curve, sizes=(1, 2, 4), streams=2), calls)
    assert fleet.seconds("denoise", 2) == fleet.busy_s("denoise", 2) == pytest.approx(0.03)
    assert [fleet.seconds("denoise", size) for size in (1, 4)] == pytest.approx([0.015, 0.06])
    assert fleet.seconds("decode", 4) == pytest.approx(0.04)
