"""A worker whose backend never ends compiling weights in: here, in native code as real compilers are, and elsewhere.

`python -m tests.faults.compiling_worker FILE`, told by its environment as a worker is; FILE appears when it compiles.
"""

import sys
from pathlib import Path

import torch

from engines import aside, elsewhere
from engines.backends import eager
from engines.backends.base import Graph, Profile
from server.commands.processes import worker


class Compiling(eager.Eager):
    constants_pay = True

    def build(self, graph: Graph, profile: Profile) -> eager.Compiled:
        """Encoders and decoders have constants at once; a denoiser only when it is specialised."""
        if "pred" not in graph.outputs or profile.weights == "set":
            return super().build(graph, profile)
        aside.run(lambda: elsewhere.run("http.server", "--bind", "127.0.0.1", "0"), "elsewhere")
        matrix = torch.zeros(200, 200)
        while True:  # each product lets go of the GIL in C++, and wants it back there
            matrix = matrix @ matrix
            Path(sys.argv[1]).touch()


if __name__ == "__main__":
    eager.BACKEND = Compiling
    worker()
