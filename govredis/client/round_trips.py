"""RoundTrips: exchanges over the connections of a pool, and the second attempt where an exchange fails."""

from __future__ import annotations

import itertools
import logging
import threading
from time import perf_counter
from typing import Any, NamedTuple

import redis
from redis.connection import Connection, SSLConnection

from .._fork import notice_fork
from .._histogram import Histogram
from .._pool import SLICE, Pool, PoolExhausted
from .._recovery import Recoverable
from .._secrets import Secrets
from ..breaker import Rejected
from ..config import Config
from ..errors import BackendError, BackendUnavailable, NotAsked, NotTaken
from ..keys import Keys
from .commands import names_of, pack_command
from .mapping import NoScript, RedisErrorMapping, answered, is_too_many
from .options import address, connection_options, wrong_url
from .redirects import NotServedHere
from .wire import Closed, ClosedGreeting, take_over

log: logging.Logger = logging.getLogger("govredis")

PING = pack_command(("PING",))

#: How often a connection must close at a command, right after PING was answered, until that counts as refusal.
_CLOSED_AGAIN = 2


#: Answers that say something of the server, and not of one command.
_OF_ALL = (BackendUnavailable, NoScript, Rejected)


class RoundTrips(Recoverable):
    """The part of RedisNode that deals with connections; see there."""

    def __init__(self, config: Config) -> None:
        self._secrets = Secrets.of(config)
        self._options = self._new_options(config)
        self._timeout: float = self._options["socket_timeout"]
        #: Its number.
        self.database: int = int(self._options.get("db") or 0)
        #: Seconds to wait for a connection: longer than the users of all others need to find out that Redis hangs.
        self._for_place: float = self._options["socket_connect_timeout"] + self._timeout + 2 * SLICE
        self._connection_class: type[Any] = self._options.pop("connection_class", Connection)
        super().__init__(self._new_name())
        try:
            self._connect()
        except (TypeError, ValueError, redis.RedisError) as error:
            raise wrong_url(config.redis_url, error) from None
        self._pool = self._new_pool(config)
        # A pool of its own: callers that wait must not keep the others from working.
        self._waiting = self._new_pool(config)
        # Callers of `block` wait for longer, and may be many.
        self._blocking = self._new_pool(config)
        tls = issubclass(self._connection_class, SSLConnection)
        self._pattern = Keys(config.key_prefix).pattern
        self._errors = self._new_errors(tls=tls)
        self._of_thread = threading.local()
        #: The number of replies that nobody had asked for.
        self.strays: int = 0
        #: Changes at each connect, before any reply over the new connection is returned. A server that was restarted or
        #: replaced is reached over new connections only.
        self.connects: int = 0
        self._connects = itertools.count(1)
        #: How long round trips took, without those that wait on purpose.
        self.latency: Histogram = Histogram()

    def _new_options(self, config: Config) -> dict[str, Any]:
        return connection_options(config)

    def _new_name(self) -> str:
        return f"Redis at {address(self._options)}"

    def _new_errors(self, *, tls: bool) -> RedisErrorMapping:
        return RedisErrorMapping(self.name, self._secrets, self.breaker, self._pattern, tls=tls)

    def _new_pool(self, config: Config) -> Pool[Any]:
        return Pool(
            lambda _: self._connect(),
            disconnect,
            config.redis_connections,
            self.name,
            self._check,
        )

    @property
    def _pools(self) -> tuple[Pool[Any], ...]:
        return self._pool, self._waiting, self._blocking

    def _round_trip(
        self,
        packed: bytes,
        replies: int = 0,
        wait: tuple[float, float] | None = None,
        each: bool = False,
        pool: Pool[Any] | None = None,
    ) -> Any:
        notice_fork()
        breaker = self.breaker
        if not breaker.closed:
            self._check()
        period = breaker.period
        began = perf_counter()
        if wait is None:
            pool, for_place, patience = self._pool, self._for_place, None
        else:
            pool, (for_place, patience) = pool or self._waiting, wait
        connection = pool.take(for_place)
        pooled = connection._sock is not None
        if pooled and connection.unread():
            connection = self._another(pool, connection, for_place)
            pooled = connection._sock is not None
        try:
            reply = self._exchange(pool, connection, packed, replies, patience, each)
            if wait is None:
                self.latency.add(perf_counter() - began)
            return reply
        except redis.RedisError as error:
            failed = error
        try:
            return self._once_more(Asked(period, pool, for_place, packed, replies, patience, each), failed, pooled)
        finally:
            del failed  # see wire.py
            if wait is None:
                took = perf_counter() - began
                self.latency.add(took)
                self.breaker.note_slow(took)

    def _once_more(self, asked: Asked, failed: redis.RedisError, pooled: bool) -> Any:
        """The reply of another attempt, where that may help and does no harm; else raises the error in our words."""
        pool, sent_before, has_waited = asked.pool, False, False
        try:
            while True:
                if asked.patience is not None and isinstance(failed, redis.TimeoutError):
                    return None
                if is_too_many(failed) and not has_waited and self._makes_do(pool):
                    has_waited = True  # nothing was read of what we sent
                elif pooled and isinstance(failed, redis.ConnectionError) and not answered(failed) and not sent_before:
                    # The connection had idled while its server went away or was restarted, and so had the others.
                    pool.drop_idle()
                    sent_before = True
                    self._resent()
                elif isinstance(failed, Closed):
                    return self._after_ping(asked)
                elif isinstance(failed, ClosedGreeting):
                    raise self._of_greeting(failed, asked.period) from failed
                else:
                    raise self._failed(failed, asked.period) from failed
                try:
                    if not self.breaker.closed:
                        self._check()
                    connection = pool.take(asked.for_place)
                    if connection._sock is not None and connection.unread():
                        connection = self._another(pool, connection, asked.for_place)
                except NotAsked as error:
                    if sent_before:
                        raise BackendUnavailable(str(error)) from failed  # the first attempt may have arrived
                    raise
                pooled = connection._sock is not None
                try:
                    return self._exchange(pool, connection, *asked[3:])
                except redis.RedisError as error:
                    failed = error
        finally:
            del failed  # see wire.py

    def _after_ping(self, asked: Asked) -> Any:
        """The reply, where the last connection was closed by accident.

        A proxy such as twemproxy closes the connection at a command that it does not know. However often that happens,
        it is no outage: PING is answered before and after.
        """
        connections = [self._connect() for _ in range(_CLOSED_AGAIN + 1)]
        closed: Closed | None = None
        try:
            for connection in connections[:-1]:
                self._exchange(UNPOOLED, connection, PING, 0)
                self._resent()
                try:
                    return self._exchange(UNPOOLED, connection, *asked[3:])
                except Closed as error:
                    closed = error
            self._exchange(UNPOOLED, connections[-1], PING, 0)
            names = " or ".join(sorted({name.decode() for name in names_of(asked.packed)}))
            raise self._not_taken(names) from closed
        except redis.RedisError as error:
            if asked.patience is not None and isinstance(error, redis.TimeoutError):
                return None
            raise self._failed(error, asked.period) from error
        finally:
            closed = None  # see wire.py
            for connection in connections:
                disconnect(connection)

    def _of_greeting(self, failed: ClosedGreeting, period: int) -> BackendError:
        """As `_after_ping`, for the first commands of a connection: HELLO 3, or SELECT of another database than 0."""
        plain, pinged = self._connection_class(**{**self._options, "db": 0}), False
        try:
            self._exchange(UNPOOLED, plain, PING, 0)
            pinged = True
            # Over the same connection: another one may lead to another server.
            self._exchange(UNPOOLED, plain, pack_command(failed.asked), 0)
        except Closed:
            if pinged:
                return self._not_taken(failed.asked[0])
        except (redis.RedisError, BackendError):
            pass
        finally:
            disconnect(plain)
        return self._failed(failed, period)

    def _not_taken(self, names: str) -> NotTaken:
        return NotTaken(
            f"{self.name} closes the connection at {names}, and answers PING: a proxy that does not take that?"
        )

    def resends(self) -> int:
        """How many commands of this thread were sent a second time, and may have been carried out twice."""
        count: int = getattr(self._of_thread, "resends", 0)
        return count

    def _resent(self) -> None:
        self._of_thread.resends = self.resends() + 1

    def _makes_do(self, pool: Pool[Any]) -> bool:
        """Redis takes no more connections: can we do with the open ones?"""
        if pool.narrow():
            return True
        connection = (self._waiting.let_go() or self._blocking.let_go()) if pool is self._pool else None
        if connection is None:
            return False
        connection._sock.settimeout(self._timeout)
        pool.adopt(connection)
        return True

    def _failed(self, error: redis.RedisError, period: int) -> BackendError:
        """No answer, in our words. Where Redis takes no more connections, the open ones go on: no outage."""
        if is_too_many(error) and (self._pool.live or self._waiting.live or self._blocking.live):
            return PoolExhausted(f"{self.name} takes no more connections of this process: {self._errors.said(error)}")
        return self._errors.of_connection(error, period)

    def _another(self, pool: Pool[Any], connection: Any, wait: float) -> Any:
        """A connection that is in step, in the place of a connection with a reply that nobody asked for."""
        while connection._sock is not None and connection.unread():
            pool.drop(connection)
            self._strayed()
            connection = pool.take(wait)
        return connection

    def _strayed(self) -> None:
        self.strays += 1
        if self.strays == 1:
            log.warning("%s sent a reply that nobody asked for: a proxy's fault? Its connection was dropped", self.name)

    def _open(self, connection: Any) -> None:
        """Connects. Only redis-py's frames know the socket until it is connected.

        Where a signal handler's exception strikes there, CPython closes the socket once that exception is forgotten,
        and gives a ResourceWarning. Nothing of ours could close it sooner.
        """
        connection.connect()
        take_over(connection)
        self.connects = next(self._connects)
        if connection.left_over() or connection.unread():
            connection.read_response()  # an error: that there are too many clients, say
            self._strayed()
            raise redis.ConnectionError("it sent more than it was asked for when we connected")

    def _exchange(
        self,
        pool: Pool[Any] | _Unpooled,
        connection: Any,
        packed: bytes,
        replies: int,
        patience: float | None = None,
        each: bool = False,
    ) -> Any:
        refusal: redis.ResponseError | None = None
        try:
            try:
                if packed:  # else it was sent before
                    if connection._sock is None:
                        self._open(connection)
                    connection.send_packed_command((packed,), False)
                if patience is not None:
                    connection._sock.settimeout(patience)
                reply = self._read_many(connection, replies, each, packed) if replies else connection.read_response()
            except redis.ResponseError as error:
                refusal = error
            if connection._sock is not None and connection.left_over():
                # Nobody can tell which of the replies are ours.
                self._strayed()
                raise redis.ConnectionError("it sent more replies than it was asked for")
        except BaseException:
            # A signal handler's exception and a soft time limit come through here too. The reply may still be on its
            # way, so nobody may read from this socket again.
            pool.drop(connection)
            raise
        if refusal is not None:
            # The whole reply was read. But this connection, and the idle ones, lead to a replica until we connect anew.
            if isinstance(refusal, redis.exceptions.ReadOnlyError) or "READONLY" in str(refusal):
                self._demoted(pool, connection)
            else:
                pool.give(connection)
            self.breaker.succeeded()
            try:
                raise self._errors.of_reply(refusal, packed) from refusal
            finally:
                del refusal  # see wire.py
        pool.give(connection)
        if self.breaker.refusals:
            self.breaker.succeeded()
        return reply

    def _demoted(self, pool: Pool[Any] | _Unpooled, connection: Any) -> None:
        """The server of this connection writes no more: it was made a replica, say."""
        pool.drop(connection)
        pool.drop_idle()

    def _read_many(self, connection: Any, count: int, each: bool, packed: bytes) -> list[Any]:
        replies = []
        first_error: redis.ResponseError | None = None
        for _ in range(count):
            try:
                replies.append(connection.read_response())
            except redis.ResponseError as error:
                # The rest must be read before the connection may go back.
                mine = self._errors.of_reply(error, packed)
                replies.append(mine)
                is_alone = each and (isinstance(mine, NotServedHere) or not isinstance(mine, _OF_ALL))
                if not is_alone:
                    first_error = first_error or error
        if first_error is not None:
            try:
                raise first_error
            finally:
                del first_error  # see wire.py
        return replies

    def _connect(self) -> Any:
        """A connection that connects at its first send."""
        try:
            return self._connection_class(**self._options)
        except UnboundLocalError as error:
            if error.__context__ is None:
                raise
            raise error.__context__ from None  # redis-py 6.4's constructor hides a signal's exception


class Asked(NamedTuple):
    """The arguments of a round trip, for another attempt."""

    period: int
    pool: Pool[Any]
    for_place: float
    packed: bytes
    replies: int
    patience: float | None
    each: bool


def disconnect(connection: Any) -> None:
    connection.disconnect()


class _Unpooled:
    """Stands in the place of a pool for a connection that is its user's own."""

    def give(self, connection: Any) -> None:
        pass

    def drop(self, connection: Any) -> None:
        disconnect(connection)

    def drop_idle(self) -> None:
        pass


UNPOOLED = _Unpooled()
