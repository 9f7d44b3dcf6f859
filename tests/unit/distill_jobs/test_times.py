"""How times are drawn."""

import pytest
import torch

from distill_jobs import times
from engines.process import EDM, RF, TRIG, VP, Shifted


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("process", [RF(), VP(), VP(curve="linear"), EDM(), TRIG(), Shifted(RF(), 3.0)])
def test_a_noise_level_is_the_same_signal_to_noise_ratio_in_every_process(process: object) -> None:
    u = torch.tensor([0.1, 0.4, 0.9])
    torch.testing.assert_close(process.angle(times.on(process, u)), RF().angle(u))  # type: ignore[attr-defined]


@pytest.mark.parametrize("process", [RF(), VP(), VP(curve="linear"), EDM(), TRIG(), Shifted(EDM(), 2.0)])
def test_pure_noise_is_the_processes_last_time_and_grids_end_at_zero(process: object) -> None:
    grid = times.grid(process, (1.0, 0.5))  # type: ignore[arg-type]
    assert grid[0] == pytest.approx(process.t_max)  # type: ignore[attr-defined]
    assert grid[-1] == 0
    assert len(grid) == 3


def test_rectified_flow_keeps_the_levels_exactly() -> None:
    assert times.grid(RF(), (1.0, 0.55, 0.3)) == (1.0, 0.55, 0.3, 0.0)


def test_uniform_stays_within_its_ends() -> None:
    u = times.Uniform(0.02, 0.98).draw(1000, generator())
    assert 0.02 <= u.min() < 0.05
    assert 0.95 < u.max() <= 0.98


def test_a_bend_moves_draws_towards_noise() -> None:
    flat = times.Uniform().draw(1000, generator())
    bent = times.Bent(times.Uniform(), 3.0).draw(1000, generator())
    torch.testing.assert_close(bent, 3 * flat / (1 + 2 * flat))


def test_a_share_starts_at_pure_noise() -> None:
    u = times.WithFirst(times.LogitNormal(), 0.25).draw(4000, generator())
    assert (u == 1).float().mean().item() == pytest.approx(0.25, abs=0.03)


def test_uniform_steps_start_at_one() -> None:
    assert times.uniform(4) == (1.0, 0.75, 0.5, 0.25)


@pytest.mark.parametrize("process", [RF(), VP(), VP(curve="linear"), EDM(), TRIG(), Shifted(RF(), 3.0)])
def test_times_between_two_are_equal_steps_of_noise_level_with_exact_ends(process: object) -> None:
    first, last, _ = times.grid(process, (0.9, 0.3))  # type: ignore[arg-type]
    found = times.between(process, first, last, 3)  # type: ignore[arg-type]
    assert (found[0], found[-1]) == (first, last)
    levels = times.level_of(process, torch.tensor(found, dtype=torch.float64))  # type: ignore[arg-type]
    torch.testing.assert_close(levels, torch.tensor([0.9, 0.7, 0.5, 0.3], dtype=torch.float64), atol=1e-5, rtol=0)
