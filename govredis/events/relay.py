"""EventRelay: takes the events of committed transactions from PostgreSQL to their streams in Redis.

A transaction's event is a row of the table `govredis_events`. A run of the relay takes the rows that are committed, in
the order of their numbers, adds their events to the stream, and deletes them. Numbers do not commit in order: a row
that commits late is in a later run, whatever its number is.

Any process may run it, and die between any two steps:

1. In a transaction of PostgreSQL, one relay of a stream at a time: read the stream's state in Redis, with the token of
   the last run and the ids that it published.
2. If rows of these ids are there, that run has died, or its commit was lost. They are in the stream: delete them,
   commit, and begin again.
3. Read rows. One script adds their events to the stream and writes a new token and their ids, if the token is still the
   one that was read.
4. Delete the rows, and commit.

So a row is published once, unless Redis loses the state and not the stream. PostgreSQL ends the transaction of a relay
that stopped in step 3, and another may run meanwhile: then the token has changed, and the late script does nothing.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from .._context import Context
from .._daemon import start_daemon
from .._exit import write_at_exit
from .._fork import notice_fork, renew_in_child
from .._migrations import PINNED
from .._uncopied import Uncopied
from ..client import RedisClient, RedisNode, Script
from ..errors import BackendError, BackendUnavailable, ConfigurationError
from ..keys import sibling

if TYPE_CHECKING:
    from ..postgres import Postgres

log: logging.Logger = logging.getLogger("govredis")

#: Events of one run, and bytes of their payloads, at most.
_AT_ONCE = 100
_BYTES_AT_ONCE = 500_000
#: Milliseconds for which a stream is kept after its last event: 30 days.
KEPT_MS = "2592000000"
#: Seconds before each try after an event was published in a transaction: it commits at some time.
_DELAYS = 0.1, 0.2, 0.4, 0.8, 1.6, 3.2
#: Seconds between two runs for readers.
_FOR_READERS = 1.0

# A loose index scan: there may be many rows while Redis is away, and there are few streams.
_STREAMS = """
WITH RECURSIVE found (stream) AS (
    (SELECT stream FROM @schema@.govredis_events ORDER BY stream LIMIT 1)
    UNION ALL
    SELECT (SELECT e.stream FROM @schema@.govredis_events e WHERE e.stream > f.stream ORDER BY e.stream LIMIT 1)
    FROM found f WHERE f.stream IS NOT NULL
)
SELECT stream FROM found WHERE stream IS NOT NULL AND @schema@.govredis_is_of(stream, %s::text)
"""
_LOCK = f"""{PINNED}
SELECT pg_try_advisory_xact_lock(hashtextextended(%s, 0)),
       set_config('idle_in_transaction_session_timeout', %s, true)
