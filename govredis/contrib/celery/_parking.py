"""What rate_limited refuses: booked in the limit, and parked in Redis until a worker publishes it when it is due."""

# mypy: allow-untyped-calls
# kombu says that it has types; most of it has none.
from __future__ import annotations

import base64
import os
import time
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from celery import Celery, Task
from celery.canvas import Signature
from celery.exceptions import Ignore, Retry
from kombu.entity import Exchange, Queue
from kombu.messaging import Producer
from kombu.serialization import dumps
from kombu.utils import json

from ...api import GovRedis
from ...errors import BackendError, BackendUnavailable, RateLimitExceeded
from ...limits import RateLimitResult
from ...limits.parked import Arrival, ParkingLot
from ...limits.rates import Limit, Rate, parse_rate
from ._republish import jittered, republish, signature_of

#: The header that tells a parked message from others of the same run: "{times parked}:{publication}:{run}", the run
#: without the task's id.
HEADER = "govredis_parked"

#: Seconds that a task which was parked waits in its process for its turn, where it came a little before it: because one
#: before it was late. To park it again would cost a delivery.
_PATIENCE = 0.5

#: Of each app, which broker it publishes to, without credentials.
_brokers: WeakKeyDictionary[Celery, str] = WeakKeyDictionary()


def admit_or_park(gov: GovRedis, task: Task, identity: Any, rate: Rate, operation: str, cost: int = 1) -> None:
    """Return where the running task is admitted. End it where it is not: it runs again when it is due."""
    arrival, lot = arrival_of(task.request), lot_of(task.app, gov)
    if lot is not None:
        try:
            if not lot.arrived(arrival):
                gov.counters.add("celery.duplicates")
                raise Ignore(f"{task.name} of this id is parked since, or was begun by another copy of this message")
        except BackendUnavailable:
            pass  # nobody can tell: it is worked on
    patience = _PATIENCE if arrival.times else 0.0  # a first delivery never waits: there may be many
    while True:
        result, booked = gov.limits.hit_or_book(
            identity, rate, booking=arrival.run, operation=operation, cost=cost, patience=patience
        )
        if result.allowed:
            return
        if not booked or result.retry_after > patience:
            break
        patience -= max(result.retry_after, 0.001)
        time.sleep(max(result.retry_after, 0.001))
    gov.counters.add("celery.limited.retry")
    exceeded = RateLimitExceeded(result)
    if booked and lot is not None:
        message = signature_of(task)
        # Celery would make one without a parent its own.
        orphan = {"parent_id": task.request.parent_id}
        if park(gov, lot, arrival, result, message, limit_of(identity, rate, operation, cost), orphan):
            raise Retry(exc=exceeded, when=result.retry_after, sig=message)
        # Redis went away, and may have it all the same: of the two, that which arrives first is worked on.
        republish(task, exceeded, jittered(result.retry_after), {HEADER: header_of(arrival.times + 1, arrival)})
    republish(task, exceeded, jittered(result.retry_after))


def lot_of(app: Celery, gov: GovRedis) -> ParkingLot | None:
    """Where that is parked which is for the broker of an app. None: Redis is disabled."""
    if gov._parked is None:
        return None
    broker = _brokers.get(app)
    if broker is None:
        with app.connection_for_write() as connection:
            info = connection.info()
        path = str(info["virtual_host"]).strip("/") or ("0" if info["transport"] == "redis" else "")
        broker = _brokers[app] = f"{info['transport']}://{info['hostname']}:{info['port']}/{path}"
    return gov._parked.lot(broker)


def park(
    gov: GovRedis,
    lot: ParkingLot,
    arrival: Arrival,
    result: RateLimitResult,
    message: Signature,
    limit: Mapping[str, Any],
    headers: Mapping[str, Any],
) -> bool:
    """Park what `message` would publish, for as long as the limit says. False: it could not be.

    Args:
        limit: what `hit_or_book` is asked.
        headers: put over those that the message would have.
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
    """What the running task's message says of itself."""
    run = run_of(request.retries, request.replaced_task_nesting)
    again = bool((request.delivery_info or {}).get("redelivered"))
    times, publication, of = [*str((request.headers or {}).get(HEADER, "")).split(":"), "", ""][:3]
    if of != run or not times.isdigit():  # that of an earlier try is none of this one's
        times, publication = "0", ""
    return Arrival(f"{request.id}:{run}", int(times), publication, again)


def run_of(retries: int, nesting: int) -> str:
    """Which of the runs of one id: each retry is one, and each task that replaces itself."""
    return f"{retries}.{nesting}"


def header_of(times: int, arrival: Arrival) -> str:
    """HEADER of a publication of what has been parked so often."""
    return _header(times, arrival.run.rpartition(":")[2])


def _header(times: int, run: str) -> str:
    return f"{times}:{os.urandom(6).hex()}:{run}"


class _Capture(Producer):
    """Keeps the first message that it is to publish: the task's. Connects to nothing."""

    captured: tuple[Any, dict[str, Any]] | None = None

    def publish(self, body: Any, **options: Any) -> None:  # type: ignore[override]
        if self.captured is None:  # a second one would be the event that says it was sent
            self.captured = body, options


def limit_of(identity: str, rate: Rate, operation: str, cost: int) -> dict[str, Any]:
    """What `hit_or_book` is asked, as JSON has it."""
    limits = [[limit.count, limit.window] for limit in parse_rate(rate)]
    return {"identity": identity, "rate": limits, "operation": operation, "cost": cost}


def _encode(message: Signature, arrival: Arrival, limit: Mapping[str, Any], headers: Mapping[str, Any]) -> bytes:
    """What the message would have published, as JSON. Raises EncodeError as that would have."""
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
    """What was parked."""
    return dict(json.loads(message))


def still_to_wait(gov: GovRedis, parked: Mapping[str, Any], patience: float) -> float:
    """Seconds before it has its turn, because others were late; 0 if it has, or will within `patience`.

    Its place is kept for it. Without Redis, it has its turn.
    """
    limit = dict(parked["limit"])
    rate = [Limit(*pair) for pair in limit.pop("rate")]
    booking = f"{parked['id']}:{parked['run']}"
    result, booked = gov.limits.hit_or_book(rate=rate, booking=booking, patience=patience, admit=False, **limit)
    return result.retry_after if booked and result.retry_after > patience else 0.0


def to_publish(app: Celery, parked: Mapping[str, Any]) -> tuple[bytes, dict[str, Any]]:
    """Another publication of what was parked: what a Producer is to publish. Raises KeyError for an unknown queue."""
    options = dict(parked["options"])
    queues = app.amqp.queues
    declare = [queues[name] for name in options["declare"]]
    if options["exchange"]:
        # Transports that are none of AMQP know of an exchange what this process has declared.
        declare += [queue for queue in queues.values() if queue.exchange.name == options["exchange"]]
    options["declare"] = declare
    options["headers"] = {**options["headers"], HEADER: _header(parked["times"], parked["run"])}
    return base64.b64decode(parked["body"]), options
