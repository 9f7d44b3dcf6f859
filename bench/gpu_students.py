"""Students with random weights for the bench of a GPU: published like any other, golden samples and all.

Pictures of random weights would be clipped or grey: the last layer of each VAE is scaled until they spread around the
middle as photographs do, so that their files have a photograph's size and bf16 is judged on what is seen.
"""

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from bench.gpu_networks import VOCABULARY, Shape
from engines import plugins
from engines.artefact import publish
from engines.families.base import ComponentNetwork
from engines.graph import ComponentGraph, ComponentSpec
from engines.manifest import Component, ProcessSpec, Schedule, StudentManifest
from engines.noise import noise
from engines.registry.base import Registry

STEPS = (1, 2, 4)
ROLES = ("encoder", "denoiser", "decoder")
_WORDS = ("cat", "sun", "oak", "sea", "owl", "fox", "red", "blue", "grey", "gold", "two", "small", "large", "on", "by")
_SPREAD = 20.0  # levels


def prompts() -> Iterator[str]:
    """Different ones, without end."""
    while True:
        yield from map(" ".join, itertools.permutations(_WORDS, 5))


def student(shape: Shape, pixels: int, registry: Registry, device: str) -> str:
    """Publishes one and returns its version; it is made on `device`."""
    parts = {role: network(shape.spec(pixels, role), device) for role in ROLES}
    even(parts["decoder"], shape.latent(pixels), device)
    components = {}
    for role in ROLES:
        weights = {name: value.to("cpu", torch.bfloat16) for name, value in parts.pop(role).state_dict().items()}
        files = {name: registry.put_blob(data) for name, data in _files(shape, role).items()}
        components[role] = Component(weights=registry.put_blob(save(weights)), files=files)
    manifest = StudentManifest(
        name="random",
        family=shape.family,
        kind="full",
        components=components,
        process=ProcessSpec(kind="rf"),
        prediction="flow",
        schedules={n: Schedule(times=tuple(1 - i / n for i in range(n + 1))) for n in STEPS},
        resolutions=((pixels, pixels),),
        latent_channels=shape.channels,
        downscale=shape.downscale,
        dtype="bf16",
    )
    return publish(registry, manifest, list(itertools.islice(prompts(), 4)))


def network(spec: ComponentSpec, device: str) -> ComponentNetwork:
    """A component with weights that keep values in range through many layers."""
    torch.manual_seed(0)
    with torch.device(device):
        made = spec.network()
        for module in made.modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and not module.weight.any():
                nn.init.normal_(module.weight, std=0.02)
    return made.requires_grad_(False)


def even(decoder: ComponentNetwork, latent: tuple[int, int, int], device: str) -> None:
    """Has a decoder's pictures spread by `_SPREAD` levels around the middle."""
    last: Any = decoder.get_submodule("decoder.conv_out")
    with torch.no_grad():
        last.weight.mul_(1e-3)  # nothing is clipped
        last.bias.zero_()
        levels: Tensor = decoder(noise(0, 0, latent)[None].to(device))
        last.weight.mul_(_SPREAD / levels.std())


def _files(shape: Shape, role: str) -> dict[str, bytes]:
    """The configs of a component under the names that it has for them, and an encoder's tokenizers."""
    own = shape.spec(64, role).files
    made = {name.removeprefix(f"{role}/"): text.encode() for name, text in own if name.startswith(f"{role}/")}
    if role == "encoder":
        folders: dict[str, Any] = plugins.load("engines.families", shape.family, "FOLDERS")
        for number, _ in enumerate(folders["encoder"], 1):
            made |= _tokenizer("tokenizer" if number == 1 else f"tokenizer_{number}")
    return made


def _tokenizer(folder: str) -> dict[str, bytes]:
    """Whole words, as many tokens as the encoders have."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ("<pad>", "</s>", "<unk>", *_WORDS)
    vocabulary = {token: i for i, token in enumerate(tokens)} | {f"<{i}>": i for i in range(len(tokens), VOCABULARY)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=77
    )
    with tempfile.TemporaryDirectory() as scratch:
        fast.save_pretrained(scratch)
        return {f"{folder}/{path.name}": path.read_bytes() for path in sorted(Path(scratch).iterdir())}


def example(spec: ComponentSpec, rows: int, device: str) -> dict[str, Tensor]:
    """Inputs of a denoiser."""
    draw = torch.Generator().manual_seed(rows)
    zeros = ComponentGraph(spec, Path).example(rows)
    made = {name: torch.randn(zero.shape, generator=draw) for name, zero in zeros.items()}
    return {name: value.to(device) for name, value in (made | {"t": torch.rand(rows, generator=draw)}).items()}
