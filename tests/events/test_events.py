"""Events on streams: published once, heard by every listener in one order, and no gap goes unnoticed."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import PATIENCE, Background, eventually, in_child, in_threads, redis_of

from govredis import BackendError, BackendUnavailable, Event, GovRedis
from govredis.events.event import TopicPattern, encode_payload, position_after
from govredis.keys import Keys
from govredis.testing.servers import RedisServer

MakeGov = Callable[..., GovRedis]


@pytest.fixture
def gov(make_gov: MakeGov, redis_server: RedisServer) -> GovRedis:
    return make_gov(redis_url=redis_server.url)


def kept(gov: GovRedis, topic: str = "agent", after: Any = "0") -> list[Event]:
    """The events that a stream has."""
    return list(gov.events.listen(topic, after=after, timeout=0))


def payloads(events: Any) -> list[Any]:
    return [event.payload for event in events]


def twice(gov: GovRedis) -> None:
    """From now on each command arrives a second time, and its reply is that of the second arrival."""
    client = redis_of(gov)
    send = client._round_trip

    def send_twice(*args: Any, **options: Any) -> Any:
        send(*args, **options)
        return send(*args, **options)

    client._round_trip = send_twice  # type: ignore[method-assign]


# -- publishing ------------------------------------------------------------------------------------------------------


def test_an_event_comes_back_as_it_was_published(gov: GovRedis) -> None:
    payload = {"n": [1, 2.5, None, True], "text": "é\x00\ud800", "empty": []}
    before = datetime.now(timezone.utc) - timedelta(minutes=10)
    identity = gov.events.publish("agent.updated", payload, entity=7)
    (event,) = kept(gov)
    assert (event.topic, event.payload, event.entity, event.id) == ("agent.updated", payload, "7", identity)
    assert (event.missed, event.deliveries) == (0, 1)
    assert before < event.at < before + timedelta(minutes=20)
    assert event.at.tzinfo is timezone.utc
    gov.events.publish("agent", None)
    assert [(e.payload, e.entity) for e in kept(gov)][1:] == [(None, None)]


def test_a_command_that_arrives_twice_publishes_once(gov: GovRedis) -> None:
    twice(gov)
    ids = [gov.events.publish("agent", n) for n in range(5)]
    assert [(event.id, event.payload) for event in kept(gov)] == list(zip(ids, range(5), strict=True))


def test_a_command_that_arrives_late_publishes_beside_later_ones(
    gov: GovRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hung server carries out on waking what a caller gave up: no later event of the process is taken for it."""
    client, held = redis_of(gov), []
    gov.events.publish("agent", 0)
    with monkeypatch.context() as patched:
        patched.setattr(
            client, "run", lambda *args: held.append(args) or (_ for _ in ()).throw(BackendUnavailable("x"))
        )
        with pytest.raises(BackendUnavailable):
            gov.events.publish("agent", 1)
    gov.events.publish("agent", 2)
    client.run(*held[0])
    gov.events.publish("agent", 3)
    assert payloads(kept(gov)) == [0, 2, 1, 3]


def test_threads_and_forked_children_publish_each_event_once(gov: GovRedis) -> None:
    def publish() -> list[str]:
        return [gov.events.publish("agent", None) for _ in range(50)]

    ids = sum(in_threads(*[publish] * 4), publish() + in_child(publish) + in_child(publish))
    assert len(set(ids)) == len(ids) == 350
    assert sorted(event.id for event in kept(gov)) == sorted(ids)


def test_a_stream_is_trimmed_and_ends(make_gov: MakeGov, redis_server: RedisServer, plain_redis: Any) -> None:
    gov = make_gov(redis_url=redis_server.url, events_kept=100)
    for n in range(1000):
        gov.events.publish("agent", n)
    assert 100 <= plain_redis.xlen("events:agent") <= 300
    assert payloads(kept(gov))[-100:] == list(range(900, 1000))
    day = 86_400_000
    for key in plain_redis.keys("*"):
        assert (
            0 < plain_redis.pttl(key) <= (60 * day if "state" in key else 30 * day if key == "events:agent" else 60_000)
        )


