"""How much memory engines may take: what there is, or what a container allows if that is less."""

import os
from pathlib import Path

import pytest

from engines import memory


def test_a_limit_of_the_container_counts_where_it_is_less_than_the_machine_has(tmp_path: Path) -> None:
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit, none, unlimited = tmp_path / "limit", tmp_path / "none", tmp_path / "unlimited"
    unlimited.write_text("max\n")
    assert memory.of_machine([none, unlimited]) == physical
    limit.write_text("1048576\n")
    assert memory.of_machine([none, unlimited, limit]) == 1048576
    limit.write_text(str(2**62))
    assert memory.of_machine([limit]) == physical


def test_a_share_of_it_is_for_weights() -> None:
    assert memory.share("cpu") == int(memory.SHARE * memory.of_machine())


@pytest.mark.parametrize(
    ("sizes", "room", "expected"),
    [
        ([2, 3, 5], 10, None),
        ([2, 3, 5], 9, 4),  # only the largest gives way
        ([2, 9, 10], 12, 5),  # the two largest do, equally
        ([6, 6, 6], 12, 4),
        ([7], 3, 3),
    ],
)
def test_the_largest_give_way_first_and_equally(sizes: list[int], room: int, expected: int | None) -> None:
    assert memory.level(sizes, room) == expected
    assert sum(min(size, expected or size) for size in sizes) <= room
