"""Makes the embedded teacher: `python -m distill_jobs.teachers.shapes.train all --out DIR`, in stages that resume.

Each stage reads what the one before left in DIR and continues its own checkpoint, so a stopped run is started again
with the same command. The network that the metrics look through is trained beside it, by `distill_jobs.evaluate`.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from distill_jobs.teachers.shapes import denoiser, export, latents, tokenizer, vae
from distill_jobs.teachers.shapes.denoiser import TextToLatent
from distill_jobs.teachers.shapes.loop import Losses, Network, Plan, Run, part
from distill_jobs.teachers.shapes.muon import Muon

_log = logging.getLogger(__name__)

_SEED = 20_000_000  # picture seeds of training start here; evaluation uses small ones
_CHUNKS = 20
_VAE = Plan(updates=2_200, batch=16, matrix_lr=0.02, adam_lr=2e-3, ema=0.995)
_SLIM = Plan(updates=1_400, batch=32, matrix_lr=0.02, adam_lr=2e-3, ema=0.995)
_DENOISER = Plan(updates=4_200, batch=64, matrix_lr=0.02, adam_lr=2e-3, ema=0.998)


def train_vae(out: Path, plan: Plan) -> bool:
    torch.manual_seed(0)
    network = vae.build(vae.WIDE)
    run = _run(network, plan, out / "vae.safetensors")
    unseen = latents.pictures(128, 1, "heldout")

    def loss(update: int) -> Losses:
        generator = torch.Generator().manual_seed(update)
        return vae.loss(network, latents.pictures(plan.batch, _SEED + update, "train"), generator)

    return run.fit(loss, lambda: f"psnr {vae.psnr_db(run.average, unseen):.2f} dB")


def encode(out: Path) -> bool:
    latents.write(trained_vae(out, "vae"), out / "latents", chunks=_CHUNKS)
    return True


def train_slim(out: Path, plan: Plan) -> bool:
    torch.manual_seed(2)
    network = vae.build(vae.SLIM)
    run = _run(network, plan, out / "slim.safetensors")
    unseen = latents.pictures(128, 1, "heldout")

    @functools.lru_cache(maxsize=1)
    def chunk(index: int) -> tuple[torch.Tensor, torch.Tensor]:
        drawn = latents.as_input(latents.chunk_pictures(index))
        return drawn, latents.chunk(out / "latents", index)

    def loss(update: int) -> Losses:
        index, part_of_it = divmod(update, latents.CHUNK // plan.batch)
        pictures, coded = chunk(index % _CHUNKS)
        rows = slice(part_of_it * plan.batch, (part_of_it + 1) * plan.batch)
        return vae.slim_loss(network, pictures[rows], coded[rows], torch.Generator().manual_seed(update))

    return run.fit(loss, lambda: f"psnr {vae.psnr_db(run.average, unseen):.2f} dB")


def train_denoiser(out: Path, plan: Plan) -> bool:
    torch.manual_seed(1)
    words = tokenizer.build()
    empty = tokenizer.encode(words, [""])[0]
    network = TextToLatent(len(words))
    run = _run(network, plan, out / "denoiser.safetensors")
    cached = latents.read(out / "latents", chunks=_CHUNKS)
    spare = 256  # the last rows never train; they show whether the network learns or remembers
    trained = len(cached.x0) - spare

    def loss(update: int) -> Losses:
        generator = torch.Generator().manual_seed(update)
        rows = torch.randint(trained, (plan.batch,), generator=generator)
        ids = denoiser.drop_captions(cached.ids[rows], empty, generator)
        return denoiser.loss(network, cached.x0[rows], ids, generator)

    @torch.no_grad()
    def score() -> str:
        generator = torch.Generator().manual_seed(0)
        unseen = denoiser.loss(run.average, cached.x0[trained:], cached.ids[trained:], generator)
        return f"unseen {float(unseen['total']):.4f}"

    return run.fit(loss, score)


def trained_vae(out: Path, stage: str) -> AutoencoderKL:
    """The wide network ("vae") or the slim one ("slim")."""
    network = vae.build(vae.WIDE if stage == "vae" else vae.SLIM)
    network.load_state_dict(part(_checkpoint(out / f"{stage}.safetensors", stage), "average"))
    return network


def trained_denoiser(out: Path) -> TextToLatent:
    network = TextToLatent(len(tokenizer.build()))
    network.load_state_dict(part(_checkpoint(out / "denoiser.safetensors", "denoiser"), "average"))
    return network


def write_directory(out: Path) -> bool:
    factor = latents.read(out / "latents", chunks=1).scaling_factor
    export.export(trained_vae(out, "slim"), trained_denoiser(out), factor, out / "weights")
    _log.info("wrote %s", out / "weights")
    return True


def _run(network: Network, plan: Plan, checkpoint: Path) -> Run[Network]:
    optimiser = Muon(network.named_parameters(), matrix_lr=plan.matrix_lr, adam_lr=plan.adam_lr)
    average = copy.deepcopy(network).requires_grad_(False)
    return Run(network, average, optimiser, plan, checkpoint)


def _checkpoint(path: Path, stage: str) -> dict[str, torch.Tensor]:
    if not path.exists():
        raise SystemExit(f"{path} is missing: run the stage '{stage}' first")
    tensors: dict[str, torch.Tensor] = load_file(path)
    return tensors


def main() -> int:
    options = _options()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    out: Path = options.out
    stages: dict[str, Callable[[], bool]] = {
        "vae": lambda: train_vae(out, _plan(_VAE, options)),
        "latents": lambda: encode(out),
        "slim": lambda: train_slim(out, _plan(_SLIM, options)),
        "denoiser": lambda: train_denoiser(out, _plan(_DENOISER, options)),
        "export": lambda: write_directory(out),
    }
    wanted = list(stages) if options.stage == "all" else [options.stage]
    for name in wanted:
        if not stages[name]():
            _log.info("stage %s stopped at --minutes; the same command continues it", name)
            return 1
    return 0


def _plan(plan: Plan, options: argparse.Namespace) -> Plan:
    return dataclasses.replace(plan, updates=options.updates or plan.updates, max_minutes=options.minutes)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the embedded teacher, stage by stage.")
    parser.add_argument("stage", choices=("vae", "latents", "slim", "denoiser", "export", "all"))
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and the finished directory")
    parser.add_argument("--updates", type=int, help="length of the stage; part of what makes a run repeatable")
    parser.add_argument("--minutes", type=float, help="stop after this long; the same command continues")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
