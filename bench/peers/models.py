"""What is served: a student of the shapes teacher at 1, 2 and 4 steps, the teacher itself, and a large-picture student.

The student has weights of its own, as a distilled one has, so its denoiser is another engine than the teacher's. The
large one is a tiny network of random weights whose pictures, 408 x 408 of texture, are PNGs of about 400 KB: an engine
that costs little beside bytes that cost much, and the same engine for every server.
"""

import json
import shutil
import tempfile
import warnings
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from pathlib import Path

import torch

from bench.peers.pictures import Kind
from bench.system import ring
from distill_jobs.tasks.shapes import TASK
from distill_jobs.teachers.publish import uniform
from engines.artefact import import_diffusers
from engines.manifest import Guidance, ProcessSpec
from engines.registry.base import Registry, Revision, TierTarget

STEPS = (1, 2, 4)
TEACHER, LARGE = "teacher", "large"
_LATENT_PX, _CHANNELS, _WEIGHTS = 102, (4, 4, 4), 0.1
_BAKED = Guidance(mode="baked", default=2.0, minimum=2.0, maximum=2.0)


def publish(registry: Registry, wanted: Collection[str]) -> dict[str, Kind]:
    """Publishes and deploys what the `wanted` kinds of requests need, for no server should hold more. Kinds by name."""
    teacher = import_diffusers(
        TASK.pipeline,
        registry,
        name=TASK.teacher.name,
        schedules=[uniform(TASK.teacher.steps)],
        guidance=TASK.teacher.guidance,
        solver=TASK.teacher.solver,
        process=ProcessSpec(kind="rf"),
    )
    [student] = ring(registry, TASK.pipeline, 1, STEPS)
    kinds = {str(steps): Kind(student, steps, TASK.name) for steps in STEPS}
    kinds[TEACHER] = Kind(teacher, TASK.teacher.steps, TASK.name)
    if LARGE in wanted:
        kinds[LARGE] = Kind(_large(registry), 1, LARGE)
    kinds = {name: kind for name, kind in kinds.items() if name in wanted}
    for deployment in {kind.deployment for kind in kinds.values()}:
        _deploy(registry, deployment, {name: kind for name, kind in kinds.items() if kind.deployment == deployment})
    return kinds


def _deploy(registry: Registry, deployment: str, kinds: Mapping[str, Kind]) -> None:
    """A tier for each kind, by its name."""
    allowed: dict[str, list[int]] = {}
    for kind in kinds.values():
        allowed.setdefault(kind.version, []).append(kind.steps)
    registry.commit(
        Revision(
            deployment=deployment,
            number=1,
            tiers={name: TierTarget(student=kind.version, steps=kind.steps) for name, kind in kinds.items()},
            default_tier=next(iter(kinds)),
            allowed=allowed,
            created_at=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        )
    )


def _large(registry: Registry) -> str:
    from diffusers import AutoencoderTiny, UNet2DConditionModel

    torch.manual_seed(0)
    width = json.loads((TASK.pipeline / "text_encoder" / "config.json").read_bytes())["hidden_size"]
    unet = UNet2DConditionModel(
        sample_size=_LATENT_PX, in_channels=4, out_channels=4, block_out_channels=(8,), layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), mid_block_type=None,
        cross_attention_dim=width, norm_num_groups=4,
    )  # fmt: skip
    blocks = (1,) * len(_CHANNELS)
    vae = AutoencoderTiny(
        encoder_block_out_channels=_CHANNELS, decoder_block_out_channels=_CHANNELS, latent_channels=4,
        num_encoder_blocks=blocks, num_decoder_blocks=blocks, scaling_factor=0.5,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="fewstep-large-") as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(place) / "pipeline"
        shutil.copytree(TASK.pipeline, folder, ignore=shutil.ignore_patterns("unet", "vae"))
        for name, module in (("unet", unet), ("vae", vae)):
            with torch.no_grad():
                for weight in module.parameters():
                    weight.add_(_WEIGHTS * torch.randn_like(weight))
            module.save_pretrained(folder / name)
        return import_diffusers(
            folder, registry, name=LARGE, schedules=[uniform(1)], guidance=_BAKED, solver="ddim",
            process=ProcessSpec(kind="rf"),
        )  # fmt: skip
