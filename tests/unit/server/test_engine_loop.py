"""The engine thread: nothing is lost, one bad row fails alone, and live rows go before everything else."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from engines.errors import FewstepError, InternalError, InvalidRequest
from engines.manifest import Judge
from engines.refine import REDO
from engines.student import Aid, LoadedStudent, sample
from server.batcher import Batcher, LaneKey
from server.engine_loop import EngineLoop
from server.prompt_cache import PromptCache
from server.stages import Plans, Stages
from server.tickets import LatentRow, PictureRow, Ticket, prompts_of, rows_of
from tests.eventually import eventually
from tests.unit.server import toy


@dataclass
class Recorder:
    """A sink that remembers."""

    pictures: dict[tuple[str, int], Any] = field(default_factory=dict)
    partials: list[tuple[str, int]] = field(default_factory=list)
    errors: dict[str, FewstepError] = field(default_factory=dict)
    late: list[str] = field(default_factory=list)
    steps: list[tuple[str, int]] = field(default_factory=list)
    room: list[int] = field(default_factory=list)
    lone: list[bool] = field(default_factory=list)
    recalls: list[bool] = field(default_factory=list)
    death: BaseException | None = None
    on_step: Callable[[], None] = lambda: None

    def moved(self) -> None:
        self.room.append(1)

    def recalled(self, known: bool) -> None:
        self.recalls.append(known)

    def ran(self, rows: Sequence[Any], seconds: float, lone: bool) -> None:
        self.lone.append(lone)

    def stepped(self, rows: Sequence[PictureRow]) -> None:
        self.steps += [(row.request_id, row.step) for row in rows]
        self.on_step()

    def decoded(self, rows: Sequence[LatentRow], pixels: Any) -> None:
        for row, picture in zip(rows, pixels, strict=True):
            if row.partial_index is None:
                self.pictures[row.request_id, row.index] = torch.from_numpy(picture)
            else:
                self.partials.append((row.request_id, row.partial_index))

    def failed(self, ticket: Ticket, error: FewstepError) -> None:
        self.errors[ticket.id] = error

    def expired(self, ticket: Ticket) -> None:
        self.late.append(ticket.id)

    def died(self, error: BaseException) -> None:
        self.death = error


class Bench:
    """An engine loop and what it said. Its clock stands unless told."""

    def __init__(self, streams: int = 1, threads: int = 1) -> None:
        self.now_s = 0.0
        self.sink = Recorder()
        self.loop = EngineLoop(
            Stages(PromptCache(1 << 20)),
            Batcher((1, 2, 4)),
            self.sink,
            now_s=lambda: self.now_s,
            streams=lambda: streams,
            threads=threads,
        )

    def ticket(
        self,
        student: LoadedStudent,
        request_id: str,
        *,
        deadline_s: float = 60.0,
        least_s: Callable[[LaneKey], float] = lambda _: 0.0,
        aid: Aid | None = None,
        **given: Any,
    ) -> Ticket:
        claimed = toy.claim(student, request_id, **given)
        solver, by = Plans().solver(student, claimed.request.steps, claimed.request.guidance, aid), aid and aid.teacher
        times = {"due_s": 0.0, "deadline_s": deadline_s}
        return Ticket(claimed, student, solver.plan, solver, **times, least_s=least_s, teacher=by)

    @contextmanager
    def running(self) -> Iterator[None]:
        threads = [threading.Thread(target=self.loop.run) for _ in range(self.loop.threads)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self.loop.stop()
            for thread in threads:
                thread.join(5)
            assert not any(thread.is_alive() for thread in threads)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_every_picture_of_every_request_comes_and_is_right(bench: Bench) -> None:
    student = toy.student()
    tickets = [bench.ticket(student, f"r{i}", n=1 + i % 3, steps=(1, 2, 4)[i % 3], seed=i) for i in range(9)]
    with bench.running():
        bench.loop.submit(tickets)
        eventually(lambda: len(bench.sink.pictures) == 18)
    for i, ticket in enumerate(tickets):
        n, steps = ticket.claim.request.n, ticket.claim.request.steps
        alone = sample(student, ["a red circle"] * n, range(i, i + n), steps)
        assert all(torch.equal(bench.sink.pictures[ticket.id, k], alone[k]) for k in range(n))


def test_a_kept_picture_makes_room_at_once_and_which_were_redone_is_known(bench: Bench) -> None:
    teacher = toy.student(toy.ToyFamily(slope=0.3), name="teacher", weights="t", guided=True)
    made = toy.student(toy.ToyFamily(slope=0.7), base=teacher.version, eta=1.0)
    judge = Judge(steps=4, doubts={2: (0.35,) * 10})
    student, aid = replace(made, manifest=made.manifest.judged(judge)), Aid(teacher, REDO)
    ticket = bench.ticket(student, "r", aid=aid, steps=2, n=3, seed=7, partial_images=3)
    room: list[tuple[int, int]] = []
    bench.sink.on_step = lambda: room.append((len(bench.sink.steps), ticket.rows_left))
    with bench.running():
        bench.loop.submit([ticket])
        eventually(lambda: sum(key[0] == "r" for key in bench.sink.pictures) == 3)
    alone = sample(student, ["a red circle"] * 3, [7, 8, 9], 2, aid=aid)
    assert all(torch.equal(bench.sink.pictures["r", k], alone[k]) for k in range(3))
    assert (ticket.redone, ticket.rows_left) == ({1, 2}, 0)
    assert [left for _, left in room][:3] == [3, 3, 2]  # the first of the three ends two steps before its plan


def test_what_comes_while_the_thread_calls_is_admitted_beside_the_call(bench: Bench) -> None:
    called, go_on = threading.Event(), threading.Event()

    def call() -> None:
        called.set()
        go_on.wait(5)

    with bench.running():
        bench.loop.background(call)
        called.wait(5)
        bench.loop.submit([bench.ticket(toy.student(), "r")])
        recalled = list(bench.sink.recalls)
        go_on.set()
        eventually(lambda: bench.sink.pictures)
    assert recalled == [False]


def test_a_picture_is_handed_over_when_the_next_step_is_prepared_not_when_it_is_done(bench: Bench) -> None:
    there: list[int] = []

    class Watched(toy.ToyFamily):
        def denoise(self, *given: Any, **named: Any) -> torch.Tensor:
            there.append(len(bench.sink.pictures))
            return super().denoise(*given, **named)

    student = toy.student(Watched())
    with bench.running():
        bench.loop.submit([bench.ticket(student, "short", steps=1), bench.ticket(student, "long", steps=2)])
        eventually(lambda: len(bench.sink.pictures) == 2)
    assert there == [0, 1]


def test_whoever_brings_a_request_does_not_wait_for_what_the_thread_is_about(bench: Bench) -> None:
    first, second = (bench.ticket(toy.student(), name, steps=1) for name in "ab")
    brought = threading.Thread(target=bench.loop.submit, args=([second],))

    def bring() -> None:
        if first.id == bench.sink.steps[-1][0]:
            brought.start()
            brought.join(5)
            bench.sink.room.append(-int(brought.is_alive()))

    bench.sink.on_step = bring  # with the loop's lock
    with bench.running():
        bench.loop.submit([first])
        eventually(lambda: len(bench.sink.pictures) == 2)
    assert -1 not in bench.sink.room


def least_s(lane: LaneKey) -> float:
    return {"encode": 0.5, "denoise": 1.0, "decode": 0.25}[lane.stage]


def test_what_a_request_needs_at_least_is_what_the_quickest_calls_took_of_its_steps(bench: Bench) -> None:
    teacher = toy.student(toy.ToyFamily(slope=0.3), name="teacher", weights="t", guided=True)
    made = toy.student(toy.ToyFamily(slope=0.7), base=teacher.version, eta=1.0)
    judge = Judge(steps=4, doubts={2: (0.35,) * 10})
    student = replace(made, manifest=made.manifest.judged(judge))
    plain = bench.ticket(student, "r", steps=4, least_s=least_s)
    assert plain.needs_s == [4.25, 3.25, 2.25, 1.25, 0.25]
    assert [row.needs_s for row in (*prompts_of(plain), *rows_of(plain))] == [4.75, 4.25]
    redone = bench.ticket(student, "r", steps=2, aid=Aid(teacher, REDO), least_s=least_s)
    assert redone.needs_s[0] == 3.25  # its fourth step is for pictures that are doubted


def test_a_request_that_cannot_be_in_time_is_given_up_before_its_next_call(bench: Bench) -> None:
    student = toy.student()
    late = bench.ticket(student, "late", steps=4, seed=1, deadline_s=4.7, least_s=least_s)
    good = bench.ticket(student, "good", steps=4, seed=2, deadline_s=4.8, least_s=least_s)
    with bench.running():
        bench.loop.submit([late, good])
        eventually(lambda: bench.sink.pictures)
    assert bench.sink.late == ["late"]
    assert set(bench.sink.steps) == {("good", 1), ("good", 2), ("good", 3), ("good", 4)}


def test_a_row_joins_those_that_are_under_way(bench: Bench) -> None:
    family = toy.ToyFamily()
    student = toy.student(family)
    late = bench.ticket(student, "late", steps=1)
    bench.sink.on_step = lambda: bench.loop.submit([late]) if len(bench.sink.steps) == 1 else None
    with bench.running():
        bench.loop.submit([bench.ticket(student, "early", steps=4)])
        eventually(lambda: len(bench.sink.pictures) == 2)
    assert [rows for stage, rows in family.calls if stage == "denoise"] == [1, 2, 1, 1]
    assert list(bench.sink.pictures) == [("late", 0), ("early", 0)]


def test_rows_of_different_experts_share_no_call_and_each_step_asks_its_own(bench: Bench) -> None:
    high, low = "denoiser", "denoiser_2"
    nets = {1: (high,), 2: (high, low), 4: (high, high, low, low)}
    family = toy.ToyFamily(slopes={high: 0.5, low: -0.3})
    student = toy.student(family, nets=nets)
    with bench.running():
        bench.loop.submit([bench.ticket(student, f"r{k}", steps=k, seed=k) for k in nets])
        eventually(lambda: len(bench.sink.pictures) == 3)
    asked = {net: sum(rows for name, rows in family.nets if name == net) for net in (high, low)}
    assert asked == {high: 1 + 1 + 2, low: 1 + 2}
    assert (high, 3) in family.nets  # those of one expert do share a call
    for k in nets:
        alone = sample(student, ["a red circle"], [k], k)[0]
        assert torch.equal(bench.sink.pictures[f"r{k}", 0], alone)
        other = sample(toy.student(toy.ToyFamily(slopes={high: -0.3, low: 0.5}), nets=nets), ["a red circle"], [k], k)
        assert not torch.equal(other[0], alone)


def test_a_canceled_request_takes_no_further_step(bench: Bench) -> None:
    student = toy.student()
    gone = bench.ticket(student, "gone", steps=4, n=2)
    bench.sink.on_step = lambda: bench.loop.drop([gone])
    with bench.running():
        bench.loop.submit([gone, bench.ticket(student, "kept", steps=4)])
        eventually(lambda: len(bench.sink.pictures) == 1)
    assert [step for name, step in bench.sink.steps if name == "gone"] == [1, 1]
    assert list(bench.sink.pictures) == [("kept", 0)]


def test_a_request_that_is_dropped_before_it_comes_never_begins(bench: Bench) -> None:
    family = toy.ToyFamily()
    student = toy.student(family)
    dropped, other = bench.ticket(student, "dropped", prompt="a ring"), bench.ticket(student, "other")
    bench.loop.drop([dropped])
    bench.loop.submit([dropped, other])
    with bench.running():
        eventually(lambda: len(bench.sink.pictures) == 1)
    assert family.calls == [("encode", 1), ("denoise", 1), ("decode", 1)]


def test_a_request_is_over_too_when_all_of_it_has_left_the_engines(bench: Bench) -> None:
    dropped, failing = (bench.ticket(toy.student(), name) for name in ("dropped", "failing"))
    with bench.running():
        bench.loop.submit([dropped, failing])
        eventually(lambda: len(bench.sink.pictures) == 2)
        bench.loop.drop([dropped])
        for _ in range(2):  # one of its pictures after the other
            bench.loop.fail(failing, InternalError("the encoder of mp4 failed"))
        eventually(lambda: dropped.over and failing.over)
    assert {name: error.code for name, error in bench.sink.errors.items()} == {"failing": "internal_error"}


def test_a_request_past_its_deadline_leaves_between_two_steps(bench: Bench) -> None:
    def tick() -> None:
        bench.now_s += 1.0

    bench.sink.on_step = tick
    with bench.running():
        bench.loop.submit(
            [bench.ticket(toy.student(), "late", steps=4, deadline_s=2.0), bench.ticket(toy.student(), "ok", steps=4)]
        )
        eventually(lambda: bench.sink.pictures)
    assert bench.sink.late == ["late"]
    assert max(step for name, step in bench.sink.steps if name == "late") == 2


def test_a_row_that_fails_fails_its_request_alone(bench: Bench) -> None:
    family = toy.ToyFamily(faults={"denoise": [InvalidRequest("in the batch"), InvalidRequest("alone")]})
    student = toy.student(family)
    with bench.running():
        bench.loop.submit([bench.ticket(student, name) for name in ("bad", "good", "fine")])
        eventually(lambda: len(bench.sink.pictures) == 2)
    assert {name: error.message for name, error in bench.sink.errors.items()} == {"bad": "alone"}
    assert {name for name, _ in bench.sink.pictures} == {"good", "fine"}


def test_a_picture_that_is_not_finite_fails_its_request_alone(bench: Bench) -> None:
    class Broken(toy.ToyFamily):
        def denoise(self, x: Any, *args: Any, **named: Any) -> Any:
            pred = super().denoise(x, *args, **named)
            pred[0] = float("nan")
            return pred

    student = toy.student(Broken())
    with bench.running():
        bench.loop.submit([bench.ticket(student, "bad"), bench.ticket(student, "good")])
        eventually(lambda: bench.sink.pictures)
    assert list(bench.sink.errors) == ["bad"]
    assert isinstance(bench.sink.errors["bad"], InternalError)
    assert list(bench.sink.pictures) == [("good", 0)]


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_a_batch_too_large_for_the_memory_is_split(bench: Bench, error: BaseException) -> None:
    family = toy.ToyFamily(faults={"denoise": [error, error]})
    student = toy.student(family)
    tickets = [bench.ticket(student, name) for name in "abcd"]
    with bench.running():
        bench.loop.submit(tickets)
        eventually(lambda: len(bench.sink.pictures) == 4)
    assert [ticket.rows_left for ticket in tickets] == [0, 0, 0, 0]
    assert [rows for stage, rows in family.calls if stage == "denoise"] == [4, 2, 1, 1, 2]
    assert bench.sink.errors == {}


def test_a_single_row_too_large_for_the_memory_is_answered(bench: Bench) -> None:
    student = toy.student(toy.ToyFamily(faults={"decode": [MemoryError()]}))
    with bench.running():
        bench.loop.submit([bench.ticket(student, "big")])
        eventually(lambda: bench.sink.errors)
    assert "memory" in bench.sink.errors["big"].message


def test_an_error_that_nobody_foresaw_ends_the_thread_and_says_so(bench: Bench) -> None:
    student = toy.student(toy.ToyFamily(faults={"denoise": [ZeroDivisionError()]}))
    with bench.running():
        bench.loop.submit([bench.ticket(student, "a")])
        eventually(lambda: bench.sink.death)
    assert isinstance(bench.sink.death, ZeroDivisionError)


def test_work_behind_waits_for_live_rows_and_its_errors_go_to_whoever_asked(bench: Bench) -> None:
    student, order = toy.student(), list[str]()
    bench.sink.on_step = lambda: order.append("step")
    bench.loop.submit([bench.ticket(student, "a", steps=4)])
    done = bench.loop.background(lambda: order.append("behind"))
    failed = bench.loop.background(lambda: 1 / 0)
    with bench.running():
        done.result(5)
        with pytest.raises(ZeroDivisionError):
            failed.result(5)
    assert order == ["step"] * 4 + ["behind"]
    assert bench.sink.death is None


def test_work_behind_is_not_starved_by_endless_traffic(bench: Bench) -> None:
    student, count = toy.student(), iter(range(10**6))

    def more() -> None:
        bench.loop.submit([bench.ticket(student, f"r{next(count)}")])

    bench.sink.on_step = more
    with bench.running():
        more()
        assert bench.loop.background(lambda: "done").result(5) == "done"
        bench.sink.on_step = lambda: None


def test_a_row_in_its_last_step_makes_room_before_it_ends(bench: Bench) -> None:
    seen = list[int]()
    ticket = bench.ticket(toy.student(), "a", steps=2, n=2)
    bench.sink.on_step = lambda: seen.append(ticket.rows_left)
    assert ticket.rows_left == 2
    with bench.running():
        bench.loop.submit([ticket])
        eventually(lambda: len(bench.sink.pictures) == 2)
    assert seen == [2, 0]
    assert len(bench.sink.room) == 1


def test_partial_pictures_are_decoded_on_the_way(bench: Bench) -> None:
    with bench.running():
        ticket = bench.ticket(toy.student(), "a", steps=4, partial_images=2)
        bench.loop.submit([ticket])
        eventually(lambda: bench.sink.pictures)
    assert bench.sink.partials == [("a", 0), ("a", 1)]
    assert ticket.shows == 2  # so many have to leave before the answer


def test_the_time_of_each_stage_is_in_the_ticket(bench: Bench) -> None:
    ticket = bench.ticket(toy.student(), "a", steps=4)
    with bench.running():
        bench.loop.submit([ticket])
        eventually(lambda: bench.sink.pictures)
    assert min(ticket.encode_s, ticket.denoise_s, ticket.decode_s) > 0
    assert ticket.begun_s == 0.0


def test_what_is_cached_of_an_encoder_goes_with_it(bench: Bench) -> None:
    student = toy.student()
    cache = bench.loop._stages.cache
    with bench.running():
        bench.loop.submit([bench.ticket(student, "r1")])
        eventually(lambda: len(bench.sink.pictures) == 1)
        assert len(cache) == 1
        bench.loop.forget([toy.sha("another")])
        bench.loop.background(lambda: None).result(5)
        assert len(cache) == 1
        bench.loop.forget([student.manifest.components["encoder"].weights])
        bench.loop.background(lambda: None).result(5)
    assert len(cache) == 0
