import multiprocessing
from pathlib import Path

import pytest

from engines.cache import DiskCache


def build(text: str) -> "Builder":
    return Builder(text)


class Builder:
    def __init__(self, text: str) -> None:
        self.text, self.calls = text, 0

    def __call__(self, folder: Path) -> None:
        self.calls += 1
        (folder / "sub").mkdir()
        (folder / "sub" / "data").write_text(self.text)


def read(folder: Path) -> str:
    return (folder / "sub" / "data").read_text()


def test_an_entry_is_built_once_and_read_by_all(tmp_path: Path) -> None:
    builder = build("one")
    assert read(DiskCache(tmp_path).get("k", builder)) == "one"
    assert read(DiskCache(tmp_path).get("k", build("never"))) == "one"
    assert builder.calls == 1


def test_an_entry_without_its_marker_is_built_again(tmp_path: Path) -> None:
    DiskCache(tmp_path).get("k", build("half"))
    (tmp_path / "k" / "complete.json").unlink()
    assert read(DiskCache(tmp_path).get("k", build("whole"))) == "whole"


@pytest.mark.parametrize("damage", ["flip", "lose", "add"])
def test_an_entry_that_differs_from_its_marker_is_built_again(tmp_path: Path, damage: str) -> None:
    data = DiskCache(tmp_path).get("k", build("right")) / "sub" / "data"
    if damage == "flip":
        data.write_text("wrong")
    elif damage == "lose":
        data.unlink()
    else:
        (data.parent / "more").write_text("")
    folder = DiskCache(tmp_path).get("k", build("again"))
    assert read(folder) == "again"
    assert not (folder / "sub" / "more").exists()


def test_a_build_that_fails_leaves_nothing_to_load(tmp_path: Path) -> None:
    def fails(folder: Path) -> None:
        (folder / "half").write_text("")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        DiskCache(tmp_path).get("k", fails)
    folder = DiskCache(tmp_path).get("k", build("whole"))
    assert sorted(path.name for path in folder.iterdir()) == ["complete.json", "sub"]


def test_eviction_takes_the_longest_unused_first_and_never_what_is_read(tmp_path: Path) -> None:
    old, held = DiskCache(tmp_path), DiskCache(tmp_path)
    held.get("held", build("x" * 100))
    for key in ("older", "newer"):
        old.get(key, build("x" * 100))
    old.close()
    assert DiskCache(tmp_path).evict(max_bytes=250) == ["older"]
    assert DiskCache(tmp_path).evict(max_bytes=0) == ["newer"]
    held.close()
    assert DiskCache(tmp_path).evict(max_bytes=0) == ["held"]


def _get(root: Path, counter: Path) -> None:
    def build(folder: Path) -> None:
        with counter.open("a") as file:
            file.write("built\n")
        (folder / "data").write_text("x")

    DiskCache(root).get("k", build)


def test_of_processes_that_want_an_entry_at_once_one_builds_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    counter = tmp_path / "counter"
    processes = [context.Process(target=_get, args=(tmp_path / "cache", counter)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(20)
        assert process.exitcode == 0
    assert counter.read_text() == "built\n"
