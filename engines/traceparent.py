"""The header `traceparent` of W3C Trace Context, as far as logs need it: spans are made from it by OpenTelemetry."""

import re

_HEADER = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")


def trace_id(traceparent: str | None) -> str | None:
    """Which trace it belongs to; None where it is missing or malformed."""
    found = _HEADER.match(traceparent or "")
    return found[1] if found else None
