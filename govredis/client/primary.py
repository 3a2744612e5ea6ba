"""Primary: where the Sentinels say that the primary is."""

from __future__ import annotations

import logging
import random
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import redis

from .._boottime import clock as boottime
from .._daemon import start_daemon
from .._fork import notice_fork, renew_in_child
from .._latch import Latch
from .._redis_urls import Host, Sentinels
from .._secrets import Secrets
from .commands import pack_command
from .mapping import REJECTED
from .named import resolver_of
from .wire import SentinelMistake

log: logging.Logger = logging.getLogger("govredis")

# Not the generator of the module `random`: its numbers are the application's, and forked children would share them.
_random = random.SystemRandom()

#: Seconds for which an answer is taken as true. Then a call has the Sentinels asked beside it.
_KNOWN_FOR = 1.0
#: Seconds of silence after which a call waits for the answer: the process may have slept through a failover.
_WAIT_AFTER = 2.0
#: Seconds between two rounds of questions, at least.
_BETWEEN = 0.25
#: Seconds for which no Sentinel has said a newer epoch any more, until a majority may name an older epoch. Sentinels
#: that were set up anew begin at epoch 0.
_FORGOTTEN = 10.0
#: Seconds of disuse after which a connection to a Sentinel is not trusted: a firewall may have forgotten it.
_IDLE = 10.0

#: The config epoch, and 1 while the server is being promoted under it.
_Epoch = tuple[int, int]


class _View(NamedTuple):
    epoch: _Epoch
    address: Host


class _Asking:
    """Questions to the Sentinels, one after the other, in a thread of their own.

    Attributes:
        lost: the known primary cannot be used.
    """

    def __init__(self) -> None:
        self.lost = False
        self.began = time.monotonic()
        self.ended = Latch()


