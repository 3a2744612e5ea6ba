"""URLs of Redis: of a server, of the Sentinels that name it, or of a Cluster's nodes.

The forms are those of Celery's and Prefect's URLs.
"""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import SplitResult, parse_qsl, unquote, urlencode, urlsplit

SENTINEL = {"redis+sentinel": "redis", "rediss+sentinel": "rediss"}
CLUSTER = {"redis+cluster": "redis", "rediss+cluster": "rediss"}
WANTED = (
    "redis://[user:password@]host[:port][/db], rediss://..., unix:///path/to/socket[?db=0],"
    " redis+sentinel://[user:password@]sentinel[:port][,sentinel[:port]...]/service[/db], rediss+sentinel://...,"
    " redis+cluster://[user:password@]node[:port][,node[:port]...] or rediss+cluster://...,"
    " with @ : / ? # in a password written as %40 %3A %2F %3F %23"
)
#: The ports of a server and of a Sentinel that name none, and the service that is watched where nobody names one.
PORT, SENTINEL_PORT, SERVICE = 6379, 26379, "mymaster"
#: Stands for the host of a URL whose server the Sentinels or the Cluster name. No name server knows it (RFC 2606).
_NAMED_BY_OTHERS = "primary.invalid"

Host = tuple[str, int]


class Sentinels(NamedTuple):
    """The Sentinels that a URL names, and the service that they watch. `tls`: None: as the data servers have it."""

    hosts: tuple[Host, ...]
    service: str
    username: str | None = None
    password: str | None = None
    tls: bool | None = None


class RedisAddress(NamedTuple):
    """A URL that redis-py takes. Its host is not used where Sentinels, or nodes of a Cluster, are asked for it."""

    url: str
    sentinels: Sentinels | None = None
    nodes: tuple[Host, ...] = ()


def split(url: str) -> SplitResult | None:
    """The parts of a URL; None for any other text. The error of urlsplit may quote a password, and ends here."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises ValueError when it is no port
        (parts.hostname or "").encode("idna")  # and this when it is no host
        url.encode()  # and this when it is not UTF-8, of an environment that may hold any bytes
    except ValueError:
        return None
    # With an unescaped @ in a password, the rest of the password would pass for the host, and be shown.
    return parts if parts.netloc.count("@") <= 1 else None


def parse(url: str) -> RedisAddress | None:
    """The address that a URL of Redis means; None for any other text."""
    scheme, mark, rest = url.partition("://")
    scheme = scheme.lower()  # redis-py knows it in small letters only
    if mark and scheme in SENTINEL:
        return _of_sentinels(SENTINEL[scheme], rest)
    if mark and scheme in CLUSTER:
        return _of_cluster(CLUSTER[scheme], rest)
    parts = split(url)
    if parts is None:
        return None
    if parts.scheme == "unix":
        is_one = bool(parts.path)
    else:
        is_one = parts.scheme in {"redis", "rediss"} and bool(parts.hostname and re.fullmatch(r"(/\d*)?", parts.path))
    return RedisAddress(parts.scheme + url[len(parts.scheme) :]) if is_one else None


def _of_sentinels(scheme: str, rest: str) -> RedisAddress | None:
    parts = _named_by_others(scheme, rest)
    found = parts and re.fullmatch(r"/([^/]+)(?:/(\d*))?", parts.path)
    hosts = parts and hosts_of(_hosts_in(parts), SENTINEL_PORT)
    if not parts or not found or not hosts:
        return None
    told = dict(parse_qsl(parts.query, keep_blank_values=True))
    username, password = (told.pop(name, None) or None for name in ("sentinel_username", "sentinel_password"))
    url = _without_hosts(parts, f"/{found[2] or ''}", urlencode(told))
    return RedisAddress(url, Sentinels(hosts, unquote(found[1]), username, password))


def _of_cluster(scheme: str, rest: str) -> RedisAddress | None:
    parts = _named_by_others(scheme, rest)
    hosts = parts and hosts_of(_hosts_in(parts), PORT)
    if not parts or not hosts or parts.path not in {"", "/", "/0"}:  # a Cluster has no other database
        return None
    return RedisAddress(_without_hosts(parts, "/0", parts.query), nodes=hosts)


def _named_by_others(scheme: str, rest: str) -> SplitResult | None:
    """The parts of a URL with several hosts; None for any other text."""
    try:
        parts = urlsplit(f"{scheme}://{rest}")
    except ValueError:
        return None
    userinfo, at, _ = parts.netloc.rpartition("@")
    return None if "@" in userinfo or split(f"{scheme}://{userinfo}{at}host") is None else parts


def _hosts_in(parts: SplitResult) -> str:
    return parts.netloc.rpartition("@")[2]


def _without_hosts(parts: SplitResult, path: str, query: str) -> str:
    userinfo, at, _ = parts.netloc.rpartition("@")
    return f"{parts.scheme}://{userinfo}{at}{_NAMED_BY_OTHERS}{path}{query and '?'}{query}"


def hosts_of(text: str, port: int) -> tuple[Host, ...] | None:
    """The hosts of `host[:port],host[:port]`, with this port where they name none; None for any other text."""
    hosts = []
    for each in text.split(","):
        parts = split(f"redis://{each.strip()}")
        if parts is None or not parts.hostname or parts.netloc != each.strip() or parts.port == 0:
            return None
        if re.search(r"[@;\s]", parts.netloc):  # Celery's URLs have a ; between the Sentinels
            return None
        hosts.append((parts.hostname, parts.port or port))
    return tuple(dict.fromkeys(hosts))
