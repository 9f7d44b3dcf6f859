"""A student that takes more memory than there is: its largest engines are told how much may be on the device."""

import pytest

from engines.backends.base import Choice, Precision, Profile
from engines.graph import GraphStore
from engines.loader import Loader
from tests import tiny_sd


def loader(backend: str, room_bytes: int) -> Loader:
    precision: Precision = "bf16" if backend == "tensorrt" else "fp32"
    choice, profile = Choice(backend, precision), Profile((1,), precision)
    return Loader(tiny_sd.teacher().registry, choice, profile, GraphStore(None), room_bytes=room_bytes)


def sizes(backend: str, room_bytes: int = 0) -> list[int]:
    return sorted(loader(backend, room_bytes).weight_bytes(tiny_sd.teacher().manifest).values())


def test_the_largest_engines_give_way_where_the_backend_streams_weights() -> None:
    all_of_it = sizes("tensorrt")
    assert sizes("tensorrt", sum(all_of_it)) == all_of_it
    less = sizes("tensorrt", sum(all_of_it) - 1000)
    assert less[:-1] == all_of_it[:-1]
    assert less[-1] == all_of_it[-1] - 1000


@pytest.mark.parametrize("share", [0.9, 0.5, 0.1])
def test_they_fit_then(share: float) -> None:
    room_bytes = int(share * sum(sizes("tensorrt")))
    assert room_bytes - 3 <= sum(sizes("tensorrt", room_bytes)) <= room_bytes


def test_another_backend_takes_what_it_takes() -> None:
    assert sizes("eager", 1000) == sizes("eager")
