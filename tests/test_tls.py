"""rediss:// with certificates, and the authorities that we trust."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import trustme
from tls_proxy import TlsProxy

from govredis import BackendError, BackendUnavailable, Config
from govredis.client import RedisClient
from govredis.testing.servers import RedisServer

PATIENT = {"socket_timeout": 10, "connect_timeout": 10}


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def proxy(redis_server: RedisServer, authority: trustme.CA) -> Iterator[TlsProxy]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    with TlsProxy(redis_server.port, context) as running:
        yield running


def pem(authority: trustme.CA, folder: Path) -> str:
    path = folder / "authority.pem"
    authority.cert_pem.write_to_path(str(path))
    return str(path)


def client_of(proxy: TlsProxy, **parameters: Any) -> RedisClient:
    return RedisClient(Config(redis_url=f"rediss://{proxy.netloc}/0?{urlencode(parameters)}", **PATIENT))


def test_a_certificate_of_an_authority_that_we_trust(proxy: TlsProxy, authority: trustme.CA, tmp_path: Path) -> None:
    assert client_of(proxy, ssl_ca_certs=pem(authority, tmp_path)).call("ECHO", "x") == b"x"


@pytest.mark.parametrize("word", ["none", "NONE", "CERT_NONE", "cert_none"])
def test_any_certificate_is_taken_where_none_is_asked_for(proxy: TlsProxy, word: str) -> None:
    """As redis-py takes it, and as Celery does."""
    assert client_of(proxy, ssl_cert_reqs=word).call("ECHO", "x") == b"x"


@pytest.mark.parametrize("word", ["required", "CERT_REQUIRED"])
def test_a_certificate_that_does_not_verify_is_no_outage(proxy: TlsProxy, word: str, tmp_path: Path) -> None:
    """The fallbacks would hide it for as long as it stays wrong."""
    client = client_of(proxy, ssl_cert_reqs=word, ssl_ca_certs=pem(trustme.CA(), tmp_path))
    for _ in range(5):
        with pytest.raises(BackendError, match=r"cannot be trusted.*CERTIFICATE_VERIFY_FAILED") as caught:
            client.call("PING")
        assert not isinstance(caught.value, BackendUnavailable)
    assert client.breaker.closed


def test_a_missing_file_of_certificates_is_no_outage(proxy: TlsProxy) -> None:
    client = client_of(proxy, ssl_ca_certs="/nowhere/authority.pem")
    with pytest.raises(BackendError, match=r"cannot be trusted.*No such file") as caught:
        client.call("PING")
    assert not isinstance(caught.value, BackendUnavailable)


def test_a_missing_file_of_a_credential_provider_is_an_outage(proxy: TlsProxy) -> None:
    class Tokens:
        def get_credentials(self) -> tuple[str]:
            return (Path("/nowhere/token").read_text(),)

    url = f"rediss://{proxy.netloc}/0?ssl_cert_reqs=none"
    client = RedisClient(Config(redis_url=url, credential_provider=Tokens(), **PATIENT))
    with pytest.raises(BackendUnavailable, match=r"the credential_provider failed: FileNotFoundError"):
        client.call("PING")
    client.close()


def test_a_server_behind_tls_that_goes_away_is_an_outage(
    proxy: TlsProxy, authority: trustme.CA, tmp_path: Path
) -> None:
    client = client_of(proxy, ssl_ca_certs=pem(authority, tmp_path))
    client.call("PING")
    proxy.close()
    with pytest.raises(BackendUnavailable):
        client.call("PING")
