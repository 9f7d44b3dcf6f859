"""A claimed request inside a worker, and its rows between engine calls."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import prod

from torch import Tensor

from engines.editing import Edit, Looked
from engines.manifest import Step, shown
from engines.noise import noise
from engines.solvers import Solver, State
from engines.student import LoadedStudent
from server.batcher import LaneKey, Row
from server.brokers.base import Claim
from server.messages import ErrorBody, GenerateResult, Refined, Timing
from server.metrics import Metrics
from server.prompt_cache import Embedding
from server.request_trace import RequestTrace
from server.sources import Source

_SEEDS = 2**63


@dataclass(slots=True, eq=False)
class Ticket:
    """One claim: what it needs, what is done of it, and where its time went (seconds).

    `teacher` takes the steps that the plan says are its. `least_s`: what the quickest call of a lane took.
    """

    claim: Claim
    student: LoadedStudent
    plan: tuple[Step, ...]
    solver: Solver
    due_s: float
    deadline_s: float
    least_s: Callable[[LaneKey], float] = lambda _lane: 0.0
    teacher: LoadedStudent | None = None
    source: Source | None = None  # what is changed
    looked: Looked | None = None  # and what the VAE sees of it
    drawn: list[State] = field(default_factory=list)  # see `draw`
    missing: int = 0  # prompts, and the picture to change, that are not encoded yet
    prompt: Embedding | None = None
    negative: Embedding | None = None  # of guided requests
    images: list[bytes | None] = field(default_factory=list)
    rows_left: int = 0  # rows with an engine step after the one that runs now
    begun_s: float | None = None  # broker's clock, first engine call
    encode_s: float = 0.0
    denoise_s: float = 0.0
    decode_s: float = 0.0
    image_s: float = 0.0
    redone: set[int] = field(default_factory=set)  # pictures that the teacher makes again
    load_s: float = 0.0  # it waited so long for its version to be loaded
    shows: int = 0  # partial pictures that were taken on the way
    shown: int = 0  # and of these, those that have left
    over: bool = False  # answered, or given up: what still runs of it is dropped
    trace: RequestTrace | None = None  # of a sampled request
    needs_s: list[float] = field(init=False)
    """By step, the least that is left to do from there on takes; of the last, the decoder."""

    def __post_init__(self) -> None:
        calls_s = [0.0 if step.share < 1 else self.least_s(self.lane(i)) for i, step in enumerate(self.plan)]
        decoded_s = self.least_s(self.decode_lane(self.lane(self.first).shape))
        self.needs_s = [*accumulate(reversed(calls_s), initial=decoded_s)][::-1]
        self.images = [None] * self.claim.request.n
        self.rows_left = self.claim.request.n

    @property
    def id(self) -> str:
        return self.claim.request.id

    @property
    def whole(self) -> bool:
        """Every picture is here, and every partial one has left before."""
        return self.shown == self.shows and all(image is not None for image in self.images)

    @property
    def guided(self) -> bool:
        """Whether some step is two rows: a network that reads its weight is asked once, and for no other prompt."""
        return any(
            step.w is not None and self.performer(i).manifest.guidance.mode == "cfg" for i, step in enumerate(self.plan)
        )

    @property
    def first(self) -> int:
        """The first step that is taken."""
        return self.claim.request.edits_from or 0

    def performer(self, i: int) -> LoadedStudent:
        """Whose network takes step `i`."""
        return self.teacher if self.teacher and self.plan[i].by_teacher else self.student

    def lane(self, i: int) -> LaneKey:
        """Of step `i`. Rows share a call if the same weights answer them: never the step count, tier or guidance."""
        request, manifest = self.claim.request, self.performer(i).manifest
        engine = ":".join((manifest.components[self.plan[i].net].weights, *sorted(manifest.inputs)))
        return LaneKey("denoise", engine, manifest.latent_shape(request.width, request.height))

    def decode_lane(self, shape: Sequence[int]) -> LaneKey:
        return LaneKey("decode", self.student.manifest.components["decoder"].weights, tuple(shape))

    def network_rows(self, i: int) -> int:
        """What one row of step `i` weighs in a batch."""
        return self.performer(i).family.network_rows(self.plan[i].w)

    def needs(self, version: str) -> bool:
        """Whether engines of this version have a part in it."""
        return version == self.student.version or (self.teacher is not None and version == self.teacher.version)

    def seed(self, index: int) -> int:
        return (self.claim.request.seed + index) % _SEEDS

    @property
    def undrawn(self) -> int:
        """How many values `draw` will draw: none for a picture that is changed, which begins as it is."""
        drawn = self.source is not None or self.drawn
        return 0 if drawn else self.claim.request.n * prod(self.lane(self.first).shape)

    def draw(self) -> list[State]:
        """Where each picture begins, in the host's memory: noise, drawn once.

        That takes no engine, so have it done before an engine's thread asks for it.
        """
        if not self.drawn:
            shape = self.lane(self.first).shape
            seeds = [self.seed(index) for index in range(self.claim.request.n)]
            self.drawn = [self.solver.start(noise(seed, 0, shape)) for seed in seeds]
        return self.drawn

    def begin(self, now_s: float) -> None:
        if self.begun_s is None:
            self.begun_s = now_s

    def result(self, *, worker: str, now_s: float) -> GenerateResult:
        """The answer of a request whose pictures are all there."""
        request, prompt = self.claim.request, self.prompt
        return GenerateResult(
            id=request.id,
            status="succeeded",
            version=request.version,
            tier=request.tier,
            steps=request.steps,
            backend=self.student.backend,
            worker=worker,
            seeds=[self.seed(index) for index in range(request.n)],
            timing=self.timing(now_s),
            ignored_words=list(prompt.ignored_words) if prompt else [],
            text_tokens=prompt.tokens if prompt else 0,
            num_images=request.n,
            downgraded_from=request.downgraded_from,
            refined=self.refined(),
        )

    def refined(self) -> Refined | None:
        """What the teacher had a part in."""
        asked = self.claim.request.refinement
        if asked is None or self.teacher is None:
            return None
        return Refined(refine=asked.how, teacher=self.teacher.version, redone=sorted(self.redone))

    def failure(self, body: ErrorBody, *, worker: str, now_s: float) -> GenerateResult:
        """The answer of a request that this worker cannot serve."""
        request = self.claim.request
        return GenerateResult(
            id=request.id,
            status="failed",
            error=body,
            version=request.version,
            tier=request.tier,
            steps=request.steps,
            backend=self.student.backend,
            worker=worker,
            timing=self.timing(now_s),
        )

    def timing(self, now_s: float) -> Timing:
        queued_s = self.claim.enqueued_ms / 1000
        return Timing(
            queue_ms=_ms((self.begun_s or now_s) - queued_s),
            encode_ms=_ms(self.encode_s),
            denoise_ms=_ms(self.denoise_s),
            decode_ms=_ms(self.decode_s),
            image_ms=_ms(self.image_s),
            total_ms=_ms(now_s - queued_s),
            load_ms=_ms(self.load_s),
        )


@dataclass(slots=True, eq=False, kw_only=True)
class PromptRow(Row):
    """A prompt to encode for one ticket."""

    ticket: Ticket
    prompt: str
    is_negative: bool = False


@dataclass(slots=True, eq=False, kw_only=True)
class SourceRow(Row):
    """The picture that a ticket changes, to encode."""

    ticket: Ticket


@dataclass(slots=True, eq=False, kw_only=True)
class PictureRow(Row):
    """One picture on its way through the denoiser. `state` is None until its first step, as is `edit`."""

    ticket: Ticket
    index: int
    state: State | None = None
    edit: Edit | None = None
    leaving: bool = False  # its last step has begun

    @property
    def step(self) -> int:
        """Steps done, or left out."""
        return self.state.i if self.state else self.ticket.first

    @property
    def done(self) -> bool:
        return self.step >= len(self.ticket.plan)


@dataclass(slots=True, eq=False, kw_only=True)
class LatentRow(Row):
    """Latents [C, (T,) H, W] to decode: what is finished, or with `partial_index` the estimate after a step."""

    ticket: Ticket
    index: int
    latents: Tensor
    step: int
    partial_index: int | None = None


def draw(tickets: Iterable[Ticket]) -> None:
    for ticket in tickets:
        if ticket.undrawn:
            ticket.draw()


LiveRow = PromptRow | SourceRow | PictureRow | LatentRow


def rows_of(ticket: Ticket) -> list[PictureRow]:
    """The pictures of a request, before their first step."""
    lane, weight = ticket.lane(ticket.first), ticket.network_rows(ticket.first)
    return [
        PictureRow(
            request_id=ticket.id,
            lane=lane,
            due_s=ticket.due_s,
            deadline_s=ticket.deadline_s,
            needs_s=ticket.needs_s[ticket.first],
            network_rows=weight,
            alone=ticket.claim.returned,
            ticket=ticket,
            index=index,
        )
        for index in range(ticket.claim.request.n)
    ]


def prompts_of(ticket: Ticket) -> list[PromptRow]:
    """What has to be encoded for a request: its prompt and, where it is guided, what it is guided away from."""
    request, manifest = ticket.claim.request, ticket.student.manifest
    texts = [(request.prompt, False)]
    if ticket.guided:
        texts.append((request.negative_prompt or "", True))
    lane = LaneKey("encode", manifest.components["encoder"].weights)
    return [
        PromptRow(
            request_id=ticket.id,
            lane=lane,
            due_s=ticket.due_s,
            deadline_s=ticket.deadline_s,
            needs_s=ticket.least_s(lane) + ticket.needs_s[ticket.first],
            alone=ticket.claim.returned,
            feeds=ticket.lane(ticket.first),
            ticket=ticket,
            prompt=text,
            is_negative=is_negative,
        )
        for text, is_negative in texts
    ]


def sources_of(ticket: Ticket) -> list[SourceRow]:
    """The picture that a request changes, if it changes one."""
    if ticket.source is None:
        return []
    vae = ticket.student.manifest.components["decoder"].weights
    return [
        SourceRow(
            request_id=ticket.id,
            lane=LaneKey("encode", vae, (3, *ticket.source.picture.shape[:2])),
            due_s=ticket.due_s,
            deadline_s=ticket.deadline_s,
            needs_s=ticket.needs_s[ticket.first],
            alone=ticket.claim.returned,
            feeds=ticket.lane(ticket.first),
            network_rows=2 if ticket.student.family.sees else 1,  # the picture, and what is beneath the mask
            ticket=ticket,
        )
    ]


def latent_row(row: PictureRow, latents: Tensor, partial_index: int | None = None) -> LatentRow:
    """What is decoded of a picture after a step."""
    return LatentRow(
        request_id=row.request_id,
        lane=row.ticket.decode_lane(latents.shape),
        due_s=row.due_s,
        deadline_s=row.deadline_s,
        needs_s=row.ticket.needs_s[-1],
        alone=row.alone,
        ticket=row.ticket,
        index=row.index,
        latents=latents,
        step=row.step,
        partial_index=partial_index,
    )


def count_call(
    metrics: Metrics, rows: Sequence[LiveRow], seconds: float, backend: str, exemplar: dict[str, str] | None = None
) -> None:
    """Counts a live engine call of rows that share a stage; `exemplar` names the trace of one of them."""
    stage, weight = rows[0].lane.stage, sum(row.network_rows for row in rows)
    served = [(row.ticket.claim.request.model, shown(row.ticket.student.version)) for row in rows]
    for model in {model for model, _ in served}:
        metrics.stage_seconds.labels(model, stage).observe(seconds, exemplar)
        if stage == "denoise":
            metrics.batch_rows.labels(model).observe(weight)
    for model, version in set(served) if stage == "denoise" else ():
        metrics.step_seconds.labels(model, version, backend).observe(seconds, exemplar)
        metrics.steps.labels(model, version).inc(served.count((model, version)))


def _ms(seconds: float) -> float:
    return round(max(0.0, seconds) * 1000, 3)
