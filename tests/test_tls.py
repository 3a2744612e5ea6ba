"""rediss:// with certificates, and the authorities that we trust."""

from __future__ import annotations

import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import trustme
from support import PATIENCE
from tls_proxy import TlsProxy

from govredis import BackendError, BackendUnavailable, Config
from govredis.client import RedisNode
from govredis.testing.servers import RedisServer

PATIENT = {"socket_timeout": 10, "connect_timeout": 10}


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def of_server(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    return context


@pytest.fixture
def proxy(redis_server: RedisServer, of_server: ssl.SSLContext) -> Iterator[TlsProxy]:
    with TlsProxy(redis_server.port, of_server) as running:
        yield running


def pem(authority: trustme.CA, folder: Path) -> str:
    path = folder / "authority.pem"
    authority.cert_pem.write_to_path(str(path))
    return str(path)


def client_of(proxy: TlsProxy, **parameters: Any) -> RedisNode:
    return RedisNode(Config(redis_url=f"rediss://{proxy.netloc}/0?{urlencode(parameters)}", **PATIENT))


def test_a_certificate_of_an_authority_that_we_trust(proxy: TlsProxy, authority: trustme.CA, tmp_path: Path) -> None:
    assert client_of(proxy, ssl_ca_certs=pem(authority, tmp_path)).call("ECHO", "x") == b"x"


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_authorities_are_read_at_the_first_connect(
    proxy: TlsProxy, monkeypatch: pytest.MonkeyPatch, host: str, tmp_path: Path
) -> None:
    """They are 25 ms of CPU, which each thread would pay that connects after an outage."""
    made: list[ssl.SSLContext] = []
    make = ssl.create_default_context
    monkeypatch.setattr(ssl, "create_default_context", lambda: (made.append(make()), made[-1])[1])
    # A file of this test's own, so that no other connection has these settings.
    parameters = {"ssl_cert_reqs": "none", "ssl_ca_certs": pem(trustme.CA(), tmp_path)}
    client = RedisNode(Config(redis_url=f"rediss://{host}:{proxy.port}/0?{urlencode(parameters)}", **PATIENT))
    for _ in range(3):
        client.call("PING")
        client._pool.drop_idle()
    assert len(made) == 1


def test_renewed_certificates_are_read_at_the_next_connect(
    proxy: TlsProxy, of_server: ssl.SSLContext, authority: trustme.CA, tmp_path: Path
) -> None:
    client = client_of(proxy, ssl_ca_certs=pem(authority, tmp_path))
    client.call("PING")
    renewed = trustme.CA()
    renewed.issue_cert("localhost").configure_cert(of_server)
    pem(renewed, tmp_path)
    client._pool.drop_idle()
    assert client.call("ECHO", "x") == b"x"


def test_a_folder_of_authorities_is_read_at_each_connect(
    proxy: TlsProxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A file in it that keeps its name leaves the folder as old as it was."""
    made: list[ssl.SSLContext] = []
    make = ssl.create_default_context
    monkeypatch.setattr(ssl, "create_default_context", lambda: (made.append(make()), made[-1])[1])
    client = client_of(proxy, ssl_ca_path=tmp_path, ssl_cert_reqs="none")
    for _ in range(3):
        client.call("PING")
        client._pool.drop_idle()
    assert len(made) == 3


EVENTLET = """
import eventlet
eventlet.monkey_patch()
from govredis import Config
from govredis.client import RedisNode
client = RedisNode(Config(redis_url="rediss://{netloc}/0?ssl_cert_reqs=none", socket_timeout=60, connect_timeout=60))
print([client.call("ECHO", "x") for _ in range(3)])
"""


@pytest.mark.once
@pytest.mark.one_redis
def test_eventlet_too(proxy: TlsProxy) -> None:
    """Its sockets have an error of their own where nothing is there to be read."""
    code = EVENTLET.format(netloc=proxy.netloc)
    done = subprocess.run([sys.executable, "-Wignore", "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout == f"{[b'x'] * 3}\n", done.stderr


def test_other_settings_are_other_certificates(proxy: TlsProxy, tmp_path: Path) -> None:
    authority = pem(trustme.CA(), tmp_path)
    client_of(proxy, ssl_ca_certs=authority, ssl_cert_reqs="none").call("PING")
    with pytest.raises(BackendError, match="cannot be trusted"):
        client_of(proxy, ssl_ca_certs=authority).call("PING")


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
    client = RedisNode(Config(redis_url=url, credential_provider=Tokens(), **PATIENT))
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
