"""A picture that is changed instead of made: where in a plan it begins, and what of it stays.

Its latents are noised to the time of a later step than the first (SDEdit), and with a mask, what is to stay is put back
after every step, noised to that step's time with the noise that the row began with (as blended latents are). Both are
only another start and another last touch of a row: it shares every call with rows that are made from noise.

A network that inpaints (nine input channels) is shown the mask and the latents of the picture that is grey where it may
change, and nothing is put back; without a mask all may change.

`strength` is the share of the plan's steps that is taken, rounded down: of four steps .75 takes the last three.

Source: SDEdit arXiv 2108.01073 section 3; blended latents as diffusers has them.
Left out: masks that soften in latent space. A latent position under an uneven edge of a mask may change, where
diffusers asks only for the first of its pixels.
Checked against: diffusers 0.42 img2img and inpaint pipelines of Stable Diffusion, SDXL, SD3 and FLUX (tests).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from engines.families.base import GREY
from engines.noise import noise
from engines.solvers import Solver, State


@dataclass(frozen=True, slots=True)
class Looked:
    """A picture as its VAE sees it: latents [C, H, W], and their deviation where codes are drawn.

    `changes` [1, H, W] is 1 where the picture may change, 0 where it stays; None: everywhere. `beneath` is, for a
    network that reads it, what the VAE sees of the picture `without` what may change.
    """

    latents: Tensor
    deviation: Tensor | None = None
    changes: Tensor | None = None
    beneath: "Looked | None" = None

    def code(self, seed: int, k: int) -> tuple[Tensor, int]:
        """One code of the picture by draw `k` of a seed, and how many draws that took."""
        if self.deviation is None:
            return self.latents, 0
        drawn = noise(seed, k, tuple(self.latents.shape)).to(self.latents.device)
        return self.latents + self.deviation * drawn, 1


@dataclass(frozen=True, slots=True)
class Edit:
    """One row's: clean latents [C, H, W], the noise that it begins with, and the step.

    `draws` counts the draws of its seed before the first step; fresh noise goes on from there. `seen` is what a network
    that inpaints reads, and keeps by itself what is to stay.
    """

    latents: Tensor
    noise: Tensor
    changes: Tensor | None
    first: int
    draws: int
    seen: Tensor | None = None

    @classmethod
    def of(cls, looked: Looked, seed: int, first: int) -> "Edit":
        """As a diffusers pipeline draws it: a code of the picture where these are drawn, then the noise."""
        shape, device, beneath = tuple(looked.latents.shape), looked.latents.device, looked.beneath
        if beneath is None:
            latents, draws = looked.code(seed, 0)
            return cls(latents, noise(seed, draws, shape).to(device), looked.changes, first, draws + 1)
        latents, draws = looked.code(seed, 0) if first else (looked.latents, 0)
        start = noise(seed, draws, shape).to(device)
        under, more = beneath.code(seed, draws + 1)
        mask = torch.ones_like(under[:1]) if looked.changes is None else looked.changes
        return cls(latents, start, None, first, draws + 1 + more, torch.cat([mask, under]))

    def begin(self, solver: Solver) -> State:
        """All of what may change begins as noise where all steps are taken and something is to stay, or is seen."""
        if self.first == 0 and (self.changes is not None or self.seen is not None):
            return solver.start(self.noise)
        return solver.begin(self.latents, self.noise, self.first)

    def held(self, solver: Solver, x: Tensor, i: int) -> Tensor:
        """x [C, H, W] before evaluation `i`, with what is to stay put back."""
        if self.changes is None:
            return x
        return self.changes * x + (1 - self.changes) * solver.noised(self.latents, self.noise, i)

    def draw(self, seed: int, i: int) -> Tensor:
        """The fresh noise of step `i`."""
        return noise(seed, self.draws + i - self.first, tuple(self.latents.shape)).to(self.latents.device)


def without(levels: Tensor, edited: Tensor | None) -> Tensor:
    """A picture [3, H, W] that is grey where it may change: bool [H, W], or everywhere."""
    return torch.full_like(levels, GREY) if edited is None else levels.masked_fill(edited, GREY)


def changes_of(edited: Tensor, downscale: int) -> Tensor:
    """[1, H, W] of latents from a mask of pixels, bool [H', W']: a position may change if any of its pixels may."""
    return F.max_pool2d(edited[None].float(), downscale)
