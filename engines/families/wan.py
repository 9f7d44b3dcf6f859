"""The shape of diffusers' WanPipeline (Wan 2.1 text to video), asked for one frame: a UMT5, a transformer, a video VAE.

The encoder reads 512 tokens with a mask, and what is masked is zero for the transformer. Latents stay [B, C, H, W]
outside. White space of prompts is made single; the pipeline's cleaning of text from the web is left out. One network
only: Wan 2.2's pair of experts and its 5B model (a VAE with patch_size) are refused.
Checked against: diffusers/pipelines/wan/pipeline_wan.py at 0.42.1.
"""

from typing import Any

from torch import Tensor

from engines.families._denoiser import NETWORK_TIME, TransformerNet
from engines.families._latents import of_class, video_downscale, video_vae_network
from engines.families._pipeline import TextToImage
from engines.families._text import Packing, TextNetwork, ids_port, mask_port, read_json, text_model
from engines.families.base import PICTURES, ComponentNetwork, Geometry, ReadFile

PIPELINE = "WanPipeline"
FOLDERS = {"encoder": ("text_encoder",), "denoiser": ("transformer",), "decoder": ("vae",)}
_TOKENS = 512
_SIZE = (60, 104)  # latent positions of 480 x 832 pixels


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
        pred: Tensor = self.transformer(
            hidden_states=x.unsqueeze(2), timestep=NETWORK_TIME * t, encoder_hidden_states=cond[0], return_dict=False
        )[0]
        return pred.squeeze(2)


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
        role: str, read: ReadFile, *, inputs: frozenset[str] = frozenset(), latent: tuple[int, int, int] = (16, *_SIZE)
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
        return Geometry(config["in_channels"], video_downscale(vae), *_SIZE)


FAMILY = Wan
