"""A student that takes more memory than there is: its largest engines are told how much may be on the device."""

import pytest

from engines.backends.base import Choice, Graph, Precision, Profile
from engines.backends.tensorrt import Compiled, TensorRt
from engines.graph import GraphStore
from engines.loader import Loader
from engines.manifest import StudentManifest
from tests import tiny_sd
from tests.unit.engines.test_slot import experts, with_denoiser


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


def pair() -> StudentManifest:
    """A student of two networks on the teacher's graph."""
    registry = tiny_sd.teacher().registry
    return registry.student(experts(registry))


def test_two_networks_on_one_graph_are_two_engines() -> None:
    room_bytes = int(0.7 * sum(loader("tensorrt", 0).weight_bytes(pair()).values()))
    made = loader("tensorrt", room_bytes).weight_bytes(pair())
    assert len(made) == 4
    assert room_bytes - 4 <= sum(made.values()) <= room_bytes


def half_shared() -> StudentManifest:
    """One whose first network is the teacher's, with the weights too; its golden samples are another's."""
    teacher = tiny_sd.teacher()
    data = teacher.registry.read_blob(teacher.manifest.components["denoiser"].weights)
    return teacher.registry.student(with_denoiser(teacher.registry, pair().version, data))


def test_an_engine_that_somebody_holds_stays_as_it_is_and_the_others_give_way() -> None:
    own, other, room_bytes = tiny_sd.teacher().manifest, half_shared(), sum(sizes("tensorrt")) + 1000
    made = loader("tensorrt", room_bytes)
    made.hold(own)
    before = made.weight_bytes(own)
    assert sorted(before.values()) == sizes("tensorrt")
    expected = made.weight_bytes(other)
    made.hold(other)
    after = made.weight_bytes(other)
    assert after == expected
    assert before.items() <= after.items()
    assert sum(after.values()) == room_bytes
    assert made.weight_bytes(own) == before


def test_having_asked_for_the_size_of_a_student_changes_no_other_s() -> None:
    made = loader("tensorrt", sum(sizes("tensorrt")))
    assert sum(made.weight_bytes(half_shared()).values()) < sum(sizes("tensorrt")) + 1
    assert sorted(made.weight_bytes(tiny_sd.teacher().manifest).values()) == sizes("tensorrt")


def test_a_level_goes_with_the_last_who_holds_its_engine() -> None:
    made, own = loader("tensorrt", 3 * sizes("tensorrt")[-1] // 4), tiny_sd.teacher().manifest
    made.hold(own)
    assert made._levels
    made.let_go(own)
    assert not made._levels


class Unbuilt(TensorRt):
    """Compiles without a GPU what is not to be loaded."""

    def build(self, graph: Graph, profile: Profile) -> Compiled:
        return Compiled(graph, profile, None)


def test_other_weights_are_set_where_they_fit_and_built_where_they_are_streamed() -> None:
    own, other = tiny_sd.teacher().manifest, pair()
    made = loader("tensorrt", sum(sizes("tensorrt")))
    made._backend = Unbuilt()
    made.hold(own)
    made.compile(own, "denoiser")
    graph = made.graphs(own)["denoiser"]
    assert made.is_known(own, "denoiser", graph)
    made.hold(other)
    made.compile(other, "denoiser")
    assert not made.is_known(other, "denoiser", graph)
