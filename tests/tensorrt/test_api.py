"""Every name of the library's API that we use exists in the real binding, and none was removed in TensorRT 11.

Our code is read, not run: so a misspelt call on a path that takes a GPU is found on a machine without one.
"""

import ast
import importlib
from pathlib import Path
from typing import Any

import pytest

from engines.backends import _tensorrt_library as libraries
from engines.backends import tensorrt

rtx = pytest.importorskip("tensorrt_rtx_bindings", reason="pip install 'fewstep[tensorrt]'")
FOLDER = Path(tensorrt.__file__).parent
# What our variables hold, by their name.
CLASSES = {
    "builder": "Builder", "config": "IBuilderConfig", "network": "INetworkDefinition", "parser": "OnnxParser",
    "profile": "IOptimizationProfile", "engine": "ICudaEngine", "context": "IExecutionContext",
    "_context": "IExecutionContext", "refitter": "Refitter", "_runtime": "Runtime", "settings": "IRuntimeConfig",
    "first": "ParserError", "port": "ITensor", "timing_cache": "ITimingCache",
}  # fmt: skip
FILES = ("_tensorrt_build.py", "_tensorrt_engine.py")
# `port` is ONNX's own where the type is asked for.
OTHERS = {("port", "type")}


def used() -> set[tuple[str, str]]:
    """(class, name) of everything that we ask the library for; class "" is the module."""
    found: set[tuple[str, str]] = set()
    for file in FILES:
        for node in ast.walk(ast.parse((FOLDER / file).read_text())):
            if isinstance(node, ast.Attribute):
                found |= _asked(node)
    return found


def _asked(node: ast.Attribute) -> set[tuple[str, str]]:
    owner = node.value
    name = owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else ""
    if name == "api":
        return {("", node.attr)}
    if isinstance(owner, ast.Attribute) and _root(owner) == "api":
        return {(owner.attr, node.attr)}
    if name in CLASSES and (name, node.attr) not in OTHERS:
        return {(CLASSES[name], node.attr)}
    return set()


def _root(node: ast.Attribute) -> str:
    value = node.value
    return value.id if isinstance(value, ast.Name) else value.attr if isinstance(value, ast.Attribute) else ""


def test_every_name_that_we_use_exists() -> None:
    missing = [
        f"{owner or 'module'}.{name}"
        for owner, name in used()
        if not hasattr(getattr(rtx, owner) if owner else rtx, name)
    ]
    assert missing == []


def test_the_calls_of_building_refitting_and_running_are_among_them() -> None:
    assert used() >= {
        ("Builder", "build_serialized_network"),
        ("OnnxParser", "parse_from_file"),
        ("INetworkDefinition", "mark_weights_refittable"),
        ("BuilderFlag", "REFIT_INDIVIDUAL"),
        ("Runtime", "deserialize_cuda_engine"),
        ("Refitter", "refit_cuda_engine_async"),
        ("Refitter", "get_missing_weights"),
        ("IExecutionContext", "execute_async_v3"),
        ("IExecutionContext", "set_tensor_address"),
        ("CudaGraphStrategy", "WHOLE_GRAPH_CAPTURE"),
        ("CudaGraphStrategy", "DISABLED"),
        ("BuilderFlag", "WEIGHT_STREAMING"),
        ("ICudaEngine", "weight_streaming_budget_v2"),
        ("ICudaEngine", "streamable_weights_size"),
    }


def test_nothing_is_used_that_11_removed_and_none_of_it_is_in_this_binding() -> None:
    removed = {(owner, name) for owner, names in libraries.REMOVED.items() for name in names}
    assert used() & removed == set()
    assert [pair for pair in removed if hasattr(getattr(rtx, pair[0]), pair[1])] == []


def test_the_library_is_found_under_its_true_name() -> None:
    library = libraries.find.__wrapped__()
    module: Any = importlib.import_module("tensorrt_rtx_bindings")
    assert library.version == module.__version__
    if library.api is module:
        assert (library.name, library.rtx) == ("tensorrt_rtx", True)
