"""One stage of a run: a method with its cast, optimisers and averages; one update, and what a checkpoint holds.

Nothing here knows of time, files or requests; all it does follows from (seed, stage, iteration).
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from distill_jobs.batches import Batch, Source, make_batch, seed_of
from distill_jobs.methods.base import Method, resolve
from distill_jobs.roles import Cast, Role
from distill_jobs.terms.base import Terms, Wanted
from engines.denoiser import BaseDenoiser
from engines.errors import Diverged, InvalidRequest
from engines.manifest import Schedule


@dataclass(frozen=True, slots=True)
class Stage:
    """A named method for so many iterations. `hard_stop_s` ends the stage early; resumed time counts."""

    method: str
    iterations: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    hard_stop_s: float | None = None
    terms: tuple[Wanted, ...] = ()


@dataclass(frozen=True, slots=True)
class Precision:
    """bf16 is autocast of the networks only; process mathematics, losses and optimisers stay fp32."""

    bf16: bool = False
    device: str = "cpu"

    def context(self) -> torch.autocast:
        return torch.autocast(torch.device(self.device).type, dtype=torch.bfloat16, enabled=self.bf16)


class Average:
    """Exponential moving averages of one network's tensors, warming up over its first updates."""

    def __init__(self, decay: float, weights: Mapping[str, Tensor]) -> None:
        self.decay = decay
        self.weights = {name: value.detach().clone() for name, value in weights.items()}

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor], updates: int) -> None:
        """`updates` counts from 1. Integer buffers are copied."""
        keep = min(self.decay, (1 + updates) / (10 + updates))
        names = [name for name, mean in self.weights.items() if mean.is_floating_point()]
        torch._foreach_lerp_([self.weights[name] for name in names], [weights[name] for name in names], 1 - keep)
        for name in self.weights.keys() - set(names):
            self.weights[name].copy_(weights[name])


def lr_factor(iteration: int, iterations: int, warmup: int = 10) -> float:
    """Linear over `warmup` iterations, constant to 60 %, then linear to 2 %."""
    rising = min(1.0, (iteration + 1) / warmup)
    late = max(0.0, (iteration / max(1, iterations) - 0.6) / 0.4)
    return rising * (1 - 0.98 * min(1.0, late))


