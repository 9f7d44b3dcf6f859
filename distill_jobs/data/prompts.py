"""Prompts as training rows: texts from a named source or from the job itself, encoded once and kept.

Training never runs the text encoder: its output for every prompt is computed before the first update and found
again after a death, under the hash of teacher and texts.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill_jobs.batches import Rows, TensorSource
from distill_jobs.forgetting import Forget, check_heard, holds, instead
from distill_jobs.tasks import base as tasks
from distill_jobs.teachers.diffusers import Teacher
from engines import plugins
from engines.denoiser import Forgetting
from engines.errors import InvalidRequest

COUNT = 8192


def texts(
    source: str | Sequence[str] | None, *, count: int = COUNT, seed: int = 0, default: str | None = None
) -> list[str]:
    """The prompts of a job: its own list, or `count` of the named task; of `default`, the teacher's, if it names none.

    Raises:
        InvalidRequest: no task has this name.
    """
    if source is not None and not isinstance(source, str):
        return list(source)
    name, known = source or default or tasks.DEFAULT, plugins.names(tasks.PACKAGE)
    if name not in known:
        raise InvalidRequest(
            f"data.prompts={name!r} is no source: choose from {', '.join(known)}, or list the prompts",
            param="data.prompts",
        )
    return tasks.load(name).captions(count, seed)


class PromptSource(TensorSource):
    """Encoded prompts as training rows, with their texts; `x` are latents of pictures that these prompts describe."""

    def __init__(
        self,
        prompts: Sequence[str],
        cond: Tensor,
        shape: tuple[int, ...],
        seed: int = 0,
        *,
        x: Tensor | None = None,
    ) -> None:
        super().__init__(cond, shape, x=x, seed=seed)
        self.prompts = tuple(prompts)

    def captions(self, position: int, count: int) -> list[str]:
        """The texts of `rows(position, count)`."""
        return [self.prompts[self._row(position * count + i)] for i in range(count)]


def encoded(teacher: Teacher, prompts: Sequence[str], cache: Path, *, seed: int = 0) -> PromptSource:
    """The source of these prompts; from `cache` if they were encoded before."""
    asked = json.dumps([teacher.manifest.components["encoder"].weights, *prompts]).encode()
    path = cache / f"prompts-{hashlib.sha256(asked).hexdigest()[:32]}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        save_file({"cond": teacher.encode(prompts).contiguous()}, partial)
        partial.replace(path)
    return PromptSource(prompts, load_file(path)["cond"], teacher.shape, seed)


class ForgettingSource:
    """The rows of a source of prompts, each with what the teacher is asked instead: `asked` [L, D] by prompt, for the
    prompts that name something to forget. Those of the others are their own.
    """

    def __init__(self, source: PromptSource, asked: Mapping[str, Tensor]) -> None:
        self.source, self.asked = source, asked
        self.shape, self.has_data = source.shape, source.has_data

    def rows(self, position: int, count: int) -> Rows:
        rows = self.source.rows(position, count)
        prompts = self.source.captions(position, count)
        asked = [self.asked.get(prompt, own) for prompt, own in zip(prompts, rows.cond, strict=True)]
        return replace(rows, cond=Forgetting(rows.cond, torch.stack(asked)))


def forgetting(teacher: Teacher, source: PromptSource, rules: Sequence[Forget], cache: Path) -> ForgettingSource:
    """The source for a student that forgets.

    Raises:
        InvalidRequest: no prompt names a concept, so that nothing would be learnt of it.
    """
    check_heard(source.prompts, rules)
    wanted = {prompt: instead(prompt, rules) for prompt in dict.fromkeys(source.prompts) if holds(prompt, rules)}
    texts = sorted({text for text in wanted.values() if text is not None})
    known: dict[str | None, Tensor] = {None: teacher.null()[0]}
    if texts:
        known |= dict(zip(texts, encoded(teacher, texts, cache).cond, strict=True))
    return ForgettingSource(source, {prompt: known[text] for prompt, text in wanted.items()})
