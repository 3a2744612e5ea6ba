"""A DSN, libpq's text for a PostgreSQL: a URL, or keywords and values. Taken apart as libpq does it.

In postgres/ libpq itself decides whether it takes a DSN. This module finds the places of its parameters, since some
must not be shown. It needs no psycopg2.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import unquote

_URL = re.compile(r"postgres(?:ql)?://", re.IGNORECASE)
_ANY_URL = re.compile(r"\s*[A-Za-z][A-Za-z0-9+.-]*://")
# A keyword with its value, which may be quoted; or any other word.
_PAIR = re.compile(r"([^\s=]+)\s*=\s*('(?:[^'\\]|\\.)*(?:'|\\?\Z)|(?:[^\s\\]|\\.)*\\?)|\S+", re.DOTALL | re.ASCII)
_PARAMETER = re.compile(r"([^=&]*)=([^&]*)")
_SECRET = re.compile("pass|secret", re.IGNORECASE)

#: The name, the places where its value begins and ends in the text, and the value.
Parameter = tuple[str, int, int, str]


def is_url(text: str) -> bool:
    return _URL.match(text) is not None


def is_pairs(text: str) -> bool:
    """Does libpq take it for keywords and values?"""
    return "=" in text and _ANY_URL.match(text) is None


def parameters(dsn: str) -> Iterator[Parameter]:
    """The parameters of a DSN, without the path, the user and the hosts of a URL, which are no secrets."""
    return _of_url(dsn) if is_url(dsn) else _of_pairs(dsn)


def _of_pairs(dsn: str) -> Iterator[Parameter]:
    for found in _PAIR.finditer(dsn):
        if found[1] is None:
            yield "secret", *found.span(), found[0]  # an "=" or a quote was forgotten: it may be anything
        else:
            value = found[2].removeprefix("'").removesuffix("'") if found[2].startswith("'") else found[2]
            yield found[1], *found.span(2), re.sub(r"\\(.?)", r"\1", value, flags=re.DOTALL)


def _of_url(url: str) -> Iterator[Parameter]:
    begin = url.index("//") + 2
    at = url.find("@", begin)
    if at >= 0 and "/" not in url[begin:at]:
        colon = url.find(":", begin, at)
        if colon >= 0:
            yield "password", colon + 1, at, unquote(url[colon + 1 : at])
        begin = at + 1
    query = url.find("?", begin)
    if query >= 0:
        for found in _PARAMETER.finditer(url, query + 1):
            yield unquote(found[1]), *found.span(2), unquote(found[2])


def is_secret(name: str) -> bool:
    """Is the value of this parameter one?"""
    return _SECRET.search(name) is not None


def hidden(dsn: str) -> str:
    """The DSN with *** for each secret."""
    shown, at = "", 0
    for name, begin, end, _ in parameters(dsn):
        if is_secret(name):
            shown += dsn[at:begin] + "***"
            at = end
    return shown + dsn[at:]


def seems_mangled(dsn: str) -> bool:
    """Does a part of a password probably stand in the place of a host, port or database, and so would be shown?

    libpq takes a URL with an unescaped @ in a password, or with a password and no host, and fails only later.
    """
    ports = [port for name, _, _, value in parameters(dsn) if name == "port" for port in value.split(",")]
    if is_url(dsn):
        rest = dsn.partition("//")[2]
        user, at, after = rest.partition("@")
        address = (after if at and "/" not in user else rest).partition("?")[0]
        if "@" in address:
            return True
        ports += [host.rpartition("]")[2].partition(":")[2] for host in address.partition("/")[0].split(",")]
    return any(port and not (port.isdecimal() and int(port) <= 65535) for port in map(str.strip, ports))
