"""OutageLog: the outages that this process notices, for the account."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from functools import partial

from .._context import Context
from ..breaker import CircuitBreaker, OutageNote
from ..client import RedisNode
from ..errors import BackendError
from .account_redis import AT, OutageRecord
from .figures import Outage
from .nodes import address_in

#: Seconds between two records of an outage that goes on.
_REFRESH = 5.0
#: Seconds without a word after which the outage of a process has ended: it was killed.
SILENT = 60.0
#: A server that fails again so soon was not back for long. As in outage.lua.
_RELAPSE = timedelta(seconds=1)
#: Outages that wait to be told, at most.
_MOST = 100

#: Features whose fallbacks serve no calls: threads of ours count what they could not do.
_IN_THREADS = {"guard", "health", "leases"}
#: Fallbacks of sessions that serve while Redis is away, also where rows are their primary.
_WITHOUT_COPIES = {"postgres", "untold", "index", "touch"}


def fallback_of(name: str) -> str | None:
    """The feature whose fallbacks are counted under this name, if any are."""
    is_fallback = ".degraded." in name or name == "locks.degraded_grants"
    return name.partition(".")[0] if is_fallback else None


def served_by_fallbacks(counts: dict[str, int], server: str, *, with_rows: bool) -> int:
    """How many calls fallbacks served while this server was away.

    Args:
        with_rows: PostgreSQL is the primary of sessions.
    """
    return sum(
        n
        for name, n in counts.items()
        if (feature := fallback_of(name)) is not None
        and feature not in _IN_THREADS
        and ("postgres" if _is_of_postgres(name, with_rows) else "redis") == server
    )


def _is_of_postgres(name: str, with_rows: bool) -> bool:
    """Does this fallback serve while PostgreSQL is away? All others serve while Redis is."""
    feature, _, kind = name.partition(".degraded.")
    return kind == "unguarded" or (with_rows and feature == "sessions" and kind not in _WITHOUT_COPIES)


def whoami() -> str:
    return f"{socket.gethostname()}:{os.getpid()} {os.path.basename(sys.argv[0] or 'python')}"


class Noticed:
    """An outage, with what fallbacks had served before it, and what was told of it last."""

    def __init__(self, server: str, note: OutageNote, before: int) -> None:
        self.server = server
        self.note = note
        self.before = before
        self.in_redis: OutageRecord | None = None
        self.in_postgres: OutageRecord | None = None

    def record(self, process: str, served: int, now: float) -> OutageRecord:
        note = self.note
        over = note.is_over(now)
        ended = round((note.ended or now) * 1e6) if over else None
        return OutageRecord(
            process,
            self.server,
            round(note.began * 1e6),
            ended,
            note.kind,
            whoami(),
            max(0, served - self.before),
            round(note.slowest, 6),
            ended if ended is not None else round(now * 1e6),
        )


class OutageLog:
    """Called by the breakers, and read by the account's thread.

    Args:
        wake: there is something to tell.
        now: seconds since 1970.
    """

    def __init__(self, context: Context, wake: Callable[[], None], now: Callable[[], float]) -> None:
        self._counters = context.counters
        self._with_rows = context.postgres is not None
        self._wake = wake
        self._now = now
        self._redis = context.redis
        self._postgres = context.postgres
        self.renew()
        self._is_forked = False
        if context.redis is not None:
            context.redis.on_node(self._watch)
            if context.redis.has_slots:  # of the whole Cluster, until a node has answered
                context.redis.breaker.watchers.append(partial(self._note, "redis"))
        if context.postgres is not None:
            context.postgres.breaker.watchers.append(partial(self._note, "postgres"))

    def renew(self) -> None:
        """For a forked child, which has its parent's open breakers."""
        self._is_forked = True
        self._lock = threading.RLock()  # a signal handler may make calls of its own
        self._open: list[Noticed] = []

    def _watch(self, node: RedisNode) -> None:
        node.breaker.watchers.append(partial(self._note, self._name(node)))

    def _name(self, node: RedisNode) -> str:
        assert self._redis is not None
        address = address_in(self._redis, node)
        return f"redis{AT}{address}" if address else "redis"

    def _breakers(self) -> Iterator[tuple[str, CircuitBreaker]]:
        try:
            for node in () if self._redis is None else self._redis.nodes():
                yield self._name(node), node.breaker
        except BackendError:  # no node of the Cluster is known
            assert self._redis is not None
            yield "redis", self._redis.breaker
        if self._postgres is not None:
            yield "postgres", self._postgres.breaker

    def _note(self, server: str, note: OutageNote) -> None:
        self._add(server, note, self._served(server, self._counters.read()))
        self._wake()

    def _served(self, server: str, counts: dict[str, int]) -> int:
        return served_by_fallbacks(counts, server.partition(AT)[0], with_rows=self._with_rows)

    def _add(self, server: str, note: OutageNote, before: int) -> None:
        with self._lock:
            if all(each.note is not note for each in self._open):
                self._open = [*self._open[1 - _MOST :], Noticed(server, note, before)]

    def has_any(self) -> bool:
        return bool(self._open)

    def records(self, process: str) -> list[tuple[Noticed, OutageRecord]]:
        """All that were not told to the end, as they are now."""
        if self._is_forked:
            self._is_forked = False
            for server, breaker in self._breakers():
                if (outage := breaker.outage) is not None:
                    self._add(server, outage, 0)
        counts, now = self._counters.read(), self._now()
        return [(each, each.record(process, self._served(each.server, counts), now)) for each in self._open]

    def forget(self, done: list[Noticed]) -> None:
        """These were told to the end."""
        with self._lock:
            self._open = [each for each in self._open if each not in done]


