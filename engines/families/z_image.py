"""The shape of diffusers' ZImagePipeline: a Qwen3 that reads text in a chat, a transformer that reads text and patches
as one sequence, a VAE with a shift.

The encoder reads 512 tokens; the transformer takes those that are not masked, a list of any length for each row, so
that this network cannot be exported as one graph: it is served by `eager`. It is told 1 - t and answers the negative
velocity; both are turned inside. The pipeline's `guidance_scale` is that of c + g (c - u), so w here is g + 1, and the
Turbo's g = 0 is no guidance.
Checked against: diffusers/pipelines/z_image/pipeline_z_image.py at 0.42.1.
"""

from typing import Any

import torch
from torch import Tensor

from engines.families._denoiser import TransformerNet, falling
from engines.families._latents import image_downscale, image_vae, of_class, vae_network
from engines.families._pipeline import TextToImage
from engines.families._text import Packing, TextNetwork, ids_port, mask_port, read_json, text_model
from engines.families.base import PICTURES, ComponentNetwork, Geometry, ReadFile

PIPELINE = "ZImagePipeline"
FOLDERS = {"encoder": ("text_encoder",), "denoiser": ("transformer",), "decoder": ("vae",)}
_QWEN = "Qwen3Model"
_TOKENS = 512
_SIZE = 128  # latent positions of 1024 pixels


class EncoderNet(TextNetwork):
    """ids, mask [B, L] int64 -> the hidden state before the last, and the mask."""

    inner = "text"

    def __init__(self, text: Any, packing: Packing) -> None:
        super().__init__()
        self.text, self.packing = text, packing
        self.ports = (ids_port(packing.tokens), mask_port(packing.tokens))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        read = self.text(ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
        return self.packing.pack(read.hidden_states[-2], mask)


class DenoiserNet(TransformerNet):
    embedder = "t_embedder.mlp"

    def predict(self, x: Tensor, t: Tensor, w: Tensor | None, *cond: Tensor) -> Tensor:
        hidden, mask = cond
        captions = [row[kept] for row, kept in zip(hidden, mask > 0, strict=True)]
        pred = self.transformer(list(x.unsqueeze(2).unbind()), 1 - t, captions, return_dict=False)[0]
        return -torch.stack(pred).squeeze(2)


class ZImage(TextToImage):
    lengths = (_TOKENS,)

    def worded(self, prompt: str) -> str:
        made: str = self._tokenizers[0].apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        return made

    @staticmethod
    def sigmas(steps: int) -> list[float] | None:
        return falling(steps)

    @staticmethod
    def configs(role: str) -> tuple[str, ...]:
        own = (f"{role}/config.json",)
        return own if role in ("encoder", "decoder") else (*own, "encoder/config.json")

    @staticmethod
    def network(
        role: str,
        read: ReadFile,
        *,
        inputs: frozenset[str] = frozenset(),
        latent: tuple[int, int, int] = (16, 128, 128),
    ) -> ComponentNetwork:
        config = read_json(read, f"{role}/config.json")
        if role in ("decoder", PICTURES):
            return vae_network(role, image_vae(config), latent, shifts=True)
        packing = Packing(_TOKENS, read_json(read, "encoder/config.json")["hidden_size"], (_TOKENS,))
        if role == "encoder":
            return EncoderNet(text_model(config | {"architectures": [_QWEN]}, (_QWEN,)), packing).eval()
        from diffusers import ZImageTransformer2DModel

        transformer = of_class(config, {"ZImageTransformer2DModel": ZImageTransformer2DModel}, "denoiser")
        return DenoiserNet(transformer, packing, latent, inputs).eval()

    @staticmethod
    def geometry(read: ReadFile) -> Geometry:
        config, vae = read_json(read, "denoiser/config.json"), read_json(read, "decoder/config.json")
        return Geometry(config["in_channels"], image_downscale(vae), _SIZE, _SIZE)


FAMILY = ZImage
