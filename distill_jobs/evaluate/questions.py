"""What an evaluation asks: captions, seeds and what the captions state, the same for every generator.

Every caption is asked twice with different seeds, so that diversity needs no pictures of its own; one caption in eight
shows an attribute combination that no training picture had. The first n questions of a seed are the first n of any
longer list, so that a short evaluation can be compared with part of a long one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from distill_jobs.forgetting import Forget, holds
from distill_jobs.tasks import shapes
from distill_jobs.tasks.base import Scene, Task

SEEDS_PER_CAPTION = 2
HELD_OUT_EVERY = 8
_BLOCK_CAPTIONS = 40
_PICTURE_SEEDS = 2_000_000_000  # far from what training draws
_SCENE_SEEDS = 4_000_000_000
_REAL_SET_SEEDS = 5_000_000_000
_OTHER_SEEDS = 500_000


@dataclass(frozen=True, slots=True)
class Questions:
    """Row i of every field belongs to picture i."""

    task: Task
    seed: int
    scenes: list[Scene]
    seeds: list[int]  # of the noise; two rows of one caption differ in nothing else
    other_seeds: list[int]  # for a second sample of the same generator
    attributes: npt.NDArray[np.int64]  # [N, A], ABSENT where the caption is silent
    heldout: npt.NDArray[np.bool_]  # [N]
    groups: npt.NDArray[np.int64]  # [N], which caption
    rows: npt.NDArray[np.int64]  # [N], which of all questions of this seed

    @property
    def n(self) -> int:
        return len(self.scenes)

    @property
    def captions(self) -> list[str]:
        return [scene.caption for scene in self.scenes]

    def part(self, index: npt.NDArray[np.int64]) -> Questions:
        """Those at `index` [M]."""
        return Questions(
            task=self.task,
            seed=self.seed,
            scenes=[self.scenes[i] for i in index],
            seeds=[self.seeds[i] for i in index],
            other_seeds=[self.other_seeds[i] for i in index],
            attributes=self.attributes[index],
            heldout=self.heldout[index],
            groups=np.unique(self.groups[index], return_inverse=True)[1],
            rows=self.rows[index],
        )

    def draw(self, again: int, size: int) -> npt.NDArray[np.uint8]:
        """Real pictures of the captions: the answers of a perfect generator. Another `again` draws new ones."""
        return self.task.draw(self.scenes, _SCENE_SEEDS + self.seed * 1000 + again, size).pixels


def questions(n: int, seed: int = 0, task: Task = shapes.TASK) -> Questions:
    num_captions = -(-n // SEEDS_PER_CAPTION)
    asked = _scenes(task, num_captions, _SCENE_SEEDS + seed * 1_000_000)
    rows = [scene for scene in asked for _ in range(SEEDS_PER_CAPTION)][:n]
    first = _PICTURE_SEEDS + seed * 1_000_000
    return Questions(
        task=task,
        seed=seed,
        scenes=rows,
        seeds=list(range(first, first + n)),
        other_seeds=list(range(first + _OTHER_SEEDS, first + _OTHER_SEEDS + n)),
        attributes=np.array([scene.attributes() for scene in rows], dtype=np.int64),
        heldout=np.array([scene.heldout for scene in rows], dtype=np.bool_),
        groups=np.arange(n) // SEEDS_PER_CAPTION,
        rows=np.arange(n),
    )


def real_set(n: int, size: int, task: Task = shapes.TASK, *, without: Sequence[Forget] = ()) -> npt.NDArray[np.uint8]:
    """The fixed real pictures that `fd` is measured to: other captions, with the same share of unseen combinations.
    Of these n, those that name something of `without` are left out."""
    scenes = [scene for scene in _scenes(task, n, _REAL_SET_SEEDS) if not holds(scene.caption, without)]
    return task.draw(scenes, _REAL_SET_SEEDS, size).pixels


def _scenes(task: Task, num: int, seed: int) -> list[Scene]:
    """Drawn in blocks, each with its share of held-out combinations: a longer list starts like a shorter one."""
    unseen = _BLOCK_CAPTIONS // HELD_OUT_EVERY
    found: list[Scene] = []
    for block in range(-(-num // _BLOCK_CAPTIONS)):
        common = [*task.scenes(_BLOCK_CAPTIONS - unseen, seed + 2 * block, "train")]
        rare = task.scenes(unseen, seed + 2 * block + 1, "heldout")
        for i, scene in enumerate(rare):
            common.insert(i * HELD_OUT_EVERY, scene)
        found += common
    return found[:num]
