"""What families share of text: encoders as modules, their names in weight files, and prompts as token ids."""

import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engines.errors import InvalidManifest
from engines.families.base import ComponentNetwork, Port, ReadFile, Tokens

T5_MODELS = ("T5EncoderModel", "UMT5EncoderModel")


@dataclass(frozen=True)
class Packing:
    """What a denoiser reads of a prompt, as the one tensor `cond` [B, R, width].

    `tokens` rows of hidden states [B, tokens, width'], then each of `extras` [B, n] (a pooled embedding, a mask) in as
    many rows as it fills. Narrower hidden states and last rows are filled with zeros.
    """

    tokens: int
    width: int
    extras: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        return self.tokens + sum(-(-n // self.width) for n in self.extras), self.width

    def pack(self, hidden: Tensor, *extras: Tensor) -> Tensor:
        parts = [nn.functional.pad(hidden, (0, self.width - hidden.shape[-1]))]
        for extra in extras:
            filled = nn.functional.pad(extra.to(hidden.dtype), (0, -extra.shape[1] % self.width))
            parts.append(filled.reshape(extra.shape[0], -1, self.width))
        return torch.cat(parts, dim=1)

    def unpack(self, cond: Tensor) -> tuple[Tensor, ...]:
        found, start = [cond[:, : self.tokens]], self.tokens
        for n in self.extras:
            stop = start + -(-n // self.width)
            found.append(cond[:, start:stop].flatten(1)[:, :n])
            start = stop
        return tuple(found)


_WRAPPERS = re.compile(r"(?<![^.])(text_model|language_model|model)\.")
_T5 = re.compile(r"(?<![^.])encoder\.(?=block\.|final_layer_norm\.|embed_tokens\.)")


class TextNetwork(ComponentNetwork):
    """Text encoders, each a child named as its folder (`text` where there is one folder).

    Library versions wrap the same layers differently (`text_model.`, `model.language_model.`, a T5's `encoder.`):
    names are compared without that. Heads and towers that no prompt passes through are not read.
    """

    unused = ("lm_head.", "visual.", "model.visual.", "model.embed_vision.", "model.vision_tower.")
    outputs = ("cond",)

    def select(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        own = {_plain(name): name for name in self.state_dict()}
        found = {name: w for name, w in super().select(weights).items() if not name.endswith(".position_ids")}
        return {own.get(_plain(name), name): value for name, value in found.items()}


def _plain(name: str) -> str:
    return _T5.sub("", _WRAPPERS.sub("", name)).replace("shared.weight", "embed_tokens.weight")


def ids_port(tokens: int) -> Port:
    return Port("ids", (tokens,), torch.int64)


def mask_port(tokens: int) -> Port:
    return Port("mask", (tokens,), torch.int64)


def text_model(config: dict[str, Any], known: Sequence[str]) -> Any:
    """The encoder that a config of transformers describes, which must be one of `known`. Of a T5 only its stack.

    Raises:
        InvalidManifest: another architecture.
    """
    import transformers

    name = str((config.get("architectures") or [None])[0])
    if name not in known:
        raise InvalidManifest(f"the text encoder is a {name}: this family has {', '.join(known)}")
    model_class = getattr(transformers, name)
    settings = {key: value for key, value in config.items() if key not in ("architectures", "dtype", "torch_dtype")}
    described = model_class.config_class(**settings)
    if name in T5_MODELS:  # its biased attention, fused, has no ONNX graph
        described._attn_implementation = "eager"
        return model_class(described).encoder
    return model_class(described)


def read_json(read: ReadFile, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(read(name))
    return found


def load_tokenizers(read: ReadFile, names: Sequence[str]) -> tuple[Any, ...]:
    """The tokenizers among an encoder's files, in the order of their folders' names."""
    # A batch of prompts is too short to share: on busy cores, to wake threads for it takes longer than they save.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers import AutoTokenizer

    folders = sorted({name.partition("/")[0] for name in names if name.startswith("tokenizer")})
    with tempfile.TemporaryDirectory() as scratch:
        for name in (name for name in names if name.partition("/")[0] in folders):
            path = Path(scratch) / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(read(f"encoder/{name}"))
        return tuple(
            AutoTokenizer.from_pretrained(Path(scratch) / folder, local_files_only=True, trust_remote_code=False)
            for folder in folders
        )


def read_prompts(tokenizers: Sequence[Any], prompts: Sequence[str], lengths: Sequence[int | None]) -> Tokens:
    """Prompts as every tokenizer reads them, one after the other along L; a length of None is the tokenizer's own."""
    read = []
    for tokenizer, length in zip(tokenizers, lengths, strict=True):
        tokenizer.padding_side = "right"
        read.append(
            tokenizer(
                list(prompts),
                padding="max_length",
                truncation=True,
                max_length=length or tokenizer.model_max_length,
                return_tensors="pt",
            )
        )
    return Tokens(
        ids=torch.cat([one.input_ids for one in read], dim=1),
        ignored_words=((),) * len(prompts),
        counts=tuple(read[-1].attention_mask.sum(dim=1).tolist()),
        mask=torch.cat([one.attention_mask for one in read], dim=1),
    )
