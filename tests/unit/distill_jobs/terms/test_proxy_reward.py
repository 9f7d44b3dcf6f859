"""The proxy of a reward: what an exact one errs and pulls in closed form, and that a learnt one reaches the reward."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill_jobs import times
from distill_jobs.batches import Batch
from distill_jobs.roles import Cast
from distill_jobs.terms.base import Wanted
from distill_jobs.terms.proxy_reward import ROLE, ProxyReward
from engines.manifest import Kind
from engines.process import RF, Process
from tests.unit.distill_jobs.closed_form import MEAN, SHAPE, STD, batch_of, student_of, teacher_of
from tests.unit.distill_jobs.oracle import TRUTH, every_kind, every_process
from tests.unit.distill_jobs.terms.oracle import gradients_of, samples

SIZE = math.prod(SHAPE)
LEVEL = 0.1


def brightness(y: Tensor, batch: Batch) -> Tensor:
    return y.flatten(1).mean(dim=1)


class Exact(nn.Module):
    """The proxy that tells the brightness of what it is shown, x_t and the teacher's prediction, times `slope`."""

    def __init__(self, process: Process, slope: float = 1.0) -> None:
        super().__init__()
        self.process, self.slope = process, nn.Parameter(torch.tensor(slope, dtype=torch.float64))

    def forward(self, seen: list[Tensor], angle: Tensor) -> Tensor:
        x = seen[0][:, : SHAPE[0]].flatten(1).mean(dim=1)
        return (self.slope * x / self.process.alpha(self.process.t_of_angle(angle)))[:, None]


def proxy(
    process: Process, kind: Kind, *, term: type[ProxyReward] = ProxyReward, player: nn.Module | None = None, **told: Any
) -> Any:
    _, config = Wanted("proxy_reward", settings={"level": LEVEL, **told}).resolve()
    players = {"student": student_of(process, kind), ROLE: player or Exact(process)}
    one: Any = term(Cast(teacher_of(process, kind), **players), config)
    one.reward = brightness
    return one


def hidden(process: Process) -> float:
    """The variance of a brightness' noise in what the proxy is shown."""
    t = times.on(process, torch.tensor([LEVEL], dtype=torch.float64))
    return float((process.sigma(t) / process.alpha(t)).square()) / SIZE


def error(one: ProxyReward, rows: int = 4096) -> float:
    batch = batch_of(rows)
    with torch.no_grad():
        return float(one.own_loss(ROLE, samples(one, batch), batch))


@every_kind
@every_process
def test_an_exact_proxy_pulls_as_the_reward_does_and_errs_by_what_noise_hides(process: Process, kind: Kind) -> None:
    one = proxy(process, kind)
    by_mean, by_std = gradients_of(one, 4096)
    assert by_mean == pytest.approx(-1)
    assert abs(by_std) < 0.02
    assert error(one) == pytest.approx(hidden(process), rel=0.1)


@every_process
def test_a_flat_proxy_errs_by_what_it_does_not_tell_apart(process: Process) -> None:
    one = proxy(process, "flow", player=Exact(process, 0.5))
    assert error(one) == pytest.approx(0.25 * (hidden(process) + STD**2 / SIZE), rel=0.05)


class Descends(ProxyReward):
    def student_loss(self, y: Tensor, batch: Batch) -> Tensor:
        return -super().student_loss(y, batch)


class OfOthers(ProxyReward):
    """Learns of each sample what the reward says of another."""

    def own_loss(self, role: str, y: Tensor, batch: Batch) -> Tensor:
        self.reward = lambda y, batch: brightness(y.flip(0), batch)  # type: ignore[assignment]
        return super().own_loss(role, y, batch)


def test_a_wrong_sign_and_a_reward_of_other_samples_fail_the_oracle() -> None:
    assert gradients_of(proxy(RF(), "flow", term=Descends), 64)[0] == pytest.approx(1)
    assert error(proxy(RF(), "flow", term=OfOthers)) > 10 * hidden(RF())


def learnt(reward: Any, updates: int) -> Any:
    """A proxy of heads that was trained on samples of the student."""
    teacher, config = teacher_of(RF(), "flow").denoiser, Wanted("proxy_reward", settings={"width": 16}).resolve()[1]
    one = proxy(RF(), "flow", player=ProxyReward.make(ROLE, teacher, config).double())
    one.reward = reward
    with one.cast.only(ROLE) as heads:
        optimiser = torch.optim.Adam(heads.parameters(), lr=1e-2)
        for seed in range(updates):
            batch = batch_of(64, seed)
            optimiser.zero_grad()
            one.own_loss(ROLE, samples(one, batch).detach(), batch).backward()
            optimiser.step()
    return one


def test_a_learnt_proxy_tells_samples_apart_as_the_reward_does_but_for_what_noise_hides() -> None:
    """The least error of any proxy is the brightness' variance where x_t is known."""
    one, noise = learnt(brightness, 150), hidden(RF())
    least = 1 / (1 / noise + SIZE / STD**2)
    assert 0.9 * least < error(one) < 1.5 * least < 0.1 * STD**2 / SIZE
    by_mean, _ = gradients_of(one, 2048)
    assert by_mean == pytest.approx(-1, abs=0.15)


def test_a_reward_without_a_slope_is_climbed() -> None:
    def bright(y: Tensor, batch: Batch) -> Tensor:
        return (brightness(y, batch) > MEAN + TRUTH).to(y)

    one = learnt(bright, 100)
    assert not bright(samples(one, batch_of(4)), batch_of(4)).requires_grad
    by_mean, _ = gradients_of(one, 1024)
    assert by_mean < -0.5


def test_proxy_and_reward_are_reported_beside_each_other() -> None:
    one, batch = proxy(RF(), "flow", player=Exact(RF(), 0.5)), batch_of(512)
    y = samples(one, batch).detach()
    seen = one.report(y, batch)
    assert float(seen["reward"]) == pytest.approx(-2 * float(one.student_loss(y, batch)), rel=0.01)
    assert {"held_out", "distance"} < seen.keys()
