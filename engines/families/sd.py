"""The shape of diffusers' StableDiffusionPipeline: CLIP text encoder, cross-attention UNet, VAE.

Time is 0..1 at the border and 1000·t for the network; the VAE's scaling stands in the decoder graph. Networks
are built from configs alone, so a graph can be known before any weights are.

A student may read a second time `s` or the guidance `w`: their sinusoids go through a zero-initialised layer
each and are added to those of `t` before the UNet's own time MLP. That is diffusers' `timestep_cond` path, so
the UNet keeps its names, and a teacher with these layers added is still exactly the teacher.
Checked against: diffusers/pipelines/stable_diffusion/pipeline_stable_diffusion.py at 0.42.1.
"""

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engines.backends.base import Engine
from engines.errors import InvalidManifest, InvalidRequest
from engines.families.base import ComponentNetwork, Port, ReadFile, Tokens

PIPELINE = "StableDiffusionPipeline"
FOLDERS = {"encoder": "text_encoder", "denoiser": "unet", "decoder": "vae"}
NETWORK_TIME = 1000.0
_WORD = re.compile(r"\w+|[^\w\s]+")


class EncoderNet(ComponentNetwork):
    """ids [B, L] int64 -> the last hidden state [B, L, D]."""

    outputs = ("cond",)

    def __init__(self, text: Any) -> None:
        super().__init__()
        self.text = text
        self.inner = "text.text_model" if hasattr(text, "text_model") else "text"
        self.ports = (Port("ids", (text.config.max_position_embeddings,), torch.int64),)

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.text(ids).last_hidden_state
        return hidden

    def rename(self, name: str) -> str:
        return name.removeprefix("text_model.")


class DenoiserNet(ComponentNetwork):
    """x [B, C, H, W], t [B], cond [B, L, D], s [B] and w [B] where the student reads them -> prediction.

    Training and serving share this module. Without `s`, a network that reads one is asked at s = t.
    """

    inner = "unet"
    outputs = ("pred",)

    def __init__(self, unet: Any, second_time: bool = False, guidance: bool = False, tokens: int = 77) -> None:
        super().__init__()
        self.unet = unet
        width = unet.time_embedding.linear_1.in_features
        self.second_time = _zero_linear(width) if second_time else None
        self.guidance = _zero_linear(width) if guidance else None
        if second_time or guidance:
            if unet.time_embedding.cond_proj is not None:
                raise InvalidManifest("a UNet with time_cond_proj_dim cannot read s or w as well")
            unet.time_embedding.cond_proj = nn.Identity()
        size, config = unet.config.sample_size, unet.config
        height, wide = (size, size) if isinstance(size, int) else size
        self.ports = (
            Port("x", (config.in_channels, height, wide)),
            Port("t", ()),
            Port("cond", (tokens, config.cross_attention_dim)),
            *(Port(name, ()) for name, used in (("s", second_time), ("w", guidance)) if used),
        )

    def forward(self, x: Tensor, t: Tensor, cond: Tensor, s: Tensor | None = None, w: Tensor | None = None) -> Tensor:
        pred: Tensor = self.unet(
            x, NETWORK_TIME * t, encoder_hidden_states=cond, timestep_cond=self._extra(t, s, w), return_dict=False
        )[0]
        return pred

    def _extra(self, t: Tensor, s: Tensor | None, w: Tensor | None) -> Tensor | None:
        extra: Tensor | None = None
        if self.second_time is not None:
            extra = self.second_time(self.unet.time_proj(NETWORK_TIME * (t if s is None else s)))
        if self.guidance is not None:
            if w is None:
                raise InvalidRequest("this student reads its guidance weight: give w", param="guidance_scale")
            added = self.guidance(self.unet.time_proj(100.0 * w))
            extra = added if extra is None else extra + added
        return extra


class DecoderNet(ComponentNetwork):
    """latents [B, C, H, W] -> pictures in levels 0..255, fp32 [B, 3, H', W']; the VAE's scaling is undone inside.

    Not rounded: a grain measure reads what rounding would hide, and rounding costs nothing outside.
    """

    unused = ("encoder.", "quant_conv.")
    outputs = ("levels",)

    def __init__(self, vae: Any, height: int, width: int) -> None:
        super().__init__()
        if getattr(vae.config, "shift_factor", None):
            raise InvalidManifest("vae shift_factor is not 0, and StableDiffusionPipeline applies none: remove it")
        self.scale = 1.0 / vae.config.scaling_factor
        self.decoder = vae.decoder
        post = getattr(vae, "post_quant_conv", None)
        self.post_quant_conv = post if post is not None else nn.Identity()
        self.ports = (Port("latents", (vae.config.latent_channels, height, width)),)

    def forward(self, latents: Tensor) -> Tensor:
        pictures: Tensor = self.decoder(self.post_quant_conv(latents * self.scale))
        return (pictures * 127.5 + 127.5).clamp(0, 255)


