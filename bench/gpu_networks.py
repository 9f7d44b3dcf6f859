"""Networks of the sizes that people serve, from their configs alone: weights are random, and speed does not depend on
them. The figures are those of the published configs: SDXL base 1.0, Sana 1.6B at 1024, FLUX.1 schnell. Text encoders
have the published widths but two layers, and a vocabulary of a few words. `tiny` is there to try the bench itself.
"""

import json
from dataclasses import dataclass
from typing import Any

from engines import plugins
from engines.graph import ComponentSpec

VOCABULARY = 64
_ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "vocab_size": VOCABULARY, "num_hidden_layers": 2}


def _clip(architecture: str, width: int, heads: int) -> dict[str, Any]:
    return _ENDS | {
        "architectures": [architecture],
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": heads,
        "max_position_embeddings": 77,
        "projection_dim": width,
    }


def _vae(channels: int, blocks: list[int], scale: float, **more: Any) -> dict[str, Any]:
    return {
        "_class_name": "AutoencoderKL",
        "latent_channels": channels,
        "block_out_channels": blocks,
        "down_block_types": ["DownEncoderBlock2D"] * len(blocks),
        "up_block_types": ["UpDecoderBlock2D"] * len(blocks),
        "layers_per_block": 2,
        "scaling_factor": scale,
    } | more


@dataclass(frozen=True, slots=True)
class Shape:
    """`downscale`: pixels per latent position; `files`: the configs that the family reads of its components."""

    family: str
    channels: int
    downscale: int
    files: dict[str, dict[str, Any]]

    def spec(self, pixels: int, role: str = "denoiser") -> ComponentSpec:
        read = plugins.load("engines.families", self.family, "FAMILY").configs(role)
        files = tuple((name, json.dumps(self.files[name])) for name in read)
        return ComponentSpec(self.family, role, files, (), self.latent(pixels))

    def latent(self, pixels: int) -> tuple[int, int, int]:
        return self.channels, pixels // self.downscale, pixels // self.downscale


_DC_BLOCKS = ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3

SHAPES = {
    "sana": Shape(
        "sana",
        32,
        32,
        {
            "denoiser/config.json": {
                "_class_name": "SanaTransformer2DModel",
                "in_channels": 32,
                "out_channels": 32,
                "num_attention_heads": 70,
                "attention_head_dim": 32,
                "num_layers": 20,
                "num_cross_attention_heads": 20,
                "cross_attention_head_dim": 112,
                "cross_attention_dim": 2240,
                "caption_channels": 2304,
                "mlp_ratio": 2.5,
                "patch_size": 1,
                "sample_size": 32,
            },
            "encoder/config.json": _ENDS
            | {
                "architectures": ["Gemma2Model"],
                "hidden_size": 2304,
                "intermediate_size": 9216,
                "num_attention_heads": 8,
                "num_key_value_heads": 4,
                "head_dim": 256,
            },
            "decoder/config.json": {
                "_class_name": "AutoencoderDC",
                "latent_channels": 32,
                "scaling_factor": 0.41407,
                "encoder_block_types": _DC_BLOCKS,
                "decoder_block_types": _DC_BLOCKS,
                "downsample_block_type": "Conv",
                "upsample_block_type": "interpolate",
            },
        },
    ),
    "sdxl": Shape(
        "sdxl",
        4,
        8,
        {
            "denoiser/config.json": {
                "_class_name": "UNet2DConditionModel",
                "sample_size": 128,
                "in_channels": 4,
                "out_channels": 4,
                "block_out_channels": [320, 640, 1280],
                "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
                "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
                "layers_per_block": 2,
                "transformer_layers_per_block": [1, 2, 10],
                "attention_head_dim": [5, 10, 20],
                "cross_attention_dim": 2048,
                "use_linear_projection": True,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 2816,
            },
            "encoder/text_encoder/config.json": _clip("CLIPTextModel", 768, 12),
            "encoder/text_encoder_2/config.json": _clip("CLIPTextModelWithProjection", 1280, 20),
            "decoder/config.json": _vae(4, [128, 256, 512, 512], 0.13025),
        },
    ),
    "flux": Shape(
        "flux",
        16,
        8,
        {
            "denoiser/config.json": {
                "_class_name": "FluxTransformer2DModel",
                "patch_size": 1,
                "in_channels": 64,
                "num_layers": 19,
                "num_single_layers": 38,
                "attention_head_dim": 128,
                "num_attention_heads": 24,
                "joint_attention_dim": 4096,
                "pooled_projection_dim": 768,
                "guidance_embeds": False,
            },
            "encoder/text_encoder/config.json": _clip("CLIPTextModel", 768, 12),
            "encoder/text_encoder_2/config.json": {
                "architectures": ["T5EncoderModel"],
                "vocab_size": VOCABULARY,
                "d_model": 4096,
                "d_kv": 64,
                "d_ff": 10240,
                "num_heads": 64,
                "num_layers": 2,
                "feed_forward_proj": "gated-gelu",
            },
            "decoder/config.json": _vae(
                16,
                [128, 256, 512, 512],
                0.3611,
                shift_factor=0.1159,
                use_quant_conv=False,
                use_post_quant_conv=False,
            ),
        },
    ),
    "tiny": Shape(
        "sd",
        4,
        2,
        {
            "denoiser/config.json": {
                "_class_name": "UNet2DConditionModel",
                "sample_size": 8,
                "in_channels": 4,
                "out_channels": 4,
                "block_out_channels": [16, 32],
                "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
                "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
                "layers_per_block": 1,
                "cross_attention_dim": 16,
                "attention_head_dim": 8,
                "norm_num_groups": 8,
            },
            "encoder/config.json": _clip("CLIPTextModel", 16, 2),
            "decoder/config.json": _vae(4, [8, 16], 0.5, norm_num_groups=4),
        },
    ),
}
