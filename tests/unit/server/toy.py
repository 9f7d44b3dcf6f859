"""A student small enough to compute by hand: its network is a line, its pictures are 4×4."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from engines import process
from engines.families.base import Tokens
from engines.manifest import Component, Guidance, ProcessSpec, Schedule, StudentManifest
from engines.student import LoadedStudent
from server.brokers.base import Claim
from server.messages import GenerateRequest

SIZE = 4


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass
class ToyFamily:
    """pred = slope x + mean(cond) (1 + s); `calls` are the batches it saw. `fault` is raised by the next calls.

    A network in `slopes` has its own; `nets` are those that were asked, with the batch.
    """

    slope: float = 0.5
    spread: float = 0.0
    slopes: dict[str, float] = field(default_factory=dict)
    nets: list[tuple[str, int]] = field(default_factory=list)
    calls: list[tuple[str, int]] = field(default_factory=list)
    weights: list[list[float | None]] = field(default_factory=list)
    negatives: list[Tensor | None] = field(default_factory=list)
    faults: dict[str, list[BaseException | None]] = field(default_factory=dict)

    def _called(self, stage: str, rows: int) -> None:
        self.calls.append((stage, rows))
        faults = self.faults.get(stage)
        fault = faults.pop(0) if faults else None
        if fault is not None:
            raise fault

    def tokenize(self, prompts: Sequence[str]) -> Tokens:
        ignored = tuple(tuple(w for w in prompt.split() if w.startswith("x")) for prompt in prompts)
        ids = torch.tensor([[int(sha(prompt)[:4], 16) % 100] * 2 for prompt in prompts])
        return Tokens(ids, ignored, tuple(len(prompt.split()) for prompt in prompts))

    def encode(self, prompts: Sequence[str]) -> Tensor:
        return self.embed(self.tokenize(prompts))

    def embed(self, tokens: Tokens) -> Tensor:
        self._called("encode", len(tokens.ids))
        return (tokens.ids / 100)[:, :, None].expand(-1, -1, 3).contiguous()

    def denoise(
        self,
        x: Tensor,
        t: Tensor,
        cond: Tensor,
        s: Tensor | None = None,
        w: Any = None,
        *,
        negative: Tensor | None = None,
        net: str = "denoiser",
        seen: Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        self._called("denoise", len(x))
        self.nets.append((net, len(x)))
        self.weights.append(list(w))
        self.negatives.append(negative)
        assert s is not None
        null = self._mean(torch.zeros_like(cond) if negative is None else negative, s)
        mean = self._mean(cond, s)
        scale = torch.tensor([1.0 if value is None else value for value in w]).view(-1, 1, 1, 1)
        pred: Tensor = self.slopes.get(net, self.slope) * x + null + scale * (mean - null)
        return pred

    sees = False

    def look(self, levels: Tensor) -> tuple[Tensor, Tensor | None]:
        self._called("look", len(levels))
        return (levels - 128) / 32, torch.full_like(levels, self.spread) if self.spread else None

    def decode(self, latents: Tensor) -> Tensor:
        self._called("decode", len(latents))
        return self.levels(latents).to(torch.uint8)

    def levels(self, latents: Tensor) -> Tensor:
        return (latents[:, :3] * 32 + 128).clamp(0, 255)

    def network_rows(self, w: float | None) -> int:
        return 1 if w is None else 2

    def _mean(self, cond: Tensor, s: Tensor) -> Tensor:
        return (cond.mean(dim=(1, 2)) * (1 + s)).view(-1, 1, 1, 1)


def manifest(
    name: str = "toy",
    *,
    counts: Sequence[int] = (1, 2, 4),
    eta: float = 0.0,
    solver: str = "ddim",
    weights: str = "w",
    guided: bool = False,
    guidance: Guidance | None = None,
    process: ProcessSpec = ProcessSpec(),  # noqa: B008 - frozen
    nets: dict[int, tuple[str, ...]] | None = None,
    base: str | None = None,
) -> StudentManifest:
    asked = {"denoiser", *(net for named in (nets or {}).values() for net in named)}
    parts = {role: Component(weights=sha(role + weights), files={}) for role in asked}
    parts |= {role: Component(weights=sha(role), files={}) for role in ("encoder", "decoder")}
    times = {k: (*(1 - i / k for i in range(k)), 0.0) for k in counts}
    return StudentManifest(
        name=name,
        family="sd",
        kind="full",
        base=base,
        components=parts,
        schedules={k: Schedule(times=times[k], eta=eta, nets=(nets or {}).get(k)) for k in counts},
        solver=solver,
        process=process,
        inputs=frozenset({"w"} if guidance and guidance.mode == "embedded" else ()),
        guidance=guidance or (Guidance(mode="cfg", default=2.0, maximum=8.0) if guided else Guidance()),
        resolutions=((SIZE, SIZE),),
        latent_channels=3,
        downscale=1,
    )


def student(family: ToyFamily | None = None, **options: Any) -> LoadedStudent:
    made = manifest(**options)
    return LoadedStudent(made, family or ToyFamily(), process.make(made.process), "toy", "fp32")


def request(student: LoadedStudent, request_id: str = "r", **given: Any) -> GenerateRequest:
    fields: dict[str, Any] = {
        "model": "toys",
        "version": student.version,
        "tier": "medium",
        "steps": 1,
        "prompt": "a red circle",
        "width": SIZE,
        "height": SIZE,
        "seed": 7,
        "budget_ms": 60_000,
        "reply_to": "gateway",
    }
    return GenerateRequest(id=request_id, **(fields | given))


def claim(student: LoadedStudent, request_id: str = "r", *, deliveries: int = 1, at_ms: int = 0, **given: Any) -> Claim:
    return Claim(request(student, request_id, **given), "stream", "1-0", at_ms, deliveries)
