"""Events of transactions: neither lost nor sent for a rollback, once, whatever fails."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psycopg2
import pytest
from celery import Celery
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from support import PATIENCE, Background, eventually, in_child, in_threads, redis_of
from test_events import kept, payloads, twice

from govredis import BackendError, BackendUnavailable, ConfigurationError, GovRedis
from govredis.contrib.celery import init_celery
from govredis.events import relay as relay_module
from govredis.events.relay import EventRelay
from govredis.testing.servers import PostgresServer, RedisServer

pytestmark = pytest.mark.one_redis

MakeGov = Callable[..., GovRedis]


@pytest.fixture
def gov(make_gov: MakeGov, redis_server: RedisServer, postgres_server: PostgresServer) -> GovRedis:
    return by_hand(make_gov(redis_url=redis_server.url, database_url=postgres_server.url))


def by_hand(gov: GovRedis) -> GovRedis:
    """Nothing is taken along but by `deliver`."""
    assert gov.events.relay is not None
    gov.events.relay._ask = lambda tries: None  # type: ignore[method-assign]
    return gov


@pytest.fixture
def connect(postgres_server: PostgresServer) -> Iterator[Callable[[], Any]]:
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(contextlib.closing(psycopg2.connect(postgres_server.url)))


@pytest.fixture
def connection(connect: Callable[[], Any]) -> Any:
    return connect()


def waiting(gov: GovRedis) -> int:
    count: int = gov.postgres.fetch("SELECT count(*) FROM govredis_events")[0][0]
    return count


def committed(gov: GovRedis, connection: Any, *payloads_: Any, topic: str = "order.paid") -> list[str]:
    ids = [gov.events.publish(topic, payload, connection) for payload in payloads_]
    connection.commit()
    return ids


# -- a transaction's event -------------------------------------------------------------------------------------------


def test_a_committed_event_comes_as_it_was_published(gov: GovRedis, connection: Any) -> None:
    payload = {"text": "é\x00\ud800", "n": [1, None]}
    identity = gov.events.publish("order.paid", payload, connection, entity=7)
    assert gov.events.deliver() == 0
    assert kept(gov, "order") == []
    connection.commit()
    assert gov.events.deliver() == 1
    (event,) = kept(gov, "order")
    assert (event.id, event.topic, event.payload, event.entity) == (identity, "order.paid", payload, "7")
    ((age,),) = gov.postgres.fetch("SELECT extract(epoch FROM clock_timestamp() - %s)", (event.at,))
    assert 0 <= age < 600
    assert (waiting(gov), gov.events.deliver()) == (0, 0)


def test_a_rollback_sends_nothing(gov: GovRedis, connection: Any) -> None:
    gov.events.publish("order.paid", 1, connection)
    connection.rollback()
    committed(gov, connection, 2)
    gov.events.deliver()
    assert payloads(kept(gov, "order")) == [2]


def test_a_row_that_commits_late_is_not_skipped(gov: GovRedis, connect: Callable[[], Any]) -> None:
    """Numbers do not commit in order."""
    early, late = connect(), connect()
    gov.events.publish("order", "late", late)
    committed(gov, early, "early")
    assert gov.events.deliver() == 1
    late.commit()
    assert gov.events.deliver() == 1
    assert payloads(kept(gov, "order")) == ["early", "late"]


def test_many_events_keep_their_order_over_batches(gov: GovRedis, connection: Any) -> None:
    committed(gov, connection, *range(250))
    committed(gov, connection, "x", topic="other")
    assert gov.events.deliver() == 251
    assert payloads(kept(gov, "order")) == list(range(250))
    assert payloads(kept(gov, "other")) == ["x"]


def test_large_events_are_sent_some_at_a_time(gov: GovRedis, connection: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_module, "_BYTES_AT_ONCE", 1000)
    large = [str(n) * 600 for n in range(5)]
    committed(gov, connection, *large)
    assert gov.events.deliver() == 5
    assert payloads(kept(gov, "order")) == large


def test_it_needs_a_transaction_and_a_table(
    gov: GovRedis, make_gov: MakeGov, redis_server: RedisServer, connection: Any, postgres_server: PostgresServer
) -> None:
    for bad in "x", object(), 7:
        with pytest.raises(ValueError, match=r"^connection is .*; it must be a psycopg2 connection"):
            gov.events.publish("order", 1, bad)
    connection.autocommit = True
    with pytest.raises(ValueError, match="autocommit"):
        gov.events.publish("order", 1, connection)
    connection.autocommit = False
    with pytest.raises(ConfigurationError, match="GOVREDIS_DATABASE_URL is not set"):
        make_gov(redis_url=redis_server.url).events.publish("order", 1, connection)
    elsewhere = make_gov(redis_url=redis_server.url, database_url=postgres_server.url, schema="nowhere")
    with pytest.raises(ConfigurationError, match="run `govredis migrate`"):
        elsewhere.events.publish("order", 1, connection)
    with pytest.raises(ConfigurationError, match="govredis migrate"):
        elsewhere.events.deliver()
    with pytest.raises(ValueError, match=r"^topic is "):
        gov.events.publish("a b", 1, connection)


def test_a_role_without_the_right_is_told(gov: GovRedis, connection: Any) -> None:
    with connection, connection.cursor() as cursor:
        cursor.execute("DROP ROLE IF EXISTS clerk; CREATE ROLE clerk")
    with connection.cursor() as cursor:
        cursor.execute("SET ROLE clerk")
    with pytest.raises(ConfigurationError, match=r'EXECUTE ON FUNCTION "public"\.govredis_event_add, to it'):
        gov.events.publish("order", 1, connection)
    connection.rollback()
    with connection, connection.cursor() as cursor:
        cursor.execute("GRANT EXECUTE ON FUNCTION govredis_event_add TO clerk; SET LOCAL ROLE clerk")
        gov.events.publish("order", 1, connection)
    assert gov.events.deliver() == 1
    with connection, connection.cursor() as cursor:
        cursor.execute("RESET ROLE; DROP OWNED BY clerk; DROP ROLE clerk")


@pytest.mark.parametrize(
    "bad", ["'a b', '', '1'", "'*', '', '1'", "'a', '', repeat('x', 65537)", "repeat('a', 201), '', '1'"]
)
def test_sql_may_publish_too_and_a_bad_event_is_refused_there(gov: GovRedis, connection: Any, bad: str) -> None:
    with connection.cursor() as cursor, pytest.raises(psycopg2.DataError, match="a topic is words"):
        cursor.execute(f"SELECT govredis_event_add('', {bad})")
    connection.rollback()
    with connection, connection.cursor() as cursor:
        cursor.execute("SELECT govredis_event_add('', 'order.paid', '7', '{\"n\": 1}')")
    gov.events.deliver()
    assert [(e.entity, e.payload) for e in kept(gov, "order")] == [("7", {"n": 1})]


def test_a_prefix_takes_its_own_rows(
    gov: GovRedis, make_gov: MakeGov, redis_server: RedisServer, postgres_server: PostgresServer, connection: Any
) -> None:
    other = by_hand(make_gov(redis_url=redis_server.url, database_url=postgres_server.url, key_prefix="app:"))
    committed(other, connection, "theirs")
    committed(gov, connection, "ours")
    assert (gov.events.deliver(), other.events.deliver()) == (1, 1)
    assert (payloads(kept(gov, "order")), payloads(kept(other, "order"))) == (["ours"], ["theirs"])


def test_old_rows_and_too_many_go(gov: GovRedis, connection: Any) -> None:
    committed(gov, connection, 1, 2, 3)
    with connection, connection.cursor() as cursor:
        cursor.execute("UPDATE govredis_events SET at = at - interval '8 days' WHERE payload = '1'")
        cursor.execute("SELECT govredis_events_clean(10)")
        assert cursor.fetchone() == (1,)
        cursor.execute(
            "INSERT INTO govredis_events (number, stream, topic, entity, payload) OVERRIDING SYSTEM VALUE"
            " SELECT number + 1000001, stream, topic, entity, '4' FROM govredis_events WHERE payload = '2'"
        )
        cursor.execute("SELECT govredis_events_clean(10)")
        assert cursor.fetchone() == (1,)
    gov.events.deliver()
    assert payloads(kept(gov, "order")) == [3, 4]


# -- failures --------------------------------------------------------------------------------------------------------


def test_commands_that_arrive_twice_publish_once(gov: GovRedis, connection: Any) -> None:
    committed(gov, connection, *range(150))
    twice(gov)
    assert gov.events.deliver() == 150
    assert payloads(kept(gov, "order")) == list(range(150))


class Dies(Exception):
    pass


def dying(relay: EventRelay, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Its call of PostgreSQL or Redis of this number is its last."""
    calls = itertools.count()

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            n = next(calls)
            if n == call:
                raise Dies
            return function(*args, **options)

        return run

    monkeypatch.setattr(relay._postgres, "_execute", counted(relay._postgres._execute))
    for node in relay._redis.nodes():
        monkeypatch.setattr(node, "_round_trip", counted(node._round_trip))


