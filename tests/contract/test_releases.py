"""Gateways and workers of other releases: what each recorded one left in Redis is read and finished by this one.

Where this fails for a change that is wanted, the major version in the keys has to be raised (docs/operations.md).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from server import leases
from server.brokers.redis import RedisBroker
from server.messages import GenerateRequest, GenerateResult
from tests.contract.recorded import FOLDER, restore
from tests.contract.test_broker import done
from tests.redis_server import RedisServer, fresh_namespace


def recordings(kind: str) -> Any:
    return pytest.mark.parametrize("file", sorted(FOLDER.glob(f"{kind}-*.json")), ids=lambda file: file.stem)


@pytest.fixture
def namespace() -> str:
    return fresh_namespace()


@pytest.fixture
def client(redis_server: RedisServer) -> Iterator[Any]:
    with redis_server.client() as made:
        yield made


def load(client: Any, namespace: str, file: Path) -> dict[str, Any]:
    recorded: dict[str, Any] = json.loads(file.read_text())
    restore(client, f"{namespace}:v1:", recorded)
    return recorded


def keeps(read: msgspec.Struct, recorded: dict[str, Any]) -> bool:
    """Nothing that the other release said was lost."""
    found = msgspec.to_builtins(read)
    return {name: found.get(name) for name in recorded} == recorded


def requests(recorded: dict[str, Any]) -> dict[str, dict[str, Any]]:
    entries = [entry for name, (_, value) in recorded.items() if name.startswith("queue:") for entry in value]
    return {said["id"]: said["m"]["msgpack"] for said in (dict(pairs) for _, pairs in entries)}


@recordings("queued")
async def test_a_worker_serves_what_an_older_gateway_queued(
    file: Path, redis_server: RedisServer, client: Any, namespace: str
) -> None:
    queued = requests(load(client, namespace, file))
    worker = RedisBroker(redis_server.url, "worker", namespace=namespace)
    gateway = RedisBroker(redis_server.url, "gateway", namespace=namespace)
    try:
        claims = {claim.request.id: claim for claim in await worker.claim(["shapes"], 8, 0.0)}
        assert claims.keys() == queued.keys()
        assert all(keeps(claims[name].request, fields) for name, fields in queued.items())
        assert await worker.source("much") == b"pixels"
        for name, claim in claims.items():
            assert await worker.running([claim]) == [claim]
            assert await worker.finish(claim, done(claim, num_images=1), [b"picture"])
            assert await gateway.wait(name, 5) == done(claim, num_images=1)
        state = await gateway.queue_state("shapes")
        assert sum(state.waiting.values()) + state.running + sum(state.cost_s.values()) == 0
        assert await gateway.pins("shapes") == {}
    finally:
        await gateway.close()
        await worker.close()


@recordings("answered")
async def test_a_gateway_reads_what_an_older_worker_answered_and_says_of_itself(
    file: Path, redis_server: RedisServer, client: Any, namespace: str
) -> None:
    recorded = load(client, namespace, file)
    gateway = RedisBroker(redis_server.url, "gateway", namespace=namespace)
    try:
        [(_, pairs)] = recorded["replies:gateway"][1]
        result = await gateway.result("much")
        assert result is not None
        assert keeps(result, dict(pairs)["r"]["msgpack"])
        answered = await gateway.answer("much", 5)
        assert answered is not None
        assert list(answered.images) == [b"picture 0", b"picture 1"]
        status = await gateway.status("much")
        assert status is not None
        assert (status.state, status.worker) == ("succeeded", "worker")
        assert [emitted.event.kind async for emitted in gateway.events("much")] == ["queued", "running", "ended"]
        [info] = await gateway.workers()
        assert keeps(leases.read(info.info), recorded["worker:worker"][1]["msgpack"])
    finally:
        await gateway.close()


def test_both_recordings_are_kept_of_each_release() -> None:
    releases = [{file.stem.partition("-")[2] for file in FOLDER.glob(f"{kind}-*")} for kind in ("queued", "answered")]
    assert releases[0] == releases[1] >= {"0.1.0"}


@pytest.mark.parametrize("kind", [GenerateRequest, GenerateResult])
def test_recordings_say_all_that_a_message_can(kind: type[msgspec.Struct]) -> None:
    """A field that was added belongs into the recording of the next release, `tests/contract/recorded.py` makes it."""
    from tests.contract import recorded

    said = recorded.MUCH if kind is GenerateRequest else recorded.RESULT
    defaults = {field.name: field.default for field in msgspec.structs.fields(kind) if field.name != "error"}
    assert [name for name, default in defaults.items() if getattr(said, name) == default] == []
