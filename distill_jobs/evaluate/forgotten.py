"""What is left of what was to be forgotten: found in the pictures of the prompts that name it.

The feature network's heads say of each attribute that a prompt states by a forgotten word whether its picture shows
that word or the one of the replacement. Only words for a class of one attribute (a colour, a kind) can be read back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from distill_jobs.evaluate.questions import Questions
from distill_jobs.forgetting import Forget, class_of
from distill_jobs.tasks.base import Task

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Forgotten:
    """Shares of the mentions of concepts in prompts: that show the concept, and that show what replaces it. None where
    no prompt mentions one that can be read back, or none has such a replacement."""

    concept: float | None
    instead: float | None


def forgotten(found: Ints, asked: Questions, rules: Sequence[Forget]) -> Forgotten:
    """`found` [N, A] are the attributes seen in the answers to `asked`."""
    hits, others = [], []
    for rule in rules:
        for column, old, new in _mentions(asked.task, rule):
            mentioned = asked.attributes[:, column] == old
            hits.append(found[mentioned, column] == old)
            if new is not None:
                others.append(found[mentioned, column] == new)
    return Forgotten(_mean(hits), _mean(others))


def _mentions(task: Task, rule: Forget) -> list[tuple[int, int, int | None]]:
    """(column, class of the concept, class of the replacement) of each attribute that the concept is a word for."""
    found = []
    for column, words in enumerate(task.words):
        old, new = class_of(words, rule.concept), class_of(words, rule.instead)
        if old is not None:
            found.append((column, old, new))
    return found


def _mean(parts: Sequence[npt.NDArray[np.bool_]]) -> float | None:
    together = np.concatenate(parts) if parts else np.zeros(0)
    return float(together.mean()) if len(together) else None
