"""The training loop that the stages share: updates, EMA, progress lines and checkpoints that a restart continues."""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distill_jobs.teachers.training.muon import Muon

_log = logging.getLogger(__name__)

Losses = dict[str, Tensor]
Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class Plan:
    """How long and how fast; every schedule reads the update, never the clock, so that a restart changes nothing."""

    updates: int
    batch: int
    matrix_lr: float
    adam_lr: float
    warmup: int = 50
    constant_share: float = 0.4
    last_scale: float = 0.01
    ema: float = 0.999
    checkpoint_s: float = 120.0
    report_s: float = 20.0
    max_minutes: float | None = None

    def scale(self, update: int) -> float:
        """Warm-up, a plateau, then a straight line down."""
        rise = min(1.0, (update + 1) / self.warmup)
        left = (self.updates - update) / (self.updates * (1 - self.constant_share))
        return rise * max(self.last_scale, min(1.0, left))


@dataclass(slots=True)
class Run(Generic[Network]):
    """One stage in training: the network, its average, its optimiser and how many updates it has seen."""

    network: Network
    average: Network
    optimiser: Muon
    plan: Plan
    checkpoint: Path
    update: int = 0
    seconds: float = 0.0
    stopping: bool = False

    def fit(self, loss: Callable[[int], Losses], score: Callable[[], str]) -> bool:
        """Trains to the end of the plan and returns True, or False when `max_minutes` or SIGTERM came first."""
        self._resume()
        signal.signal(signal.SIGTERM, self._stop)
        started = saved = reported = time.monotonic()
        first, spent = self.update, self.seconds
        while self.update < self.plan.updates:
            losses = loss(self.update)
            losses["total"].backward()  # type: ignore[no-untyped-call]
            norm = self.optimiser.step(self.plan.scale(self.update))
            self._follow()
            self.update += 1
            now = time.monotonic()
            self.seconds = spent + now - started
            if now - reported > self.plan.report_s:
                reported = now
                self._report(losses, norm, (self.update - first) / (now - started), score())
            if now - saved > self.plan.checkpoint_s:
                saved = now
                self.save()
            limit = self.plan.max_minutes
            if self.stopping or (limit is not None and now - started > 60 * limit):
                break
        self.save()
        return self.update >= self.plan.updates

    def _stop(self, number: int, frame: object) -> None:
        self.stopping = True  # the update in progress ends, then the state is written

    @torch.no_grad()
    def _follow(self) -> None:
        decay = min(self.plan.ema, (1 + self.update) / (10 + self.update))
        for slow, fast in zip(self.average.parameters(), self.network.parameters(), strict=True):
            slow.lerp_(fast, 1 - decay)

    def _report(self, losses: Losses, norm: float, updates_per_s: float, score: str) -> None:
        left_min = (self.plan.updates - self.update) / updates_per_s / 60
        values = " ".join(f"{name} {float(value.detach()):.4f}" for name, value in losses.items())
        rate = updates_per_s * self.plan.batch
        progress = f"update {self.update}/{self.plan.updates} {values} norm {norm:.2f} {score}"
        _log.info("%s | %.0f samples/s, %.1f min spent, %.1f min left", progress, rate, self.seconds / 60, left_min)

    def save(self) -> None:
        """Writes the whole state beside the old one, then renames: a kill leaves one good checkpoint."""
        tensors = {f"network.{k}": v for k, v in self.network.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        tensors |= {f"optimiser.{k}": v for k, v in self.optimiser.tensors().items()}
        note = {"update": str(self.update), "seconds": json.dumps(self.seconds)}
        fresh = self.checkpoint.with_suffix(".new")
        save_file({k: v.contiguous() for k, v in tensors.items()}, fresh, metadata=note)
        os.replace(fresh, self.checkpoint)

    def _resume(self) -> None:
        if not self.checkpoint.exists():
            return
        tensors = load_file(self.checkpoint)
        note = read_note(self.checkpoint)
        self.update, self.seconds = int(note["update"]), float(note["seconds"])
        self.network.load_state_dict(part(tensors, "network"))
        self.average.load_state_dict(part(tensors, "average"))
        self.optimiser.load(part(tensors, "optimiser"), self.update)
        _log.info("resumed %s at update %d", self.checkpoint.name, self.update)


def part(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    prefix = name + "."
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def read_note(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file, read from its header alone."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, dict[str, str]] = json.loads(file.read(length))
    return header.get("__metadata__", {})
