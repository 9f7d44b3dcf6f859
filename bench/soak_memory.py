"""What the processes of a soak hold as time goes by: resident memory and open files, and whether they grow."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import psutil

from bench.machine import quantile

GROWTH = 0.02  # of the memory at the start: more is no longer flat
GROWTH_BYTES = 4 * 2**20  # but so much may always come
MORE_FILES = 8  # connections come and go
JUDGED_S = 240.0
"""A process that was seen for less time is still filling its caches: its memory is told and not judged."""
_SETTLING = 0.25  # of the time that a process is seen


@dataclass(frozen=True, slots=True)
class Sample:
    """One process at one moment; `at_s` is monotonic."""

    at_s: float
    pid: int
    bytes: int
    files: int


@dataclass(frozen=True, slots=True)
class Held:
    """Of the last life of a process, once it had settled: medians of the first and of the last tenth of that time."""

    seconds: float
    mib_begin: float
    mib_end: float
    mib_per_hour: float  # slope of all samples, by least squares
    files_begin: int
    files_end: int

    @property
    def faults(self) -> list[str]:
        """What grew."""
        found = []
        allowed = max(GROWTH * self.mib_begin, GROWTH_BYTES / 2**20)
        if self.seconds >= JUDGED_S and self.mib_end > self.mib_begin + allowed:
            found.append(f"memory from {self.mib_begin} to {self.mib_end} MiB, {self.mib_per_hour} MiB an hour")
        if self.files_end > self.files_begin + MORE_FILES:
            found.append(f"open files from {self.files_begin} to {self.files_end}")
        return found


@dataclass(slots=True)
class Watch:
    """Looks at the processes that `pids` names whenever `look` is called."""

    pids: Callable[[], Mapping[str, int]]
    samples: dict[str, list[Sample]] = field(default_factory=dict)

    def look(self, at_s: float) -> None:
        for name, pid in self.pids().items():
            try:
                process = psutil.Process(pid)
                made = Sample(at_s, pid, process.memory_info().rss, process.num_fds())
            except psutil.Error:  # it is just being killed
                continue
            self.samples.setdefault(name, []).append(made)

    def held(self) -> dict[str, Held]:
        return {name: held(samples) for name, samples in sorted(self.samples.items())}


def held(samples: Sequence[Sample]) -> Held:
    """Of one process, whose samples are in order of time."""
    last = [one for one in samples if one.pid == samples[-1].pid]
    settled = [one for one in last if one.at_s >= last[0].at_s + _SETTLING * (last[-1].at_s - last[0].at_s)]
    tenth = max(1, len(settled) // 10)
    begin, end = settled[:tenth], settled[-tenth:]
    return Held(
        seconds=round(settled[-1].at_s - settled[0].at_s, 1),
        mib_begin=_mib(quantile([one.bytes for one in begin], 0.5)),
        mib_end=_mib(quantile([one.bytes for one in end], 0.5)),
        mib_per_hour=_mib(3600 * slope([one.at_s for one in settled], [one.bytes for one in settled])),
        files_begin=int(quantile([one.files for one in begin], 0.5)),
        files_end=int(quantile([one.files for one in end], 0.5)),
    )


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Of the line nearest to the points by least squares; 0 where all are at one place."""
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    if spread == 0:
        return 0.0
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread


def _mib(num_bytes: float) -> float:
    return round(num_bytes / 2**20, 2)
