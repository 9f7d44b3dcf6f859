"""Adapters beside a shared backbone: what they are at the start, whose gradients flow, what is kept, what is learnt."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from distill_jobs import checkpoint
from distill_jobs.batches import TensorSource
from distill_jobs.group import Group
from distill_jobs.lora import Adapted, adapted, layers, merged, portable
from distill_jobs.methods.base import resolve
from distill_jobs.progress import Hooks
from distill_jobs.roles import Cast, Role, unguided
from distill_jobs.stage import Execution, Stage, StageRun
from distill_jobs.student_spec import LoraSpec
from distill_jobs.trainer import TrainConfig, Trainer
from engines.denoiser import BaseDenoiser, Denoiser, Guided
from engines.errors import InvalidRequest
from engines.process import RF
from tests.unit.distill_jobs.test_trainer import CONFIG, same, wish_after
from tests.unit.distill_jobs.tiny import SHAPE, STAGES, TinyNet, tiny_source, tiny_student, tiny_teacher

LORA = LoraSpec(rank=3, alpha=6.0)
METHODS = [name for name in STAGES if not resolve(name).method.inputs]


def lora_teacher(dropout: float = 0.0) -> Guided:
    return Guided(Denoiser(TinyNet(1, dropout), RF(), "flow"), torch.zeros(1), 1.5)


def plain(teacher: BaseDenoiser) -> Denoiser:
    found = unguided(teacher)
    assert isinstance(found, Denoiser)
    return found


def stage(name: str, iterations: int = 7, **settings: Any) -> Stage:
    return Stage(name, iterations, {**STAGES[name], "train": "lora", **settings})


def trainer(name: str, folder: Path | None = None, *, dropout: float = 0.0, hooks: Hooks | None = None) -> Trainer:
    teacher = lora_teacher(dropout)
    torch.manual_seed(17)
    return Trainer(
        [stage(name)], teacher, adapted(plain(teacher), LORA), tiny_source(), CONFIG, folder=folder, hooks=hooks
    )


class Nested(nn.Module):
    """A linear layer whose name is the end of another layer's, which has groups and gets no adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(2, 2, 1)
        self.b = nn.Module()
        self.b.proj = nn.Conv2d(2, 2, 3, padding=1, groups=2)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor, s: Tensor | None, w: Tensor | None) -> Tensor:
        out: Tensor = self.b.proj(self.proj(x))
        return out


def test_exactly_the_layers_that_can_be_adapted_are() -> None:
    denoiser = Denoiser(Nested(), RF(), "flow")
    found = adapted(denoiser, LORA)
    assert layers(denoiser, LORA) == ["proj"]
    assert {name.rpartition(".lora_")[0].removeprefix("net.") for name in found.state_dict()} == {"proj"}


