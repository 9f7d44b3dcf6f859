from pathlib import Path

from bench.peers.ledger import Ledger

SETTINGS = {"threads": 2, "batches": (1, 2)}


def test_what_was_measured_is_known_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    Ledger(path, SETTINGS).put("0/cell/peer", {"p50_ms": 3.5})
    again = Ledger(path, SETTINGS)
    assert "0/cell/peer" in again
    assert again["0/cell/peer"] == {"p50_ms": 3.5}
    assert "1/cell/peer" not in again


def test_other_settings_know_nothing_of_it(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    Ledger(path, SETTINGS).put("lone", {"1": 10.0})
    assert "lone" not in Ledger(path, SETTINGS | {"threads": 1})
    assert "lone" in Ledger(path, SETTINGS)


def test_a_line_that_was_torn_off_is_measured_again_and_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    first = Ledger(path, SETTINGS)
    first.put("a", 1)
    first.put("b", 2)
    path.write_bytes(path.read_bytes()[:-9])
    second = Ledger(path, SETTINGS)
    assert "a" in second
    assert "b" not in second
    second.put("c", 3)
    third = Ledger(path, SETTINGS)
    assert (third["a"], third["c"]) == (1, 3)