class Primary:
    """The address of the primary of a service, by the Sentinels' word (redis.io, "Sentinel client spec").

    An answer counts by its config epoch: an older epoch than the known one is not believed. While no Sentinel answers,
    the known address stays, and the log says so, once. All are asked each time: some know of a
    failover two seconds later than others, and one that is cut off with the old primary knows of none.

    The bound of a wait is the connect timeout, from the beginning of the round of questions. So Sentinels that hang
    cost a call no more than that, and not each call.

    Args:
        sentinels: their addresses, and the service.
        options: of connections to them.
        connection_class: of redis-py.
        moved: called when the address has changed, except the first time; again later where it raised.
        secrets: the passwords that no error may show.
        clock: seconds, monotonic; the default runs on while the host is suspended.
    """

    def __init__(
        self,
        sentinels: Sentinels,
        connection_class: type[Any],
        options: dict[str, Any],
        moved: Callable[[], None],
        secrets: Secrets,
        clock: Callable[[], float] = boottime,
    ) -> None:
        # In another order in each process: else the first one would be asked by all at once.
        self._sentinels = tuple(_random.sample(sentinels.hosts, len(sentinels.hosts)))
        #: Those that did not answer last time.
        self._failing: frozenset[Host] = frozenset()
        self._resolvers = {host: resolver_of(host) for host, _ in sentinels.hosts}
        self.service: str = sentinels.service
        self._connection_class = connection_class
        self._options = options
        self._patience: float = options["socket_connect_timeout"]
        self._moved = moved
        self._secrets = secrets
        self._clock = clock
        self._question = b"".join(
            pack_command(("SENTINEL", word, self.service)) for word in ("GET-MASTER-ADDR-BY-NAME", "MASTER")
        )
        #: None until a Sentinel has answered.
        self.address: Host | None = None
        self._epoch: _Epoch = (-1, 0)
        #: When a Sentinel last answered; last named the known epoch or a newer one; when a round last ended.
        self._known_at = self._epoch_at = self._asked_at = float("-inf")
        #: The last address whose change was told to `moved`.
        self._told: Host | None = None
        #: Why no Sentinel has told anything: its kind and its text.
        self._error: tuple[type[redis.RedisError], str] | None = None
        self._silent = False
        #: Those in step, each with the time of its last use.
        self._connections: dict[Host, tuple[Any, float]] = {}
        self.renew_after_fork()
        renew_in_child(self)

    def renew_after_fork(self) -> None:
        self._lock = threading.RLock()  # a signal handler may make calls of its own
        self._asking: _Asking | None = None
        inherited, self._connections = self._connections, {}
        for connection, _ in inherited.values():
            connection.disconnect()  # redis-py closes the child's descriptor without shutting the parent's socket down

    # -- for calls -----------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Before each call: see to it that the address is not older than a second or two. Raises nothing."""
        silence = self._clock() - self._asked_at
        if silence > _KNOWN_FOR:
            asking = self._ask()
            if silence > _WAIT_AFTER:
                self._wait(asking)

    def locate(self) -> Host:
        """Before a connect: the address, asked for anew unless an answer is less than a second old.

        Raises redis.ConnectionError where no Sentinel has ever answered, SentinelMistake where they refuse us.
        """
        now = self._clock()
        if now - self._known_at > _KNOWN_FOR and now - self._asked_at > _BETWEEN:
            self._wait(self._ask())
        if self.address is None:
            kind, why = self._error or (redis.TimeoutError, f"no Sentinel of {self.names} has answered yet")
            raise kind(why)  # a new one each time: its traceback keeps the frames of its caller
        return self.address

    def doubt(self) -> None:
        """The server at the address is no primary, or cannot be reached: the next connect asks anew."""
        self._known_at = self._asked_at = float("-inf")

    def ask_all(self, *, lost: bool) -> None:
        """Ask each Sentinel, and wait for the answers, or for all timeouts together.

        Args:
            lost: the known primary cannot be used. Then a majority that agrees may name an older epoch.
        """
        asking = self._ask(lost=lost)
        while not asking.ended.wait(_KNOWN_FOR):
            pass

    @property
    def names(self) -> str:
        return ", ".join(map(_text, sorted(self._sentinels)))

    @property
    def failing(self) -> list[str]:
        """The addresses of those Sentinels that did not answer last time, or refused us."""
        return [_text(sentinel) for sentinel in sorted(self._failing)]

    # -- rounds --------------------------------------------------------------------------------------------------

    def _wait(self, asking: _Asking) -> None:
        asking.ended.wait(asking.began + self._patience - time.monotonic())

    def _ask(self, *, lost: bool = False) -> _Asking:
        """The round that is under way, or a new one. One at a time."""
        notice_fork()
        with self._lock:
            asking, is_new = self._asking, False
            if asking is None or asking.ended.is_set():
                asking, is_new = _Asking(), True
            asking.lost |= lost
            if not is_new:
                return asking
            if start_daemon("govredis-sentinel", self._run, asking) is None:
                self._run(asking)
            self._asking = asking  # not before it runs: else all would wait for what an exception has kept from running
            return asking

    def _run(self, asking: _Asking) -> None:
        views: dict[Host, _View] = {}
        failing: list[Host] = []
        failed: redis.RedisError | None = None
        try:
            # Those that failed last time would take the time of a caller that waits.
            for sentinel in sorted(self._sentinels, key=self._failing.__contains__):
                try:
                    view = self._view(sentinel)
                except redis.RedisError as error:
                    failing.append(sentinel)
                    if failed is None or isinstance(error, SentinelMistake):
                        failed = error
                    continue
                views[sentinel] = view
                self._hear(view)
            self._failing = frozenset(failing)
            if not views and failed is not None:
                self._hear_nothing(failed)
            elif asking.lost and len(set(views.values())) == 1 and 2 * len(views) > len(self._sentinels):
                self._hear(next(iter(views.values())), agreed=True)
        finally:
            del failed  # see wire.py
            self._asked_at = self._clock()
            asking.ended.set()

    def _view(self, sentinel: Host) -> _View:
        # Out of the table while it is used: nothing can leave one there whose reply is still on its way.
        connection, used_at = self._connections.pop(sentinel, (None, 0.0))
        if connection is not None and self._clock() - used_at > _IDLE:
            connection.disconnect()
            connection = None
        if connection is not None:
            try:
                return self._ask_over(connection, sentinel)
            except redis.TimeoutError:
                raise
            except redis.ConnectionError as error:
                if isinstance(error, SentinelMistake):
                    raise
                # It was restarted meanwhile, say.
        host, port = sentinel
        connection = self._connection_class(**self._options, host=host, port=port, resolver=self._resolvers[host])
        return self._ask_over(connection, sentinel)

    def _ask_over(self, connection: Any, sentinel: Host) -> _View:
        is_kept = False
        try:
            connection.send_packed_command((self._question,), False)
            address = connection.read_response()
            if address is None:
                raise SentinelMistake(
                    f"it watches no service {self.service!r}, which REDIS_SENTINEL_MASTER or the URL names"
                )
            state = connection.read_response()
            fields = dict(zip(state[::2], state[1::2], strict=True))
            now, listed = _host(*address), _host(fields[b"ip"], fields[b"port"])
            view = _View((int(fields[b"config-epoch"]), int(now != listed)), now)
            self._connections[sentinel] = connection, self._clock()
            is_kept = True
            return view
        except REJECTED as error:
            raise SentinelMistake(str(error)) from error
        except redis.ResponseError as error:
            raise SentinelMistake(f"it answered: {error}") from error
        except redis.ConnectionError as error:
            if isinstance(error.__cause__ or error.__context__, ssl.SSLCertVerificationError):
                raise SentinelMistake(str(error)) from error
            raise
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise redis.ConnectionError(f"it does not answer as a Sentinel: {error!r}") from error
        finally:
            if not is_kept:
                connection.disconnect()

    def _hear_nothing(self, failed: redis.RedisError) -> None:
        mistake = isinstance(failed, SentinelMistake)
        why = self._secrets.text_of(failed, redis.RedisError)
        text = f"no Sentinel of {self.names} {'accepts us' if mistake else 'answers'}: {why}"
        self._error = (SentinelMistake if mistake else redis.ConnectionError), text
        if not self._silent:
            self._silent = True
            stays = f"going on with {_text(self.address)}" if self.address else "so it is away"
            log.warning("Redis %r: %s; %s", self.service, text, stays)

    def _hear(self, view: _View, *, agreed: bool = False) -> None:
        now = self._clock()
        self._known_at, self._error = now, None
        if self._silent:
            self._silent = False
            log.info("Redis %r: Sentinels answer again", self.service)
        if view.epoch < self._epoch and not (agreed and now - self._epoch_at > _FORGOTTEN):
            return
        self._epoch, self._epoch_at = view.epoch, now
        self.address = view.address
        if self._told is None:
            self._told = view.address
        elif self._told != view.address:
            log.info("Redis %r: the primary is at %s now", self.service, _text(view.address))
            self._moved()
            self._told = view.address  # not before: an exception there must not leave the old one's connections in use


def _host(host: bytes, port: bytes) -> Host:
    return host.decode(), int(port)


def _text(address: Host) -> str:
    return f"{address[0]}:{address[1]}"
