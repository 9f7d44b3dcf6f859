"""What training needs of memory and of time: estimated before it starts, measured when it has ended."""

import re
import resource
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # proc(5)


@dataclass(frozen=True, slots=True)
class Needs:
    """`memory_bytes`: the peak of resident memory, the runtime included, summed over the processes that train.
    `train_seconds`: from the first stage's preparation to the last checkpoint.
    """

    memory_bytes: int
    train_seconds: float

    def then(self, later: "Needs") -> "Needs":
        """Of two lives of one run."""
        return Needs(max(self.memory_bytes, later.memory_bytes), self.train_seconds + later.train_seconds)


def peak_bytes() -> int:
    """The most resident memory that this process has had since `forget_peak`, or since it began.

    Linux counts it as VmHWM. `getrusage` would do only where that is missing: its peak begins with that of whoever
    started the process.
    """
    found = re.search(r"^VmHWM:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    return 1024 * (int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def forget_peak() -> None:
    """`peak_bytes` begins anew with what is resident now; where the kernel does not allow it, it goes on."""
    with suppress(OSError):
        _CLEAR.write_text("5")
