"""Who reaches what: network policies, and what an Ingress publishes."""

from distill_jobs import api
from distill_jobs.queue import JobQueue, connect
from distill_jobs.records import JobRecords
from engines.registry.memory import MemoryRegistry
from server.app import create_app
from server.brokers.memory import MemoryBroker, MemoryServer
from server.settings import GatewaySettings
from tests.chart.release import Object, Release, ci_values, selects, with_values

NAMESPACE_NAME = "kubernetes.io/metadata.name"
EVERYBODY: Object = {"namespaceSelector": {}}


def test_prometheus_reaches_all_that_it_scrapes() -> None:
    release = Release(ci_values("full"))
    for component in ("gateway", "worker", "distiller"):
        assert let_in(release, component, "monitoring")
        assert not let_in(release, component, "of-somebody-else")
    assert let_in(release, "gateway", "ingress-nginx")
    assert not let_in(release, "worker", "ingress-nginx")


def test_without_a_word_everybody_reaches_gateways_and_metrics() -> None:
    release = Release(ci_values("minimal"))
    assert all(let_in(release, component, "any") for component in ("gateway", "worker", "distiller"))


def test_redis_takes_only_pods_of_the_release_in_and_lets_nothing_out() -> None:
    release = Release(ci_values("minimal"))
    spec = release.one("NetworkPolicy", "-redis")["spec"]
    (rule,) = spec["ingress"]
    (peer,) = rule["from"]
    inside = {pod["metadata"]["labels"]["app.kubernetes.io/component"] for pod in release.pods}
    taken = {name for name in inside if selects(peer["podSelector"], labels_of(release, name))}
    assert taken == inside - {"redis"}
    assert "egress" not in spec
    assert spec["policyTypes"] == ["Ingress", "Egress"]


def test_pods_reach_dns_servers_and_redis_alone() -> None:
    dns, redis = Release(ci_values("minimal")).one("NetworkPolicy", "")["spec"]["egress"]
    assert dns == {"ports": [{"port": 53, "protocol": protocol} for protocol in ("UDP", "TCP")]}
    assert redis["to"][0]["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "redis"


def test_once_dns_servers_are_named_no_port_of_any_address_is_open() -> None:
    rules = Release(ci_values("full")).one("NetworkPolicy", "")["spec"]["egress"]
    assert [rule for rule in rules if not rule.get("to")] == []
    (dns,) = [rule for rule in rules if {"port": 53, "protocol": "UDP"} in rule["ports"]]
    assert dns["to"] == ci_values("full")["networkPolicy"]["dnsTo"]


def test_without_policies_there_are_none() -> None:
    assert with_values("minimal", networkPolicy={"enabled": False}).all("NetworkPolicy") == []


def test_an_ingress_publishes_all_that_a_gateway_has_but_its_metrics() -> None:
    (rule,) = Release(ci_values("full")).one("Ingress", "-gateway")["spec"]["rules"]
    registry, settings = MemoryRegistry(), GatewaySettings(redis_url="memory:", registry_url="memory:")
    app = create_app(settings, MemoryBroker(MemoryServer(), "gateway"), registry)
    jobs = JobQueue(connect("redis://of-no-use-here:6379/0"), JobRecords(registry))
    app.include_router(api.router(jobs, app.state.gateway.authorise))
    there = {*app.openapi()["paths"], "/openapi.json"}
    published = {path for path in there if any(routes(each, path) for each in rule["http"]["paths"])}
    assert there - published == {"/metrics"}


def let_in(release: Release, component: str, namespace: str) -> bool:
    """Whether policies let all pods of a namespace reach a component's."""
    labels = labels_of(release, component)
    specs = [each["spec"] for each in release.all("NetworkPolicy") if selects(each["spec"]["podSelector"], labels)]
    peers = [peer for spec in specs for rule in spec.get("ingress", ()) for peer in rule.get("from", [EVERYBODY])]
    return any(selects(peer["namespaceSelector"], {NAMESPACE_NAME: namespace}) for peer in peers)


def labels_of(release: Release, component: str) -> dict[str, str]:
    all_labels: list[dict[str, str]] = [pod["metadata"]["labels"] for pod in release.pods]
    return next(labels for labels in all_labels if labels["app.kubernetes.io/component"] == component)


def routes(rule: Object, path: str) -> bool:
    """As Kubernetes has it: a prefix ends where an element of the path does."""
    at: str = rule["path"]
    return path == at or (rule["pathType"] == "Prefix" and path.startswith(at.rstrip("/") + "/"))
