"""The training loop and its optimiser: a stopped run ends where an uninterrupted one does."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from distill_jobs.teachers.training.loop import Losses, Plan, Run, part
from distill_jobs.teachers.training.muon import Muon, orthogonalise

TARGET = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))


def trained(checkpoint: Path, updates: int, *, of: int) -> Run[nn.Linear]:
    """Fits a linear map for `updates` of a plan of `of`, continuing `checkpoint` if it is there."""
    torch.manual_seed(0)
    network = nn.Linear(8, 16)
    plan = Plan(updates=of, batch=32, matrix_lr=0.05, adam_lr=0.01, warmup=2)
    optimiser = Muon(network.named_parameters(), matrix_lr=plan.matrix_lr, adam_lr=plan.adam_lr)
    run = Run(network, copy.deepcopy(network).requires_grad_(False), optimiser, plan, checkpoint)

    def loss(update: int) -> Losses:
        x = torch.randn(32, 8, generator=torch.Generator().manual_seed(update))
        run.stopping = update == updates - 1
        return {"total": (network(x) - x @ TARGET.T).square().mean()}

    run.fit(loss, lambda: "")
    return run


def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole.safetensors", 40, of=40)
    trained(tmp_path / "parts.safetensors", 17, of=40)
    parts = trained(tmp_path / "parts.safetensors", 40, of=40)
    assert parts.update == whole.update == 40
    for a, b in zip(whole.average.parameters(), parts.average.parameters(), strict=True):
        assert torch.equal(a, b)


def test_it_learns(tmp_path: Path) -> None:
    run = trained(tmp_path / "a.safetensors", 300, of=300)
    assert (run.network.weight - TARGET).abs().mean() < 0.1 * TARGET.abs().mean()


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (8, 3, 3, 3)])
def test_orthogonalised_updates_have_even_singular_values(shape: tuple[int, ...]) -> None:
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(gradient).flatten(1))
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_the_learning_rate_rises_holds_and_falls() -> None:
    plan = Plan(updates=100, batch=1, matrix_lr=1, adam_lr=1, warmup=10, constant_share=0.5)
    scales = [plan.scale(update) for update in range(100)]
    assert scales[0] == pytest.approx(0.1)
    assert scales[10:50] == [1.0] * 40
    assert scales[75] == pytest.approx(0.5)
    assert min(scales[50:]) >= plan.last_scale


def test_parts_are_split_by_name() -> None:
    tensors = {"a.x": torch.zeros(1), "ab.x": torch.ones(1)}
    assert list(part(tensors, "a")) == ["x"]
