"""Compiles one component with AOTInductor, in a process of its own: tracing holds the GIL, and C++ takes minutes.

The package holds code and no weight: every tensor it reads has the name it has in the module and is given at loading.
What is no weight (tables of frequencies, masks) lies beside it, with the names of the weights that are read in bf16.
"""

import json
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

PACKAGE, CONSTANTS, _NARROW = "model.pt2", "constants.safetensors", "bf16.json"


@dataclass(frozen=True, slots=True)
class Order:
    """What is baked into the code: the largest batch, threads where it is for a processor, and types."""

    max_rows: int
    threads: int
    device: str
    precision: str


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
        given = [str(asked), str(folder), str(order.max_rows), str(order.threads), order.device, order.precision]
        done = elsewhere.run("engines.backends._inductor", *given)
    if done.returncode:
        raise InternalError(f"compiling {spec.family} {spec.role} failed: {done.stderr.strip()[-800:]}")


def compile_here(spec: ComponentSpec, order: Order, folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    torch.set_num_threads(order.threads)
    with torch.device(order.device):
        network = spec.network().to(order.device).eval()
    narrow = narrow_products(network, order.device) if order.precision == "bf16" else []
    (folder / _NARROW).write_text(json.dumps(narrow))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = exported(spec, network, order)
        torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(folder / PACKAGE),
            inductor_configs={"aot_inductor.package_constants_in_so": False},
        )
    names = torch._inductor.aoti_load_package(str(folder / PACKAGE)).get_constant_fqns()
    weights = set(network.graph_names().values())
    others = {name: _constant(program, name) for name in names if name not in weights}
    save_file(others, folder / CONSTANTS)


def exported(spec: ComponentSpec, network: Any, order: Order) -> Any:
    """The network as a program for any number of rows up to the largest batch."""
    import torch

    example = {name: value.to(order.device) for name, value in ComponentGraph(spec, Path).example(2).items()}
    rows = torch.export.Dim("rows", min=1, max=max(2, order.max_rows))
    shapes = {name: {0: rows} for name in example}
    return torch.export.export(network, (), kwargs=example, dynamic_shapes=shapes, strict=False)


def narrow_products(network: Any, device: str) -> list[str]:
    """Has `network` compute as autocast does, with the weights of its products in bf16 already. Returns their names."""
    import torch
    from torch import nn

    products = (nn.Linear, nn.modules.conv._ConvNd)
    for module in network.modules():
        if isinstance(module, products):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(torch.bfloat16)
    network.forward = torch.autocast(torch.device(device).type, torch.bfloat16)(network.forward)
    return [name for name, parameter in network.named_parameters() if parameter.dtype == torch.bfloat16]


def narrowed(folder: Path) -> dict[str, Any]:
    """Names in the module of the weights that the package in `folder` reads in bf16, and that type."""
    import torch

    return dict.fromkeys(json.loads((folder / _NARROW).read_text()), torch.bfloat16)


def _constant(program: Any, name: str) -> Any:
    """A tensor of the program that is no weight, on the CPU."""
    found = program.constants.get(name, program.state_dict.get(name))
    if found is None:
        raise InternalError(f"the compiled package reads {name}, which the network has not")
    return found.detach().cpu().contiguous().clone()


if __name__ == "__main__":
    asked, folder, max_rows, threads, device, precision = sys.argv[1:]
    order = Order(int(max_rows), int(threads), device, precision)
    compile_here(ComponentSpec.from_json(Path(asked).read_text()), order, Path(folder))
