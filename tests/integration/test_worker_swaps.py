"""Hot swaps on a whole worker under live requests: no request fails, and no bad student ever serves."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from engines.loader import load_student
from engines.manifest import Component, StudentManifest
from engines.registry.base import Registry
from engines.registry.files import FilesRegistry
from engines.student import sample
from server.brokers.base import StaleVersion
from server.brokers.memory import MemoryBroker, MemoryServer
from server.messages import GenerateResult
from tests import tiny_sd
from tests.eventually import aeventually
from tests.integration.test_worker_requests import picture, same
from tests.integration.worker_stack import MODEL, Running, copied, running, student


@pytest.fixture
async def up(tmp_path: Path) -> AsyncIterator[Running]:
    server = MemoryServer()
    registry = copied(tiny_sd.teacher(), FilesRegistry(tmp_path))
    async with running(MemoryBroker(server, "worker"), MemoryBroker(server, "gateway"), registry=registry) as made:
        yield made


class Traffic:
    """Requests one after the other, as a gateway routes them, until the block ends."""

    def __init__(self, up: Running) -> None:
        self.up = up
        self.results: list[GenerateResult] = []
        self._stopped = False

    async def __aenter__(self) -> "Traffic":
        self._tasks = [asyncio.create_task(self._run(name)) for name in "abc"]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stopped = True
        await asyncio.gather(*self._tasks)

    async def _run(self, name: str) -> None:
        count = 0
        while not self._stopped:
            try:
                self.results.append(await self.up.answer(self.up.request(f"{name}{count}", seed=count)))
                count += 1
            except StaleVersion:
                await asyncio.sleep(0)

    async def further(self, count: int) -> None:
        """Waits for so many more answers."""
        wanted = len(self.results) + count

        async def there() -> bool:
            return len(self.results) >= wanted

        await aeventually(there, 20)


async def test_swaps_round_a_ring_fail_nothing_and_every_picture_is_of_the_version_it_names(up: Running) -> None:
    registry = up.registry
    ring = [student(registry, scale) for scale in (1.02, 1.04, 1.06)]
    async with Traffic(up) as traffic:
        for version in (*ring, ring[0]):
            outcome = await up.outcome(up.propose(version, steps=4))
            assert (outcome.state, outcome.reason) == ("live", None)
            await traffic.further(6)
            assert traffic.results[-1].version == version
    assert {result.status for result in traffic.results} == {"succeeded"}
    made_by = {version: load_student(registry, registry.student(version)) for version in ring}
    checked = set()
    for result in traffic.results:
        if result.version in made_by:
            alone = sample(made_by[result.version], ["a red circle"], result.seeds, 4)[0]
            same(await picture(up, result.id), alone)
            checked.add(result.version)
    assert checked == set(ring)
    assert up.metrics.registry.get_sample_value("fewstep_swaps_total", {"model": MODEL, "result": "live"}) == 4
    for phase in ("staged", "building", "verifying", "ready", "draining"):
        labels = {"model": MODEL, "phase": phase}
        assert up.metrics.registry.get_sample_value("fewstep_swap_seconds_count", labels) == 4, phase


async def test_the_old_engines_go_when_nothing_needs_them(up: Running) -> None:
    old = up.student().version
    new = student(up.registry, 1.02)
    await up.outcome(up.propose(new))

    async def alone() -> bool:
        return up.students.lease().deployments == {MODEL: [new]}

    await aeventually(alone)
    assert up.students.loaded(MODEL, old) is None
    assert (await up.answer(up.request("r1"))).version == new


async def test_a_flipped_byte_is_rejected_at_staged_and_the_old_version_answers(up: Running) -> None:
    old, bad = up.student().version, student(up.registry, 1.02)
    path = up.registry.blob_path(up.registry.student(bad).components["denoiser"].weights)
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    await rejected(up, old, bad, "corrupt_blob at staged")


async def test_a_permuted_weight_map_is_rejected_at_verifying_and_the_old_version_answers(up: Running) -> None:
    old = up.student().version
    await rejected(up, old, permuted(up.registry, student(up.registry, 1.02)), "golden_mismatch at verifying")


async def rejected(up: Running, old: str, bad: str, reason: str) -> None:
    async with Traffic(up) as traffic:
        outcome = await up.outcome(up.propose(bad))
        await traffic.further(3)
    assert outcome.state == "dropped"
    assert f"rejected by worker: {reason}" in str(outcome.reason)
    assert {(result.status, result.version) for result in traffic.results} == {("succeeded", old)}
    assert up.students.lease().deployments == {MODEL: [old]}
    assert up.metrics.registry.get_sample_value("fewstep_swaps_total", {"model": MODEL, "result": "dropped"}) == 1


def permuted(registry: Registry, version: str) -> str:
    manifest = registry.student(version)
    part = manifest.components["denoiser"]
    weights = load(registry.read_blob(part.weights))
    one, two = "down_blocks.0.resnets.0.conv1.weight", "down_blocks.0.resnets.0.conv2.weight"
    assert not torch.equal(weights[one], weights[two])
    weights[one], weights[two] = weights[two], weights[one]
    bad = Component(weights=registry.put_blob(save(weights)), files=part.files)
    data = manifest.model_dump() | {"components": manifest.components | {"denoiser": bad}}
    return registry.publish(StudentManifest.model_validate(data))


async def test_a_request_pinned_to_a_version_that_left_is_answered_by_it(up: Running) -> None:
    old = up.student().version
    new = student(up.registry, 1.02)
    await up.outcome(up.propose(new))

    async def gone() -> bool:
        return up.students.loaded(MODEL, old) is None

    await aeventually(gone)
    await up.gateway.set_servable(MODEL, {old, new})  # a gateway's word came through from before
    result = await up.answer(up.request("late", version=old, steps=4))
    assert (result.status, result.version) == ("succeeded", old)


async def test_a_rollback_is_a_promotion_of_what_was_before(up: Running) -> None:
    old = up.student().version
    assert (await up.outcome(up.propose(student(up.registry, 1.02)))).revision == 2
    assert (await up.outcome(up.propose(old, steps=4))).revision == 3
    assert (await up.answer(up.request("r1"))).version == old
