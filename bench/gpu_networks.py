"""Denoisers of the sizes that people serve, from their configs alone: weights are random, and speed does not depend
on them. The figures are those of the published configs: SDXL base 1.0, Sana 1.6B at 1024, FLUX.1 schnell."""

import json
from dataclasses import dataclass
from typing import Any

from engines.graph import ComponentSpec

_CLIP = {"architectures": ["CLIPTextModel"], "hidden_size": 768, "max_position_embeddings": 77, "projection_dim": 768}
_CLIP_2 = {
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_size": 1280,
    "max_position_embeddings": 77,
    "projection_dim": 1280,
}


@dataclass(frozen=True, slots=True)
class Shape:
    """`downscale`: pixels per latent position; `files`: the configs that the family reads of a denoiser."""

    family: str
    channels: int
    downscale: int
    files: dict[str, dict[str, Any]]

    def spec(self, pixels: int) -> ComponentSpec:
        side = pixels // self.downscale
        files = tuple((name, json.dumps(config)) for name, config in self.files.items())
        return ComponentSpec(self.family, "denoiser", files, (), (self.channels, side, side))


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
            "encoder/config.json": {"hidden_size": 2304},
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
            "encoder/text_encoder/config.json": _CLIP,
            "encoder/text_encoder_2/config.json": _CLIP_2,
            "decoder/config.json": {"_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512]},
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
            "encoder/text_encoder/config.json": _CLIP,
            "encoder/text_encoder_2/config.json": {"architectures": ["T5EncoderModel"], "d_model": 4096},
        },
    ),
}
