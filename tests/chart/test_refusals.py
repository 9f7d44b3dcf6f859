"""Values that contradict each other, or leave something open, are refused with a sentence."""

from typing import Any

import pytest
from helm_python import HelmRenderError

from tests.chart.release import Release, with_values

OPEN = {"egress": [{"ports": [{"port": 443, "protocol": "TCP"}]}]}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("minimal", {"auth": {"apiKeys": []}}, "set auth.existingSecret, or auth.apiKeys"),
    ("minimal", {"auth": {"urlSecret": "short"}}, "auth.urlSecret: 16 characters"),
    ("minimal", {"redis": {"password": ""}}, "set redis.password, or redis.existingSecret"),
    ("minimal", {"redis": {"url": "redis://elsewhere:6379/0"}}, "set redis.enabled to false"),
    ("minimal", {"redis": {"enabled": False}, "networkPolicy": OPEN}, "redis.url, or redis.existingSecret"),
    ("external", {"networkPolicy": {"egress": []}}, "networkPolicy.egress"),
    ("full", {"networkPolicy": {"metricsFrom": []}}, "gatewayFrom shuts Prometheus out"),
    ("external", {"registry": {"existingClaim": "students"}}, "url and existingClaim contradict"),
    ("external", {"distiller": {"enabled": True}}, "training needs a registry in a shared folder"),
    ("minimal", {"pools": [{"name": "a"}, {"name": "a"}]}, "two are called a"),
    ("minimal", {"worker": {"autoscaling": {"enabled": True}}}, "set monitoring.prometheusUrl"),
    ("minimal", {"pools": [{"name": "a", "autoscaling": {"enabled": True}}]}, "a scales on queue wait"),
]


@pytest.mark.parametrize(("name", "changes", "sentence"), REFUSED, ids=[each[2] for each in REFUSED])
def test_refused(name: str, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(HelmRenderError, match=sentence):
        with_values(name, **changes)


def test_nothing_is_installed_without_a_word() -> None:
    with pytest.raises(HelmRenderError, match="does not start without keys"):
        Release({})


def test_a_pool_may_stay_fixed_where_the_others_scale() -> None:
    fixed = [{"name": "a", "autoscaling": {"enabled": False}}]
    assert with_values("minimal", worker={"autoscaling": {"enabled": True}}, pools=fixed).all("ScaledObject") == []
