"""The shape of diffusers' QwenImagePipeline: a Qwen2.5-VL that reads text in a template, a transformer on 2 x 2
patches, a video VAE of which one frame is used.

The template's 34 first tokens are dropped and 512 are kept, padded and masked where the pipeline has lists of any
length. A guided prediction keeps the norm of the conditional one, patch by patch. The pictures of Qwen2.5-VL are not
read. The transformer turns positions as complex numbers, which ONNX has not: it is served by `eager`.
Checked against: diffusers/pipelines/qwenimage/pipeline_qwenimage.py at 0.42.1.
"""

from typing import Any

from torch import Tensor

from engines.errors import InvalidManifest
from engines.families._denoiser import TransformerNet, falling
from engines.families._latents import from_tokens, of_class, to_tokens, video_downscale, video_vae_network
from engines.families._pipeline import TextToImage
from engines.families._text import Packing, TextNetwork, ids_port, mask_port, read_json, text_model
from engines.families.base import PICTURES, ComponentNetwork, Geometry, ReadFile

PIPELINE = "QwenImagePipeline"
FOLDERS = {"encoder": ("text_encoder",), "denoiser": ("transformer",), "decoder": ("vae",)}
_QWEN = "Qwen2_5_VLTextModel"
_BEFORE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
_AFTER = "<|im_end|>\n<|im_start|>assistant\n"
_DROPPED = 34
_TOKENS = 512
_SIZE = 128  # latent positions of the pipeline's own size


class EncoderNet(TextNetwork):
    """ids, mask [B, 34 + L] int64 -> the last hidden state after the template, zero where masked, and the mask."""

    inner = "text"

    def __init__(self, text: Any, packing: Packing) -> None:
        super().__init__()
        self.text, self.packing = text, packing
        self.ports = (ids_port(_DROPPED + packing.tokens), mask_port(_DROPPED + packing.tokens))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.text(ids, attention_mask=mask, use_cache=False).last_hidden_state[:, _DROPPED:]
        kept = mask[:, _DROPPED:].to(hidden.dtype)
        return self.packing.pack(hidden * kept.unsqueeze(-1), kept)


class DenoiserNet(TransformerNet):
    embedder = "time_text_embed.timestep_embedder"

    def exact(self, t: Tensor, w: Tensor | None) -> tuple[Tensor, ...]:
        return (t,)

    def predict(self, x: Tensor, t: Tensor, w: Tensor | None, *cond: Tensor) -> Tensor:
        hidden, mask = cond
        height, width = x.shape[-2:]
        pred: Tensor = self.transformer(
            hidden_states=to_tokens(x),
            timestep=t,
            encoder_hidden_states=hidden,
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, height // 2, width // 2)]] * len(x),
            return_dict=False,
        )[0]
        return from_tokens(pred, height, width)


class QwenImage(TextToImage):
    lengths = (_DROPPED + _TOKENS,)

    def worded(self, prompt: str) -> str:
        return f"{_BEFORE}{prompt}{_AFTER}"

    def guided(self, c: Tensor, u: Tensor, w: Tensor) -> Tensor:
        both, alone = to_tokens(super().guided(c, u, w)), to_tokens(c)
        rescaled = both * (alone.norm(dim=-1, keepdim=True) / both.norm(dim=-1, keepdim=True))
        return from_tokens(rescaled, c.shape[-2], c.shape[-1])

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
        from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel

        config = read_json(read, f"{role}/config.json")
        if role in ("decoder", PICTURES):
            vae = of_class(config, {"AutoencoderKLQwenImage": AutoencoderKLQwenImage}, "decoder")
            return video_vae_network(role, vae, latent)
        words = _text_config(read_json(read, "encoder/config.json"))
        packing = Packing(_TOKENS, words["hidden_size"], (_TOKENS,))
        if role == "encoder":
            return EncoderNet(text_model(words, (_QWEN,)), packing).eval()
        if config.get("guidance_embeds"):
            raise InvalidManifest("a Qwen-Image with guidance_embeds is not built: none is known")
        known = {"QwenImageTransformer2DModel": QwenImageTransformer2DModel}
        return DenoiserNet(of_class(config, known, "denoiser"), packing, latent, inputs).eval()

    @staticmethod
    def geometry(read: ReadFile) -> Geometry:
        config, vae = read_json(read, "denoiser/config.json"), read_json(read, "decoder/config.json")
        return Geometry(config["in_channels"] // 4, video_downscale(vae), _SIZE, _SIZE)


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    """Of the language model alone: older files have its settings at the top, newer ones in `text_config`."""
    words: dict[str, Any] = config.get("text_config", config)
    return words | {"architectures": [_QWEN]}


FAMILY = QwenImage
