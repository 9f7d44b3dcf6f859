"""Distances and pseudo-targets by their exact values and gradients."""

import pytest
import torch

from distill_jobs import losses


def test_toward_has_exactly_the_gradient_it_was_given() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 2, 2, generator=generator, requires_grad=True)
    g = torch.randn(4, 3, 2, 2, generator=generator) * 1e3
    loss = losses.toward(x, g)
    loss.backward()
    torch.testing.assert_close(x.grad, g / x.numel(), atol=0, rtol=3e-7)  # one rounding
    assert loss.item() == pytest.approx(0.5 * g.square().mean().item())


def test_root_mse_is_the_mean_of_the_rows_roots() -> None:
    error = torch.tensor([[3.0, 3.0], [4.0, -4.0]]).reshape(2, 2, 1, 1)
    assert losses.root_mse(error).item() == pytest.approx(3.5, abs=2e-3)
    assert losses.root_mse(torch.zeros(2, 1, 1, 1)).item() == 0


def test_root_mse_has_a_finite_gradient_at_zero() -> None:
    error = torch.zeros(2, 1, 1, 1, requires_grad=True)
    losses.root_mse(error).backward()
    assert torch.equal(error.grad, torch.zeros(2, 1, 1, 1))


def test_huber_is_quadratic_near_and_linear_far() -> None:
    assert losses.huber(torch.full((1, 1), 1e-3), 1.0).item() == pytest.approx(5e-7, rel=0.2)
    assert losses.huber(torch.full((1, 1), 1e3), 1.0).item() == pytest.approx(999, rel=1e-3)


def test_the_scale_is_per_row_bounded_below_and_without_gradient() -> None:
    error = torch.tensor([[2.0, -4.0], [0.0, 0.0]], requires_grad=True)
    scale = losses.scale_of(error, floor=0.1)
    assert scale.tolist() == [[3.0], [pytest.approx(0.1)]]
    assert not scale.requires_grad


def test_pairwise_distance_falls_to_zero_when_all_samples_are_one() -> None:
    x = torch.randn(6, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    assert losses.pairwise_distance(x).item() == pytest.approx(2**0.5, abs=0.2)
    assert losses.pairwise_distance(x[:1].expand(6, -1, -1, -1)).item() == 0
