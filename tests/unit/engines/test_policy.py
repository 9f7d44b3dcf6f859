"""Policies: what several points mean, and that solver and training follow one way."""

from itertools import pairwise
from typing import get_args

import pytest
import torch
from torch import Tensor

from engines import policy, solvers
from engines.denoiser import Denoiser
from engines.manifest import Kind, Step
from engines.policy import Policy
from engines.process import EDM, RF, TRIG, VP, Process, Shifted, over

PROCESSES = [RF(), VP(), VP(curve="linear"), EDM(), TRIG(sigma_data=0.5), Shifted(RF(), 3.0)]
every_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
every_kind = pytest.mark.parametrize("kind", get_args(Kind))


def at(level: float, process: Process, rows: int = 2) -> Tensor:
    angle = torch.atan2(torch.tensor(level, dtype=torch.float64), torch.tensor(1 - level, dtype=torch.float64))
    return process.t_of_angle(angle).expand(rows)


def way(process: Process, values: list[float], high: float = 0.9, low: float = 0.1, rows: int = 2) -> Policy:
    points = torch.tensor(values, dtype=torch.float64).reshape(-1, 1, 1, 1, 1).expand(-1, rows, 1, 2, 2)
    return Policy(process, at(high, process, rows), at(low, process, rows), points)


def noise(rows: int = 2, channels: int = 1) -> Tensor:
    return torch.randn(rows, channels, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@every_process
def test_between_its_points_a_policy_is_linear_in_noise_level(process: Process) -> None:
    one = way(process, [1.0, 3.0, 0.0])
    for level, x0 in ((0.9, 1.0), (0.7, 2.0), (0.5, 3.0), (0.3, 1.5), (0.1, 0.0), (0.95, 1.0), (0.05, 0.0)):
        torch.testing.assert_close(one.x0(at(level, process)), torch.full_like(noise(), x0))
    apart = torch.stack([at(0.7, process, 1), at(0.3, process, 1)]).flatten()
    torch.testing.assert_close(one.x0(apart)[:, 0, 0, 0], torch.tensor([2.0, 1.5], dtype=torch.float64))


@every_process
def test_a_policy_of_one_picture_is_a_line(process: Process) -> None:
    for one in (way(process, [0.7]), way(process, [0.7, 0.7, 0.7])):
        x0, eps = process.split(torch.full_like(noise(), 0.7), "x0", noise(), one.t)
        torch.testing.assert_close(one.follow(noise(), one.s), process.mix(x0, eps, one.s))
        torch.testing.assert_close(one.line(noise())[0], x0)


@every_process
def test_the_substeps_are_of_second_order(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    one, ends = way(process, [1.0, -1.0]), []
    for count in (8, 16, 256):
        monkeypatch.setattr(policy, "SUBSTEPS", count)
        ends.append(one.follow(noise(), one.s))
    coarse, fine = ((end - ends[-1]).abs().max() for end in ends[:2])
    assert 3.5 < float(coarse / fine) < 4.5


def test_the_way_is_that_of_its_velocity() -> None:
    """In rectified flow dx/dt = (x - x0(t)) / t: with x0 = a + b t it is solved by x = a + (c - b log t) t."""
    one = way(RF(), [1.9, 1.1])  # x0 = 1 + t
    x, t, s = noise(), 0.9, 0.1
    c = (x - 1) / t + torch.tensor(t).log()
    torch.testing.assert_close(one.follow(x, one.s), 1 + (c - torch.tensor(s).log()) * s, atol=4e-3, rtol=0)
    middle = at(0.5, RF())
    state = one.follow(x, middle)
    x0, eps = one.at(state, middle)
    torch.testing.assert_close(eps - x0, (state - 1.5) / 0.5)


class Wide(torch.nn.Module):
    """Some network of three points for two channels."""

    def forward(self, x: Tensor, t: Tensor, cond: object, s: object, w: object) -> Tensor:
        return torch.cat([torch.tanh((k + 1) * x) + 0.3 * k * t.reshape(-1, 1, 1, 1) for k in range(3)], dim=1)


@every_kind
@every_process
def test_the_solver_takes_the_way_that_training_takes(process: Process, kind: Kind) -> None:
    den = Denoiser(Wide(), process, kind, points=3)
    grid = [float(at(level, process)[0]) for level in (0.9, 0.4)] + [0.0]
    steps = [Step("denoiser", t, s, None, 0.0) for t, s in pairwise(grid)]
    solver = solvers.make("dx", process, kind, steps)
    state, alone = solver.start(noise(3, 2)), solver.start(noise(3, 2)[1])
    while not solver.done(state):
        t = torch.full((3,), steps[state.i].t, dtype=torch.float64)
        pred = Wide()(over(process.network_scale(t), state.x) * state.x, process.network_time(t), None, None, None)
        alone = solver.advance(alone, pred[1])  # one row without a batch
        state = solver.advance(state, pred)
    torch.testing.assert_close(state.x, solvers.sample(den, noise(3, 2), grid))
    torch.testing.assert_close(alone.x, state.x[1])


def test_asked_without_an_end_a_policy_gives_its_velocity_at_the_start() -> None:
    den = Denoiser(Wide(), RF(), "x0", points=3)
    x0, eps = den(noise(2, 2), at(0.5, RF()))
    torch.testing.assert_close(x0, torch.tanh(noise(2, 2)))
    torch.testing.assert_close(0.5 * x0 + 0.5 * eps, noise(2, 2))