"""
_READ = f"""
SELECT id::text, topic, entity, (extract(epoch FROM at) * 1000000)::bigint::text, payload
FROM @schema@.govredis_events WHERE stream = %s ORDER BY number LIMIT {_AT_ONCE}
"""
_DELETE = "DELETE FROM @schema@.govredis_events WHERE id = ANY (%s::uuid[]) RETURNING 1"


class EventRelay(Uncopied):
    """The relay of one Redis, PostgreSQL and key prefix, and the thread that runs it for this process.

    Args:
        sleep: makes the thread wait.
    """

    def __init__(
        self, context: Context, redis: RedisClient, postgres: Postgres, sleep: Callable[[float], None] | None = None
    ) -> None:
        self._keys = context.keys
        self._redis = redis
        self._postgres = postgres
        self._counters = context.counters
        self._kept = str(context.config.events_kept)
        #: After this time PostgreSQL ends the transaction of a relay that stopped within it.
        self._patience_ms = str(int(context.config.postgres_timeout * 1000) + 1)
        self._relay = Script(__package__, "append.lua", "relay.lua")
        self._sleep = sleep or time.sleep  # looked up now: gevent may have replaced it
        self._is_used = self._is_closed = False
        self._has_failed = False
        self.renew_after_fork()
        renew_in_child(self)
        write_at_exit(self)
        redis.on_recovery(self._when_back)

    def renew_after_fork(self) -> None:
        self._thread: threading.Thread | None = None
        #: How often the thread still runs the relay.
        self._tries = 0
        self._for_readers_at = 0.0

    # -- in the background ---------------------------------------------------------------------------------------

    def soon(self) -> None:
        """An event was published in a transaction that is going to commit: run now and then, for some seconds."""
        self._ask(len(_DELAYS))

    def for_readers(self) -> None:
        """Somebody waits for events: run once a second."""
        now = time.monotonic()
        if now >= self._for_readers_at:
            self._for_readers_at = now + _FOR_READERS
            self._ask(1)

    def close(self) -> None:
        """Run once more where something was published. The thread ends, and wakes no client that was closed."""
        self._is_closed = True
        if self._tries:
            self._tries = 0
            self.run_quietly()

    def has_pending(self) -> bool:
        return self._tries > 0

    def write_pending(self) -> None:
        self.run_quietly()

    def _ask(self, tries: int) -> None:
        self._is_used, self._is_closed = True, False
        self._tries = max(self._tries, tries)
        thread = self._thread
        if thread is None or not thread.is_alive():
            self._thread = start_daemon("govredis-events", self._run_soon)

    def _run_soon(self) -> None:
        while self._tries > 0:
            delay = _DELAYS[max(0, len(_DELAYS) - self._tries)] if self._tries > 1 else _DELAYS[0]
            self._tries -= 1
            self._sleep(delay)
            if self._is_closed:
                return
            self.run_quietly()
            if not self._tries:
                self._thread = None  # before the last look at the tries: `_ask` starts another from now on

    def run_quietly(self) -> None:
        """Run, if that is possible now. A mistake is logged, once."""
        try:
            self.run()
            self._has_failed = False
        except BackendUnavailable:
            pass  # the rows wait
        except (BackendError, ConfigurationError) as error:
            if not self._has_failed:
                log.error("events of transactions cannot be published, and wait in PostgreSQL: %s", error)
            self._has_failed = True

    def _when_back(self, _: RedisNode) -> None:
        # Redis is used again once all replays have run, some time after this one. So a single try could come too early.
        if self._is_used and not self._is_closed:
            self._ask(len(_DELAYS))

    # -- a run ---------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Publish what is committed. Returns how many events; another relay may be publishing others.

        A stream that Redis refuses, or whose node of a Cluster is away, holds up no other. Its error is raised at the
        end.

        Raises BackendUnavailable, BackendError, and ConfigurationError naming `govredis migrate`.
        """
        notice_fork()
        self._check()
        published, refused, away = 0, None, None
        for (stream,) in self._postgres.fetch(_STREAMS, (self._keys.prefix,)):
            try:
                published += self._run_stream(stream)
            except BackendUnavailable as error:
                away = error
            except BackendError as error:
                refused = error
        if failed := refused or away:
            raise failed
        return published

    def _check(self) -> None:
        """Is there a node to publish to? Else PostgreSQL is not asked. Raises BackendUnavailable, Rejected."""
        failed: BackendError | None = None
        for node in self._redis.nodes():
            try:
                node.breaker.check()
            except BackendError as error:
                failed = error
            else:
                return
        if failed is not None:
            raise failed

    def _run_stream(self, stream: str) -> int:
        key = self._keys.events(self._keys.id_of(stream))
        state = sibling(key, "state")
        published = 0
        while True:
            self._redis.at(key).breaker.check()  # before a transaction begins
            with self._postgres.transaction() as tx:
                if not tx.fetch(_LOCK, (f"govredis events {key}", self._patience_ms))[0][0]:
                    return published
                token, told = self._redis.call("HMGET", state, "run", "told")
                if told and tx.fetch(_DELETE, (told.decode().split(),)):
                    continue
                events = _within_bounds(tx.fetch(_READ, (stream,)))
                if not events:
                    return published
                ids = [identity for identity, *_ in events]
                words = [
                    word for identity, topic, entity, at, text in events for word in (topic, identity, entity, at, text)
                ]
                if not self._redis.run(
                    self._relay,
                    (key, state),
                    *(self._kept, KEPT_MS, token or "", secrets.token_hex(8), " ".join(ids), *words),
                ):
                    return published
                tx.fetch(_DELETE, (ids,))
            published += len(events)
            self._counters.add("events.relayed", len(events))


def _within_bounds(events: list[tuple[str, str, str, str, str]]) -> list[tuple[str, str, str, str, str]]:
    """The first of these events, one at least, that are sent at once."""
    size = 0
    for n, event in enumerate(events):
        size += len(event[-1])
        if n and size > _BYTES_AT_ONCE:
            return events[:n]
    return events
