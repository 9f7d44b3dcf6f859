"""Prompts as training rows: texts from a named source or from the job itself, encoded once and kept.

Training never runs the text encoder: its output for every prompt is computed before the first update and found
again after a death, under the hash of teacher and texts.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from distill_jobs.batches import TensorSource
from distill_jobs.tasks import base as tasks
from distill_jobs.teachers.diffusers import Teacher
from engines import plugins
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
        shape: tuple[int, int, int],
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
