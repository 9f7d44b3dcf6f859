"""What leaves a worker: pictures encoded beside the loop, answers in batches, and none lost while Redis is away."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from engines.errors import FewstepError, InvalidRequest, Unavailable
from server.answers import Answers, Picture, collect
from server.brokers.base import Finished
from server.brokers.memory import MemoryBroker, MemoryServer
from server.messages import StepEvent, ended_by
from server.stages import Plans
from server.tickets import LatentRow, Ticket, latent_row, rows_of
from tests.eventually import aeventually
from tests.unit.server import toy


class Flaky(MemoryBroker):
    """Takes answers and progress only when told so, and remembers in which batches answers came."""

    here = True
    batches: list[int]
    heard: asyncio.Event | None = None  # progress waits for it

    async def emit(self, event: StepEvent, data: bytes | None = None) -> None:
        if self.heard is not None:
            await self.heard.wait()
        await super().emit(event, data)

    async def finish_many(self, answers: Sequence[Finished]) -> list[bool]:
        if not self.here:
            raise Unavailable("Redis is away")
        self.batches.append(len(answers))
        return await super().finish_many(answers)


class Desk:
    def __init__(self) -> None:
        self.broker = Flaky(MemoryServer(), "worker")
        self.broker.batches = []
        self.pictures: list[Picture] = []
        self.failed: list[tuple[str, FewstepError]] = []
        self.sent: list[tuple[str, bool]] = []
        self.answers = Answers(self.broker, threads=2, ready=self.pictures.extend, failed=self.fail)

    def ticket(self, name: str, **given: Any) -> Ticket:
        student = toy.student()
        solver = Plans().solver(student, 1, None)
        return Ticket(toy.claim(student, name, **given), student, solver.plan, solver, due_s=0, deadline_s=60)

    def fail(self, ticket: Ticket, error: FewstepError) -> None:
        self.failed.append((ticket.id, error))

    def rows(self, name: str, **given: Any) -> list[LatentRow]:
        return [latent_row(row, torch.zeros(3, 4, 4)) for row in rows_of(self.ticket(name, **given))]

    async def encoded(self) -> None:
        async def done() -> bool:
            return self.answers.encoding == 0

        await aeventually(done)

    def said(self, answer: Finished, mine: bool) -> None:
        self.sent.append((answer.claim.request.id, mine))


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    made = Desk()
    tasks = [asyncio.create_task(made.answers.send(made.said)), asyncio.create_task(made.answers.emit())]
    yield made
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    made.answers.close()


async def until(desk: Desk, count: int) -> None:
    async def check() -> bool:
        return len(desk.sent) == count

    await aeventually(check)


async def test_a_request_is_whole_with_its_last_picture(desk: Desk) -> None:
    ticket = desk.ticket("r", n=5)
    rows = [latent_row(row, torch.zeros(3, 4, 4)) for row in rows_of(ticket)]
    pixels = np.arange(5 * 3 * 16, dtype=np.uint8).reshape(5, 3, 4, 4)
    desk.answers.encode(rows, pixels)

    async def encoded() -> bool:
        return len(desk.pictures) == 5

    await aeventually(encoded)
    whole = []
    for picture in desk.pictures:
        collect(picture)
        whole.append(ticket.whole)
    assert whole == [False] * 4 + [True]
    assert [image is not None and image.startswith(b"\x89PNG") for image in ticket.images] == [True] * 5
    assert len(set(ticket.images)) == 5
    assert ticket.image_s > 0


async def test_what_cannot_be_encoded_fails_its_own_request_alone(desk: Desk) -> None:
    rows = desk.rows("a") + desk.rows("bad", output_format="jpeg", compression=101) + desk.rows("b")
    desk.answers.encode(rows, np.zeros((3, 3, 4, 4), np.uint8))
    await desk.encoded()
    assert sorted(picture.row.request_id for picture in desk.pictures) == ["a", "b"]
    assert [(name, type(error)) for name, error in desk.failed] == [("bad", InvalidRequest)]


async def test_an_encoder_s_own_error_is_an_answer_too(desk: Desk) -> None:
    desk.answers.encode(desk.rows("r", output_format="webp"), np.zeros((1, 3, 1, 16384), np.uint8))  # a WebP has 16383
    await desk.encoded()
    assert [(name, error.code) for name, error in desk.failed] == [("r", "internal_error")]
    assert desk.pictures == []


async def test_pictures_of_a_request_that_is_over_are_not_encoded(desk: Desk) -> None:
    gone, kept = desk.rows("gone", n=2), desk.rows("kept")
    gone[0].ticket.over = True
    desk.answers.encode(gone + kept, np.zeros((3, 3, 4, 4), np.uint8))
    assert desk.answers.encoding == 3
    await desk.encoded()
    assert [picture.row.request_id for picture in desk.pictures] == ["kept"]


async def answer(desk: Desk, name: str) -> Finished:
    request = toy.request(toy.student(), name)
    await desk.broker.publish(request)
    claim = toy.claim(toy.student(), name)
    return Finished(claim, ended_by(name, "failed", Unavailable("x"), request))


async def test_answers_that_are_ready_together_go_together(desk: Desk) -> None:
    for finished in [await answer(desk, name) for name in ("a", "b", "c")]:
        desk.answers.add(finished)
    await until(desk, 3)
    assert desk.broker.batches == [3]
    assert desk.sent == [("a", True), ("b", True), ("c", True)]
    assert desk.answers.pending == 0


async def test_a_request_is_not_whole_before_its_partial_pictures_have_left(desk: Desk) -> None:
    ticket = desk.ticket("r")
    ticket.shows, ticket.images = 2, [b"picture"]
    seen = []
    for shown in (0, 1, 2):
        ticket.shown = shown
        seen.append(ticket.whole)
    assert seen == [False, False, True]


async def test_an_answer_goes_behind_the_progress_that_was_noted_before_it(desk: Desk) -> None:
    finished = await answer(desk, "a")
    for step in (1, 2, 3):
        desk.answers.progress(StepEvent(id="a", kind="step", step=step, total=3))
    desk.broker.heard = asyncio.Event()
    desk.answers.add(finished)
    for _ in range(10):  # however often everybody has had a turn
        await asyncio.sleep(0)
    assert desk.broker.batches == []
    desk.broker.heard.set()
    seen = [emitted.event async for emitted in desk.broker.events("a")]
    assert [(one.kind, one.step) for one in seen] == [("step", 1), ("step", 2), ("step", 3), ("ended", 0)]


async def test_answers_wait_for_a_broker_that_is_away(desk: Desk) -> None:
    desk.broker.here = False
    desk.answers.add(await answer(desk, "a"))
    await asyncio.sleep(0)
    desk.answers.add(await answer(desk, "b"))
    assert desk.answers.pending == 2
    desk.broker.here = True
    await until(desk, 2)
    assert [name for name, _ in desk.sent] == ["a", "b"]


async def test_whoever_ended_a_request_first_is_told_from_the_others(desk: Desk) -> None:
    finished = await answer(desk, "a")
    await desk.broker.cancel("a")
    desk.answers.add(finished)
    await until(desk, 1)
    assert desk.sent == [("a", False)]


async def test_progress_keeps_its_order(desk: Desk) -> None:
    await desk.broker.publish(toy.request(toy.student(), "a", events=True))
    for step in (1, 2, 3):
        desk.answers.progress(StepEvent(id="a", kind="step", step=step))
    await desk.broker.cancel("a")
    seen = [emitted.event.step async for emitted in desk.broker.events("a") if emitted.event.kind == "step"]
    assert sorted(seen) == seen
