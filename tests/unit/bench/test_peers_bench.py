"""The order of a whole bench, where everything that is to be measured is in the ledger already."""

from pathlib import Path
from typing import Any, cast

from bench.peers.bench import Bench, Options
from bench.peers.ledger import Ledger
from bench.peers.pictures import Config, Painter
from bench.peers.servers import FEWSTEP, TOLD
from bench.peers.window import Shape
from bench.peers.workloads import MIXES, Cell
from tests.unit.bench.test_peers_summary import run

CLOSED, AT_90, AT_120 = (
    Cell("50/30/20", "closed", 64),
    Cell("50/30/20", "poisson", 90),
    Cell("50/30/20", "poisson", 120),
)
SHAPE = Shape(0.0, 1.0)


class NoPainter:
    def sizes(self) -> dict[str, tuple[int, int]]:
        return {}


def bench(folder: Path, makes: dict[str, float], poisson: dict[Cell, list[str]]) -> Bench:
    """`makes`: pictures a second in the closed loop; `poisson`: which servers were measured where."""
    ledger = Ledger(folder / "ledger.jsonl", {})
    ledger.put("lone", {kind: 5.0 for kind in MIXES["50/30/20"]})
    ledger.put("engine/0", {kind: {"16": 0.002} for kind in MIXES["50/30/20"]})
    for server, rate in makes.items():
        if server != TOLD:
            ledger.put(f"0/{CLOSED.name}/{server}", run(images_per_s=rate))
    for cell, measured in poisson.items():
        for server in measured:
            ledger.put(f"0/{cell.name}/{server}", run(images_per_s=1.0))
    config = Config(registry="", cache="", kinds={}, backend="eager", precision="fp32", batches=(16,), threads=1)
    options = Options(list(makes), (CLOSED, AT_90, AT_120), 1, SHAPE, SHAPE, Path("python"), folder)
    return Bench(options, config, cast(Painter, NoPainter()), ledger, lambda line: None)


def test_a_server_that_is_asked_more_than_twice_what_it_makes_is_not_measured_and_that_is_told(tmp_path: Path) -> None:
    makes = {FEWSTEP: 50.0, TOLD: 0.0, "fastapi naive": 56.0, "fastapi grouped": 100.0}
    here = bench(
        tmp_path,
        makes,
        {AT_90: [FEWSTEP, TOLD, "fastapi naive", "fastapi grouped"], AT_120: [FEWSTEP, TOLD, "fastapi grouped"]},
    )
    cells: list[dict[str, Any]] = here.run()  # whatever was to be measured would need a server
    assert {(one["load"], one["peer"]) for one in cells if one["peer"] == "fastapi naive"} == {
        ("closed, 64 clients", "fastapi naive"),
        ("Poisson, 90 %", "fastapi naive"),
    }
    assert here.left_out() == ["50/30/20, Poisson, 120 %, fastapi naive: 120/s asked, it makes 56"]
    assert sum(one["peer"] == FEWSTEP for one in cells) == 3  # ours is measured wherever
