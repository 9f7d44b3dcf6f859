"""The grid of a quantised student: exact multiples, nothing clipped, nothing lost in half precision."""

import pytest
import torch

from engines.errors import InvalidRequest
from engines.grid import Grid, most, rounded, scales_of

WEIGHT = torch.tensor([[1.0, -0.5, 0.26], [7.0, -3.4, 0.0], [0.0, 0.0, 0.0]])


def test_values_are_the_nearest_multiples_of_a_scale_per_output_channel() -> None:
    scales = scales_of(WEIGHT, 4)
    assert scales.tolist() == [0.15625, 1.0, 2.0**-20]  # 1/7 = .14286 rounded up to 10/64; 7/7; least
    assert rounded(WEIGHT, scales).tolist() == [[6 * 0.15625, -3 * 0.15625, 2 * 0.15625], [7.0, -3.0, 0.0], [0.0] * 3]


def test_eight_bits_have_multiples_up_to_127() -> None:
    assert (most(8), most(4)) == (127, 7)
    weight = torch.tensor([[127.0, 64.4, -127.0]])
    assert scales_of(weight, 8).tolist() == [1.0]
    assert rounded(weight, scales_of(weight, 8)).tolist() == [[127.0, 64.0, -127.0]]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [3e-4, 1.0, 400.0])
def test_nothing_is_clipped_and_half_precision_holds_every_multiple(bits: int, size: float) -> None:
    torch.manual_seed(0)
    weight = size * torch.randn(64, 32, 3, 3)
    scales = scales_of(weight, bits)
    made = rounded(weight, scales)
    step = scales.reshape(-1, 1, 1, 1)
    assert ((made - weight).abs() <= step / 2 * (1 + 1e-6)).all()
    assert (scales * most(bits) <= 1.13 * weight.flatten(1).abs().amax(dim=1)).all()
    assert torch.equal(made.half().float(), made)
    assert torch.equal(made.half().float() / step, (made / step).round())
    assert int((made / step).abs().max()) <= most(bits)


def test_weights_beside_their_grid_are_refused() -> None:
    scales = scales_of(WEIGHT, 8)
    made = {"a": rounded(WEIGHT, scales)}
    Grid(8, {"a": scales}).check(made)
    with pytest.raises(InvalidRequest, match="a in float32 is not on its grid of 8 bits"):
        Grid(8, {"a": scales}).check({"a": WEIGHT})
    with pytest.raises(InvalidRequest, match="not on its grid of 4 bits"):
        Grid(4, {"a": scales}).check(made)  # its multiples pass 7
    with pytest.raises(InvalidRequest, match=r"scales\.b"):
        Grid(8, {"b": scales}).check(made)
