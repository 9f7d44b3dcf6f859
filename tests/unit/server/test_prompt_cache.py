"""The prompt cache keeps what was used last and never more bytes than it may."""

import torch

from server.prompt_cache import Embedding, PromptCache, PromptKey


def key(prompt: str, encoder: str = "text") -> PromptKey:
    return PromptKey(encoder, prompt)


def embedding(num_bytes: int) -> Embedding:
    return Embedding(torch.zeros(num_bytes // 4))


def test_what_was_used_longest_ago_goes_first() -> None:
    cache = PromptCache(max_bytes=24)
    cache.put(key("a"), embedding(8))
    cache.put(key("b"), embedding(8))
    cache.put(key("c"), embedding(8))
    assert cache.get(key("a")) is not None
    cache.put(key("d"), embedding(8))
    assert [name for name in "abcd" if cache.get(key(name))] == ["a", "c", "d"]
    assert cache.num_bytes == 24


def test_as_many_go_as_a_large_one_needs() -> None:
    cache = PromptCache(max_bytes=24)
    for name in "abc":
        cache.put(key(name), embedding(8))
    cache.put(key("large"), embedding(16))
    assert [name for name in ("a", "b", "c", "large") if cache.get(key(name))] == ["c", "large"]


def test_what_is_larger_than_the_cache_is_not_kept_and_pushes_nothing_out() -> None:
    cache = PromptCache(max_bytes=8)
    cache.put(key("small"), embedding(8))
    cache.put(key("large"), embedding(12))
    assert cache.get(key("small")) is not None
    assert cache.get(key("large")) is None


def test_a_replaced_embedding_is_counted_once() -> None:
    cache = PromptCache(max_bytes=32)
    cache.put(key("a"), embedding(8))
    cache.put(key("a"), embedding(16))
    assert (len(cache), cache.num_bytes) == (1, 16)


def test_encoders_do_not_share_prompts_and_one_can_be_forgotten() -> None:
    cache = PromptCache(max_bytes=32)
    cache.put(key("a", "old"), embedding(8))
    cache.put(key("a", "new"), embedding(8))
    cache.forget_encoder("old")
    assert cache.get(key("a", "old")) is None
    assert cache.get(key("a", "new")) is not None
    assert cache.num_bytes == 8