def shaken(denoiser: Adapted, seed: int = 5) -> Adapted:
    """With an adapter that does something."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in denoiser.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return denoiser


def ask(denoiser: BaseDenoiser) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(5, *SHAPE, generator=generator)
    with torch.no_grad():
        x0: Tensor = denoiser(x, torch.linspace(0.2, 1.0, 5), torch.linspace(-1, 1, 5))[0]
    return x0


def test_an_untrained_adapter_changes_no_bit_and_the_teacher_never_feels_one() -> None:
    teacher = plain(lora_teacher())
    before = ask(teacher)
    student = adapted(teacher, LORA)
    assert torch.equal(ask(student), before)
    shaken(student)
    assert not torch.allclose(ask(student), before)
    assert torch.equal(ask(teacher), before)
    assert not any(isinstance(module, BaseTunerLayer) for module in teacher.modules())


def test_roles_are_one_backbone_in_memory() -> None:
    teacher = lora_teacher()
    student = adapted(plain(teacher), LORA)
    roles = {"fake": Role(train="lora"), "student": Role(init="student", train="lora")}
    cast = Cast.build(teacher, student, roles)
    networks = [cast["fake"], cast.student, copy.deepcopy(student)]
    own = {name.removeprefix("net."): value.data_ptr() for name, value in plain(teacher).named_parameters()}
    for network in networks:
        tensors = dict(nn.Module.named_parameters(network))
        for name, pointer in own.items():
            layer, _, kind = name.rpartition(".")
            assert tensors[f"net.{layer}.base_layer.{kind}"].data_ptr() == pointer
    adapters = [value.data_ptr() for network in networks for value in network.parameters()]
    assert len(set(adapters)) == len(adapters) == 3 * 4


@pytest.mark.parametrize("role", ["fake", "student"])
def test_only_the_adapter_of_the_named_role_takes_gradients(role: str) -> None:
    teacher = lora_teacher()
    run = StageRun(0, stage("dmd"), teacher, shaken(adapted(plain(teacher), LORA)))
    networks = {"teacher": run.cast.teacher, "fake": run.cast["fake"], "student": run.cast.student}
    with run.cast.only(role):
        sum(run.method.loss(role, run.batch(tiny_source(), 0)).values()).backward()
        for name, network in networks.items():
            trained = [key for key, p in nn.Module.named_parameters(network) if p.grad is not None]
            assert trained == (list(run.cast.parameters(role)) if name == role else [])


def test_a_role_in_training_drops_out_units_and_its_teacher_does_not() -> None:
    teacher = plain(lora_teacher(dropout=0.5))
    student = adapted(teacher.eval(), LORA)
    student.train()
    assert not torch.equal(ask(student), ask(student))
    assert torch.equal(ask(teacher), ask(teacher))


def test_its_state_is_the_adapter_and_a_missing_part_is_refused() -> None:
    student = shaken(adapted(plain(lora_teacher()), LORA))
    state = dict(student.state_dict())
    assert sorted(state) == [f"net.{layer}.lora_{m}.default.weight" for layer in ("inner", "outer") for m in "AB"]
    other = adapted(plain(lora_teacher()), LORA)
    other.load_state_dict(state)
    assert torch.equal(ask(other), ask(student))
    del state["net.inner.lora_A.default.weight"]
    with pytest.raises(RuntimeError, match=r"inner\.lora_A"):
        other.load_state_dict(state)


class WithConvolution(nn.Module):
    """A convolution with a stride, a linear layer, a grouped convolution that no adapter is for, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.conv = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(4, 4, 1, groups=2)
        self.norm = nn.GroupNorm(2, 4)
        self.proj_out = nn.Linear(4, 8)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor, s: Tensor | None, w: Tensor | None) -> Tensor:
        hidden = self.norm(self.grouped(self.conv(x)))
        return torch.tanh(self.proj_out(hidden.flatten(1))).reshape(x.shape)


@pytest.mark.parametrize("net", [TinyNet, WithConvolution])
def test_merged_weights_are_the_same_function(net: type[nn.Module]) -> None:
    teacher = Denoiser(net(), RF(), "flow")
    student = shaken(adapted(teacher, LORA))
    full = Denoiser(net(), RF(), "flow")
    full.load_state_dict(merged(teacher.state_dict(), student.state_dict(), LORA))
    torch.testing.assert_close(ask(full), ask(student))


def test_a_portable_adapter_says_the_same_where_alpha_is_the_rank() -> None:
    teacher = plain(lora_teacher())
    student = shaken(adapted(teacher, LORA))
    file = portable(student.state_dict(), LORA)
    assert sorted(file)[0] == "net.inner.lora_A.weight"
    named = {name.replace(".weight", ".default.weight"): value for name, value in file.items()}
    expected = merged(teacher.state_dict(), student.state_dict(), LORA)
    got = merged(teacher.state_dict(), named, LoraSpec(rank=LORA.rank))
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value)


def test_targets_are_ends_of_names_of_layers_that_can_be_adapted() -> None:
    network = Denoiser(WithConvolution(), RF(), "flow")
    assert layers(network, LoraSpec()) == ["conv", "proj_out"]
    assert layers(network, LoraSpec(targets=("proj_out",))) == ["proj_out"]
    for targets in (("out",), ("proj_out", "grouped"), ("norm",)):
        with pytest.raises(InvalidRequest, match=f"{targets[-1]}, which ends the name of no linear.* conv, proj_out"):
            layers(network, LoraSpec(targets=targets))


@pytest.mark.parametrize("name", METHODS)
def test_an_interrupted_lora_run_ends_with_the_adapter_of_an_uninterrupted_one(name: str, tmp_path: Path) -> None:
    whole = trainer(name, dropout=0.3).fit()
    for asked in (2, 1):
        left = trainer(name, tmp_path, dropout=0.3, hooks=Hooks(poll=wish_after(asked, "pause"))).fit()
        assert left.state == "paused"
        torch.randn(3)  # another process has other randomness
    resumed = trainer(name, tmp_path, dropout=0.3).fit()
    assert same(resumed.weights, whole.weights)
    assert not same(whole.weights, dict(adapted(plain(lora_teacher()), LORA).state_dict()))


