"""What a student is, as data: components by hash and the sampling contract they were trained for.

The manifest is canonical: no id, no date, no metric is in it, so the same artefact has the same
digest wherever it is made. Torch-free, because the gateway plans and validates with it.
"""

import hashlib
import json
import math
import re
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from engines.errors import InvalidManifest, InvalidRequest, StepsNotAllowed
from engines.frames import Frames

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
Kind = Literal["x0", "eps", "v", "flow", "edm"]
VERSION = re.compile(r"^(?P<name>[a-z0-9][a-z0-9._-]{0,63})@(?P<digest>[0-9a-f]{12,64})$")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True, slots=True)
class Step:
    """One network evaluation of one row: from time `t` to time `s` of the student's process.

    `w` is the guidance weight of u + w(c − u), or None where the network is asked once without it.
    `eta` is the share of fresh noise: 0 follows the flow map, 1 predicts x0 and re-noises to `s`.
    `coefficients` are the row of solver `linear`: of x, of this clean prediction and of the earlier ones.
    `by_teacher`: the network is that of the student's teacher. `share` is of the rows that come to this step.
    """

    net: str
    t: float
    s: float
    w: float | None
    eta: float
    coefficients: tuple[float, ...] | None = None
    by_teacher: bool = False
    share: float = 1.0


class Betas(_Frozen):
    """The noise of a chain of `steps` steps, by the names that diffusers' schedulers give it."""

    curve: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "scaled_linear"
    start: float = Field(0.00085, gt=0, lt=1)
    end: float = Field(0.012, gt=0, lt=1)
    steps: int = Field(1000, ge=2)


class ProcessSpec(_Frozen):
    """Names a noising process of `engines.process`; `shift` is the static time shift mu (1 = none).

    `sigma_data`, of kinds edm and trig, is the data's deviation. `sigma_max`, of edm, is the noise that sampling starts
    from. `betas` belong to kind ddpm. `ticks`: a flow's network is told its time in whole 1/ticks, rounded down.
    """

    kind: Literal["rf", "vp", "edm", "trig", "ddpm"] = "rf"
    shift: float = Field(1.0, gt=0)
    sigma_data: float = Field(1.0, gt=0)
    sigma_max: float | None = Field(None, gt=0)
    betas: Betas | None = None
    ticks: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> "ProcessSpec":
        if (self.kind == "ddpm") != (self.betas is not None):
            raise ValueError("betas are given if and only if the process is ddpm")
        if self.ticks is not None and self.kind != "rf":
            raise ValueError("ticks are of a flow: the process must be rf")
        if self.sigma_max is not None and self.kind != "edm":
            raise ValueError("sigma_max is of EDM's noise: the process must be edm")
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_not_set(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what is None, so that manifests made before there was such a field keep their digests."""
        return {name: value for name, value in plain(self).items() if value is not None}


LINEAR = "linear"  # the solver whose steps are written out in `Schedule.coefficients`
Coefficient = Annotated[float, Field(allow_inf_nan=False)]


class Schedule(_Frozen):
    """How a student takes K steps: K + 1 falling times, and per step the noise share and the network.

    With solver `linear`, row i of `coefficients` (a, b_0, b_1, …) makes the step itself:
    x_(i+1) = a x_i + b_0 x0_i + b_1 x0_(i-1) + …, where x0_i is the clean prediction of step i; at most i + 2 entries.
    """

    times: tuple[float, ...] = Field(min_length=2)
    eta: tuple[float, ...] | float = 0.0
    solver: str | None = Field(None, description="replaces the manifest's solver for this step count")
    nets: tuple[str, ...] | None = Field(None, description="component of each step; all are the denoiser's if missing")
    # Left out where there are none: manifests without them keep the digests that they were published under.
    coefficients: tuple[tuple[Coefficient, ...], ...] | None = Field(None, exclude_if=lambda rows: rows is None)

    @property
    def steps(self) -> int:
        return len(self.times) - 1

    @model_validator(mode="after")
    def _consistent(self) -> "Schedule":
        if any(s >= t for t, s in pairwise(self.times)) or self.times[-1] < 0:
            raise ValueError(f"times must fall and end at 0 or above, not {self.times}")
        for field in ("eta", "nets"):
            value = getattr(self, field)
            if isinstance(value, tuple) and len(value) != self.steps:
                raise ValueError(f"{field} has {len(value)} entries for {self.steps} steps")
        if any(not 0 <= eta <= 1 for eta in self._etas()):
            raise ValueError(f"eta must lie in 0..1, not {self.eta}")
        self._check_coefficients()
        return self

    def _check_coefficients(self) -> None:
        rows = self.coefficients
        if (rows is None) != (self.solver != LINEAR):
            raise ValueError(f"coefficients and solver {LINEAR!r} go together, not with solver {self.solver!r}")
        if rows is None:
            return
        if len(rows) != self.steps:
            raise ValueError(f"coefficients has {len(rows)} rows for {self.steps} steps")
        for i, row in enumerate(rows):
            if not 2 <= len(row) <= i + 2:
                raise ValueError(f"coefficients[{i}] has {len(row)} entries: step {i} takes 2 to {i + 2}")

    def _etas(self) -> tuple[float, ...]:
        return self.eta if isinstance(self.eta, tuple) else (self.eta,) * self.steps

    def expand(self, w: float | None, interval: tuple[float, float] | None, net: str) -> tuple[Step, ...]:
        nets = self.nets or (net,) * self.steps
        inside = [interval is None or interval[0] <= t <= interval[1] for t in self.times]
        rows = self.coefficients or (None,) * self.steps
        return tuple(
            Step(net=nets[i], t=t, s=s, w=w if inside[i] else None, eta=eta, coefficients=rows[i])
            for i, ((t, s), eta) in enumerate(zip(pairwise(self.times), self._etas(), strict=True))
        )


class Guidance(_Frozen):
    """Classifier-free guidance u + w(c − u) (w = 1 is none) and how this student has it.

    cfg: two network rows a step · embedded: the network reads w · baked: one w is in the weights ·
    none: the network is asked once.
    """

    mode: Literal["none", "cfg", "embedded", "baked"] = "none"
    default: float = 1.0
    minimum: float = 1.0
    maximum: float = 1.0
    interval: tuple[float, float] | None = None

    @model_validator(mode="after")
    def _ordered(self) -> "Guidance":
        if not self.minimum <= self.default <= self.maximum:
            raise ValueError(f"guidance default {self.default} is outside {self.minimum}..{self.maximum}")
        if self.mode == "embedded" and self.interval is not None:
            raise ValueError("embedded guidance has no interval: the network reads a weight at every step")
        return self


REDO_SHARES = tuple(round(0.05 * k, 2) for k in range(1, 11))
"""Shares of its pictures that a student may have redone by its teacher."""


class Judge(_Frozen):
    """When a picture of a student is its teacher's to redo: where the teacher doubts it more than it doubts most.

    It is asked, and goes on, at the middle of its own schedule of `steps`. `doubts[k][j]`, of pictures of k steps, is
    what at most the share `REDO_SHARES[j]` of held-out ones exceeds.
    """

    steps: int = Field(ge=2, description="of the teacher's schedule, of which it takes the second half")
    doubts: dict[int, tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...]] = Field(min_length=1)

    @model_validator(mode="after")
    def _falling(self) -> "Judge":
        for steps, doubts in self.doubts.items():
            if len(doubts) != len(REDO_SHARES) or any(b > a for a, b in pairwise(doubts)):
                raise ValueError(f"doubts[{steps}] must be {len(REDO_SHARES)} falling values, not {doubts}")
        return self

    def threshold(self, steps: int, share: float) -> float:
        """What at most `share` of a student's pictures exceeds; the share is rounded down to one that is known."""
        known = [doubt for doubt, at in zip(self.doubts[steps], REDO_SHARES, strict=True) if at <= share + 1e-9]
        return known[-1]


FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)?$")]
"""A file or one folder and a file: names become paths where a student is exported or its tokenizer is read."""


