"""What a loss term is: something more that the student's own samples are asked for, beside its method's loss.

One file per term, which ends in `TERM`. A term sees what the student generates under backward simulation and may bring
roles of its own (a discriminator), which are trained as a method's are.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from distill_jobs.batches import Batch, repeated
from distill_jobs.methods.base import Method, MethodConfig, Needs, apart
from distill_jobs.roles import Cast, Role
from engines import plugins
from engines.denoiser import BaseDenoiser
from engines.errors import InvalidRequest

_PACKAGE = "distill_jobs.terms"


class Term(ABC):
    """One term over a `Cast`. Its docstring's first line says in listings what it is.

    `samples` of each condition are what it sees of the student: none (it asks the student itself), one, or two.
    """

    Config: ClassVar[type[MethodConfig]]
    needs: ClassVar[frozenset[Needs]] = frozenset()
    paper: ClassVar[str] = ""
    samples: ClassVar[int] = 1

    def __init__(self, cast: Cast, config: Any) -> None:
        self.cast, self.config, self.process = cast, config, cast.teacher.process

    @classmethod
    def roles(cls, config: Any) -> dict[str, Role]:
        return {}

    @classmethod
    def make(cls, name: str, denoiser: BaseDenoiser, config: Any) -> nn.Module:
        """The network of a role whose init is `new`; `denoiser` is the teacher without its guidance."""
        raise NotImplementedError(f"{cls.__name__} makes no network for {name}")

    @abstractmethod
    def student_loss(self, y: Tensor, batch: Batch) -> Tensor:
        """A scalar for the student's clean prediction y [samples x B, ...], which carries its gradient.

        With two samples the batch has as many rows, and its second half repeats the conditions of the first; with
        none y is empty.
        """

    def report(self, y: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Scalars that are logged beside the loss and train nothing."""
        return {}

    def own_loss(self, role: str, y: Tensor, batch: Batch) -> Tensor:
        """A scalar for one of the term's own roles; y is as for the student's loss, without gradient."""
        raise NotImplementedError(f"{type(self).__name__} trains no role {role}")

    def after(self, iteration: int) -> None:  # noqa: B027 (most terms have no phases)
        """Called after each iteration."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A term as a job says it. It joins when the share `after` of the stage has passed; over the share `ramp` from
    there its weight rises."""

    name: str
    weight: float = 1.0
    settings: Mapping[str, Any] = field(default_factory=dict)
    after: float = 0.0
    ramp: float = 0.0

    def weight_at(self, done: float) -> float:
        """Its weight when the share `done` of the stage has passed, at least `after`."""
        risen = (done - self.after) / self.ramp if self.ramp else 1.0
        return self.weight * min(1.0, risen)

    def resolve(self) -> tuple[type[Term], MethodConfig]:
        """The term's class and its configuration.

        Raises:
            UnknownPlugin: no file has this term; the message lists those there are.
            InvalidRequest: a setting is unknown or out of range; the message names it.
        """
        term: type[Term] = plugins.load(_PACKAGE, self.name, "TERM")
        try:
            return term, term.Config(**self.settings)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "config"
            raise InvalidRequest(f"term {self.name}, setting {where}: {first['msg']}", param="method.terms") from error


def terms() -> dict[str, type[Term]]:
    """Every term by name. Imports them all."""
    return {name: plugins.load(_PACKAGE, name, "TERM") for name in plugins.names(_PACKAGE)}


class Terms:
    """The terms of one stage, as the stage sees them. In figures a second one of the same name is `name.2`."""

    def __init__(self, wanted: Sequence[Wanted]) -> None:
        self._found = [(one, *one.resolve()) for one in wanted]
        self._live: list[tuple[Wanted, Term, str]] = []

    def roles(self) -> dict[str, Role]:
        return {name: role for _, term, config in self._found for name, role in term.roles(config).items()}

    def make(self, name: str, denoiser: BaseDenoiser) -> nn.Module:
        term, config = next((term, config) for _, term, config in self._found if name in term.roles(config))
        return term.make(name, denoiser, config)

    def join(self, cast: Cast) -> None:
        names = apart([one.name for one, _, _ in self._found])
        self._live = [
            (one, term(cast, config), name) for name, (one, term, config) in zip(names, self._found, strict=True)
        ]

    def loss(self, role: str, method: Method, batch: Batch, done: float = 1.0) -> dict[str, Tensor]:
        """What the terms add to a role's loss: to the student's every term that has joined when the share `done` of the
        stage has passed; to its own roles' each from the beginning."""
        if role == "student":
            return self._student_loss(method, batch, done)
        own = ((name, term) for _, term, name in self._live if role in term.roles(term.config))
        return {name: self._own_loss(role, term, method, batch) for name, term in own}

    def _own_loss(self, role: str, term: Term, method: Method, batch: Batch) -> Tensor:
        rows = repeated(batch, term.samples) if term.samples > 1 else batch
        return term.own_loss(role, method.generate(rows).detach(), rows)

    def _student_loss(self, method: Method, batch: Batch, done: float) -> dict[str, Tensor]:
        live = [(one.weight_at(done), term, name) for one, term, name in self._live if done >= one.after]
        most, n = max((term.samples for _, term, _ in live), default=0), len(batch)
        wide = repeated(batch, most) if most > 1 else batch
        y = method.generate(wide) if most else batch.noise[:0]
        seen: dict[str, Tensor] = {}
        for weight, term, name in live:
            own, rows = y[: term.samples * n], wide if term.samples > 1 else batch
            seen[name] = weight * term.student_loss(own, rows)
            with torch.no_grad():
                seen |= {f"{name}.{what}": value for what, value in term.report(own.detach(), rows).items()}
        return seen

    def after(self, iteration: int) -> None:
        for _, term, _ in self._live:
            term.after(iteration)
