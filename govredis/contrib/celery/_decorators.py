"""rate_limited and exclusive, for the functions of tasks."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, ParamSpec, TypeVar, overload

from celery import Task, current_task
from celery.local import Proxy

from ..._templates import check_key, name_of_calls, refuse_unless_plain
from ...errors import LockTimeout, LockUnavailable, RateLimitExceeded, check_ttl, refuse
from ...keys import Id
from ...limits.limit_spec import LimitSpec
from ...limits.rates import Rate
from ._gov import current_gov
from ._parking import admit_or_park
from ._republish import can_republish, jittered, republish, runs
from ._reserved import LIMIT

P = ParamSpec("P")
R = TypeVar("R")

#: Seconds before a task that met its key taken comes again: at first, doubled each time, and at most.
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0
_CONFLICTS = "govredis_conflicts"


@overload
def rate_limited(
    rate: Rate | Callable[..., Rate],
    *,
    key: str | Callable[..., Id],
    operation: str = ...,
    cost: int | Callable[..., int] = ...,
    exempt: Callable[..., bool] | None = ...,
    on_limit: Literal["retry", "raise"] = ...,
) -> Callable[[Callable[P, R]], Callable[P, R]]: ...
@overload
def rate_limited(
    rate: Rate | Callable[..., Rate],
    *,
    key: str | Callable[..., Id],
    operation: str = ...,
    cost: int | Callable[..., int] = ...,
    exempt: Callable[..., bool] | None = ...,
    on_limit: Literal["skip"],
) -> Callable[[Callable[P, R]], Callable[P, R | None]]: ...
def rate_limited(
    rate: Rate | Callable[..., Rate],
    *,
    key: str | Callable[..., Id],
    operation: str = "default",
    cost: int | Callable[..., int] = 1,
    exempt: Callable[..., bool] | None = None,
    on_limit: Literal["retry", "raise", "skip"] = "retry",
) -> Callable[[Callable[P, R]], Callable[P, R | None]]:
    """Limit the runs of a task, over all workers. Put it between `@app.task` and the function.

    Args:
        rate: as in `RateLimiter.hit`, or a callable that gets the task's arguments and returns one.
        key: a template of the task's argument names, "{agent_id}"; a plain name such as "mail", for a limit of all runs
            together; or a callable that gets the task's arguments.
        operation: the name of the limited operation.
        cost: as in `RateLimiter.hit`, or a callable that gets the task's arguments and returns one.
        exempt: a callable that gets the task's arguments; a run for which it returns True is let through, unasked and
            uncounted.
        on_limit: "retry" reserves the first time at which there is room, in the order of arrival, and parks the message
            in Redis until then. The task's `retries` and `max_retries` do not change. "raise" raises
            RateLimitExceeded. "skip" ends the task with None, and counts it.

    Called directly, by another task or eagerly, "retry" raises RateLimitExceeded: there is no message of its own to
    publish anew.

    The workers of an app with `init_celery` publish a parked message when it is due, whichever worker is first. The
    message goes out as it was, to the exchange and routing key that it came by, in its serializer, with the additional
    header "govredis_parked". So a task is delivered twice, however many wait, unless it came early because others were
    late. While no worker runs, it waits.

    The task is published at least once, and run once, with the exceptions that hold for every task: with acks_late, a
    killed worker's task runs again, and without it is lost. The message waits in a Redis too, GOVREDIS_PARKING_URL or
    else REDIS_URL. It is lost if that Redis loses it.

    There are no reservations while Redis is away, nor in limits whose windows are counters. A refused message is
    published anew then, with a countdown to the time that the limit said, or up to a quarter longer. The countdown is
    at most 10 minutes, or half of the broker's visibility_timeout; after it the task may be refused again.

    Raises ValueError at decoration for a bad argument, and where it stands above `@app.task` or on an async function or
    a generator. Else each run raises, and promises when Redis is away, what `RateLimiter.hit` does. A run that was
    admitted and then ends early (a killed worker, a conflict in `exclusive` below it) has used its place. So has, when
    its time comes, a reservation whose task does not come any more (revoked, expired).
    """
    if on_limit not in ("retry", "raise", "skip"):
        raise refuse("on_limit", on_limit, '"retry", "raise" or "skip"')
    spec = LimitSpec(rate, key, operation, cost, exempt)

    def decorate(function: Callable[P, R]) -> Callable[P, R | None]:
        refuse_tasks(function, "rate_limited")
        read = spec.reader_of(function)

        @_wraps(function)
        def limited(*args: P.args, **kwargs: P.kwargs) -> R | None:
            gov = current_gov()
            found = read(args, kwargs)
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
            setattr(limited, LIMIT, (read, operation))
        return limited

    return decorate


@overload
def exclusive(
    key: str | Callable[..., Id], *, ttl: float | None = ..., on_conflict: Literal["retry", "raise"] = ...
) -> Callable[[Callable[P, R]], Callable[P, R]]: ...
@overload
def exclusive(
    key: str | Callable[..., Id], *, ttl: float | None = ..., on_conflict: Literal["skip"]
) -> Callable[[Callable[P, R]], Callable[P, R | None]]: ...
def exclusive(
    key: str | Callable[..., Id], *, ttl: float | None = None, on_conflict: Literal["retry", "raise", "skip"] = "retry"
) -> Callable[[Callable[P, R]], Callable[P, R | None]]:
    """Run a task only while it holds the lock of its key. Put it between `@app.task` and the function.

    The lock is renewed while the task runs, and released when the function ends in any way: returned, raised, timed
    out, revoked with SIGTERM. If a worker process is killed (-9), its lock ends within the ttl, or as soon as a task on
    the same host asks for it. That may be the killed task, delivered again. A message that is delivered twice, after
    its visibility_timeout for example, does not get the lock from a task that still runs. DistributedLock and HeldLock
    say what a lock promises, also when Redis is away, and what no lock can promise.

    Args:
        key: the lock's name: a template of the task's argument names, "agent:{agent_id}"; a plain name, for all runs;
            or a callable that gets the task's arguments and returns the name.
        ttl: seconds of the lock's lease; None: lock_ttl.
        on_conflict: the reaction where somebody else holds the lock. "retry" publishes the message anew, to run in half
            a second, then in twice the time each time, up to half a minute, and a quarter more by chance. The task's
            `retries` and `max_retries` do not change. "raise" raises LockTimeout. "skip" ends the task with None, and
            counts it.

    Called directly, by another task or eagerly, "retry" raises LockTimeout: there is no message of its own to publish
    anew.

    With both, put `exclusive` above `rate_limited`: a conflict then takes nothing of the limit.

    Raises ValueError at decoration for a bad argument, and where it stands above `@app.task` or on an async function or
    a generator. A run raises ValueError where a callable gave no name, and LockLost where the lock was lost though the
    function succeeded. It raises LockUnavailable as DistributedLock.acquire does: where Redis has been away for less
    than a second, say. "retry" takes that for a conflict. It raises BackendError and ConfigurationError as acquire
    does.
    """
    check_key(key, "key", "agent:{agent_id}")
    if on_conflict not in ("retry", "raise", "skip"):
        raise refuse("on_conflict", on_conflict, '"retry", "raise" or "skip"')
    if ttl is not None:
        check_ttl(ttl)

    def decorate(function: Callable[P, R]) -> Callable[P, R | None]:
        refuse_tasks(function, "exclusive")
        name_of = name_of_calls(key, function)

        @_wraps(function)
        def alone(*args: P.args, **kwargs: P.kwargs) -> R | None:
            gov = current_gov()
            name = name_of(args, kwargs)
            mine = can_republish(current_task) and runs(current_task, function)
            try:
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


def refuse_tasks(function: Any, decorator: str) -> None:
    # Celery's proxy stands for a task that is not made yet: a look into it would finalize the app.
    if issubclass(type(function), (Proxy, Task)):
        raise ValueError(f"@{decorator} stands above @app.task; it must stand below it, next to the function")
    if not callable(function):
        raise refuse("the decorated object", function, "the function of a task")
    refuse_unless_plain(function, decorator)


def _wraps(function: Callable[..., Any]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """functools.wraps, with the signature where Celery looks for it to check arguments as they are published."""

    def wrap(wrapper: Callable[P, R]) -> Callable[P, R]:
        wrapper = functools.wraps(function)(wrapper)
        wrapper.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
        return wrapper

    return wrap
