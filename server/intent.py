"""What passes between a dialect and the gateway: a request in no dialect, its ticket, its answer."""

from dataclasses import dataclass
from typing import Literal

from server.latencies import Work
from server.menu import Choice, Wanted
from server.messages import GenerateResult, RequestClass
from server.uploads import Upload

ImageFormat = Literal["png", "webp", "jpeg"]  # what OpenAI's dialect knows


@dataclass(frozen=True, slots=True)
class Intent:
    """What a client asked for, in no dialect."""

    wanted: Wanted
    prompt: str
    upload: Upload | None = None  # what is changed; `wanted.strength` says how much
    negative_prompt: str | None = None
    n: int = 1
    seed: int | None = None
    compression: int | None = None
    priority: int = 0
    timeout_ms: int | None = None
    partial_images: int = 0
    events: bool = False
    traceparent: str | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """What was chosen for an admitted request, and what was predicted of it: engine seconds and wait.

    It should be done `due_after_s` after it came. `work` is None where it is of several pictures, which take longer
    than one.
    """

    choice: Choice
    request_class: RequestClass
    cost_s: float
    due_after_s: float
    wait_s: float
    work: Work | None


@dataclass(frozen=True, slots=True)
class Ticket:
    """An accepted request. `decision` is None for a repeat under an idempotency key."""

    id: str
    model: str
    budget_s: float
    started_s: float
    decision: Decision | None
    owner: str = ""

    @property
    def choice(self) -> Choice | None:
        return self.decision.choice if self.decision else None


@dataclass(frozen=True, slots=True)
class Answer:
    """A succeeded request with its encoded pictures."""

    result: GenerateResult
    images: list[bytes]