class StageRun:
    """The live state of one stage. `student` is trained in place."""

    def __init__(
        self,
        index: int,
        stage: Stage,
        teacher: BaseDenoiser,
        student: BaseDenoiser,
        *,
        seed: int = 0,
        ema: Iterable[float] = (0.98,),
        precision: Precision = Precision(),
        max_skips: int = 10,
    ) -> None:
        preset = resolve(stage.method)
        config = preset.config(stage.settings)
        self.index, self.stage, self.seed, self.precision, self.max_skips = index, stage, seed, precision, max_skips
        self.terms = Terms(stage.terms)
        own = preset.method.roles(config)
        if not own:
            raise InvalidRequest(f"{stage.method} trains no weights: it is a search, not a stage", param="method")
        self.roles: dict[str, Role] = self.terms.roles() | own  # the student is the last to be updated
        missing = preset.method.inputs - student.inputs
        if missing:
            raise InvalidRequest(f"{stage.method} needs a student whose network reads {', '.join(sorted(missing))}")

        def make(name: str, denoiser: BaseDenoiser) -> nn.Module:
            return preset.method.make(name, denoiser, config) if name in own else self.terms.make(name, denoiser)

        self.cast = Cast.build(teacher, student, self.roles, make)
        self.method: Method = preset.method(self.cast, config)
        self.terms.join(self.cast)
        trained = {name: role for name, role in self.roles.items() if role.train != "frozen"}
        self.optimisers = {name: self._optimiser(name, role) for name, role in trained.items()}
        self._own = frozenset(own)
        self.averages = [Average(decay, self.cast.weights("student")) for decay in ema]
        self.iteration = 0
        self.updates = dict.fromkeys(self.roles, 0)
        self.skipped = dict.fromkeys(self.roles, 0)
        self._skipped_in_a_row = 0

    @property
    def done(self) -> bool:
        return self.iteration >= self.stage.iterations

    @property
    def schedules(self) -> dict[int, Schedule]:
        return self.method.schedules

    def iterate(self, source: Source) -> dict[str, float]:
        """One iteration: every role that is due, in the method's order. Losses and gradient norms by role.

        Raises:
            Diverged: too many updates in a row had no finite gradient.
        """
        seen: dict[str, float] = {}
        position = self.iteration * sum(role.steps for role in self.roles.values())
        for name, role in self.roles.items():
            for k in range(role.updates_at(self.iteration)):
                seen |= self._update(name, source, position + k)
            position += role.steps
        self.method.after(self.iteration)
        self.terms.after(self.iteration)
        self.iteration += 1
        return seen

    def batch(self, source: Source, position: int) -> Batch:
        """The rows and the randomness of one update."""
        seed = seed_of(self.seed, self.index, position)
        return make_batch(self.method.rows(source, position), source.shape, seed, self.precision.device)

    def student_with(self, weights: Mapping[str, Tensor]) -> BaseDenoiser:
        """A frozen copy of the student with these weights."""
        copied = copy.deepcopy(self.cast.student)
        copied.load_state_dict(dict(weights))
        return copied.requires_grad_(False).eval()

    def _update(self, name: str, source: Source, position: int) -> dict[str, float]:
        role, optimiser = self.roles[name], self.optimisers[name]
        batch = self.batch(source, position)
        with self.cast.only(name) as network:
            optimiser.zero_grad(set_to_none=True)
            with self.precision.context():
                terms = self.method.loss(name, batch) if name in self._own else {}
                terms = terms | self.terms.loss(name, self.method, batch)
            total = torch.stack([term.float() for term in terms.values()]).sum()
            torch.autograd.backward(total)
            norm = float(nn.utils.clip_grad_norm_(network.parameters(), role.clip))
            seen = {f"loss.{name}.{term}": float(value.detach()) for term, value in terms.items()}
            seen[f"grad_norm.{name}"] = norm
            if self._usable(name, norm):
                self._step(name, role, optimiser)
            optimiser.zero_grad(set_to_none=True)
        return seen

    def _step(self, name: str, role: Role, optimiser: torch.optim.Optimizer) -> None:
        lr = role.lr * lr_factor(self.iteration - role.start, self.stage.iterations - role.start)
        for group in optimiser.param_groups:
            group["lr"] = lr
        optimiser.step()
        self.updates[name] += 1
        if name == "student":
            weights = self.cast.weights("student")
            for average in self.averages:
                average.update(weights, self.updates[name])

    def _usable(self, name: str, norm: float) -> bool:
        if norm < float("inf"):  # False for NaN as well
            self._skipped_in_a_row = 0
            return True
        self.skipped[name] += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= self.max_skips:
            raise Diverged(
                f"{self.stage.method}: {self._skipped_in_a_row} updates in a row had no finite gradient "
                f"(last: {name}, iteration {self.iteration}): lower the learning rate or raise the critic's updates"
            )
        return False

    def _optimiser(self, name: str, role: Role) -> torch.optim.AdamW:
        parameters = list(self.cast.parameters(name).values())
        return torch.optim.AdamW(parameters, lr=role.lr, betas=role.betas, weight_decay=role.weight_decay, fused=True)

    # what a checkpoint holds -----------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the stage by name: roles, averages, optimisers."""
        out: dict[str, Tensor] = {}
        for name in self.roles:
            out |= {f"role/{name}/{key}": value for key, value in self.cast.weights(name).items()}
            states = self.optimisers[name].state_dict()["state"] if name in self.optimisers else {}
            for i, parameter in enumerate(self.cast.parameters(name)):
                out |= {f"optimiser/{name}/{parameter}/{key}": value for key, value in states.get(i, {}).items()}
        for i, average in enumerate(self.averages):
            out |= {f"average/{i}/{key}": value for key, value in average.weights.items()}
        return out

    def counters(self) -> dict[str, Any]:
        return {
            "stage": self.index,
            "iteration": self.iteration,
            "updates": self.updates,
            "skipped": self.skipped,
            "skipped_in_a_row": self._skipped_in_a_row,
            "curriculum": self.method.curriculum,
        }

    def restore(self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
        """Puts back what `tensors` and `counters` gave: the run goes on as if it had never stopped."""
        for name in self.roles:
            self.cast.module(name).load_state_dict(_under(tensors, f"role/{name}/"))
            if name not in self.optimisers:
                continue
            parameters = list(self.cast.parameters(name))
            states = {i: _under(tensors, f"optimiser/{name}/{key}/") for i, key in enumerate(parameters)}
            groups = self.optimisers[name].state_dict()["param_groups"]
            state = {i: {k: v.clone() for k, v in kept.items()} for i, kept in states.items() if kept}
            self.optimisers[name].load_state_dict({"state": state, "param_groups": groups})
        for i, average in enumerate(self.averages):
            for key, value in _under(tensors, f"average/{i}/").items():
                average.weights[key].copy_(value)
        self.iteration = counters["iteration"]
        self.updates, self.skipped = dict(counters["updates"]), dict(counters["skipped"])
        self._skipped_in_a_row = counters["skipped_in_a_row"]
        self.method.curriculum = dict(counters["curriculum"])


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
