"""Instrumentation: have a function called after each operation, for traces, metrics and logs of your own.

While nobody listens nothing is called, not even a check. The first listener has the methods of the table below put in
the place of the features' own, until the last listener goes. So a bound method that was taken before
(`hit = gov.limits.hit`) is not reported: register listeners where a process starts.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar
from weakref import ref

from ._counters import Counters
from ._fork import notice_fork, renew_in_child
from ._recovery import Recoverable
from ._uncopied import Uncopied
from .client.cluster.cluster_node import ClusterNode
from .client.round_trips import RoundTrips
from .errors import ConfigurationError
from .events import EventBus
from .health import HealthMonitor
from .limits import RateLimiter
from .limits.decider import Decider
from .locks import DistributedLock, HeldLock
from .locks.shared_locks import ReadWriteLock, Semaphore
from .metadata import AgentStore, MetadataCache
from .metadata.loading import Loads
from .sessions import SessionCache

__all__ = ["Operation", "on_operation"]

log: logging.Logger = logging.getLogger("govredis")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Operation:
    """An operation that has ended. It names no id, key or value of anybody; the text of `error` may.

    Attributes:
        name: the feature and the method, such as "limits.hit", "locks.acquire" or "locks.semaphore.acquire".
        backend: the backend that the result names, else the server that answered last: "redis" or "postgres". "local"
            is this process (its memory, or the lock folder); "none" is GOVREDIS_LIMIT_FALLBACK. After an error it is
            the server that was asked last.
        degraded: a fallback had a part in it: it was counted as degraded, or its result says so.
        seconds: how long it took.
        error: the exception that it raised; None: it returned.
        started: when it began, in seconds since 1970.
        label: the limited operation's name ("kg_store"), the cache's namespace, or the event's topic; None for all
            others. You choose these names in your code, so there are few of them.
        server: that server, as "Redis at localhost:6379"; None where none answered.
    """

    name: str
    backend: str
    degraded: bool
    seconds: float
    error: BaseException | None
    started: float
    label: str | None
    server: str | None


def on_operation(f: Callable[[Operation], object]) -> Callable[[], None]:
    """Have `f` called after each operation of this process, of all its GovRedis. Returns a function that ends it.

    It is called in the thread of the operation, before that returns, so it must be quick. An exception of `f` does not
    reach the caller. The first one is logged, and each is counted as `instrumentation.errors`. There may be several
    listeners, which are called in turn. A forked child has those of its parent.

    Operations are the public methods of `limits`, `locks`, `sessions`, `metadata` and other caches, `agents`,
    `events` and `health` that may ask a server. Exceptions are `locks.count_held`, and the waits of readers of
    events. A decorator's call is the operation it makes: `rate_limited` a `limits.hit`. The same goes for `with`:
    `locks.acquire` does not contain the body, and the release after it is a `locks.release`. An operation that
    another makes is part of that one, and is not reported. A loader's own operations are, and so come before the
    `metadata.get_or_load` that called it. Operations of a listener are not reported.
    """
    notice_fork()
    return _switch.add(_OperationListener(f))


class _OperationListener:
    def __init__(self, f: Callable[[Operation], object]) -> None:
        self._f = f
        self._has_failed = False

    def tell(self, operation: Operation, counters: Counters) -> None:
        try:
            self._f(operation)
        except Exception:
            counters.add("instrumentation.errors")
            if not self._has_failed:
                self._has_failed = True
                log.exception("a listener of on_operation failed; instrumentation.errors counts its further errors")


class _UnderWay:
    """An operation that is under way, and what is known of it by now.

    Attributes:
        asked: the last server that was asked, and its backend's name.
        answered: the servers that have answered, by backend.
        last: the backend of the last one.
    """

    __slots__ = ("__weakref__", "answered", "asked", "degraded", "last")

    def __init__(self) -> None:
        self.asked: tuple[str, Recoverable] | None = None
        self.answered: dict[str, Recoverable] = {}
        self.last = "local"
        self.degraded = False

    def backend(self, result: Any, error: BaseException | None) -> tuple[str, str | None]:
        """The backend of an operation that has ended, and its server."""
        if error is not None:
            result = getattr(error, "result", None)  # of RateLimitExceeded
            if result is None and self.asked is not None:
                return self.asked[0], self.asked[1].name
        named = getattr(result, "backend", None)
        if named is None:
            # A degraded lock's is the lock folder.
            named = "local" if getattr(result, "degraded", False) else self.last
        server = self.answered.get(named)
        return named, None if server is None else server.name


# A call counts for as long as the frame that reports it: an exception of a signal handler may keep that from clearing
# the variable. In each thread and greenlet there is another one.
_current: ContextVar[ref[_UnderWay] | None] = ContextVar("govredis_operation", default=None)


def _under_way() -> _UnderWay | None:
    current = _current.get()
    return None if current is None else current()


# -- the table ---------------------------------------------------------------------------------------------------------

_Label = Callable[[Any, tuple[Any, ...], dict[str, Any]], object]


class _Front(NamedTuple):
    """Operations of one class.

    Attributes:
        name: the first part of theirs.
        counters: where an object of the class has its Counters.
        label: of a call, by the object and the arguments.
    """

    of: type
    name: str
    methods: tuple[str, ...]
    counters: str = "_counters"
    label: _Label = lambda *_: None


def _namespace(cache: Any, *_: object) -> object:
    return cache.namespace


def _operation(_: object, __: object, options: dict[str, Any]) -> object:
    return options.get("operation", "default")


def _topic(_: object, arguments: tuple[Any, ...], options: dict[str, Any]) -> object:
    return arguments[0] if arguments else options.get("topic")


_FRONTS = (
    _Front(
        RateLimiter,
        "limits",
        (
            *("hit", "peek", "require", "wait", "hit_or_reserve", "check", "record"),
            *("get_count", "stats", "reset"),
        ),
        "_decider._counters",
        _operation,
    ),
    _Front(RateLimiter, "limits", ("hit_many", "most_denied", "purge"), "_decider._counters"),
    _Front(Decider, "limits", ("refund",), label=lambda _, taken, __: taken[1][2]),
    _Front(
        DistributedLock,
        "locks",
        ("acquire", "try_acquire", "acquire_many", "holder", "is_locked", "held", "glance", "force_release"),
        "counters",
    ),
    _Front(ReadWriteLock, "locks.rwlock", ("read", "write"), "_hold.func.__self__.counters"),
    _Front(Semaphore, "locks.semaphore", ("acquire",), "_hold.func.__self__.counters"),
    _Front(HeldLock, "locks", ("extend", "release"), "_lease._counters"),
    _Front(
        SessionCache,
        "sessions",
        (
            *("bind", "get", "get_agent_id", "touch", "exists", "update", "unbind", "start", "rotate"),
            *("for_agent", "unbind_agent", "purge", "verify"),
        ),
    ),
    _Front(
        MetadataCache,
        "metadata",
        ("get", "set", "get_or_load", "reload", "get_many", "invalidate", "invalidate_all"),
        label=_namespace,
    ),
    _Front(
        AgentStore,
        "agents",
        ("create", "get", "get_many", "update_metadata", "archive", "delete"),
        "_cache._counters",
    ),
    _Front(EventBus, "events", ("publish",), "_context.counters", _topic),
    _Front(EventBus, "events", ("deliver", "dead"), "_context.counters"),
    _Front(HealthMonitor, "health", ("check", "snapshot", "history", "count_keys", "beat", "purge")),
)


def _reporting(front: _Front, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """The method that reports, in the place of the class's own."""
    counters_of, label_of, name = attrgetter(front.counters), front.label, f"{front.name}.{name}"
    clock, wall = time.perf_counter, time.time

    @functools.wraps(method)
    def reported(self: Any, /, *args: Any, **options: Any) -> Any:
        if not _switch.listeners or _under_way() is not None:
            return method(self, *args, **options)
        result = error = None
        call = _UnderWay()
        started, began = wall(), clock()
        try:
            _current.set(ref(call))
            try:
                result = method(self, *args, **options)
                return result
            except BaseException as raised:
                error = raised
                raise
            finally:
                seconds = clock() - began
                backend, server = call.backend(result, error)
                degraded = call.degraded or bool(getattr(result, "degraded", False))
                label = label_of(self, args, options)
                label = label if isinstance(label, str) else None
                operation = Operation(name, backend, degraded, seconds, error, started, label, server)
                error = None  # else the frame of the error would hold the error
                for listener in _switch.listeners:
                    listener.tell(operation, counters_of(self))
        finally:
            _current.set(None)

    return reported


