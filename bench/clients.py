"""Clients of a simulation: who asks next, and when."""

import random
from collections.abc import Iterator, Mapping

from bench.fleet import Asked, Fleet, Told
from bench.simulation import Simulation


def closed(
    fleet: Fleet, mix: Mapping[int, float], *, clients: int, seconds: float, around_s: float, seed: int
) -> list[Told]:
    """A closed loop for some seconds: each client asks again `around_s` after its last request has ended, which is what
    the way to the engines and back takes. `mix`: shares of step counts."""
    draw = random.Random(seed)

    def asked(at_s: float) -> Iterator[Asked]:
        if at_s < seconds:
            [steps] = draw.choices(list(mix), list(mix.values()))
            yield Asked(at_s=at_s, steps=steps)

    first = [one for _ in range(clients) for one in asked(0.0)]
    return Simulation(fleet).run(first, then=lambda told: asked(told.ended_s + around_s))
