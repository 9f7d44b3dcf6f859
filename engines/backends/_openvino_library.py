"""The library `openvino`, telling nobody that it is used.

At its import it reports to a service of its makers, unless a file in the home directory says otherwise; from a network
that leads nowhere it does so in a forked process that it ends with SIGTERM after three seconds. That child still shares
the descriptor by which an event loop hears of signals, so the worker took the signal for its own and drained.
"""

import sys

sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # its import fails: there is a stub for that

import openvino as ov  # noqa: E402 - only then

__all__ = ["ov"]
