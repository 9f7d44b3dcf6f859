"""SDXL-, Sana- and FLUX-shaped students on a GPU: `python -m bench.gpu` writes bench/gpu.json.

Two parts, in each of which everything stands beside diffusers, eager and compiled, in the same run on random weights:
    pictures    1, 2 and 4 steps from prompt to answer: our engines alone, and through the gateway (bench.gpu_pictures)
    steps       the denoiser alone by batch size, with the copies of each call in and out (bench.gpu_steps)
Compiled is torch.compile with CUDA graphs (mode reduce-overhead, UNets channels-last), `tensorrt fp8` has the products
of weights in fp8; everything else is bf16. `share_of_peak` is the networks' arithmetic per second over what a product
of 8192-sized bf16 matrices reaches on the same card.

A cell is a network, a size and a form; each is a process of its own, so that none inherits memory or clocks from the
last, and may take `--cell-minutes`. The cells whose answer is waited for the most come first. What was measured is
written after each: stop it when you like, or give it `--minutes`, and start it again with the same arguments; cells
that lacked time are tried again. `--quick --device cpu` tries the bench itself, on a network of a few thousand weights.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench import gpu_pictures, gpu_steps
from bench.gpu_networks import SHAPES
from bench.machine import described
from engines.backends.base import is_gpu
from engines.errors import FewstepError

OUT = Path(__file__).with_name("gpu.json")
CACHE = Path(".fewstep/bench-gpu")
"""Kept between runs: code and plans are made once."""
Cell = dict[str, Any]
PARTS: dict[str, tuple[tuple[str, ...], Callable[[Cell, argparse.Namespace], Cell]]] = {
    "pictures": (gpu_pictures.FORMS, gpu_pictures.measured),
    "steps": (gpu_steps.FORMS, gpu_steps.measured),
}
_NAMES = ("part", "network", "pixels", "form")
_SETTINGS = ("device", "batches", "rows", "calls", "seconds", "backend", "threads")  # of what is measured
_QUICK: dict[str, Any] = {
    "networks": ["tiny"],
    "pixels": [16],
    "batches": [1, 2],
    "rows": [1, 2],
    "calls": 2,
    "seconds": 0.5,
    "backend": "eager",
    "threads": 1,
}
out = Console(stderr=True)


def cells(given: argparse.Namespace) -> Iterator[Cell]:
    """The most wanted first."""
    for pixels in given.pixels:
        for part in given.parts:
            for network in given.networks:
                for form in PARTS[part][0]:
                    if not given.forms or form in given.forms:
                        yield {"part": part, "network": network, "pixels": pixels, "form": form}


def measured(cell: Cell, given: argparse.Namespace) -> Cell:
    """One cell, in this process."""
    try:
        made = PARTS[cell["part"]][1](cell, given)
    except (FewstepError, RuntimeError) as error:
        return cell | {"failed": f"{type(error).__name__}: {str(error)[-1500:]}"}
    memory_gb = torch.cuda.max_memory_allocated() / 1e9 if is_gpu(given.device) else 0.0
    return cell | made | {"memory_gb": round(memory_gb, 1)}


def run(given: argparse.Namespace, until_s: float) -> list[Cell]:
    """What is known, and the cells for which there is time."""
    settings = {name: getattr(given, name) for name in _SETTINGS} | {"gpu": _gpu(given.device)}
    before = json.loads(given.out.read_text()) if given.out.exists() else {}
    known = before["cells"] if before.get("settings") == settings else []
    found = {_key(cell): cell for cell in known if not cell.get("cut")}
    peak = gpu_steps.peak_tflops(given.device)
    head = described("bench.gpu") | {"settings": settings, "peak_tflops": round(peak, 1)}
    for cell in cells(given):
        left_s = min(until_s - time.monotonic(), 60 * given.cell_minutes)
        if _key(cell) in found or left_s <= 0:
            continue
        made = with_shares(_in_a_process(cell, given, left_s), peak)
        out.print(made)
        found[_key(cell)] = made
        given.out.write_text(json.dumps(head | {"cells": beside_engines(list(found.values()))}, indent=1) + "\n")
    return beside_engines(list(found.values()))


def _key(cell: Cell) -> tuple[Any, ...]:
    return tuple(cell[name] for name in _NAMES)


def _in_a_process(cell: Cell, given: argparse.Namespace, within_s: float) -> Cell:
    with tempfile.TemporaryDirectory() as scratch:
        order, answer = Path(scratch) / "order.json", Path(scratch) / "cell.json"
        told = {name: str(value) if isinstance(value, Path) else value for name, value in vars(given).items()}
        order.write_text(json.dumps([cell, told]))
        command = [sys.executable, "-m", "bench.gpu", "--order", str(order), "--to", str(answer)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=within_s)
        except subprocess.TimeoutExpired:
            return cell | {"failed": f"not within {within_s:.0f} s", "cut": True}
        if not answer.exists():
            return cell | {"failed": done.stderr.strip()[-1500:]}
        made: Cell = json.loads(answer.read_text())
        return made


def with_shares(cell: Cell, peak: float) -> Cell:
    """A cell with its arithmetic: 10^12 operations of a row, and the share of the peak at each batch or step count."""
    if "failed" in cell:
        return cell
    shape, pixels = SHAPES[cell["network"]], cell["pixels"]
    step = gpu_steps.tera_operations(shape.spec(pixels))
    if cell["part"] == "steps":
        share = {n: int(n) * step / (ms["median"] / 1000) / peak for n, ms in cell["step_ms"].items()}
        own: Cell = {"tera_operations": round(step, 2)}
    else:
        decoder = gpu_steps.tera_operations(shape.spec(pixels, "decoder"))
        share = {n: one["per_s"] * (int(n) * step + decoder) / peak for n, one in cell["pictures"].items()}
        own = {"tera_operations": {"step": round(step, 2), "decode": round(decoder, 2)}}
    return cell | own | {"share_of_peak": {n: round(value, 4) for n, value in share.items()}}


def beside_engines(found: list[Cell]) -> list[Cell]:
    """Cells of pictures with what they reach of the engines alone, where those were measured: pictures a second over
    theirs, and the time of a lone one over theirs."""
    alone = {(c["network"], c["pixels"]): c["pictures"] for c in found if c["form"] == "engine" and "pictures" in c}
    return [_beside(cell, alone.get((cell["network"], cell["pixels"]))) for cell in found]


def _beside(cell: Cell, engines: Cell | None) -> Cell:
    if engines is None or "pictures" not in cell:
        return cell
    ratios = {
        n: {
            "per_s": round(one["per_s"] / engines[n]["per_s"], 3),
            "alone": round(one["alone_ms"]["median"] / engines[n]["alone_ms"]["median"], 3),
        }
        for n, one in cell["pictures"].items()
    }
    return cell | {"of_engines": ratios}


def tables(found: Sequence[Cell]) -> Iterator[Table]:
    """Of each part that has cells."""
    for part in PARTS:
        mine = [cell for cell in found if cell["part"] == part]
        if not mine:
            continue
        made = Table(title=_TITLES[part])
        columns = list(dict.fromkeys(n for cell in mine for n in cell.get("share_of_peak", ())))
        for title in (*_NAMES[1:], *columns, "ready s", "GB"):
            made.add_column(title, justify="left" if title in ("network", "form") else "right")
        for cell in mine:
            head = [str(cell[name]) for name in _NAMES[1:]]
            if "failed" in cell:
                made.add_row(*head, cell["failed"][-60:])
                continue
            texts = [f"{_figure(cell, n)} ({cell['share_of_peak'][n]:.0%})" for n in columns]
            made.add_row(*head, *texts, str(cell["ready_s"]), str(cell["memory_gb"]))
        yield made


_TITLES = {
    "pictures": "by steps: pictures a second / ms of a lone one (share of the bf16 peak)",
    "steps": "by batch: ms of a step (share of the bf16 peak)",
}


def _figure(cell: Cell, n: str) -> str:
    if cell["part"] == "steps":
        return str(cell["step_ms"][n]["median"])
    return f"{cell['pictures'][n]['per_s']} / {cell['pictures'][n]['alone_ms']['median']}"


def _gpu(device: str) -> Cell | None:
    if not is_gpu(device):
        return None
    gpu = torch.cuda.get_device_properties(device)
    return {"name": gpu.name, "memory_gb": round(gpu.total_memory / 1e9), "cuda": torch.version.cuda}


def main() -> None:
    given = _arguments()
    if given.order:
        cell, told = json.loads(given.order.read_text())
        given.to.write_text(json.dumps(measured(cell, argparse.Namespace(**told | {"cache": Path(told["cache"])}))))
        return
    if is_gpu(given.device) and not torch.cuda.is_available():
        sys.exit("bench.gpu needs an NVIDIA GPU, and torch sees none: --quick --device cpu tries the bench without one")
    found = run(given, time.monotonic() + 60 * given.minutes)
    for table in tables(found):
        Console().print(table)
    if left := len({_key(cell) for cell in cells(given)} - {_key(cell) for cell in found if not cell.get("cut")}):
        out.print(f"{left} cells lacked time: start it again with the same arguments")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--networks", nargs="+", choices=SHAPES, default=["sana", "sdxl", "flux"])
    parser.add_argument("--pixels", nargs="+", type=int, default=[1024, 512])
    parser.add_argument("--forms", nargs="+", choices={form for forms, _ in PARTS.values() for form in forms})
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8, 16], help="of steps")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4], help="batches of pictures")
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=8.0, help="of a window that counts pictures")
    parser.add_argument("--backend", default="auto", help="of pictures")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="for all cells together")
    parser.add_argument("--cell-minutes", type=float, default=10.0)
    parser.add_argument("--quick", action="store_true", help="a network of a few thousand weights")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--order", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--to", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.quick:
        vars(given).update(_QUICK, forms=given.forms or ["diffusers", "engine", "gateway", "eager"])
    return given


if __name__ == "__main__":
    main()
