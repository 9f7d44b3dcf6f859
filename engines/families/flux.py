"""The shape of diffusers' FluxPipeline: a CLIP for the pooled embedding, a T5, a transformer on 2 x 2 patches, a VAE
with a shift.

The T5 reads 512 tokens without a mask. Latents stay [B, C, H, W] outside; patches, their positions and 1000 t are made
inside the network. FLUX.1-dev has an input for the guidance weight (`guidance_embeds`): import it with inputs w and
embedded guidance, whose weight is then not that of u + w(c - u). FLUX.1-schnell is asked without.
Checked against: diffusers/pipelines/flux/pipeline_flux.py at 0.42.1.
"""

from typing import Any

import torch
from torch import Tensor

from engines.families._denoiser import NETWORK_TIME, TransformerNet, falling
from engines.families._latents import from_tokens, image_downscale, image_vae, of_class, to_tokens, vae_network
from engines.families._pipeline import TextToImage
from engines.families._text import Packing, TextNetwork, ids_port, read_json, text_model
from engines.families.base import PICTURES, ComponentNetwork, Geometry, ReadFile

PIPELINE = "FluxPipeline"
FOLDERS = {"encoder": ("text_encoder", "text_encoder_2"), "denoiser": ("transformer",), "decoder": ("vae",)}
_T5_TOKENS = 512
_SIZE = 128  # latent positions of the pipeline's own size


class EncoderNet(TextNetwork):
    """ids [B, L + 512] int64 -> the T5's last hidden state, and the CLIP's pooled embedding."""

    def __init__(self, clip: Any, t5: Any, packing: Packing) -> None:
        super().__init__()
        self.text_encoder, self.text_encoder_2 = clip, t5
        self.packing = packing
        self.parts = [clip.config.max_position_embeddings, _T5_TOKENS]
        self.ports = (ids_port(sum(self.parts)),)

    def forward(self, ids: Tensor) -> Tensor:
        one, two = torch.split(ids, self.parts, dim=1)
        return self.packing.pack(self.text_encoder_2(two).last_hidden_state, self.text_encoder(one).pooler_output)


class DenoiserNet(TransformerNet):
    embedder = "time_text_embed.timestep_embedder"

    def exact(self, t: Tensor, w: Tensor | None) -> tuple[Tensor, ...]:
        times = NETWORK_TIME * t
        return (times, NETWORK_TIME * w) if self.own_guidance and w is not None else (times,)

    def predict(self, x: Tensor, t: Tensor, w: Tensor | None, *cond: Tensor) -> Tensor:
        hidden, pooled = cond
        height, width = x.shape[-2:]
        sides = (torch.arange(size, device=x.device) for size in (1, height // 2, width // 2))
        positions = torch.cartesian_prod(*sides)
        pred: Tensor = self.transformer(
            hidden_states=to_tokens(x),
            timestep=t,
            guidance=w if self.own_guidance else None,
            pooled_projections=pooled,
            encoder_hidden_states=hidden,
            txt_ids=x.new_zeros(hidden.shape[1], 3),
            img_ids=positions.to(x),
            return_dict=False,
        )[0]
        return from_tokens(pred, height, width)


class Flux(TextToImage):
    lengths = (None, _T5_TOKENS)

    @staticmethod
    def sigmas(steps: int) -> list[float] | None:
        return falling(steps)

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
        clip, t5 = (read_json(read, f"encoder/{folder}/config.json") for folder in FOLDERS["encoder"])
        packing = Packing(_T5_TOKENS, t5["d_model"], (clip["hidden_size"],))
        if role == "encoder":
            models = text_model(clip, ("CLIPTextModel",)), text_model(t5, ("T5EncoderModel",))
            return EncoderNet(*models, packing).eval()
        from diffusers import FluxTransformer2DModel

        known = {"FluxTransformer2DModel": FluxTransformer2DModel}
        transformer = of_class(read_json(read, f"{role}/config.json"), known, "denoiser")
        return DenoiserNet(transformer, packing, latent, inputs).eval()

    @staticmethod
    def geometry(read: ReadFile) -> Geometry:
        config, vae = read_json(read, "denoiser/config.json"), read_json(read, "decoder/config.json")
        return Geometry(config["in_channels"] // 4, image_downscale(vae), _SIZE, _SIZE)


FAMILY = Flux
