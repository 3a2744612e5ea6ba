"""RedisClient: runs commands and scripts on Redis, one round trip each, and says when Redis is away.

Every command must be harmless the second time. If its pooled connection turns out dead, it is sent once more on a new
connection, and its reply may be that of a second arrival. A command that timed out is never sent again.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

import redis

from .._fork import notice_fork, renew_in_child
from ..config import Config
from ..errors import BackendUnavailable, NotTaken
from ..keys import Keys
from .commands import Arg, Command, Script, pack_command, with_sources
from .distance import Distance
from .mapping import REJECTED, NoScript
from .pending import Pending
from .push import PushStream
from .round_trips import PING, UNPOOLED, RoundTrips, disconnect
from .wire import ClosedGreeting

log: logging.Logger = logging.getLogger("govredis")

# The timeout is for one exchange, and suits a single command: an exchange of more than this would need longer.
_AT_ONCE = 500
_BYTES_AT_ONCE = 1_000_000

#: Seconds that one `pop` may wait.
LONGEST_POP = 0.25
#: Redis checks `hz` times a second, 10 by default, whether a BLPOP's time is over.
_TICK = 0.1
#: Seconds that the connection waits which measures how far away Redis is.
_PATIENCE = 5.0


class RedisClient(RoundTrips):
    """Commands and scripts on one Redis, over a pool of its own connections.

    Safe to share between threads, and across fork: a child makes connections of its own. Raises BackendUnavailable when
    Redis is away: refused, timed out, loading, read-only, out of memory ... Raises BackendError when Redis answers with
    another error, or rejects our credentials: a wrong password is a mistake that callers must see, not an outage.

    A reply that nobody asked for (a proxy's fault) costs its connection, and the commands sent over it are sent once
    more. The client notices it when the connection is used again, or when it comes with the reply of another call. A
    stray reply between a command and its reply looks like the right one: that call gets a wrong answer, and the next
    call finds out.

    Args:
        config: redis_url, credential_provider, socket_timeout, connect_timeout, redis_connections.

    Raises ConfigurationError for a parameter in redis_url that redis-py does not take.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        # The script of the probe reads and writes nothing; a proxy routes it by its key.
        self._question = pack_command(("EVAL", "return 1", "1", Keys(config.key_prefix).probe()))
        #: Why BLPOP cannot be used here; "" as far as is known.
        self._pop_not_taken = ""
        timeouts = {
            "GOVREDIS_CONNECT_TIMEOUT": self._options["socket_connect_timeout"],
            "GOVREDIS_SOCKET_TIMEOUT": self._timeout,
        }
        self.distance: Distance = Distance(self.name, timeouts, self._measure)
        renew_in_child(self)

    # -- calls ---------------------------------------------------------------------------------------------------

    def call(self, *command: Arg) -> Any:
        """Run one command. Returns its reply: bytes, int, list or None.

        Raises BackendUnavailable, BackendError.
        """
        return self._round_trip(pack_command(command))

    def run(self, script: Script, keys: Sequence[str], *args: Arg) -> Any:
        """Run a script whose keys share a Cluster slot. Returns its reply.

        Takes a round trip, and another after a SCRIPT FLUSH or a restart. Raises BackendUnavailable, BackendError.
        """
        try:
            return self._round_trip(pack_command(("EVALSHA", script.sha, str(len(keys)), *keys, *args)))
        except NoScript:
            return self._round_trip(pack_command(("EVAL", script.source, str(len(keys)), *keys, *args)))

    def pop(self, key: str, seconds: float) -> Any:
        """Take the first element of a list as soon as it has any: BLPOP, on a connection of its own.

        Args:
            key: of the list.
            seconds: to wait, LONGEST_POP at most; as long for a connection first, where all of them wait.

        Returns None if no element came; a Redis that hangs looks the same. Raises BackendUnavailable, BackendError.
        Raises NotTaken where a proxy does not take BLPOP, from then on at once. An element whose reply is lost with its
        connection is gone.
        """
        if self._pop_not_taken:
            raise NotTaken(self._pop_not_taken)
        if seconds < LONGEST_POP:
            # No longer: a late server costs the connection. Redis 6 takes 0.001 and 0 for "ever".
            asked = patience = max(seconds, 0.002)
        else:
            seconds, asked, patience = LONGEST_POP, LONGEST_POP - _TICK, LONGEST_POP + _TICK
        try:
            reply = self._round_trip(pack_command(("BLPOP", key, f"{asked:.3f}")), wait=(seconds, patience))
        except NotTaken as error:
            self._pop_not_taken = str(error)
            raise
        return None if reply is None else reply[1]

    def send(self, packed: bytes) -> Pending:
        """Send one command that `pack_command` has packed; its reply is taken later.

        Uses the connections that `pop` waits on, the last one first. Raises BackendUnavailable.
        """
        notice_fork()
        breaker = self.breaker
        if not breaker.closed:
            self._check()
        period = breaker.period
        connection = self._waiting.take(self._timeout)
        if connection._sock is not None and connection.unread():
            connection = self._another(self._waiting, connection, self._timeout)
        try:
            if connection._sock is None:
                self._open(connection)
            connection.send_packed_command((packed,), False)
        except BaseException as error:
            self._waiting.drop(connection)
            if isinstance(error, redis.RedisError):
                raise self._failed(error, period) from error
            raise
        return Pending(self, connection, period)

    def push_stream(self) -> PushStream:
        """A RESP3 connection of the caller's own, who must close it.

        Raises BackendUnavailable, BackendError.
        """
        notice_fork()
        breaker = self.breaker
        if not breaker.closed:
            breaker.check()
        period = breaker.period
        connection = self._connection_class(**{**self._options, "protocol": 3})
        try:
            connection.connect()
        except redis.ResponseError as error:
            raise self._errors.of_reply(error) from error
        except ClosedGreeting as error:
            raise self._of_greeting(error, period) from error
        except redis.RedisError as error:
            raise self._failed(error, period) from error
        close = functools.partial(disconnect, connection)
        return PushStream(self.name, connection._sock, close, self._secrets.hide, self._pattern)

    def pipeline(self, commands: Sequence[Command], scripts: Sequence[Script] = (), *, each: bool = False) -> list[Any]:
        """Run several commands, in order, in one round trip for each 500 or MB. Others may come between.

        Args:
            commands: each a tuple; a script's is `script.call(keys, args)`.
            scripts: the scripts among them. If the server does not know one, all commands are sent once more, with the
                sources: some proxies do not take SCRIPT LOAD.
            each: a command fails alone: its BackendError stands in the place of its reply.

        Returns the replies in order. Raises BackendUnavailable; without `each`, the BackendError of the first command
        that failed.
        """
        replies: list[Any] = []
        pending: list[bytes] = []
        size = 0
        for command in commands:
            pending.append(pack_command(command))
            size += len(pending[-1])
            if len(pending) == _AT_ONCE or size > _BYTES_AT_ONCE:
                replies += self._exchange_many(pending, scripts, each)
                pending, size = [], 0
        if pending:
            replies += self._exchange_many(pending, scripts, each)
        return replies

    def _exchange_many(self, packed: list[bytes], scripts: Sequence[Script], each: bool) -> list[Any]:
        try:
            return self._exchange_packed(packed, each)
        except NoScript:
            pass
        # A source once is enough for one server. Behind a proxy there are several, and each must get it.
        try:
            return self._exchange_packed(with_sources(packed, scripts, always=False), each)
        except NoScript:
            return self._exchange_packed(with_sources(packed, scripts, always=True), each)

    def _exchange_packed(self, packed: list[bytes], each: bool) -> list[Any]:
        replies: list[Any] = self._round_trip(b"".join(packed), len(packed), each=each)
        return replies

    # -- recovery ------------------------------------------------------------------------------------------------

    def _probe(self) -> None:
        connection = self._ask_again()
        self._drop_idle()
        if connection is not None:
            # Near maxclients, another client might take its place before the first caller connects.
            self._pool.adopt(connection)
        self.distance.forget()
        self._pop_not_taken = ""
        self._replay()

    def _ask_again(self) -> Any | None:
        """A connection over which Redis can be used again; None where Redis answers, and refuses the question.

        The question is a script, as in real calls: a Redis that pauses writes answers PING, and would be let in for one
        call each time. It has the timeouts of every call: longer ones would let in a Redis that is too slow for calls.
        """
        connection, is_kept = self._connect(), False
        try:
            self._open(connection)
            connection.send_packed_command((self._question,), False)
            connection.read_response()
            is_kept = True
            return connection
        except REJECTED:
            return None  # Redis is back, and callers must see the wrong credentials
        except redis.ResponseError as error:
            if isinstance(self._errors.of_reply(error), BackendUnavailable):
                raise BackendUnavailable(self._errors.said(error)) from error
            return None
        except redis.RedisError as error:
            if isinstance(error, redis.TimeoutError):
                self.distance.ask_soon()
            raise BackendUnavailable(self._errors.said(error)) from error
        finally:
            if not is_kept:
                disconnect(connection)

    def _measure(self) -> float:
        """Seconds of a round trip, however long, up to `_PATIENCE`."""
        connection = self._connection_class(
            **{**self._options, "socket_timeout": _PATIENCE, "socket_connect_timeout": _PATIENCE}
        )
        try:
            seconds = []
            for _ in range(3):  # the first may have waited for a Redis that hung
                began = time.monotonic()
                self._exchange(UNPOOLED, connection, PING, 0)
                seconds.append(time.monotonic() - began)
            return min(seconds)
        finally:
            disconnect(connection)

    # -- life ----------------------------------------------------------------------------------------------------

    def renew_after_fork(self) -> None:
        inherited = [*self._pool.live, *self._waiting.live]
        self._pool.renew()
        self._waiting.renew()
        self._renew_replays()
        self._of_thread = threading.local()
        for connection in inherited:
            disconnect(connection)  # redis-py closes the child's descriptor without shutting the parent's socket down

    def close(self) -> None:
        """Close the idle connections and end the probe. The client reconnects if it is used again."""
        notice_fork()
        self.breaker.close()
        self._drop_idle()

    def _drop_idle(self) -> None:
        self._pool.drop_idle()
        self._waiting.drop_idle()
