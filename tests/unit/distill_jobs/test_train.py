"""What a trainer's process leaves when it gives up."""

import errno
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from distill_jobs import train
from distill_jobs.exit_codes import FAILURE, REFUSED
from engines import priority
from engines.errors import Diverged

SPEC: dict[str, Any] = {
    "teacher": {"id": "shapes"},
    "student": {"name": "small", "steps": [1]},
    "method": {"name": "kd"},
    "train": {"iterations": 1},
}


def ends(monkeypatch: pytest.MonkeyPatch, folder: Path, error: Exception) -> int:
    """The exit code of a life in which `error` happens while the trained weights are written."""

    def happens(*_: Any) -> None:
        (folder / "trained").mkdir()
        (folder / "trained" / "weights.partial").write_bytes(b"half")
        raise error

    (folder / "spec.json").write_text(json.dumps({"spec": SPEC}))
    monkeypatch.setattr(train, "TrainerRun", happens)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # this process is not a trainer's
    monkeypatch.setattr(priority, "lower", lambda _: None)
    return train.main([str(folder), "--phase=train", "--fence=1", f"--threads={torch.get_num_threads()}"])


@pytest.mark.parametrize(
    ("error", "code"), [(OSError(errno.ENOSPC, "of a library"), "storage_full"), (Diverged("no number"), "diverged")]
)
def test_one_that_has_no_space_or_says_no_is_refused_and_leaves_no_half(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, code: str
) -> None:
    assert ends(monkeypatch, tmp_path, error) == REFUSED
    assert json.loads((tmp_path / FAILURE).read_bytes())["code"] == code
    assert not (tmp_path / "trained" / "weights.partial").exists()


def test_any_other_error_is_a_death(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="of ours"):
        ends(monkeypatch, tmp_path, RuntimeError("of ours"))
    assert not (tmp_path / FAILURE).exists()
