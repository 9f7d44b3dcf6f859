"""A teacher's words: each of its own is one token, everything else is the unknown one."""

import random
from pathlib import Path

import pytest

from distill_jobs.tasks.base import PACKAGE
from distill_jobs.teachers.training import recipe, tokenizer
from engines import plugins

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("task", plugins.names(PACKAGE))
def test_every_caption_is_known_word_by_word_and_fits(task: str) -> None:
    made_of = recipe.load(task)
    words = tokenizer.build(made_of)
    captions = made_of.task.captions(2_000, 1, "all")
    ids = tokenizer.encode(words, captions)
    assert ids.shape == (2_000, made_of.max_tokens)
    assert not (ids == words.unk_token_id).any()
    assert all(len(words(caption).input_ids) == len(caption.split()) + 2 for caption in captions)


def test_a_word_we_do_not_know_is_unknown_even_when_it_contains_ours() -> None:
    words = tokenizer.build(recipe.load("shapes"))
    unknown = words("redder zebra", add_special_tokens=False).input_ids
    assert set(unknown) == {words.unk_token_id}


def test_the_stock_tokenizer_reads_it_back(tmp_path: Path) -> None:
    tokenizer.build(recipe.load("shapes")).save_pretrained(tmp_path)
    again = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    text = "A large red circle, and a zebra"
    assert again(text).input_ids == tokenizer.build(recipe.load("shapes"))(text).input_ids


def test_loose_captions_keep_what_they_say() -> None:
    rng = random.Random(0)
    caption = "a small red circle on a white background"
    loose = {tokenizer.loosen(caption, rng) for _ in range(200)}
    assert caption in loose
    assert len(loose) > 2
    assert all({"small", "red", "circle", "white"} <= set(text.split()) for text in loose)