class StableDiffusion:
    """The family: three engines and a tokenizer."""

    def __init__(
        self,
        encoder: Engine,
        denoiser: Engine | Mapping[str, Engine],
        decoder: Engine,
        *,
        tokenizer: Any = None,
        inputs: frozenset[str] = frozenset(),
    ) -> None:
        self.encoder, self.decoder = encoder, decoder
        self.denoisers = denoiser if isinstance(denoiser, Mapping) else {"denoiser": denoiser}
        self.inputs = inputs
        self._tokenizer = tokenizer
        self._null: Tensor | None = None

    def tokenize(self, prompts: Sequence[str]) -> Tokens:
        read = [self._readable(prompt) for prompt in prompts]
        found = self._tokenizer(
            [text for text, _ in read],
            padding="max_length",
            truncation=True,
            max_length=self._tokenizer.model_max_length,
            return_tensors="pt",
        )
        counts = found.attention_mask.sum(dim=1).tolist()
        return Tokens(ids=found.input_ids, ignored_words=tuple(words for _, words in read), counts=tuple(counts))

    def encode(self, prompts: Sequence[str]) -> Tensor:
        return self.encoder.run(ids=self.tokenize(prompts).ids)["cond"]

    def denoise(
        self,
        x: Tensor,
        t: Tensor,
        cond: Tensor,
        s: Tensor | None = None,
        w: Sequence[float | None] | Tensor | None = None,
        *,
        negative: Tensor | None = None,
        net: str = "denoiser",
    ) -> Tensor:
        weights = _as_weights(w, len(x))
        engine = self.denoisers[net]
        if "w" in self.inputs:
            return engine.run(**_present(x=x, t=t, cond=cond, s=self._second(t, s), w=weights))["pred"]
        guided = (~weights.isnan()).nonzero().flatten()
        if not len(guided):
            return engine.run(**_present(x=x, t=t, cond=cond, s=self._second(t, s)))["pred"]
        null = self._empty(cond) if negative is None else negative
        rows = torch.cat([torch.arange(len(x)), guided])
        second = self._second(t, s)
        pred = engine.run(
            **_present(
                x=x[rows],
                t=t[rows],
                cond=torch.cat([cond, null.expand_as(cond)[guided]]),
                s=None if second is None else second[rows],
            )
        )["pred"]
        c, u = pred[: len(x)], pred[len(x) :]
        c[guided] = u + weights[guided].view(-1, 1, 1, 1) * (c[guided] - u)
        return c

    def decode(self, latents: Tensor) -> Tensor:
        return self.levels(latents).round().to(torch.uint8)

    def levels(self, latents: Tensor) -> Tensor:
        return self.decoder.run(latents=latents)["levels"]

    def network_rows(self, w: float | None) -> int:
        return 1 if w is None or "w" in self.inputs else 2

    def _second(self, t: Tensor, s: Tensor | None) -> Tensor | None:
        if "s" not in self.inputs:
            return None
        return t if s is None else s

    def _empty(self, cond: Tensor) -> Tensor:
        if self._null is None:
            self._null = self.encode([""])
        return self._null

    def _readable(self, prompt: str) -> tuple[str, tuple[str, ...]]:
        """The prompt without the words that the tokenizer does not know, and those words."""
        words = _WORD.findall(prompt)
        lost = {word for word in set(words) if not self._known(word)}
        if not lost:
            return prompt, ()
        ignored = dict.fromkeys(word for word in words if word in lost and word[0].isalnum())
        return " ".join(word for word in words if word not in lost), tuple(ignored)

    def _known(self, word: str) -> bool:
        ids = self._tokenizer(word, add_special_tokens=False).input_ids
        return bool(ids) and self._tokenizer.unk_token_id not in ids

    @staticmethod
    def configs(role: str) -> tuple[str, ...]:
        own = f"{role}/config.json"
        return (own,) if role in ("encoder", "decoder") else (own, "encoder/config.json")

    @staticmethod
    def network(
        role: str, read: ReadFile, *, inputs: frozenset[str] = frozenset(), latent: tuple[int, int, int] = (4, 64, 64)
    ) -> ComponentNetwork:
        config = json.loads(read(f"{role}/config.json"))
        if role == "encoder":
            return EncoderNet(_text_model(config)).eval()
        if role == "decoder":
            return DecoderNet(_vae(config), latent[1], latent[2]).eval()
        unet = _unet(config | {"sample_size": [latent[1], latent[2]]})
        tokens = json.loads(read("encoder/config.json"))["max_position_embeddings"]
        return DenoiserNet(unet, "s" in inputs, "w" in inputs, tokens).eval()

    @staticmethod
    def tokenizer(read: ReadFile, names: Sequence[str]) -> Any:
        from transformers import CLIPTokenizer

        with tempfile.TemporaryDirectory() as folder:
            for name in (n for n in names if n.startswith("tokenizer/")):
                (Path(folder) / Path(name).name).write_bytes(read(f"encoder/{name}"))
            return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def _text_model(config: dict[str, Any]) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(**{k: v for k, v in config.items() if k not in ("architectures", "dtype")}))


def _vae(config: dict[str, Any]) -> Any:
    from diffusers import AutoencoderKL, AutoencoderTiny

    known = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
    name = config.get("_class_name")
    if name not in known:
        raise InvalidManifest(f"the decoder is a {name}: this family has {', '.join(known)}")
    return known[name].from_config(config)


def _unet(config: dict[str, Any]) -> Any:
    from diffusers import UNet2DConditionModel

    if config.get("_class_name") != "UNet2DConditionModel":
        raise InvalidManifest(f"the denoiser is a {config.get('_class_name')}, not a UNet2DConditionModel")
    return UNet2DConditionModel.from_config(config)


def _zero_linear(width: int) -> nn.Linear:
    layer = nn.Linear(width, width, bias=False)
    nn.init.zeros_(layer.weight)
    return layer


def _as_weights(w: Sequence[float | None] | Tensor | None, rows: int) -> Tensor:
    """[B] fp32, NaN where a row is not guided."""
    if isinstance(w, Tensor):
        return w.to(torch.float32).expand(rows)
    values = [None] * rows if w is None else list(w)
    return torch.tensor([float("nan") if v is None else v for v in values], dtype=torch.float32)


def _present(**inputs: Tensor | None) -> dict[str, Tensor]:
    return {name: value for name, value in inputs.items() if value is not None}


FAMILY = StableDiffusion
