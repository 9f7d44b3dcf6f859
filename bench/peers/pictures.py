"""The pictures that every peer serves: one module, loaded by each server, so that all have the same compiled engine.

It is what a Fewstep worker loads (`engines.loader`, same backend, precision, threads, batch sizes, weights set from
outside), and `engines.images` makes the bytes. A peer adds what is its own: HTTP, queues, batching.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from torch import Tensor

from engines import images
from engines.backends.base import Choice, Precision, Profile, device_of
from engines.cache import DiskCache
from engines.graph import GraphStore
from engines.loader import Loader
from engines.registry.files import FilesRegistry
from engines.student import LoadedStudent, sampling


class Kind(msgspec.Struct, frozen=True):
    """A kind of request: which student makes it in how many steps; `deployment` is its name in Fewstep."""

    version: str
    steps: int
    deployment: str


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """What a peer is told: the file that `PEERS_CONFIG` names."""

    registry: str
    cache: str
    kinds: dict[str, Kind]
    backend: str
    precision: Precision
    batches: tuple[int, ...]
    threads: int
    weights: Literal["set", "constant"] = "set"
    grouped: bool = False
    processes: int = 1
    port: int = 0

    @property
    def rows(self) -> int:
        """The largest batch that the engine was compiled for."""
        return max(self.batches)

    @classmethod
    def read(cls, path: str | Path) -> "Config":
        return msgspec.json.decode(Path(path).read_bytes(), type=cls)


class Ask(msgspec.Struct, frozen=True):
    """One request to a peer, as JSON over HTTP."""

    kind: str
    prompt: str
    seed: int


class Painter:
    """Students on their engines. `paint` and `pieces` may be called from any thread; engine calls never overlap."""

    def __init__(self, config: Config, kinds: Sequence[str] | None = None, threads: int | None = None) -> None:
        self.config = config
        torch.set_num_threads(threads or config.threads)
        choice = Choice(config.backend, config.precision)
        profile = Profile(
            batches=config.batches,
            precision=config.precision,
            threads=threads or config.threads,
            weights=config.weights,
            device=device_of(config.backend),
        )
        loader = Loader(
            FilesRegistry(Path(config.registry)), choice, profile, GraphStore(DiskCache(Path(config.cache)))
        )
        self._kinds = {name: config.kinds[name] for name in kinds or config.kinds}
        self._students: Mapping[str, LoadedStudent] = {
            version: loader.load(loader.registry.student(version))
            for version in {kind.version for kind in self._kinds.values()}
        }
        self._engine = threading.Lock()
        self._warm()

    def paint(self, asked: Sequence[Ask]) -> list[Tensor]:
        """Pictures of requests of one kind, uint8 [3, H, W] each: one whole run through all stages."""
        made: list[Tensor] = []
        with self._engine:
            for piece in self._calls(asked, made):
                piece()
        return made

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Width and height by kind."""
        return {name: self._students[kind.version].manifest.resolutions[0] for name, kind in self._kinds.items()}

    def paint_split(self, asked: Sequence[Ask]) -> list[Tensor]:
        """As `paint` for a batch as it came: its kinds one after the other, all answered at the end."""
        places: dict[str, list[int]] = {}
        for place, one in enumerate(asked):
            places.setdefault(one.kind, []).append(place)
        made: dict[int, Tensor] = {}
        for mine in places.values():
            made |= zip(mine, self.paint([asked[place] for place in mine]), strict=True)
        return [made[place] for place in range(len(asked))]

    def paint_interleaved(self, asked: Sequence[Ask]) -> list[Tensor]:
        """As `paint`, but other threads' runs may have the engine between two of its calls."""
        made: list[Tensor] = []
        for piece in self._calls(asked, made):
            with self._engine:
                piece()
        return made

    def _calls(self, asked: Sequence[Ask], made: list[Tensor]) -> Iterator[partial[None]]:
        [name] = {one.kind for one in asked}
        kind = self._kinds[name]
        student, rows = self._students[kind.version], self.config.rows
        run = sampling(student, [one.prompt for one in asked], [one.seed for one in asked], kind.steps, batch=rows)
        for call in run.work:
            yield partial(_inferred, call)
        made.extend(picture for part in run.pictures for picture in part)

    def _warm(self) -> None:
        for name in self._kinds:
            for rows in self.config.batches:
                self.paint([Ask(name, "a red circle", seed) for seed in range(rows)])


def png(picture: Tensor) -> bytes:
    """The bytes that Fewstep's worker makes of the same picture."""
    return images.encode(picture.numpy(), "png")


@torch.inference_mode()
def _inferred(call: Any) -> None:
    call()
