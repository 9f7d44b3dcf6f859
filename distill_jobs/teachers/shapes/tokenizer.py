"""The word-level vocabulary of the embedded teacher, as a stock CLIP tokenizer.

CLIP's tokenizer is byte-pair encoding, which would spell an unknown word with known letters. So every word is an
added token and the byte-pair vocabulary is left empty: what is not a word of ours becomes the unknown token.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import CLIPTokenizer

from distill_jobs.teachers.shapes import data

MAX_TOKENS = 24
START, END, UNKNOWN = "<|startoftext|>", "<|endoftext|>", "<|unknown|>"
_GLUE = [
    "a",
    "an",
    "and",
    "on",
    "in",
    "at",
    "the",
    "of",
    "left",
    "right",
    "above",
    "below",
    "row",
    "column",
    "background",
    "over",
]
_LOOSE_SHARE = 0.1


def words() -> list[str]:
    """The vocabulary in a fixed order."""
    named = (*data.KINDS, *data.COLOURS, *data.SIZES, *data.PLACES, *data.BACKGROUNDS, *_GLUE)
    return list(dict.fromkeys(word for name in named for word in name.split()))


def build() -> CLIPTokenizer:
    tokenizer = CLIPTokenizer(
        vocab={START: 0, END: 1, UNKNOWN: 2},
        merges=[],
        unk_token=UNKNOWN,
        pad_token=END,
        model_max_length=MAX_TOKENS,
    )
    tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=True) for word in words()])
    return tokenizer


def encode(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    """Token ids [N, MAX_TOKENS], padded as StableDiffusionPipeline pads them."""
    found = tokenizer(list(captions), padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    return torch.as_tensor(found.input_ids)


def loosen(caption: str, rng: random.Random) -> str:
    """Now and then a caption as people type it, without articles or with a word we do not know."""
    if rng.random() < _LOOSE_SHARE:
        caption = " ".join(word for word in caption.split() if word not in ("a", "an", "the"))
    if rng.random() < _LOOSE_SHARE:
        parts = caption.split()
        parts.insert(rng.randrange(len(parts) + 1), "~")
        caption = " ".join(parts)
    return caption