def test_a_clock_that_is_set_back_stops_no_publisher(gov: GovRedis, plain_redis: Any) -> None:
    gov.events.publish("agent", 1)
    ms = int(plain_redis.hget("{events:agent}:state", "ms")) + 3_600_000
    plain_redis.hset("{events:agent}:state", "ms", ms)
    gov.events.publish("agent", 2)
    gov.events.publish("agent", 3)
    assert [event.position for event in kept(gov)][1:] == [f"{ms}-2", f"{ms}-3"]


def test_numbers_go_on_where_their_key_is_lost_or_another_client_has_written(gov: GovRedis, plain_redis: Any) -> None:
    gov.events.publish("agent", 1)
    plain_redis.delete("{events:agent}:state")
    gov.events.publish("agent", 2)
    ahead = int(plain_redis.hget("{events:agent}:state", "ms")) + 3_600_000
    plain_redis.xadd("events:agent", {"a": "b"}, id=f"{ahead}-0")
    gov.events.publish("agent", 3)
    found = kept(gov)
    assert [(e.payload, e.position.split("-")[1], e.missed) for e in found] == [(1, "1", 0), (2, "2", 0), (3, "3", 0)]
    assert gov.counters.get("events.unreadable") == 1


@pytest.mark.parametrize(
    "topic", ["", "a b", "a:b", "a.", ".a", "a..b", "a.*", "a{b", "é", "x" * 201, b"a", None, 7, "a\n"]
)
def test_a_bad_topic_is_refused(gov: GovRedis, topic: Any) -> None:
    with pytest.raises(ValueError, match=r"^topic is .*; it must be words of letters"):
        gov.events.publish(topic, None)
    assert redis_of(gov).call("DBSIZE") == 0


@pytest.mark.parametrize("payload", [{1, 2}, float("nan"), b"a", object(), "x" * 65_535])
def test_a_bad_payload_is_refused(gov: GovRedis, payload: Any) -> None:
    with pytest.raises(ValueError, match=r"^payload "):
        gov.events.publish("agent", payload)
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(ValueError, match=r"^payload "):
        gov.events.publish("agent", loop)
    assert len(encode_payload("x" * 65_534)) == 65_536


def nested(depth: int) -> Any:
    return functools.reduce(lambda inner, n: [inner] if n % 2 else {"[": inner}, range(depth), "[{")


def test_a_payload_that_a_deep_stack_could_not_read_is_refused(gov: GovRedis, plain_redis: Any) -> None:
    flat = [["[", '"{', "\\", {}] for _ in range(200)]
    for good in nested(100), flat:
        gov.events.publish("agent", good)
    with pytest.raises(ValueError, match="more than 100 lists and dicts within each other"):
        gov.events.publish("agent", nested(101))
    good = dict(plain_redis.xrange("events:agent")[0][1])
    plain_redis.xadd("events:agent", {**good, "payload": json.dumps(nested(101))})
    assert payloads(kept(gov)) == [nested(100), flat]
    assert gov.counters.get("events.unreadable") == 1


def test_a_redis_that_is_away_raises(make_gov: MakeGov) -> None:
    for settings in {"redis_url": "redis://127.0.0.1:1"}, {"redis_enabled": False}:
        gov = make_gov(**settings)
        with pytest.raises(BackendUnavailable):
            gov.events.publish("agent", 1)


def test_a_key_of_another_type_is_an_error(gov: GovRedis, plain_redis: Any) -> None:
    plain_redis.set("events:agent", "x")
    for call in (
        lambda: gov.events.publish("agent", 1),
        lambda: kept(gov),
        lambda: gov.events.consume("g", "c", "agent").get(),
    ):
        with pytest.raises(BackendError, match="WRONGTYPE"):
            call()


# -- listening -------------------------------------------------------------------------------------------------------


def test_every_listener_gets_every_event_in_one_order(gov: GovRedis) -> None:
    listeners = [gov.events.listen("agent") for _ in range(3)]
    hears = [Background(lambda one=one: [next(one).id for _ in range(100)]) for one in listeners]
    in_threads(*[lambda: [gov.events.publish("agent.x", n) for n in range(25)]] * 4)
    heard = [hearing.result() for hearing in hears]
    assert heard == [[event.id for event in kept(gov)]] * 3


