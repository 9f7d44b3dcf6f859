"""Loss terms in closed form: the student's samples are N(cond + shift, std^2), drawn by reparametrisation."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distill_jobs.batches import Batch
from distill_jobs.roles import Cast
from distill_jobs.terms.base import Term, Wanted
from engines.denoiser import BaseDenoiser
from engines.manifest import Kind
from engines.process import Process
from tests.unit.distill_jobs.closed_form import STD, GaussianNet, batch_of, over, student_of, teacher_of
from tests.unit.distill_jobs.oracle import TRUTH


def term_of(
    name: str,
    process: Process,
    kind: Kind,
    *,
    settings: Mapping[str, Any] | None = None,
    term: type[Term] | None = None,
    teacher: BaseDenoiser | None = None,
    **student: Any,
) -> Term:
    """The named term over a closed-form cast; its own roles are left out."""
    found, config = Wanted(name, settings=settings or {}).resolve()
    return (term or found)(
        Cast(teacher or teacher_of(process, kind), student=student_of(process, kind, **student)), config
    )


def samples(one: Term, batch: Batch) -> Tensor:
    net = one.cast.student.net
    assert isinstance(net, GaussianNet)
    return over(batch.cond) + net.shift + net.log_std.exp() * batch.noise


def term_gradients(
    name: str,
    process: Process,
    kind: Kind,
    *,
    rows: int = 4096,
    seeds: int = 1,
    shift: float = TRUTH,
    std: float = STD,
    **parts: Any,
) -> tuple[float, float]:
    """d student loss / d (mean, log std), the mean over some batches."""
    one = term_of(name, process, kind, shift=shift, std=std, **parts)
    return gradients_of(one, rows, seeds)


def gradients_of(one: Term, rows: int, seeds: int = 1) -> tuple[float, float]:
    net = one.cast.student.net
    assert isinstance(net, GaussianNet)
    with one.cast.only("student"):
        for seed in range(seeds):
            batch = batch_of(rows, seed)
            (one.student_loss(samples(one, batch), batch) / seeds).backward()
        seen = [0.0 if p.grad is None else float(p.grad) for p in (net.shift, net.log_std)]
    net.zero_grad(set_to_none=True)
    assert all(p.grad is None for p in one.cast.teacher.parameters())
    return seen[0], seen[1]


def term_loss(one: Term, batch: Batch) -> float:
    """Of a term that asks the student itself."""
    with torch.no_grad():
        return float(one.student_loss(batch.noise[:0], batch))
