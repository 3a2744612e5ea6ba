"""apply_reserved: tasks that are published when their limit has room for them."""

from __future__ import annotations

import inspect
from typing import Any

from celery.canvas import Signature
from celery.result import AsyncResult
from celery.utils import uuid

from ...errors import refuse
from ...limits.parked import Arrival
from ._gov import gov_of
from ._parking import HEADER, header_of, limit_of, lot_of, park, run_of

#: The attribute of a task's function that says how it is limited: its LimitSpec.reader_of, and its operation.
LIMIT = "__govredis_limit__"


def apply_reserved(signature: Signature) -> AsyncResult:
    """Publish a task of `rate_limited(on_limit="retry")` when its limit has room for it: so it is delivered once.

    Where there is room, the call takes it and publishes now. Else it reserves the first time at which there will be
    room, in the order of calls, and the message is parked until then: see rate_limited. A call that is exempt is
    published now. So is every call while Redis is away, or under limits whose windows are counters. Where Celery is
    eager, this is `apply_async`.

    Tasks run in the order of their reservations. Tasks that run late (no worker was free) move those behind them: these
    may be delivered a second time, and tasks that were moved together may run in another order.

    Args:
        signature: a call of one such task, `task.s("agent-1")`, with options of `apply_async` but for countdown and
            eta.

    Returns the task's result. Raises ValueError for anything else; TypeError for arguments that do not fit; the errors
    of `apply_async`, where it publishes now; BackendError.
    """
    found = None if signature.subtask_type else getattr(signature.type.run, LIMIT, None)
    if found is None:
        raise refuse("signature", signature, 'of one task that is rate_limited with on_limit="retry"')
    if signature.options.get("countdown") is not None or signature.options.get("eta") is not None:
        raise refuse("signature", signature, "without countdown and eta: the limit says when it runs")
    task, (read, operation) = signature.type, found
    message = signature.clone().set(task_id=signature.options.get("task_id") or uuid())
    gov = gov_of(task.app)
    lot = lot_of(task.app, gov)
    run = getattr(task, "_orig_run", task.run)  # autoretry_for wraps a task's method in a plain function
    args = (task, *message.args) if inspect.ismethod(run) else tuple(message.args)
    call = read(args, message.kwargs)
    if call is None or lot is None or task.app.conf.task_always_eager:
        return message.apply_async()
    identity, rate, cost = call
    arrival = Arrival(f"{message.id}:{run_of(message.options.get('retries') or 0, 0)}")
    result, reserved = gov.limits.hit_or_reserve(
        identity, rate, reservation=arrival.run, operation=operation, cost=cost, admit=False
    )
    if result.allowed or not reserved:
        return message.apply_async()
    if park(gov, lot, arrival, result, message, limit_of(identity, rate, operation, cost), {}):
        return task.AsyncResult(message.id)
    # Redis went away, and may have parked it all the same: workers run the message that arrives first.
    headers: dict[str, Any] = message.options.get("headers") or {}
    return message.apply_async(headers={**headers, HEADER: header_of(1, arrival)})
