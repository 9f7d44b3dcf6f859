"""One tiny pipeline of each family, with random weights and the scheduler that the family ships."""

import atexit
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from engines.artefact import import_diffusers
from engines.manifest import Guidance, StudentManifest
from engines.registry.memory import MemoryRegistry
from tests import tiny_sd

_WORDS = (*tiny_sd.WORDS, "green", "triangle")


@dataclass(frozen=True)
class Tiny:
    """`build` makes the pipeline. It is asked with `call` and guided by `scale`, which is `w` in u + w(c - u)."""

    build: Callable[[], Any]
    scale: float = 3.0
    w: float | None = 3.0
    call: Mapping[str, Any] = field(default_factory=dict)
    inputs: tuple[Literal["s", "w"], ...] = ()
    pixels: int = 16
    frames: int | None = None
    latents: Callable[[Tensor], Tensor] = lambda noise: noise
    pictures: Callable[[Any], Tensor] = lambda out: out.images


def clip(*, pooled: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(clip_tokenizer()), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=12, projection_dim=24, bos_token_id=0, eos_token_id=1,
        pad_token_id=1,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if pooled else CLIPTextModel)(config)


def clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    with tempfile.TemporaryDirectory() as folder:
        tiny_sd.tokenizer(Path(folder))
        return CLIPTokenizer.from_pretrained(folder)


def word_tokenizer(template: str | None = None, *, ends: str | None = "</s>") -> Any:
    """Whole words, padded with a token of its own, as T5, Gemma and Qwen do."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(("<pad>", "</s>", "<unk>", *_WORDS, "user", "assistant"))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if ends:
        made.post_processor = processors.TemplateProcessing(single=f"$A {ends}", special_tokens=[(ends, 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
    tokenizer.chat_template = template
    return tokenizer


def t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(vocab_size=32, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0)
    )


def vae(channels: int, *, shift: float | None = None, **settings: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16), layers_per_block=1, latent_channels=channels, norm_num_groups=4,
        sample_size=16, scaling_factor=0.5, shift_factor=shift,
        use_quant_conv=shift is None, use_post_quant_conv=shift is None, **settings,
    )  # fmt: skip


def _sd() -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16, attention_head_dim=8, norm_num_groups=8,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type="v_prediction",
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=vae(4), text_encoder=clip(), tokenizer=clip_tokenizer(), unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def _sdxl() -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, attention_head_dim=8, norm_num_groups=8, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=24 + 6 * 8, use_linear_projection=True,
    )  # fmt: skip
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    return StableDiffusionXLPipeline(
        vae=vae(4), text_encoder=clip(), text_encoder_2=clip(pooled=True), tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(), unet=unet, scheduler=scheduler, add_watermarker=False,
    )  # fmt: skip


def _sd_edm() -> Any:
    """Stable Diffusion's networks as CosXL is preconditioned."""
    from diffusers import EDMEulerScheduler

    made = _sd()
    made.scheduler = EDMEulerScheduler(
        sigma_data=1.0, sigma_max=120.0, sigma_schedule="exponential", prediction_type="v_prediction"
    )
    return made


def _sdxl_edm() -> Any:
    """SDXL's networks as Playground v2.5 ships them."""
    from diffusers import EDMDPMSolverMultistepScheduler

    made = _sdxl()
    made.scheduler = EDMDPMSolverMultistepScheduler()
    made.vae = vae(4, latents_mean=[-1.6, 1.8, -1.3, 2.5], latents_std=[2.0, 1.2, 1.4, 0.8])
    return made


def _sd3() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=48,
        pos_embed_max_size=8, qk_norm="rms_norm",
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae(4, shift=0.1),
        text_encoder=clip(pooled=True), tokenizer=clip_tokenizer(), text_encoder_2=clip(pooled=True),
        tokenizer_2=clip_tokenizer(), text_encoder_3=t5(), tokenizer_3=word_tokenizer(),
    )  # fmt: skip