class Component(_Frozen):
    """One network of a student: its weights and the files that say what it is, all by content.

    `files` maps names inside a diffusers component folder (`config.json`, `tokenizer.json` …) to blobs.
    """

    weights: Sha256
    files: dict[FileName, Sha256]


class StudentManifest(_Frozen):
    """The whole contract of one student. `digest` names it."""

    schema_version: Literal[1] = 1
    name: Name
    family: Name = Field(description="a file of engines/families")
    kind: Literal["teacher", "full", "lora", "schedule"]
    base: str | None = Field(None, description="name@digest of the teacher it was made from")
    components: dict[str, Component] = Field(description="encoder, decoder and one or several denoisers")
    process: ProcessSpec = ProcessSpec()
    prediction: Kind = "flow"
    inputs: frozenset[Literal["s", "w"]] = frozenset()
    points: int = Field(
        1,
        ge=1,
        le=64,
        exclude_if=lambda points: points == 1,
        description="x0 that the network gives at once; several make it a policy",
    )
    weight_bits: Literal[4, 8] | None = Field(
        None,
        exclude_if=lambda bits: bits is None,
        description="the denoiser's weights are whole multiples of the scales beside them, of so many bits",
    )
    solver: str = "ddim"
    schedules: dict[int, Schedule] = Field(min_length=1)
    guidance: Guidance = Guidance()
    judge: Judge | None = Field(
        None, exclude_if=lambda judge: judge is None, description="which of its pictures its teacher redoes, if asked"
    )
    resolutions: tuple[tuple[int, int], ...] = Field(min_length=1, description="width, height in pixels")
    latent_channels: int = Field(ge=1)
    downscale: int = Field(ge=1, description="pixels per latent position")
    frames: Frames | None = Field(
        None, exclude_if=lambda frames: frames is None, description="of its videos; it makes single pictures without"
    )
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    licence: str = "apache-2.0"
    task: Name | None = Field(None, description="whose captions it knows: a file of distill_jobs/tasks")
    parents: tuple[str, ...] = ()
    golden: Sha256 | None = Field(None, description="blob of prompts, noise and reference pictures")

    @model_validator(mode="after")
    def _consistent(self) -> "StudentManifest":
        for steps, schedule in self.schedules.items():
            if schedule.steps != steps:
                raise ValueError(f"schedules[{steps}] has {schedule.steps} steps")
            unknown = set(schedule.nets or ()) - set(self.components)
            if unknown:
                raise ValueError(f"schedules[{steps}] names networks that are no components: {sorted(unknown)}")
        missing = {"encoder", "denoiser", "decoder"} - set(self.components)
        if missing:
            raise ValueError(f"components lack {sorted(missing)}")
        idle = set(self.experts) - {net for schedule in self.schedules.values() for net in schedule.nets or ()}
        if idle:
            raise ValueError(f"no schedule asks {sorted(idle)}: name them in nets, or leave them out")
        if (self.guidance.mode == "embedded") != ("w" in self.inputs):
            raise ValueError("guidance is embedded if and only if the network reads 'w'")
        if any((self.solver_for(steps) == "dx") != (self.points > 1) for steps in self.schedules):
            raise ValueError("solver dx is for networks of several points, and they for no other")
        return self

    def canonical(self) -> bytes:
        """The one byte string of this manifest: sorted keys, no spaces, UTF-8."""
        data = self.model_dump(mode="json")
        data["inputs"] = sorted(data["inputs"])
        if self.task is None:
            del data["task"]  # so that students made before there were tasks keep their digest
        return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(self.canonical()).hexdigest()

    @property
    def version(self) -> str:
        """`name@` and all 64 digits: what is stored and compared. `shown` is for people."""
        return f"{self.name}@{self.digest}"

    @property
    def experts(self) -> tuple[str, ...]:
        """The networks beside the denoiser that schedules may name in `nets`."""
        return tuple(sorted(set(self.components) - {"encoder", "denoiser", "decoder"}))

    @property
    def blobs(self) -> frozenset[str]:
        """Every blob that this student needs to be whole."""
        parts = (sha for part in self.components.values() for sha in (part.weights, *part.files.values()))
        return frozenset(parts) | ({self.golden} if self.golden else frozenset())

    def judged(self, judge: Judge) -> "StudentManifest":
        """The same student with a judge: another version, whose pictures are the same."""
        return StudentManifest.model_validate(self.model_dump() | {"judge": judge.model_dump()})

    def latent_shape(self, width: int, height: int) -> tuple[int, ...]:
        """C, H, W; of videos C, T, H, W."""
        time = (self.frames.latents,) if self.frames else ()
        return self.latent_channels, *time, height // self.downscale, width // self.downscale

    def plan(self, steps: int, guidance: float | None = None) -> tuple[Step, ...]:
        """The evaluations of one row. `guidance` None means the student's own.

        Raises:
            StepsNotAllowed: the student was not made for this count.
            InvalidRequest: the guidance weight is outside what the student was made for.
        """
        if steps not in self.schedules:
            allowed = ", ".join(map(str, sorted(self.schedules)))
            raise StepsNotAllowed(
                f"steps={steps} is not in the contract of {shown(self.version)}: it allows {allowed}", param="steps"
            )
        return self.schedules[steps].expand(self.weight(guidance), self.guidance.interval, "denoiser")

    def first_step(self, steps: int, strength: float) -> int:
        """The step at which a picture that is changed comes in: `strength` is the share of the steps that is taken,
        rounded down.

        Raises:
            InvalidRequest: it leaves no step to take.
        """
        taken = math.floor(steps * strength + 1e-9)
        if taken < 1:
            raise InvalidRequest(
                f"strength={strength:g} of {steps} steps leaves none to take: give {1 / steps:.2g} or more, or more "
                "steps",
                param="strength",
            )
        return steps - taken

    def weight(self, guidance: float | None = None) -> float | None:
        """The weight of a guided step; None where no step is. `guidance` None means the student's own.

        Raises:
            InvalidRequest: it is outside what the student was made for.
        """
        w = self.guidance.default if guidance is None else guidance
        if not self.guidance.minimum <= w <= self.guidance.maximum:
            raise InvalidRequest(
                f"guidance_scale={w} is outside {self.guidance.minimum}..{self.guidance.maximum}, "
                f"what {shown(self.version)} was made for",
                param="guidance_scale",
            )
        if self.guidance.mode == "embedded":
            return w
        return None if self.guidance.mode in ("none", "baked") or w == 1.0 else w

    def solver_for(self, steps: int) -> str:
        return self.schedules[steps].solver or self.solver


def parse(data: bytes) -> StudentManifest:
    """A manifest from the bytes of `student.json`.

    Raises:
        InvalidManifest: with the first field at fault.
    """
    try:
        return StudentManifest.model_validate_json(data)
    except ValueError as error:
        raise InvalidManifest(f"student.json is not a manifest: {error}") from error


def shown(version: str) -> str:
    """`name@` and 12 digits, for people."""
    name, _, digest = version.partition("@")
    return f"{name}@{digest[:12]}"
