"""A StableDiffusion-shaped model of a few thousand random weights, written as a diffusers directory in a second."""

import atexit
import json
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from engines.artefact import import_diffusers
from engines.graph import GraphStore
from engines.manifest import Guidance, Schedule, StudentManifest
from engines.registry.memory import MemoryRegistry
from tests.exported import graphs

WORDS = ("a", "red", "blue", "small", "circle", "square", "two", "shapes", "on", "white", "the", "left")
LATENT = (4, 8, 8)
_START, _END, _UNKNOWN = "<|startoftext|>", "<|endoftext|>", "<|unk|>"


def write(
    folder: Path, *, seed: int = 0, tiny_vae: bool = False, fp16: bool = False, channels: tuple[int, int] = (16, 32)
) -> Path:
    """A pipeline directory; its weights are larger than a fresh network's, so that every layer shows in a picture."""
    from diffusers import AutoencoderKL, AutoencoderTiny, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    vocabulary = tokenizer(folder / "tokenizer")
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=12, projection_dim=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=channels, layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=8, norm_num_groups=8,
    )  # fmt: skip
    vae = (
        AutoencoderTiny(
            encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), latent_channels=4,
            num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), scaling_factor=0.5,
        )
        if tiny_vae
        else AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 16), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=16,
            scaling_factor=0.5,
        )
    )  # fmt: skip
    for name, module in (("text_encoder", text), ("unet", unet), ("vae", vae)):
        shake(module)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (module.half() if fp16 else module).save_pretrained(folder / name)
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.42.1",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", type(vae).__name__],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def shake(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(0.05 * torch.randn_like(weight))


def tokenizer(folder: Path) -> int:
    """Whole words as tokens, and nothing else: the number of tokens."""
    from transformers import CLIPTokenizer

    vocabulary = {token: i for i, token in enumerate((_START, _END, _UNKNOWN))}
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        for part in parts:
            vocabulary.setdefault(part, len(vocabulary))
        while len(parts) > 1:
            if (parts[0], parts[1]) not in merges:
                merges.append((parts[0], parts[1]))
            parts = [parts[0] + parts[1], *parts[2:]]
            vocabulary.setdefault(parts[0], len(vocabulary))
    CLIPTokenizer(
        vocab=vocabulary, merges=merges, unk_token=_UNKNOWN, pad_token=_END, model_max_length=12
    ).save_pretrained(folder)
    return len(vocabulary)


SCHEDULES = (Schedule(times=(1.0, 0.75, 0.5, 0.25, 0.0)), Schedule(times=(1.0, 0.0)))
GUIDANCE = Guidance(mode="cfg", default=3.0, maximum=8.0)


@dataclass(frozen=True)
class Teacher:
    """The tiny pipeline as a directory and as a version of a registry, and the store of its graphs."""

    directory: Path
    registry: MemoryRegistry
    version: str
    graphs: GraphStore

    @property
    def manifest(self) -> StudentManifest:
        return self.registry.student(self.version)


@cache
def teacher() -> Teacher:
    """One for the whole process. Publish what you like; change nothing."""
    folder = Path(tempfile.mkdtemp(prefix="fewstep-tiny-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    registry = MemoryRegistry()
    directory = write(folder / "pipeline")
    version = import_diffusers(directory, registry, name="tiny", schedules=SCHEDULES, guidance=GUIDANCE)
    return Teacher(directory, registry, version, graphs())