def _pixart() -> Any:
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    transformer = PixArtTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=8, num_layers=2, num_attention_heads=2,
        attention_head_dim=8, cross_attention_dim=16, caption_channels=32, interpolation_scale=1,
    )  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
    return PixArtSigmaPipeline(
        tokenizer=word_tokenizer(), text_encoder=t5(), vae=vae(4), transformer=transformer, scheduler=scheduler
    )


def _flux(guidance: bool) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8), guidance_embeds=guidance,
    )  # fmt: skip
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=guidance), vae=vae(4, shift=0.1),
        text_encoder=clip(), tokenizer=clip_tokenizer(), text_encoder_2=t5(), tokenizer_2=word_tokenizer(),
        transformer=transformer,
    )  # fmt: skip


def _sana() -> Any:
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
    from transformers import Gemma2Config, Gemma2Model

    text = Gemma2Model(
        Gemma2Config(
            vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, query_pre_attn_scalar=16, pad_token_id=0, eos_token_id=1,
            bos_token_id=2,
        )
    )  # fmt: skip
    transformer = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=32,
        sample_size=8, patch_size=1,
    )  # fmt: skip
    vae_dc = AutoencoderDC(
        latent_channels=4, attention_head_dim=4, encoder_block_out_channels=(8, 16), decoder_block_out_channels=(8, 16),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()), scaling_factor=0.41407,
    )  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
    return SanaPipeline(
        tokenizer=word_tokenizer(), text_encoder=text, vae=vae_dc, transformer=transformer, scheduler=scheduler
    )


def _video_vae(name: str, halvings: int = 1) -> Any:
    import diffusers

    scale = 2**halvings
    sizes = {"scale_factor_spatial": scale, "scale_factor_temporal": scale} if name == "AutoencoderKLWan" else {}
    return getattr(diffusers, name)(
        base_dim=8, z_dim=4, dim_mult=[1, *[2] * halvings], num_res_blocks=1, temperal_downsample=[True] * halvings,
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[std / halvings for std in (0.9, 1.1, 1.2, 0.8)], **sizes,
    )  # fmt: skip


def _qwen_image() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    words = dict(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]}, bos_token_id=1,
        eos_token_id=1, pad_token_id=0, max_position_embeddings=1200,
    )  # fmt: skip
    eyes = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32, patch_size=2)
    text = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=words, vision_config=eyes))
    transformer = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(
        base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02, use_dynamic_shifting=True
    )
    return QwenImagePipeline(
        scheduler=scheduler, vae=_video_vae("AutoencoderKLQwenImage"), text_encoder=text,
        tokenizer=word_tokenizer(ends=None), transformer=transformer,
    )  # fmt: skip


def _z_image() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    text = Qwen3Model(
        Qwen3Config(
            vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, bos_token_id=1, eos_token_id=1, pad_token_id=0,
        )
    )  # fmt: skip
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=32,
        axes_dims=[4, 6, 6], axes_lens=[1024, 64, 64],
    )  # fmt: skip
    template = "{% for m in messages %}user {{ m['content'] }} {% endfor %}assistant"
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae(4, shift=0.1), text_encoder=text,
        tokenizer=word_tokenizer(template, ends=None), transformer=transformer,
    )  # fmt: skip


def _wan(halvings: int = 1) -> Any:
    from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    text = UMT5EncoderModel(
        UMT5Config(vocab_size=32, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0)
    )
    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=32, freq_dim=32,
        ffn_dim=32, num_layers=2, cross_attn_norm=True, rope_max_seq_len=32,
    )  # fmt: skip
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return WanPipeline(
        tokenizer=word_tokenizer(), text_encoder=text, vae=_video_vae("AutoencoderKLWan", halvings),
        scheduler=scheduler, transformer=transformer,
    )  # fmt: skip


def _packed(noise: Tensor) -> Tensor:
    from diffusers import FluxPipeline

    packed: Tensor = FluxPipeline._pack_latents(noise, *noise.shape)
    return packed


