"""The shape of diffusers' SanaPipeline: a Gemma 2 with a mask, a linear-attention transformer, a deep-compression VAE.

The encoder reads 300 tokens. Prompts are lowered in case and stripped, as the pipeline does; the instruction that the
pipeline sets before a prompt by itself (`complex_human_instruction`) is left out: write it into the prompt, or compare
with the pipeline told to use none. Sizes are the given ones, without binning to aspect ratios.
Checked against: diffusers/pipelines/sana/pipeline_sana.py at 0.42.1.
"""

from typing import Any

from torch import Tensor

from engines.families._denoiser import NETWORK_TIME, TransformerNet
from engines.families._latents import image_downscale, image_vae, of_class, vae_network
from engines.families._pipeline import TextToImage
from engines.families._text import Packing, TextNetwork, ids_port, mask_port, read_json, text_model
from engines.families.base import PICTURES, ComponentNetwork, Geometry, ReadFile

PIPELINE = "SanaPipeline"
FOLDERS = {"encoder": ("text_encoder",), "denoiser": ("transformer",), "decoder": ("vae",)}
_GEMMA = ("Gemma2Model", "Gemma2ForCausalLM")
_TOKENS = 300


class EncoderNet(TextNetwork):
    """ids, mask [B, L] int64 -> the last hidden state, and the mask."""

    inner = "text"

    def __init__(self, text: Any, packing: Packing) -> None:
        super().__init__()
        self.text, self.packing = text, packing
        self.ports = (ids_port(packing.tokens), mask_port(packing.tokens))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.packing.pack(self.text(ids, attention_mask=mask, use_cache=False).last_hidden_state, mask)


class DenoiserNet(TransformerNet):
    embedder = "time_embed.emb.timestep_embedder"

    def predict(self, x: Tensor, t: Tensor, w: Tensor | None, *cond: Tensor) -> Tensor:
        hidden, mask = cond
        pred: Tensor = self.transformer(
            x,
            encoder_hidden_states=hidden,
            encoder_attention_mask=mask,
            timestep=NETWORK_TIME * self.transformer.config.timestep_scale * t,
            return_dict=False,
        )[0]
        return pred[:, : x.shape[1]]  # what follows is the variance that some predict too


class Sana(TextToImage):
    lengths = (_TOKENS,)

    def worded(self, prompt: str) -> str:
        return prompt.lower().strip()

    @staticmethod
    def configs(role: str) -> tuple[str, ...]:
        own = (f"{role}/config.json",)
        return own if role in ("encoder", "decoder") else (*own, "encoder/config.json")

    @staticmethod
    def network(
        role: str, read: ReadFile, *, inputs: frozenset[str] = frozenset(), latent: tuple[int, int, int] = (32, 32, 32)
    ) -> ComponentNetwork:
        config = read_json(read, f"{role}/config.json")
        if role in ("decoder", PICTURES):
            return vae_network(role, image_vae(config), latent)
        packing = Packing(_TOKENS, read_json(read, "encoder/config.json")["hidden_size"], (_TOKENS,))
        if role == "encoder":
            return EncoderNet(text_model(config | {"architectures": ["Gemma2Model"]}, _GEMMA), packing).eval()
        from diffusers import SanaTransformer2DModel

        transformer = of_class(config, {"SanaTransformer2DModel": SanaTransformer2DModel}, "denoiser")
        return DenoiserNet(transformer, packing, latent, inputs).eval()

    @staticmethod
    def geometry(read: ReadFile) -> Geometry:
        config, vae = read_json(read, "denoiser/config.json"), read_json(read, "decoder/config.json")
        return Geometry(config["in_channels"], image_downscale(vae), config["sample_size"], config["sample_size"])


FAMILY = Sana
