"""What a soak asks: request k of a seed is always the same, whatever else happens."""

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from bench.system import MODEL, PROMPTS, SEEDS

STEPS = (1, 2, 4)
Kind = Literal["picture", "canceled", "left", "bad"]
SHARES: Mapping[Kind, float] = {"picture": 0.82, "canceled": 0.07, "left": 0.06, "bad": 0.05}
"""canceled: queued, and canceled a moment later. left: the client goes away before the answer."""
_LATEST_S = 0.15  # when a client cancels or leaves
_HUGE = 2 * 2**20  # bytes: more than a gateway reads


@dataclass(frozen=True, slots=True)
class Shot:
    """What decides about a picture, but for the version."""

    prompt: str
    seed: int
    steps: int


@dataclass(frozen=True, slots=True)
class Asked:
    """Request `number`. `fault` is what is wrong with a bad one."""

    number: int
    kind: Kind
    shot: Shot
    after_s: float = 0.0
    fault: str = ""

    def body(self) -> bytes:
        shot = self.shot
        good = {"model": MODEL, "prompt": shot.prompt, "seed": shot.seed, "steps": shot.steps, "timeout_ms": 60_000}
        if not self.fault:
            return json.dumps(good).encode()
        wrong = FAULTS[self.fault]
        return wrong if isinstance(wrong, bytes) else json.dumps(good | wrong).encode()


FAULTS: Mapping[str, bytes | dict[str, Any]] = {
    "no JSON": b'{"model": "shapes", "prompt": ',
    "nothing": b"",
    "no such model": {"model": "nobody"},
    "no such version": {"model": f"{MODEL}@{'0' * 64}"},
    "steps it was not made for": {"steps": 3},
    "a size it was not made for": {"width": 48, "height": 56},
    "half a size": {"width": 64},
    "no such field": {"colour": "red"},
    "a prompt that is no text": {"prompt": 7},
    "too many pictures": {"n": 99},
    "two formats": {"output_format": "jpeg"},
    "a seed below zero": {"seed": -1},
    "more bytes than are read": {"prompt": "a" * _HUGE},
}


def shots() -> list[Shot]:
    """All that good requests ask for."""
    return [Shot(prompt, seed, steps) for prompt in PROMPTS for seed in SEEDS for steps in STEPS]


def asked(seed: int, number: int) -> Asked:
    """Request `number` of the soak with this seed."""
    draw = random.Random(f"{seed}:{number}")
    (kind,) = draw.choices(list(SHARES), list(SHARES.values()))
    return Asked(
        number,
        kind,
        draw.choice(shots()),
        after_s=draw.uniform(0.0, _LATEST_S) if kind in ("canceled", "left") else 0.0,
        fault=draw.choice(sorted(FAULTS)) if kind == "bad" else "",
    )