FAMILIES: dict[str, Tiny] = {
    "sd": Tiny(_sd),
    "sd-edm": Tiny(_sd_edm),
    "sdxl": Tiny(_sdxl),
    "sdxl-edm": Tiny(_sdxl_edm),
    "sd3": Tiny(_sd3),
    "pixart": Tiny(_pixart, call={"clean_caption": False, "use_resolution_binning": False}),
    "sana": Tiny(
        _sana,
        pixels=32,
        call={"clean_caption": False, "use_resolution_binning": False, "complex_human_instruction": None},
    ),
    "flux": Tiny(lambda: _flux(True), inputs=("w",), latents=_packed),
    "flux-schnell": Tiny(lambda: _flux(False), w=None, latents=_packed),
    "qwen_image": Tiny(_qwen_image, call={"true_cfg_scale": 3.0, "negative_prompt": ["", ""]}, latents=_packed),
    "z_image": Tiny(_z_image, scale=2.0),
    "wan": Tiny(lambda: _wan(2), call={"num_frames": 9}, frames=9, pictures=lambda out: out.frames),
    "wan-picture": Tiny(
        _wan,
        call={"num_frames": 1},
        frames=1,
        latents=lambda noise: noise.unsqueeze(2),
        pictures=lambda out: out.frames[:, 0],
    ),
}

OF_PICTURES = tuple(name for name, tiny in FAMILIES.items() if tiny.frames in (None, 1))


def pipeline(name: str, seed: int = 0) -> Any:
    """In memory, its weights larger than fresh ones, so that every layer shows in a picture."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = FAMILIES[name].build()
    for module in made.components.values():
        if isinstance(module, torch.nn.Module):
            tiny_sd.shake(module.eval())
    made.set_progress_bar_config(disable=True)
    return made


STEPS = 4


@dataclass(frozen=True)
class Shipped:
    """A tiny pipeline as diffusers runs it, as a directory, and as a version of a registry."""

    tiny: Tiny
    pipeline: Any
    directory: Path
    registry: MemoryRegistry
    version: str

    @property
    def manifest(self) -> StudentManifest:
        return self.registry.student(self.version)


@cache
def shipped(name: str) -> Shipped:
    """One for the whole test run. Publish what you like; change nothing."""
    tiny, directory = FAMILIES[name], Path(tempfile.mkdtemp(prefix=f"fewstep-{name}-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    made, registry = pipeline(name), MemoryRegistry()
    made.save_pretrained(directory)
    return Shipped(tiny, made, directory, registry, imported(tiny, directory, registry))


def imported(tiny: Tiny, directory: Path, registry: MemoryRegistry) -> str:
    mode: Literal["embedded", "cfg"] = "embedded" if "w" in tiny.inputs else "cfg"
    return import_diffusers(
        directory,
        registry,
        name="tiny",
        schedules=(STEPS,),
        guidance=Guidance() if tiny.w is None else Guidance(mode=mode, default=tiny.w, maximum=10.0),
        inputs=tiny.inputs,
        resolution=(tiny.pixels, tiny.pixels),
        num_frames=tiny.frames,
        golden_prompts=("a red circle",),
    )


@cache
def inpainting(name: str) -> Shipped:
    """The family's own pipeline of inpainting, whose UNet reads the mask and the rest of the picture."""
    import diffusers

    tiny, directory = FAMILIES[name], Path(tempfile.mkdtemp(prefix=f"fewstep-{name}-inpaint-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    made, registry = pipeline(name), MemoryRegistry()
    made.unet = type(made.unet).from_config(dict(made.unet.config) | {"in_channels": 9}).eval()
    tiny_sd.shake(made.unet)
    editor = getattr(diffusers, type(made).__name__.replace("Pipeline", "InpaintPipeline"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = editor(**{key: value for key, value in made.components.items() if key != "image_encoder"}, **(
            {"requires_safety_checker": False} if name == "sd" else {}))  # fmt: skip
    whole.set_progress_bar_config(disable=True)
    whole.save_pretrained(directory)
    return Shipped(tiny, whole, directory, registry, imported(tiny, directory, registry))
