import json
from pathlib import Path

import pytest

from engines.errors import InvalidRequest
from server.settings import GatewaySettings, WorkerSettings, load, redacted

BASE = {"GATEWAY_REDIS_URL": "redis://:hunter2@db:6379/0", "GATEWAY_REGISTRY_URL": "/srv/registry"}
KEY = {"name": "web", "key": "a-long-enough-secret", "scopes": ["generate"]}


def gateway(monkeypatch: pytest.MonkeyPatch, **env: str) -> GatewaySettings:
    for name, value in {**BASE, **env}.items():
        monkeypatch.setenv(name, value)
    return load(GatewaySettings)


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gateway(monkeypatch, GATEWAY_PORT="9000").port == 9000


def test_a_misspelt_variable_is_refused_with_those_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRequest, match=r"GATEWAY_PROT: known are .*GATEWAY_PORT"):
        gateway(monkeypatch, GATEWAY_PROT="9000")


def test_what_kubernetes_adds_for_a_service_of_this_name_is_no_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    gateway(monkeypatch, GATEWAY_SERVICE_HOST="10.0.0.1", GATEWAY_PORT_8000_TCP_ADDR="10.0.0.1")


def test_a_bad_value_is_one_sentence_that_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRequest, match=r"^GATEWAY_PORT: "):
        gateway(monkeypatch, GATEWAY_PORT="many")


def test_what_must_be_chosen_has_no_default() -> None:
    with pytest.raises(InvalidRequest, match=r"WORKER_REDIS_URL.*required"):
        load(WorkerSettings)


def test_an_open_port_without_keys_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRequest, match="not loopback"):
        gateway(monkeypatch, GATEWAY_HOST="0.0.0.0")
    assert gateway(monkeypatch, GATEWAY_HOST="0.0.0.0", GATEWAY_API_KEYS=json.dumps([KEY])).keys[0].name == "web"


def test_keys_come_from_a_file_too_and_names_are_unique(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    file.write_text(json.dumps([KEY]))
    assert len(gateway(monkeypatch, GATEWAY_API_KEYS_FILE=str(file)).keys) == 1
    with pytest.raises(InvalidRequest, match="own name"):
        gateway(monkeypatch, GATEWAY_API_KEYS_FILE=str(file), GATEWAY_API_KEYS=json.dumps([KEY]))


def test_no_secret_reaches_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = gateway(monkeypatch, GATEWAY_API_KEYS=json.dumps([KEY]), GATEWAY_URL_SECRET="tell-nobody")
    text = json.dumps(redacted(settings))
    assert "db:6379" in text
    assert not [secret for secret in ("hunter2", "a-long-enough-secret", "tell-nobody") if secret in text]


def test_passwords_of_an_address_with_several_hosts_are_stars_too(monkeypatch: pytest.MonkeyPatch) -> None:
    url = "redis+sentinel://me:hunter2@one:1,two:2/pictures/0?sentinel_password=hunter3&ssl_ca_certs=/ca.pem"
    told = redacted(gateway(monkeypatch, GATEWAY_REDIS_URL=url))["redis_url"]
    assert told == url.replace("hunter2", "**********").replace("hunter3", "**********")


def test_settings_are_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="frozen"):
        gateway(monkeypatch).port = 1  # type: ignore[misc]


def test_results_are_addressed_where_clients_reach_us(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gateway(monkeypatch).base_url == "http://127.0.0.1:8000"
    assert gateway(monkeypatch, GATEWAY_PUBLIC_URL="https://example.org/").base_url == "https://example.org"
