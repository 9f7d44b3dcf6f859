"""What an address of Redis means, and what is refused with a sentence."""

import pytest

from engines.errors import InvalidRequest
from engines.redis_address import connect


def test_sentinels_are_asked_as_whom_the_query_says_and_servers_as_whom_the_address_does() -> None:
    client = connect("rediss+sentinel://me:p%40ss@one,[::1]:26380/pictures/3?sentinel_password=s&ssl_ca_certs=/ca.pem")
    server = client.connection_pool.connection_kwargs
    assert (server["username"], server["password"], server["db"]) == ("me", "p@ss", 3)
    sentinels = client.connection_pool.sentinel_manager.sentinels  # type: ignore[attr-defined]
    asked = [sentinel.connection_pool.connection_kwargs for sentinel in sentinels]
    assert [(each["host"], each["port"]) for each in asked] == [("one", 26379), ("::1", 26380)]
    assert {(each["username"], each["password"]) for each in asked} == {(None, "s")}
    assert {each["ssl_ca_certs"] for each in [server, *asked]} == {"/ca.pem"}


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://host:6379", "redis://, rediss://, unix://, redis.sentinel://"),
        ("redis+cluster://one,two", "begins with one of"),
        ("redis+sentinel://one:26379", "host:port/service"),
        ("redis+sentinel://one:x/pictures", "'one:x' is no host:port"),
    ],
)
def test_what_is_no_address_is_refused_with_what_would_be(url: str, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        connect(url)