def test_a_listener_begins_where_it_is_told(gov: GovRedis, plain_redis: Any) -> None:
    gov.events.publish("agent", 1)
    listener = gov.events.listen("agent", timeout=0)
    gov.events.publish("agent", 2)
    assert payloads(listener) == [2]
    first, second = kept(gov)
    assert payloads(kept(gov, after=first.position)) == [2]
    assert kept(gov, after=second.position) == []
    instant = datetime.fromtimestamp(int(second.position.split("-")[0]) / 1000, timezone.utc)
    assert payloads(kept(gov, after=instant))[-1:] == [2]
    assert kept(gov, after=instant + timedelta(milliseconds=1)) == []
    assert payloads(kept(gov, after=datetime(1950, 1, 1, tzinfo=timezone.utc))) == [1, 2]


def test_a_listener_that_begins_behind_another_clients_entry_misses_nothing(gov: GovRedis, plain_redis: Any) -> None:
    for n in range(3):
        gov.events.publish("agent", n)
    ms = int(plain_redis.hget("{events:agent}:state", "ms")) + 1
    plain_redis.xadd("events:agent", {"a": "b"}, id=f"{ms}-1")
    listener = gov.events.listen("agent", timeout=0)
    gov.events.publish("agent", 3)
    assert [(event.payload, event.missed) for event in listener] == [(3, 0)]


@pytest.mark.parametrize("after", ["", "1", "a-b", "1-2-3", None, 5, "-1-0", f"{2**64}-0", datetime(2026, 1, 1)])
def test_a_bad_position_is_refused(gov: GovRedis, after: Any) -> None:
    for call in gov.events.listen, lambda topic, **options: gov.events.consume("g", "c", topic, **options):
        with pytest.raises(ValueError, match=r"^after is .*; it must be '\$' for new events"):
            call("agent", after=after)


@pytest.mark.parametrize(
    ("pattern", "heard"),
    [
        ("a", ["a", "a.b", "a.b.c", "a.d.c", "a.bb"]),
        ("a.b", ["a.b", "a.b.c"]),
        ("a.*", ["a.b", "a.b.c", "a.d.c", "a.bb"]),
        ("a.*.c", ["a.b.c", "a.d.c"]),
        ("a.d", ["a.d.c"]),
        ("ab", ["ab"]),
    ],
)
def test_a_pattern_has_its_topics_and_those_below(gov: GovRedis, pattern: str, heard: list[str]) -> None:
    for topic in "a", "a.b", "a.b.c", "ab", "a.d.c", "a.bb":
        gov.events.publish(topic, None)
    assert [event.topic for event in kept(gov, pattern)] == heard
    assert [event.topic for event in gov.events.consume("g", "c", pattern, timeout=0)] == heard


@pytest.mark.parametrize("pattern", ["*", "*.a", "a*", "a.b*", "a.**", "", None, "a.*."])
def test_a_bad_pattern_is_refused(gov: GovRedis, pattern: Any) -> None:
    with pytest.raises(ValueError, match=r"^topic is "):
        gov.events.listen(pattern)


_words = st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=4)


@given(asked=_words, topic=_words, stars=st.sets(st.integers(1, 3)))
def test_patterns_match_word_by_word(asked: list[str], topic: list[str], stars: set[int]) -> None:
    text = ".".join("*" if n in stars else word for n, word in enumerate(asked))
    right = len(topic) >= len(asked) and all(n in stars or topic[n] == word for n, word in enumerate(asked))
    pattern = TopicPattern(text)
    assert pattern.matches(".".join(topic)) == right
    if right:
        assert Keys().events(pattern.topic) == Keys().events(".".join(topic))


