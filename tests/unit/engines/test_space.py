"""What becomes of a line that there is no room for."""

import os
from pathlib import Path

import pytest

from engines import space
from engines.errors import StorageFull


def test_lines_follow_each_other(tmp_path: Path) -> None:
    path = tmp_path / "events"
    space.append(path, b"one\n")
    space.append(path, b"two\n")
    assert path.read_bytes() == b"one\ntwo\n"


def test_of_a_line_without_room_its_half_goes_and_what_another_process_added_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, write = tmp_path / "events", os.write
    path.write_bytes(b"before\n")

    def half(fd: int, data: bytes) -> int:
        with path.open("ab") as another:
            another.write(b"theirs\n")
        return write(fd, data[:3])

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(StorageFull, match=f"no space is left for {path}"):
        space.append(path, b"ours\n")
    assert path.read_bytes() == b"before\ntheirs\n"
