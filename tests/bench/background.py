"""The commands that Redis gets a minute from a process that works at nothing, by what it has in use."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from govredis import Config, GovRedis
from govredis.testing.servers import PostgresServer, RedisServer

from .sites import PATIENT

#: A call that a process makes.
Use = Callable[[GovRedis], object]


def _deny(gov: GovRedis) -> object:
    return gov.limits.hit("denied", "1/hour")


def _read(gov: GovRedis) -> object:
    return gov.metadata.get("agent-1")


def _nothing(gov: GovRedis) -> object:
    return None


def measure(folder: str, postgres: PostgresServer, seconds: float) -> dict[str, Any]:
    """Each process, here a GovRedis, has a Redis of its own, so that all are watched during the same seconds."""
    # The settings, the first call, the call that is repeated, and how many commands the latter sends itself.
    ways: dict[str, tuple[dict[str, Any], Use, Use, int]] = {
        "idle, after a hit and a read": ({}, lambda gov: (_deny(gov), _read(gov)), _nothing, 0),
        "a lock held, ttl 6 s": ({}, lambda gov: gov.locks.acquire("held", ttl=6), _nothing, 0),
        "one identity denied all the time": ({}, _deny, _deny, 0),
        "`local_cache`, reads from it": ({"local_cache": True}, lambda gov: gov.metadata.set("agent-1", 1), _read, 0),
        "freshness of 5 s, reads": ({"database_url": postgres.url}, _read, _read, 1),
    }
    with ExitStack() as kept:
        watched = {}
        for name, (settings, begin, go_on, sends) in ways.items():
            server = kept.enter_context(RedisServer())
            gov = kept.enter_context(GovRedis(Config(redis_url=server.url, lock_folder=folder, **PATIENT, **settings)))
            if settings.get("database_url"):
                gov.postgres.migrate()
            kept.callback(_release, begin(gov))
            watched[name] = server, gov, go_on, sends
        monitors = {name: _Monitor(server) for name, (server, *_) in watched.items()}
        reads = dict.fromkeys(watched, 0)
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            for name, (_, gov, go_on, _) in watched.items():
                go_on(gov)
                reads[name] += 1
            time.sleep(0.02)
        took = time.monotonic() - began
        found = {}
        for name, (*_, sends) in watched.items():
            found[name] = round((monitors[name].count() - sends * reads[name]) * 60 / took, 1)
    return {"seconds": round(took, 1), "calls_a_second": round(max(reads.values()) / took), "commands_a_minute": found}


class _Monitor:
    """Counts the commands that others send to a server: not those that scripts run, and not its own."""

    def __init__(self, server: RedisServer) -> None:
        self._server = server
        self._socket = socket.create_connection(("127.0.0.1", server.port))
        self._socket.sendall(b"MONITOR\r\n")
        self._said = self._socket.recv(5)

    def count(self) -> int:
        """The commands so far; ends it."""
        self._server.command("ECHO", "that was all")
        while b"that was all" not in self._said:
            self._said += self._socket.recv(65536)
        self._socket.close()
        senders = re.findall(rb"^\+[\d.]+ \[\d+ ([^]]+)\]", self._said, re.MULTILINE)
        return sum(sender not in (b"lua", senders[-1]) for sender in senders)


def _release(held: Any) -> None:
    if hasattr(held, "release"):
        held.release()
