"""How pods run, end, and are found."""

import pytest

from tests.chart.release import CI, Object, Release, ci_values, container, selects, with_values


@pytest.mark.parametrize("name", CI)
def test_pods_have_no_rights_but_distillers_whose_trainers_are_jobs(name: str) -> None:
    for pod in Release(ci_values(name)).pods:
        spec, component = pod["spec"], pod["metadata"]["labels"]["app.kubernetes.io/component"]
        assert spec["automountServiceAccountToken"] is (name == "jobs" and component == "distiller")
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for each in spec["containers"]:
            assert each["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }


def test_every_pod_may_pull_its_image_from_where_a_password_is_needed() -> None:
    for pod in Release(ci_values("full")).pods:
        assert pod["spec"]["imagePullSecrets"] == [{"name": "regcred"}]


def test_redis_runs_as_the_user_of_its_own_image() -> None:
    for workload in with_values("minimal", pod={"user": 1234}, redis={"user": 567}).workloads:
        security = workload["spec"]["template"]["spec"]["securityContext"]
        user = 567 if workload["metadata"]["name"] == "demo-fewstep-redis" else 1234
        assert [security[key] for key in ("runAsUser", "runAsGroup", "fsGroup")] == [user] * 3


@pytest.mark.parametrize("name", [name for name in CI if name != "jobs"])
def test_nothing_is_bound_to_a_role(name: str) -> None:
    kinds = {each["kind"] for each in Release(ci_values(name)).objects}
    assert not kinds & {"Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding"}


@pytest.mark.parametrize("name", CI)
def test_pods_run_as_an_account_that_is_there(name: str) -> None:
    release = Release(ci_values(name))
    accounts = {each["metadata"]["name"] for each in release.all("ServiceAccount")} | {"default"}
    assert {pod["spec"]["serviceAccountName"] for pod in release.pods} <= accounts


@pytest.mark.parametrize("name", CI)
def test_every_mount_has_its_volume_and_every_volume_its_claim(name: str) -> None:
    release = Release(ci_values(name))
    claims = {each["metadata"]["name"] for each in release.all("PersistentVolumeClaim")} | {"pictures"}
    for workload in release.workloads:
        spec = workload["spec"]["template"]["spec"]
        templates = {each["metadata"]["name"] for each in workload["spec"].get("volumeClaimTemplates", ())}
        volumes = {each["name"] for each in spec.get("volumes", ())} | templates
        assert {mount["name"] for mount in container(workload)["volumeMounts"]} == volumes
        used = {each["persistentVolumeClaim"]["claimName"] for each in spec.get("volumes", ()) if claim(each)}
        assert used <= claims


@pytest.mark.parametrize("name", CI)
def test_every_selector_finds_pods_that_have_the_ports_it_means(name: str) -> None:
    release = Release(ci_values(name))
    selecting = [each for each in release.objects if selector(each)]
    assert {"Service", "PodDisruptionBudget", "Deployment", "StatefulSet", "NetworkPolicy"} & {
        each["kind"] for each in selecting
    }
    for each in selecting:
        pods = [pod for pod in release.pods if selects(selector(each), pod["metadata"]["labels"])]
        assert pods, each["metadata"]["name"]
        for pod in pods:
            assert ports_meant(each) <= {port["name"] for port in pod["spec"]["containers"][0].get("ports", ())}


def test_a_workload_selects_its_own_pods_alone() -> None:
    release = Release(ci_values("full"))
    for workload in (each for each in release.workloads if each["kind"] != "Job"):
        found = [pod for pod in release.pods if selects(workload["spec"]["selector"], pod["metadata"]["labels"])]
        assert found == [workload["spec"]["template"]]


def test_a_gateway_is_forgotten_before_it_refuses_and_may_end_what_is_under_way() -> None:
    gateway = with_values("minimal", gateway={"preStopSeconds": 20, "drainSeconds": 3}).one("Deployment", "-gateway")
    assert container(gateway)["lifecycle"] == {"preStop": {"sleep": {"seconds": 20}}}
    assert gateway["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] >= 20 + 3 + 30
    assert gateway["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0


def test_what_is_scaled_by_others_names_no_number_of_pods() -> None:
    release = Release(ci_values("full"))
    assert "replicas" not in release.one("Deployment", "-gateway")["spec"]
    assert "replicas" not in release.one("Deployment", "-worker-cpu")["spec"]
    assert release.one("Deployment", "-worker-gpu")["spec"]["replicas"] == 3
    scalers = [*release.all("ScaledObject"), *release.all("HorizontalPodAutoscaler")]
    scaled = {each["spec"]["scaleTargetRef"]["name"] for each in scalers}
    assert scaled == {"demo-fewstep-worker-cpu", "demo-fewstep-gateway"}


def test_one_worker_is_replaced_only_by_one_that_is_ready() -> None:
    alone = Release(ci_values("minimal")).one("Deployment", "-worker-default")
    assert alone["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    several = Release(ci_values("full")).one("Deployment", "-worker-gpu")
    assert several["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}


def claim(volume: Object) -> bool:
    return "persistentVolumeClaim" in volume


def selector(each: Object) -> Object:
    """In the form of `matchLabels`; empty where an object selects no pods."""
    spec = each.get("spec", {})
    if each["kind"] == "Service":
        return {"matchLabels": spec["selector"]}
    if each["kind"] in ("Deployment", "StatefulSet", "PodDisruptionBudget"):
        found: Object = spec["selector"]
        return found
    return dict(spec["podSelector"]) if each["kind"] == "NetworkPolicy" else {}


def ports_meant(each: Object) -> set[str]:
    if each["kind"] == "Service":
        return {port["targetPort"] for port in each["spec"]["ports"]}
    if each["kind"] == "NetworkPolicy":
        return {port["port"] for rule in each["spec"].get("ingress", ()) for port in rule.get("ports", ())}
    return set()
