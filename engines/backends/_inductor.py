"""Compiles one component with AOTInductor, in a process of its own: tracing holds the GIL, and C++ takes minutes.

The package holds code and no weight: every tensor it reads has the name it has in the module and is given at loading.
What is no weight (tables of frequencies, masks) lies beside it.
"""

import shutil
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines import elsewhere
from engines.errors import BackendUnavailable, InternalError
from engines.graph import ComponentGraph, ComponentSpec

PACKAGE, CONSTANTS = "model.pt2", "constants.safetensors"


@dataclass(frozen=True, slots=True)
class Order:
    """What is baked into the code: the largest batch, and threads where it is for a processor."""

    max_rows: int
    threads: int
    device: str


def cxx() -> str:
    """The C++ compiler that inductor uses.

    Raises:
        BackendUnavailable: there is none.
    """
    from torch._inductor import config

    *_, name = config.cpp.cxx
    if found := shutil.which(name):
        return found
    raise BackendUnavailable(f"torch_compile needs a C++ compiler and finds no {name}: install g++, or name one by CXX")


def compile_elsewhere(spec: ComponentSpec, order: Order, folder: Path) -> None:
    """Has a niced process write package and constants into `folder`.

    Raises:
        BackendUnavailable: no C++ compiler.
        InternalError: the compilation failed.
    """
    cxx()
    with tempfile.TemporaryDirectory() as scratch:
        asked = Path(scratch) / "spec.json"
        asked.write_text(spec.to_json())
        given = [str(asked), str(folder), str(order.max_rows), str(order.threads), order.device]
        done = elsewhere.run("engines.backends._inductor", *given)
    if done.returncode:
        raise InternalError(f"compiling {spec.family} {spec.role} failed: {done.stderr.strip()[-800:]}")


def compile_here(spec: ComponentSpec, order: Order, folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    torch.set_num_threads(order.threads)
    network = spec.network().to(order.device).eval()
    example = {name: value.to(order.device) for name, value in ComponentGraph(spec, Path).example(2).items()}
    rows = torch.export.Dim("rows", min=1, max=max(2, order.max_rows))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(
            network, (), kwargs=example, dynamic_shapes={name: {0: rows} for name in example}, strict=False
        )
        torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(folder / PACKAGE),
            inductor_configs={"aot_inductor.package_constants_in_so": False},
        )
    names = torch._inductor.aoti_load_package(str(folder / PACKAGE)).get_constant_fqns()
    weights = set(network.graph_names().values())
    others = {name: _constant(program, name) for name in names if name not in weights}
    save_file(others, folder / CONSTANTS)


def _constant(program: Any, name: str) -> Any:
    """A tensor of the program that is no weight, on the CPU."""
    found = program.constants.get(name, program.state_dict.get(name))
    if found is None:
        raise InternalError(f"the compiled package reads {name}, which the network has not")
    return found.detach().cpu().contiguous().clone()


if __name__ == "__main__":
    asked, folder, max_rows, threads, device = sys.argv[1:]
    order = Order(int(max_rows), int(threads), device)
    compile_here(ComponentSpec.from_json(Path(asked).read_text()), order, Path(folder))
