"""A swap beside requests that never pause: what it puts between two live steps is counted in engine calls, not time."""

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from engines.artefact import make_student
from engines.backends.base import Choice, Profile
from engines.backends.eager import Compiled, Eager, EagerEngine
from engines.graph import GraphStore
from engines.loader import Loader
from engines.manifest import Guidance
from engines.parts import load_weights
from engines.registry.base import Registry
from engines.slot import EngineSlot
from engines.student import LoadedStudent
from server import metrics
from server.batcher import Batcher
from server.engine_loop import EngineLoop
from server.prompt_cache import PromptCache
from server.residency import Residency
from server.residents import Residents
from server.room import Room
from server.stages import Plans, Stages
from server.tickets import LatentRow, Ticket
from tests import tiny_sd
from tests.eventually import eventually
from tests.integration.worker_stack import MODEL, copied
from tests.unit.server import toy
from tests.unit.server.test_engine_loop import Recorder

SIZES = (1, 2, 4)
UNDER_WAY = 4 * SIZES[-1]


class Heard(EagerEngine):
    """Tells each call."""

    calls: list[str]

    def run(self, **inputs: Tensor) -> dict[str, Tensor]:
        self.calls.append("call")
        return super().run(**inputs)


class Hearing(Eager):
    def __init__(self, calls: list[str]) -> None:
        self._calls = calls

    def load(self, compiled: Compiled, weights: Mapping[str, Tensor]) -> EagerEngine:
        made = super().load(compiled, weights)
        heard = Heard(compiled.graph, made.module, compiled.profile.device)
        heard.calls = self._calls
        return heard


class Saturated(Recorder):
    """For each picture that is done asks for another, so that rows wait after every step, until it is told to stop."""

    def __init__(self, student: LoadedStudent, calls: list[str]) -> None:
        super().__init__()
        self._student, self._plans = student, Plans()
        self.calls, self.asked, self.stopped = calls, 0, False
        self.loop = EngineLoop(Stages(PromptCache(1 << 20)), Batcher(SIZES), self, now_s=time.monotonic)

    def begin(self) -> None:
        self.loop.submit([self._ticket() for _ in range(UNDER_WAY)])

    def ran(self, rows: Sequence[Any], seconds: float, lone: bool) -> None:
        self.calls.append("live")

    def decoded(self, rows: Sequence[LatentRow], pixels: Any) -> None:
        super().decoded(rows, pixels)
        if not self.stopped:
            self.loop.submit([self._ticket() for _ in rows])

    def _ticket(self) -> Ticket:
        self.asked += 1
        claimed = toy.claim(self._student, f"r{self.asked}", steps=4, width=16, height=16)
        solver = self._plans.solver(self._student, 4, None)
        now_s = time.monotonic()
        return Ticket(claimed, self._student, solver.plan, solver, due_s=now_s, deadline_s=now_s + 600)


def weighted(registry: Registry) -> str:
    """On a graph of its own, so that it is warmed too."""
    base = tiny_sd.teacher().manifest
    guidance = Guidance(mode="embedded", default=2.0, minimum=1.0, maximum=4.0)
    weights = load_weights(registry, base.components["denoiser"])
    made = {"denoiser_weights": weights, "schedules": tiny_sd.SCHEDULES, "guidance": guidance}
    return make_student(registry, base.version, "weighted", inputs=("w",), **made)


async def test_a_swap_puts_one_piece_between_two_steps_of_a_worker_that_never_pauses() -> None:
    calls: list[str] = []
    registry = copied(tiny_sd.teacher())
    slot = EngineSlot(Loader(registry, Choice("eager", "fp32"), Profile(SIZES, threads=1), GraphStore(None)))
    slot.loader._backend = Hearing(calls)
    serving, version = tiny_sd.teacher().version, weighted(registry)
    slot.stage([serving]).run()
    slot.switch([serving])
    sink = Saturated(slot.family(serving), calls)
    thread = threading.Thread(target=sink.loop.run)
    thread.start()
    try:
        sink.begin()
        eventually(lambda: len(sink.pictures) >= SIZES[-1], 20)
        begun = len(calls)
        room = Room(Residency(2**40), metrics.make())
        await Residents(MODEL, slot, sink.loop, room, lambda *_: None).load([version], beside=True)
        during = calls[begun:]
        sink.stopped = True
        eventually(lambda: len(sink.pictures) == sink.asked, 20)
    finally:
        sink.loop.stop()
        thread.join(10)
    assert slot.versions == {serving, version}
    assert sink.errors == {}
    behind = [len(part.split()) - 1 for part in " ".join(during).split("live")[1:-1]]  # beside the live call itself
    assert max(behind) == 1
    assert sum(behind) >= 15  # 6 calls warm three sizes and 18 draw golden samples; a few fall to the ends cut off
    assert during.count("live") >= sum(behind)
