"""The fields that the chart sets in objects of KEDA and the Prometheus operator, whose schemas no package brings.

Written after the v1alpha1 API of KEDA's ScaledObject and the v1 API of monitoring.coreos.com; fields that the chart
does not set are left out, so a misspelt one is refused as by a strict server.
"""

from typing import Any


def _object(*required: str, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "required": list(required), "properties": properties}


def _list(items: Any) -> dict[str, Any]:
    return {"type": "array", "minItems": 1, "items": items}


_STRING, _COUNT = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 0}
_STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
_METADATA = _object("name", name=_STRING, labels=_STRINGS)
_DURATION = {"type": "string", "pattern": r"^\d+(ms|s|m|h|d)$"}


def _resource(api_version: str, kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    return _object(
        *("apiVersion", "kind", "metadata", "spec"),
        apiVersion={"const": api_version},
        kind={"const": kind},
        metadata=_METADATA,
        spec=spec,
    )


_SCALE_DOWN = _object("stabilizationWindowSeconds", stabilizationWindowSeconds={**_COUNT, "maximum": 3600})
_SCALED_OBJECT = _object(
    *("scaleTargetRef", "triggers"),
    scaleTargetRef=_object("name", name=_STRING),
    minReplicaCount=_COUNT,
    maxReplicaCount=_COUNT,
    advanced=_object(horizontalPodAutoscalerConfig=_object(behavior=_object(scaleDown=_SCALE_DOWN))),
    triggers=_list(
        _object(
            *("type", "metadata"),
            type={"const": "prometheus"},
            metricType={"enum": ["Value", "AverageValue"]},
            metadata=_object(
                *("serverAddress", "query", "threshold"), serverAddress=_STRING, query=_STRING, threshold=_STRING
            ),
        )
    ),
)
_ENDPOINT = _object(
    "port",
    port=_STRING,
    path=_STRING,
    interval=_DURATION,
    relabelings=_list(_object("targetLabel", targetLabel=_STRING, replacement=_STRING)),
)
_SELECTOR = _object("matchLabels", matchLabels=_STRINGS)
_RULE = _object(
    "expr", alert=_STRING, record=_STRING, expr=_STRING, labels=_STRINGS, annotations=_STRINGS, **{"for": _DURATION}
)
_GROUP = _object("name", "rules", name=_STRING, interval=_DURATION, rules=_list(_RULE))

MONITORING = "monitoring.coreos.com/v1"
SCHEMAS: dict[str, dict[str, Any]] = {
    "ScaledObject": _resource("keda.sh/v1alpha1", "ScaledObject", _SCALED_OBJECT),
    "ServiceMonitor": _resource(
        MONITORING,
        "ServiceMonitor",
        _object("selector", "endpoints", selector=_SELECTOR, endpoints=_list(_ENDPOINT)),
    ),
    "PodMonitor": _resource(
        MONITORING,
        "PodMonitor",
        _object("selector", "podMetricsEndpoints", selector=_SELECTOR, podMetricsEndpoints=_list(_ENDPOINT)),
    ),
    "PrometheusRule": _resource(MONITORING, "PrometheusRule", _object("groups", groups=_list(_GROUP))),
}
