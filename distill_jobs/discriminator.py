"""A discriminator on a frozen teacher's features: small heads say of a noised latent whether it is real.

Both sides are noised to the same levels tau, so that the two distributions overlap and the teacher is asked what it was
trained for; its features carry the condition. Heads see a fixed random mixture of the feature channels, so that they
fit every teacher, at unit root mean square per row: they are told how large it was, and the noise level.

Source: latents and teacher features arXiv 2403.12015; random mixtures 2111.01007; approximate R1 2501.08316.
Left out: 3x3 projections between levels, spectral normalisation, pooled text.
"""

from collections.abc import Sequence
from functools import cache
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from distill_jobs import times
from distill_jobs.batches import Batch, Rows
from distill_jobs.features import MIDDLE, features, tapped
from distill_jobs.methods.base import MethodConfig
from distill_jobs.roles import Cast, Role, unguided
from engines.denoiser import BaseDenoiser, Cond
from engines.errors import InvalidRequest
from engines.process import over

ROLE = "disc"
_LEVELS = (0.02, 0.98)  # at the very ends a network's features say little


class HeadsConfig(MethodConfig):
    """What a job may say of the heads, whatever they are shown."""

    gan: Literal["softplus", "hinge"] = Field("softplus", description="the loss that both sides are of")
    taps: tuple[str, ...] = Field(
        MIDDLE, description="name ends of the teacher's submodules that are read; without any, its prediction is"
    )
    width: int = Field(64, ge=1, description="channels of a head")
    disc_lr: float = Field(1e-3, gt=0)
    disc_updates: int = Field(1, ge=1, description="discriminator updates per student update")

    def disc_role(self, start: int = 0) -> Role:
        return Role(init="new", lr=self.disc_lr, betas=(0.0, 0.99), steps=self.disc_updates, start=start)

    def heads(self, denoiser: BaseDenoiser) -> "Heads":
        heads = Heads(len(tapped(denoiser, self.taps)) or 1, self.width)
        return heads.to(next(denoiser.parameters()).device)


class DiscriminatorConfig(HeadsConfig):
    r1: float = Field(10.0, ge=0, description="weight of |h(x) - h(x + a eps)|^2 on real latents")
    r1_noise: float = Field(0.1, gt=0, description="a of it")
    tau_mean: float = Field(1.0, description="of the logit-normal noise levels at which samples are judged")
    tau_std: float = Field(1.0, gt=0)


class Heads(nn.Module):
    """One head per feature: [B, D, H, W] each -> logits [B, N] of all positions of all features."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(count)  # what a head starts from follows from the settings alone
        self.heads = nn.ModuleList(_Head(width, generator) for _ in range(count))

    def forward(self, seen: Sequence[Tensor], angle: Tensor) -> Tensor:
        return torch.cat([head(one, angle) for head, one in zip(self.heads, seen, strict=True)], dim=1)


class _Head(nn.Module):
    def __init__(self, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.told = nn.Linear(2, width)
        self.near = nn.Conv2d(width, width, 3, padding=1)
        self.out = nn.Conv2d(width, 1, 1, bias=False)
        for weight in self.parameters():
            fan = weight[0].numel() if weight.dim() > 1 else width
            nn.init.normal_(weight, std=fan**-0.5, generator=generator)
        nn.init.zeros_(self.out.weight)

    def forward(self, seen: Tensor, angle: Tensor) -> Tensor:
        size = (seen.square().flatten(1).mean(dim=1) + 1e-12).sqrt()
        mixture = _mixture(seen.shape[1], len(self.told.bias)).to(seen)
        mixed = torch.einsum("bchw,cd->bdhw", seen / over(size, seen), mixture)
        told: Tensor = self.told(torch.stack([angle, size.log()], dim=1).to(seen.dtype))
        hidden = functional.silu(mixed + told[:, :, None, None])
        logits: Tensor = self.out(functional.silu(self.near(hidden)))
        return logits.flatten(1).to(seen.dtype)


@cache
def _mixture(channels: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(channels)
    mixture: Tensor = torch.randn(channels, width, generator=generator) / channels**0.5
    return mixture


class Adversary:
    """The two sides' losses over one cast, whose role `disc` is the heads."""

    def __init__(self, cast: Cast, config: DiscriminatorConfig) -> None:
        self.cast, self.config, self.process = cast, config, cast.teacher.process

    def logits(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """[B, N], the higher the more real, of x at its time t; differentiable in x."""
        _, seen = features(unguided(self.cast.teacher), x, t, cond, self.config.taps)
        logits: Tensor = self.cast.module(ROLE)(seen, self.process.angle(t))
        return logits

    def levels(self, batch: Batch) -> Tensor:
        """The times [B] at which samples are judged."""
        level = batch.draw(times.LogitNormal(self.config.tau_mean, self.config.tau_std))
        return times.on(self.process, level.clamp(*_LEVELS))

    def student_loss(self, y: Tensor, batch: Batch) -> Tensor:
        """What fooling the heads asks of y [B, ...]: not saturating where they are sure."""
        t = self.levels(batch)
        return fooling(self.logits(self.process.mix(y, batch.randn(), t), t, batch.cond), self.config.gan)

    def own_loss(self, y: Tensor, real: Tensor, batch: Batch) -> Tensor:
        """The discriminator's, for y without gradient and real latents of the same conditions."""
        t, noise = self.levels(batch), batch.randn()
        at_real = self.logits(self.process.mix(real, noise, t), t, batch.cond)
        at_fake = self.logits(self.process.mix(y, batch.randn(), t), t, batch.cond)
        loss = telling(at_real, at_fake, self.config.gan)
        if not self.config.r1:
            return loss
        near = real + self.config.r1_noise * batch.randn()
        at_near = self.logits(self.process.mix(near, noise, t), t, batch.cond)
        return loss + self.config.r1 * (at_real - at_near).square().mean()


def telling(real: Tensor, fake: Tensor, gan: str) -> Tensor:
    """The discriminator's loss of its logits; least, for softplus, at log p_real - log p_fake."""
    if gan == "hinge":
        return functional.relu(1 - real).mean() + functional.relu(1 + fake).mean()
    return functional.softplus(-real).mean() + functional.softplus(fake).mean()


def fooling(fake: Tensor, gan: str) -> Tensor:
    return -fake.mean() if gan == "hinge" else functional.softplus(-fake).mean()


def real_of(rows: Rows) -> Tensor:
    """Real latents of these rows: the job's data, or where the teacher's trajectories end.

    Raises:
        InvalidRequest: the rows have neither.
    """
    if rows.x is not None:
        return rows.x
    if rows.pair is not None:
        return rows.pair[:, -1]
    raise InvalidRequest(
        "a discriminator compares with real latents and these rows have none: give data, or a method that makes "
        "latents (kd and those that learn from data)",
        param="method.terms",
    )
