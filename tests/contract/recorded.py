"""What a release leaves in Redis, kept as JSON for all later ones: half of the work of an older gateway or worker.

python -m tests.contract.recorded VERSION        at each release: adds its recordings to tests/contract/messages
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import msgspec

from engines.refine import Refinement
from server.brokers.redis import RedisBroker
from server.leases import StageCost, VersionCost, VersionState, WorkerLease, write
from server.messages import GenerateRequest, GenerateResult, Refined, TierSteps, Timing
from tests.redis_server import RedisServer

FOLDER = Path(__file__).parent / "messages"
VERSION = f"shapes@{'1' * 64}"
TEACHER = f"shapes@{'2' * 64}"
_LITTLE = {"model": "shapes", "version": VERSION, "tier": "low", "steps": 1, "prompt": "a red circle", "width": 64}
_LITTLE |= {"height": 64, "seed": 7, "budget_ms": 30_000, "reply_to": "gateway"}
LITTLE = GenerateRequest(id="little", **_LITTLE)  # type: ignore[arg-type]
MUCH = GenerateRequest(
    **(_LITTLE | {"id": "much", "prompt": "ein Kreis ●", "seed": 2**63 - 1, "steps": 4}),  # type: ignore[arg-type]
    negative_prompt="blur",
    guidance=1.5,
    n=2,
    output_format="webp",
    compression=80,
    priority=7,
    partial_images=2,
    events=True,
    owner="web",
    created_at=1.5,
    traceparent=f"00-{'a' * 32}-{'b' * 16}-01",
    cost_s=0.25,
    due_after_s=2.0,
    downgraded_from=TierSteps(tier="medium", steps=8),
    refinement=Refinement("redo", share=0.5),
    teacher=TEACHER,
    edits_from=1,
    fps=8,
)
RESULT = GenerateResult(
    id="much",
    status="succeeded",
    version=VERSION,
    tier="low",
    steps=4,
    backend="openvino",
    worker="worker",
    seeds=[2**63 - 1, 0],
    timing=Timing(queue_ms=1, encode_ms=2, denoise_ms=3, decode_ms=4, image_ms=5, total_ms=15, load_ms=0.5),
    ignored_words=["ein"],
    text_tokens=3,
    num_images=2,
    downgraded_from=TierSteps(tier="medium", steps=8),
    refined=Refined(refine="redo", teacher=TEACHER, redone=[1]),
)
LEASE = WorkerLease(
    deployments={"shapes": [VERSION]},
    revisions={"shapes": 3},
    backend="openvino",
    precision="fp32",
    costs={VERSION: VersionCost(step=StageCost(alone_s=0.01, row_s=0.005))},
    batch_rows=8,
    versions={"shapes": {VERSION: VersionState(state="on_demand", weight_bytes=4, ready_in_s=0.5)}},
    resident_bytes=4,
    resident_limit_bytes=16,
    video_formats=["webp"],
)


def dump(client: Any, prefix: str) -> dict[str, Any]:
    """All keys below the prefix, messages as what they say."""
    return {name.decode().removeprefix(prefix): _read(client, name) for name in sorted(client.scan_iter(f"{prefix}*"))}


def restore(client: Any, prefix: str, recorded: dict[str, Any]) -> None:
    for name, (kind, value) in recorded.items():
        key = prefix + name
        if kind == "string":
            client.set(key, _bytes(value))
        elif kind == "hash":
            client.hset(key, mapping={field: _bytes(each) for field, each in value.items()})
        elif kind == "zset":
            client.zadd(key, value)
        else:
            for entry, pairs in value:
                client.execute_command(
                    "XADD", key, entry, *(part for name, each in pairs for part in (name, _bytes(each)))
                )


def _read(client: Any, name: bytes) -> tuple[str, Any]:
    kind = client.type(name).decode()
    if kind == "string":
        return kind, _said(client.get(name))
    if kind == "hash":
        return kind, {field.decode(): _said(each) for field, each in client.hgetall(name).items()}
    if kind == "zset":
        return kind, {member.decode(): score for member, score in client.zrange(name, 0, -1, withscores=True)}
    assert kind == "stream", (name, kind)
    found = client.eval("return redis.call('XRANGE', KEYS[1], '-', '+')", 1, name)
    return kind, [(entry.decode(), _pairs(flat)) for entry, flat in found]


def _pairs(flat: list[bytes]) -> list[tuple[str, Any]]:
    return [(name.decode(), _said(value)) for name, value in zip(flat[::2], flat[1::2], strict=True)]


def _said(data: bytes) -> Any:
    """A message as its fields, anything else as text."""
    try:
        found = msgspec.msgpack.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return data.decode()
    return {"msgpack": found} if isinstance(found, dict) else data.decode()


def _bytes(value: Any) -> bytes:
    return msgspec.msgpack.encode(value["msgpack"]) if isinstance(value, dict) else str(value).encode()


async def _record(release: str) -> None:
    server = RedisServer().start()
    gateway, worker = RedisBroker(server.url, "gateway"), RedisBroker(server.url, "worker")
    try:
        with server.client() as client:
            await gateway.start()
            await gateway.publish(LITTLE)
            await gateway.publish(MUCH, b"pixels")
            _write(f"queued-{release}", dump(client, "fewstep:v1:"))
            await worker.start()
            await worker.renew_lease(write(LEASE))
            [*claims] = await worker.claim(["shapes"], 8, 0.0)
            [claim] = [each for each in claims if each.request.id == "much"]
            await worker.running([claim])
            await worker.finish(claim, RESULT, [b"picture 0", b"picture 1"])
            _write(f"answered-{release}", dump(client, "fewstep:v1:"))
    finally:
        await gateway.close()
        await worker.close()
        server.close()


def _write(name: str, found: dict[str, Any]) -> None:
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{name}.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    asyncio.run(_record(sys.argv[1]))
