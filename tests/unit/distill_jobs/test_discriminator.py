"""Discriminators: what they read, what they learn, and that they are made alike every time."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill_jobs.batches import Rows
from distill_jobs.discriminator import Adversary, DiscriminatorConfig, Heads, fooling, real_of, telling
from distill_jobs.features import features
from distill_jobs.roles import Cast
from engines.denoiser import Denoiser
from engines.errors import InvalidRequest
from engines.process import EDM, RF, Process
from tests.unit.distill_jobs.closed_form import GUIDED_MEAN, SHAPE, STD, batch_of, student_of, teacher_of


class UNetLike(nn.Module):
    """A picture network with a middle of 5 channels at half the side, and blocks that answer in tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(2, 5, 2, stride=2)
        self.mid_block = nn.Conv2d(5, 5, 1)
        self.blocks = nn.ModuleList([Tokens()])
        self.up = nn.ConvTranspose2d(5, 2, 2, stride=2)

    def forward(self, x: Tensor, t: Tensor, cond: Any, s: Any, w: Any) -> Tensor:
        _, back = self.blocks[0](self.mid_block(self.down(x)).flatten(2).transpose(1, 2))
        out: Tensor = self.up(back.transpose(1, 2).reshape(len(x), 5, x.shape[2] // 2, x.shape[3] // 2))
        return out


class Tokens(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.new_zeros(()), x


def test_features_are_those_of_the_middle_and_flow_back_to_the_latent() -> None:
    den = Denoiser(UNetLike(), RF(), "flow")
    x, t = torch.randn(3, 2, 4, 4, requires_grad=True), torch.full((3,), 0.5)
    x0, (seen,) = features(den, x, t, None)
    torch.testing.assert_close(seen, den.net.mid_block(den.net.down(x)))  # type: ignore[union-attr]
    torch.testing.assert_close(x0, den(x, t)[0])
    seen.sum().backward()
    assert x.grad is not None
    _, tokens = features(den, x, t, None, ("mid_block", "blocks.0"))
    assert [one.shape for one in tokens] == [(3, 5, 2, 2), (3, 5, 4, 1)]
    assert not den.net.mid_block._forward_hooks  # type: ignore[union-attr]


def test_a_network_without_a_middle_is_known_by_its_prediction() -> None:
    den, batch = teacher_of(RF(), "flow").denoiser, batch_of(4)
    t = torch.full((4,), 0.5, dtype=torch.float64)
    x0, (seen,) = features(den, batch.noise, t, batch.cond)
    assert torch.equal(seen, torch.cat([batch.noise, x0], dim=1))


def test_heads_are_the_same_whatever_randomness_there_was_and_judge_every_position() -> None:
    config, den = DiscriminatorConfig(taps=("mid_block", "blocks.0")), Denoiser(UNetLike(), RF(), "flow")
    made: list[Heads] = []
    for seed in range(2):
        torch.manual_seed(seed)
        made.append(config.heads(den))
    assert all(torch.equal(a, b) for a, b in zip(*(one.parameters() for one in made), strict=True))
    t = torch.full((3,), 0.5)
    _, seen = features(den, torch.randn(3, 2, 4, 4), t, None, config.taps)
    logits = made[0](seen, RF().angle(t))
    assert logits.shape == (3, 2 * 2 + 4)
    assert torch.equal(logits, torch.zeros_like(logits))  # undecided at first


def test_a_teacher_without_the_wanted_submodules_gets_one_head() -> None:
    assert len(DiscriminatorConfig().heads(teacher_of(RF(), "flow").denoiser).heads) == 1


def test_the_losses_are_the_papers() -> None:
    real, fake = torch.tensor([[2.0]]), torch.tensor([[-0.5]])
    assert float(telling(real, fake, "hinge")) == pytest.approx(0.5)
    assert float(telling(real, fake, "softplus")) == pytest.approx(
        math.log1p(math.exp(-2)) + math.log1p(math.exp(-0.5))
    )
    assert float(fooling(fake, "hinge")) == pytest.approx(0.5)
    assert float(fooling(fake, "softplus")) == pytest.approx(math.log1p(math.exp(0.5)))


def test_real_latents_are_data_or_the_ends_of_trajectories_and_never_missing_in_silence() -> None:
    x, pair = torch.zeros(2, *SHAPE), torch.arange(2.0)[None, :, None, None, None].expand(2, 2, *SHAPE)
    assert real_of(Rows(cond=None, x=x, pair=pair)) is x
    assert torch.equal(real_of(Rows(cond=None, pair=pair)), torch.ones(2, *SHAPE))
    with pytest.raises(InvalidRequest, match="these rows have none"):
        real_of(Rows(cond=torch.zeros(2)))


# learning ------------------------------------------------------------------------------------------------------------


def trained(process: Process, config: DiscriminatorConfig, shift: float, std: float, updates: int) -> Adversary:
    teacher = teacher_of(process, "flow")
    heads = config.heads(teacher.denoiser).double()
    cast = Cast(teacher, disc=heads, student=student_of(process, "flow"))
    adversary = Adversary(cast, config)
    with cast.only("disc"):
        optimiser = torch.optim.AdamW(heads.parameters(), betas=(0.0, 0.99))
        for seed in range(updates):
            batch = batch_of(32, seed)
            real, fake = GUIDED_MEAN + STD * batch.randn(), GUIDED_MEAN + shift + std * batch.randn()
            optimiser.param_groups[0]["lr"] = 1e-2 * (1 - seed / updates)
            optimiser.zero_grad()
            adversary.own_loss(fake, real, batch).backward()
            optimiser.step()
    return adversary


def accuracy(adversary: Adversary, shift: float, std: float) -> float:
    """On slightly noised samples, one verdict each."""
    batch = batch_of(512, seed=999)
    t = adversary.levels(batch).clamp(max=float(adversary.process.t_of_angle(torch.tensor(0.3))))
    sides = (GUIDED_MEAN + STD * batch.randn(), GUIDED_MEAN + shift + std * batch.randn())
    with torch.no_grad():
        real, fake = (
            adversary.logits(adversary.process.mix(x, batch.randn(), t), t, batch.cond).mean(dim=1) for x in sides
        )
    return float(torch.cat([real > 0, fake < 0]).double().mean())


@pytest.mark.parametrize("process", [RF(), EDM()], ids=["rf", "edm"])
@pytest.mark.parametrize("gan", ["softplus", "hinge"])
def test_a_discriminator_learns_to_tell_two_shifted_gaussians(process: Process, gan: Any) -> None:
    config = DiscriminatorConfig(gan=gan, width=16)
    before = accuracy(trained(process, config, 0.5, STD, updates=0), 0.5, STD)
    after = accuracy(trained(process, config, 0.5, STD, updates=100), 0.5, STD)
    assert before < 0.6
    assert after > 0.9


def test_a_discriminator_learns_to_tell_a_narrow_gaussian() -> None:
    """Size is divided out of what a head sees, and told beside it."""
    found = trained(RF(), DiscriminatorConfig(width=16, tau_mean=-1.0), 0.0, 0.3 * STD, updates=200)
    assert accuracy(found, 0.0, 0.3 * STD) > 0.75


def test_the_penalty_keeps_verdicts_flat_around_real_samples() -> None:
    def slope(r1: float) -> float:
        adversary = trained(RF(), DiscriminatorConfig(width=16, r1=r1), 0.5, STD, updates=100)
        batch = batch_of(64, seed=1)
        x = (GUIDED_MEAN + STD * batch.randn()).requires_grad_()
        t = torch.full((64,), 0.1, dtype=torch.float64)
        (grad,) = torch.autograd.grad(adversary.logits(x, t, batch.cond).mean(), x)
        return float(grad.norm())

    assert slope(100.0) < 0.5 * slope(0.0)
