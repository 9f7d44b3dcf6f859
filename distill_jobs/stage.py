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
from distill_jobs.experts import routed
from distill_jobs.group import Group
from distill_jobs.lora import Adapted
from distill_jobs.methods.base import Method, resolve
from distill_jobs.roles import Cast, Decode, Role
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


@dataclass(frozen=True, slots=True)
class Execution:
    """By whom and in what pieces an update is computed; what comes of it is the same. `micro_batch`: most rows of one
    backward pass, None for all that a process has; `checkpointing` computes activations anew instead of keeping them.
    """

    group: Group = field(default_factory=Group)
    micro_batch: int | None = None
    checkpointing: bool = False

    def shares(self, batch: Batch) -> list[Batch]:
        """This process' rows of an update, in the pieces that it is computed in."""
        rows, size = len(batch), self.group.size
        if rows % size:
            raise InvalidRequest(f"a batch of {rows} rows cannot be shared by {size} processes: choose a multiple")
        own = batch.shares(size)[self.group.rank]
        most = min(self.micro_batch or len(own), len(own))
        return own.shares(next(n for n in range(-(-len(own) // most), len(own) + 1) if len(own) % n == 0))


class StageRun:
    """The live state of one stage. `student` is trained in place, or, where the group shards, stays as it is."""

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
        execution: Execution = Execution(),
        decode: Decode | None = None,
    ) -> None:
        preset = resolve(stage.method)
        config = preset.config(stage.settings)
        self.index, self.stage, self.seed, self.precision, self.max_skips = index, stage, seed, precision, max_skips
        self.execution, self.group = execution, execution.group
        self.terms = Terms(stage.terms)
        own = preset.method.roles(config)
        if not own:
            raise InvalidRequest(f"{stage.method} trains no weights: it is a search, not a stage", param="method")
        self.roles: dict[str, Role] = self.terms.roles() | own  # the student is the last to be updated
        missing = preset.method.inputs - student.inputs
        if missing:
            raise InvalidRequest(f"{stage.method} needs a student whose network reads {', '.join(sorted(missing))}")
        if self.group.shards and isinstance(student, Adapted):
            message = "the roles of a LoRA share one backbone, which cannot be spread over processes: leave shard out"
            raise InvalidRequest(message, param="train.shard")

        def make(name: str, denoiser: BaseDenoiser) -> nn.Module:
            return preset.method.make(name, denoiser, config) if name in own else self.terms.make(name, denoiser)

        self._whole = student
        beginner = copy.deepcopy(student) if self.group.shards else student
        self.cast = Cast.build(teacher, beginner, self.roles, make, decode)
        for name, role in self.roles.items():
            if execution.checkpointing and role.train != "frozen":
                _checkpoint_activations(self.cast.module(name), name)
            self.group.shard(self.cast.module(name))
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
        return routed(self.cast.student, self.method.schedules)

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
        """A frozen copy of the student with these weights, all of them."""
        copied = copy.deepcopy(self._whole)
        copied.load_state_dict(dict(weights))
        return copied.requires_grad_(False).eval()

    def _update(self, name: str, source: Source, position: int) -> dict[str, float]:
        role, optimiser = self.roles[name], self.optimisers[name]
        batch = self.batch(source, position)
        with self.cast.only(name) as network:
            optimiser.zero_grad(set_to_none=True)
            terms = self.group.average(self._backward(name, batch))
            self.group.average_gradients(network.parameters())
            norm = float(self.group.whole(nn.utils.clip_grad_norm_(network.parameters(), role.clip)))
            seen = {f"loss.{name}.{term}": float(value) for term, value in terms.items()}
            seen[f"grad_norm.{name}"] = norm
            if self._usable(name, norm):
                self._step(name, role, optimiser)
            optimiser.zero_grad(set_to_none=True)
        return seen

    def _backward(self, name: str, batch: Batch) -> dict[str, Tensor]:
        """Gradients of this process' rows of the batch; the terms' means over them."""
        parts = self.execution.shares(batch)
        means: dict[str, Tensor] = {}
        for part in parts:
            with self.precision.context():
                terms = self.method.loss(name, part) if name in self._own else {}
                terms = terms | self.terms.loss(name, self.method, part, self.iteration / self.stage.iterations)
            total = torch.stack([term.float() for term in terms.values()]).sum()
            torch.autograd.backward(total / len(parts))
            for term, value in terms.items():
                means[term] = means.get(term, 0.0) + value.detach() / len(parts)
        return means

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
        """Every tensor of the stage by name, whole: roles, averages, optimisers. Of a group, for its leader alone."""
        out: dict[str, Tensor] = {}
        for name in self.roles:
            out |= {f"role/{name}/{key}": value for key, value in self.cast.weights(name).items()}
            states = self.optimisers[name].state_dict()["state"] if name in self.optimisers else {}
            for i, parameter in enumerate(self.cast.parameters(name)):
                out |= {f"optimiser/{name}/{parameter}/{key}": value for key, value in states.get(i, {}).items()}
        for i, average in enumerate(self.averages):
            out |= {f"average/{i}/{key}": value for key, value in average.weights.items()}
        return self.group.gathered(out)

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
            live = self.cast.weights(name)
            weights = _under(tensors, f"role/{name}/")
            self.cast.module(name).load_state_dict({k: self.group.as_held(v, live[k]) for k, v in weights.items()})
            if name not in self.optimisers:
                continue
            state = {
                i: {
                    key: self.group.as_held(value, parameter) if value.shape == parameter.shape else value.clone()
                    for key, value in kept.items()
                }
                for i, (at, parameter) in enumerate(self.cast.parameters(name).items())
                if (kept := _under(tensors, f"optimiser/{name}/{at}/"))
            }
            groups = self.optimisers[name].state_dict()["param_groups"]
            self.optimisers[name].load_state_dict({"state": state, "param_groups": groups})
        for i, average in enumerate(self.averages):
            for key, value in _under(tensors, f"average/{i}/").items():
                average.weights[key].copy_(self.group.as_held(value, average.weights[key]))
        self.iteration = counters["iteration"]
        self.updates, self.skipped = dict(counters["updates"]), dict(counters["skipped"])
        self._skipped_in_a_row = counters["skipped_in_a_row"]
        self.method.curriculum = dict(counters["curriculum"])


def _checkpoint_activations(network: nn.Module, role: str) -> None:
    """
    Raises:
        InvalidRequest: no part of the network can; heads and other small things need not.
    """
    able = [module for module in network.modules() if hasattr(module, "enable_gradient_checkpointing")]
    if not able and role == "student":
        raise InvalidRequest(
            "this student's network has no gradient checkpointing: leave it out", param="train.gradient_checkpointing"
        )
    for module in able:
        module.enable_gradient_checkpointing()  # type: ignore[operator]


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
