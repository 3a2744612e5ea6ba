"""Site: the clients of one process, and the floor beneath them, a socket that sends the same bytes."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

import redis as redis_py

from govredis import Config, GovRedis
from govredis.client.commands import pack_command, unpack_commands

Call = Callable[[], object]

#: A busy machine is no outage.
PATIENT = {"socket_timeout": 10.0, "connect_timeout": 10.0, "postgres_timeout": 20.0}
#: Identities that an operation takes in turn, as an app with many agents does.
IDENTITIES = 200


class Raw:
    """A socket that sends what it is given and reads one reply, without parsing it: the floor."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._socket = socket.create_connection((parts.hostname, parts.port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = bytearray(65536)

    def exchange(self, packed: bytes) -> None:
        self._socket.sendall(packed)
        if self._buffer[: self._socket.recv_into(self._buffer)].startswith(b"-"):
            raise RuntimeError(bytes(self._buffer[:100]))

    def ask(self, *command: str) -> str:
        """The reply to a command that fits into one read."""
        self._socket.sendall(pack_command(command))
        return self._buffer[: self._socket.recv_into(self._buffer)].decode(errors="replace")

    def close(self) -> None:
        self._socket.close()


class Site:
    """The clients with which a process makes its calls.

    Args:
        url: of Redis.
        folder: of the lock files.
        who: what its identities begin with, so that several do not meet.
    """

    def __init__(self, url: str, folder: str, who: str = "bench") -> None:
        self.url, self.folder, self.who = url, folder, who
        self.gov = GovRedis(Config(redis_url=url, lock_folder=folder, **PATIENT))
        self.names = [f"{who}-{n}" for n in range(IDENTITIES)]

    def in_turn(self) -> Callable[[], str]:
        """A function that returns the identities, one after the other, for ever."""
        return itertools.cycle(self.names).__next__

    @cached_property
    def plain(self) -> redis_py.Redis:
        return redis_py.Redis.from_url(self.url)

    @cached_property
    def raw(self) -> Raw:
        return Raw(self.url)

    @property
    def client(self) -> Any:
        return self.gov.internal.context.redis

    def sent_by(self, call: Call, replies: Sequence[Any], of: GovRedis | None = None) -> list[bytes]:
        """The very bytes that `call` sends, one for each reply that it is given in place of the server's."""
        client: Any = (of or self.gov).internal.context.redis
        sent: list[bytes] = []
        pending = iter(replies)

        def record(packed: bytes, *_: object, **__: object) -> Any:
            sent.append(packed)
            return next(pending)

        client._round_trip = record
        try:
            call()
        finally:
            del client._round_trip
        return sent

    def replay(self, packed: Sequence[bytes]) -> Call:
        """Sends these, one a call, in turn."""
        following, exchange = itertools.cycle(packed).__next__, self.raw.exchange
        return lambda: exchange(following())

    def replay_anew(self, packed: Sequence[bytes], member: int) -> Call:
        """The same, with a new member each time, which is that argument of the EVALSHA."""
        parts = []
        for one in packed:
            name = unpack_commands(one)[0][member]
            before, _, behind = one.partition(name)
            parts.append((before + b"%0" + str(len(name)).encode() + b"d", behind))
        following, count, exchange = itertools.cycle(parts).__next__, itertools.count().__next__, self.raw.exchange

        def call() -> None:
            before, behind = following()
            exchange(before % count() + behind)

        return call

    def close(self) -> None:
        self.gov.close()
        for name in ("plain", "raw"):
            if name in self.__dict__:
                getattr(self, name).close()
