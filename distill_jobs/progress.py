"""What a run tells its surroundings while it runs, and what they may wish of it."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from distill_jobs.stage import StageRun
from engines.denoiser import BaseDenoiser
from engines.manifest import Schedule

Wish = Literal["pause", "cancel", "finish"]  # finish: end now with the best so far
Evaluate = Callable[[int, BaseDenoiser, Mapping[int, Schedule]], Mapping[str, float]]
WISHES: tuple[Wish | None, ...] = (None, "pause", "cancel", "finish")


@dataclass(frozen=True, slots=True)
class Hooks:
    """What a run asks of its surroundings. All are called between updates, in the trainer's thread.

    poll: the wish that stands now, or None; asked before every iteration and piece of preparation.
    event: one JSON-able dict with `type` progress | preparing | stage | evaluation | best | alarm | checkpoint.
    panel: (iteration, latents by name gen, real, fake).
    evaluate: (iteration, frozen student, its schedules) -> metrics.
    """

    poll: Callable[[], Wish | None] = lambda: None
    event: Callable[[dict[str, Any]], None] = lambda event: None
    panel: Callable[[int, Mapping[str, Tensor]], None] = lambda iteration, latents: None
    evaluate: Evaluate | None = None
    clock: Callable[[], float] = time.monotonic


class Report:
    """Means of what the iterations said since the last report, and the speed."""

    def __init__(self, hooks: Hooks, run: StageRun, now: float) -> None:
        self.hooks, self.run = hooks, run
        self.began = self.last = now
        self.first = run.iteration
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}

    def add(self, seen: Mapping[str, float]) -> None:
        for key, value in seen.items():
            self.sums[key] = self.sums.get(key, 0.0) + value
            self.counts[key] = self.counts.get(key, 0) + 1

    def maybe(self, every_s: float) -> None:
        now, run = self.hooks.clock(), self.run
        if now - self.last < every_s or not self.sums:
            return
        it_s = (run.iteration - self.first) / max(1e-9, now - self.began)
        values = {key: self.sums[key] / self.counts[key] for key in self.sums}
        event = {
            "type": "progress",
            "stage": run.index,
            "method": run.stage.method,
            "iteration": run.iteration,
            "iterations": run.stage.iterations,
            "it_s": it_s,
            "eta_s": (run.stage.iterations - run.iteration) / it_s if it_s else None,
            "skipped": sum(run.skipped.values()),
            "lr": {name: optimiser.param_groups[0]["lr"] for name, optimiser in run.optimisers.items()},
            **values,
        }
        self.hooks.event(event)
        self.sums.clear()
        self.counts.clear()
        self.last = now
