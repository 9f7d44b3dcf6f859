"""How colourful a picture is, whatever it shows: spread and distance from grey of its colours.

With rg = R - G and yb = (R + G) / 2 - B over all pixels: |(std rg, std yb)| + 0.3 |(mean rg, mean yb)|, in levels.

Source: Hasler and Suesstrunk, Measuring colourfulness in natural images, 2003.
"""

import torch
from torch import Tensor

from distill_jobs.batches import Batch
from distill_jobs.terms.rewards.base import PictureReward

_GREY = 1e-3  # square levels: a finite slope where a picture has no colour


class Colourfulness(PictureReward):
    def of_pictures(self, pictures: Tensor, batch: Batch) -> Tensor:
        red, green, blue = pictures.flatten(2).unbind(dim=1)
        opposed = torch.stack([red - green, (red + green) / 2 - blue], dim=1)
        spread = (opposed.var(dim=2, unbiased=False).sum(dim=1) + _GREY).sqrt()
        tint = (opposed.mean(dim=2).square().sum(dim=1) + _GREY).sqrt()
        return spread + 0.3 * tint


REWARD = Colourfulness