# -- inside an operation -----------------------------------------------------------------------------------------------


def _asking(backend: str, method: Callable[..., Any], *, answers: bool = True) -> Callable[..., Any]:
    """A server's method by which all is asked; `answers`: where it returns, the server has answered."""

    @functools.wraps(method)
    def asked(self: Recoverable, /, *args: Any, **options: Any) -> Any:
        current = _current.get()
        if current is None or (call := current()) is None:
            return method(self, *args, **options)
        call.asked = backend, self
        reply = method(self, *args, **options)
        if answers:
            call.answered[backend] = self
            call.last = backend
        return reply

    return asked


def _counting(method: Callable[[Counters, str, int], None]) -> Callable[..., None]:
    @functools.wraps(method)
    def add(self: Counters, name: str, n: int = 1) -> None:
        method(self, name, n)
        _notice(name)

    return add


def _counting_each(method: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(method)
    def add_each(self: Counters, *names: str) -> None:
        method(self, *names)
        for name in names:
            _notice(name)

    return add_each


def _notice(counted: str) -> None:
    if "degraded" in counted and (call := _under_way()) is not None:
        call.degraded = True


def _loading(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method that runs a user's loader."""

    @functools.wraps(method)
    def loaded(self: Loads, /, load: Any, loader: Callable[[], T]) -> Any:
        def outside() -> T:
            current = _current.get()
            _current.set(None)
            try:
                return loader()
            finally:
                _current.set(current)

        return method(self, load, outside)

    return loaded


def _replacements() -> Iterator[tuple[type, str, Callable[[Callable[..., Any]], Callable[..., Any]]]]:
    """Each method that is replaced, and the function that makes the method in its place."""
    for front in _FRONTS:
        for name in front.methods:
            yield front.of, name, functools.partial(_reporting, front, name)
    yield RoundTrips, "_round_trip", functools.partial(_asking, "redis")
    yield ClusterNode, "finish", functools.partial(_asking, "redis")
    try:
        from .postgres import Postgres
    except ConfigurationError:  # the extra is not installed
        pass
    else:
        yield Postgres, "_borrowed", functools.partial(_asking, "postgres", answers=False)
        yield Postgres, "_execute", functools.partial(_asking, "postgres")
    yield Counters, "add", _counting
    yield Counters, "add_each", _counting_each
    yield Loads, "_run", _loading


class _Switch(Uncopied):
    """The listeners. With the first one all methods are replaced, and with the last one put back."""

    def __init__(self) -> None:
        self.listeners: tuple[_OperationListener, ...] = ()
        #: By class and name: its own method, and the one that reports.
        self._methods: dict[tuple[type, str], tuple[Any, Any]] = {}
        self.renew_after_fork()
        renew_in_child(self)

    def renew_after_fork(self) -> None:
        self._mutex = threading.RLock()  # a signal handler may end its listening

    def add(self, listener: _OperationListener) -> Callable[[], None]:
        with self._mutex:
            if not self._methods:
                self._methods = {
                    (of, name): (vars(of)[name], make(vars(of)[name])) for of, name, make in _replacements()
                }
            for (of, name), (own, replacing) in self._methods.items():
                if vars(of)[name] is own:
                    setattr(of, name, replacing)
            self.listeners = (*self.listeners, listener)
        return functools.partial(self._remove, listener)

    def _remove(self, listener: _OperationListener) -> None:
        notice_fork()
        with self._mutex:
            self.listeners = tuple(other for other in self.listeners if other is not listener)
            if self.listeners:
                return
            for (of, name), (own, replacing) in self._methods.items():
                if vars(of)[name] is replacing:
                    setattr(of, name, own)


_switch = _Switch()
