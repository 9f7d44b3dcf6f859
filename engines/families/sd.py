"""The shape of diffusers' StableDiffusionPipeline: CLIP text encoder, cross-attention UNet, VAE.

Time is 0..1 at the border and 1000·t for the network; the VAE's scaling stands in the decoder graph. Networks
are built from configs alone, so a graph can be known before any weights are.

A student may read a second time `s` or the guidance `w`: their sinusoids go through a zero-initialised layer
each and are added to those of `t` before the UNet's own time MLP. That is diffusers' `timestep_cond` path, so
the UNet keeps its names, and a teacher with these layers added is still exactly the teacher. A UNet that has this path
of itself (`time_cond_proj_dim`, as LCMs have) reads w - 1 there, as its pipelines tell it.

A UNet with nine input channels, as StableDiffusionInpaintPipeline has, reads the mask and the rest of the picture too.
Checked against: diffusers/pipelines/stable_diffusion/pipeline_stable_diffusion{,_inpaint}.py at 0.42.1.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from engines.errors import InvalidManifest, InvalidRequest
from engines.families._denoiser import NETWORK_TIME, zero_linear
from engines.families._latents import image_downscale, image_vae, vae_network
from engines.families._pipeline import TextToImage
from engines.families._text import Packing, TextNetwork, ids_port, read_json, read_prompts, text_model
from engines.families.base import PICTURES, SEEN, ComponentNetwork, Geometry, Port, ReadFile, Tokens

PIPELINE = "StableDiffusionPipeline"
INPAINTING = "StableDiffusionInpaintPipeline"
FOLDERS = {"encoder": ("text_encoder",), "denoiser": ("unet",), "decoder": ("vae",)}
INDEX: dict[str, Any] = {
    "_class_name": PIPELINE,
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
}
"""`model_index.json` of an exported student, without its scheduler and the class of its VAE."""
_INPAINTING = 9  # channels: the latents' C, a mask, the latents of the picture under it
_KNOWN_WORDS = 20_000
_WORD = re.compile(r"\w+|[^\w\s]+")


class EncoderNet(TextNetwork):
    """ids [B, L] int64 -> the last hidden state [B, L, D]."""

    inner = "text"

    def __init__(self, text: Any) -> None:
        super().__init__()
        self.text = text
        self.ports = (ids_port(text.config.max_position_embeddings),)

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.text(ids).last_hidden_state
        return hidden


class DenoiserNet(ComponentNetwork):
    """x [B, C, H, W], t [B], cond [B, L, D], s [B] and w [B] where the student reads them -> prediction.

    A UNet that inpaints reads `SEEN` [B, 1 + C, H, W] too. Training and serving share this module. Without `s`, a
    network that reads one is asked at s = t.
    """

    inner = "unet"
    outputs = ("pred",)

    def __init__(self, unet: Any, packing: Packing, inputs: Collection[str] = frozenset()) -> None:
        super().__init__()
        self.unet = unet
        self.packing = packing
        second_time, guidance = "s" in inputs, "w" in inputs
        width = unet.time_embedding.linear_1.in_features
        self.own_guidance: int | None = unet.config.time_cond_proj_dim
        if self.own_guidance and (second_time or not guidance):
            raise InvalidManifest("a UNet with time_cond_proj_dim reads w, and nothing else beside t: inputs must be w")
        self.second_time = zero_linear(width) if second_time else None
        self.guidance = zero_linear(width) if guidance and not self.own_guidance else None
        if self.second_time is not None or self.guidance is not None:
            unet.time_embedding.cond_proj = nn.Identity()
        size, config = unet.config.sample_size, unet.config
        height, wide = (size, size) if isinstance(size, int) else size
        self.ports = (
            Port("x", (latent_channels(config), height, wide)),
            Port("t", ()),
            Port("cond", packing.shape),
            *(Port(name, ()) for name, used in (("s", second_time), ("w", guidance)) if used),
        )
        self.inpaints = config.in_channels == _INPAINTING
        if self.inpaints:
            self.ports = (*self.ports, Port(SEEN, (_INPAINTING - latent_channels(config), height, wide)))

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        cond: Tensor,
        s: Tensor | None = None,
        w: Tensor | None = None,
        seen: Tensor | None = None,
    ) -> Tensor:
        if self.inpaints and seen is None:
            raise InvalidRequest("this network inpaints: it cannot be asked without a mask and a picture", param="mask")
        return self.ask(x if seen is None else torch.cat([x, seen], dim=1), t, self._extra(t, s, w), cond)

    def ask(self, x: Tensor, t: Tensor, extra: Tensor | None, cond: Tensor) -> Tensor:
        pred: Tensor = self.unet(
            x, NETWORK_TIME * t, encoder_hidden_states=cond, timestep_cond=extra, return_dict=False
        )[0]
        return pred

    def _extra(self, t: Tensor, s: Tensor | None, w: Tensor | None) -> Tensor | None:
        if w is None and (self.guidance is not None or self.own_guidance):
            raise InvalidRequest("this student reads its guidance weight: give w", param="guidance_scale")
        if self.own_guidance and w is not None:
            return _sinusoid(NETWORK_TIME * (w - 1), self.own_guidance)
        extra: Tensor | None = None
        if self.second_time is not None:
            extra = self.second_time(self.unet.time_proj(NETWORK_TIME * (t if s is None else s)))
        if self.guidance is not None and w is not None:
            added = self.guidance(self.unet.time_proj(100.0 * w))
            extra = added if extra is None else extra + added
        return extra


class StableDiffusion(TextToImage):
    """The family. Words that its tokenizer does not know are left out and named."""

    def __init__(self, *engines: Any, **options: Any) -> None:
        super().__init__(*engines, **options)
        # Asking a tokenizer for one word takes as long as the encoder takes for the whole prompt.
        self._known = lru_cache(_KNOWN_WORDS)(partial(_knows, self._tokenizers))

    def tokenize(self, prompts: Sequence[str]) -> Tokens:
        read = [self._readable(prompt) for prompt in prompts]
        tokens = read_prompts(self._tokenizers, [text for text, _ in read], self.lengths)
        return replace(tokens, ignored_words=tuple(words for _, words in read))

    def _readable(self, prompt: str) -> tuple[str, tuple[str, ...]]:
        """The prompt without the words that the tokenizer does not know, and those words."""
        words = _WORD.findall(prompt)
        lost = {word for word in set(words) if not self._known(word)}
        if not lost:
            return prompt, ()
        ignored = dict.fromkeys(word for word in words if word in lost and word[0].isalnum())
        return " ".join(word for word in words if word not in lost), tuple(ignored)

    @staticmethod
    def configs(role: str) -> tuple[str, ...]:
        own = f"{role}/config.json"
        return (own,) if role in ("encoder", "decoder") else (own, "encoder/config.json")

    @staticmethod
    def network(
        role: str, read: ReadFile, *, inputs: frozenset[str] = frozenset(), latent: tuple[int, int, int] = (4, 64, 64)
    ) -> ComponentNetwork:
        config = read_json(read, f"{role}/config.json")
        if role == "encoder":
            return EncoderNet(text_model(config, ("CLIPTextModel",))).eval()
        if role in ("decoder", PICTURES):
            return vae_network(role, image_vae(config), latent)
        network = unet(config | {"sample_size": [latent[1], latent[2]]})
        tokens = read_json(read, "encoder/config.json")["max_position_embeddings"]
        return DenoiserNet(network, Packing(tokens, network.config.cross_attention_dim), inputs).eval()

    @staticmethod
    def geometry(read: ReadFile) -> Geometry:
        return unet_geometry(read)


def _knows(tokenizers: Sequence[Any], word: str) -> bool:
    ids = tokenizers[0](word, add_special_tokens=False).input_ids
    return bool(ids) and tokenizers[0].unk_token_id not in ids


def _sinusoid(value: Tensor, width: int) -> Tensor:
    """[B] -> [B, width]: sines, then cosines, of frequencies from 1 to 1/10000."""
    from diffusers.models.embeddings import get_timestep_embedding

    made: Tensor = get_timestep_embedding(value, width, downscale_freq_shift=1)
    return made


def unet(config: dict[str, Any]) -> Any:
    from diffusers import UNet2DConditionModel

    if config.get("_class_name") != "UNet2DConditionModel":
        raise InvalidManifest(f"the denoiser is a {config.get('_class_name')}, not a UNet2DConditionModel")
    return UNet2DConditionModel.from_config(config)


def latent_channels(config: Mapping[str, Any]) -> int:
    """C of a UNet's config."""
    return int(config["in_channels"] if config["in_channels"] != _INPAINTING else (_INPAINTING - 1) // 2)


def unet_geometry(read: ReadFile) -> Geometry:
    config, vae = read_json(read, "denoiser/config.json"), read_json(read, "decoder/config.json")
    size = config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return Geometry(latent_channels(config), image_downscale(vae), height, width)


FAMILY = StableDiffusion
