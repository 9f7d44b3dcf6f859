"""Students on a grid: what their passes see, their gradients, what is kept, and what training on it is worth."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from torch import Tensor, nn

from distill_jobs.batches import make_batch
from distill_jobs.methods.base import Workspace
from distill_jobs.pairs import TeacherPath
from distill_jobs.progress import Hooks
from distill_jobs.quantised import on_grid, quantise, straight_through
from distill_jobs.small_evaluation import baked
from distill_jobs.stage import Stage, StageRun
from distill_jobs.teachers import diffusers
from distill_jobs.teachers.diffusers import Teacher
from distill_jobs.trainer import TrainConfig, Trainer
from engines import artefact
from engines.denoiser import Denoiser
from engines.errors import InvalidRequest
from engines.grid import SCALES, Bits, Grid, rounded, scales_of
from engines.loader import load_student
from engines.manifest import Schedule
from engines.parts import load_weights
from engines.process import RF
from engines.student import sample
from tests import tiny_sd
from tests.unit.distill_jobs.test_trainer import same, wish_after
from tests.unit.distill_jobs.tiny import SHAPE, STAGES, blocks_student, tiny_source, tiny_teacher


def asked(denoiser: Denoiser) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, 2, 2, 2, generator=generator)
    x0: Tensor = denoiser(x, torch.linspace(0.1, 0.9, 6), torch.linspace(-1, 1, 6))[0]
    return x0


# passes and gradients ------------------------------------------------------------------------------------------------


def test_a_pass_sees_the_grid_to_the_last_bit_and_its_gradient_is_that_of_the_weight_on_it() -> None:
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), requires_grad=True)
    made = straight_through(weight, 4)
    assert torch.equal(made, rounded(weight, scales_of(weight, 4)))
    (made.square() * torch.arange(7.0)).sum().backward()
    torch.testing.assert_close(weight.grad, 2 * made.detach() * torch.arange(7.0), rtol=0, atol=0)


@pytest.mark.parametrize("bits", [8, 4])
def test_layers_of_blocks_round_and_the_first_and_last_do_not(bits: int) -> None:
    plain, quantised = blocks_student(), quantise(blocks_student(), bits)
    assert list(plain.state_dict()) == list(quantised.state_dict())
    made = on_grid(quantised, quantised.state_dict())
    assert sorted(made.scales) == ["net.blocks.0.0.weight", "net.blocks.1.0.weight"]
    Grid(bits, made.scales).check(made.weights)  # type: ignore[arg-type]
    plain.load_state_dict(made.weights)
    assert torch.equal(asked(plain), asked(quantised))
    assert not torch.equal(asked(blocks_student()), asked(quantised))


@pytest.mark.parametrize(("bits", "beside"), [(4, 0.0), (8, 0.22)])
def test_a_pass_in_bf16_reads_four_bits_exactly_and_eight_within_half_a_step(bits: Bits, beside: float) -> None:
    block = nn.ModuleList([nn.Linear(256, 256, bias=False)])
    nn.init.normal_(block[0].weight, std=0.05, generator=torch.Generator().manual_seed(0))
    block.requires_grad_(False)
    layer = quantise(Denoiser(nn.ModuleDict({"blocks": block}), RF(), "flow"), bits).net.blocks[0]  # type: ignore
    scales = scales_of(layer.weight, bits)
    grid = rounded(layer.weight, scales)
    assert torch.equal(layer(torch.eye(256)).T, grid)
    with torch.autocast("cpu", torch.bfloat16):
        read = layer(torch.eye(256)).T.float()
    assert float((read != grid).float().mean()) == pytest.approx(beside, abs=0.02)
    assert float((read - grid).abs().sub(grid.abs() / 256).max()) <= 0
    assert torch.equal(rounded(read, scales), grid)


def test_gradients_are_those_of_the_rounded_network_in_every_layer() -> None:
    plain, quantised = blocks_student(), quantise(blocks_student(), 4)
    plain.load_state_dict(on_grid(quantised, quantised.state_dict()).weights)
    for network in (plain, quantised):
        asked(network).square().sum().backward()
    for (name, one), (_, other) in zip(plain.named_parameters(), quantised.named_parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=0, msg=name)


def test_a_copy_rounds_its_own_weights() -> None:
    copied = copy.deepcopy(quantise(blocks_student(), 4))
    with torch.no_grad():
        copied.net.blocks[0][0].weight.mul_(1.3)  # type: ignore[union-attr, index]
    made = on_grid(copied, copied.state_dict())
    plain = blocks_student()
    plain.load_state_dict(made.weights)
    assert torch.equal(asked(plain), asked(copied))


def test_a_network_without_blocks_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="no repeated blocks"):
        quantise(Denoiser(nn.Linear(2, 2), RF(), "flow"), 8)  # type: ignore[arg-type]


# training ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kd", "dmd", "lcm", "lsd"])
def test_an_interrupted_run_on_a_grid_ends_as_an_uninterrupted_one(name: str, tmp_path: Path) -> None:
    def run(folder: Path | None = None, hooks: Hooks | None = None) -> Trainer:
        config = TrainConfig(seed=3, checkpoint_every=1, checkpoint_every_s=1e9)
        stages = [Stage(name, 6, STAGES[name])]
        began = quantise(blocks_student(), 4)
        return Trainer(stages, tiny_teacher(), began, tiny_source(), config, folder=folder, hooks=hooks or Hooks())

    whole = run().fit()
    assert run(tmp_path, Hooks(poll=wish_after(4, "pause"))).fit().state == "paused"
    resumed = run(tmp_path).fit()
    assert same(resumed.weights, whole.weights)
    assert not same(whole.weights, dict(blocks_student().state_dict()))


def test_averages_and_checkpoints_hold_the_weights_as_they_are() -> None:
    run = StageRun(0, Stage("lcm", 3, STAGES["lcm"]), tiny_teacher(), quantise(blocks_student(), 4), ema=(0.9,))
    assert set(run.averages[0].weights) == set(blocks_student().state_dict())
    assert {name for name in run.tensors() if name.startswith("role/student/")} == {
        f"role/student/{name}" for name in blocks_student().state_dict()
    }


@torch.no_grad()
def endpoint_error(weights: dict[str, Tensor]) -> float:
    """Root mean square of a plain network's endpoints beside those of the teacher's paths, on unseen noise."""
    plain, batch = blocks_student(), make_batch(tiny_source().rows(99, 256), SHAPE, 12345)
    plain.load_state_dict(weights)
    path = TeacherPath((1.0,), 16, "euler").states(tiny_teacher(), batch.noise, batch.cond)
    first = torch.ones(len(batch))
    guess = plain.jump(path[:, 0], first, torch.zeros_like(first), batch.cond)
    return float((guess - path[:, -1]).square().mean().sqrt())


def learnt(began: Denoiser) -> dict[str, Tensor]:
    """The average of a student after 400 updates of regression, as it is."""
    told = {"counts": (1,), "rungs": (1.0,), "pairs": 1024, "batch": 64, "lr": 1e-2}
    run = StageRun(0, Stage("kd", 400, told), tiny_teacher(), began, ema=(0.95,))
    assert run.method.prepare(tiny_source(), Workspace())
    while not run.done:
        run.iterate(tiny_source())
    return run.averages[0].weights


def test_training_on_four_bits_loses_less_than_half_of_what_rounding_afterwards_loses() -> None:
    def on_four_bits(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return on_grid(quantise(blocks_student(), 4), weights).weights

    plain, quantised = learnt(blocks_student()), learnt(quantise(blocks_student(), 4))
    exact, after = endpoint_error(plain), endpoint_error(on_four_bits(plain))
    during = endpoint_error(on_four_bits(quantised))
    assert exact < during < exact + (after - exact) / 2


# what is served ------------------------------------------------------------------------------------------------------

CAPTIONS, SEEDS = ["a red circle", "two shapes on white", "a blue square"], [1, 2, 3]
TWO_STEPS = {2: Schedule(times=(1.0, 0.4, 0.0), eta=1.0)}


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    tiny = tiny_sd.teacher()
    return diffusers.load(tiny.registry, tiny.version)


@pytest.mark.parametrize("bits", [8, 4])
def test_an_engine_makes_the_pictures_of_the_network_in_training_and_its_blob_is_on_the_grid(
    teacher: Teacher, bits: Bits
) -> None:
    registry = tiny_sd.teacher().registry
    beginner = quantise(teacher.beginner(frozenset()), bits)
    torch.manual_seed(3)
    with torch.no_grad():
        for value in beginner.parameters():
            value.add_(0.01 * torch.randn_like(value)).copy_(value.half())  # what is not on the grid is stored so
    made = on_grid(beginner, beginner.state_dict())
    scales = diffusers.blob_weights(made.scales)
    version = artefact.make_student(
        registry,
        teacher.manifest.version,
        f"grid-{bits}",
        denoiser_weights=diffusers.blob_weights(made.weights),
        grid=Grid(bits, scales),
        schedules=TWO_STEPS,
        guidance=baked(2.0),
    )
    manifest = registry.student(version)
    assert (manifest.weight_bits, manifest.dtype) == (bits, "fp16")
    served = sample(load_student(registry, manifest), CAPTIONS, SEEDS, 2)
    trained = sample(teacher.student(beginner, TWO_STEPS, baked(2.0)), CAPTIONS, SEEDS, 2)
    assert (served.int() - trained.int()).abs().max() <= 1

    part = manifest.components["denoiser"]
    weights, kept = load_weights(registry, part), load(registry.read_blob(part.files[SCALES]))
    assert kept.keys() == scales.keys()
    Grid(bits, kept).check(weights)
    assert {name for name in weights if name.endswith(".weight") and weights[name].dim() > 1} - set(kept) == {
        "conv_in.weight", "conv_out.weight", "time_embedding.linear_1.weight", "time_embedding.linear_2.weight",
    }  # fmt: skip


def test_a_student_of_a_quantised_one_says_what_its_own_weights_are(teacher: Teacher, tmp_path: Path) -> None:
    registry = tiny_sd.teacher().registry
    beginner = quantise(teacher.beginner(frozenset()), 8)
    made = on_grid(beginner, beginner.state_dict())
    weights = diffusers.blob_weights(made.weights)
    grid = Grid(8, diffusers.blob_weights(made.scales))
    base = artefact.make_student(
        registry, teacher.manifest.version, "grid", denoiser_weights=weights, grid=grid, schedules=TWO_STEPS
    )
    later = artefact.make_student(registry, base, "grid-later", schedules=TWO_STEPS)
    plain = artefact.make_student(registry, base, "plain", denoiser_weights=weights, schedules=TWO_STEPS)
    assert [registry.student(v).weight_bits for v in (base, later, plain)] == [8, 8, None]
    assert SCALES not in registry.student(plain).components["denoiser"].files
    artefact.export_diffusers(registry, base, tmp_path)
    assert sorted(path.name for path in (tmp_path / "unet").iterdir()) == [
        "config.json", "diffusion_pytorch_model.safetensors",
    ]  # fmt: skip


def test_weights_that_half_precision_would_move_off_their_grid_are_not_published(teacher: Teacher) -> None:
    weights = diffusers.blob_weights(teacher.beginner(frozenset()).state_dict())
    name = "down_blocks.0.resnets.0.conv1.weight"
    with pytest.raises(InvalidRequest, match="not on its grid"):
        artefact.make_student(
            tiny_sd.teacher().registry,
            teacher.manifest.version,
            "beside",
            denoiser_weights=weights,
            grid=Grid(8, {name: scales_of(weights[name], 8)}),
            schedules=TWO_STEPS,
        )
