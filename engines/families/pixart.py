"""The shape of diffusers' PixArtSigmaPipeline (PixArt-Sigma): a T5 with a mask, a transformer, a VAE.

The T5 reads 300 tokens. Prompts are lowered in case and stripped, as the pipeline does; its cleaning of captions from
the web is left out. Sizes are the given ones: no binning to the pipeline's list of aspect ratios.
Checked against: diffusers/pipelines/pixart_alpha/pipeline_pixart_sigma.py at 0.42.1.
"""

from typing import Any

from torch import Tensor

from engines.errors import InvalidManifest
from engines.families._denoiser import NETWORK_TIME, TransformerNet
from engines.families._latents import image_downscale, image_vae, of_class, vae_network
from engines.families._pipeline import TextToImage
from engines.families._text import Packing, TextNetwork, ids_port, mask_port, read_json, text_model
from engines.families.base import PICTURES, ComponentNetwork, Geometry, ReadFile

PIPELINE = "PixArtSigmaPipeline"
FOLDERS = {"encoder": ("text_encoder",), "denoiser": ("transformer",), "decoder": ("vae",)}
_TOKENS = 300


class EncoderNet(TextNetwork):
    """ids, mask [B, L] int64 -> the last hidden state, and the mask."""

    inner = "text"

    def __init__(self, text: Any, packing: Packing) -> None:
        super().__init__()
        self.text, self.packing = text, packing
        self.ports = (ids_port(packing.tokens), mask_port(packing.tokens))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.packing.pack(self.text(ids, attention_mask=mask).last_hidden_state, mask)


class DenoiserNet(TransformerNet):
    embedder = "adaln_single.emb.timestep_embedder"

    def predict(self, x: Tensor, t: Tensor, w: Tensor | None, *cond: Tensor) -> Tensor:
        hidden, mask = cond
        pred: Tensor = self.transformer(
            hidden_states=x,
            timestep=NETWORK_TIME * t,
            encoder_hidden_states=hidden,
            encoder_attention_mask=mask,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        return pred[:, : x.shape[1]]  # what follows is the variance that it predicts too


class PixArt(TextToImage):
    lengths = (_TOKENS,)

    def worded(self, prompt: str) -> str:
        return prompt.lower().strip()

    @staticmethod
    def configs(role: str) -> tuple[str, ...]:
        return (
            (f"{role}/config.json",)
            if role in ("encoder", "decoder")
            else (f"{role}/config.json", "encoder/config.json")
        )

    @staticmethod
    def network(
        role: str, read: ReadFile, *, inputs: frozenset[str] = frozenset(), latent: tuple[int, int, int] = (4, 128, 128)
    ) -> ComponentNetwork:
        config = read_json(read, f"{role}/config.json")
        if role in ("decoder", PICTURES):
            return vae_network(role, image_vae(config), latent)
        packing = Packing(_TOKENS, read_json(read, "encoder/config.json")["d_model"], (_TOKENS,))
        if role == "encoder":
            return EncoderNet(text_model(config, ("T5EncoderModel",)), packing).eval()
        from diffusers import PixArtTransformer2DModel

        transformer = of_class(config, {"PixArtTransformer2DModel": PixArtTransformer2DModel}, "denoiser")
        if transformer.use_additional_conditions:
            raise InvalidManifest("PixArt-Alpha's size conditions are not built: give a PixArt-Sigma directory")
        return DenoiserNet(transformer, packing, latent, inputs).eval()

    @staticmethod
    def geometry(read: ReadFile) -> Geometry:
        config, vae = read_json(read, "denoiser/config.json"), read_json(read, "decoder/config.json")
        return Geometry(config["in_channels"], image_downscale(vae), config["sample_size"], config["sample_size"])


FAMILY = PixArt
