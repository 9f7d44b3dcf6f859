"""The library `openvino`, telling nobody that it is used, and one core of it for the process.

At its import it reports to a service of its makers, unless a file in the home directory says otherwise; from a network
that leads nowhere it does so in a forked process that it ends with SIGTERM after three seconds. That child still shares
the descriptor by which an event loop hears of signals, so the worker took the signal for its own and drained.

The plugin that a core loads gives the thread that loads it a stack for signals, and takes it away when that core goes
(`SigAltStackSetup` in its sources; openvino 2026.4). Where one thread made two cores, the first to go leaves the other
a stack to go back to that is no more, and the next signal ends the process: a distiller that had judged a student died
of the SIGTERM that told it to stop. So nobody makes another core, and this one stays.
"""

import sys

sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # its import fails: there is a stub for that

import openvino as ov  # noqa: E402 - only then

__all__ = ["core", "ov"]

core = ov.Core()
