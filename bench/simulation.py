"""The whole scheduler on recorded costs: a discrete-event simulation around the code that decides in production.

Arrivals go through `admit` into the queues that brokers keep (`FairQueue`, `take`), `room` says what each worker may
claim, and `Turns` with its `Batcher` what each of its streams runs. Simulated are only the engines, which take what was
recorded of lone calls and of calls beside others, and the clock. What the simulation leaves out: everything outside
engine calls (HTTP, Redis, image bytes) takes no time, but for what the recorded costs have of it.
"""

import heapq
from collections.abc import Callable, Iterable
from functools import partial
from itertools import count

from bench.fleet import Asked, Ending, Fleet, Policy, SimRow, Told
from bench.simulated_worker import Call, Worker
from engines.errors import Overloaded
from server.admission import Limits, Load, admit
from server.batcher import LaneKey, Stage
from server.fair_queue import Source, Waiting, in_turn, passed_s, take
from server.intake import Room
from server.messages import CLASSES, RequestClass
from server.urgency import Urgency

Then = Callable[[Told], Iterable[Asked]]
"""What its client asks when a request has ended."""


class Simulation:
    """`run` once. `calls` counts engine calls; `wasted_s` are the seconds of idle workers while a request waited."""

    def __init__(self, fleet: Fleet, policy: Policy = Policy()) -> None:  # noqa: B008 - frozen
        self.fleet, self.policy = fleet, policy
        self.now_s = 0.0
        self.calls, self.wasted_s = 0, 0.0
        self._queues = {each: policy.queue() for each in CLASSES}
        self._waiting = 0  # requests in the queues
        self._owed_s: dict[RequestClass, dict[str, float]] = {each: {} for each in CLASSES}  # predicted, by owner
        self._urgency = {each: Urgency() for each in CLASSES}
        self._workers = [Worker(i, fleet, policy.batcher) for i in range(fleet.workers)]
        self._idle = dict.fromkeys(self._workers)
        self._open = dict.fromkeys(self._workers)  # those with room for every class, longest waiting first
        self._reserved: dict[Worker, None] = {}  # those with room for class high and what overtakes
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number, self._turn, self._claimed = count(), 1, count()
        self._told: list[Told] = []
        self._then: Then = lambda _: ()

    def run(self, asked: Iterable[Asked], then: Then | None = None) -> list[Told]:
        """Every request with its end, in the order in which they were asked; a closed loop asks again by `then`."""
        self._then = then or self._then
        for each in asked:
            self._ask(each)
        while self._events:
            at_s, _, happen = heapq.heappop(self._events)
            if self._waiting:
                self.wasted_s += (at_s - self.now_s) * len(self._idle)
            self.now_s = at_s
            happen()
        return self._told

    def _ask(self, asked: Asked) -> None:
        told = Told(str(len(self._told)), asked)
        self._told.append(told)
        self._at(asked.at_s, partial(self._arrive, told))

    def _at(self, at_s: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._events, (at_s, next(self._number), happen))

    # --- requests --------------------------------------------------------------------------------

    def _arrive(self, told: Told) -> None:
        asked, fleet = told.asked, self.fleet
        told.queued_s = fleet.queued_s(asked)
        if not self._admitted(told):
            self._over(told, "shed")
            return
        slack_s = self.policy.slack(told, 0)
        self._owe(asked, told.queued_s)
        self._urgency[asked.request_class].add(told.id, slack_s, told.queued_s, self.now_s + asked.budget_s)
        waiting = Waiting(told, asked.owner, asked.n, self.now_s, slack_s, told.queued_s)
        self._queues[asked.request_class].add(waiting)
        self._waiting += 1
        self._at(self.now_s + asked.budget_s, partial(self._give_up, told, "expired"))
        if asked.leaves_s is not None:
            self._at(self.now_s + asked.leaves_s, partial(self._give_up, told, "canceled"))
        self._offer()

    def _admitted(self, told: Told) -> bool:
        fleet, asked = self.fleet, told.asked
        if fleet.max_wait_s is None:
            return True
        above = CLASSES[: CLASSES.index(asked.request_class)]
        mine = self._owed_s[asked.request_class]
        owed_s = sum(mine.values()) - passed_s(mine, asked.owner, told.queued_s)
        if self.policy.urgency:
            owed_s *= 1 - self._urgency[asked.request_class].later_share(self.policy.slack(told, 0), self.now_s)
        owed_s += sum(sum(self._owed_s[each].values()) for each in above)
        load = Load(fleet.workers, owed_s / fleet.workers, fleet.alone_s(asked))
        try:
            admit(load, Limits(fleet.max_wait_s, worker_grace_s=0.0), budget_s=asked.budget_s)
        except Overloaded:
            return False
        return True

    def _owe(self, asked: Asked, cost_s: float) -> None:
        owed = self._owed_s[asked.request_class]
        owed[asked.owner] = owed.get(asked.owner, 0.0) + cost_s

    def _due_s(self, told: Told, step: int) -> float:
        """As the worker has it: counted from the claim."""
        deadline_s = told.asked.at_s + told.asked.budget_s
        return min(deadline_s, (told.claimed_s or 0.0) + self.policy.slack(told, step))

    def _give_up(self, told: Told, ending: Ending) -> None:
        """Its time is over, or its client has gone. What runs of it now ends with its call."""
        if told.ending is not None:
            return
        if told.worker is None:
            self._queues[told.asked.request_class].remove(told, told.asked.owner)
            self._waiting -= 1
        self._end(told, ending)
        self._offer()

    def _over(self, told: Told, ending: Ending) -> None:
        told.ending, told.ended_s = ending, self.now_s
        for asked in self._then(told):
            self._ask(asked)

    def _end(self, told: Told, ending: Ending) -> None:
        self._over(told, ending)
        self._owe(told.asked, -told.queued_s)
        self._urgency[told.asked.request_class].remove(told.id)
        if told.worker is not None:
            worker = self._workers[told.worker]
            worker.turns.batcher.remove([told.id])
            worker.held.pop(told, None)
            self._listen(worker)

    # --- workers ---------------------------------------------------------------------------------

    def _offer(self) -> None:
        """Gives what waits to those that have room for it."""
        while self._waiting and (worker := next(iter(self._open), None)):
            self._claim(worker)
        for worker in list(self._reserved) if self._waiting else ():
            self._claim(worker)

    def _claim(self, worker: Worker) -> None:
        now = self._room(worker)
        sources = [Source(self._queues[each], below=each != "high") for _, each in in_turn(self._turn, ("",))]
        overtaking = self.policy.overtaking and now.slack_below_ms is not None
        slack_s = (now.slack_below_ms or 0) / 1000 if overtaking else float("-inf")
        taken = take(sources, now.rows, max(0, now.below_high), slack_s)
        self._turn += bool(taken and now.below_high > 0)
        for one in taken:
            self._waiting -= 1
            self._admit(worker, one.key)
        self._listen(worker, last=True)
        self._turn_of(worker)

    def _room(self, worker: Worker) -> Room:
        return worker.room(self.now_s, lambda told: self._due_s(told, 0))

    def _admit(self, worker: Worker, told: Told) -> None:
        asked = told.asked
        told.worker, told.claimed_s = worker.number, self.now_s + next(self._claimed) % 1000 * 1e-6
        worker.held[told] = asked.n
        if not asked.prompt_known:
            told.missing = asked.network_rows  # a guided request has two
            for _ in range(told.missing):
                worker.turns.batcher.add(self._row(told, "encode"))
        self._join(worker, told)

    def _join(self, worker: Worker, told: Told) -> None:
        if not told.missing and told.ending is None:
            for _ in range(told.asked.n):
                worker.turns.batcher.add(self._row(told, "denoise"))

    def _row(self, told: Told, stage: Stage) -> SimRow:
        network = LaneKey("denoise", told.asked.model)
        return SimRow(
            request_id=told.id,
            lane=network if stage == "denoise" else LaneKey(stage, stage),
            due_s=self._due_s(told, told.asked.steps if stage == "decode" else 0),
            deadline_s=told.asked.at_s + told.asked.budget_s,
            needs_s=self._needs_s(stage, told.asked.steps),
            network_rows=told.asked.network_rows if stage == "denoise" else 1,
            feeds=network if stage == "encode" else None,
            told=told,
        )

    def _needs_s(self, stage: Stage, steps: int) -> float:
        """The least that a row takes which is at this stage, with so many steps to do."""
        if not self.policy.giving_up:
            return 0.0
        least_s = self.fleet.least_s
        first_s = least_s("encode") if stage == "encode" else 0.0
        return first_s + (0 if stage == "decode" else steps) * least_s("denoise") + least_s("decode")

    def _listen(self, worker: Worker, *, last: bool = False) -> None:
        """Puts a worker among those that wait for requests it has room for; `last` behind the others."""
        now = self._room(worker)
        if last or now.below_high <= 0:
            self._open.pop(worker, None)
        if last or now.rows <= 0 or now.below_high > 0:
            self._reserved.pop(worker, None)
        if now.below_high > 0:
            self._open.setdefault(worker)
        elif now.rows > 0:
            self._reserved.setdefault(worker)

    def _turn_of(self, worker: Worker) -> None:
        """Begins calls on a worker's free streams."""
        for row in worker.turns.batcher.expire(self.now_s):
            self._give_up(row.told, "expired")
        begun = False
        while call := worker.begin(self.now_s):
            begun = True
            self.calls += 1
            for row in call.rows:
                told = row.told
                if row.lane.stage == "denoise" and row.step + 1 == told.asked.steps:
                    worker.held[told] -= 1
        for at_s, call in worker.reckon(self.now_s):
            self._at(at_s, partial(self._called, worker, call, call.reckoned))
        if worker.calls:
            self._idle.pop(worker, None)
        else:
            self._idle.setdefault(worker)
        if begun:
            self._listen(worker)

    def _called(self, worker: Worker, call: Call, reckoned: int) -> None:
        """A step boundary, if nothing has changed since it was reckoned."""
        if call.reckoned != reckoned:
            return
        worker.end(call, self.now_s)
        for row in call.rows:
            if row.told.ending is None:
                self._advance(worker, row)
        self._offer()
        self._turn_of(worker)
        self._offer()  # rows in their last step have made room

    def _advance(self, worker: Worker, row: SimRow) -> None:
        told, stage = row.told, row.lane.stage
        if stage == "encode":
            told.missing -= 1
            self._join(worker, told)
        elif stage == "denoise":
            row.step += 1
            told.evaluations += row.network_rows
            row.due_s = self._due_s(told, row.step)
            row.needs_s = self._needs_s("denoise", told.asked.steps - row.step)
            worker.turns.batcher.add(row if row.step < told.asked.steps else self._row(told, "decode"))
        else:
            told.decoded += 1
            if told.decoded == told.asked.n:
                self._end(told, "succeeded")
