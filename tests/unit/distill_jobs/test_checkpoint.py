"""Checkpoints are whole or not there, and have one writer."""

import json
from pathlib import Path

import pytest
import torch

from distill_jobs import checkpoint
from distill_jobs.checkpoint import Checkpoint
from engines.errors import LeaseLost


def at(iteration: int, stage: int = 0) -> Checkpoint:
    return Checkpoint({"x": torch.full((3,), float(iteration))}, {"stage": stage, "iteration": iteration})


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    saved = {"a/b": torch.randn(2, 3), "step": torch.tensor(7.0), "rng": torch.get_rng_state()}
    checkpoint.write(tmp_path, Checkpoint(saved, {"stage": 1, "iteration": 5, "curriculum": {"phase": 2.0}}))
    found = checkpoint.load_latest(tmp_path)
    assert found is not None
    assert found.meta["curriculum"] == {"phase": 2.0}
    assert all(torch.equal(found.tensors[name], value) for name, value in saved.items())


def test_the_newest_by_stage_and_iteration_is_found_and_old_ones_are_removed(tmp_path: Path) -> None:
    for point in (at(100), at(200), at(10, stage=1)):
        checkpoint.write(tmp_path, point, keep=2)
    found = checkpoint.load_latest(tmp_path)
    assert found is not None
    assert (found.meta["stage"], found.meta["iteration"]) == (1, 10)
    assert len(list(tmp_path.iterdir())) == 2


def test_an_empty_folder_has_none(tmp_path: Path) -> None:
    assert checkpoint.load_latest(tmp_path / "nothing") is None


@pytest.mark.parametrize("damage", ["flip", "cut", "no meta", "unreadable meta"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, damage: str) -> None:
    checkpoint.write(tmp_path, at(1))
    newest = checkpoint.write(tmp_path, at(2))
    tensors = newest / "tensors.safetensors"
    if damage == "flip":
        data = bytearray(tensors.read_bytes())
        data[-1] ^= 1
        tensors.write_bytes(data)
    elif damage == "cut":
        tensors.write_bytes(tensors.read_bytes()[:-4])
    elif damage == "no meta":
        (newest / "meta.json").unlink()
    else:
        (newest / "meta.json").write_text("{")
    found = checkpoint.load_latest(tmp_path)
    assert found is not None
    assert found.meta["iteration"] == 1


def test_a_death_while_writing_leaves_the_one_before(tmp_path: Path) -> None:
    checkpoint.write(tmp_path, at(1))
    half = tmp_path / ".00-00000002-00000000.123"
    half.mkdir()
    (half / "tensors.safetensors").write_bytes(b"half")
    found = checkpoint.load_latest(tmp_path)
    assert found is not None
    assert found.meta["iteration"] == 1


def test_a_writer_with_a_lower_fence_is_refused_once_another_has_claimed(tmp_path: Path) -> None:
    checkpoint.claim(tmp_path, 3)
    checkpoint.write(tmp_path, at(1), fence=3)
    checkpoint.claim(tmp_path, 4)
    with pytest.raises(LeaseLost, match="belongs to fence 4"):
        checkpoint.write(tmp_path, at(2), fence=3)
    with pytest.raises(LeaseLost):
        checkpoint.claim(tmp_path, 3)
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_dir()] == ["00-00000001-00000003"]


def test_a_higher_fence_on_a_checkpoint_alone_refuses_as_well(tmp_path: Path) -> None:
    checkpoint.write(tmp_path, at(1), fence=9)
    with pytest.raises(LeaseLost):
        checkpoint.write(tmp_path, at(2), fence=8)


def test_the_meta_says_who_wrote_it(tmp_path: Path) -> None:
    path = checkpoint.write(tmp_path, at(1), fence=7)
    assert json.loads((path / "meta.json").read_text())["fence"] == 7
