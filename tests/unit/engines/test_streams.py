"""How threads are cut into streams: by what they get done, measured once; and calls that have all threads."""

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engines.backends.base import Choice, Profile
from engines.loader import Loader
from engines.slot import EngineSlot
from engines.streams import GAIN, MOST, alone, is_alone, tuned, whole
from tests import tiny_sd


@dataclass
class Machine:
    """A backend whose calls take what `call_s` says of their threads, by a clock of its own, however many at once, and
    `cpu_s` of the processor."""

    call_s: Callable[[int], float]
    cpu_s: Callable[[int], float] = lambda threads: 1.0
    concurrent: bool = True
    name: str = "machine"
    built: list[Profile] = field(default_factory=list)
    _busy_s: Counter[int] = field(default_factory=Counter)  # by thread
    _used_s: float = 0.0
    _counting: threading.Lock = field(default_factory=threading.Lock)

    def now_s(self) -> float:
        return max(self._busy_s.values(), default=0.0)

    def process_s(self) -> float:
        return self._used_s

    def build(self, graph: Any, profile: Profile) -> Profile:
        self.built.append(profile)
        return profile

    def load(self, compiled: Profile, weights: Mapping[str, torch.Tensor]) -> Any:
        entered = threading.Barrier(compiled.streams)

        def run(**inputs: torch.Tensor) -> None:
            entered.wait(5)  # as many at once as there are streams
            with self._counting:
                self._busy_s[threading.get_ident()] += self.call_s(compiled.threads)
                self._used_s += self.cpu_s(compiled.threads)
            entered.wait(5)

        self._busy_s.clear()
        return SimpleNamespace(run=run, close=lambda: None)


@dataclass
class Graph:
    folder: Path
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: {"w": (2, 2)})

    def example(self, rows: int) -> dict[str, torch.Tensor]:
        return {"x": torch.zeros(rows, 1)}

    def kept(self, what: Sequence[str], build: Callable[[Path], None]) -> Path:
        place = self.folder / "-".join(what)
        if not place.exists():
            place.mkdir()
            build(place)
        return place


def cut(machine: Machine, threads: int, folder: Path) -> tuple[int, int]:
    clocks, profile = (machine.now_s, machine.process_s), Profile((1, 8), threads=threads)
    made = tuned(machine, Graph(folder), profile, clocks)  # type: ignore[arg-type]
    return made.streams, made.threads


@pytest.mark.parametrize(
    ("call_s", "expected"),
    [
        (lambda threads: 1.0, (MOST, 2)),  # gains nothing from threads
        (lambda threads: 1 / threads, (1, 8)),  # gains all
        (lambda threads: 1.0 if threads >= 4 else 4 / threads, (2, 4)),  # gains up to four of them
    ],
)
def test_threads_are_cut_as_long_as_more_gets_done(
    tmp_path: Path, call_s: Callable[[int], float], expected: tuple[int, int]
) -> None:
    assert cut(Machine(call_s), 8, tmp_path) == expected


@pytest.mark.parametrize(("threads", "expected"), [(2, (2, 1)), (3, (3, 1)), (5, (1, 5)), (6, (3, 2))])
def test_streams_share_the_threads_evenly(tmp_path: Path, threads: int, expected: tuple[int, int]) -> None:
    assert cut(Machine(lambda _: 1.0), threads, tmp_path) == expected


@pytest.mark.parametrize(("gain", "streams"), [(GAIN - 0.01, 1), (GAIN + 0.01, 2)])
def test_streams_have_to_gain_enough(tmp_path: Path, gain: float, streams: int) -> None:
    assert cut(Machine(lambda threads: 2 / gain if threads == 1 else 1.0), 2, tmp_path)[0] == streams


@pytest.mark.parametrize(("gain", "streams"), [(GAIN - 0.01, 1), (GAIN + 0.01, 2)])
def test_or_to_take_less_of_the_processor_as_a_busy_machine_shows_too(
    tmp_path: Path, gain: float, streams: int
) -> None:
    machine = Machine(lambda threads: 1 / threads, lambda threads: 1.0 if threads == 1 else gain)
    assert cut(machine, 2, tmp_path)[0] == streams


def test_short_rounds_go_on_for_a_second(tmp_path: Path) -> None:
    machine = Machine(lambda threads: 1 / 16)  # four calls a round, a quarter of a second
    cut(machine, 2, tmp_path)
    assert machine.process_s() == 4 * 4 + 4 * 4 * 2  # by calls, as each takes one second of the processor


def test_a_call_is_alone_only_where_and_while_it_is_said_to_be() -> None:
    with alone():
        with alone():
            pass
        with ThreadPoolExecutor(1) as pool:
            assert (is_alone(), pool.submit(is_alone).result()) == (True, False)
    assert not is_alone()
    assert whole(Profile((1,), threads=2, streams=3)) == Profile((1,), threads=6, streams=1)


def test_it_is_measured_once_for_a_graph_and_a_number_of_threads(tmp_path: Path) -> None:
    machine = Machine(lambda threads: 1.0)
    assert cut(machine, 4, tmp_path) == cut(machine, 4, tmp_path)
    assert [profile.streams for profile in machine.built] == [1, 2, 4]
    cut(machine, 2, tmp_path)
    assert [profile.streams for profile in machine.built] == [1, 2, 4, 1, 2]
    assert {profile.batches for profile in machine.built} == {(8,)}


def test_a_backend_whose_calls_do_not_overlap_keeps_one_stream(tmp_path: Path) -> None:
    machine = Machine(lambda threads: 1.0, concurrent=False)
    assert cut(machine, 8, tmp_path) == (1, 8)
    assert machine.built == []


def test_the_first_denoiser_settles_a_loader_for_good() -> None:
    teacher = tiny_sd.teacher()
    loader = Loader(teacher.registry, Choice("eager", "fp32"), Profile((1,), threads=2), teacher.graphs, tune=True)
    assert (loader.settled, loader.most_streams) == (False, 2)
    EngineSlot(loader).stage([teacher.manifest.version]).run()
    assert (loader.settled, loader.most_streams) == (True, 1)


def test_sizes_are_told_of_threads_that_are_cut_already() -> None:
    teacher = tiny_sd.teacher()
    loader = Loader(teacher.registry, Choice("eager", "fp32"), Profile((1,), threads=2), teacher.graphs, tune=True)
    loader.weight_bytes(teacher.manifest)
    assert loader.settled