def test_a_wait_ends_with_its_timeout_or_with_close(gov: GovRedis, redis_server: RedisServer) -> None:
    listener = gov.events.listen("agent", timeout=0.01)
    assert listener.get(0.01) is None
    assert list(listener) == []
    with gov.events.listen("agent") as endless, gov.events.consume("g", "c", "agent") as taking:
        waits = [Background(lambda reader=reader: list(reader)) for reader in (endless, taking)]
        eventually(lambda: int(redis_server.command("INFO", "clients")["blocked_clients"]) == 2)
        for reader in endless, taking:
            reader.close()
        assert [wait.result() for wait in waits] == [[], []]
        gov.events.publish("agent", 1)
        assert [reader.get(0) for reader in (endless, taking)] == [None, None]


@pytest.mark.parametrize("kind", ["listener", "consumer"])
def test_events_of_other_topics_prolong_no_wait(gov: GovRedis, kind: str) -> None:
    readers = {
        "listener": lambda: gov.events.listen("agent.mine"),
        "consumer": lambda: gov.events.consume("g", "c", "agent.mine"),
    }
    until = time.monotonic() + PATIENCE

    def others() -> None:
        assert time.monotonic() < until, "the wait does not end"
        gov.events.publish("agent.theirs", 1)

    with readers[kind]() as reader:
        reader.before_waiting = others  # so that no wait brings nothing
        assert reader.get(0.05) is None


@pytest.mark.parametrize("kind", ["listener", "consumer"])
def test_an_event_behind_many_of_other_topics_is_there_already(gov: GovRedis, kind: str) -> None:
    for _ in range(250):
        gov.events.publish("agent.theirs", 1)
    gov.events.publish("agent.mine", 2)
    readers = {
        "listener": lambda: gov.events.listen("agent.mine", after="0"),
        "consumer": lambda: gov.events.consume("g", "c", "agent.mine"),
    }
    with readers[kind]() as reader:
        assert [event.payload for event in iter(lambda: reader.get(0), None)] == [2]


