"""Starts and ends each server: Fewstep as its own processes, a peer as a process group of its own, all on loopback."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import psutil

from bench import load as load_generator
from bench.load import Plan
from bench.peers.adapters._peer import PATH
from bench.peers.pictures import Ask, Config
from server.embedded import Stack, StackOptions, free_port

FEWSTEP = "fewstep"
TOLD = "fewstep told the SLO"
"""The same, and each request's `timeout_ms` says when its answer is of no use any more. No peer has such a field."""
OURS = (FEWSTEP, TOLD)
OUT = "load.msgpack"
PNG = b"\x89PNG\r\n\x1a\n"
_PLAN, _LOG = "load.json", "log"
_START_WITHIN_S = 300.0
_FIRST_S = 60.0
_POLL_S = 0.5
_GRACE_S = 15.0
_APART = ("unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")
_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Peer:
    """`module` in `adapters`; `routed`: its grouped form has a path per kind. `alike`: on one kind of requests its two
    forms are the same, so only the naive one is measured there. `apart`: it listens beyond loopback whatever it is
    told, so where that can be it gets a network of its own, and the load generator with it."""

    module: str
    routed: bool = False
    alike: bool = True
    apart: bool = False
    env: Mapping[str, str] | None = None


PEERS: Mapping[str, Peer] = {
    "fastapi": Peer("with_fastapi", alike=False),
    "litserve": Peer("with_litserve", routed=True),
    "ray": Peer("with_ray", apart=True, env={"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}),
    "bentoml": Peer("with_bentoml", env={"BENTOML_DO_NOT_TRACK": "true"}),
    "diffusers": Peer("with_diffusers", alike=False),
}
FORMS = ("naive", "grouped")
WORKERS = "fastapi workers"
SERVERS = (*OURS, *(f"{peer} {form}" for peer in PEERS for form in FORMS), WORKERS)


def measures(server: str, mix: Mapping[str, float], *, closed: bool = True) -> bool:
    """Whether this server is measured under this mix, in a `closed` loop or not, or its other form stands for it."""
    if server in OURS:
        return server == FEWSTEP or not closed
    peer, _, form = server.partition(" ")
    return form != "grouped" or len(mix) > 1 or not PEERS[peer].alike


@dataclass(frozen=True, slots=True)
class Usage:
    """CPU seconds since their start and resident megabytes, summed over a server's processes."""

    cpu_s: float
    rss_mb: float


class Running:
    """A server that answers. `pids` are its first processes; what they started belongs to it as well."""

    def __init__(
        self,
        port: int,
        pids: Sequence[int],
        config: Config,
        *,
        fewstep: bool = False,
        routed: bool = False,
        prefix: tuple[str, ...] = (),
    ) -> None:
        self.port, self._pids, self.config = port, list(pids), config
        self._fewstep, self._routed, self._prefix = fewstep, routed, prefix
        self.within_ms: Mapping[str, float] = {}  # by kind, what Fewstep is told

    def path(self, asked: Ask) -> str:
        if self._fewstep:
            return "/v1/generations"
        return f"{PATH}/{asked.kind}" if self._routed else PATH

    def body(self, asked: Ask) -> str:
        if not self._fewstep:
            return msgspec.json.encode(asked).decode()
        kind = self.config.kinds[asked.kind]
        body = {"model": kind.deployment, "prompt": asked.prompt, "seed": asked.seed, "steps": kind.steps}
        if asked.kind in self.within_ms:
            body["timeout_ms"] = int(self.within_ms[asked.kind])
        return json.dumps(body)

    def generate(self, asked: Sequence[Ask], folder: Path, **load: Any) -> "subprocess.Popen[bytes]":
        """Starts the load generator, where it reaches this server; it writes `folder / OUT`."""
        paths, bodies = [self.path(one) for one in asked], [self.body(one) for one in asked]
        (folder / _PLAN).write_bytes(msgspec.json.encode(Plan(port=self.port, paths=paths, bodies=bodies, **load)))
        (folder / OUT).unlink(missing_ok=True)
        program = (*self._prefix, sys.executable, "-m", "bench.load", str(folder / _PLAN), str(folder / OUT))
        return subprocess.Popen(program, cwd=_ROOT)

    def answers(self, asked: Ask, folder: Path) -> bool:
        """Whether one request is answered with a picture."""
        with self.generate([asked], folder, mode="closed", seconds=0.01, timeout_s=_FIRST_S) as process:
            process.wait(_FIRST_S + 30)
        records = load_generator.read(folder / OUT)
        return records[-1].status == 200 and records[-1].head.startswith(PNG)

    def processes(self) -> list[psutil.Process]:
        found: dict[int, psutil.Process] = {}
        for pid in self._pids:
            with contextlib.suppress(psutil.NoSuchProcess):
                root = psutil.Process(pid)
                found |= {one.pid: one for one in (root, *root.children(recursive=True))}
        return list(found.values())


def usage(processes: Sequence[psutil.Process]) -> Usage:
    cpu_s, rss = 0.0, 0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            with process.oneshot():
                times, memory = process.cpu_times(), process.memory_info()
            cpu_s, rss = cpu_s + times.user + times.system, rss + memory.rss
    return Usage(cpu_s, rss / 2**20)


@contextlib.contextmanager
def serving(server: str, config: Config, folder: Path, python: Path) -> Iterator[Running]:
    """`python` is the interpreter of the peers' virtual environment; logs and the peer's configuration go to `folder`.

    Raises:
        SystemExit: it did not answer in time; with the end of its log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if server in OURS:
        with _fewstep(config, folder) as running:
            yield running
    else:
        with _peer(server, config, folder, python) as running:
            yield running


@contextlib.contextmanager
def _fewstep(config: Config, folder: Path) -> Iterator[Running]:
    data = Path(config.registry).parent  # the stack looks for the registry there
    shutil.rmtree(data / "redis", ignore_errors=True)  # answers that an earlier start has kept
    env = {
        "WORKER_BACKEND": config.backend,
        "WORKER_PRECISION": config.precision,
        "WORKER_BATCH_SIZES": json.dumps(config.batches),
        "WORKER_CACHE_DIR": str(Path(config.cache).resolve()),
    }
    with Stack(StackOptions(data=data, port=0, distiller=False, threads=config.threads, env=env)) as stack:
        pids = list(stack.supervisor.pids().values())
        running = Running(stack.port, pids, config, fewstep=True)
        _ready(running, lambda: None, folder)
        yield running


@contextlib.contextmanager
def _peer(server: str, config: Config, folder: Path, python: Path) -> Iterator[Running]:
    name, _, form = server.partition(" ")
    peer, grouped = PEERS[name], form != "naive"
    processes = config.threads if server == WORKERS else 1
    told = msgspec.structs.replace(
        config, grouped=grouped, port=free_port(), processes=processes, threads=config.threads // processes
    )
    path = folder / "config.json"
    path.write_bytes(msgspec.json.encode(told))
    env = {
        **os.environ,
        "PEERS_CONFIG": str(path),
        "PYTHONPATH": str(_ROOT),
        "OMP_NUM_THREADS": str(told.threads),  # as Fewstep's worker has it
        "OMP_WAIT_POLICY": "PASSIVE",
        **_token(folder, peer),
    }
    # The launcher ends the peer if this process dies.
    launcher = (sys.executable, "-m", "server.child", str(os.getpid()), "0")
    apart = peer.apart and _can_be_apart()
    with (folder / _LOG).open("wb") as out:
        process = subprocess.Popen(
            (*launcher, *(_APART if apart else ()), str(python), "-m", f"bench.peers.adapters.{peer.module}"),
            env=env,
            cwd=_ROOT,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    prefix = ("nsenter", "--target", str(process.pid), "--net") if apart else ()
    running = Running(told.port, [process.pid], told, routed=grouped and peer.routed, prefix=prefix)
    try:
        _ready(running, process.poll, folder)
        yield running
    finally:
        _end(process, running.processes())


def _token(folder: Path, peer: Peer) -> dict[str, str]:
    """The peer's own variables; a secret of this run for one that asks for a token."""
    env = dict(peer.env or {})
    if "RAY_AUTH_MODE" in env:
        path = folder / "token"
        path.touch(mode=0o600)
        path.write_text(os.urandom(32).hex())
        env["RAY_AUTH_TOKEN_PATH"] = str(path)
    return env


def _can_be_apart() -> bool:
    """A network namespace needs root and the tools of util-linux and iproute2."""
    return os.geteuid() == 0 and all(shutil.which(tool) for tool in ("unshare", "nsenter", "ip"))


def _ready(running: Running, ended: Callable[[], int | None], folder: Path) -> None:
    """Waits until every kind was answered once."""
    deadline_s = time.monotonic() + _START_WITHIN_S
    for kind in running.config.kinds:
        while not running.answers(Ask(kind, "a red circle", 1), folder):
            if time.monotonic() > deadline_s or ended() is not None:
                log = folder / _LOG
                tail = log.read_text(errors="replace")[-4000:] if log.exists() else ""
                raise SystemExit(f"no answer to kind {kind} on port {running.port}; the end of its log:\n{tail}")
            time.sleep(_POLL_S)


def _end(process: "subprocess.Popen[bytes]", members: Sequence[psutil.Process]) -> None:
    """SIGTERM to the first process; what is left of the group and of those that it started is killed by its id."""
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for member in members:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()  # psutil looks whether the id is still the same process's
    process.wait()
