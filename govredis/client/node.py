"""RedisNode: one Redis, or one primary of a Cluster. Runs commands and scripts on it, and says when it is away."""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import redis

from .._fork import notice_fork, renew_in_child
from .._histogram import Histogram
from ..config import Config
from ..errors import BackendError, BackendUnavailable, NotTaken
from ..keys import Keys
from .commands import Arg, Command, Script, pack_command, with_sources
from .distance import Distance
from .mapping import REJECTED, NoScript
from .pending import Pending
from .push import PushStream
from .redis_client import RedisClient
from .round_trips import PING, UNPOOLED, RoundTrips, disconnect
from .wire import ClosedGreeting

log: logging.Logger = logging.getLogger("govredis")

# The timeout is for one exchange, and suits a single command: an exchange of more than this would need longer.
_AT_ONCE = 500
_BYTES_AT_ONCE = 1_000_000

#: Seconds that one `pop` may wait.
LONGEST_POP = 0.25
#: Seconds that one `block` may wait.
LONGEST_BLOCK = 1.0
#: Redis checks `hz` times a second, 10 by default, whether the time of a BLPOP or a WAIT is over.
_TICK = 0.1
#: Seconds that the connection waits which measures how far away Redis is.
_PATIENCE = 5.0


class RedisNode(RoundTrips, RedisClient):
    """The RedisClient of one server, over a pool of its own connections.

    Safe to share between threads, and across fork: a child makes connections of its own. Raises BackendUnavailable when
    Redis is away: refused, timed out, loading, read-only, out of memory ... Raises BackendError when Redis answers with
    another error, or rejects our credentials: a wrong password is a mistake that callers must see, not an outage.

    A reply that nobody asked for (a proxy's fault) costs its connection, and the commands sent over it are sent once
    more. The client notices it when the connection is used again, or when it comes with the reply of another call. A
    stray reply between a command and its reply looks like the right one: that call gets a wrong answer, and the next
    call finds out.

    Args:
        config: redis_url, credential_provider, socket_timeout, connect_timeout, redis_connections.

    Attributes:
        retired: it has left its Cluster, or has no slots any more, and never comes back: another node would.

    Raises ConfigurationError for a parameter in redis_url that redis-py does not take.
    """

    retired: bool = False

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
        return self._round_trip(pack_command(command))

    def run(self, script: Script, keys: Sequence[str], *args: Arg) -> Any:
        try:
            return self._round_trip(pack_command(("EVALSHA", script.sha, str(len(keys)), *keys, *args)))
        except NoScript:
            return self._round_trip(pack_command(("EVAL", script.source, str(len(keys)), *keys, *args)))

    def run_confirmed(self, script: Script, keys: Sequence[str], *args: Arg) -> tuple[Any, bool]:
        wait = pack_command(("WAIT", "1", f"{max(1, (self._timeout - _TICK) * 500):.0f}"))
        for name, text in ("EVALSHA", script.sha), ("EVAL", script.source):
            packed = pack_command((name, text, str(len(keys)), *keys, *args))
            try:
                reply, replicas = self._round_trip(packed + wait, 2, each=True)
            except NoScript:
                continue
            for each in reply, replicas:
                if isinstance(each, BackendError):
                    raise each
            return reply, replicas > 0
        raise AssertionError  # EVAL has the source

    def pop(self, key: str, seconds: float) -> Any:
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

    def block(self, command: Command, seconds: float) -> Any:
        seconds = min(max(seconds, 0.001), LONGEST_BLOCK)  # Redis takes 0 for "ever"
        at = command.index("STREAMS")
        packed = pack_command((*command[:at], "BLOCK", f"{seconds * 1000:.0f}", *command[at:]))
        return self._round_trip(packed, wait=(seconds, seconds + self._timeout), pool=self._blocking)

    # -- as a node -----------------------------------------------------------------------------------------------

    def at(self, key: Arg) -> RedisNode:
        return self

    def nodes(self) -> Sequence[RedisNode]:
        return (self,)

    def on_node(self, seen: Callable[[RedisNode], None]) -> None:
        seen(self)

    def covers(self, key: str) -> bool:
        """Is the key this node's, by what this process knows?"""
        return True

    def tag(self) -> str:
        """A hash tag that puts a key on this node; "" where all keys are."""
        return ""

    def away_for(self, key: str = "") -> float:
        """Seconds since its breaker opened; 0 while it is closed. `key`: as RedisClient has it."""
        return self.breaker.away_for()

    def replay_soon(self, why: str, key: str = "") -> None:
        """Use it no more until its replays have run. `key`: as RedisClient has it."""
        super().replay_soon(why)

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

    def pipelines(self, parts: Sequence[tuple[RedisNode, Sequence[Command]]]) -> list[list[Any]]:
        found: list[list[Any]] = []
        for _, commands in parts:
            try:
                found.append(self.pipeline(commands, each=True))
            except BackendError as error:
                found.append([error.with_traceback(None)] * len(commands))
        return found

    def pipeline(self, commands: Sequence[Command], scripts: Sequence[Script] = (), *, each: bool = False) -> list[Any]:
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

    def fits(self, packed: list[bytes]) -> bool:
        """Are these few enough for one exchange?"""
        return len(packed) <= _AT_ONCE and sum(map(len, packed)) <= _BYTES_AT_ONCE

    def _exchange_many(self, packed: list[bytes], scripts: Sequence[Script], each: bool) -> list[Any]:
        try:
            return self._exchange_packed(packed, each)
        except NoScript:
            return self._with_sources(packed, scripts, each)

    def _with_sources(self, packed: list[bytes], scripts: Sequence[Script], each: bool) -> list[Any]:
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
        pools = self._pools
        inherited = [connection for pool in pools for connection in pool.live]
        for pool in pools:
            pool.renew()
        self._renew_replays()
        self._of_thread = threading.local()
        self.latency: Histogram = Histogram()
        for connection in inherited:
            disconnect(connection)  # redis-py closes the child's descriptor without shutting the parent's socket down

    def close(self) -> None:
        """Close the idle connections and end the probe. The client reconnects if it is used again."""
        notice_fork()
        self.breaker.close()
        self._drop_idle()

    def _drop_idle(self) -> None:
        for pool in self._pools:
            pool.drop_idle()
