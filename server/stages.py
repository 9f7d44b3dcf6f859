"""The stages of a batch on its engines: encode (prompts, or pictures to change), one step, decode.

Runs in an engine thread and decides nothing. Rows of different requests, students and step counts come in one batch as
long as the same weights answer them; what follows an evaluation is done once per plan and step, not once per row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import cast

import numpy as np
import torch
from torch import Tensor

from engines.editing import Edit, Looked, without
from engines.errors import InternalError
from engines.manifest import Step
from engines.noise import noise
from engines.noising import over
from engines.refine import Refinement
from engines.solvers import Solver, State
from engines.student import Aid, LoadedStudent, NetworkTimes
from server.prompt_cache import Embedding, PromptCache, PromptKey
from server.sources import Source
from server.tickets import LatentRow, PictureRow, PromptRow, SourceRow

_MAX_PLANS = 512


class Plans:
    """Plans and solvers by version, count, guidance and what a teacher adds, so that equal requests share theirs."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, int, float | None, str | None, Refinement | None], Solver] = {}

    def solver(self, student: LoadedStudent, steps: int, guidance: float | None, aid: Aid | None = None) -> Solver:
        """Its `plan` is the request's.

        Raises:
            StepsNotAllowed, InvalidRequest, InvalidManifest, UnknownPlugin: the student does not allow this.
        """
        by, how = (aid.teacher.version, aid.refinement) if aid else (None, None)
        key = (student.version, steps, guidance, by, how)
        if key not in self._made:
            rule = student.solver(steps, guidance, aid)
            if len(self._made) >= _MAX_PLANS:
                self._made.clear()
            self._made[key] = rule
        return self._made[key]

    def forget(self, version: str) -> None:
        """Drops the plans that a version that is no longer here has a part in."""
        for key in [key for key in self._made if version in (key[0], key[3])]:
            del self._made[key]


@dataclass(frozen=True, slots=True)
class _Evaluated:
    """A batch after its evaluation: x and pred alike, states before and, being filled in, after."""

    states: Sequence[State]
    x: Tensor
    pred: Tensor
    after: list[State]


