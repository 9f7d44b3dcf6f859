"""Teacher trajectories that are kept: what they need of memory. That methods find the same ones again is tested with
methods."""

import pytest
import torch

from distill_jobs.batches import TensorSource
from distill_jobs.methods.base import Workspace
from distill_jobs.needs import forget_peak, peak_bytes
from distill_jobs.pairs import TeacherPath, collect
from engines.denoiser import Denoiser
from engines.process import RF

SHAPE = (4, 64, 64)


def test_trajectories_are_held_once_while_they_are_made() -> None:
    teacher = Denoiser(lambda x, t, cond, s, w: torch.zeros_like(x), RF(), "flow")
    source = TensorSource(torch.zeros(4), SHAPE)
    path = TeacherPath((1.0,), 1, "euler")
    collect(teacher, source, Workspace(), path, 64)  # what any first call loads and reserves
    forget_peak()
    before = peak_bytes()
    found = collect(teacher, source, Workspace(), path, 1024)
    assert found is not None
    assert found.states.shape == (1024, 2, *SHAPE)
    assert peak_bytes() - before == pytest.approx(found.states.nbytes, rel=0.4)
