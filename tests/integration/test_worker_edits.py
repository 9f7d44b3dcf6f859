"""A whole worker that changes pictures, beside those that it makes."""

import asyncio
import io
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load, save

from engines.editing import Looked, changes_of
from engines.manifest import StudentManifest
from engines.student import sample
from server.brokers.base import Broker
from server.brokers.memory import MemoryBroker, MemoryServer
from server.brokers.redis import RedisBroker
from server.messages import GenerateRequest, GenerateResult
from server.sources import Source
from tests import tiny_sd
from tests.contract.conftest import redis_server
from tests.integration.worker_stack import Running, copied, running
from tests.redis_server import fresh_namespace

__all__ = ["redis_server"]
PICTURE = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
STAYS = np.repeat([[0] * 8 + [255] * 8], 16, axis=0).astype(np.uint8)
WITH_MASK = np.dstack([PICTURE, STAYS]).tobytes()


@pytest.fixture(params=["memory", "redis"])
async def up(request: pytest.FixtureRequest) -> AsyncIterator[Running]:
    gateway, broker = brokers(request)
    await gateway.start()
    await broker.start()
    async with running(broker, gateway) as made:
        yield made
    await broker.close()
    await gateway.close()


def brokers(request: pytest.FixtureRequest) -> tuple[Broker, Broker]:
    if request.param == "memory":
        server = MemoryServer()
        return MemoryBroker(server, "gateway"), MemoryBroker(server, "worker")
    url, namespace = request.getfixturevalue("redis_server").url, fresh_namespace()
    return RedisBroker(url, "gateway", namespace=namespace), RedisBroker(url, "worker", namespace=namespace)


async def answer(up: Running, request: GenerateRequest, source: bytes | None) -> GenerateResult:
    await up.gateway.publish(request, source)
    result = await up.gateway.wait(request.id, 20)
    assert result is not None
    return result


async def picture(up: Running, request_id: str, index: int = 0) -> Any:
    data = await up.gateway.image(request_id, index)
    assert data is not None
    return np.asarray(Image.open(io.BytesIO(data))).astype(int)


def expected(up: Running, seed: int, first: int, source: Source) -> Any:
    """The same by the student alone."""
    student = up.student()
    latents, deviation = student.family.look(source.levels[None])
    assert deviation is not None
    looked = Looked(latents[0], deviation[0], source.changes(student.manifest.downscale))
    made = sample(student, ["a red circle"], [seed], 4, looked=[looked], first=first)[0]
    return source.kept(made.numpy()).transpose(1, 2, 0).astype(int)


async def test_pictures_are_changed_beside_those_that_are_made(up: Running) -> None:
    whole, part = Source(PICTURE, None), Source(PICTURE, STAYS)
    results = await asyncio.gather(
        answer(up, up.request("whole", n=2, edits_from=2), PICTURE.tobytes()),
        answer(up, up.request("part", seed=9, edits_from=0), WITH_MASK),
        answer(up, up.request("made"), None),
    )
    assert [result.status for result in results] == ["succeeded"] * 3
    assert np.abs(await picture(up, "whole", 1) - expected(up, 8, 2, whole)).max() <= 1
    made = await picture(up, "part")
    assert np.abs(made - expected(up, 9, 0, part)).max() <= 1
    assert (made[:, 8:] == PICTURE[:, 8:]).all()
    assert np.abs(made[:, :8] - PICTURE[:, :8]).max() > 50
    alone = sample(up.student(), ["a red circle"], [7], 4)[0].numpy().transpose(1, 2, 0).astype(int)
    assert np.abs(await picture(up, "made") - alone).max() <= 1


async def test_progress_counts_the_steps_that_are_taken(up: Running) -> None:
    await up.gateway.publish(up.request("r1", edits_from=2, events=True), PICTURE.tobytes())
    seen = [(e.event.kind, e.event.step, e.event.total) async for e in up.gateway.events("r1")]
    steps = [(step, total) for kind, step, total in seen if kind == "step"]
    assert steps == [(1, 2), (2, 2)][: len(steps)]  # the last may come after the end
    assert steps
    assert [total for kind, _, total in seen if kind in ("queued", "running")] == [2, 2]


@pytest.mark.parametrize(
    ("source", "code"), [(None, "gone"), (b"a few bytes", "unsupported_message")], ids=["none", "short"]
)
async def test_a_picture_that_is_not_there_fails_its_request_alone(
    up: Running, source: bytes | None, code: str
) -> None:
    result = await answer(up, up.request("r1", edits_from=2), source)
    assert result.error is not None
    assert (result.status, result.error.code) == ("failed", code)
    assert (await answer(up, up.request("r2", edits_from=2), PICTURE.tobytes())).status == "succeeded"


async def test_a_vae_that_only_decodes_cannot_edit_and_says_so() -> None:
    teacher = tiny_sd.teacher()
    decoder = teacher.manifest.components["decoder"]
    halved = {
        name: value
        for name, value in load(teacher.registry.read_blob(decoder.weights)).items()
        if not name.startswith(("encoder.", "quant_conv."))
    }
    part = decoder.model_copy(update={"weights": teacher.registry.put_blob(save(halved))})
    components = teacher.manifest.components | {"decoder": part}
    changed = teacher.manifest.model_dump() | {"components": components}
    half = replace(teacher, version=teacher.registry.publish(StudentManifest.model_validate(changed)))
    server = MemoryServer()
    gateway, broker = MemoryBroker(server, "gateway"), MemoryBroker(server, "worker")
    async with running(broker, gateway, registry=copied(half)) as up:
        result = await answer(up, up.request("r1", edits_from=2), PICTURE.tobytes())
        assert result.error is not None
        assert (result.error.code, result.error.param) == ("invalid_request", "image")
        assert "whole VAE" in result.error.message
        assert (await answer(up, up.request("r2"), None)).status == "succeeded"


def test_the_mask_of_a_latent_position_is_that_of_its_pixels() -> None:
    where = Source(PICTURE, STAYS).changes(2)
    assert where is not None
    assert where.shape == (1, 8, 8)
    assert where[0, 0].tolist() == [1.0] * 4 + [0.0] * 4
    assert (changes_of(where[0] > 0, 1) == where).all()