class Stages:
    """Rows in, rows changed. `device` is where states and embeddings live."""

    def __init__(self, cache: PromptCache, device: str = "cpu") -> None:
        self.cache = cache
        self.device = device

    def recall(self, row: PromptRow) -> bool:
        """Gives a row's ticket its embedding if that is known."""
        found = self.cache.get(PromptKey(row.lane.engine, row.prompt))
        if found is not None:
            give(row, found)
        return found is not None

    @torch.inference_mode()
    def encode(self, rows: Sequence[PromptRow]) -> dict[str, Embedding]:
        """The embedding of each prompt; one that several rows share is encoded once. `give` them to their tickets."""
        encoder = rows[0].lane.engine
        known = {row.prompt: self.cache.get(PromptKey(encoder, row.prompt)) for row in rows}
        found = {prompt: embedding for prompt, embedding in known.items() if embedding is not None}
        new = [prompt for prompt in known if prompt not in found]
        if new:
            family = rows[0].ticket.student.family
            tokens = family.tokenize(new)
            cond = family.embed(tokens)
            for i, prompt in enumerate(new):
                made = Embedding(cond[i].clone(), tokens.ignored_words[i], tokens.counts[i])
                found[prompt] = made
                self.cache.put(PromptKey(encoder, prompt), made)
        return found

    @torch.inference_mode()
    def look(self, rows: Sequence[SourceRow]) -> list[Looked]:
        """What the VAE sees of the picture that each row's ticket changes. `show` it to them."""
        sources = [cast(Source, row.ticket.source) for row in rows]
        student = rows[0].ticket.student
        reading = [k for k, row in enumerate(rows) if row.ticket.student.family.sees]
        beneath = [without(sources[k].levels, sources[k].edited) for k in reading]
        levels = torch.stack([*(source.levels for source in sources), *beneath]).to(self.device)
        latents, deviation = student.family.look(levels)
        seen = [
            Looked(latents[i].to(self.device), None if deviation is None else deviation[i].to(self.device))
            for i in range(len(levels))
        ]
        changes = [source.changes(student.manifest.downscale) for source in sources]
        under = dict(zip(reading, seen[len(rows) :], strict=True))
        return [
            replace(seen[k], changes=None if where is None else where.to(self.device), beneath=under.get(k))
            for k, where in enumerate(changes)
        ]

    @torch.inference_mode()
    def denoise(self, rows: Sequence[PictureRow], calling: Callable[[], None] = lambda: None) -> dict[int, Tensor]:
        """One step of every row. Returns the clean estimates [C, (T,) H, W] of rows (by place) that will show one.

        `calling` is told when all is prepared.
        """
        states = [self._state(row) for row in rows]
        steps = [row.ticket.plan[state.i] for row, state in zip(rows, states, strict=True)]
        groups = _groups(rows, states)
        t, s, scale = _columns(self._told(rows, states, groups), self.device)
        x = torch.stack([state.x for state in states])
        scaled = x if scale is None else x * over(scale, x)
        cond, negative = torch.stack([_cond(row.ticket.prompt) for row in rows]), self._negative(rows, steps)
        seen = [row.edit.seen if row.edit else None for row in rows]
        w, net, family = [step.w for step in steps], steps[0].net, rows[0].ticket.performer(states[0].i).family
        calling()
        pred = family.denoise(scaled, t, cond, s, w, negative=negative, net=net, seen=seen)
        after, estimates = list(states), dict[int, Tensor]()
        for group in groups:
            estimates |= self._advance(rows, group, _Evaluated(states, x, pred, after))
        for row, state in zip(rows, after, strict=True):  # all at once: a batch that fails may be run again
            row.state = state
        return estimates

    @torch.inference_mode()
    def decode(self, rows: Sequence[LatentRow]) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
        """Pictures, uint8 [B, 3, H, W], or videos [B, T, 3, H, W], in the host's memory.

        Raises:
            InternalError: a finished picture's latents are not finite.
        """
        latents = torch.stack([row.latents for row in rows])
        if not torch.isfinite(latents).all():  # of all first: mostly that is the only question
            for row in rows:
                if row.partial_index is None and not torch.isfinite(row.latents).all():
                    raise InternalError(f"picture {row.index} is not finite: try another seed or guidance")
        pixels = rows[0].ticket.student.family.decode(latents)
        return np.ascontiguousarray(pixels.cpu().numpy())

    def _state(self, row: PictureRow) -> State:
        if row.state is None:
            ticket = row.ticket
            if ticket.looked is None:
                begun = ticket.draw()[row.index]
                row.state = begun if self.device == "cpu" else replace(begun, x=begun.x.to(self.device))
            else:
                row.edit = Edit.of(ticket.looked, ticket.seed(row.index), ticket.first)
                row.state = row.edit.begin(ticket.solver)
        return row.state

    def _told(
        self, rows: Sequence[PictureRow], states: Sequence[State], groups: Sequence[list[int]]
    ) -> tuple[NetworkTimes, ...]:
        """What the network is told of each row."""
        told: dict[int, NetworkTimes] = {}
        for group in groups:
            ticket = rows[group[0]].ticket
            told |= dict.fromkeys(group, ticket.student.times(ticket.solver, states[group[0]]))
        return tuple(told[k] for k in range(len(rows)))

    def _negative(self, rows: Sequence[PictureRow], steps: Sequence[Step]) -> Tensor | None:
        """What guided rows are guided away from; None where all of that is the empty prompt, which families know."""
        guided = [row for row, step in zip(rows, steps, strict=True) if step.w is not None]
        if not any(row.ticket.claim.request.negative_prompt for row in guided):
            return None
        return torch.stack([_cond(row.ticket.negative or row.ticket.prompt) for row in rows])

    def _advance(self, rows: Sequence[PictureRow], group: list[int], batch: "_Evaluated") -> dict[int, Tensor]:
        solver, i = rows[group[0]].ticket.solver, batch.states[group[0]].i
        whole = len(group) == len(rows)
        histories = (batch.states[k].history for k in group)
        state = State(
            x=batch.x if whole else batch.x[group],
            i=i,
            history=tuple(torch.stack(parts) for parts in zip(*histories, strict=True)),
        )
        mine = batch.pred if whole else batch.pred[group]
        shown = [k for k in group if shows_partial(rows[k])]
        clean = solver.x0(state, mine) if shown else None
        after = solver.advance(state, mine, self._fresh(solver, state, [rows[k] for k in group]))
        for place, k in enumerate(group):
            edit, x = rows[k].edit, after.x[place]
            if edit is not None:
                x = edit.held(solver, x, after.i)
            own = State(x, after.i, tuple(part[place] for part in after.history))
            batch.after[k] = solver.settle(own)
        return {} if clean is None else {k: clean[group.index(k)] for k in shown}

    def _fresh(self, solver: Solver, state: State, rows: Sequence[PictureRow]) -> Tensor | None:
        """The noise of a step with eta: draw i + 1 of each row's own seed, the first being the start."""
        if not solver.needs_noise(state):
            return None
        return torch.stack([_draw(row, state.i) for row in rows]).to(self.device)


