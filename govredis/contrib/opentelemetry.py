"""OpenTelemetry: a span for each operation, by the semantic conventions of database clients."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from opentelemetry.trace import SpanKind, Status, StatusCode, TracerProvider, get_tracer

from .._version import __version__
from ..errors import LockTimeout, RateLimitExceeded, SessionAlreadyBound, SessionChanged
from ..instrumentation import Operation, on_operation

__all__ = ["instrument"]

_SCHEMA = "https://opentelemetry.io/schemas/1.44.0"
_SYSTEMS = {"redis": "redis", "postgres": "postgresql"}
#: Somebody else was first: an answer, and no fault.
_REFUSALS = (RateLimitExceeded, LockTimeout, SessionAlreadyBound, SessionChanged)


def instrument(tracer_provider: TracerProvider | None = None) -> Callable[[], None]:
    """Make a span of each operation of this process, of all its GovRedis. Returns a function that ends it.

    Call it once. A span is named after the operation and its label, "limits.hit kg_store". It is a child of the
    caller's span, and begins and ends with the operation. Spans that a loader or another instrumentation makes
    meanwhile stand beside it: it is made when the operation has ended.

    The attributes are `db.system.name`, `db.operation.name`, `server.address`, `server.port`, `db.namespace` (of
    PostgreSQL), `error.type`, and of our own `govredis.backend`, `govredis.degraded`, `govredis.label` and
    `govredis.refusal`. An error sets the span's status. A refusal (RateLimitExceeded, LockTimeout, SessionAlreadyBound,
    SessionChanged) is an answer: it has its name in `govredis.refusal`, and no status. There are no ids, keys, values
    or texts of errors in a span. An operation that asked no server is no call of a database: its span is internal.

    Args:
        tracer_provider: None: the global one.
    """
    tracer = get_tracer("govredis", __version__, tracer_provider, _SCHEMA)

    def trace(operation: Operation) -> None:
        started = int(operation.started * 1e9)
        asked = operation.server is not None
        span = tracer.start_span(
            operation.name if operation.label is None else f"{operation.name} {operation.label}",
            kind=SpanKind.CLIENT if asked else SpanKind.INTERNAL,
            attributes=_attributes(operation),
            start_time=started,
        )
        error = operation.error
        if error is not None and span.is_recording():
            name = type(error).__qualname__
            if isinstance(error, _REFUSALS):
                span.set_attribute("govredis.refusal", name)
            else:
                span.set_attribute("error.type", name)
                span.set_status(Status(StatusCode.ERROR))
        span.end(started + int(operation.seconds * 1e9))

    return on_operation(trace)


def _attributes(operation: Operation) -> dict[str, str | int | bool]:
    attributes: dict[str, str | int | bool] = {
        "db.operation.name": operation.name,
        "govredis.backend": operation.backend,
        "govredis.degraded": operation.degraded,
    }
    if operation.label is not None:
        attributes["govredis.label"] = operation.label
    if operation.server is not None:
        attributes["db.system.name"] = _SYSTEMS[operation.backend]
        attributes.update(_place(operation.server))
    return attributes


@lru_cache(64)
def _place(server: str) -> dict[str, str | int]:
    """The address, the port and the database in the name of a server, as far as it has each."""
    where: dict[str, str | int] = {}
    system, _, place = server.partition(" at ")
    if system == "PostgreSQL":
        place, _, database = place.rpartition("/")
        if database:
            where["db.namespace"] = database
    if not place:  # Sentinels know it
        return where
    address, _, port = place.rpartition(":")
    if port.isdecimal() and "," not in place:
        return where | {"server.address": address, "server.port": int(port)}
    return where | {"server.address": place}
