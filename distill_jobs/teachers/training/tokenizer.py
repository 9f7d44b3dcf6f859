"""The word-level vocabulary of an embedded teacher, as a stock CLIP tokenizer.

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

from distill_jobs.teachers.training.recipe import Recipe

START, END, UNKNOWN = "<|startoftext|>", "<|endoftext|>", "<|unknown|>"
_LOOSE_SHARE = 0.1


def words(recipe: Recipe) -> list[str]:
    """The vocabulary in a fixed order."""
    return list(dict.fromkeys(word for name in recipe.words for word in name.split()))


def build(recipe: Recipe) -> CLIPTokenizer:
    tokenizer = CLIPTokenizer(
        vocab={START: 0, END: 1, UNKNOWN: 2},
        merges=[],
        unk_token=UNKNOWN,
        pad_token=END,
        model_max_length=recipe.max_tokens,
    )
    tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=True) for word in words(recipe)])
    return tokenizer


def encode(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    """Token ids [N, L], padded as StableDiffusionPipeline pads them."""
    found = tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt")
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
