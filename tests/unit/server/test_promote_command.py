"""What `fewstep promote` says of a swap."""

from typing import Any

import pytest

from engines.errors import SwapRejected
from server.commands.deployments import _wait

SWAP = {"swap_id": "s1", "created_at": "2026-01-01T00:00:00.250Z", "ended_at": "2026-01-01T00:00:01.750Z"}


class Gateway:
    """Its swap has ended."""

    def __init__(self, **swap: Any) -> None:
        self._swap = SWAP | swap

    def get(self, path: str) -> dict[str, Any]:
        assert path == "/v1/deployments/shapes/swaps/s1"
        return self._swap


def test_a_swap_that_went_live_is_told_with_its_time_from_the_promotion_on_and_by_phase(
    capsys: pytest.CaptureFixture[str],
) -> None:
    _wait(Gateway(state="live", revision=3, phases={"staged": 0.125, "building": 1.25}), "shapes", SWAP)  # type: ignore[arg-type]
    said = capsys.readouterr()
    line = " ".join((said.out + said.err).split())  # however wide the terminal is
    assert line == "live as revision 3 after 1.50 s · staged 0.12 s · building 1.25 s"


def test_a_swap_that_was_dropped_is_an_error_with_its_reason() -> None:
    with pytest.raises(SwapRejected, match="s1 is dropped: golden_mismatch"):
        _wait(Gateway(state="dropped", reason="golden_mismatch"), "shapes", SWAP)  # type: ignore[arg-type]
