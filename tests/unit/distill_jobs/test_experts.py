"""Students of several experts: whose rows are whose, what an update changes, and whom an engine asks."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill_jobs import times
from distill_jobs.experts import Experts, networks, routed, weights_of
from distill_jobs.progress import Hooks
from distill_jobs.roles import Cast
from distill_jobs.small_evaluation import baked
from distill_jobs.stage import Stage, StageRun
from distill_jobs.teachers import diffusers
from distill_jobs.teachers.diffusers import Teacher
from distill_jobs.trainer import TrainConfig, Trainer
from engines import artefact
from engines.backends.base import Choice, Profile, tolerance
from engines.denoiser import Denoiser, Weighted
from engines.errors import NotBuilt
from engines.loader import Loader
from engines.manifest import Schedule
from engines.noise import noise
from engines.process import RF, Process
from engines.student import sample
from tests import tiny_sd
from tests.unit.distill_jobs.oracle import every_process
from tests.unit.distill_jobs.test_trainer import same, wish_after
from tests.unit.distill_jobs.tiny import SHAPE, STAGES, TinyNet, tiny_source, tiny_teacher

LEVELS = (0.7, 0.3)


class Says(nn.Module):
    """The same x0 for all that it is asked."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor, t: Tensor, cond: Any, s: Any, w: Any) -> Tensor:
        return torch.full_like(x, self.value)


def named(process: Process) -> Experts:
    """Three experts, each of which says its number."""
    return Experts([Denoiser(Says(k), process, "x0") for k in (0.0, 1.0, 2.0)], LEVELS)


def tiny_experts(dropout: float = 0.0) -> Experts:
    return Experts([Denoiser(TinyNet(seed, dropout), RF(), "flow", {"s"}) for seed in (1, 2)], (0.5,))


# whose rows are whose ------------------------------------------------------------------------------------------------


