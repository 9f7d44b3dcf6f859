"""Folders of the operator's that a job may name: those right below the distiller's data directory. Torch-free."""

import re
from pathlib import Path
from typing import Annotated

from pydantic import Field

_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
FolderName = Annotated[str, Field(pattern=_NAME)]


def holding(file: str, data: Path | None) -> list[str]:
    """The names of those that hold `file`, without the ones that a job cannot say; none where there is no `data`."""
    names = [path.parent.name for path in data.glob(f"*/{file}")] if data else []
    return sorted(name for name in names if re.fullmatch(_NAME, name))
