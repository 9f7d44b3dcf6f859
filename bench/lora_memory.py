"""Memory of DMD with three full networks (teacher, critic, student) against LoRA roles beside one backbone.

`python -m bench.lora_memory` trains some iterations of each in a fresh process and writes `bench/lora_memory.json`:
bytes of weights, gradients, optimiser and average, counted from the tensors that are there, and the process' peak of
resident memory, which has the runtime and the activations in it too. The network is Stable Diffusion's UNet at a part
of its width, large enough that weights and not the runtime are what is measured.
"""

import argparse
import copy
import json
import resource
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from bench.machine import described
from distill_jobs.batches import TensorSource
from distill_jobs.lora import adapted
from distill_jobs.stage import Stage, StageRun
from distill_jobs.student_spec import LoraSpec
from engines.denoiser import Denoiser
from engines.families._text import Packing
from engines.families.sd import DenoiserNet
from engines.process import RF

OUT = Path(__file__).with_name("lora_memory.json")
LATENT, TOKENS, WIDTH = (4, 16, 16), 77, 768
ITERATIONS = 3


def network(channels: tuple[int, ...], layers: int = 2) -> Denoiser:
    """Stable Diffusion 1.5's denoiser with other widths, at random; its own are (320, 640, 1280, 1280)."""
    from diffusers import UNet2DConditionModel

    attention = len(channels) - 1
    unet = UNet2DConditionModel(
        sample_size=LATENT[1],
        block_out_channels=channels,
        layers_per_block=layers,
        down_block_types=("CrossAttnDownBlock2D",) * attention + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * attention,
        cross_attention_dim=WIDTH,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    return Denoiser(DenoiserNet(unet, Packing(TOKENS, WIDTH)), RF(), "flow")


def run_of(teacher: Denoiser, rank: int | None, rows: int) -> StageRun:
    """DMD with one critic update per student update: three full networks, or adapters of `rank`."""
    settings = {"batch": rows, "counts": [1], "fake_updates": 1, "fake_warmup": 0}
    settings["train"] = "full" if rank is None else "lora"
    student = copy.deepcopy(teacher) if rank is None else adapted(teacher, LoraSpec(rank=rank))
    return StageRun(0, Stage("dmd", ITERATIONS, settings), teacher, student)


def held(run: StageRun) -> dict[str, int]:
    """Bytes of each kind of tensor, shared ones once. Of gradients those of one role: its update ends with none."""
    networks = [run.cast.teacher, *run.cast.players.values()]
    return {
        "weights": _bytes(tensor for network in networks for tensor in _tensors(network)),
        "gradients": max(_bytes(run.cast.parameters(name).values()) for name in run.optimisers),
        "optimiser": _bytes(
            value for one in run.optimisers.values() for state in one.state.values() for value in state.values()
        ),
        "average": _bytes(value for average in run.averages for value in average.weights.values()),
    }


def _tensors(network: nn.Module) -> Iterator[Tensor]:
    """An adapted network's backbone too."""
    yield from (parameter for _, parameter in nn.Module.named_parameters(network))
    yield from network.buffers()


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def measured(channels: tuple[int, ...], rank: int | None, rows: int) -> dict[str, Any]:
    """What this process, which should be fresh, needs."""
    runtime = psutil.Process().memory_info().rss
    torch.manual_seed(0)
    teacher = network(channels)
    run = run_of(teacher, rank, rows)
    source = TensorSource(torch.randn(rows, TOKENS, WIDTH), LATENT)
    for _ in range(ITERATIONS):
        run.iterate(source)
    found = held(run)
    trained = {name: sum(p.numel() for p in run.cast.parameters(name).values()) for name in run.optimisers}
    return {
        "network_weights": sum(tensor.numel() for tensor in _tensors(teacher)),
        "trained_weights": trained,
        "bytes": found | {"total": sum(found.values())},
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "runtime_rss_bytes": runtime,
    }


def _in_a_process(channels: tuple[int, ...], rank: int | None, rows: int) -> dict[str, Any]:
    told = json.dumps([channels, rank, rows])
    command = [sys.executable, "-m", "bench.lora_memory", "--measure", told]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def entry(channels: tuple[int, ...], rank: int, rows: int) -> dict[str, Any]:
    """Both kinds at one size of batch, and what LoRA needs of what full networks need."""
    full, lora = _in_a_process(channels, None, rows), _in_a_process(channels, rank, rows)
    ratio = {
        "tensors": round(lora["bytes"]["total"] / full["bytes"]["total"], 3),
        "peak_rss": round(lora["peak_rss_bytes"] / full["peak_rss_bytes"], 3),
    }
    return {"rows": rows, "ratio": ratio, "full": full, "lora": lora}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--channels", type=int, nargs="+", default=[160, 320, 640, 640])
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 16], help="of an update: activations grow with them")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        channels, rank, rows = json.loads(args.measure)
        sys.stdout.write(json.dumps(measured(tuple(channels), rank, rows)) + "\n")
        return
    told = {"method": "dmd", "channels": args.channels, "rank": args.rank, "latent": LATENT}
    where = described("bench.lora_memory") | {"settings": told}
    entries = [entry(tuple(args.channels), args.rank, rows) for rows in args.rows]
    OUT.write_text(json.dumps({**where, "entries": entries}, indent=1) + "\n")
    for one in entries:
        sys.stdout.write(f"{one['rows']} rows: {one['ratio']}\n")


if __name__ == "__main__":
    main()