@every_process
def test_a_row_is_asked_of_the_expert_of_its_time_and_a_bound_belongs_to_the_lower_one(process: Process) -> None:
    levels = (0.9, 0.71, 0.7, 0.31, 0.3, 0.1)
    grid = times.grid(process, levels)
    t = torch.tensor(grid[:-1], dtype=torch.float32)
    x0, _ = named(process)(torch.zeros(6, *SHAPE), t)
    assert x0[:, 0, 0, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert named(process).nets(grid) == ("denoiser",) * 2 + ("denoiser_2",) * 2 + ("denoiser_3",) * 2


def test_rows_of_a_mixed_batch_have_what_they_have_alone_conditions_and_second_times_too() -> None:
    student, generator = tiny_experts(), torch.Generator().manual_seed(1)
    x = torch.randn(6, *SHAPE, generator=generator)
    t, s = torch.tensor([0.9, 0.2, 0.5, 0.7, 0.1, 0.6]), torch.linspace(0, 0.1, 6)
    cond = Weighted(torch.linspace(-1, 1, 6), torch.ones(6))
    together = student(x, t, cond, s)
    for i in range(6):
        row = slice(i, i + 1)
        own = networks(student)["denoiser" if t[i] > 0.5 else "denoiser_2"]
        alone = own(x[row], t[row], cond.cond[row], s[row])
        for part, whole in zip(alone, together, strict=True):
            torch.testing.assert_close(whole[row], part)


def test_experts_and_levels_must_fit() -> None:
    with pytest.raises(ValueError, match="2 experts need 1 levels"):
        Experts(list(networks(tiny_experts()).values()), LEVELS)


# training ------------------------------------------------------------------------------------------------------------


def test_gradients_are_those_of_the_asked_expert_alone() -> None:
    student = tiny_experts()
    cast = Cast(tiny_teacher(), student=student)
    for level, (asked, idle) in {0.8: ("denoiser", "denoiser_2"), 0.5: ("denoiser_2", "denoiser")}.items():
        with cast.only("student"):
            student.zero_grad(set_to_none=True)
            x0, _ = student(torch.ones(4, *SHAPE), torch.full((4,), level), torch.zeros(4))
            x0.square().sum().backward()
        assert all(p.grad is not None for p in networks(student)[asked].parameters())
        assert all(p.grad is None for p in networks(student)[idle].parameters())


def test_every_method_of_a_job_says_which_network_each_step_asks() -> None:
    run = StageRun(0, Stage("dmd", 1, {"counts": [1, 4]}), tiny_teacher(), tiny_experts())
    assert run.schedules[1].nets == ("denoiser",)
    assert run.schedules[4].times[:-1] == (1.0, 0.8, 0.55, 0.3)
    assert run.schedules[4].nets == ("denoiser",) * 3 + ("denoiser_2",)
    plain = {2: Schedule(times=(1.0, 0.5, 0.0))}
    assert routed(networks(tiny_experts())["denoiser"], plain) == plain


@pytest.mark.parametrize("name", ["kd", "dmd", "lsd"])
def test_an_interrupted_run_of_experts_ends_as_an_uninterrupted_one(name: str, tmp_path: Path) -> None:
    def run(folder: Path | None = None, hooks: Hooks | None = None) -> Trainer:
        torch.manual_seed(1)  # of dropout
        config = TrainConfig(seed=3, checkpoint_every=1, checkpoint_every_s=1e9)
        stages, began = [Stage(name, 8, STAGES[name])], tiny_experts(dropout=0.1)
        return Trainer(stages, tiny_teacher(), began, tiny_source(), config, folder=folder, hooks=hooks or Hooks())

    whole = run().fit()
    assert run(tmp_path, Hooks(poll=wish_after(5, "pause"))).fit().state == "paused"
    resumed = run(tmp_path).fit()
    assert same(resumed.weights, whole.weights)
    before = weights_of(tiny_experts(), tiny_experts().state_dict())
    for expert, weights in weights_of(tiny_experts(), whole.weights).items():
        assert weights.keys() == before[expert].keys()
        assert not same(weights, before[expert])


# serving -------------------------------------------------------------------------------------------------------------

CAPTIONS, SEEDS = ["a red circle", "two shapes on white", "a blue square"], [1, 2, 3]
SCHEDULES = {
    2: Schedule(times=(1.0, 0.5, 0.0), eta=1.0, nets=("denoiser", "denoiser_2")),
    3: Schedule(times=(1.0, 0.75, 0.5, 0.0), nets=("denoiser", "denoiser", "denoiser_2")),
}


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    tiny = tiny_sd.teacher()
    return diffusers.load(tiny.registry, tiny.version)


@pytest.fixture(scope="module")
def trained(teacher: Teacher) -> Experts:
    """Two networks that differ from the teacher's and from each other, in numbers that half precision has."""
    student = Experts([teacher.beginner(frozenset()) for _ in range(2)], (0.5,))
    torch.manual_seed(3)
    with torch.no_grad():
        for value in student.parameters():
            value.add_(0.02 * torch.randn_like(value)).copy_(value.half())
    return student


@pytest.fixture(scope="module")
def version(trained: Experts) -> str:
    first, second = (diffusers.blob_weights(part) for part in weights_of(trained, trained.state_dict()).values())
    tiny = tiny_sd.teacher()
    return artefact.make_student(
        tiny.registry,
        tiny.version,
        "experts",
        denoiser_weights=first,
        experts={"denoiser_2": second},
        schedules=SCHEDULES,
        guidance=baked(2.0),
    )


def test_every_expert_is_a_component_of_its_own_on_one_graph(version: str) -> None:
    registry, loader = tiny_sd.teacher().registry, loader_of(Choice("eager", "fp32"))
    manifest = registry.student(version)
    assert (manifest.experts, manifest.kind) == (("denoiser_2",), "full")
    assert {part.weights for part in manifest.components.values()} <= manifest.blobs
    graphs = loader.graphs(manifest)
    assert (
        graphs["denoiser"].key == graphs["denoiser_2"].key == loader.graphs(tiny_sd.teacher().manifest)["denoiser"].key
    )
    assert manifest.components["denoiser"].weights != manifest.components["denoiser_2"].weights
    assert [step.net for step in manifest.plan(3)] == ["denoiser", "denoiser", "denoiser_2"]


def loader_of(choice: Choice) -> Loader:
    tiny = tiny_sd.teacher()
    return Loader(tiny.registry, choice, Profile((1, 4), choice.precision, threads=1), tiny.graphs)


@pytest.mark.parametrize("choice", [Choice("eager", "fp32"), Choice("openvino", "fp32")], ids=lambda c: c.backend)
@pytest.mark.parametrize("steps", SCHEDULES)
def test_every_engine_makes_the_pictures_of_a_plain_loop_over_the_networks(
    choice: Choice, steps: int, version: str, trained: Experts, teacher: Teacher
) -> None:
    high, low = networks(trained).values()
    shape = teacher.shape
    with torch.no_grad():
        cond = teacher.encode(CAPTIONS)
        x = torch.stack([noise(seed, 0, shape) for seed in SEEDS])
        for i, (t, s) in enumerate(pairwise(SCHEDULES[steps].times)):
            network, time = (high if t > 0.5 else low), torch.full((3,), t)
            x0, eps = network(x, time, cond)
            fresh = torch.stack([noise(seed, i + 1, shape) for seed in SEEDS])
            x = (1 - s) * x0 + s * (fresh if SCHEDULES[steps].eta else eps)
        expected = torch.from_numpy(teacher.pictures(x)).round().to(torch.uint8)

    loader = loader_of(choice)
    loaded = loader.load(tiny_sd.teacher().registry.student(version))
    made = sample(loaded, CAPTIONS, SEEDS, steps)
    loader.release(loaded)
    assert tolerance(choice.backend, choice.precision).fault(made, expected) is None
    in_training = sample(teacher.student(trained, SCHEDULES, baked(2.0)), CAPTIONS, SEEDS, steps)
    assert (in_training.int() - expected.int()).abs().max() <= 1


def test_a_student_of_the_other_order_makes_other_pictures(version: str, trained: Experts, teacher: Teacher) -> None:
    turned = Experts(list(networks(trained).values())[::-1], trained.levels)
    one, two = (sample(teacher.student(who, SCHEDULES, baked(2.0)), CAPTIONS, SEEDS, 2) for who in (trained, turned))
    assert (one.int() - two.int()).abs().max() > 10


def test_new_weights_leave_no_expert_of_the_base_behind(version: str, trained: Experts) -> None:
    registry = tiny_sd.teacher().registry
    weights = diffusers.blob_weights(weights_of(trained, trained.state_dict())["denoiser_2"])
    made = artefact.make_student(
        registry, version, "single", denoiser_weights=weights, schedules=[Schedule(times=(1.0, 0.0))]
    )
    assert registry.student(made).experts == ()


def test_an_expert_that_no_schedule_asks_is_refused(version: str) -> None:
    with pytest.raises(ValueError, match=r"no schedule asks \['denoiser_2'\]"):
        artefact.make_student(tiny_sd.teacher().registry, version, "idle", schedules=[Schedule(times=(1.0, 0.0))])


def test_it_is_no_pipeline_of_one_network_and_no_teacher(version: str, tmp_path: Path) -> None:
    registry = tiny_sd.teacher().registry
    with pytest.raises(NotBuilt, match=r"further denoisers \(denoiser_2\)"):
        artefact.export_diffusers(registry, version, tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(NotBuilt, match="a teacher has one"):
        diffusers.load(registry, version)
