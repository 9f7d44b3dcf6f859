"""Golden samples: a few prompts with their noise and the pictures that the student must reproduce.

They are made once, with `eager` in fp32, and stand in the artefact. An engine that does not reproduce them within
its tolerance never serves: a wrong weight map, another solver or a broken compiler shows here.
A row is one prompt, one seed and one step count; every count of the student has at least one.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from engines.backends.base import tolerance
from engines.errors import CorruptBlob, GoldenMismatch
from engines.manifest import StudentManifest, shown
from engines.noise import noise
from engines.streams import alone
from engines.student import LoadedStudent, sample, sampling

ROWS = 4


@dataclass(frozen=True, slots=True)
class Golden:
    """noise fp32 (the first draw of each seed) and pictures uint8: [N, C, H, W] and [N, 3, H, W], of videos
    [N, C, T, H, W] and [N, T, 3, H, W]."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: tuple[int, ...]
    noise: Tensor
    pictures: Tensor

    def to_bytes(self) -> bytes:
        rows = json.dumps({"prompts": self.prompts, "seeds": self.seeds, "steps": self.steps})
        tensors = {"noise": self.noise.contiguous(), "pictures": self.pictures.contiguous()}
        data: bytes = save(tensors, metadata={"rows": rows})  # one key: safetensors writes several in random order
        return data

    @classmethod
    def from_bytes(cls, data: bytes) -> "Golden":
        """Raises `CorruptBlob` where these are no golden samples."""
        try:
            tensors = load(data)
            size = int.from_bytes(data[:8], "little")
            text = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["rows"])
            rows = {name: tuple(text[name]) for name in ("prompts", "seeds", "steps")}
            return cls(noise=tensors["noise"], pictures=tensors["pictures"], **rows)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise CorruptBlob(f"the golden samples cannot be read: {error}; make the student again") from error


def make(student: LoadedStudent, prompts: tuple[str, ...], *, first_seed: int = 1000) -> Golden:
    """Golden samples of every step count, at least `ROWS` rows; `student` must run on the reference backend."""
    counts = sorted(student.manifest.schedules)
    rows = max(ROWS, len(counts))
    steps = tuple(counts[i % len(counts)] for i in range(rows))
    said = tuple(prompts[i % len(prompts)] for i in range(rows))
    seeds = tuple(range(first_seed, first_seed + rows))
    pictures = [sample(student, [p], [seed], k) for p, seed, k in zip(said, seeds, steps, strict=True)]
    drawn = torch.stack([noise(seed, 0, student.latent_shape) for seed in seeds])
    return Golden(said, seeds, steps, drawn, torch.cat(pictures))


def verification(student: LoadedStudent, golden: Golden) -> Iterator[Callable[[], None]]:
    """The check of a loaded student, row by row at batch 1, as calls for the engine's thread to make in turn.

    Asking for the next call raises `GoldenMismatch` where the row before it is not the golden one.
    """
    _check_contract(student.manifest, golden)
    allowed = tolerance(student.backend, student.precision)
    for i, (prompt, seed, steps) in enumerate(zip(golden.prompts, golden.seeds, golden.steps, strict=True)):
        if not torch.equal(noise(seed, 0, student.latent_shape), golden.noise[i]):
            raise GoldenMismatch(f"seed {seed} draws other noise here than where {shown(student.version)} was made")
        run = sampling(student, [prompt], [seed], steps, batch=1)
        yield from map(_alone, run.work) if i % 2 else run.work  # what is compiled for lone calls is judged too
        if fault := allowed.fault(run.pictures[0], golden.pictures[i : i + 1]):
            raise GoldenMismatch(
                f"{shown(student.version)} on {student.backend} {student.precision} does not reproduce its golden "
                f"sample {i} ({steps} steps): {fault}"
            )


def _alone(call: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        with alone():
            call()

    return run


def _check_contract(manifest: StudentManifest, golden: Golden) -> None:
    if missing := sorted(set(manifest.schedules) - set(golden.steps)):
        raise GoldenMismatch(f"the golden samples of {shown(manifest.version)} cover no plan of {missing} steps")
