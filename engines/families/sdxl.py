"""The shape of diffusers' StableDiffusionXLPipeline: two CLIP text encoders, a UNet that also reads a pooled embedding
and the picture's size, a VAE.

The size is told as that of an original which was neither scaled nor cropped, as the pipeline does by itself. Guided
rows are guided away from zeros (`force_zeros_for_empty_prompt`), not from the empty prompt. Playground v2.5's VAE has a
mean and a deviation per channel. No refiner.
Checked against: diffusers/pipelines/stable_diffusion_xl/pipeline_stable_diffusion_xl.py at 0.42.1.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from engines.families import sd
from engines.families._denoiser import NETWORK_TIME
from engines.families._latents import image_downscale, image_vae, vae_network
from engines.families._text import Packing, TextNetwork, ids_port, read_json, text_model
from engines.families.base import PICTURES, ComponentNetwork, ReadFile

PIPELINE = "StableDiffusionXLPipeline"
FOLDERS = {"encoder": ("text_encoder", "text_encoder_2"), "denoiser": ("unet",), "decoder": ("vae",)}
_CLIPS = ("CLIPTextModel", "CLIPTextModelWithProjection")


class EncoderNet(TextNetwork):
    """ids [B, 2L] int64 -> both hidden states before the last, side by side, and the second's pooled embedding."""

    def __init__(self, first: Any, second: Any, packing: Packing) -> None:
        super().__init__()
        self.text_encoder, self.text_encoder_2 = first, second
        self.packing = packing
        self.ports = (ids_port(2 * packing.tokens),)

    def forward(self, ids: Tensor) -> Tensor:
        one, two = ids.chunk(2, dim=1)
        first = self.text_encoder(one, output_hidden_states=True)
        second = self.text_encoder_2(two, output_hidden_states=True)
        hidden = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        return self.packing.pack(hidden, second.text_embeds)


class DenoiserNet(sd.DenoiserNet):
    """As Stable Diffusion's, with the pooled embedding and the size beside the time."""

    time_ids: Tensor

    def __init__(self, unet: Any, packing: Packing, size: tuple[int, int], inputs: Collection[str]) -> None:
        super().__init__(unet, packing, inputs)
        height, width = size
        # A constant where the network is: made in a call, it would come from the host each time.
        self.register_buffer("time_ids", torch.tensor([height, width, 0.0, 0.0, height, width]), persistent=False)

    def ask(self, x: Tensor, t: Tensor, extra: Tensor | None, cond: Tensor) -> Tensor:
        hidden, pooled = self.packing.unpack(cond)
        pred: Tensor = self.unet(
            x,
            NETWORK_TIME * t,
            encoder_hidden_states=hidden,
            timestep_cond=extra,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": self.time_ids.expand(x.shape[0], -1)},
            return_dict=False,
        )[0]
        return pred


class StableDiffusionXL(sd.StableDiffusion):
    lengths = (None, None)

    def null(self) -> Tensor:
        return torch.zeros_like(super().null())

    @staticmethod
    def configs(role: str) -> tuple[str, ...]:
        texts = tuple(f"encoder/{folder}/config.json" for folder in FOLDERS["encoder"])
        own = (f"{role}/config.json",)
        return {"encoder": texts, "decoder": own}.get(role, (*own, *texts, "decoder/config.json"))

    @staticmethod
    def network(
        role: str, read: ReadFile, *, inputs: frozenset[str] = frozenset(), latent: tuple[int, int, int] = (4, 128, 128)
    ) -> ComponentNetwork:
        if role in ("decoder", PICTURES):
            vae = image_vae(read_json(read, f"{role}/config.json"))
            return vae_network(role, vae, latent, whitens=True)
        first, second = (read_json(read, f"encoder/{folder}/config.json") for folder in FOLDERS["encoder"])
        packing = Packing(
            first["max_position_embeddings"],
            first["hidden_size"] + second["hidden_size"],
            (second["projection_dim"],),
        )
        if role == "encoder":
            return EncoderNet(text_model(first, _CLIPS), text_model(second, _CLIPS[1:]), packing).eval()
        unet = sd.unet(read_json(read, f"{role}/config.json") | {"sample_size": [latent[1], latent[2]]})
        downscale = image_downscale(read_json(read, "decoder/config.json"))
        return DenoiserNet(unet, packing, (latent[1] * downscale, latent[2] * downscale), inputs).eval()


FAMILY = StableDiffusionXL