def is_news(record: OutageRecord, told: OutageRecord | None) -> bool:
    """Is there reason to tell of it again?"""
    if told is None or record.ended != told.ended:
        return True
    return record.ended is None and record.changed - told.changed >= _REFRESH * 1e6


def joined(records: Iterable[OutageRecord], now: float) -> list[Outage]:
    """One for each time in which processes noticed outages of a server that overlap, oldest first."""
    found: list[Outage] = []
    by_beginning = sorted(records, key=lambda record: (record.server, record.began))
    back = {each.server: 0 for each in by_beginning}
    for each in by_beginning:
        back[each.server] = max(back[each.server], each.ended or 0)
    for each in by_beginning:
        one = _outage(each, now, back[each.server])
        last = found[-1] if found else None
        until = None if last is None else last.ended
        is_another = last is None or (last.server, last.node) != (one.server, one.node)
        if last is None or is_another or (until is not None and one.began > until + _RELAPSE):
            found.append(one)
            continue
        found[-1] = replace(
            last,
            ended=None if until is None or one.ended is None else max(until, one.ended),
            kind="hung" if "hung" in (last.kind, one.kind) else last.kind,
            served=last.served + one.served,
            slowest=max(last.slowest, one.slowest),
        )
    return sorted(found, key=lambda outage: outage.began)


def _outage(record: OutageRecord, now: float, back: int) -> Outage:
    """The outage of a record. `back`: when a process last saw the server come back, in microseconds.

    A process that said nothing since then has ended: a command, say, which somebody gave in the outage.
    """
    ended = record.ended
    if ended is None and (record.changed < back or now - record.changed / 1e6 > SILENT):
        ended = record.changed
    server, _, node = record.server.partition(AT)
    return Outage(
        "redis" if server == "redis" else "postgres",
        instant(record.began),
        None if ended is None else instant(ended),
        record.kind,
        record.noticed_by,
        record.served,
        record.slowest,
        node,
    )


def instant(microseconds: int) -> datetime:
    return datetime.fromtimestamp(microseconds / 1e6, timezone.utc)
