"""The order of a whole bench: what is measured where, each run once, kept in a ledger as it is measured.

First what a lone request takes at plain FastAPI, which sets the SLO of each step count; then in every run each server
under its closed loops; then in every run each under Poisson arrivals, whose rates follow from the peers' closed loops.
Servers are interleaved within a run, from another one on in each, so that a drift of the machine meets all alike.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.machine import quantile
from bench.peers import engine, servers, summary, window
from bench.peers.ledger import Ledger
from bench.peers.pictures import Config, Painter
from bench.peers.servers import Running, serving
from bench.peers.window import SLO_FACTOR, Shape
from bench.peers.workloads import MIXES, Cell, capacity_cell, requests
from distill_jobs.tasks.shapes import TASK

_CAPTIONS = 4000  # more than a window asks, so that hardly a prompt comes twice in it
_LONE_S = 3.0
_PLAIN = "fastapi naive"
_HOPELESS = 2.0
"""Times its own rate: where more is asked under Poisson arrivals a server is not measured. It would answer nobody in
time, and take minutes for those who wait."""


@dataclass(frozen=True, slots=True)
class Options:
    """Which servers and cells, how often, and how long a window is. `python` is the peers' interpreter."""

    servers: Sequence[str]
    cells: Sequence[Cell]
    runs: int
    closed: Shape
    poisson: Shape
    python: Path
    folder: Path


