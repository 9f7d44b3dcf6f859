"""Prompt embeddings, least recently used out first, bounded by bytes.

Captions repeat (a sheet of seeds, a retry, an empty negative prompt) and encoding a hit costs nothing. Keys hold the
encoder's weights, so students that share an encoder share its embeddings. Any thread may use it.
"""

import threading
from collections import OrderedDict
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Embedding:
    """One prompt as the denoiser reads it: cond [L, D], and what the tokenizer said of it."""

    cond: Tensor
    ignored_words: tuple[str, ...] = ()
    tokens: int = 0

    @property
    def num_bytes(self) -> int:
        return self.cond.numel() * self.cond.element_size()


@dataclass(frozen=True, slots=True)
class PromptKey:
    encoder: str  # the encoder's weights
    prompt: str


@dataclass(slots=True)
class PromptCache:
    max_bytes: int
    num_bytes: int = 0
    _items: OrderedDict[PromptKey, Embedding] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __len__(self) -> int:
        return len(self._items)

    def get(self, key: PromptKey) -> Embedding | None:
        with self._lock:
            found = self._items.get(key)
            if found is not None:
                self._items.move_to_end(key)
            return found

    def put(self, key: PromptKey, embedding: Embedding) -> None:
        """Keeps an embedding, unless it alone is larger than the cache."""
        with self._lock:
            self._drop(key)
            if embedding.num_bytes > self.max_bytes:
                return
            self._items[key] = embedding
            self.num_bytes += embedding.num_bytes
            while self.num_bytes > self.max_bytes:
                self._drop(next(iter(self._items)))

    def forget_encoder(self, encoder: str) -> None:
        """Drops the embeddings of an encoder that is no longer loaded."""
        with self._lock:
            for key in [key for key in self._items if key.encoder == encoder]:
                self._drop(key)

    def _drop(self, key: PromptKey) -> None:
        gone = self._items.pop(key, None)
        if gone is not None:
            self.num_bytes -= gone.num_bytes
