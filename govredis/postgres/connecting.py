"""Connections to the host of a DSN that libpq chooses, with one deadline of ours over all hosts."""

from __future__ import annotations

import ipaddress
import os
import selectors
import time
from typing import NamedTuple

import psycopg2
from psycopg2 import extensions

from .._redact import redact
from .._resolver import Resolver
from ..errors import printable
from .mapping import PostgresErrorMapping


class _Host(NamedTuple):
    """A host that a DSN names, by libpq's parameters; "" is libpq's default."""

    host: str
    hostaddr: str
    port: str

    @property
    def has_name(self) -> bool:
        """Must a name server be asked for it?"""
        if self.hostaddr or not self.host or self.host[0] in "/@":  # a socket's folder, or an abstract one
            return False
        try:
            ipaddress.ip_address(self.host)
        except ValueError:
            return True
        return False


def _hosts_of(parameters: dict[str, str]) -> list[_Host]:
    """The hosts that the parameters name; [] for none, or where their lists differ in length, which libpq refuses."""
    lists = [parameters[name].split(",") if parameters.get(name) else [] for name in _Host._fields]
    count = max(len(lists[0]), len(lists[1]))
    if len(lists[2]) == 1:  # a single port is for all hosts
        lists[2] *= count
    if any(each and len(each) != count for each in lists):
        return []
    return [_Host(*each) for each in zip(*(each or [""] * count for each in lists), strict=True)]


class Connector:
    """Makes connections, and waits for their answers.

    libpq walks through several hosts, and knows which of them it may use (target_session_attrs). But where its user
    polls, as we do, it waits for ever for a host that hangs. So each host has its share of the time that is left, and
    is left out once the share is used up. The lookup of a name in the DSN has a deadline, too.

    Args:
        dsn: as libpq takes it.
        parameters: the same, taken apart.
    """

    def __init__(self, dsn: str, parameters: dict[str, str], errors: PostgresErrorMapping) -> None:
        self._dsn = dsn
        self._errors = errors
        self._hosts = _hosts_of(parameters)
        #: Passwords that are hidden already; others may come from a service file or a password file.
        self._known = {parameters.get("password", ""), os.environ.get("PGPASSWORD", "")}
        self._resolvers = {each.host: Resolver(each.host) for each in self._hosts if each.has_name}

    def connect(self, deadline: float) -> extensions.connection:
        """A new connection. Raises NoAnswer, by the deadline (of time.monotonic); Rejected; BackendError."""
        hosts = self._resolved(deadline)
        while True:
            connection = self._begin(hosts)
            try:
                hosts = _hosts_of(connection.info.dsn_parameters)  # with what a service file or the environment adds
                hung = self._walk(connection, hosts, deadline)
            except psycopg2.Error as error:
                connection.close()
                raise self._errors.of_connecting(error) from error
            except BaseException:
                connection.close()
                raise
            if hung is None:
                return connection
            connection.close()
            hosts = [*hosts]
            hosts.remove(hung)

    def _begin(self, hosts: list[_Host]) -> extensions.connection:
        # Not the lists that are empty: an empty port would keep PGPORT and a service's from being used.
        chosen = {
            name: ",".join(values)
            for name, values in zip(_Host._fields, zip(*hosts, strict=True), strict=False)
            if any(values)
        }
        try:
            dsn = extensions.make_dsn(self._dsn, **chosen)
            connection: extensions.connection = psycopg2.connect(
                dsn, async_=1, application_name="govredis", client_encoding="UTF8"
            )
        except psycopg2.Error as error:
            raise self._errors.of_connecting(error) from error
        password = connection.info.password
        if password not in self._known:
            self._errors.keep_secret(password)
        return connection

    def _walk(self, connection: extensions.connection, hosts: list[_Host], deadline: float) -> _Host | None:
        """Wait until it is connected: returns None. Returns a host that has used up its share, if there are others."""
        visited: set[int] = set()
        at, share = -1, deadline
        while (state := connection.poll()) != extensions.POLL_OK:
            now = _current(connection, hosts)
            if now != at:
                at = now
                visited.add(at)
                begun = time.monotonic()
                share = begun + (deadline - begun) / max(1, 1 + len(hosts) - len(visited))
            if not _is_ready(connection, state, share - time.monotonic()):
                if len(hosts) > 1 and share < deadline:
                    return hosts[at]
                raise self._errors.no_answer("no answer within the deadline", timed_out=True)
        return None

    def _resolved(self, deadline: float) -> list[_Host]:
        """The hosts of the DSN, with an address for each name."""
        found, failed = [], None
        several = len(self._hosts) > 1
        for n, each in enumerate(self._hosts):
            if not each.has_name:
                found.append(each)
                continue
            try:
                left = max(0, deadline - time.monotonic())
                # Some time must be left for connecting, if there are other hosts.
                addresses = self._resolvers[each.host].addresses(left / (len(self._hosts) - n + several))
                found += [each._replace(hostaddr=address) for address in addresses]
            except TimeoutError as error:
                failed = self._errors.no_answer(str(error), timed_out=True)
            except OSError as error:
                failed = self._errors.no_answer(f"could not translate host name {each.host!r} to address: {error}")
        if failed is not None and not found:
            raise failed
        return found

    def wait(self, connection: extensions.connection, deadline: float) -> None:
        """Poll `connection` until its statement is done. Raises NoAnswer at the deadline."""
        while (state := connection.poll()) != extensions.POLL_OK:
            if not _is_ready(connection, state, deadline - time.monotonic()):
                raise self._errors.no_answer("no answer within the deadline", timed_out=True)


def has_input(connection: extensions.connection) -> bool:
    """Is there something to read?"""
    return _is_ready(connection, extensions.POLL_READ, 0)


def _is_ready(connection: extensions.connection, state: int, seconds: float) -> bool:
    # poll() is the cheapest call that takes descriptors above 1023. gevent replaces it, and eventlet removes it: an
    # application may do so late, so it is looked up at each call.
    kind: type[selectors.BaseSelector] = getattr(selectors, "PollSelector", selectors.DefaultSelector)
    with kind() as selector:
        selector.register(
            connection.fileno(), selectors.EVENT_READ if state == extensions.POLL_READ else selectors.EVENT_WRITE
        )
        return bool(selector.select(max(0, seconds)))


def _current(connection: extensions.connection, hosts: list[_Host]) -> int:
    """The index of the host that libpq tries now; the first address for a name that has several."""
    host, port = connection.info.host, str(connection.info.port)
    named = [(each.host or each.hostaddr, each.port or "5432") for each in hosts]
    return named.index((host, port)) if (host, port) in named else 0


def name_of(parameters: dict[str, str]) -> str:
    """Hosts, ports and the database, for a reader."""
    hosts = _hosts_of(parameters)
    if not hosts and "service" in parameters:
        return printable(f"service {parameters['service']}")
    hosts = hosts or [_Host(parameters.get("host", ""), "", parameters.get("port", ""))]
    default = _default_port(parameters)
    named = ",".join(
        f"{each.host or each.hostaddr or 'localhost'}{port and ':'}{port}"
        for each, port in ((each, each.port or default) for each in hosts)
    )
    return redact(printable(f"{named}/{parameters.get('dbname', '')}"))


def _default_port(parameters: dict[str, str]) -> str:
    """That of a host that has none; "" where a service file may name one, which libpq alone reads."""
    if parameters.get("port"):  # of others: then libpq looks nowhere else
        return "5432"
    return "" if "service" in parameters else os.environ.get("PGPORT", "5432")
