"""What a launcher says of a group whose first process to end is not the one that knows why."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from distill_jobs import launch
from distill_jobs.exit_codes import FAILURE, REFUSED


def ends(monkeypatch: pytest.MonkeyPatch, folder: Path, happens: Callable[[], object], codes: list[int]) -> int:
    """The launcher's exit code where `happens` and then processes end with these codes, as torchrun tells it."""

    def group(*_: Any) -> Any:
        def run(*_: str) -> None:
            happens()
            failures = {
                rank: ProcessFailure(rank, 1000 + rank, code, "no such file") for rank, code in enumerate(codes)
            }
            raise ChildFailedError("trainer", failures)

        return run

    monkeypatch.setattr(launch, "elastic_launch", group)
    return launch.main([str(folder), "--processes=2", "--phase=train", "--fence=1"])


def test_what_the_leader_wrote_before_it_left_is_a_refusal_whoever_was_seen_to_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    refusal = tmp_path / FAILURE
    assert ends(monkeypatch, tmp_path, lambda: refusal.write_text("{}"), [1]) == REFUSED


def test_a_refusal_of_an_earlier_start_says_nothing_of_this_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    refusal = tmp_path / FAILURE
    refusal.write_text("{}")
    os.utime(refusal, (1e9, 1e9))
    assert ends(monkeypatch, tmp_path, lambda: None, [1]) == 1
    assert ends(monkeypatch, tmp_path, lambda: None, [-9]) == 137
    assert ends(monkeypatch, tmp_path, lambda: None, [1, REFUSED]) == REFUSED
