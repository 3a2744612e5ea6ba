"""Groups of consumers: every event is done at least once, by one of them, and the dead keep none."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from support import Background, Child, Gate, client_of, eventually, in_child, in_threads
from test_events import twice

from govredis import Event, EventConsumer, GovRedis
from govredis.testing.servers import RedisServer

MakeGov = Callable[..., GovRedis]


@pytest.fixture
def gov(make_gov: MakeGov, redis_server: RedisServer) -> GovRedis:
    return make_gov(redis_url=redis_server.url)


def consumer(gov: GovRedis, name: str = "c", group: str = "g", **options: Any) -> EventConsumer:
    return gov.events.consume(group, name, "agent", **{"timeout": 0, **options})


def claim(reader: EventConsumer) -> Event | None:
    """Its next event, as if the time had come to look for those of consumers that are gone."""
    reader._claim_at = 0.0
    return reader.get(0)


def pending(plain_redis: Any, group: str = "g") -> int:
    count: int = plain_redis.xpending("events:agent", group)["pending"]
    return count


def test_each_event_goes_to_one_consumer_of_each_group(gov: GovRedis, plain_redis: Any) -> None:
    ids = [gov.events.publish("agent", n) for n in range(100)]
    readers = [(group, consumer(gov, name, group)) for group in "gh" for name in "abc"]
    found = in_threads(*[lambda reader=reader: [e.id for e in reader] for _, reader in readers])
    for group in "gh":
        got = [i for (of, _), some in zip(readers, found, strict=True) for i in some if of == group]
        assert sorted(got) == sorted(ids)
        assert pending(plain_redis, group) == 0


def test_one_consumer_gets_them_in_order(gov: GovRedis) -> None:
    for n in range(50):
        gov.events.publish("agent", n, entity=n % 3)
    assert [event.payload for event in consumer(gov)] == list(range(50))


def test_a_group_begins_with_all_that_is_kept_or_where_it_is_told(gov: GovRedis) -> None:
    gov.events.publish("agent", 1)
    assert [event.payload for event in consumer(gov)] == [1]
    late = consumer(gov, group="h", after="$")
    assert late.get(0) is None
    gov.events.publish("agent", 2)
    assert [event.payload for event in late] == [2]
    # The group stands by now: `after` has no meaning.
    assert [event.payload for event in consumer(gov, "d", after="$")] == [2]


def test_an_event_is_done_when_the_next_one_is_asked_for(gov: GovRedis, plain_redis: Any) -> None:
    gov.events.publish("agent", 1)
    reader = consumer(gov)
    assert next(reader).payload == 1
    assert pending(plain_redis) == 1
    assert reader.get(0) is None
    assert pending(plain_redis) == 0


def test_a_body_that_ends_well_is_done_and_one_that_raises_is_not(gov: GovRedis, plain_redis: Any) -> None:
    gov.events.publish("agent", 1)
    for n in range(3):
        with pytest.raises(ZeroDivisionError), consumer(gov) as reader:
            event = next(reader)
            assert (event.payload, event.deliveries) == (1, n + 1)
            raise ZeroDivisionError
        assert pending(plain_redis) == 1
    with consumer(gov) as reader:
        for event in reader:
            assert event.deliveries == 4
            break
    assert pending(plain_redis) == 0
    assert plain_redis.xinfo_consumers("events:agent", "g") == []


def test_a_consumer_with_events_is_not_forgotten(gov: GovRedis, plain_redis: Any) -> None:
    gov.events.publish("agent", 1)
    with pytest.raises(ZeroDivisionError), consumer(gov) as reader:
        next(reader)
        raise ZeroDivisionError
    assert [one["name"] for one in plain_redis.xinfo_consumers("events:agent", "g")] == ["c"]


def test_a_command_that_arrives_twice_loses_no_event(gov: GovRedis, plain_redis: Any) -> None:
    ids = [gov.events.publish("agent", n) for n in range(5)]
    twice(gov)
    with consumer(gov) as reader:
        assert [event.id for event in reader] == ids
        waits = Background(lambda: reader.get(100))
        gov.events.publish("agent", "late")
        assert waits.result().payload == "late"
    assert pending(plain_redis) == 0


def test_an_event_of_the_dead_goes_to_another(gov: GovRedis, plain_redis: Any) -> None:
    gov.events.publish("agent", 1)
    dead, other = consumer(gov, "dead"), consumer(gov, "other", claim_after=0.001)
    first = dead.get(0)
    eventually(lambda: plain_redis.xpending_range("events:agent", "g", "-", "+", 1)[0]["time_since_delivered"] > 1)
    again = claim(other)
    assert first is not None
    assert again is not None
    assert (again.id, again.position, again.deliveries) == (first.id, first.position, 2)
    assert [event.payload for event in other] == []
    assert dead.get(0) is None
    assert pending(plain_redis) == 0


def test_an_event_of_the_living_stays_theirs(gov: GovRedis) -> None:
    gov.events.publish("agent", 1)
    slow, other = consumer(gov, "slow"), consumer(gov, "other", claim_after=3600)
    assert slow.get(0)
    assert claim(other) is None


def test_an_event_that_is_never_done_is_given_up_and_kept(gov: GovRedis, plain_redis: Any, caplog: Any) -> None:
    bad = gov.events.publish("agent.bad", {"poison": True}, entity="e")
    gov.events.publish("agent.good", 2)
    for _ in range(3):
        assert consumer(gov, deliveries=3).get(0).id == bad  # type: ignore[union-attr]
    assert gov.events.dead("agent") == []
    reader = consumer(gov, deliveries=3)
    assert [event.payload for event in reader] == [2]
    (dead,) = gov.events.dead("agent")
    assert (dead.group, dead.event.id, dead.event.deliveries, dead.event.entity) == ("g", bad, 3, "e")
    assert gov.events.dead("agent.bad") == [dead]
    assert gov.events.dead("agent.good") == []
    assert (gov.counters.get("events.dead"), pending(plain_redis)) == (1, 0)
    assert "given up by group g" in caplog.text
    assert plain_redis.pttl("{events:agent}:dead") > 0
    # Another group may do it.
    assert next(consumer(gov, group="h")).id == bad


def test_events_trimmed_before_the_group_could_have_them_are_counted(
    make_gov: MakeGov, redis_server: RedisServer, plain_redis: Any
) -> None:
    gov = make_gov(redis_url=redis_server.url, events_kept=100)
    for n in range(2):
        gov.events.publish("agent", n)
    reader = consumer(gov)
    assert [event.payload for event in reader] == [0, 1]
    gov.events.publish("agent", "given, and not done")
    assert consumer(gov, "dead").get(0)
    for n in range(1000):
        gov.events.publish("agent", n)
    lost = 1000 - plain_redis.xlen("events:agent")
    assert lost > 500
    reader = consumer(gov, "dead")
    first, second = reader.get(0), reader.get(0)
    assert first is not None
    assert second is not None
    assert (first.missed, second.missed) == (lost + 1, 0)
    assert gov.counters.get("events.missed") == lost + 1


def test_a_group_that_was_lost_with_its_stream_begins_anew_with_all(gov: GovRedis, plain_redis: Any) -> None:
    reader = consumer(gov, after="$")
    gov.events.publish("agent", 0)
    assert reader.get(0) is None
    gov.events.publish("agent", 1)
    assert [event.payload for event in reader] == [1]
    plain_redis.flushall()
    gov.events.publish("agent", 2)
    assert [(event.payload, event.missed) for event in reader] == [(2, -1)]


@pytest.mark.parametrize("group_alone", [False, True])
def test_a_consumer_that_waits_bears_a_stream_or_a_group_that_is_deleted(
    gov: GovRedis, redis_server: RedisServer, plain_redis: Any, group_alone: bool
) -> None:
    reader = consumer(gov, timeout=None)
    for n in range(2):
        waits = Background(lambda: reader.get(100))
        eventually(lambda: int(redis_server.command("INFO", "clients")["blocked_clients"]))
        if group_alone:
            plain_redis.xtrim("events:agent", maxlen=0, approximate=False)
            plain_redis.xgroup_destroy("events:agent", "g")
        else:
            plain_redis.flushall()
        gov.events.publish("agent", n)
        assert waits.result().payload == n


def test_consumers_that_are_gone_are_forgotten(
    gov: GovRedis, plain_redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n, name in enumerate("abc"):
        gov.events.publish("agent", n)
        assert [event.payload for event in consumer(gov, name)] == [n]
    gov.events.publish("agent", "not done")
    assert consumer(gov, "a").get(0)
    monkeypatch.setattr("govredis.events.consumer._FORGOTTEN_MS", 1)
    named = {one["name"]: one for one in plain_redis.xinfo_consumers("events:agent", "g")}
    eventually(lambda: all(o["idle"] > 1 for o in plain_redis.xinfo_consumers("events:agent", "g")))
    consumer(gov, "d").get(0)
    left = {one["name"] for one in plain_redis.xinfo_consumers("events:agent", "g")}
    assert named.keys() == {"a", "b", "c"}
    assert left - {"d"} == {"a"}


@pytest.mark.parametrize("bad", ["", "a:b", "a{b", None, 7])
def test_bad_names_are_refused(gov: GovRedis, bad: Any) -> None:
    with pytest.raises(ValueError, match=r"^group is "):
        gov.events.consume(bad, "c", "agent")
    with pytest.raises(ValueError, match=r"^name is "):
        gov.events.consume("g", bad, "agent")


@pytest.mark.parametrize("options", [{"claim_after": 0}, {"deliveries": 0}, {"deliveries": True}, {"timeout": -1}])
def test_bad_options_are_refused(gov: GovRedis, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(options))} is "):
        gov.events.consume("g", "c", "agent", **options)


def test_a_consumer_that_was_killed_loses_nothing(gov: GovRedis, plain_redis: Any) -> None:
    ids = [gov.events.publish("agent", n) for n in range(10)]
    took = Gate()

    def dies() -> None:
        reader = consumer(gov, "dies")
        for _ in range(3):
            reader.get(0)
        took.open()
        signal.pause()

    child = Child(dies)
    took.wait()
    child.kill()
    reader = consumer(gov, "other", claim_after=0.001)
    found: set[str] = set()

    def all_found() -> bool:
        found.update(event.id for event in iter(lambda: claim(reader), None))
        return len(found) == 8

    eventually(all_found)
    assert found == set(ids[2:])  # two were done
    assert pending(plain_redis) == 0


def test_a_forked_child_leaves_its_parents_events_alone(gov: GovRedis, plain_redis: Any) -> None:
    gov.events.publish("agent", 1)

    def child() -> Any:
        with reader:
            return reader.get(0)

    with consumer(gov) as reader:
        assert next(reader).payload == 1
        assert in_child(child) is None
        assert pending(plain_redis) == 1
        assert [one["name"] for one in plain_redis.xinfo_consumers("events:agent", "g")] == ["c"]
        assert reader.get(0) is None
    assert pending(plain_redis) == 0


# -- any history ------------------------------------------------------------------------------------------------------


class Groups(RuleBasedStateMachine):
    """A group whose consumers do their events, fail, die and come back, against a plain account of each event."""

    gov: GovRedis
    flush: Callable[[], Any]

    def __init__(self) -> None:
        super().__init__()
        self.flush()
        self.published: list[str] = []
        self.done: set[str] = set()
        self.delivered: dict[str, int] = {}
        self.readers: dict[str, EventConsumer] = {}
        self.has: dict[str, str | None] = {}

    @rule(n=st.integers(1, 3))
    def publish(self, n: int) -> None:
        self.published += [self.gov.events.publish("agent", None) for _ in range(n)]

    @rule(name=st.sampled_from("abc"), claims=st.booleans())
    def take(self, name: str, claims: bool) -> None:
        """The one before is done."""
        reader = self.readers.setdefault(name, consumer(self.gov, name, claim_after=3600, deliveries=1000))
        if held := self.has.get(name):
            self.done.add(held)
        reader._claim_ms, reader._claim_at = "0", 0.0 if claims else float("inf")
        event = reader.get(0)
        self.has[name] = None if event is None else event.id
        if event is not None:
            assert event.missed == 0
            was_delivered = self.delivered.get(event.id, 0)
            if event.deliveries == 1:
                # New events come in the order in which they were published, once.
                assert was_delivered == 0
                assert event.id == self.published[len(self.delivered)]
            assert event.deliveries == was_delivered + 1
            self.delivered[event.id] = event.deliveries

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.readers)))
        self.readers.pop(name)
        self.has.pop(name, None)

    @invariant()
    def no_event_is_lost(self) -> None:
        left = client_of(self.gov).call("XPENDING", "events:agent", "g", "-", "+", "1000") if self.delivered else []
        ids = {
            dict(zip(entry[1][::2], entry[1][1::2], strict=True))[b"id"].decode()
            for pending_, *_ in left
            for entry in client_of(self.gov).call("XRANGE", "events:agent", pending_, pending_)
        }
        assert self.delivered.keys() - self.done <= ids
        assert not ids - self.delivered.keys()


@pytest.fixture
def machine(gov: GovRedis, plain_redis: Any) -> Iterator[type[Groups]]:
    yield type("GroupsHere", (Groups,), {"gov": gov, "flush": staticmethod(plain_redis.flushall)})


@pytest.mark.once
def test_no_history_of_a_group_loses_an_event(machine: type[Groups]) -> None:
    machine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
    machine.TestCase("runTest").runTest()