def test_a_checkpoint_holds_adapters_averages_and_optimisers_and_no_backbone(tmp_path: Path) -> None:
    trainer("dmd", tmp_path).fit()
    found = checkpoint.load_latest(tmp_path / "latest")
    assert found is not None
    kept = [name for name in found.tensors if name != "rng"]
    assert {name.split("/")[0] for name in kept} == {"role", "optimiser", "average"}
    assert {name.split("/")[1] for name in kept if name.startswith("role/")} == {"fake", "student"}
    assert all(".lora_A." in name or ".lora_B." in name for name in kept)


def test_a_backbone_that_roles_share_is_not_spread_over_processes() -> None:
    teacher = lora_teacher()
    with pytest.raises(InvalidRequest, match="leave shard out"):
        StageRun(0, stage("kd"), teacher, adapted(plain(teacher), LORA), execution=Execution(Group(0, 2, shards=True)))


def test_averages_are_of_the_adapter() -> None:
    teacher = lora_teacher()
    run = StageRun(0, stage("kd"), teacher, adapted(plain(teacher), LORA), ema=(0.5,))
    assert run.averages[0].weights.keys() == run.cast.weights("student").keys()


def test_a_role_and_its_network_must_agree() -> None:
    teacher = tiny_teacher()
    with pytest.raises(InvalidRequest, match="roles student ask for LoRA"):
        Cast.build(teacher, tiny_student(), {"student": Role(init="student", train="lora")})
    with pytest.raises(InvalidRequest, match="says train=full"):
        Cast.build(teacher, adapted(plain(teacher), LORA), {"student": Role(init="student")})


# the oracle: Gaussian data, for which the right answer is a matrix ----------------------------------------------------

MEAN, STD = 0.8, 0.5
WIDTH = SHAPE[0] * SHAPE[1] * SHAPE[2]


class GaussianLayers(nn.Module):
    """An x0 prediction that one linear layer makes of x, and of what is known of N(MEAN, STD^2) at t.

    Its weight starts where it is the exact denoiser of that data in rectified flow:
    x0 = MEAN + a STD^2 / (a^2 STD^2 + t^2) (x - a MEAN) with a = 1 - t. As a one-step student it gives MEAN whatever
    the noise; the flow map's end, MEAN + STD x, is another weight, of full rank.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2 * WIDTH + 1, WIDTH, bias=False)
        with torch.no_grad():
            mean = torch.full((WIDTH, 1), MEAN)
            self.layer.weight.copy_(torch.cat([torch.eye(WIDTH), torch.zeros(WIDTH, WIDTH), mean], dim=1))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor, s: Tensor | None, w: Tensor | None) -> Tensor:
        flat, t = x.flatten(1), t.reshape(-1, 1)
        a = 1 - t
        gain = a * STD**2 / (a * a * STD**2 + t * t)
        prediction: Tensor = self.layer(torch.cat([gain * flat, flat, 1 - gain * a], dim=1))
        return prediction.reshape(x.shape)


def gaussian_student(rank: int, iterations: int = 150) -> Denoiser:
    """A one-step student that knowledge distillation gives an adapter of this rank."""
    teacher = Denoiser(GaussianLayers(), RF(), "x0")
    settings = {"train": "lora", "counts": [1], "pairs": 256, "batch": 64, "teacher_steps": 64, "lr": 3e-2}
    one = Stage("kd", iterations, settings)
    student = adapted(teacher, LoraSpec(rank=rank))
    source = TensorSource(torch.zeros(8), SHAPE)
    Trainer([one], teacher, student, source, TrainConfig(ema=(0.9,))).fit()
    return student


def one_step_error(student: Denoiser) -> float:
    """Root mean square from the flow map's true end."""
    z = torch.randn(256, *SHAPE, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        made = student(z, torch.ones(256), torch.zeros(256))[0]
    return float((made - (MEAN + STD * z)).square().mean().sqrt())


def test_an_adapter_of_sufficient_rank_learns_the_closed_form_and_a_smaller_one_cannot() -> None:
    untrained = one_step_error(Denoiser(GaussianLayers(), RF(), "x0"))
    assert untrained == pytest.approx(STD, rel=0.1)
    assert one_step_error(gaussian_student(WIDTH)) < 0.05 * STD
    # Of rank r at best r of WIDTH equal directions are right.
    assert one_step_error(gaussian_student(2)) > 0.95 * untrained * (1 - 2 / WIDTH) ** 0.5
