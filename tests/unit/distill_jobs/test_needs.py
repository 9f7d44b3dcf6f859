"""What a process needed of memory, as the kernel counts it."""

import pytest

from distill_jobs.needs import Needs, forget_peak, peak_bytes

_LARGE = 1 << 28


def test_the_peak_is_of_what_was_there_at_once_until_it_is_forgotten() -> None:
    forget_peak()
    before = peak_bytes()
    filled = bytearray(b"\1") * _LARGE
    del filled
    assert peak_bytes() - before == pytest.approx(_LARGE, rel=0.02)  # the kernel counts in batches of pages
    forget_peak()
    assert peak_bytes() - before < 0.02 * _LARGE


def test_a_run_of_two_lives_needed_the_higher_peak_and_both_times() -> None:
    assert Needs(5, 1.0).then(Needs(3, 2.0)) == Needs(5, 3.0)
