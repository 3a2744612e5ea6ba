"""The heartbeat: beat publishes it, a worker runs it, and health warns when it stops."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .._context import Context
from ..client import Command
from ..errors import BackendError, BackendUnavailable, ConfigurationError, check_ttl, printable
from . import deadlines
from .report import Check

#: So many heartbeats in a row that did not come, or that no worker ran, are worth a warning.
MISSED = 2
_SHOWN = 80


@dataclass(frozen=True, slots=True)
class _LastHeartbeat:
    """The last heartbeat: its age, and the time from one heartbeat to the next, in seconds."""

    age: float
    every: float

    @property
    def missed(self) -> bool:
        return self.age > self.every * MISSED


@dataclass(frozen=True, slots=True)
class _Unread:
    """Heartbeats in a row that beat has published, the last of them `published`, and that no worker has run."""

    count: int
    queue: str
    published: _LastHeartbeat


class Heartbeat:
    """Notes heartbeats in Redis, and in PostgreSQL too, so that a Redis that loses its data hides no dead beat.

    Without PostgreSQL, each process remembers the last heartbeat that it has seen. After a loss of data it may warn
    wrongly until the next heartbeat, if it has not looked for two intervals.

    Args:
        clock: seconds, monotonic.
    """

    name = "beat"

    def __init__(self, context: Context, clock: Callable[[], float] = time.monotonic) -> None:
        self._key, self._unread = context.keys.heartbeat(), context.keys.unread_heartbeats()
        self._redis = context.redis
        self._postgres = context.postgres
        self._counters = context.counters
        self._clock = clock
        self._seen_at: tuple[float, float] | None = None
        #: `check` takes the replies to these.
        self.commands: tuple[Command, ...] = (
            ("GET", self._key),
            ("PTTL", self._key),
            ("HGETALL", self._unread),
            ("PTTL", self._unread),
        )

    def note(self, every: float) -> bool:
        """A worker runs a heartbeat. Returns whether it was noted anywhere. Raises BackendError of Redis."""
        check_ttl(every, "every")
        noted = False
        if self._redis is not None:
            heartbeat: Command = ("SET", self._key, f"{every:g}", "PX", _kept_ms(every))
            try:
                replies = self._redis.pipeline((heartbeat, ("DEL", self._unread)), each=True)
            except BackendUnavailable as error:
                replies = [error]
            noted = not isinstance(replies[0], BackendError)
            for reply in replies:
                if isinstance(reply, BackendUnavailable):
                    self._counters.add("health.degraded.heartbeats")
                elif isinstance(reply, BackendError):
                    raise reply
        if self._postgres is not None:
            try:
                self._postgres.fetch(
                    "WITH old AS (DELETE FROM @schema@.govredis_health_snapshots WHERE key = %s)"
                    " INSERT INTO @schema@.govredis_health_snapshots (key, at, report) VALUES (%s, now(), %s::jsonb)"
                    " ON CONFLICT DO NOTHING",
                    (self._key, self._key, json.dumps({"every": every})),
                )
                noted = True
            except (BackendError, ConfigurationError):
                self._counters.add("health.degraded.heartbeats")
        return noted

    def note_published(self, every: float, queue: str) -> int:
        """Beat has published a heartbeat to this queue. Returns how many in a row no worker has run; 0 if unknown.

        Raises nothing for a Redis that is away, or refuses.
        """
        if self._redis is None:
            return 0
        try:
            unread, *_ = self._redis.pipeline(
                (
                    ("HINCRBY", self._unread, "count", "1"),
                    ("HSET", self._unread, "every", f"{check_ttl(every, 'every'):g}", "queue", queue),
                    ("PEXPIRE", self._unread, _kept_ms(every)),
                )
            )
        except BackendError:
            self._counters.add("health.degraded.heartbeats")
            return 0
        return int(unread)

    def check(self, replies: Sequence[Any]) -> list[Check]:
        """The check "beat"; [] if there never was a heartbeat.

        Args:
            replies: to `commands`; [] where Redis is away.
        """
        seen, unread = None, None
        if replies:
            refused = next((reply for reply in replies if isinstance(reply, BackendError)), None)
            if refused is not None:
                return [Check("beat", "warn", f"the heartbeat cannot be read: {refused}", {})]
            every, left_ms, published, published_left_ms = replies
            try:
                seen = None if every is None else _seen(every, left_ms)
                unread = _unread(published, published_left_ms) if published else None
            except ValueError:
                held = every if every is not None else published
                return [
                    Check("beat", "warn", f"the heartbeat is {repr(held)[:_SHOWN]}, which govredis has not written", {})
                ]
            if seen is not None:
                self._seen_at = self._clock() - seen.age, seen.every
        if seen is None:
            seen = self._remembered(here=bool(replies))
        if unread is not None and unread.count >= MISSED and not unread.published.missed:
            output = (
                f"beat is alive, and no worker has run the last {unread.count} heartbeats, which went to the queue"
                f" {printable(unread.queue)!r}: have a worker read it (-Q), or name another queue in govredis_queue"
            )
            return [Check("beat", "warn", output, {"unread": unread.count, "every": unread.published.every})]
        if seen is None and unread is not None:
            seen = unread.published
        if seen is None:
            return []
        data = {"seconds_since": round(seen.age, 3), "every": seen.every}
        if seen.missed:
            return [
                Check("beat", "warn", f"no heartbeat for {seen.age:.0f} s: beat is gone, or every worker", data),
            ]
        return [Check("beat", "pass", "", data)]

    def _remembered(self, *, here: bool) -> _LastHeartbeat | None:
        """The last heartbeat that PostgreSQL knows, or this process, which remembers while Redis can be asked."""
        found = []
        if here and self._seen_at is not None:
            at, every = self._seen_at
            found.append(_LastHeartbeat(self._clock() - at, every))
        if self._postgres is not None:
            try:
                rows = self._postgres.fetch(
                    "SELECT (report->>'every')::float8, extract(epoch FROM clock_timestamp() - at)::float8"
                    " FROM @schema@.govredis_health_snapshots WHERE key = %s ORDER BY at DESC LIMIT 1",
                    (self._key,),
                    timeout=deadlines.POSTGRES,
                )
                found += [_LastHeartbeat(age, every) for every, age in rows]
            except (BackendError, ConfigurationError):
                pass  # the check of PostgreSQL says so
        last = min(found, key=lambda seen: seen.age, default=None)
        return None if last is None or last.age > _kept(last.every) else last


def _seen(every: bytes, left_ms: int) -> _LastHeartbeat:
    """Raises ValueError for a value that govredis cannot have written."""
    seconds = check_ttl(float(every), "every")
    age = _kept(seconds) - left_ms / 1000
    if age < 0:
        raise ValueError(age)
    return _LastHeartbeat(age, seconds)


def _unread(fields: list[bytes], left_ms: int) -> _Unread:
    held = dict(zip(fields[::2], fields[1::2], strict=True))
    if not {b"count", b"every", b"queue"} <= held.keys():
        raise ValueError(held)
    return _Unread(int(held[b"count"]), held[b"queue"].decode(errors="replace"), _seen(held[b"every"], left_ms))


def _kept(every: float) -> float:
    """Seconds that a heartbeat, and the warning of its end, are kept. Its age is this less the key's remaining TTL."""
    return max(86_400.0, 10 * every)


def _kept_ms(every: float) -> str:
    return f"{_kept(every) * 1000:.0f}"
