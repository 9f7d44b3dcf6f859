"""The shape of diffusers' StableDiffusion3Pipeline: two CLIPs and a T5, a transformer that reads both as one sequence
and a pooled embedding, a VAE with a shift.

The T5 reads 256 tokens without a mask, as in the pipeline. All three text encoders are needed.
Checked against: diffusers/pipelines/stable_diffusion_3/pipeline_stable_diffusion_3.py at 0.42.1.
"""

from typing import Any

import torch
from torch import Tensor, nn

from engines.families._denoiser import NETWORK_TIME, TransformerNet
from engines.families._latents import image_downscale, image_vae, of_class, vae_network
from engines.families._pipeline import TextToImage
from engines.families._text import Packing, TextNetwork, ids_port, read_json, text_model
from engines.families.base import PICTURES, ComponentNetwork, Geometry, ReadFile

PIPELINE = "StableDiffusion3Pipeline"
FOLDERS = {
    "encoder": ("text_encoder", "text_encoder_2", "text_encoder_3"),
    "denoiser": ("transformer",),
    "decoder": ("vae",),
}
_CLIP = ("CLIPTextModelWithProjection",)
_T5_TOKENS = 256


class EncoderNet(TextNetwork):
    """ids [B, 2L + 256] int64 -> the CLIPs side by side, then the T5; both pooled embeddings."""

    def __init__(self, clip: Any, clip_2: Any, t5: Any, packing: Packing, clip_tokens: int) -> None:
        super().__init__()
        self.text_encoder, self.text_encoder_2, self.text_encoder_3 = clip, clip_2, t5
        self.packing = packing
        self.parts = [clip_tokens, clip_tokens, _T5_TOKENS]
        self.ports = (ids_port(sum(self.parts)),)

    def forward(self, ids: Tensor) -> Tensor:
        one, two, three = torch.split(ids, self.parts, dim=1)
        first = self.text_encoder(one, output_hidden_states=True)
        second = self.text_encoder_2(two, output_hidden_states=True)
        clip = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        t5 = self.text_encoder_3(three).last_hidden_state
        hidden = torch.cat([nn.functional.pad(clip, (0, t5.shape[-1] - clip.shape[-1])), t5], dim=1)
        return self.packing.pack(hidden, torch.cat([first.text_embeds, second.text_embeds], dim=-1))


class DenoiserNet(TransformerNet):
    embedder = "time_text_embed.timestep_embedder"

    def predict(self, x: Tensor, t: Tensor, w: Tensor | None, *cond: Tensor) -> Tensor:
        hidden, pooled = cond
        pred: Tensor = self.transformer(
            hidden_states=x,
            timestep=NETWORK_TIME * t,
            encoder_hidden_states=hidden,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
        return pred


class StableDiffusion3(TextToImage):
    lengths = (None, None, _T5_TOKENS)

    @staticmethod
    def configs(role: str) -> tuple[str, ...]:
        texts = tuple(f"encoder/{folder}/config.json" for folder in FOLDERS["encoder"])
        own = (f"{role}/config.json",)
        return {"encoder": texts, "decoder": own}.get(role, own + texts)

    @staticmethod
    def network(
        role: str,
        read: ReadFile,
        *,
        inputs: frozenset[str] = frozenset(),
        latent: tuple[int, int, int] = (16, 128, 128),
    ) -> ComponentNetwork:
        if role in ("decoder", PICTURES):
            vae = image_vae(read_json(read, f"{role}/config.json"))
            return vae_network(role, vae, latent, shifts=True)
        texts = [read_json(read, f"encoder/{folder}/config.json") for folder in FOLDERS["encoder"]]
        clip_tokens: int = texts[0]["max_position_embeddings"]
        pooled = sum(clip["projection_dim"] for clip in texts[:2])
        packing = Packing(clip_tokens + _T5_TOKENS, texts[2]["d_model"], (pooled,))
        if role == "encoder":
            first, second, third = (
                text_model(one, known) for one, known in zip(texts, (_CLIP, _CLIP, ("T5EncoderModel",)), strict=True)
            )
            return EncoderNet(first, second, third, packing, clip_tokens).eval()
        from diffusers import SD3Transformer2DModel

        known = {"SD3Transformer2DModel": SD3Transformer2DModel}
        transformer = of_class(read_json(read, f"{role}/config.json"), known, "denoiser")
        return DenoiserNet(transformer, packing, latent, inputs).eval()

    @staticmethod
    def geometry(read: ReadFile) -> Geometry:
        config, vae = read_json(read, "denoiser/config.json"), read_json(read, "decoder/config.json")
        return Geometry(config["in_channels"], image_downscale(vae), config["sample_size"], config["sample_size"])


FAMILY = StableDiffusion3
