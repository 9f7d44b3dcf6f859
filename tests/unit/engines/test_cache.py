import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

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


def interrupted(root: Path, key: str) -> None:
    """What a build leaves whose process is killed."""
    (root / f"{key}.lock").touch()
    (root / f"{key}.tmp").mkdir()
    (root / f"{key}.tmp" / "half").write_text("x")


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
    cache = DiskCache(tmp_path)
    held = cache.get("held", build("x" * 100))
    for key in ("older", "newer"):
        cache.get(key, build("x" * 100))
    assert DiskCache(tmp_path).evict(max_bytes=250) == ["older"]
    assert DiskCache(tmp_path).evict(max_bytes=0) == ["newer"]
    assert read(held) == "x" * 100
    del held
    assert DiskCache(tmp_path).evict(max_bytes=0) == ["held"]


def test_an_entry_that_several_read_stays_until_the_last_lets_it_go(tmp_path: Path) -> None:
    cache, together = DiskCache(tmp_path), threading.Barrier(2)

    def reads(_: int) -> Path:
        together.wait(10)
        return cache.get("k", build("x"))

    with ThreadPoolExecutor(2) as threads:
        held = list(threads.map(reads, range(2)))
    held.pop()
    assert cache.evict(max_bytes=0) == []
    held.pop()
    assert cache.evict(max_bytes=0) == ["k"]


def test_eviction_and_builders_may_take_away_the_same_leftovers(tmp_path: Path) -> None:
    """The builder begins at the end of the listing that eviction goes through, so that they meet."""
    for i in range(50):
        interrupted(tmp_path, str(i))
    keys = [path.stem for path in tmp_path.glob("*.lock")]

    def builds() -> None:
        for key in reversed(keys):
            DiskCache(tmp_path).get(key, build("x"))

    with ThreadPoolExecutor(1) as thread:
        building = thread.submit(builds)
        DiskCache(tmp_path).evict(max_bytes=10**9)
        building.result(30)
    assert list(tmp_path.glob("*.tmp")) == []
    assert len(list(tmp_path.glob("*/sub"))) == 50


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


def test_a_build_makes_room_and_a_read_does_not(tmp_path: Path) -> None:
    for key in ("old", "other"):
        DiskCache(tmp_path).get(key, build("x" * 1000))
    reader = DiskCache(tmp_path, max_bytes=1500)
    reader.get("other", build("never"))
    assert (tmp_path / "old").exists()
    reader.get("new", build("x" * 400))
    assert not (tmp_path / "old").exists()
    assert (tmp_path / "other").exists()


def test_eviction_takes_what_an_interrupted_build_left_and_not_what_is_being_built(tmp_path: Path) -> None:
    interrupted(tmp_path, "dead")

    def evicts(folder: Path) -> None:
        (folder / "data").write_text("x")
        assert DiskCache(tmp_path).evict(max_bytes=0) == []

    assert (DiskCache(tmp_path).get("k", evicts) / "data").read_text() == "x"
    assert not (tmp_path / "dead.tmp").exists()


def test_folders_of_others_are_no_entries(tmp_path: Path) -> None:
    for name in ("registry", "work.tmp", ".tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data").write_text("x")
    cache = DiskCache(tmp_path)
    cache.get("k", build("x"))
    assert cache.size_bytes() == 1
    assert cache.evictable(max_bytes=0) == [("k", 1)]
    assert cache.evict(max_bytes=0) == ["k"]
    assert len(list(tmp_path.glob("*/data"))) == 3


def _fill(root: Path, name: str, limit: int, started: Any) -> None:
    cache = DiskCache(root, max_bytes=limit)
    mine = cache.get(f"held-{name}", build(name))
    started.wait(20)
    for i in range(30):
        DiskCache(root, max_bytes=limit).get(f"{name}-{i}", build("x" * 1000))
        other = DiskCache(root, max_bytes=limit)
        assert read(other.get("shared", build("y" * 1000))) == "y" * 1000
    assert read(mine) == name


def test_processes_that_build_and_evict_at_once_keep_the_limit_and_what_each_reads(tmp_path: Path) -> None:
    context, limit = multiprocessing.get_context("fork"), 10_000
    started = context.Barrier(2)
    processes = [context.Process(target=_fill, args=(tmp_path, name, limit, started)) for name in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    sizes = [sum(f.stat().st_size for f in folder.rglob("*data")) for folder in tmp_path.iterdir() if folder.is_dir()]
    assert limit - 2 * 1001 <= sum(sizes) <= limit


def test_its_size_is_that_of_its_entries_without_markers_and_locks(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path)
    assert cache.size_bytes() == 0
    kept = [cache.get("k", build("four")), cache.get("l", build("more!"))]
    assert len(kept) == 2
    assert cache.size_bytes() == len("four") + len("more!")
