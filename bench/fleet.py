"""What a simulation is told and tells: requests, the measured costs of workers, and what may be decided otherwise."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from engines.cost import CostKey, CostModel
from server.batcher import STRETCH, Batcher, CostOf, Row, Stage, due
from server.fair_queue import FairQueue
from server.messages import RequestClass, class_of

Ending = Literal["succeeded", "expired", "canceled", "shed"]
STAGES: tuple[Stage, ...] = ("encode", "denoise", "decode")


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Asked:
    """A request as it comes. Requests of one `model` share calls; a guided step (`network_rows` 2) weighs two."""

    at_s: float
    steps: int
    model: str = "student"
    network_rows: int = 1
    n: int = 1
    owner: str = "anonymous"
    priority: int = 0
    budget_s: float = 60.0
    leaves_s: float | None = None  # seconds after it came, its client goes away
    prompt_known: bool = False  # its embedding is cached

    @property
    def request_class(self) -> RequestClass:
        return class_of(self.priority)


@dataclass(slots=True, eq=False)
class Told:
    """What became of a request. Times are seconds of the simulation's clock."""

    id: str
    asked: Asked
    claimed_s: float | None = None
    queued_s: float = 0.0  # predicted engine seconds of its rows in large batches
    ending: Ending | None = None
    ended_s: float = 0.0
    worker: int | None = None
    missing: int = 0  # prompts that are not encoded yet
    evaluations: int = 0  # network rows that ran
    decoded: int = 0  # pictures

    @property
    def latency_s(self) -> float:
        return self.ended_s - self.asked.at_s


@dataclass(slots=True, eq=False, kw_only=True)
class SimRow(Row):
    """A row whose engine calls take time and make nothing."""

    told: Told
    step: int = 0  # steps done


Slack = Callable[[Told, int], float]
"""In how many seconds a row should be done that has so many steps behind it."""
Decide = Callable[[tuple[int, ...], CostOf], Batcher[SimRow]]


def production(told: Told, _step: int, stretch: float = STRETCH) -> float:
    asked = told.asked
    return due(
        arrived_s=0.0,
        deadline_s=asked.budget_s,
        cost_s=told.queued_s,
        priority=asked.priority,
        ageing_s=1.0,
        stretch=stretch,
    )


@dataclass(frozen=True, slots=True)
class Policy:
    """What may be decided otherwise than in production, for comparisons; the defaults are production."""

    slack: Slack = production
    queue: Callable[[], FairQueue[Told]] = FairQueue
    batcher: Decide = Batcher
    giving_up: bool = True  # a row that cannot be in time any more leaves
    urgency: bool = True  # admission knows that what is less urgent comes later
    overtaking: bool = True  # what is more urgent than something held may use the place that is kept for class high


@dataclass(frozen=True, slots=True)
class Fleet:
    """Workers of one deployment that share its queue, each with `streams` engine calls at once.

    `costs` are those of a call that has the threads of all streams, `overlapped` those of one while all other streams
    run too; without them both are taken to be the same. `max_wait_s` None admits everybody.
    """

    costs: CostModel
    workers: int = 1
    sizes: tuple[int, ...] = (1, 2, 4, 8)
    max_wait_s: float | None = None
    streams: int = 1
    overlapped: CostModel | None = None

    @property
    def busy(self) -> CostModel:
        """What calls take where all streams run."""
        return self.overlapped or self.costs

    def padded(self, rows: int) -> int:
        """The size that so many network rows run at."""
        return min((each for each in self.sizes if each >= rows), default=self.sizes[-1])

    def seconds(self, stage: Stage, rows: int) -> float:
        """A lone call with so many network rows, padded."""
        return self._recorded_s(self.costs, stage, rows)

    def busy_s(self, stage: Stage, rows: int) -> float:
        """One while all streams run."""
        return self._recorded_s(self.busy, stage, rows)

    def alone_s(self, asked: Asked) -> float:
        """A request of one picture on an idle worker."""
        encode = 0.0 if asked.prompt_known else self.seconds("encode", asked.network_rows)
        return encode + asked.steps * self.seconds("denoise", asked.network_rows) + self.seconds("decode", 1)

    def least_s(self, stage: Stage) -> float:
        """The quickest call of a stage."""
        return min(self.seconds(stage, size) for size in self.sizes)

    def queued_s(self, asked: Asked) -> float:
        """As gateways predict it: each row's share of the largest batches, as many as run at once."""
        largest = self.sizes[-1]
        evaluations = asked.steps * asked.network_rows
        row_s = self.busy_s("encode", largest) + self.busy_s("decode", largest)
        return asked.n * (row_s + evaluations * self.busy_s("denoise", largest)) / (largest * self.streams)

    def _recorded_s(self, costs: CostModel, stage: Stage, rows: int) -> float:
        found = costs.seconds(CostKey(stage, stage, ()), self.padded(rows))
        assert found is not None, f"the recorded costs have no {stage} of {rows} rows"
        return found
