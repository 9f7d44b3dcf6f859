from urllib.parse import parse_qs, urlsplit

import pytest

from engines.errors import Gone, PermissionDenied
from server.signing import Signer

PATH = "/v1/generations/gen_1/images/0"


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def parts(url: str) -> tuple[str, str, str]:
    split = urlsplit(url)
    query = parse_qs(split.query)
    return split.path, query["expires"][0], query["signature"][0]


def test_a_signed_address_is_absolute_and_valid_until_it_expires() -> None:
    clock = Clock()
    signer = Signer(b"secret", "https://example.org/", 60, now_s=clock)
    url = signer.url(PATH)
    assert url.startswith(f"https://example.org{PATH}?")
    signer.check(*parts(url))
    clock.now_s += 61
    with pytest.raises(Gone):
        signer.check(*parts(url))


def test_another_picture_another_expiry_or_another_secret_is_refused() -> None:
    signer = Signer(b"secret", "", 60, now_s=Clock())
    path, expires, signature = parts(signer.url(PATH))
    other = Signer(b"other", "", 60, now_s=Clock())
    for check in (
        lambda: signer.check(path + "1", expires, signature),
        lambda: signer.check(path, str(int(expires) + 1), signature),
        lambda: signer.check(path, expires, signature[:-1] + "x"),
        lambda: other.check(path, expires, signature),
    ):
        with pytest.raises(PermissionDenied):
            check()


@pytest.mark.parametrize("expires", ["", "soon", "-5", "1" * 40, "١٢"])
def test_an_expiry_that_is_no_number_is_refused_and_not_a_crash(expires: str) -> None:
    with pytest.raises(PermissionDenied):
        Signer(b"secret", "", 60, now_s=Clock()).check(PATH, expires, "00")
