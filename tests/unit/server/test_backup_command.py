"""`fewstep backup` and `fewstep restore` where they refuse: nothing is written then."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from engines.errors import Conflict, FewstepError, InvalidRequest, NotFound
from server.cli import app


def fewstep(*command: str) -> None:
    done = CliRunner().invoke(app, list(command))
    if done.exception:
        raise done.exception


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A finished copy of next to nothing."""
    folder = tmp_path / "copy"
    (folder / "registry" / "blobs").mkdir(parents=True)
    (folder / "redis.rdb").write_bytes(b"REDIS")
    (folder / "backup.json").write_text("{}")
    return folder


def test_a_copy_that_was_not_finished_is_not_restored(copy: Path, tmp_path: Path) -> None:
    (copy / "backup.json").unlink()
    with pytest.raises(NotFound, match="no finished backup"):
        fewstep("restore", str(copy), "--data", str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_neither_half_is_restored_where_one_would_be_written_over(copy: Path, tmp_path: Path) -> None:
    for used, other in (("redis", "registry"), ("registry/blobs", "redis")):
        data = tmp_path / used.replace("/", "-")
        (data / used).mkdir(parents=True)
        (data / used / "precious").touch()
        with pytest.raises(Conflict, match="empty"):
            fewstep("restore", str(copy), "--data", str(data))
        assert not (data / other).exists()


@pytest.mark.parametrize(
    ("command", "error", "said"),
    [
        (("backup", "copy"), InvalidRequest, "--data, or --registry-url and --redis-url"),
        (("backup", "copy", "--registry-url", "r"), InvalidRequest, "--data, or --registry-url and --redis-url"),
        (("backup", "copy", "--data", "."), NotFound, "not the folder of a `fewstep up`"),
        (("backup", "copy", "--registry-url", "r", "--redis-url", "redis://127.0.0.1:1"), FewstepError, "r"),
    ],
)
def test_what_is_not_said_or_not_there_is_named(
    command: tuple[str, ...], error: type[FewstepError], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=said):
        fewstep(*command)
    assert list(tmp_path.iterdir()) == []
