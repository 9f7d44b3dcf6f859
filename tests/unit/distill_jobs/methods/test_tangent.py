"""Denoisers in other coordinates, and derivatives along a path."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill_jobs import times
from distill_jobs.methods._tangent import Rebased, along, most_noise, warmed
from engines.manifest import Kind
from engines.process import EDM, RF, TRIG, Process, over
from tests.unit.distill_jobs.closed_form import MEAN, batch_of, data_of, student_of
from tests.unit.distill_jobs.oracle import every_kind, every_process


@every_kind
@every_process
def test_a_denoiser_seen_in_rectified_flow_jumps_as_one_that_was_trained_there(process: Process, kind: Kind) -> None:
    batch = batch_of(8)
    levels = torch.tensor([0.9, 0.5], dtype=torch.float64).clamp(max=most_noise(process))
    t, s = levels[:1].expand(8), levels[1:].expand(8)
    x = RF().mix(data_of(8), batch.noise, t)
    seen = Rebased(student_of(process, kind), RF())
    torch.testing.assert_close(seen.jump(x, t, s, batch.cond), student_of(RF(), "x0").jump(x, t, s, batch.cond))
    mean = (x - seen.jump(x, t, s, batch.cond)) / over(t - s, x)
    torch.testing.assert_close(seen.velocity(x, t, batch.cond, s), mean)


def test_in_single_precision_the_end_of_the_process_is_reached() -> None:
    """At sigma 80 the angle is so near a right one that single precision loses its tangent."""
    noise, t = torch.randn(4, 2, 3, 3), torch.full((4,), most_noise(EDM()))
    cond = torch.full((4,), MEAN)
    seen = Rebased(student_of(EDM(), "x0").float(), RF())
    exact = Rebased(student_of(EDM(), "x0"), RF())
    x0, _ = seen(noise, t, cond, torch.zeros(4))
    right, _ = exact(noise.double(), t.double(), cond.double(), torch.zeros(4, dtype=torch.float64))
    assert (x0 - right).abs().max() < 1e-4


def test_the_most_noise_is_where_the_process_ends() -> None:
    assert most_noise(RF()) == 1
    assert most_noise(TRIG()) == pytest.approx(1)
    assert most_noise(EDM()) == pytest.approx(80 / 81)
    assert float(times.on(EDM(), torch.tensor(most_noise(EDM())).double())) == pytest.approx(80)


def product(x: Tensor, t: Tensor) -> Tensor:
    return x.square() * over(t, x)


@pytest.mark.parametrize("step", [0.0, 1e-3])
def test_a_derivative_is_taken_along_the_direction_of_all_arguments(step: float) -> None:
    x, t = torch.rand(3, 1, 2, 2, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    value, slope = along(product, (x, t), (2 * torch.ones_like(x), 3 * torch.ones_like(t)), step)
    torch.testing.assert_close(value, product(x, t))
    torch.testing.assert_close(slope, 4 * x * over(t, x) + 3 * x.square(), rtol=0, atol=20 * step)


@pytest.mark.parametrize("step", [0.0, 1e-3])
def test_derivatives_are_exempt_from_half_precision_and_take_no_gradient_where_none_is_wanted(step: float) -> None:
    linear = nn.Linear(3, 3)
    x = torch.rand(4, 3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        value, slope = along(linear, (x,), (torch.ones_like(x),), step)
    assert value.dtype == slope.dtype == torch.float32
    assert not value.requires_grad
    torch.testing.assert_close(slope, linear.weight.sum(1).expand(4, 3).detach(), rtol=1e-2, atol=1e-3)


def test_a_difference_has_one_dropout() -> None:
    noisy = nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.5), nn.Linear(64, 8)).double()
    x = torch.rand(4, 8, dtype=torch.float64)
    _, slope = along(noisy, (x,), (torch.zeros_like(x),), 1e-3)
    assert torch.equal(slope, torch.zeros_like(x))


def test_the_exact_derivative_goes_through_attention() -> None:
    def attend(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)

    x, d = torch.randn(2, 2, 5, 4, dtype=torch.float64), torch.randn(2, 2, 5, 4, dtype=torch.float64)
    _, exact = along(attend, (x,), (d,))
    _, difference = along(attend, (x,), (d,), 1e-6)
    torch.testing.assert_close(exact, difference, rtol=1e-4, atol=1e-4)


def test_the_warm_up_rises_from_none_to_all() -> None:
    assert [warmed(i, 4) for i in (0, 1, 4, 9)] == [0, 0.25, 1, 1]
    assert warmed(0, 0) == 1
