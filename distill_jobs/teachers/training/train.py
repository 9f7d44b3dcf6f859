"""Makes an embedded teacher: `python -m distill_jobs.teachers.training.train all --task NAME --out DIR`, resumably.

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
from torch import Tensor

from distill_jobs.tasks import base as tasks
from distill_jobs.teachers.training import denoiser, export, latents, recipe, tokenizer, vae
from distill_jobs.teachers.training.denoiser import TextToLatent
from distill_jobs.teachers.training.loop import Losses, Network, Plan, Run, part
from distill_jobs.teachers.training.muon import Muon
from distill_jobs.teachers.training.recipe import Recipe, Slim

_log = logging.getLogger(__name__)

_SEED = 20_000_000  # picture seeds of training start here; evaluation uses small ones


@dataclasses.dataclass(frozen=True, slots=True)
class Workshop:
    """One teacher in the making: its recipe, its folder, and what the command line changes of every plan."""

    recipe: Recipe
    out: Path
    updates: int | None = None
    minutes: float | None = None

    def stages(self) -> dict[str, Callable[[], bool]]:
        """In their order; each says whether it came to its end."""
        found = {"vae": self.train_autoencoder, "latents": self.encode}
        if self.recipe.slim is not None:
            found["slim"] = functools.partial(self.train_slim, self.recipe.slim)
        return found | {"denoiser": self.train_denoiser, "export": self.write_directory}

    def train_autoencoder(self) -> bool:
        torch.manual_seed(0)
        network = vae.build(self.recipe, self.recipe.autoencoder)
        plan = self._plan(self.recipe.autoencoder_plan)
        run = _run(network, plan, self.out / "vae.safetensors")
        unseen = self._pictures(128, 1, "heldout")

        def loss(update: int) -> Losses:
            generator = torch.Generator().manual_seed(update)
            return vae.loss(network, self._pictures(plan.batch, _SEED + update, "train"), generator)

        return run.fit(loss, lambda: f"psnr {vae.psnr_db(run.average, unseen):.2f} dB")

    def encode(self) -> bool:
        latents.write(self.recipe, self.autoencoder("vae"), self.out / "latents")
        return True

    def train_slim(self, slim: Slim) -> bool:
        torch.manual_seed(2)
        network = vae.build(self.recipe, slim.widths)
        plan = self._plan(slim.plan)
        run = _run(network, plan, self.out / "slim.safetensors")
        unseen = self._pictures(128, 1, "heldout")

        @functools.lru_cache(maxsize=1)
        def chunk(index: int) -> tuple[Tensor, Tensor]:
            drawn = latents.as_input(latents.chunk_pictures(self.recipe.task, index))
            return drawn, latents.chunk(self.out / "latents", index)

        def loss(update: int) -> Losses:
            index, part_of_it = divmod(update, latents.CHUNK // plan.batch)
            pictures, coded = chunk(index % self.recipe.chunks)
            rows = slice(part_of_it * plan.batch, (part_of_it + 1) * plan.batch)
            return vae.slim_loss(network, pictures[rows], coded[rows], torch.Generator().manual_seed(update))

        return run.fit(loss, lambda: f"psnr {vae.psnr_db(run.average, unseen):.2f} dB")

    def train_denoiser(self) -> bool:
        torch.manual_seed(1)
        words = tokenizer.build(self.recipe)
        empty = tokenizer.encode(words, [""])[0]
        network = TextToLatent(self.recipe, len(words))
        plan = self._plan(self.recipe.denoiser_plan)
        run = _run(network, plan, self.out / "denoiser.safetensors")
        cached = latents.read(self.out / "latents", chunks=self.recipe.chunks)
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

    def write_directory(self) -> bool:
        factor = latents.read(self.out / "latents", chunks=1).scaling_factor
        shipped = self.autoencoder("vae" if self.recipe.slim is None else "slim")
        export.export(self.recipe, shipped, self.denoiser(), factor, self.out / "weights")
        _log.info("wrote %s", self.out / "weights")
        return True

    def autoencoder(self, stage: str) -> AutoencoderKL:
        """The trained one of stage "vae" or "slim"."""
        slim = self.recipe.slim if stage == "slim" else None
        network = vae.build(self.recipe, slim.widths if slim else self.recipe.autoencoder)
        network.load_state_dict(part(_checkpoint(self.out / f"{stage}.safetensors", stage), "average"))
        return network

    def denoiser(self) -> TextToLatent:
        network = TextToLatent(self.recipe, len(tokenizer.build(self.recipe)))
        network.load_state_dict(part(_checkpoint(self.out / "denoiser.safetensors", "denoiser"), "average"))
        return network

    def _pictures(self, n: int, seed: int, split: tasks.Split) -> Tensor:
        return latents.pictures(self.recipe.task, n, seed, split)

    def _plan(self, plan: Plan) -> Plan:
        return dataclasses.replace(plan, updates=self.updates or plan.updates, max_minutes=self.minutes)


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
    stages = Workshop(recipe.load(options.task), options.out, options.updates, options.minutes).stages()
    wanted = list(stages) if options.stage == "all" else [options.stage]
    if unknown := [name for name in wanted if name not in stages]:
        raise SystemExit(f"the teacher of {options.task} has no stage {unknown[0]!r}: choose from {', '.join(stages)}")
    for name in wanted:
        if not stages[name]():
            _log.info("stage %s stopped at --minutes; the same command continues it", name)
            return 1
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train an embedded teacher, stage by stage.")
    parser.add_argument("stage", help="vae, latents, slim, denoiser, export or all")
    parser.add_argument("--task", default=tasks.DEFAULT)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and the finished directory")
    parser.add_argument("--updates", type=int, help="length of the stage; part of what makes a run repeatable")
    parser.add_argument("--minutes", type=float, help="stop after this long; the same command continues")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
