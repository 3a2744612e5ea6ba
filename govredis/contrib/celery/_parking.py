"""Tasks that rate_limited refuses: parked in Redis until the reserved time, when a worker publishes them."""

# mypy: allow-untyped-calls
# kombu says that it has types; most of it has none.
from __future__ import annotations

import base64
import os
import time
from collections.abc import Mapping
from typing import Any

from celery import Celery, Task
from celery.canvas import Signature
from celery.exceptions import Ignore, Retry
from kombu.entity import Exchange, Queue
from kombu.messaging import Producer
from kombu.serialization import dumps
from kombu.utils import json

from ..._pool import PoolExhausted
from ...api import GovRedis
from ...errors import BackendError, BackendUnavailable, RateLimitExceeded
from ...limits import RateLimitResult
from ...limits.parked import Arrival, ParkingLot
from ...limits.rates import Limit, Rate, parse_rate
from ._broker import broker_of
from ._republish import encoding, jittered, republish, signature_of

#: The header that tells a parked message from others of the same run: "{times parked}:{publication}:{run}", where the
#: run comes without the task's id.
HEADER = "govredis_parked"

#: Seconds that a task which was parked waits in its process, where it comes a little before its turn because a task
#: before it was late. Parking it again would cost a delivery.
_PATIENCE = 0.5

#: Seconds after which a task is tried again for which no connection was free.
_CROWDED = 1.0


def admit_or_park(gov: GovRedis, task: Task, identity: Any, rate: Rate, operation: str, cost: int = 1) -> None:
    """Return where the running task is admitted. Else end it, to run again when it is due.

    A task for which no connection was free runs again in a second.
    """
    try:
        _admit_or_park(gov, task, identity, rate, operation, cost)
    except PoolExhausted as crowded:
        gov.counters.add("celery.limited.retry")
        republish(task, crowded, jittered(_CROWDED))


def _admit_or_park(gov: GovRedis, task: Task, identity: Any, rate: Rate, operation: str, cost: int) -> None:
    arrival, lot = arrival_of(task.request), lot_of(task.app, gov)
    if lot is not None:
        try:
            if not lot.arrived(arrival):
                gov.counters.add("celery.duplicates")
                raise Ignore(f"{task.name} of this id was parked since, or another copy of this message began it")
        except PoolExhausted:
            raise
        except BackendUnavailable:
            pass  # no server says that it is a duplicate: it is worked on
    patience = _PATIENCE if arrival.times else 0.0  # a first delivery never waits: there may be many
    while True:
        result, reserved = gov.limits.hit_or_reserve(
            identity, rate, reservation=arrival.run, operation=operation, cost=cost, patience=patience
        )
        if result.allowed:
            return
        wait = max(result.retry_after, 0.001)
        if not reserved or not wait <= patience:
            break
        patience -= wait
        time.sleep(wait)
    gov.counters.add("celery.limited.retry")
    exceeded = RateLimitExceeded(result)
    if reserved and lot is not None:
        message = signature_of(task)
        # Celery would make the running task the parent of a message without a parent.
        orphan = {"parent_id": task.request.parent_id}
        if park(gov, lot, arrival, result, message, limit_of(identity, rate, operation, cost), orphan):
            raise Retry(exc=exceeded, when=result.retry_after, sig=message)
        # Redis went away, and may have parked it all the same: workers run the message that arrives first.
        republish(task, exceeded, jittered(result.retry_after), {HEADER: header_of(arrival.times + 1, arrival)})
    republish(task, exceeded, jittered(result.retry_after))


def lot_of(app: Celery, gov: GovRedis) -> ParkingLot | None:
    """The parking lot for the broker of an app. None: Redis is disabled."""
    if gov.internal.parked is None:
        return None
    return gov.internal.parked.lot(broker_of(app))


def park(
    gov: GovRedis,
    lot: ParkingLot,
    arrival: Arrival,
    result: RateLimitResult,
    message: Signature,
    limit: Mapping[str, Any],
    headers: Mapping[str, Any],
) -> bool:
    """Park what `message` would publish, for as long as the limit says. Returns whether it could be parked.

    Args:
        limit: arguments of `RateLimiter.hit_or_reserve`; see limit_of.
        headers: these replace headers of the message.
    """
    encoded = _encode(message, arrival, limit, headers)
    try:
        lot.park(arrival, result.retry_after, encoded)
    except BackendError:
        gov.counters.add("celery.unparked")
        return False
    gov.counters.add("celery.parked")
    return True


