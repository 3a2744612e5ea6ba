"""`instrument`: a span for each operation, by OpenTelemetry's own SDK."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import SpanKind, StatusCode
from support import POSTGRES_AWAY, REDIS_AWAY

from govredis import BackendUnavailable, GovRedis, LockTimeout, RateLimitExceeded, SessionAlreadyBound, __version__
from govredis.contrib.opentelemetry import _place, instrument
from govredis.testing.servers import PostgresServer, RedisServer

pytestmark = pytest.mark.one_redis

MakeGov = Callable[..., GovRedis]


class Traces:
    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = self.provider.get_tracer("app")

    def taken(self) -> list[ReadableSpan]:
        found = list(self.exporter.get_finished_spans())
        self.exporter.clear()
        return found


@pytest.fixture
def traces() -> Iterator[Traces]:
    made = Traces()
    end = instrument(made.provider)
    yield made
    end()


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2].partition("/")[0])


def test_a_span_has_the_attributes_of_a_database_client(
    gov: GovRedis, redis_server: RedisServer, postgres_server: PostgresServer, traces: Traces
) -> None:
    gov.limits.hit("tenant-7", "9/hour", operation="kg_store")
    (hit,) = traces.taken()
    assert hit.name == "limits.hit kg_store"
    assert hit.kind is SpanKind.CLIENT
    assert hit.attributes == {
        "db.system.name": "redis",
        "db.operation.name": "limits.hit",
        "server.address": "127.0.0.1",
        "server.port": port_of(redis_server.url),
        "govredis.backend": "redis",
        "govredis.degraded": False,
        "govredis.label": "kg_store",
    }
    assert hit.status.status_code is StatusCode.UNSET
    assert hit.instrumentation_scope is not None
    assert (hit.instrumentation_scope.name, hit.instrumentation_scope.version) == ("govredis", __version__)
    gov.agents.get("tenant-7")
    (got,) = traces.taken()
    assert got.name == "agents.get"
    assert got.attributes == {
        "db.system.name": "postgresql",
        "db.operation.name": "agents.get",
        "db.namespace": "postgres",
        "server.address": "127.0.0.1",
        "server.port": port_of(postgres_server.url),
        "govredis.backend": "postgres",
        "govredis.degraded": False,
    }


def test_a_span_is_the_child_of_its_callers_and_lasts_as_long_as_the_operation(gov: GovRedis, traces: Traces) -> None:
    with traces.tracer.start_as_current_span("request"):
        gov.metadata.get_or_load("a", lambda i: gov.limits.hit(i, "9/hour").remaining)
        with gov.locks.acquire("a"), traces.tracer.start_as_current_span("body"):
            gov.sessions.get("s")
    spans = {span.name: span for span in traces.taken()}
    parents = {span.parent.span_id: [] for span in spans.values() if span.parent is not None}  # type: ignore[var-annotated]
    for name, span in spans.items():
        if span.parent is not None:
            parents[span.parent.span_id].append(name)
    named = {span.context.span_id: name for name, span in spans.items() if span.context is not None}
    assert {named[parent]: sorted(children) for parent, children in parents.items()} == {
        "request": sorted(
            ["body", "limits.hit default", "metadata.get_or_load agent_meta", "locks.acquire", "locks.release"]
        ),
        "body": ["sessions.get"],
    }

    def times(name: str) -> tuple[int, int]:
        start, end = spans[name].start_time, spans[name].end_time
        assert start is not None
        assert end is not None
        return start, end

    within, around = times("limits.hit default"), times("metadata.get_or_load agent_meta")
    rounding = 2_000  # of a time in a float, in nanoseconds
    assert around[0] - rounding <= within[0] < within[1] <= around[1] + rounding
    assert times("locks.acquire")[1] <= times("body")[0] + rounding, "the body is no part of it"


def test_an_error_is_a_status_and_a_refusal_is_an_answer(gov: GovRedis, make_gov: MakeGov, traces: Traces) -> None:
    def span_of(call: Callable[[], object], error: type[BaseException]) -> ReadableSpan:
        traces.taken()
        with pytest.raises(error):
            call()
        (span,) = traces.taken()
        assert span.attributes is not None
        assert span.events == ()
        assert span.status.description is None
        return span

    gov.limits.hit("secret-id", "1/hour")
    gov.sessions.bind("secret-id", "a")
    away = make_gov(redis_enabled=False, database_url=POSTGRES_AWAY)
    with gov.locks.acquire("secret-id"):
        refusals = [
            span_of(lambda: gov.limits.require("secret-id", "1/hour"), RateLimitExceeded),
            span_of(lambda: gov.locks.acquire("secret-id", timeout=0), LockTimeout),
            span_of(lambda: gov.sessions.bind("secret-id", "b", if_absent=True), SessionAlreadyBound),
        ]
    names = [(span.attributes or {})["govredis.refusal"] for span in refusals]
    assert names == ["RateLimitExceeded", "LockTimeout", "SessionAlreadyBound"]
    assert {span.status.status_code for span in refusals} == {StatusCode.UNSET}
    errors = [
        span_of(lambda: away.agents.get("secret-id"), BackendUnavailable),
        span_of(lambda: gov.sessions.get("secret-id{"), ValueError),
    ]
    assert [(span.attributes or {})["error.type"] for span in errors] == ["BackendUnavailable", "ValueError"]
    assert {span.status.status_code for span in errors} == {StatusCode.ERROR}
    assert [span.kind for span in errors] == [SpanKind.CLIENT, SpanKind.INTERNAL]
    for span in (*refusals, *errors):
        assert "secret" not in span.to_json()


def test_a_fallback_shows(make_gov: MakeGov, postgres_server: PostgresServer, traces: Traces) -> None:
    make_gov(redis_url=REDIS_AWAY, database_url=postgres_server.url).limits.hit("a", "9/hour")
    make_gov(redis_url=REDIS_AWAY).limits.hit("a", "9/hour")
    rows, memory = traces.taken()
    for span, backend in ((rows, "postgres"), (memory, "local")):
        assert span.attributes is not None
        assert (span.attributes["govredis.backend"], span.attributes["govredis.degraded"]) == (backend, True)
    assert "db.system.name" not in (memory.attributes or {})
    assert (rows.kind, memory.kind) == (SpanKind.CLIENT, SpanKind.INTERNAL)


def test_a_trace_that_is_not_sampled_costs_no_error(gov: GovRedis) -> None:
    end = instrument(TracerProvider(sampler=ALWAYS_OFF))
    with pytest.raises(ValueError, match="id is"):
        gov.sessions.get("{")
    gov.sessions.get("s")
    end()
    assert gov.counters.get("instrumentation.errors") == 0


@pytest.mark.parametrize(
    ("server", "place"),
    [
        ("Redis at /run/redis.sock", {"server.address": "/run/redis.sock"}),
        ("Redis at ::1:6380", {"server.address": "::1", "server.port": 6380}),
        ("PostgreSQL at a:1,b:2/shop", {"server.address": "a:1,b:2", "db.namespace": "shop"}),
        (
            "PostgreSQL at /run/postgresql:5432/shop",
            {"server.address": "/run/postgresql", "server.port": 5432, "db.namespace": "shop"},
        ),
        ("Redis 'mymaster' of Sentinels", {}),
        ("PostgreSQL at localhost:5432/", {"server.address": "localhost", "server.port": 5432}),
    ],
)
def test_the_places_of_servers(server: str, place: dict[str, object]) -> None:
    assert _place(server) == place
