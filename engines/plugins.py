"""Finds plug-ins by file name: an extension is one file in its package, and no list is edited."""

import importlib
import pkgutil
from typing import Any

from engines.errors import UnknownPlugin

_NOT_PLUGINS = frozenset({"base"})


def names(package: str) -> list[str]:
    """The plug-ins of a package: its modules except `base` and private ones, sorted. Imports none of them."""
    module = importlib.import_module(package)
    found = (info.name for info in pkgutil.iter_modules(module.__path__) if not info.ispkg)
    return sorted(name for name in found if name not in _NOT_PLUGINS and not name.startswith("_"))


def load(package: str, name: str, attribute: str) -> Any:
    """`package.name.attribute`.

    Raises:
        UnknownPlugin: no such file; the message lists those there are.
    """
    known = names(package)
    if name not in known:
        raise UnknownPlugin(f"{name!r} is not one of {package}: choose from {', '.join(known)}")
    return getattr(importlib.import_module(f"{package}.{name}"), attribute)
