"""What LoRA roles on one backbone need of memory, and that saving activations too changes nothing that is learnt."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from bench.lora_memory import LATENT, TOKENS, WIDTH, held, network, run_of
from distill_jobs.batches import TensorSource
from distill_jobs.lora import adapted
from distill_jobs.stage import Execution, StageRun
from tests.unit.distill_jobs.test_lora import LORA, shaken, stage


def test_activations_computed_anew_give_the_same_gradients() -> None:
    torch.manual_seed(6)
    teacher = network((8, 8), layers=1)
    source = TensorSource(torch.randn(4, TOKENS, WIDTH), LATENT)
    seen = []
    for checkpointing in (False, True):
        student = shaken(adapted(teacher, LORA))
        execution = Execution(checkpointing=checkpointing)
        run = StageRun(0, stage("dmd", batch=4, fake_updates=1), teacher, student, execution=execution)
        with run.cast.only("student"):
            sum(run.method.loss("student", run.batch(source, 0)).values()).backward()
            seen.append({name: p.grad for name, p in student.named_parameters()})
        units = [module for module in student.modules() if isinstance(module, UNet2DConditionModel)]
        assert [unit.is_gradient_checkpointing for unit in units] == [checkpointing]
    for name, gradient in seen[0].items():
        torch.testing.assert_close(seen[1][name], gradient)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in teacher.modules())


def test_dmd_with_shared_roles_needs_less_than_half_of_the_memory_of_three_networks() -> None:
    """Of weights, gradients, moments and averages, as `bench.lora_memory` measures them on a large network."""
    source = TensorSource(torch.randn(2, TOKENS, WIDTH), LATENT)
    found = {}
    for rank in (None, 4):
        teacher = network((16, 32))
        run = run_of(teacher, rank, rows=2)
        run.iterate(source)
        found[rank] = held(run)
        trained = 4 * sum(parameter.numel() for parameter in run.cast.parameters("student").values())
        backbone = 4 * sum(parameter.numel() for parameter in teacher.parameters())
        assert found[rank]["weights"] == (3 * backbone if rank is None else backbone + 2 * trained)
        assert (found[rank]["gradients"], found[rank]["average"]) == (trained, trained)
        assert found[rank]["optimiser"] == pytest.approx(4 * trained, rel=0.01)  # two moments of two roles, and counts
    assert sum(found[4].values()) <= 0.45 * sum(found[None].values())