def arrival_of(request: Any) -> Arrival:
    """The identity of the running task's message."""
    run = run_of(request.retries, request.replaced_task_nesting)
    again = bool((request.delivery_info or {}).get("redelivered"))
    times, publication, of = [*str((request.headers or {}).get(HEADER, "")).split(":"), "", ""][:3]
    if of != run or not times.isdigit():  # the header belongs to an earlier try
        times, publication = "0", ""
    return Arrival(f"{request.id}:{run}", int(times), publication, again)


def run_of(retries: int, nesting: int) -> str:
    """Which of the runs of an id this is: each retry is another run, and so is each task that replaces itself."""
    return f"{retries}.{nesting}"


def header_of(times: int, arrival: Arrival) -> str:
    """HEADER of a new publication of a message that was parked so often."""
    return _header(times, arrival.run.rpartition(":")[2])


def _header(times: int, run: str) -> str:
    return f"{times}:{os.urandom(6).hex()}:{run}"


class _Capture(Producer):
    """Keeps the first message that it should publish: the task's. Connects to nothing."""

    captured: tuple[Any, dict[str, Any]] | None = None

    def publish(self, body: Any, **options: Any) -> None:  # type: ignore[override]
        if self.captured is None:  # a second message would be the event that says it was sent
            self.captured = body, options


def limit_of(identity: str, rate: Rate, operation: str, cost: int) -> dict[str, Any]:
    """Arguments of `RateLimiter.hit_or_reserve`, in a form that JSON has."""
    limits = [[limit.count, limit.window] for limit in parse_rate(rate)]
    return {"identity": identity, "rate": limits, "operation": operation, "cost": cost}


def _encode(message: Signature, arrival: Arrival, limit: Mapping[str, Any], headers: Mapping[str, Any]) -> bytes:
    """The publication of the message, as JSON. Raises EncodeError where publishing would."""
    with encoding():
        with message.app.connection_for_write() as connection:
            capture = _Capture(connection, auto_declare=False)
            message.apply_async(producer=capture, retry=False)
        assert capture.captured is not None
        body, options = capture.captured
        content_type, content_encoding, encoded = dumps(body, serializer=options.pop("serializer"))
    if isinstance(encoded, str):
        encoded = encoded.encode(content_encoding)
    for ours in ("retry", "retry_policy", "timeout", "confirm_timeout"):
        options.pop(ours, None)
    exchange = options["exchange"]
    options["exchange"] = exchange.name if isinstance(exchange, Exchange) else exchange
    options["declare"] = [queue.name for queue in options["declare"] or () if isinstance(queue, Queue)]
    options["headers"].update(headers)
    options.update(content_type=content_type, content_encoding=content_encoding)
    parked = {
        "id": options["headers"]["id"],
        "task": options["headers"]["task"],
        "times": arrival.times + 1,
        "run": arrival.run.rpartition(":")[2],
        "limit": limit,
        "body": base64.b64encode(encoded).decode(),
        "options": options,
    }
    return bytes(json.dumps(parked), "utf-8")


def decode(message: bytes) -> dict[str, Any]:
    """The message that `park` has encoded."""
    return dict(json.loads(message))


def still_to_wait(gov: GovRedis, parked: Mapping[str, Any], patience: float) -> float:
    """Seconds before its turn, because others were late; 0 if its turn has come, or will come within `patience`.

    It keeps its place. Without Redis, its turn has come.
    """
    limit = dict(parked["limit"])
    rate = [Limit(*pair) for pair in limit.pop("rate")]
    reservation = f"{parked['id']}:{parked['run']}"
    result, reserved = gov.limits.hit_or_reserve(
        rate=rate, reservation=reservation, patience=patience, admit=False, **limit
    )
    return result.retry_after if reserved and result.retry_after > patience else 0.0


def to_publish(app: Celery, parked: Mapping[str, Any]) -> tuple[bytes, dict[str, Any]]:
    """The body and the options with which a Producer publishes a parked message once more.

    Raises KeyError for an unknown queue, and all kinds of errors for a message that `park` has not encoded.
    """
    body = base64.b64decode(parked["body"], validate=True)
    if not body:
        raise ValueError("the message has no body")  # a worker that gets it stops
    options = dict(parked["options"])
    queues = app.amqp.queues
    declare = [queues[name] for name in options["declare"]]
    if options["exchange"]:
        # Transports other than AMQP know only the queues of an exchange that this process has declared.
        declare += [queue for queue in queues.values() if queue.exchange.name == options["exchange"]]
    options["declare"] = declare
    options["headers"] = {**options["headers"], HEADER: _header(parked["times"], parked["run"])}
    return body, options
