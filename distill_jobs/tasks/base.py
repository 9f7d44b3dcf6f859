"""A task: captions, real pictures of them, and what can be read back from both; with a teacher that has learnt it.

One file each, ending in `TASK`; a teacher's manifest says which is its own. Everything that judges or trains on
captions reads the task, so that no method, metric or benchmark knows what the pictures show.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from engines import plugins
from engines.manifest import Guidance, StudentManifest

PACKAGE = "distill_jobs.tasks"
DEFAULT = "shapes"
"""The task of a manifest that names none."""
ABSENT = -1
"""Class of an attribute on which a caption is silent."""

Split = Literal["train", "heldout", "all"]
"""Scenes of the combinations that training sees, of those that it never sees, and of both."""


class Scene(Protocol):
    """What one caption says and nothing else."""

    @property
    def caption(self) -> str: ...

    @property
    def heldout(self) -> bool: ...

    def attributes(self) -> list[int]:
        """A class for each of the task's attributes, `ABSENT` where the caption is silent."""


@dataclass(frozen=True, slots=True)
class Pictures:
    """A batch of real pictures; row i of every field belongs to picture i."""

    pixels: npt.NDArray[np.uint8]  # [N, 3, H, W]
    captions: list[str]
    attributes: npt.NDArray[np.int64]  # [N, A], ABSENT where the caption is silent
    heldout: npt.NDArray[np.bool_]  # [N]


@dataclass(frozen=True, slots=True)
class Contract:
    """How the task's embedded teacher is sampled, as its manifest says it."""

    name: str
    steps: int  # where more no longer change its pictures much; measured in the model card
    compared: tuple[int, ...]  # counts at which it is only ever compared, never served
    guidance: Guidance
    solver: str
    prompts: tuple[str, ...]  # of its golden samples


@dataclass(frozen=True, slots=True)
class Task:
    """Attributes and classes by column, scenes by seed, pictures of scenes, and where the teacher's files are."""

    name: str
    attributes: tuple[str, ...]
    classes: tuple[int, ...]  # how many each attribute has
    words: tuple[tuple[str, ...], ...]  # what captions call the classes of each attribute; () where they do not
    size_px: int
    scenes: Callable[[int, int, Split], Sequence[Scene]]
    """(n, seed, split); another n gives other scenes."""
    draw: Callable[[Sequence[Any], int, int], Pictures]
    """(scenes of its own, seed, size_px); another seed fills in differently what the captions leave open."""
    folder: Path
    """Of its teacher: `pipeline/` and `answers/`."""
    weights: Path
    """Folder of the metric network and of the real pictures' statistics."""
    teacher: Contract

    @property
    def pipeline(self) -> Path:
        """The teacher's diffusers directory."""
        return self.folder / "pipeline"

    @property
    def answers(self) -> Path:
        """What the teacher answered to the evaluation's questions, shipped with its weights."""
        return self.folder / "answers"

    def sample(self, n: int, seed: int, *, split: Split, size: int | None = None) -> Pictures:
        """Pictures of `n` new scenes."""
        return self.draw(self.scenes(n, seed, split), seed, size or self.size_px)

    def captions(self, n: int, seed: int, split: Split = "train") -> list[str]:
        return [scene.caption for scene in self.scenes(n, seed, split)]


def load(name: str) -> Task:
    """The task of this name.

    Raises:
        UnknownPlugin: no file is called so.
    """
    task: Task = plugins.load(PACKAGE, name, "TASK")
    return task


def of(manifest: StudentManifest) -> Task:
    """The task of a teacher or of its students."""
    return load(manifest.task or DEFAULT)


def pictures_of(pixels: npt.NDArray[np.uint8], scenes: Sequence[Scene]) -> Pictures:
    """`pixels` [N, 3, H, W] with what their scenes say."""
    stated = [scene.attributes() for scene in scenes]
    return Pictures(
        pixels,
        [scene.caption for scene in scenes],
        np.array(stated, dtype=np.int64).reshape(len(scenes), -1),
        np.array([scene.heldout for scene in scenes], dtype=np.bool_),
    )
