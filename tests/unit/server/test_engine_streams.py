"""Several engine threads: as many calls at once as there are streams, nothing lost and nothing done twice."""

import threading
from typing import Any

import torch
from torch import Tensor

from engines.errors import InvalidRequest
from engines.streams import is_alone
from engines.student import sample
from tests.eventually import eventually
from tests.unit.server import toy
from tests.unit.server.test_engine_loop import Bench


class Gated(toy.ToyFamily):
    """Denoiser calls wait until `gate` is open; `running` and `most` count those that wait or run at once."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.running = self.most = 0
        self._counting = threading.Lock()

    def denoise(self, x: Tensor, *given: Any, **named: Any) -> Tensor:
        with self._counting:
            self.running += 1
            self.most = max(self.most, self.running)
        assert self.gate.wait(5)
        made = super().denoise(x, *given, **named)
        with self._counting:
            self.running -= 1
        return made


def test_every_picture_of_every_request_comes_once_and_is_right() -> None:
    bench, student = Bench(streams=3, threads=3), toy.student()
    tickets = [bench.ticket(student, f"r{i}", n=1 + i % 3, steps=(1, 2, 4)[i % 3], seed=i) for i in range(60)]
    with bench.running():
        for start in range(0, 60, 4):
            bench.loop.submit(tickets[start : start + 4])
        eventually(lambda: len(bench.sink.pictures) == 120)
    assert len(bench.sink.steps) == sum(t.claim.request.n * t.claim.request.steps for t in tickets)
    for i, ticket in enumerate(tickets):
        n, steps = ticket.claim.request.n, ticket.claim.request.steps
        alone = sample(student, ["a red circle"] * n, range(i, i + n), steps)
        assert all(torch.equal(bench.sink.pictures[ticket.id, k], alone[k]) for k in range(n))


def test_as_many_calls_run_at_once_as_there_are_streams_whatever_the_threads() -> None:
    bench, family = Bench(streams=2, threads=4), Gated()
    with bench.running():
        bench.loop.submit([bench.ticket(toy.student(family), f"r{i}", steps=2) for i in range(16)])
        eventually(lambda: family.running == 2)
        behind = bench.loop.background(lambda: family.running)
        family.gate.set()
        eventually(lambda: len(bench.sink.pictures) == 16)
        assert behind.result(5) <= 1  # beside it runs at most one call
    assert family.most == 2


def test_work_behind_does_not_overlap_with_calls_of_the_only_stream() -> None:
    bench, family = Bench(streams=1, threads=3), Gated()
    with bench.running():
        bench.loop.submit([bench.ticket(toy.student(family), "a", steps=4)])
        eventually(lambda: family.running == 1)
        behind = bench.loop.background(lambda: family.running)
        family.gate.set()
        assert behind.result(5) == 0


def test_a_request_that_is_dropped_while_its_call_runs_takes_no_further_step() -> None:
    bench, family = Bench(streams=2, threads=2), Gated()
    gone = bench.ticket(toy.student(family), "gone", steps=4)
    with bench.running():
        bench.loop.submit([gone])
        eventually(lambda: family.running == 1)
        bench.loop.drop([gone])
        eventually(lambda: gone.over)  # the other thread hears it meanwhile
        family.gate.set()
        bench.loop.submit([bench.ticket(toy.student(family), "kept", steps=4)])
        eventually(lambda: bench.sink.pictures)
    assert list(bench.sink.pictures) == [("kept", 0)]
    assert [step for step in bench.sink.steps if step[0] == "gone"] == []
    assert sum(rows for stage, rows in family.calls if stage == "denoise") == 1 + 4


def test_landed_waits_for_the_calls_under_way_and_for_no_later_ones() -> None:
    bench, first, later = Bench(streams=2, threads=2), Gated(), Gated()
    with bench.running():
        bench.loop.submit([bench.ticket(toy.student(first), "a")])
        eventually(lambda: first.running == 1)
        landed = bench.loop.landed()
        bench.loop.submit([bench.ticket(toy.student(later), "b")])
        eventually(lambda: later.running == 1)
        assert not landed.done()
        first.gate.set()
        landed.result(5)
        assert later.running == 1
        later.gate.set()
        eventually(lambda: len(bench.sink.pictures) == 2)


def test_landed_is_at_once_where_nothing_runs() -> None:
    bench = Bench(streams=2, threads=2)
    with bench.running():
        bench.loop.landed().result(5)


def test_rows_of_one_request_in_two_calls_end_together_when_one_of_them_fails() -> None:
    bench, family = Bench(streams=2, threads=2), Gated()
    family.faults["denoise"] = [InvalidRequest("no")]
    with bench.running():
        bench.loop.submit([bench.ticket(toy.student(family), "a", n=8, steps=4)])
        eventually(lambda: family.running == 2)  # of four rows each
        family.gate.set()
        eventually(lambda: bench.sink.errors)
        bench.loop.submit([bench.ticket(toy.student(family), "b")])
        eventually(lambda: bench.sink.pictures)
    assert set(bench.sink.errors) == {"a"}
    assert list(bench.sink.pictures) == [("b", 0)]


class Company(toy.ToyFamily):
    """Notes of each call how many rows it has and whether it is alone."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int, bool]] = []

    def embed(self, tokens: Any) -> Tensor:
        self.seen.append(("encode", len(tokens.counts), is_alone()))
        return super().embed(tokens)

    def denoise(self, x: Tensor, *given: Any, **named: Any) -> Tensor:
        self.seen.append(("denoise", len(x), is_alone()))
        return super().denoise(x, *given, **named)

    def decode(self, latents: Tensor) -> Tensor:
        self.seen.append(("decode", len(latents), is_alone()))
        return super().decode(latents)


