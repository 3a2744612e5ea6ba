"""RedisClient: runs commands and scripts on Redis, one round trip each, and says when Redis is away.

The only module that catches redis-py's exceptions. Everything it sends must be harmless the second time: a command
whose pooled connection turned out dead is sent once more on a new one, whose answer is then that of a second arrival.
What timed out is never sent again.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import itertools
import logging
import re
import threading
from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import Any, TypeAlias

import hiredis
import redis
from redis.backoff import NoBackoff
from redis.connection import AbstractConnection, Connection, parse_url
from redis.retry import Retry

from ._fork import renew_in_child
from ._pool import Pool
from ._push import PushStream
from .breaker import CircuitBreaker, Rejected
from .config import Config, redact
from .errors import BackendError, BackendUnavailable, ConfigurationError

log = logging.getLogger("govredis")

# No numbers: where a signal handler raises just while hiredis (3.5) makes one text, the process ends with a
# segmentation fault.
Arg: TypeAlias = str | bytes
Command: TypeAlias = tuple[Arg, ...]

# Its stub says a tuple of one.
pack_command: Callable[[Command], bytes] = hiredis.pack_command  # type: ignore[assignment]

# Answers of a server that is up but cannot serve now. Redis 6.2 wraps what a script's own commands answered in
# "ERR Error running script ... -READONLY ..."; 7.0 and newer pass it through.
_CANNOT_SERVE_NOW = re.compile(
    r"(?:^|[\s@:-])(LOADING|READONLY|MISCONF|OOM|CLUSTERDOWN|MASTERDOWN|TRYAGAIN|NOREPLICAS|BUSY|UNBLOCKED) "
)
# redis-py takes the word off the text of those that it knows.
_CANNOT_SERVE_CLASSES = (
    redis.exceptions.ReadOnlyError,
    redis.exceptions.OutOfMemoryError,
    redis.exceptions.ClusterDownError,  # MasterDownError is one
    redis.exceptions.TryAgainError,
)

_REJECTED = (redis.exceptions.AuthenticationError, redis.exceptions.AuthorizationError)

# redis-py spends two round trips on CLIENT SETINFO at every connect unless told not to; 7.x renamed how.
_NO_SETINFO = (
    {"driver_info": None}
    if "driver_info" in inspect.signature(AbstractConnection.__init__).parameters
    else {"lib_name": None, "lib_version": None}
)


# A deadline is for one exchange: more than this in one would need longer than any that suits a single command.
_AT_ONCE = 500
_BYTES_AT_ONCE = 1_000_000

#: Seconds that one `pop` may wait.
LONGEST_POP = 0.25
#: Redis looks `hz` times a second, 10 by default, whether a BLPOP's time is over.
_TICK = 0.1


class Script:
    """A Lua script that lies beside the Python that runs it.

    Args:
        package: the package whose folder holds it.
        filenames: the .lua files that make it up, in order.
    """

    __slots__ = ("sha", "source")

    def __init__(self, package: str, *filenames: str) -> None:
        parts = [files(package).joinpath(filename).read_text(encoding="utf-8") for filename in filenames]
        self.source = "\n".join(parts)
        self.sha = hashlib.sha1(self.source.encode(), usedforsecurity=False).hexdigest()

    def call(self, keys: Sequence[str], args: Sequence[Arg]) -> Command:
        """The EVALSHA command."""
        return ("EVALSHA", self.sha, str(len(keys)), *keys, *args)


class RedisClient:
    """Commands and scripts on one Redis, over a pool of its own connections.

    Safe to share between threads, and across fork: a child makes connections of its own. Raises BackendUnavailable
    when Redis is away (refused, timed out, loading, read-only, out of memory ...) and BackendError when it answered
    with another error, rejected credentials among them: a wrong password is a mistake to be seen, not an outage.

    Args:
        config: redis_url, socket_timeout, connect_timeout, redis_connections.

    Raises ConfigurationError for a parameter in redis_url that redis-py does not take.
    """

    def __init__(self, config: Config) -> None:
        self._timeout = config.socket_timeout
        self._options = self._connection_options(config)
        self._connection_class: type[Any] = self._options.pop("connection_class", Connection)
        self.name = f"Redis at {_address(self._options)}"
        try:
            self._connect()
        except (TypeError, ValueError, redis.RedisError) as error:
            raise _wrong_url(config.redis_url, error) from None
        self._pool: Pool[Any] = Pool(lambda _: self._connect(), _disconnect, config.redis_connections, self.name)
        # Of their own: those that wait must not keep the others from working.
        self._waiting: Pool[Any] = Pool(lambda _: self._connect(), _disconnect, config.redis_connections, self.name)
        self.breaker = CircuitBreaker(self.name, self._probe)
        self._recoveries: list[Callable[[RedisClient], None]] = []
        self._direct = threading.local()
        #: Another number after each connect, and before anything that came over the new connection is returned. A
        #: server that was restarted, or another one in its place, is reached over new connections only.
        self.connects = 0
        self._connects = itertools.count(1)
        renew_in_child(self)

    @staticmethod
    def _connection_options(config: Config) -> dict[str, Any]:
        return {
            **_parse_url(config.redis_url),
            "socket_timeout": config.socket_timeout,
            "socket_connect_timeout": config.connect_timeout,
            # No retries inside redis-py: whether a second try is safe is known here, not there.
            "retry": Retry(NoBackoff(), 0),
            "health_check_interval": 0,
            "protocol": 2,
            "decode_responses": False,
            **_NO_SETINFO,
        }

    # -- calls ---------------------------------------------------------------------------------------------------

    def call(self, *command: Arg) -> Any:
        """Run one command. Returns its reply: bytes, int, list or None.

        Raises BackendUnavailable, BackendError.
        """
        return self._round_trip(pack_command(command))

    def run(self, script: Script, keys: Sequence[str], *args: Arg) -> Any:
        """Run a script whose keys share a Cluster slot. Returns its reply.

        One round trip; one more after a SCRIPT FLUSH or a restart. Raises BackendUnavailable, BackendError.
        """
        try:
            return self._round_trip(pack_command(("EVALSHA", script.sha, str(len(keys)), *keys, *args)))
        except _NoScript:
            return self._round_trip(pack_command(("EVAL", script.source, str(len(keys)), *keys, *args)))

    def resends(self) -> int:
        """How many commands of this thread were sent a second time: one that was may have been carried out twice."""
        count: int = getattr(self._direct, "resends", 0)
        return count

    def pop(self, key: str, seconds: float) -> Any:
        """The first element of a list, once there is one: BLPOP, on a connection of its own.

        Args:
            key: of the list.
            seconds: to wait, LONGEST_POP at most; so long for a connection first, where all of them wait.

        Returns None where none came, also from a Redis that hangs: nobody can tell that from a wait. Raises
        BackendUnavailable, BackendError. An element whose reply is lost with its connection is gone.
        """
        if seconds < LONGEST_POP:
            # To the point. Where the server is late, it costs the connection. Redis 6 takes 0.001, and 0, for "ever".
            asked = patience = max(seconds, 0.002)
        else:
            seconds, asked, patience = LONGEST_POP, LONGEST_POP - _TICK, LONGEST_POP + _TICK
        reply = self._round_trip(pack_command(("BLPOP", key, f"{asked:.3f}")), wait=(seconds, patience))
        return None if reply is None else reply[1]

    def send(self, packed: bytes) -> Pending:
        """Send what `pack_command` made of one command, and take its reply later.

        Over a connection of those that wait in `pop`, the last one first. Raises BackendUnavailable.
        """
        breaker = self.breaker
        if not breaker.closed:
            self._check_breaker()
        generation = breaker.generation
        connection = self._waiting.take(self._timeout)
        try:
            connection.send_packed_command((packed,), False)
        except BaseException as error:
            self._waiting.drop(connection)
            if isinstance(error, redis.RedisError):
                raise self._unavailable(error, generation) from error
            raise
        return Pending(self, connection, generation)

    def push_stream(self) -> PushStream:
        """A connection of the caller's own, to close, that speaks RESP3.

        Raises BackendUnavailable, BackendError.
        """
        breaker = self.breaker
        if not breaker.closed:
            breaker.check()
        generation = breaker.generation
        connection = self._connection_class(**{**self._options, "protocol": 3})
        try:
            connection.connect()
        except redis.ResponseError as error:
            raise self._refused(error) from error
        except redis.RedisError as error:
            raise self._unavailable(error, generation) from error
        return PushStream(self.name, connection._sock, functools.partial(_disconnect, connection))

    def pipeline(self, commands: Sequence[Command], scripts: Sequence[Script] = ()) -> list[Any]:
        """Run several commands, in order, in one round trip for each 500 or MB. Others may come between.

        Args:
            commands: each a tuple; a script's is `script.call(keys, args)`.
            scripts: those among them; loaded, and all commands sent once more, where the server did not know one.

        Returns the replies in order. Raises BackendUnavailable, or the BackendError of the first that failed.
        """
        replies: list[Any] = []
        pending: list[bytes] = []
        size = 0
        for command in commands:
            pending.append(pack_command(command))
            size += len(pending[-1])
            if len(pending) == _AT_ONCE or size > _BYTES_AT_ONCE:
                replies += self._exchange_many(pending, scripts)
                pending, size = [], 0
        if pending:
            replies += self._exchange_many(pending, scripts)
        return replies

    def transaction(self, commands: Sequence[Command], scripts: Sequence[Script] = ()) -> list[Any]:
        """Run several commands as one step (MULTI), in one round trip: nobody sees, and no loss of data leaves, a part.

        Where one fails, those after it are carried out all the same.

        Args:
            commands: as of `pipeline`; few enough for one deadline.
            scripts: those among them; loaded, and all commands sent once more, where the server did not know one.

        Returns the replies in order. Raises BackendUnavailable, or the BackendError of the first that failed.
        """
        packed = [pack_command(command) for command in (("MULTI",), *commands, ("EXEC",))]
        try:
            return self._exchange_transaction(packed)
        except _NoScript:
            self.pipeline([("SCRIPT", "LOAD", script.source) for script in scripts])
            return self._exchange_transaction(packed)

    def _exchange_transaction(self, packed: list[bytes]) -> list[Any]:
        replies: list[Any] = self._round_trip(b"".join(packed), len(packed))[-1]
        for reply in replies:
            if isinstance(reply, redis.ResponseError):
                raise self._refused(reply) from reply
        return replies

    def _exchange_many(self, packed: list[bytes], scripts: Sequence[Script]) -> list[Any]:
        try:
            found: list[Any] = self._round_trip(b"".join(packed), len(packed))
            return found
        except _NoScript:
            loads = [pack_command(("SCRIPT", "LOAD", s.source)) for s in scripts]
            replies: list[Any] = self._round_trip(b"".join(loads + packed), len(loads) + len(packed))
            return replies[len(loads) :]

    def _round_trip(self, packed: bytes, replies: int = 0, wait: tuple[float, float] | None = None) -> Any:
        breaker = self.breaker
        if not breaker.closed:
            self._check_breaker()
        generation = breaker.generation
        if wait is None:
            pool, for_place, patience = self._pool, self._timeout, None
        else:
            pool, (for_place, patience) = self._waiting, wait
        connection = pool.take(for_place)
        pooled = connection._sock is not None
        try:
            return self._exchange(pool, connection, packed, replies, patience)
        except redis.ConnectionError as error:
            if not pooled or _answered(error):
                raise self._unavailable(error, generation) from error
        except redis.RedisError as error:
            if patience is not None and isinstance(error, redis.TimeoutError):
                return None
            raise self._unavailable(error, generation) from error
        # The connection had idled while its server went away or was restarted. So have the others.
        pool.drop_idle()
        self._direct.resends = self.resends() + 1
        if not breaker.closed:
            self._check_breaker()
        connection = pool.take(for_place)
        try:
            return self._exchange(pool, connection, packed, replies, patience)
        except redis.RedisError as error:
            if patience is not None and isinstance(error, redis.TimeoutError):
                return None
            raise self._unavailable(error, generation) from error

    def _check_breaker(self) -> None:
        """Raise BackendUnavailable if the breaker is open, but not for a replay, which runs before it closes."""
        if not getattr(self._direct, "open", False):
            self.breaker.check()

    def _exchange(
        self, pool: Pool[Any], connection: Any, packed: bytes, replies: int, patience: float | None = None
    ) -> Any:
        try:
            if packed:  # else it was sent before
                if connection._sock is None:
                    connection.connect()
                    self.connects = next(self._connects)
                connection.send_packed_command((packed,), False)
            if patience is not None:
                connection._sock.settimeout(patience)
            if not replies:
                reply = connection.read_response()
            else:
                reply = self._read_many(connection, replies)
        except redis.ResponseError as error:
            # The whole reply was read; but a replica stays one until we connect anew.
            if isinstance(error, redis.exceptions.ReadOnlyError) or "READONLY" in str(error):
                pool.drop(connection)
            else:
                pool.give(connection)
            self.breaker.succeeded()
            raise self._refused(error) from error
        except BaseException:
            # A signal handler's exception and a soft time limit come through here too: somebody else's reply may
            # still be on its way, so nobody may read from this socket again.
            pool.drop(connection)
            raise
        pool.give(connection)
        if self.breaker._refusals:
            self.breaker.succeeded()
        return reply

    @staticmethod
    def _read_many(connection: Any, count: int) -> list[Any]:
        replies = []
        first_error: redis.ResponseError | None = None
        for _ in range(count):
            try:
                replies.append(connection.read_response())
            except redis.ResponseError as error:
                # The rest must be read before the connection may go back.
                first_error = first_error or error
        if first_error is not None:
            raise first_error
        return replies

    # -- errors --------------------------------------------------------------------------------------------------

    def _refused(self, error: redis.ResponseError) -> BackendError:
        """An error reply, in our words."""
        if isinstance(error, redis.exceptions.NoScriptError):
            return _NoScript()
        text = redact(str(error))
        if isinstance(error, _CANNOT_SERVE_CLASSES) or _CANNOT_SERVE_NOW.search(text):
            return BackendUnavailable(f"{self.name} cannot serve: {text}")
        return BackendError(f"{self.name} answered: {text}")

    def _unavailable(self, error: redis.RedisError, generation: int) -> BackendError:
        """No answer, or a connection-level one, in our words; tells the breaker."""
        text = redact(str(error))
        if isinstance(error, _REJECTED):
            return Rejected(f"{self.name} rejected our credentials: {text}")
        if isinstance(error, redis.InvalidResponse):
            return BackendError(f"{self.name} does not speak Redis: {text}")
        timed_out = isinstance(error, redis.TimeoutError) or _answered(error)
        self.breaker.failed(generation, text, timed_out=timed_out)
        return BackendUnavailable(f"{self.name} is away: {text}")

    # -- recovery ------------------------------------------------------------------------------------------------

    def on_recovery(self, replay: Callable[[RedisClient], None]) -> None:
        """Have `replay(client)` called when Redis is back, before anybody else in this process uses it again.

        If Redis goes away meanwhile, or rejects our credentials, the breaker stays open, and `replay` is called again
        after the next probe. Any other error of `replay` is logged: one feature's mistake must not keep Redis from all.
        """
        self._recoveries.append(replay)

    def replay_soon(self, why: str) -> None:
        """Something for a replay was noted: use Redis no more until the replays have run."""
        self.breaker.trip(why)

    def _probe(self) -> None:
        # With the timeouts of every call: a shorter one of its own would never let a distant Redis back in.
        connection = self._connect()
        try:
            connection.send_packed_command((pack_command(("PING",)),), False)
            connection.read_response()
        except _REJECTED:
            pass  # it is back, and callers shall see that mistake
        except redis.ResponseError as error:
            if isinstance(self._refused(error), BackendUnavailable):  # else it is back: PING may be forbidden us
                raise BackendUnavailable(redact(str(error))) from error
        except redis.RedisError as error:
            raise BackendUnavailable(redact(str(error))) from error
        finally:
            _disconnect(connection)
        self._drop_idle()
        self._direct.open = True
        try:
            for replay in list(self._recoveries):
                try:
                    replay(self)
                except (BackendUnavailable, Rejected):
                    raise
                except Exception:
                    log.exception("a replay on %s failed", self.name)
        finally:
            self._direct.open = False

    # -- life ----------------------------------------------------------------------------------------------------

    def _connect(self) -> Any:
        """A connection that connects at its first send."""
        try:
            return self._connection_class(**self._options)
        except UnboundLocalError as error:
            if error.__context__ is None:
                raise
            raise error.__context__ from None  # redis-py 6.4 hides a signal handler's exception in its constructor so

    def renew_after_fork(self) -> None:
        inherited = [*self._pool.live, *self._waiting.live]
        self._pool.renew()
        self._waiting.renew()
        self._direct = threading.local()
        for connection in inherited:
            _disconnect(connection)  # redis-py closes the child's descriptor without shutting the parent's socket down

    def close(self) -> None:
        """Close the idle connections and end the probe. The client reconnects if it is used again."""
        self.breaker.close()
        self._drop_idle()

    def _drop_idle(self) -> None:
        self._pool.drop_idle()
        self._waiting.drop_idle()


class Pending:
    """A command that was sent, and whose reply is still to be taken. One that nobody takes costs its connection.

    To be used by one thread at a time.
    """

    __slots__ = ("_client", "_connection", "_generation")

    def __init__(self, client: RedisClient, connection: Any, generation: int) -> None:
        self._client = client
        self._connection = connection
        self._generation = generation

    def reply(self) -> Any:
        """The reply; waits for it if it is not there yet. To be taken once.

        Raises BackendUnavailable; BackendError, also where the server did not know a script: it is not sent again.
        """
        client = self._client
        connection, self._connection = self._connection, None
        if connection is None:
            raise BackendUnavailable("the reply was taken before")
        try:
            return client._exchange(client._waiting, connection, b"", 0)
        except redis.RedisError as error:
            raise client._unavailable(error, self._generation) from error


class _NoScript(BackendError):
    """The server does not know the script yet: never leaves this module."""


def _answered(error: redis.RedisError) -> bool:
    """Did the server itself say that it cannot be used, in a way that its PING will say too?"""
    return isinstance(error, redis.exceptions.BusyLoadingError) or "max number of clients" in str(error)


def _parse_url(url: str) -> dict[str, Any]:
    try:
        return dict(parse_url(url))  # type: ignore[no-untyped-call]
    except ValueError as error:
        raise _wrong_url(url, error) from None


def _wrong_url(url: str, error: Exception) -> ConfigurationError:
    return ConfigurationError(
        f"REDIS_URL is {redact(url)!r}; its parameters must be those of redis-py's connections: {redact(str(error))}"
    )


def _disconnect(connection: Any) -> None:
    connection.disconnect()


def _address(options: dict[str, Any]) -> str:
    if "path" in options:
        return str(options["path"])
    return f"{options.get('host', 'localhost')}:{options.get('port', 6379)}"
