"""rate_limited and exclusive, for the functions of tasks."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, ParamSpec, TypeVar, overload

from celery import Task, current_task
from celery.local import Proxy

from ..._templates import KeyTemplate, refuse_unless_plain
from ...errors import LockTimeout, LockUnavailable, RateLimitExceeded, check_ttl, refuse
from ...keys import check_id
from ...limits.calls import LimitedCalls
from ...limits.rates import Rate
from ._booked import LIMIT
from ._gov import current_gov
from ._parking import admit_or_park
from ._republish import can_republish, jittered, republish, runs

P = ParamSpec("P")
R = TypeVar("R")

#: Seconds before a task that met its key taken comes again: at first, doubled each time, and at most.
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0
_CONFLICTS = "govredis_conflicts"


@overload
def rate_limited(
    rate: Rate | Callable[..., Rate],
    *,
    key: str | Callable[..., str],
    operation: str = ...,
    cost: int | Callable[..., int] = ...,
    exempt: Callable[..., bool] | None = ...,
    on_limit: Literal["retry", "raise"] = ...,
) -> Callable[[Callable[P, R]], Callable[P, R]]: ...
@overload
def rate_limited(
    rate: Rate | Callable[..., Rate],
    *,
    key: str | Callable[..., str],
    operation: str = ...,
    cost: int | Callable[..., int] = ...,
    exempt: Callable[..., bool] | None = ...,
    on_limit: Literal["skip"],
) -> Callable[[Callable[P, R]], Callable[P, R | None]]: ...
def rate_limited(
    rate: Rate | Callable[..., Rate],
    *,
    key: str | Callable[..., str],
    operation: str = "default",
    cost: int | Callable[..., int] = 1,
    exempt: Callable[..., bool] | None = None,
    on_limit: Literal["retry", "raise", "skip"] = "retry",
) -> Callable[[Callable[P, R]], Callable[P, R | None]]:
    """Limit the runs of a task, over all workers. Put it between `@app.task` and the function.

    Args:
        rate: as in `RateLimiter.hit`, or a callable that gets the task's arguments and returns one.
        key: a template of the task's argument names, "{agent_id}", or a callable that gets its arguments.
        operation: what is limited.
        cost: as in `RateLimiter.hit`, or a callable that gets the task's arguments and returns one.
        exempt: a callable that gets the task's arguments; a run for which it returns True is let through, unasked and
            uncounted.
        on_limit: "retry" books the first time at which there is room, in the order of arrival, and parks the message
            in Redis until then: its `retries` and `max_retries` do not know of it. "raise" raises RateLimitExceeded.
            "skip" ends the task with None, and counts it.

    Called directly, by another task or eagerly, "retry" raises RateLimitExceeded: there is no message of its own to
    publish anew.

    What is parked, the workers of an app with `init_celery` publish when it is due, whichever comes first: the message
    as it was, to the exchange and routing key that it came by, in its serializer, with one header more,
    "govredis_parked". So a task is delivered twice, however many wait, unless it came early because others were late.
    While no worker runs, it waits. It is published at least once, and run once, but for what holds of every task: with
    acks_late, a killed worker's runs again, and without it is lost. Where the message waits is a Redis too,
    GOVREDIS_PARKING_URL or else REDIS_URL; what that loses is lost.

    Nothing is booked while Redis is away, nor of limits whose windows are counters: what is refused then is published
    anew with a countdown, to run when the limit said, or up to a quarter later (at most 10 minutes at a time, or half
    of the broker's visibility_timeout; then it may be refused again).

    Raises ValueError at decoration for a bad argument, and where it stands above `@app.task` or on an async function or
    a generator. What each run may raise or promises when Redis is away is as for `RateLimiter.hit`. A run that was
    admitted and then ends early (a killed worker, a conflict in `exclusive` below it) has used its place; so has, when
    its time comes, one that was booked and does not come any more (revoked, expired).
    """
    if on_limit not in ("retry", "raise", "skip"):
        raise refuse("on_limit", on_limit, '"retry", "raise" or "skip"')
    calls = LimitedCalls(rate, key, operation, cost, exempt)

    def decorate(function: Callable[P, R]) -> Callable[P, R | None]:
        _refuse_tasks(function, "rate_limited")
        look = calls.of(function)

        @_wraps(function)
        def limited(*args: P.args, **kwargs: P.kwargs) -> R | None:
            gov = current_gov()
            found = look(args, kwargs)
            if found is None:
                return function(*args, **kwargs)
            identity, now, cost = found
            if on_limit == "retry" and can_republish(current_task) and runs(current_task, function):
                admit_or_park(gov, current_task, identity, now, operation, cost)
                return function(*args, **kwargs)
            result = gov.limits.hit(identity, now, operation=operation, cost=cost)
            if result.allowed:
                return function(*args, **kwargs)
            gov.counters.add(f"celery.limited.{on_limit}")
            if on_limit == "skip":
                return None
            raise RateLimitExceeded(result)

        if on_limit == "retry":
            setattr(limited, LIMIT, (look, operation))
        return limited

    return decorate


@overload
def exclusive(
    key: str, *, ttl: float | None = ..., on_conflict: Literal["retry", "raise"] = ...
) -> Callable[[Callable[P, R]], Callable[P, R]]: ...
@overload
def exclusive(
    key: str, *, ttl: float | None = ..., on_conflict: Literal["skip"]
) -> Callable[[Callable[P, R]], Callable[P, R | None]]: ...
def exclusive(
    key: str, *, ttl: float | None = None, on_conflict: Literal["retry", "raise", "skip"] = "retry"
) -> Callable[[Callable[P, R]], Callable[P, R | None]]:
    """Run a task only while it holds the lock of its key. Put it between `@app.task` and the function.

    The lock is renewed while the task runs, and released when the function ends, however it does: returned, raised,
    timed out, revoked with SIGTERM. Of a worker process that is killed (-9) it ends within the ttl; delivered again on
    the same host, the same task (by its id) takes it over at once. Not from one that still runs, which a message that
    is delivered twice (after its visibility_timeout, say) may meet; and not on another host, which cannot tell. What a
    lock promises, and what no lock can, when Redis is away too, is in DistributedLock and HeldLock.

    Args:
        key: the lock's name: a template of the task's argument names, "agent:{agent_id}", or a name for all its runs.
        ttl: seconds of the lock's lease; None: REDIS_LOCK_TIMEOUT.
        on_conflict: somebody else holds it. "retry" publishes the message anew, to run in half a second, then in
            twice the time each time, up to half a minute: its `retries` and `max_retries` do not know of it. "raise"
            raises LockTimeout. "skip" ends the task with None, and counts it.

    Called directly, by another task or eagerly, "retry" raises LockTimeout: there is no message of its own to publish
    anew.

    With both, put `exclusive` above `rate_limited`: a conflict then takes nothing of the limit.

    Raises ValueError at decoration for a bad argument, and where it stands above `@app.task` or on an async function or
    a generator. A run raises LockLost where the lock was lost though the function succeeded, and LockUnavailable while
    nobody can be asked (Redis is away for less than a second, or GOVREDIS_LOCK_FALLBACK=fail); "retry" takes that for a
    conflict.
    """
    if not isinstance(key, str):
        raise refuse("key", key, 'a template such as "agent:{agent_id}"')
    if on_conflict not in ("retry", "raise", "skip"):
        raise refuse("on_conflict", on_conflict, '"retry", "raise" or "skip"')
    if ttl is not None:
        check_ttl(ttl)

    def decorate(function: Callable[P, R]) -> Callable[P, R | None]:
        _refuse_tasks(function, "exclusive")
        template = KeyTemplate(key, function, shared=True)
        if template.plain is not None:
            check_id(template.plain, "lock name")

        @_wraps(function)
        def alone(*args: P.args, **kwargs: P.kwargs) -> R | None:
            gov = current_gov()
            name = template.fill(args, kwargs)
            mine = can_republish(current_task) and runs(current_task, function)
            try:
                if mine:
                    held = gov.locks.acquire_for(current_task.request.id, name, ttl=ttl)
                else:
                    held = gov.locks.acquire(name, timeout=0, ttl=ttl)
            except (LockTimeout, LockUnavailable) as conflict:
                if on_conflict == "retry" and mine:
                    gov.counters.add("celery.conflicts.retry")
                    conflicts = int((current_task.request.headers or {}).get(_CONFLICTS, 0))
                    wait = min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** min(conflicts, 10))
                    republish(current_task, conflict, jittered(wait), {_CONFLICTS: conflicts + 1})
                if isinstance(conflict, LockUnavailable):
                    raise
                gov.counters.add(f"celery.conflicts.{on_conflict}")
                if on_conflict == "skip":
                    return None
                raise
            with held:
                return function(*args, **kwargs)

        return alone

    return decorate


def _refuse_tasks(function: Any, decorator: str) -> None:
    # Of a task that is not made yet, Celery's proxy: to look into it would finalize the app.
    if issubclass(type(function), (Proxy, Task)):
        raise ValueError(f"@{decorator} stands above @app.task; it must stand below it, next to the function")
    if not callable(function):
        raise refuse("what is decorated", function, "the function of a task")
    refuse_unless_plain(function, decorator)


def _wraps(function: Callable[..., Any]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """functools.wraps, with the signature where Celery looks for it to check arguments as they are published."""

    def wrap(wrapper: Callable[P, R]) -> Callable[P, R]:
        wrapper = functools.wraps(function)(wrapper)
        wrapper.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
        return wrapper

    return wrap