def test_the_calls_of_a_lone_request_have_all_threads_and_say_so() -> None:
    bench, family = Bench(streams=2, threads=2), Company()
    with bench.running():
        bench.loop.submit([bench.ticket(toy.student(family), "a", steps=2)])
        eventually(lambda: bench.sink.pictures)
    assert family.seen == [("encode", 1, True), ("denoise", 1, True), ("denoise", 1, True), ("decode", 1, True)]
    assert bench.sink.lone == [True] * 4


def test_a_call_beside_which_another_runs_or_waits_is_not_alone() -> None:
    bench, gated, family = Bench(streams=2, threads=2), Gated(), Company()
    with bench.running():
        bench.loop.submit([bench.ticket(toy.student(gated), "a")])
        eventually(lambda: gated.running == 1)
        bench.loop.submit([bench.ticket(toy.student(family), "b")])
        eventually(lambda: ("b", 0) in bench.sink.pictures)
        gated.gate.set()
        eventually(lambda: len(bench.sink.pictures) == 2)
    assert [(stage, lone) for stage, _, lone in family.seen] == [("denoise", False), ("decode", False)]


def test_a_call_is_not_alone_while_others_wait_for_the_only_stream() -> None:
    bench, family = Bench(streams=1, threads=1), Company()
    with bench.running():
        bench.loop.submit([bench.ticket(toy.student(family), f"r{i}", prompt=f"prompt {i}") for i in range(40)])
        eventually(lambda: len(bench.sink.pictures) == 40)
    assert not family.seen[0][2]
    assert family.seen[-1][2]


def test_the_parts_of_a_lone_batch_that_was_refused_are_not_alone() -> None:
    bench, family = Bench(streams=2, threads=2), Company()
    family.faults["denoise"] = [InvalidRequest("no")]
    with bench.running():
        bench.loop.submit([bench.ticket(toy.student(family), name) for name in ("a", "b")])
        eventually(lambda: len(bench.sink.pictures) == 2)
    asked = [(rows, lone) for stage, rows, lone in family.seen if stage == "denoise"]
    assert asked == [(2, True), (1, False), (1, False)]
