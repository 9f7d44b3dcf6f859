"""Fewstep beside other servers of the same engine: `python -m bench.peers` writes bench/peers.json and bench/peers.md.

Stop it and start it again as you like: what was measured is kept in bench/tmp, until `--fresh`. The peers live in a
virtual environment of their own, which `make bench-peers` installs from bench/peers/requirements.txt.
"""

import argparse
import ast
import json
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench.machine import described
from bench.peers import models, summary, table
from bench.peers.bench import Bench, Options
from bench.peers.ledger import Ledger
from bench.peers.pictures import Config, Painter
from bench.peers.servers import FEWSTEP, PEERS, SERVERS, TOLD
from bench.peers.window import SLO_FACTOR, Shape
from bench.peers.workloads import CELLS, MIXES, QUICK
from bench.system import CACHE
from engines.backends.base import BATCHES, choose
from engines.registry.files import FilesRegistry

out = Console(stderr=True)
_BENCH = Path(__file__).parents[1]
_WORK = _BENCH / "tmp" / "peers"
_OURS = (
    "gateway, one worker and a Redis-protocol server as `fewstep up` starts them, with the engine, threads and batch "
    "sizes that all have; everything else at its default, so it measures by itself into how many streams it cuts the "
    "threads."
)

_TOLD = "the same, and under Poisson arrivals each request has its SLO as `timeout_ms`, which no peer can be told."


def main() -> None:
    given = _arguments()
    report = described("bench.peers")
    found = choose(given.backend)
    closed, poisson = (Shape(0.5, 2.0), Shape(0.5, 3.0)) if given.quick else (Shape(0.5, 3.0), Shape(1.0, 5.0))
    options = Options(
        servers=_chosen(given.peers, SERVERS, lambda name: (name, name.split()[0])),
        cells=_chosen(given.workloads, QUICK if given.quick else CELLS, lambda cell: (cell.mix,)),
        runs=given.runs or (1 if given.quick else 3),
        closed=closed,
        poisson=poisson,
        python=given.python.absolute(),
        folder=_WORK,
    )
    settings = {
        "engine": [found.backend, found.precision],
        "threads": given.threads,
        "batches": BATCHES,
        "weights": given.peer_weights,
    }
    settings |= {"windows": repr((closed, poisson)), "cpu": report["machine"]["cpu"]}
    path = _WORK / "ledger.jsonl"
    if given.fresh:
        path.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="fewstep-peers-") as data:
        registry = Path(data) / "registry"
        out.print("Publishing the students and compiling their engines; exports are kept for the next time.")
        config = Config(
            registry=str(registry),
            cache=str(CACHE.resolve()),
            kinds=models.publish(FilesRegistry(registry), {kind for cell in options.cells for kind in MIXES[cell.mix]}),
            backend=found.backend,
            precision=found.precision,
            batches=BATCHES,
            threads=given.threads,
            weights=given.peer_weights,
        )
        cells, slo_ms, left_out = _measured(options, config, Ledger(path, settings))
    report |= {
        "engine": f"{found.backend} {found.precision}, {given.threads} threads, batches {list(BATCHES)}, "
        f"denoiser weights of the peers {given.peer_weights}",
        "runs": options.runs,
        "mixes": MIXES,
        "slo": f"{SLO_FACTOR:g} times what the same request takes alone at plain FastAPI",
        "slo_ms": {kind: round(ms, 1) for kind, ms in slo_ms.items()},
        "summary": summary.summary(cells, options.cells),
        "cells": cells,
        "left_out": left_out,
        "given": {FEWSTEP: _OURS, TOLD: _TOLD, **{name: _docstring(peer.module) for name, peer in PEERS.items()}},
    }
    given.out.write_text(json.dumps(report, indent=1) + "\n")
    text = table.markdown(report)
    given.out.with_suffix(".md").write_text(text)
    out.print(Markdown(text))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one run of fewer and shorter cells, at most 10 minutes")
    parser.add_argument("--peers", default="", help=f"only these, separated by commas: {', '.join(SERVERS)}")
    parser.add_argument("--workloads", default="", help=f"only these, separated by commas: {', '.join(MIXES)}")
    parser.add_argument("--runs", type=int, default=0, help="of each cell: 3, quick 1")
    parser.add_argument("--threads", type=int, default=2, help="of the engine")
    parser.add_argument("--backend", default="auto")
    parser.add_argument(
        "--peer-weights",
        choices=("set", "constant"),
        default="set",
        help="how peers and bare loop hold denoiser weights; Fewstep sets them, so that students can be swapped",
    )
    parser.add_argument("--fresh", action="store_true", help="forget what was measured before")
    parser.add_argument("--python", type=Path, default=Path(".venv-peers/bin/python"), help="the peers' interpreter")
    parser.add_argument("--out", type=Path, default=_BENCH / "peers.json")
    return parser.parse_args()


def _chosen(wanted: str, all_of: Any, names: Any) -> list[Any]:
    """Those of `all_of` that have one of the comma-separated names; all if none is given."""
    asked = {name.strip() for name in wanted.split(",") if name.strip()}
    if unknown := asked - {name for one in all_of for name in names(one)}:
        raise SystemExit(f"unknown: {', '.join(sorted(unknown))}")
    return [one for one in all_of if not asked or asked & set(names(one))]


def _measured(
    options: Options, config: Config, ledger: Ledger
) -> tuple[list[dict[str, Any]], dict[str, float], list[str]]:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, TimeRemainingColumn(), console=out) as progress:
        bar = progress.add_task("windows")

        def tick(line: str) -> None:
            progress.console.print(line)
            progress.advance(bar)

        bench = Bench(options, config, Painter(config), ledger, tick)
        progress.update(bar, total=bench.windows())
        return bench.run(), bench.slo_ms(), bench.left_out()


def _docstring(module: str) -> str:
    """Of an adapter, whose packages are not installed here."""
    tree = ast.parse((Path(__file__).parent / "adapters" / f"{module}.py").read_text())
    return " ".join((ast.get_docstring(tree) or "").split())


if __name__ == "__main__":
    main()
