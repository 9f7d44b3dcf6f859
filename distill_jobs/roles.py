"""Who is trained: the networks of a distillation by name, how each is updated, and whose gradients flow.

A method says which roles it needs; the `Cast` makes them and isolates gradients; the trainer owns the optimisers.
A frozen role is never updated by an optimiser: a target that the method moves itself (`Cast.follow`), or an earlier
student. It is in every checkpoint like the others.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from distill_jobs import times
from distill_jobs.lora import Adapted, adapted
from engines.denoiser import BaseDenoiser, Denoiser, Guided
from engines.errors import InvalidRequest

Decode = Callable[[Tensor], Tensor]
"""Latents [B, C, H, W] -> pictures [B, 3, H', W'] in levels 0..255, not rounded, and differentiable."""

_Module = TypeVar("_Module", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class Role:
    """How one network is trained. `steps` updates in each iteration that is due: every `every`-th from `start` on.

    `init`: a copy of the teacher without its guidance, or of the student; `new` is made by the method or term.
    `train` lora is an adapter beside the teacher's own weights, like the student's; it takes no copy.
    """

    init: Literal["teacher", "student", "new"] = "teacher"
    train: Literal["full", "lora", "frozen"] = "full"
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    clip: float = 1.0
    every: int = 1
    steps: int = 1
    start: int = 0

    def updates_at(self, iteration: int) -> int:
        """How many updates this role gets in an iteration (counted from 0 within the stage)."""
        if self.train == "frozen":
            return 0
        due = iteration >= self.start and (iteration - self.start) % self.every == 0
        return self.steps if due else 0


class Cast:
    """The frozen teacher and the networks in training. Outside `only` nothing of it wants gradients.

    `decode` is the teacher's decoder, for whoever judges pictures; None where training has no pictures.
    """

    def __init__(self, teacher: BaseDenoiser, *, decode: Decode | None = None, **players: nn.Module) -> None:
        self.teacher, self.decode = _frozen(teacher), decode
        self.players = {name: _frozen(player) for name, player in players.items()}

    @classmethod
    def build(
        cls,
        teacher: BaseDenoiser,
        student: BaseDenoiser,
        roles: Mapping[str, Role],
        make: Callable[[str, BaseDenoiser], nn.Module] | None = None,
        decode: Decode | None = None,
    ) -> "Cast":
        """The cast for these roles; `student` itself plays the student, the others are copies, or what
        `make(name, unguided teacher)` gives for a role that is new. LoRA roles share the teacher's backbone.

        Raises:
            InvalidRequest: the student's role and its network do not agree on LoRA.
        """
        lora = student.lora if isinstance(student, Adapted) else None
        asked = {name for name, role in roles.items() if role.train == "lora"}
        if lora is None and asked:
            message = f"roles {', '.join(sorted(asked))} ask for LoRA, and the student's network is none"
            raise InvalidRequest(message, param="train")
        if lora is not None and "student" in roles and "student" not in asked:
            message = f"the student's network is a LoRA and its role says train={roles['student'].train}"
            raise InvalidRequest(message, param="train")

        def played(name: str, role: Role) -> nn.Module:
            if role.init == "new":
                if make is None:
                    raise TypeError(f"role {name} is new and nobody makes it")
                return make(name, unguided(teacher))
            if role.init == "student":
                return copy.deepcopy(student)
            plain = unguided(teacher)
            if role.train == "lora":
                assert lora is not None
                assert isinstance(plain, Denoiser)
                return adapted(plain, lora)
            learner = copy.deepcopy(plain)
            learner.reads_instead = False  # it learns what the student makes of its own prompts
            return learner

        others = {name: played(name, role) for name, role in roles.items() if name != "student"}
        return cls(teacher, decode=decode, student=student, **others)

    def __getitem__(self, name: str) -> BaseDenoiser:
        """A role that is a denoiser. Others are had by `module`."""
        player = self.players[name]
        if not isinstance(player, BaseDenoiser):
            raise TypeError(f"role {name} is a {type(player).__name__}, not a denoiser")
        return player

    def module(self, name: str) -> nn.Module:
        return self.players[name]

    @property
    def student(self) -> BaseDenoiser:
        return self["student"]

    def weights(self, name: str) -> dict[str, Tensor]:
        """The live tensors of one role by name (not copies)."""
        return dict(self.players[name].state_dict(keep_vars=False))

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        return dict(self.players[name].named_parameters())

    @torch.no_grad()
    def follow(self, name: str, leader: str, keep: float) -> None:
        """Moves a role's weights towards another's of the same network: keep x own + (1 - keep) x the leader's.
        Integer buffers are copied."""
        own, theirs = self.weights(name), self.weights(leader)
        floating = [key for key, value in own.items() if value.is_floating_point()]
        torch._foreach_lerp_([own[key] for key in floating], [theirs[key] for key in floating], 1 - keep)
        for key in own.keys() - set(floating):
            own[key].copy_(theirs[key])

    @contextmanager
    def only(self, name: str) -> Iterator[nn.Module]:
        """Within it, `name` alone is in training mode and takes gradients; those of the others stay None."""
        player = self.players[name]
        player.requires_grad_(True).train()
        _tell_shards(player)
        try:
            yield player
        finally:
            _frozen(player)


def unguided(den: BaseDenoiser) -> BaseDenoiser:
    """The network inside a guided one: one plain conditional evaluation."""
    return den.denoiser if isinstance(den, Guided) else den


def guided_within(den: BaseDenoiser, levels: tuple[float, float] | None) -> BaseDenoiser:
    """A guided denoiser guided only between two noise levels (arXiv 2404.07724); with none, or another, as it is."""
    if levels is None or not isinstance(den, Guided):
        return den
    low, high = (float(t) for t in times.on(den.process, torch.tensor(levels, dtype=torch.float64)))
    return Guided(den.denoiser, den.null_cond, den.w, (low, high))


def _tell_shards(module: nn.Module) -> None:
    """FSDP2 hands on whether a weight wants gradients when it next gathers it. Functions under `torch.func.jvp`
    may not call `requires_grad_`, so it is gathered here once, before any."""
    for unit in module.modules():
        if hasattr(unit, "unshard"):
            unit.unshard()  # type: ignore[operator]
            unit.reshard()  # type: ignore[operator]


def _frozen(module: _Module) -> _Module:
    module.requires_grad_(False).eval()
    return module
