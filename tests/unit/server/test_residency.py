"""The rules of residency: who has to go for whom, whatever is where."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.errors import MemoryExceeded
from server.residency import LEAST_STAY_S, MIB, MOST_STAY_S, STAY, Residency, Resident, Tenant, stay_s, union_bytes

A, B, C = (Tenant("toys", f"{name}@{name * 64}") for name in "abc")
LONG_AGO_S = -1000.0


def books(limit: int, **given: int) -> Residency:
    """Residents by name and bytes, each with a part of its own; `a` was used last the longest ago."""
    made = Residency(limit)
    for used_s, (name, size) in enumerate(given.items()):
        tenant = Tenant("toys", f"{name}@{name * 64}")
        made.residents[tenant] = Resident({name: size}, LONG_AGO_S, used_s, 0.1, "resident")
    return made


def idle(tenant: Tenant) -> bool:
    return False


def test_what_fits_evicts_nobody_and_a_shared_part_counts_once() -> None:
    here = books(10)
    here.reserve({A: {"encoder": 4, "a": 2}}, 0.0)
    here.reserve({B: {"encoder": 4, "b": 2}}, 0.0)
    assert here.used_bytes == 8
    assert here.verdict({C: {"encoder": 4, "c": 2}}, 0.0, idle).fits
    assert not here.verdict({C: {"encoder": 4, "c": 3}}, 0.0, idle).fits


def test_the_one_goes_that_was_used_the_longest_ago() -> None:
    here = books(10, a=5, b=5)
    assert here.verdict({C: {"c": 5}}, 5.0, idle).idle == (A,)
    here.used(A, 4.0)
    assert here.verdict({C: {"c": 5}}, 5.0, idle).idle == (B,)


def test_who_is_in_use_goes_after_those_who_are_not_and_first_who_has_been_here_longest() -> None:
    here = books(10, a=5, b=5)
    verdict = here.verdict({C: {"c": 5}}, 5.0, lambda tenant: tenant == A)
    assert (verdict.idle, verdict.busy) == ((B,), ())
    here.residents[A].since_s = 1.0
    verdict = here.verdict({C: {"c": 5}}, 5.0, lambda tenant: True)
    assert (verdict.idle, verdict.busy) == ((), (B,))


def test_who_frees_nothing_that_is_needed_stays() -> None:
    here = books(10, a=1, b=9)
    assert here.verdict({C: {"c": 5}}, 5.0, idle).idle == (B,)
    here.residents[A].parts = here.residents[B].parts = {"shared": 9}
    assert set(here.verdict({C: {"c": 5}}, 5.0, idle).idle) == {A, B}


def test_what_was_loaded_stays_for_a_multiple_of_what_its_load_took() -> None:
    here = books(5)
    here.reserve({A: {"a": 5}}, 0.0)
    assert here.verdict({B: {"b": 5}}, 1.0, idle).again_s == float("inf")  # until it is loaded
    here.ready(A, 2.0)
    verdict = here.verdict({B: {"b": 5}}, 3.0, idle)
    assert (verdict.idle, verdict.again_s) == ((), 2.0 + 2.0 * STAY)
    assert here.verdict({B: {"b": 5}}, 2.0 + 2.0 * STAY, idle).idle == (A,)


def test_a_stay_is_bounded_on_both_sides() -> None:
    assert (stay_s(0.0), stay_s(1.0), stay_s(1000.0)) == (LEAST_STAY_S, STAY, MOST_STAY_S)


def test_what_is_pinned_or_being_swapped_to_is_never_in_the_way() -> None:
    here = books(10, a=5, b=5)
    here.pinned["toys"] = frozenset({A})
    assert here.verdict({C: {"c": 5}}, 5.0, idle).idle == (B,)
    here.swapping["toys"] = frozenset({B})
    verdict = here.verdict({C: {"c": 5}}, 5.0, idle)
    assert (verdict.fits, verdict.idle, verdict.busy, verdict.again_s) == (False, (), (), float("inf"))
    here.swapping["toys"] = frozenset()
    assert here.verdict({C: {"c": 5}}, 5.0, idle).idle == (B,)


def test_what_never_fits_is_refused_with_both_sizes() -> None:
    here = books(10 * MIB, a=5 * MIB, b=5 * MIB)
    with pytest.raises(MemoryExceeded, match=r"c@cccccccccccc takes 10.5 MiB for weights and .* may hold 10.0 MiB"):
        here.check({C: {"c": 21 * MIB // 2}})
    here.check({C: {"c": 10 * MIB}})
    with pytest.raises(MemoryExceeded, match=r"takes 6.0 MiB .* with a@aaaaaaaaaaaa, .* 11.0 MiB, .* hold 10.0 MiB"):
        here.check({C: {"c": 6 * MIB}}, beside=[A])
    here.pinned["toys"] = frozenset({B})
    with pytest.raises(MemoryExceeded, match="with b@bbbbbbbbbbbb"):
        here.check({C: {"c": 6 * MIB}})
    here.check({C: {"c": 5 * MIB}})
    here.check({C: {"c": 5 * MIB}, B: {"b": 5 * MIB}})


def test_a_load_is_expected_to_take_what_it_took_or_what_others_took_for_their_bytes() -> None:
    here = books(100)
    assert here.expected_load_s(A.version, {"a": 10}) == 0.0
    here.reserve({A: {"a": 10}}, 0.0)
    here.ready(A, 2.0)
    assert here.expected_load_s(A.version, {"a": 10}) == 2.0
    assert here.expected_load_s(B.version, {"b": 5}) == 1.0
    here.forget(A.version)
    assert here.expected_load_s(A.version, {"a": 5}) == 1.0


def test_parts_may_grow_where_there_is_room() -> None:
    here = books(10, a=5)
    assert not here.resize(A, {"a": 11})
    assert here.used_bytes == 5
    assert here.resize(A, {"a": 10})
    assert here.used_bytes == 10
    assert not here.resize(B, {"b": 0})


def test_a_part_that_shrinks_does_so_for_all_who_share_it() -> None:
    here = books(10)
    for tenant in (A, B):
        here.reserve({tenant: {"shared": 4, tenant.version: 1}}, 0.0)
    assert here.resize(A, {"shared": 2, A.version: 1})
    assert here.used_bytes == 4


STATES = st.sampled_from(["loading", "resident", "leaving"])
TENANTS = st.integers(0, 5).map(lambda i: Tenant("toys", str(i)))
PARTS = st.dictionaries(st.integers(0, 8), st.integers(1, 4), min_size=1, max_size=3)
RESIDENT = st.builds(
    Resident,
    parts=PARTS,
    since_s=st.floats(0, 10),
    used_s=st.floats(0, 10),
    load_s=st.floats(0, 2),
    state=STATES,
)


@given(
    residents=st.dictionaries(TENANTS, RESIDENT, max_size=6),
    wanted=st.dictionaries(TENANTS, PARTS, min_size=1, max_size=2),
    pinned=st.frozensets(TENANTS),
    busy=st.frozensets(TENANTS),
    limit=st.integers(4, 30),
    now_s=st.floats(10, 20),
)
def test_whatever_is_here_only_those_go_who_may_and_who_have_to(
    residents: dict[Tenant, Resident],
    wanted: dict[Tenant, dict[int, int]],
    pinned: frozenset[Tenant],
    busy: frozenset[Tenant],
    limit: int,
    now_s: float,
) -> None:
    here = Residency(limit, residents, {"toys": pinned})
    wanted = {tenant: dict(residents[tenant].parts) if tenant in residents else its for tenant, its in wanted.items()}
    verdict = here.verdict(wanted, now_s, busy.__contains__)

    def room(without: frozenset[Tenant]) -> int:
        kept = [one.parts for tenant, one in residents.items() if tenant not in without]
        return limit - union_bytes([*wanted.values(), *kept])

    gone = frozenset({*verdict.idle, *verdict.busy})
    for tenant in gone:
        one = residents[tenant]
        assert tenant not in pinned
        assert tenant not in wanted
        assert one.state != "loading"
        assert one.state == "leaving" or one.since_s + stay_s(one.load_s) <= now_s
        assert room(gone - {tenant}) < 0
    assert not set(verdict.idle) & busy
    assert set(verdict.busy) <= busy
    assert verdict.fits == (room(frozenset()) >= 0)
    if gone:
        assert room(gone) >= 0
    elif not verdict.fits:
        able = [t for t, one in residents.items() if t not in pinned and t not in wanted and one.state != "loading"]
        free = [t for t in able if residents[t].state == "leaving" or _end(residents[t]) <= now_s]
        assert room(frozenset(free)) < 0
        ends = [_end(residents[t]) for t in able if t not in free]
        assert verdict.again_s == min(ends, default=float("inf"))


def _end(one: Resident) -> float:
    return one.since_s + stay_s(one.load_s)