def test_an_event_ends_a_wait_at_once(
    gov: GovRedis, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("govredis.events.listener.LONGEST_BLOCK", 100)
    monkeypatch.setattr("govredis.client.node.LONGEST_BLOCK", 100)
    readers = gov.events.listen("agent"), gov.events.consume("g", "c", "agent", claim_after=1000)
    waits = [Background(reader.get) for reader in readers]
    eventually(lambda: int(redis_server.command("INFO", "clients")["blocked_clients"]) == 2)
    gov.events.publish("agent", 1)
    assert [wait.result().payload for wait in waits] == [1, 1]


def test_trimmed_events_are_counted(make_gov: MakeGov, redis_server: RedisServer, caplog: Any) -> None:
    gov = make_gov(redis_url=redis_server.url, events_kept=100)
    gov.events.publish("agent", "seen")
    listener = gov.events.listen("agent.x", after="0", timeout=0)
    assert list(listener) == []
    (seen,) = kept(gov)
    for n in range(999):
        gov.events.publish("agent.x" if n >= 990 else "agent.y", n)
    there = kept(gov)
    lost = 999 - len(there)
    assert lost > 500
    assert [(e.payload, e.missed) for e in listener] == [(990, lost), *((n, 0) for n in range(991, 999))]
    assert [e.missed for e in kept(gov, after=seen.position)] == [lost] + [0] * (len(there) - 1)
    assert [e.missed for e in there] == [0] * len(there)  # nobody had asked for those before
    assert gov.counters.get("events.missed") == 2 * lost
    assert f"{lost} events at events:agent were gone before they were read" in caplog.text


def test_a_stream_that_was_lost_is_noticed(gov: GovRedis, plain_redis: Any) -> None:
    for n in range(3):
        gov.events.publish("agent", n)
    listener = gov.events.listen("agent", after="0", timeout=0)
    assert payloads(listener) == [0, 1, 2]
    plain_redis.flushall()
    gov.events.publish("agent", 3)
    gov.events.publish("agent", 4)
    assert [(e.payload, e.missed) for e in listener] == [(3, -1), (4, 0)]


def test_a_stream_that_was_lost_is_noticed_where_the_number_is_the_same(gov: GovRedis, plain_redis: Any) -> None:
    gov.events.publish("agent", 0)
    listener = gov.events.listen("agent", after="0", timeout=0)
    assert payloads(listener) == [0]
    gov.events.publish("agent", "unread")
    plain_redis.flushall()
    first = int(listener.position.partition("-")[0])  # within this millisecond the new event would have the same place
    eventually(lambda: plain_redis.time()[0] * 1000 > first)  # the next second
    gov.events.publish("agent", 1)
    assert [(e.payload, e.missed) for e in listener] == [(1, -1)]


def test_entries_of_others_are_left_out_and_counted(gov: GovRedis, plain_redis: Any) -> None:
    gov.events.publish("agent", 1)
    good = dict(plain_redis.xrange("events:agent")[0][1])
    for change in {"payload": "{"}, {"topic": "a b"}, {"at": "x"}, {"at": "9" * 30}, {"payload": "[" * 5000}:
        plain_redis.xadd("events:agent", {**good, **change})
    plain_redis.xadd("events:agent", {"some": "thing"})
    gov.events.publish("agent", 2)
    assert [(e.payload, e.missed) for e in kept(gov)] == [(1, 0), (2, 0)]
    assert gov.counters.get("events.unreadable") == 6
    assert payloads(gov.events.consume("g", "c", "agent", timeout=0)) == [1, 2]
    assert plain_redis.xpending("events:agent", "g")["pending"] == 0


# -- outages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["listener", "consumer"])
def test_a_reader_goes_on_after_an_outage_and_loses_nothing(
    make_gov: MakeGov, persistent_redis: RedisServer, kind: str
) -> None:
    gov = make_gov(redis_url=persistent_redis.url)
    reader = gov.events.listen("agent") if kind == "listener" else gov.events.consume("g", "c", "agent")
    with reader:
        heard: list[Any] = []
        reads = Background(lambda: [heard.append(event.payload) for event in reader])
        for n in range(3):
            gov.events.publish("agent", (n, "before"))
            eventually(lambda: len(heard) > 2 * n)  # noqa: B023
            persistent_redis.kill()
            with pytest.raises(BackendUnavailable):
                gov.events.publish("agent", (n, "away"))
            persistent_redis.restart()
            eventually(lambda: redis_of(gov).breaker.closed)
            gov.events.publish("agent", (n, "after"))
            eventually(lambda: len(heard) > 2 * n + 1)  # noqa: B023
        reader.close()
        reads.result()
    assert heard == [[n, when] for n in range(3) for when in ("before", "after")]


def test_to_listen_from_now_on_needs_redis(make_gov: MakeGov) -> None:
    gov = make_gov(redis_url="redis://127.0.0.1:1")
    with pytest.raises(BackendUnavailable):
        gov.events.listen("agent")
    now = datetime.now(timezone.utc)
    assert gov.events.listen("agent", after=now).get(0) is None
    assert gov.events.consume("g", "c", "agent").get(0) is None


def test_more_readers_than_connections_take_turns(make_gov: MakeGov, redis_server: RedisServer) -> None:
    gov = make_gov(redis_url=redis_server.url, redis_connections=2)
    hears = [Background(gov.events.listen("agent", after="0").get) for _ in range(5)]
    gov.events.publish("agent", 1)
    assert [hearing.result().payload for hearing in hears] == [1] * 5


def test_a_prefix_has_streams_of_its_own(make_gov: MakeGov, redis_server: RedisServer, plain_redis: Any) -> None:
    gov, other = (make_gov(redis_url=redis_server.url, key_prefix=prefix) for prefix in ("", "app:"))
    gov.events.publish("agent", 1)
    other.events.publish("agent", 2)
    assert (payloads(kept(gov)), payloads(kept(other))) == ([1], [2])
    assert {"events:agent", "app:events:agent"} <= set(plain_redis.keys("*"))
    assert position_after("0") == "0-0"


def test_in_memory_events_work_too() -> None:
    with GovRedis.in_memory() as gov:
        listener = gov.events.listen("agent")
        hears = Background(listener.get)
        gov.events.publish("agent", 1)
        assert hears.result().payload == 1
        assert payloads(gov.events.consume("g", "c", "agent", timeout=0.01)) == [1]
