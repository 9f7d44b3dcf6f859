"""Several processes, and one in several passes, train what one process trains at once."""

import copy
import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn

from distill_jobs import checkpoint
from distill_jobs.batches import Batch, Rows, TensorSource, make_batch, repeated
from distill_jobs.group import Group
from distill_jobs.methods.base import Workspace
from distill_jobs.stage import Execution, Stage, StageRun
from distill_jobs.times import Uniform
from engines.denoiser import Denoiser
from engines.errors import InvalidRequest
from engines.process import RF
from tests.unit.distill_jobs.tiny import SHAPE, STAGES, tiny_source, tiny_student, tiny_teacher
from tests.unit.distill_jobs.together import CASES, ENDS_WITHIN_S, chain, start, trained, tried

pytestmark = pytest.mark.timeout(ENDS_WITHIN_S + 60)

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left that trained every case, with whole and with spread networks."""
    folder = tmp_path_factory.mktemp("pair")
    start(2, folder)
    return folder


def test_a_total_is_the_sum_over_the_processes(pair: Path) -> None:
    assert [json.loads((pair / f"total.{rank}.json").read_text()) for rank in range(2)] == [3, 3]
    assert Group().total(7) == 7


def test_a_pair_is_kept_in_memory_by_every_process(pair: Path, tmp_path: Path) -> None:
    alone = tried(tmp_path / "trial", Group()).pair_bytes
    assert [json.loads((pair / f"trial.{rank}.json").read_text()) for rank in range(2)] == [2 * alone] * 2 != [0, 0]


def near(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")


class Sized(nn.Module):
    """A UNet as a denoiser's network."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor, cond: Tensor, s: Tensor | None, w: Tensor | None) -> Tensor:
        out: Tensor = self.unet(x, t, cond, return_dict=False)[0]
        return out


# shares of a batch ---------------------------------------------------------------------------------------------------


def test_shares_have_between_them_every_row_with_the_draws_it_would_have_had() -> None:
    def drawn(batch: Batch) -> list[Tensor]:
        wide = repeated(batch, 2)
        return [batch.cond, batch.noise, batch.randn(), batch.draw(Uniform()), batch.picks(9), *wide.noise.chunk(2)]

    batch = make_batch(Rows(torch.arange(12.0), x=torch.randn(12, *SHAPE)), SHAPE, 5)
    batch.randn()  # shares may be made at any point of the batch's randomness
    parts = [drawn(share) for whole in batch.shares(2) for share in whole.shares(3)]
    rows = torch.cat([part[0] for part in parts]).long()
    assert sorted(rows.tolist()) == list(range(12))
    for mine, all_of_it in zip(zip(*parts, strict=True), drawn(batch), strict=True):
        assert torch.equal(torch.cat(mine), all_of_it[rows])


def test_a_micro_batch_is_the_largest_equal_part_that_is_no_larger() -> None:
    batch = make_batch(Rows(torch.zeros(30)), SHAPE, 0)
    assert [len(part) for part in Execution(micro_batch=8).shares(batch)] == [6] * 5
    assert [len(part) for part in Execution(Group(1, 2), micro_batch=8).shares(batch)] == [5] * 3
    assert [part.cond.tolist() for part in Execution().shares(batch)] == [[0.0] * 30]


def test_a_batch_that_processes_cannot_share_equally_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="30 rows cannot be shared by 4 processes"):
        Execution(Group(0, 4)).shares(make_batch(Rows(torch.zeros(30)), SHAPE, 0))


@pytest.mark.parametrize("name", STAGES)
def test_the_gradient_of_a_batch_is_that_of_its_parts_together(name: str) -> None:
    found = []
    for micro_batch in (None, 4):
        run = StageRun(
            0,
            Stage(name, 4, STAGES[name]),
            tiny_teacher(),
            tiny_student(),
            execution=Execution(micro_batch=micro_batch),
        )
        run.method.prepare(tiny_source(), Workspace())
        gradients = {}
        for role in run.optimisers:
            with run.cast.only(role) as network:
                terms = run._backward(role, run.batch(tiny_source(), 0))
                gradients |= {f"{role}.{key}": p.grad for key, p in network.named_parameters()} | {
                    role: sum(terms.values())
                }
        found.append(gradients)
    near(*found)


def test_activations_that_are_computed_anew_give_the_same_gradient(tmp_path: Path) -> None:
    net = UNet2DConditionModel(
        sample_size=4, in_channels=2, out_channels=2, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        cross_attention_dim=4, attention_head_dim=4,
    )  # fmt: skip

    def denoiser() -> Denoiser:
        return Denoiser(Sized(copy.deepcopy(net)), RF(), "flow")

    source = TensorSource(torch.randn(16, 3, 4), (2, 4, 4), x=torch.randn(16, 2, 4, 4))
    found, forwards = [], []
    for checkpointing in (False, True):
        execution = Execution(checkpointing=checkpointing)
        run = StageRun(0, Stage("cd", 1, STAGES["cd"]), denoiser(), denoiser(), execution=execution)
        block = run.cast.student.net.unet.down_blocks[0].resnets[0]
        count = [0]
        block.register_forward_pre_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        with run.cast.only("student") as network:
            run._backward("student", run.batch(source, 0))
        found.append({name: p.grad for name, p in network.named_parameters()})
        forwards.append(count[0])
    near(*found)
    assert forwards[1] == forwards[0] + 1  # the block's forward again in the backward pass


def test_a_network_that_cannot_compute_activations_anew_says_so() -> None:
    with pytest.raises(InvalidRequest, match="has no gradient checkpointing"):
        StageRun(0, Stage("kd", 1), tiny_teacher(), tiny_student(), execution=Execution(checkpointing=True))


# two processes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("networks", ["whole", "sharded"])
@pytest.mark.parametrize("name", CASES)
def test_two_processes_see_the_losses_and_end_with_the_weights_of_one(name: str, networks: str, pair: Path) -> None:
    seen, tensors = trained(name, Execution())
    for rank in (0, 1):
        told = json.loads((pair / networks / f"{name}.{rank}.json").read_text())
        assert len(told) == len(seen)
        for theirs, ours in zip(told, seen, strict=True):
            assert theirs == pytest.approx(ours, abs=TOLERANCE)
    near(load_file(pair / networks / f"{name}.safetensors"), tensors)


@pytest.mark.parametrize("networks", ["whole", "sharded"])
def test_the_leader_alone_speaks_and_the_run_ends_as_that_of_one(networks: str, pair: Path, tmp_path: Path) -> None:
    alone = chain(tmp_path, Group())
    assert json.loads((pair / networks / "chain.0.json").read_text()) == [alone.result.state, alone.events]
    assert json.loads((pair / networks / "chain.1.json").read_text()) == ["finished", []]
    near(load_file(pair / networks / "chain.safetensors"), alone.result.weights)


@pytest.mark.parametrize("networks", ["whole", "sharded"])
def test_one_process_goes_on_where_two_were_paused(networks: str, pair: Path, tmp_path: Path) -> None:
    found = checkpoint.load_latest(pair / networks / "paused" / "latest")
    assert found is not None
    assert found.meta["stage"] == 1
    resumed, whole = (chain(folder, Group()).result for folder in (pair / networks / "paused", tmp_path))
    near(resumed.weights, whole.weights)
