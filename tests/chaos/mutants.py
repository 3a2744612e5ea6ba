"""The library with a fault, made in the process that uses it, which the checker must find; see test_chaos.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

from govredis.errors import BackendUnavailable


class Mutant(NamedTuple):
    promise: str
    make: Callable[[], None]


MUTANTS: dict[str, Mutant] = {}


def breaks(promise: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def add(make: Callable[[], None]) -> Callable[[], None]:
        MUTANTS[make.__name__] = Mutant(promise, make)
        return make

    return add


@breaks("holders on one host never overlap")
def locks_without_flock() -> None:
    import fcntl

    from govredis.locks.host_lock import exclusive

    names = {name: getattr(fcntl, name) for name in dir(fcntl)}
    exclusive.fcntl = SimpleNamespace(**{**names, "flock": lambda *_: None})  # type: ignore[attr-defined]


@breaks("fencing tokens rise")
def fences_of_their_own() -> None:
    from govredis.locks.held import HeldLock

    made = HeldLock.__init__

    def init(self: HeldLock, *args: Any) -> None:
        made(self, *args)
        self.token = self.token % 1_000_000

    HeldLock.__init__ = init  # type: ignore[method-assign]


@breaks("at most N within any window, a store and loss of data")
def one_more_admitted() -> None:
    from govredis.limits import decider
    from govredis.limits.rates import RateLimits

    parse = decider.parse_rate
    decider.parse_rate = lambda rate: RateLimits(replace(one, count=one.count + 1) for one in parse(rate))


@breaks("none is refused while within N")
def refused_for_nothing() -> None:
    from govredis.limits import decider
    from govredis.limits.rates import RateLimits

    parse = decider.parse_rate
    decider.parse_rate = lambda rate: RateLimits(replace(one, count=min(one.count, 5)) for one in parse(rate))


@breaks("a revoked session is found nowhere")
def revocations_forgotten() -> None:
    from govredis.sessions import SessionCache

    SessionCache.unbind = lambda self, session_id: True  # type: ignore[method-assign]


@breaks("a live session is never logged out")
def unknown_is_logged_out() -> None:
    from govredis.sessions import SessionCache

    get = SessionCache.get

    def lax(self: SessionCache, session_id: str, **options: Any) -> Any:
        try:
            found = get(self, session_id, **options)
        except BackendUnavailable:
            return None
        return found if found is None or found.backend == "redis" else None

    SessionCache.get = lax  # type: ignore[method-assign]


@breaks("never another user's session")
def any_session() -> None:
    from govredis.sessions import SessionCache

    get, last = SessionCache.get, []

    def another(self: SessionCache, session_id: str, **options: Any) -> Any:
        found = get(self, session_id, **options)
        last[:] = [*last[-50:], found]
        return last[0] if len(last) > 50 and found is not None and last[0] is not None else found

    SessionCache.get = another  # type: ignore[method-assign]


@breaks("after invalidate no hit is older")
def invalidations_lost() -> None:
    from govredis.metadata import entry_keys

    entry_keys.invalidate = lambda *_: None  # type: ignore[assignment]


@breaks("no hit is staler than X")
def ticks_that_tell_nothing() -> None:
    from govredis.outbox.relay import OutboxRelay

    OutboxRelay._commands = lambda self, entries, found: []  # type: ignore[method-assign]


@breaks("no hit is staler than X")
def losses_unnoticed() -> None:
    from govredis.outbox.relay import OutboxRelay

    tell = OutboxRelay._tell

    def trusting(self: OutboxRelay, found: Any, last_run: Any, entries: Any) -> Any:
        return tell(self, found, last_run if found.held is None else found.held.run, entries)

    OutboxRelay._tell = trusting  # type: ignore[method-assign]


@breaks("a value is one that was written for its id")
def values_mixed_up() -> None:
    from govredis.keys import Keys

    cached = Keys.cached
    Keys.cached = lambda self, namespace, identity: cached(self, namespace, identity[:-1] + "0")  # type: ignore


@breaks("only documented exceptions")
def other_exceptions() -> None:
    from govredis.postgres import Postgres

    fetch = Postgres.fetch

    def raw(self: Postgres, *args: Any) -> Any:
        try:
            return fetch(self, *args)
        except BackendUnavailable as error:
            raise OSError("as the driver says it") from error

    Postgres.fetch = raw  # type: ignore[method-assign]


@breaks("exclusive tasks never overlap")
def tasks_not_exclusive() -> None:
    from govredis.contrib import celery

    celery.exclusive = lambda *_, **__: lambda function: function  # type: ignore[assignment]


@breaks("no task is lost")
def parked_and_forgotten() -> None:
    from govredis.limits.parked import ParkingLot

    ParkingLot.park = lambda *_, **__: None  # type: ignore[method-assign]


def mutate(names: str) -> None:
    """Args:
    names: of mutants, joined by commas; or empty.
    """
    for name in filter(None, names.split(",")):
        MUTANTS[name].make()
