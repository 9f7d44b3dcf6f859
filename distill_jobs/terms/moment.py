"""Moment matching: on the student's samples the teacher's denoising errs as on real ones, in the mean.

A teacher that has learnt E[x0 | x_tau] leaves an error T(x_tau) - x0 that no function of x_tau correlates with. Each
correlation that the student's samples have is a moment in which they differ; here those with the teacher's own
features phi (at unit deviation) and with 1: m = E[(T(y_tau) - y) phi(y_tau)^T], the gradient of its denoising loss for
one more linear layer on them. The loss is <m, m'> of two halves of the rows, whose mean is |E m|^2 without the variance
of a finite batch; it may be negative. No critic; conditions may all differ. A guided teacher's T is the guided one.

Source: arXiv 2406.04103 (moments in parameter space, of all parameters there). Left out: the alternating variant with
a critic (`dmd` without its normaliser is that), preconditioning by Adam's second moments.
"""

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from distill_jobs import times
from distill_jobs.batches import Batch
from distill_jobs.features import MIDDLE, features
from distill_jobs.methods.base import MethodConfig
from distill_jobs.roles import unguided
from distill_jobs.terms.base import Term
from engines.errors import InvalidRequest


class MomentConfig(MethodConfig):
    tau_min: float = Field(0.1, gt=0, lt=1, description="least noise level of the comparison")
    tau_max: float = Field(0.9, gt=0, lt=1)
    taps: tuple[str, ...] = Field(MIDDLE, description="name ends of the teacher's submodules whose features are used")


class Moment(Term):
    """The teacher's error on the student's samples is uncorrelated with its features, as on real ones; no critic."""

    Config = MomentConfig
    paper = "2406.04103"

    def student_loss(self, y: Tensor, batch: Batch) -> Tensor:
        if len(batch) < 2:
            raise InvalidRequest("moment matching compares two halves of a batch: batch must be 2 or more")
        t = times.on(self.process, batch.draw(times.Uniform(self.config.tau_min, self.config.tau_max)))
        y_t = self.process.mix(y, batch.randn(), t)
        _, seen = features(unguided(self.cast.teacher), y_t, t, batch.cond, self.config.taps)
        error = self.cast.teacher(y_t, t, batch.cond)[0] - y
        error = error / error.detach().square().mean().sqrt()
        moments = [self._moments(error, phi) for phi in seen]
        loss: Tensor = sum((_across_halves(m) for m in moments), error.new_zeros(())) / len(moments)
        return loss

    @staticmethod
    def _moments(error: Tensor, phi: Tensor) -> Tensor:
        """[B, C, D + 1]: each row's mean over positions of the error times 1 and times phi."""
        if phi.shape[-1] == 1:  # tokens, which have no place in the error
            phi = phi.mean(dim=(2, 3), keepdim=True)
        here = functional.adaptive_avg_pool2d(error, (phi.shape[2], phi.shape[3])).flatten(2)
        deviation, mean = torch.std_mean(phi.detach(), dim=(0, 2, 3), keepdim=True)
        known = functional.pad((phi - mean) / (deviation + 1e-6), (0, 0, 0, 0, 0, 1), value=1.0).flatten(2)
        moments: Tensor = here @ known.transpose(1, 2) / here.shape[2]
        return moments


def _across_halves(moments: Tensor) -> Tensor:
    first, second = moments[::2].mean(dim=0), moments[1::2].mean(dim=0)
    return (first * second).mean()


TERM = Moment
