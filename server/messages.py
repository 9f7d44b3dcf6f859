"""What crosses the broker: requests, results and progress events, as msgpack.

Fields are only ever added, each with a default, and unknown ones are ignored, so that gateways and
workers of neighbouring releases understand each other. Image bytes are never inside a message, neither those that
are made nor those that are changed: they travel as values of their own.
"""

from typing import Literal, TypeVar

import msgspec

from engines.errors import FewstepError, UnsupportedMessage, by_code
from engines.refine import Refine, Refinement

RequestClass = Literal["high", "normal", "low"]
State = Literal["queued", "running", "succeeded", "failed", "canceled", "expired"]
Ending = Literal["succeeded", "failed", "canceled", "expired"]
CLASSES: tuple[RequestClass, ...] = ("high", "normal", "low")
ENDINGS: frozenset[str] = frozenset({"succeeded", "failed", "canceled", "expired"})

HIGH_FROM = 5
LOW_UNTIL = -5


def class_of(priority: int) -> RequestClass:
    """The stream that a priority of -10..10 travels in; the integer orders rows inside it."""
    if priority >= HIGH_FROM:
        return "high"
    return "low" if priority <= LOW_UNTIL else "normal"


class TierSteps(msgspec.Struct, frozen=True, kw_only=True):
    """A tier and its number of steps."""

    tier: str
    steps: int


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One admitted request: its version and steps are chosen, its seed is drawn.

    `n` pictures of one prompt are `n` rows on one worker; picture i uses (seed + i) mod 2**63.
    """

    id: str
    model: str  # the deployment
    version: str  # name@<64 digits>, pinned until the one answer
    tier: str
    steps: int
    prompt: str
    width: int
    height: int
    seed: int
    budget_ms: int  # from the moment the broker took it, on the broker's clock
    reply_to: str  # the gateway that waits
    negative_prompt: str | None = None
    guidance: float | None = None  # None: the student's own
    n: int = 1
    output_format: Literal["png", "webp", "jpeg", "mp4"] = "png"
    compression: int | None = None  # 0..100; None: the format's default
    priority: int = 0
    partial_images: int = 0
    events: bool = False  # somebody reads events(id): step events are worth sending
    owner: str = ""  # the API key that it belongs to
    created_at: float = 0.0  # Unix seconds of the gateway, for people only
    traceparent: str | None = None
    cost_s: float = 0.0  # predicted engine seconds of all rows; sums to the predicted queue wait
    due_after_s: float = 0.0  # seconds in which it should be done, less what its priority is worth
    downgraded_from: TierSteps | None = None  # what would have served it with less load, or with more time
    refinement: Refinement | None = None  # what the teacher adds
    teacher: str | None = None  # its full version, where it adds something
    edits_from: int | None = None  # the step at which the picture that is changed comes in; it travels beside
    fps: int | None = None  # of a video

    @property
    def num_evaluations(self) -> int:
        """Steps that are taken."""
        return self.steps - (self.edits_from or 0)

    @property
    def request_class(self) -> RequestClass:
        return class_of(self.priority)


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A `FewstepError` on its way to another process."""

    code: str
    message: str
    param: str | None = None
    retry_after_s: float | None = None

    @classmethod
    def of(cls, error: FewstepError) -> "ErrorBody":
        return cls(code=error.code, message=error.message, param=error.param, retry_after_s=error.retry_after_s)

    def exception(self) -> FewstepError:
        """The error again, in its own class, to be raised here."""
        return by_code(self.code)(self.message, param=self.param, retry_after_s=self.retry_after_s)


class Timing(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where the time of one request went, milliseconds."""

    queue_ms: float = 0.0
    encode_ms: float = 0.0
    denoise_ms: float = 0.0
    decode_ms: float = 0.0
    image_ms: float = 0.0
    total_ms: float = 0.0
    load_ms: float = 0.0  # of queue_ms: until its version was in memory


class Refined(msgspec.Struct, frozen=True, kw_only=True):
    """What a teacher, a full version, had a part in. `redone` are the pictures that it made again."""

    refine: Refine
    teacher: str
    redone: list[int] = []


class GenerateResult(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The one answer to one request. `error` is set unless `status` is succeeded."""

    id: str
    status: Ending
    error: ErrorBody | None = None
    version: str = ""
    tier: str = ""
    steps: int = 0
    backend: str = ""
    worker: str = ""
    seeds: list[int] = []
    timing: Timing = Timing()
    ignored_words: list[str] = []
    text_tokens: int = 0
    num_images: int = 0
    downgraded_from: TierSteps | None = None
    refined: Refined | None = None


class StepEvent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Progress of one request. The picture of a `partial_image` travels beside it; `ended` is the last one."""

    id: str
    kind: Literal["queued", "running", "step", "partial_image", "ended"]
    step: int = 0  # steps done
    total: int = 0
    image_index: int = 0
    partial_index: int = 0
    status: State | None = None  # with `ended`


Message = TypeVar("Message", GenerateRequest, GenerateResult, StepEvent)
_ENCODER = msgspec.msgpack.Encoder()
_DECODERS = {kind: msgspec.msgpack.Decoder(kind) for kind in (GenerateRequest, GenerateResult, StepEvent)}


def encode(message: msgspec.Struct) -> bytes:
    return _ENCODER.encode(message)


def decode(data: bytes, kind: type[Message]) -> Message:
    """A message from its bytes; fields that this release does not know are ignored.

    Raises:
        UnsupportedMessage: the bytes are no such message, or lack a field that this release needs.
    """
    try:
        message = _DECODERS[kind].decode(data)
    except msgspec.DecodeError as error:
        raise UnsupportedMessage(f"{len(data)} bytes are no {kind.__name__} that this release reads: {error}") from None
    assert isinstance(message, kind)
    return message


def ended_by(
    request_id: str, status: Ending, error: FewstepError, request: GenerateRequest | None = None
) -> GenerateResult:
    """The answer of a request that ends without pictures; with `request` it says what had been chosen for it."""
    body = ErrorBody.of(error)
    if request is None:
        return GenerateResult(id=request_id, status=status, error=body)
    return GenerateResult(
        id=request_id, status=status, error=body, version=request.version, tier=request.tier, steps=request.steps
    )