class Bench:
    """`tick` is called with a line after each measurement."""

    def __init__(
        self, options: Options, config: Config, painter: Painter, ledger: Ledger, tick: Callable[[str], None]
    ) -> None:
        self.options, self._config, self._painter, self._ledger = options, config, painter, ledger
        self._tick = tick
        self._steps = {name: kind.steps for name, kind in config.kinds.items()}
        self._sizes = painter.sizes()

    def windows(self) -> int:
        """How many measurements there are in all; what the ledger holds is among them."""
        return self.options.runs * sum(1 for _ in self._wanted(self.options.cells))

    def run(self) -> list[dict[str, Any]]:
        """Measures what the ledger lacks and returns the cells."""
        closed = [cell for cell in self.options.cells if cell.mode == "closed"]
        poisson = [cell for cell in self.options.cells if cell.mode == "poisson"]
        self._lone()
        for cells in (closed, poisson):
            for run in range(self.options.runs):
                if cells:
                    self._ceiling(run)
                    self._run(run, cells)
        wanted = self._wanted(self.options.cells)
        return [self._cell(cell, server) for cell, server in wanted if not self._hopeless(cell, server)]

    def left_out(self) -> list[str]:
        """What was not measured because far more is asked there than the server makes."""
        return [
            f"{cell.name}, {server}: {self._rate(cell):.0f}/s asked, it makes {self._makes(cell, server):.0f}"
            for cell, server in self._wanted(self.options.cells)
            if self._hopeless(cell, server)
        ]

    def slo_ms(self) -> dict[str, float]:
        """By kind."""
        return {kind: SLO_FACTOR * ms for kind, ms in self._ledger["lone"].items()}

    def _wanted(self, cells: Sequence[Cell]) -> Iterator[tuple[Cell, str]]:
        for cell in cells:
            for server in self.options.servers:
                if servers.measures(server, MIXES[cell.mix], closed=cell.mode == "closed"):
                    yield cell, server

    def _lone(self) -> None:
        if "lone" in self._ledger:
            return
        lone = {}
        with self._serving(_PLAIN) as running:
            for index, kind in enumerate(self._config.kinds):
                asked = requests({kind: 1.0}, TASK.captions(400, index), index)
                shape = Shape(0.5, _LONE_S)
                load = {"mode": "closed", "concurrency": 1}
                taken = window.take(running, asked, load, shape, self.options.folder / "load")
                lone[kind] = 1000 * quantile([one.seconds for one in taken.records if one.status == 200], 0.5)
        self._ledger.put("lone", lone)

    def _ceiling(self, run: int) -> None:
        if (name := f"engine/{run}") not in self._ledger:
            timed = engine.seconds_per_picture(self._painter)
            self._ledger.put(name, {kind: {str(rows): s for rows, s in of.items()} for kind, of in timed.items()})

    def _run(self, run: int, cells: Sequence[Cell]) -> None:
        order = list(self.options.servers)
        turn = run % len(order)
        for server in [*order[turn:], *order[:turn]]:
            mine = [cell for cell, name in self._wanted(cells) if name == server]
            missing = [cell for cell in mine if not self._settled(run, cell, server)]
            for cell in mine:
                if cell not in missing:
                    self._tick(f"{_name(run, cell, server)}: known")
            if missing:
                with self._serving(server) as running:
                    for cell in missing:
                        self._window(run, cell, server, running)

    def _window(self, run: int, cell: Cell, server: str, running: Running) -> None:
        """The same requests for every server, other ones in every run."""
        seed = 1000 * run + self.options.cells.index(cell)
        asked = requests(MIXES[cell.mix], TASK.captions(_CAPTIONS, seed), seed)
        load: dict[str, Any] = {"mode": "closed", "concurrency": cell.amount}
        if cell.mode == "poisson":
            load = {"mode": "open", "rate": self._rate(cell), "seed": seed}
        if server == servers.TOLD:
            running.within_ms = self.slo_ms()
        shape = self.options.closed if cell.mode == "closed" else self.options.poisson
        taken = window.take(running, asked, load, shape, self.options.folder / "load")
        made = window.figures(taken, self.slo_ms(), self._steps)
        made |= {"wrong": window.wrong(taken, self._painter, self._sizes), "load": load}
        self._ledger.put(_name(run, cell, server), made)
        self._tick(f"{_name(run, cell, server)}: {made['images_per_s']} images/s, p95 {made['p95_ms']} ms")

    def _settled(self, run: int, cell: Cell, server: str) -> bool:
        return _name(run, cell, server) in self._ledger or self._hopeless(cell, server)

    def _hopeless(self, cell: Cell, server: str) -> bool:
        if cell.mode == "closed" or server in servers.OURS:
            return False
        return self._rate(cell) > _HOPELESS * self._makes(cell, server)

    def _rate(self, cell: Cell) -> float:
        """Requests a second of a Poisson cell."""
        return cell.amount / 100 * self._capacity(cell)

    def _makes(self, cell: Cell, server: str) -> float:
        """Pictures a second of this mix in a closed loop."""
        where = capacity_cell(cell)
        runs = [self._ledger[_name(run, where, server)] for run in range(self.options.runs)]
        return float(statistics.median(run["images_per_s"] for run in runs))

    def _capacity(self, cell: Cell) -> float:
        where = capacity_cell(cell)
        names = {server: [_name(run, where, server) for run in range(self.options.runs)] for server in servers.SERVERS}
        known = {
            server: [self._ledger[name] for name in mine if name in self._ledger] for server, mine in names.items()
        }
        return summary.capacity(where, {server: runs for server, runs in known.items() if runs})

    def _cell(self, cell: Cell, server: str) -> dict[str, Any]:
        runs = [self._ledger[_name(run, cell, server)] for run in range(self.options.runs)]
        most = cell.amount if cell.mode == "closed" else self._config.rows
        ceilings = [
            summary.ceiling(MIXES[cell.mix], _numbered(self._ledger[f"engine/{run}"]), most)
            for run in range(self.options.runs)
        ]
        return summary.cell(cell, server, runs, ceilings)

    def _serving(self, server: str) -> Any:
        return serving(server, self._config, self.options.folder / server.replace(" ", "-"), self.options.python)


def _name(run: int, cell: Cell, server: str) -> str:
    return f"{run}/{cell.name}/{server}"


def _numbered(of: Mapping[str, Mapping[str, float]]) -> dict[str, dict[int, float]]:
    return {kind: {int(rows): seconds for rows, seconds in by.items()} for kind, by in of.items()}
