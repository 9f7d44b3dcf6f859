"""How threads are cut into streams: by what a lone call takes, measured once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engines.backends.base import Choice, Profile
from engines.loader import Loader
from engines.slot import EngineSlot
from engines.streams import PATIENCE, tuned
from tests import tiny_sd


@dataclass
class Machine:
    """A backend whose calls take what `lone_s` says of their threads, by a clock of its own."""

    lone_s: Callable[[int], float]
    concurrent: bool = True
    name: str = "machine"
    now_s: float = 0.0
    built: list[Profile] = field(default_factory=list)

    def build(self, graph: Any, profile: Profile) -> Profile:
        self.built.append(profile)
        return profile

    def load(self, compiled: Profile, weights: Mapping[str, torch.Tensor]) -> Any:
        def run(**inputs: torch.Tensor) -> None:
            self.now_s += self.lone_s(compiled.threads)

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
    made = tuned(machine, Graph(folder), Profile((1, 8), threads=threads), lambda: machine.now_s)  # type: ignore[arg-type]
    return made.streams, made.threads


@pytest.mark.parametrize(
    ("lone_s", "expected"),
    [
        (lambda threads: 1.0, (8, 1)),  # gains nothing from threads
        (lambda threads: 1 / threads, (1, 8)),  # gains all
        (lambda threads: 1.0 if threads >= 4 else 2.0, (2, 4)),  # from four of them
    ],
)
def test_threads_are_cut_as_far_as_a_lone_call_bears(
    tmp_path: Path, lone_s: Callable[[int], float], expected: tuple[int, int]
) -> None:
    assert cut(Machine(lone_s), 8, tmp_path) == expected


@pytest.mark.parametrize(("slower", "streams"), [(PATIENCE - 0.01, 2), (PATIENCE + 0.01, 1)])
def test_a_lone_call_is_patient_up_to_its_bound(tmp_path: Path, slower: float, streams: int) -> None:
    assert cut(Machine(lambda threads: slower if threads == 1 else 1.0), 2, tmp_path)[0] == streams


def test_it_is_measured_once_for_a_graph_and_a_number_of_threads(tmp_path: Path) -> None:
    machine = Machine(lambda threads: 1.0)
    assert cut(machine, 4, tmp_path) == cut(machine, 4, tmp_path)
    assert len(machine.built) == 2
    cut(machine, 2, tmp_path)
    assert len(machine.built) == 4
    assert {profile.batches for profile in machine.built} == {(1,)}


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