@lru_cache(maxsize=512)
def _columns(told: tuple[NetworkTimes, ...], device: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """t and s, [B] fp32, and what x is multiplied by, None where that is 1. Batches of equal requests share them."""
    t, s, scale = torch.tensor([(one.t, one.s, one.scale) for one in told], dtype=torch.float32, device=device).unbind(
        1
    )
    return t.contiguous(), s.contiguous(), None if all(one.scale == 1 for one in told) else scale.contiguous()


def give(row: PromptRow, embedding: Embedding) -> None:
    """Puts a prompt's embedding where its ticket looks for it."""
    if row.is_negative:
        row.ticket.negative = embedding
    else:
        row.ticket.prompt = embedding
    row.ticket.missing -= 1


def _draw(row: PictureRow, i: int) -> Tensor:
    seed = row.ticket.seed(row.index)
    return row.edit.draw(seed, i) if row.edit else noise(seed, i + 1, row.lane.shape)


def show(row: SourceRow, looked: Looked) -> None:
    """Puts what was seen of a picture where its ticket looks for it."""
    row.ticket.looked = looked
    row.ticket.missing -= 1


def partial_steps(total: int, wanted: int) -> tuple[int, ...]:
    """After which of `total` steps partial pictures are shown: spread evenly, never after the last."""
    count = min(wanted, total - 1)
    return tuple(round(total * (k + 1) / (count + 1)) for k in range(count))


def shows_partial(row: PictureRow) -> bool:
    """Whether the step that runs now ends with a partial picture."""
    return row.ticket.claim.request.partial_images > 0 and row.step + 1 in _shown_after(row)


def partial_index(row: PictureRow) -> int:
    """Which of its partial pictures a row shows after the step that has just run."""
    return _shown_after(row).index(row.step)


def _shown_after(row: PictureRow) -> tuple[int, ...]:
    first, request = row.ticket.first, row.ticket.claim.request
    return tuple(first + k for k in partial_steps(len(row.ticket.plan) - first, request.partial_images))


def _cond(embedding: Embedding | None) -> Tensor:
    assert embedding is not None, "a row steps only after its prompt is encoded"
    return embedding.cond


def _groups(rows: Sequence[PictureRow], states: Sequence[State]) -> list[list[int]]:
    """Places of rows that follow one plan, stand at one step of it and have as much behind them: edits begin later."""
    groups: dict[tuple[int, int, int], list[int]] = {}
    for place, (row, state) in enumerate(zip(rows, states, strict=True)):
        groups.setdefault((id(row.ticket.solver), state.i, len(state.history)), []).append(place)
    return list(groups.values())
