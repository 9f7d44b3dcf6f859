"""Redis with TLS: a CA of one's own, names that are checked, and a certificate of the client where the server asks."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import trustme

from distill_jobs.queue import connect
from engines.errors import Unavailable
from server.brokers.redis import RedisBroker
from server.embedded import free_port
from server.redis_copy import snapshot
from tests.contract.test_broker import claim_all, done, request_of
from tests.redis_server import RedisServer, login, tls_binary

pytestmark = pytest.mark.redis


@dataclass(frozen=True)
class Guarded:
    """A server that speaks TLS alone and asks who comes for a certificate."""

    port: int
    folder: Path

    def url(self, *, user: str = "fewstep", host: str = "localhost", ca: str = "ca", shown: bool = True) -> str:
        mine = f"&ssl_certfile={self.folder}/client.pem&ssl_keyfile={self.folder}/client.pem" if shown else ""
        return f"rediss://{login(user)}@{host}:{self.port}/0?ssl_ca_certs={self.folder}/{ca}.pem{mine}"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder, port = tmp_path_factory.mktemp("tls"), free_port()
    ca = trustme.CA()
    ca.cert_pem.write_to_path(folder / "ca.pem")
    trustme.CA().cert_pem.write_to_path(folder / "other.pem")
    for name in ("localhost", "client"):
        ca.issue_cert(name).private_key_and_cert_chain_pem.write_to_path(folder / f"{name}.pem")
    files = {"cert-file": "localhost", "key-file": "localhost", "ca-cert-file": "ca"}
    told = [part for name, file in files.items() for part in (f"--tls-{name}", str(folder / f"{file}.pem"))]
    args = ("--bind", "127.0.0.1", "--tls-port", str(port), "--tls-auth-clients", "yes", *told)
    server = RedisServer(args=args, program=tls_binary()).start()
    yield Guarded(port, folder)
    server.close()


async def test_requests_jobs_and_copies_go_through_it(guarded: Guarded, tmp_path: Path) -> None:
    gateway, worker = RedisBroker(guarded.url(), "gateway"), RedisBroker(guarded.url(), "worker")
    for broker in (gateway, worker):
        await broker.start()
    try:
        with worker.keep_lease(dict):
            await gateway.publish(request_of("r1"))
            [claim] = await claim_all(worker)
            assert await worker.finish(claim, done(claim), [b"picture"])
            assert await gateway.wait("r1", 5) == done(claim)
            assert [info.id for info in await gateway.workers()] == ["worker"]
    finally:
        for broker in (gateway, worker):
            await broker.close()
    with connect(guarded.url()) as jobs:
        assert jobs.zrange("fewstep:v1:jobs:waiting", 0, -1) == []
    assert snapshot(guarded.url(user="fewstep-backup"), tmp_path / "copy.rdb") > 0


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"ca": "other"}, "certificate verify failed"),
        ({"host": "127.0.0.1"}, "certificate verify failed: IP address mismatch"),
        ({"shown": False}, "certificate required|closed|reset"),
        ({"user": "nobody"}, "invalid username-password"),
    ],
)
async def test_who_cannot_be_trusted_is_not_talked_to(guarded: Guarded, changed: dict[str, str], reason: str) -> None:
    broker = RedisBroker(guarded.url(**changed), "gateway", patience_s=0.0)  # type: ignore[arg-type]
    try:
        with pytest.raises(Unavailable, match=f"(?i){reason}"):
            await broker.start()
    finally:
        await broker.close()
