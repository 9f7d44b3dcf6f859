"""What a Redis holds, copied while it is written to, and a Redis that goes on with the copy."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from engines.errors import Conflict, Unavailable
from server.redis_copy import lay_out, snapshot
from tests.redis_server import RedisServer


@pytest.fixture
def used() -> Iterator[RedisServer]:
    server = RedisServer(aof=True).start()
    yield server
    server.close()


def test_a_server_that_starts_on_a_copy_has_what_was_acknowledged_before_it(used: RedisServer, tmp_path: Path) -> None:
    stopped, written = threading.Event(), 0

    def write() -> None:
        nonlocal written
        with used.client() as client:
            while not stopped.is_set():
                client.xadd("queue", {"number": written})
                written += 1

    writer = threading.Thread(target=write)
    writer.start()
    try:
        with used.client() as client:
            client.set("kept", b"\x00\xff" * 1000, px=600_000)
            client.xgroup_create("queue", "workers", id="0", mkstream=True)
            client.xreadgroup("workers", "one", {"queue": ">"}, count=1, block=5000)
            before = written
        size = snapshot(used.url_of("fewstep-backup"), tmp_path / "redis.rdb")
    finally:
        stopped.set()
        writer.join()
    assert size == (tmp_path / "redis.rdb").stat().st_size
    assert (tmp_path / "redis.rdb").stat().st_mode & 0o777 == 0o600
    used.kill()

    again = RedisServer(aof=True)
    lay_out(tmp_path / "redis.rdb", again.folder)
    again.start()
    try:
        with again.client() as client:
            assert client.get("kept") == b"\x00\xff" * 1000
            assert 0 < client.pttl("kept") <= 600_000
            numbers = [int(fields[b"number"]) for _, fields in client.xrange("queue")]
            assert numbers == list(range(len(numbers)))
            assert before <= len(numbers) <= written
            assert client.xpending("queue", "workers")["pending"] == 1
            client.set("new", b"1")
        again.kill()
        again.start()
        with again.client() as client:  # and it keeps what it is given from then on
            assert client.xlen("queue") == len(numbers)
    finally:
        again.close()


def test_a_copy_is_laid_out_in_an_empty_folder_alone(tmp_path: Path) -> None:
    (tmp_path / "redis.rdb").write_bytes(b"")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "dump.rdb").touch()
    with pytest.raises(Conflict, match="an empty folder"):
        lay_out(tmp_path / "redis.rdb", tmp_path / "used")


def test_a_server_that_gives_no_copy_says_why_and_leaves_nothing(used: RedisServer, tmp_path: Path) -> None:
    with used.client() as client:
        client.acl_setuser("plain", enabled=True, nopass=True, keys=["*"], commands=["+@all", "-sync"])
    with pytest.raises(Unavailable, match=r"no copy.*sync"):
        snapshot(f"{used.admin_url}?username=plain&password=x", tmp_path / "redis.rdb")
    used.kill()
    with pytest.raises(Unavailable):
        snapshot(used.url_of("fewstep-backup"), tmp_path / "redis.rdb")
    assert list(tmp_path.iterdir()) == []
