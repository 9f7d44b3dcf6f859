"""The shape of diffusers' WanPipeline (Wan 2.1 text to video): a UMT5, a transformer, a video VAE.

A row is a video, latents [B, C, T, H, W]; imported with one frame, the student makes pictures and its latents are
[B, C, H, W] outside. The encoder reads 512 tokens with a mask, and what is masked is zero for the transformer. White
space of prompts is made single; the pipeline's cleaning of text from the web is left out. All frames are decoded in one
pass, not latent by latent: the same numbers, and more memory. One network only: Wan 2.2's pair of experts and its 5B
model (a VAE with patch_size) are refused.
Checked against: diffusers/pipelines/wan/pipeline_wan.py at 0.42.1.
"""

from typing import Any

from torch import Tensor

from engines.families._denoiser import NETWORK_TIME, TransformerNet
from engines.families._latents import frames_per_latent, of_class, video_downscale, video_vae_network
from engines.families._pipeline import TextToImage
from engines.families._text import Packing, TextNetwork, ids_port, mask_port, read_json, text_model
from engines.families.base import PICTURES, ComponentNetwork, Geometry, ReadFile
from engines.frames import Frames

PIPELINE = "WanPipeline"
FOLDERS = {"encoder": ("text_encoder",), "denoiser": ("transformer",), "decoder": ("vae",)}
_TOKENS = 512
_SIZE = (60, 104)  # latent positions of 480 x 832 pixels
_FRAMES, _FPS = 81, 16


class EncoderNet(TextNetwork):
    """ids, mask [B, L] int64 -> the last hidden state, zero where masked."""

    inner = "text"

    def __init__(self, text: Any, packing: Packing) -> None:
        super().__init__()
        self.text, self.packing = text, packing
        self.ports = (ids_port(packing.tokens), mask_port(packing.tokens))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.text(ids, attention_mask=mask).last_hidden_state
        return self.packing.pack(hidden * mask.unsqueeze(-1).to(hidden.dtype))


class DenoiserNet(TransformerNet):
    embedder = "condition_embedder.time_embedder"

    def predict(self, x: Tensor, t: Tensor, w: Tensor | None, *cond: Tensor) -> Tensor:
        single = x.dim() == 4
        pred: Tensor = self.transformer(
            hidden_states=x.unsqueeze(2) if single else x,
            timestep=NETWORK_TIME * t,
            encoder_hidden_states=cond[0],
            return_dict=False,
        )[0]
        return pred.squeeze(2) if single else pred


class Wan(TextToImage):
    lengths = (_TOKENS,)

    def worded(self, prompt: str) -> str:
        return " ".join(prompt.split())

    @staticmethod
    def configs(role: str) -> tuple[str, ...]:
        own = (f"{role}/config.json",)
        return own if role in ("encoder", "decoder") else (*own, "encoder/config.json")

    @staticmethod
    def network(
        role: str, read: ReadFile, *, inputs: frozenset[str] = frozenset(), latent: tuple[int, ...] = (16, *_SIZE)
    ) -> ComponentNetwork:
        from diffusers import AutoencoderKLWan, WanTransformer3DModel

        config = read_json(read, f"{role}/config.json")
        if role in ("decoder", PICTURES):
            vae = of_class(config, {"AutoencoderKLWan": AutoencoderKLWan}, "decoder")
            return video_vae_network(role, vae, latent)
        packing = Packing(_TOKENS, read_json(read, "encoder/config.json")["d_model"])
        if role == "encoder":
            return EncoderNet(text_model(config, ("UMT5EncoderModel",)), packing).eval()
        transformer = of_class(config, {"WanTransformer3DModel": WanTransformer3DModel}, "denoiser")
        return DenoiserNet(transformer, packing, latent, inputs).eval()

    @staticmethod
    def geometry(read: ReadFile) -> Geometry:
        config, vae = read_json(read, "denoiser/config.json"), read_json(read, "decoder/config.json")
        frames = Frames(number=_FRAMES, per_latent=frames_per_latent(vae), fps=_FPS)
        return Geometry(config["in_channels"], video_downscale(vae), *_SIZE, frames=frames)


FAMILY = Wan