def test_a_relay_that_dies_anywhere_publishes_each_event_once(
    gov: GovRedis, connection: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gov.events.relay is not None
    monkeypatch.setattr(relay_module, "_READ", relay_module._READ.replace("LIMIT 100", "LIMIT 2"))
    expected = []
    for call in range(40):
        mine = [(call, n) for n in range(5)]
        expected += [list(one) for one in mine]
        committed(gov, connection, *mine)
        with monkeypatch.context() as patched:
            dying(gov.events.relay, patched, call)
            with contextlib.suppress(Dies):
                gov.events.deliver()
                assert call > 20, "it made fewer calls than that"
        if call % 3 == 0:  # another transaction, before the next relay
            committed(gov, connection, [call, "more"])
            expected.append([call, "more"])
        # PostgreSQL may hold the dead relay's lock until it notices: then a run does nothing.
        eventually(lambda: gov.events.deliver() >= 0 and waiting(gov) == 0)
        assert payloads(kept(gov, "order")) == expected
    assert waiting(gov) == 0


def test_a_script_that_comes_late_does_nothing(gov: GovRedis, connection: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relay stopped; PostgreSQL ended its transaction; another relay has run."""
    committed(gov, connection, 1)
    client, held = redis_of(gov), []
    run = client.run

    def stops(*args: Any) -> Any:
        held.append(args)
        raise BackendUnavailable("x")

    with monkeypatch.context() as patched:
        patched.setattr(client, "run", stops)
        with pytest.raises(BackendUnavailable):
            gov.events.deliver()
    gov.events.deliver()
    assert run(*held[0]) == 0
    committed(gov, connection, 2)
    gov.events.deliver()
    assert payloads(kept(gov, "order")) == [1, 2]


def test_a_script_that_comes_before_the_next_relays_is_found(
    gov: GovRedis, connection: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other relay has read the token already."""
    committed(gov, connection, 1)
    client, held = redis_of(gov), []
    run = client.run

    def stops(*args: Any) -> Any:
        held.append(args)
        raise BackendUnavailable("x")

    def late(*args: Any) -> Any:
        assert run(*held.pop()) == 1
        return run(*args)

    with monkeypatch.context() as patched:
        patched.setattr(client, "run", stops)
        with pytest.raises(BackendUnavailable):
            gov.events.deliver()
        patched.setattr(client, "run", late)
        assert gov.events.deliver() == 0
    assert payloads(kept(gov, "order")) == [1]
    gov.events.deliver()
    assert (payloads(kept(gov, "order")), waiting(gov)) == ([1], 0)


def test_relays_side_by_side_publish_each_event_once(gov: GovRedis, connect: Callable[[], Any]) -> None:
    connections = [connect() for _ in range(3)]
    over = threading.Event()

    def write(connection: Any, me: int) -> None:
        for n in range(100):
            committed(gov, connection, (me, n))

    def deliver() -> None:
        while not over.is_set():
            gov.events.deliver()

    delivering = [Background(deliver) for _ in range(4)]
    in_threads(*[lambda c=c, me=me: write(c, me) for me, c in enumerate(connections)])
    eventually(lambda: waiting(gov) == 0)
    over.set()
    for one in delivering:
        one.result()
    found = payloads(kept(gov, "order"))
    assert len(found) == 300
    for me in range(3):
        assert [n for who, n in found if who == me] == list(range(100))


def test_a_recovery_that_takes_longer_than_the_first_try_loses_no_event(
    make_gov: MakeGov, persistent_redis: RedisServer, postgres_server: PostgresServer, connection: Any
) -> None:
    gov = make_gov(redis_url=persistent_redis.url, database_url=postgres_server.url)
    relay, redis, tried = gov.events.relay, redis_of(gov), threading.Event()
    assert relay is not None
    redis.call("PING")
    persistent_redis.kill()
    with pytest.raises(BackendUnavailable):
        gov.events.publish("order.paid", 0)
    relay._sleep = lambda seconds: time.sleep(0.01)
    committed(gov, connection, 1)
    eventually(lambda: relay._thread is None, what="the tries after the commit are over")
    relay._sleep, run = time.sleep, relay.run_quietly

    def noted() -> None:
        run()
        tried.set()

    relay.run_quietly = noted  # type: ignore[method-assign]
    redis.on_recovery(lambda _: tried.wait(PATIENCE))  # behind the relay's own: Redis is not used until it has run
    persistent_redis.restart()
    eventually(lambda: redis.breaker.closed and redis.call("XLEN", "events:order"))


def test_a_commit_during_an_outage_is_delivered_on_the_return(
    make_gov: MakeGov, persistent_redis: RedisServer, postgres_server: PostgresServer, connection: Any
) -> None:
    """By the process that published it, without a beat."""
    gov = make_gov(redis_url=persistent_redis.url, database_url=postgres_server.url)
    redis_of(gov).call("PING")
    assert gov.events.relay is not None
    gov.events.relay._sleep = lambda seconds: time.sleep(0.01)
    persistent_redis.kill()
    with pytest.raises(BackendUnavailable):
        gov.events.publish("order.paid", 0)
    committed(gov, connection, 1)
    gov.events.publish("order.paid", 2, connection)
    connection.rollback()
    eventually(lambda: not gov.events.relay.has_pending())  # type: ignore[union-attr]
    with pytest.raises(BackendUnavailable):
        gov.events.deliver()  # while the relay's own thread tries, this would do nothing
    eventually(lambda: not gov.events.relay.has_pending())  # type: ignore[union-attr]
    persistent_redis.restart()
    gov.events.relay._sleep = time.sleep
    # The probe's thread finds it back; nobody listens.
    eventually(lambda: redis_of(gov).breaker.closed and redis_of(gov).call("XLEN", "events:order"))
    assert payloads(kept(gov, "order")) == [1]
    eventually(lambda: waiting(gov) == 0)


# -- who runs it -----------------------------------------------------------------------------------------------------


def test_the_process_that_published_delivers_and_so_does_its_child(
    make_gov: MakeGov, redis_server: RedisServer, postgres_server: PostgresServer
) -> None:
    gov = make_gov(redis_url=redis_server.url, database_url=postgres_server.url)

    def publish() -> str:
        with contextlib.closing(psycopg2.connect(postgres_server.url)) as connection:
            (identity,) = committed(gov, connection, 1)
            eventually(lambda: identity in [event.id for event in kept(gov, "order")])
        return identity

    assert publish() != in_child(publish)


def test_who_asks_while_the_thread_ends_starts_another(
    make_gov: MakeGov, redis_server: RedisServer, postgres_server: PostgresServer, connection: Any
) -> None:
    gov = make_gov(redis_url=redis_server.url, database_url=postgres_server.url)
    relay = gov.events.relay
    assert relay is not None
    relay._tries, relay._thread = 1, threading.current_thread()  # which has ended its work, and lives on
    relay._run_soon()
    committed(gov, connection, 1)
    eventually(lambda: payloads(kept(gov, "order")) == [1])


def test_a_listener_takes_along_what_a_dead_process_has_committed(
    make_gov: MakeGov, gov: GovRedis, redis_server: RedisServer, postgres_server: PostgresServer, connection: Any
) -> None:
    committed(gov, connection, 1)
    reading = make_gov(redis_url=redis_server.url, database_url=postgres_server.url)
    for reader in reading.events.listen("order", after="0"), reading.events.consume("g", "c", "order"):
        event = reader.get(60)
        assert event is not None
        assert event.payload == 1


def test_a_process_that_ends_delivers(
    make_gov: MakeGov, redis_server: RedisServer, postgres_server: PostgresServer, connection: Any
) -> None:
    gov = make_gov(redis_url=redis_server.url, database_url=postgres_server.url)
    relay = gov.events.relay
    assert relay is not None
    relay._sleep = lambda seconds: time.sleep(1000)
    assert not relay.has_pending()
    committed(gov, connection, 1)
    assert relay.has_pending()
    relay.write_pending()
    assert payloads(kept(gov, "order")) == [1]
    committed(gov, connection, 2)
    gov.close()
    assert payloads(kept(gov, "order")) == [1, 2]


def test_the_thread_wakes_no_server_that_was_closed(
    make_gov: MakeGov, redis_server: RedisServer, postgres_server: PostgresServer, connection: Any
) -> None:
    gov = make_gov(redis_url=redis_server.url, database_url=postgres_server.url)
    relay, asleep, wake = gov.events.relay, threading.Event(), threading.Event()
    assert relay is not None

    def sleep(seconds: float) -> None:
        asleep.set()
        wake.wait(60)

    relay._sleep, run, runs = sleep, relay.run, []
    relay.run = lambda: runs.append(1) or run()  # type: ignore[func-returns-value,method-assign]
    committed(gov, connection, 1)
    assert asleep.wait(60)
    gov.close()
    assert runs == [1]
    wake.set()
    thread = relay._thread
    assert thread is not None
    thread.join(60)
    assert not thread.is_alive()
    assert runs == [1]
    committed(gov, connection, 2)  # it may be used again
    eventually(lambda: payloads(kept(gov, "order")) == [1, 2])


def test_the_task_of_the_outbox_delivers(gov: GovRedis, connection: Any) -> None:
    app = Celery("shop", set_as_current=False)
    init_celery(app, gov)
    committed(gov, connection, 1)
    app.tasks["govredis.drain_outbox"].apply()
    assert payloads(kept(gov, "order")) == [1]


def test_a_mistake_is_logged_once(gov: GovRedis, connection: Any, plain_redis: Any, caplog: Any) -> None:
    assert gov.events.relay is not None
    plain_redis.set("events:order", "x")
    committed(gov, connection, 1)
    for _ in range(3):
        gov.events.relay.run_quietly()
    assert caplog.text.count("events of transactions cannot be published") == 1
    plain_redis.delete("events:order")
    gov.events.relay.run_quietly()
    assert payloads(kept(gov, "order")) == [1]


def test_a_stream_that_redis_refuses_holds_up_no_other(gov: GovRedis, connection: Any, plain_redis: Any) -> None:
    plain_redis.set("events:agent", "x")
    committed(gov, connection, 1, topic="agent.read")
    committed(gov, connection, 2)
    with pytest.raises(BackendError, match="WRONGTYPE"):
        gov.events.deliver()
    assert (payloads(kept(gov, "order")), waiting(gov)) == ([2], 1)


# -- agents ----------------------------------------------------------------------------------------------------------


def agent_events(gov: GovRedis) -> list[tuple[str, str | None, str]]:
    gov.events.deliver()
    return [(event.topic, event.entity, event.payload["status"]) for event in kept(gov)]


@pytest.mark.parametrize("prefix", ["", "app:"])
def test_changes_of_agents_are_events(
    make_gov: MakeGov, redis_server: RedisServer, postgres_server: PostgresServer, prefix: str
) -> None:
    gov = by_hand(make_gov(redis_url=redis_server.url, database_url=postgres_server.url, key_prefix=prefix))
    created = gov.agents.create("a:1", {"name": "Ann"})
    updated = gov.agents.update_metadata("a:1", name="Bob")
    archived = gov.agents.archive("a:1")
    gov.agents.archive("a:1")
    assert gov.agents.update_metadata("nobody", n=1) is None
    gov.agents.delete("a:1")
    assert agent_events(gov) == [
        ("agent.created", "a:1", "active"),
        ("agent.updated", "a:1", "active"),
        ("agent.archived", "a:1", "archived"),
        ("agent.updated", "a:1", "archived"),
        ("agent.deleted", "a:1", "archived"),
    ]
    assert updated is not None
    assert archived is not None
    events = kept(gov)
    assert [e.payload["agent_id"] for e in events] == ["a:1"] * 5
    versions = [e.payload["version"] for e in events]
    assert versions[:3] == [created["version"], updated["version"], archived["version"]]
    assert sorted(set(versions)) == versions


def test_psqls_changes_of_agents_are_events_too_and_a_rollback_is_none(gov: GovRedis, connection: Any) -> None:
    with connection, connection.cursor() as cursor:
        cursor.execute("INSERT INTO govredis_agents (agent_id, metadata) VALUES ('a', '{}'), ('b', '{}')")
    with connection.cursor() as cursor:
        cursor.execute("UPDATE govredis_agents SET metadata = '{\"n\": 1}'")
    connection.rollback()
    with connection, connection.cursor() as cursor:
        cursor.execute("INSERT INTO govredis_agents (agent_id, metadata) VALUES (repeat('x', 2000), '{}')")
    assert agent_events(gov) == [("agent.created", "a", "active"), ("agent.created", "b", "active")]


# -- any history -----------------------------------------------------------------------------------------------------


class Relaying(RuleBasedStateMachine):
    """Transactions that commit, roll back and overlap, and relays that die anywhere: each event once, each in order."""

    gov: GovRedis
    connect: Callable[[], Any]
    flush: Callable[[], Any]

    def __init__(self) -> None:
        super().__init__()
        self.flush()
        self.gov.postgres.fetch("DELETE FROM govredis_events")
        self.connections = [self.connect() for _ in range(3)]
        self.open: list[list[int]] = [[], [], []]
        self.committed: list[list[int]] = [[], [], []]
        self.n = 0

    @rule(who=st.integers(0, 2))
    def publish(self, who: int) -> None:
        self.n += 1
        self.gov.events.publish("order", (who, self.n), self.connections[who])
        self.open[who].append(self.n)

    @precondition(lambda self: any(self.open))
    @rule(who=st.integers(0, 2), commits=st.booleans())
    def end(self, who: int, commits: bool) -> None:
        if commits:
            self.connections[who].commit()
            self.committed[who] += self.open[who]
        else:
            self.connections[who].rollback()
        self.open[who] = []

    @rule(call=st.integers(0, 25))
    def relay_dies(self, call: int) -> None:
        assert self.gov.events.relay is not None
        with pytest.MonkeyPatch.context() as patched:
            dying(self.gov.events.relay, patched, call)
            with contextlib.suppress(Dies):
                self.gov.events.deliver()

    @invariant()
    def nothing_is_sent_that_was_not_committed_nor_twice(self) -> None:
        found = payloads(kept(self.gov, "order"))
        for who in range(3):
            mine = [n for of, n in found if of == who]
            assert mine == self.committed[who][: len(mine)]

    def teardown(self) -> None:
        eventually(lambda: self.gov.events.deliver() >= 0 and waiting(self.gov) == 0)
        found = payloads(kept(self.gov, "order"))
        assert [[n for of, n in found if of == who] for who in range(3)] == self.committed
        for connection in self.connections:
            connection.close()


@pytest.mark.once
def test_no_history_loses_an_event_or_sends_it_twice(
    gov: GovRedis, connect: Callable[[], Any], plain_redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay_module, "_READ", relay_module._READ.replace("LIMIT 100", "LIMIT 2"))
    ours = {"gov": gov, "connect": staticmethod(connect), "flush": staticmethod(plain_redis.flushall)}
    machine = type("RelayingHere", (Relaying,), ours)
    machine.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
    machine.TestCase("runTest").runTest()
