"""The promises of init_celery, rate_limited and exclusive, kept by real prefork workers, killed ones among them."""

from __future__ import annotations

import json
import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import psycopg2
import pytest
from celery import chain, chord, group
from celery.exceptions import TaskRevokedError, TimeLimitExceeded
from celery.result import AsyncResult
from celery_fleet import Fleet, Reader
from support import PATIENCE, eventually, redis_of

from govredis import Config, GovRedis, LockTimeout, RateLimitExceeded
from govredis.contrib.celery._parking import HEADER
from govredis.health import Check
from govredis.testing.servers import RedisServer

FLOOD = 200


def name() -> str:
    return uuid.uuid4().hex


@pytest.fixture(scope="session")
def celery_gov(celery_settings: dict[str, Any]) -> Iterator[GovRedis]:
    """On what `first`, `second`, `short` and `warm` use."""
    with GovRedis(Config(**celery_settings)) as gov:
        yield gov


class Published:
    """Publishes to the queue of some workers, and waits for what comes of it."""

    def __init__(self, fleet: Fleet, queue: str, broker: str | None = None) -> None:
        self.fleet, self.app, self.queue = fleet, fleet.app(broker), queue

    def __call__(self, task: str, *args: Any, **options: Any) -> AsyncResult:
        return self.app.send_task(task, args, **{"queue": self.queue, **options})

    def signature(self, task: str, *args: Any, **options: Any) -> Any:
        return self.app.signature(task, args, **{"queue": self.queue, **options})


@pytest.fixture
def pair(fleet: Fleet) -> Published:
    return Published(fleet, "pair")


@pytest.fixture
def short(fleet: Fleet, short_broker: RedisServer) -> Published:
    return Published(fleet, "short", short_broker.url)


@pytest.fixture
def mortal(fleet: Fleet) -> Published:
    return Published(fleet, "mortal")


@pytest.fixture(scope="session")
def flood(fleet: Fleet, celery_gov: GovRedis) -> list[AsyncResult]:
    """Published before the first test of this file runs, so that it need not be waited for: the last one looks."""
    # The log then keeps its entries for an hour: it tells at what server time each was admitted.
    celery_gov.limits.record("swarm", 3600, operation="flood")
    redis_of(celery_gov).call("DEL", "rate_limit:flood:swarm")
    publish = Published(fleet, "pair")
    return [publish("flood", "swarm", n) for n in range(FLOOD)]


@pytest.fixture(autouse=True)
def mended(fleet: Fleet, flood: list[AsyncResult], mortal_cache: RedisServer) -> None:
    if not mortal_cache.running:
        mortal_cache.restart()
    fleet.mend()


# -- limits ----------------------------------------------------------------------------------------------------------


def before_and_after(fleet: Fleet, task_id: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A message as it was delivered first, when the limit refused it, and as it was delivered last."""
    seen = fleet.noted(f"seen:{task_id}")
    assert len(seen) > 1, "no retry"
    assert {line["eta"] for line in seen} == {None}, "the broker is not told to wait"
    assert fleet.noted(f"retry:{task_id}")[0]["why"] == "RateLimitExceeded"
    assert len(fleet.noted(f"ran:{task_id}")) == 1
    messages = seen[0]["message"], seen[-1]["message"]
    for message in messages:
        message["ignore_result"] = bool(message["ignore_result"])  # None at first where nobody set it
        message["headers"] = {name: value for name, value in (message["headers"] or {}).items() if name != HEADER}
        if message["parent_id"] == message["id"]:
            message["parent_id"] = None  # Celery's own retries also make an orphan its own parent
    return messages


class TestMessages:
    def test_all_that_a_message_carries_survives_a_limit(self, fleet: Fleet, pair: Published) -> None:
        headers = {"x-tenant": "acme", "x-trace": "1-2"}
        options: dict[str, Any] = {
            "expires": 300,
            "priority": 3,
            "headers": headers,
            "shadow": "by another name",
            "time_limit": 90,
            "soft_time_limit": 80,
            "queue": "other",
            "link": pair.signature("add", 40),
            "link_error": pair.signature("add", 0),
        }
        full = pair("traced", name(), 2, **options)
        quiet = pair("traced", name(), 2, ignore_result=True)
        by_keyword = pair("traced", kwargs={"identity": name(), "number": 4})
        assert full.get(PATIENCE) == 2
        assert by_keyword.get(PATIENCE) == 4
        before, after = before_and_after(fleet, full.id)
        assert before == after
        assert after["where"] == ["", "other", 3]
        assert after["headers"] == headers
        assert (after["shadow"], after["timelimit"], after["ignore_result"]) == ("by another name", [90, 80], False)
        assert after["expires"].startswith("20"), "not five minutes from each retry: an instant"
        assert [link["task"] for link in after["callbacks"]] == ["add"]
        eventually(lambda: [2, 40] in [line["numbers"] for line in fleet.noted("added")], what="the link is called")

        eventually(lambda: fleet.noted(f"ran:{quiet.id}"), what="the one without a result ran")
        before, after = before_and_after(fleet, quiet.id)
        assert before == after
        assert after["ignore_result"] is True
        assert quiet.backend.get(quiet.backend.get_key_for_task(quiet.id)) is None

        before, after = before_and_after(fleet, by_keyword.id)
        assert before == after
        assert (after["args"], after["kwargs"].keys()) == ([], {"identity", "number"})

    def test_chains_groups_and_chords(self, fleet: Fleet, pair: Published) -> None:
        def limited(number: int) -> Any:
            return pair.signature("traced", name(), number)

        chained = chain(limited(1), pair.signature("add", 10), app=pair.app).apply_async()
        chorded = chord([limited(1), limited(2), limited(3)], pair.signature("add"), app=pair.app).apply_async()
        grouped = group([limited(4), limited(5)], app=pair.app).apply_async()
        last = chain(
            pair.signature("add", 1, 2), pair.signature("traced", name(), 9, immutable=True), app=pair.app
        ).apply_async()
        assert chained.get(PATIENCE) == 11
        assert chorded.get(PATIENCE) == 6
        assert grouped.get(PATIENCE) == [4, 5]
        assert last.get(PATIENCE) == 9
        for result in (chained.parent, *chorded.parent, *grouped, last):
            before, after = before_and_after(fleet, result.id)
            assert before == after
        assert before_and_after(fleet, chained.parent.id)[1]["chain"]
        for index, result in enumerate(chorded.parent):
            message = before_and_after(fleet, result.id)[1]
            assert (message["group"], message["group_index"]) == (chorded.parent.id, index)
            assert message["chord"]["task"] == "add"
        assert before_and_after(fleet, last.id)[1]["parent_id"] == last.parent.id

    def test_the_retries_are_the_users_own(self, fleet: Fleet, pair: Published) -> None:
        """It may retry once, and is limited twice."""
        result = pair("failing", name())
        assert result.get(PATIENCE) == 1
        assert [ran["retries"] for ran in fleet.noted(f"ran:{result.id}")] == [0, 1]
        why = [retry["why"] for retry in fleet.noted(f"retry:{result.id}")]
        assert why.count("ValueError") == 1
        assert why.count("RateLimitExceeded") >= 2

    def test_raise_and_skip(self, fleet: Fleet, pair: Published) -> None:
        agent = name()
        for task in ("strict", "skipping"):
            assert pair(task, agent).get(PATIENCE) == agent
        assert pair("skipping", agent).get(PATIENCE) is None
        refused = pair("strict", agent)
        with pytest.raises(RateLimitExceeded, match=r"^rate limit exceeded: .*, retry after \d+\.\d{3} s$") as caught:
            refused.get(PATIENCE)
        assert caught.value.result is None, "JSON does not bring it along"
        assert not fleet.noted(f"retry:{refused.id}")


# -- locks -----------------------------------------------------------------------------------------------------------


class TestExclusive:
    def test_a_key_runs_one_task_at_a_time(self, fleet: Fleet, pair: Published) -> None:
        waits: list[list[float]] = []
        for seconds in 0.1, 1, 5, 25:  # until the tasks take longer than their publishing
            waits = self.waits_of_a_round(fleet, pair, seconds)
            if any(waits):
                break
        assert any(waits), "nobody met a key that was taken"
        for several in waits:
            for n, wait in enumerate(several):
                assert 0.5 * 2**n <= wait <= 1.25 * 0.5 * 2**n

    @staticmethod
    def waits_of_a_round(fleet: Fleet, pair: Published, seconds: float) -> list[list[float]]:
        """Four tasks of `seconds` for each of three keys. Returns the countdowns of each task's retries."""
        keys = [name() for _ in range(3)]
        results = [pair("alone", key, n, seconds, headers={"x-tenant": "acme"}) for n in range(4) for key in keys]
        assert [result.get(PATIENCE) for result in results] == [n for n in range(4) for _ in keys]
        runs = [run for run in fleet.noted("alone") if run["key"] in keys]
        assert len(runs) == len(results)
        assert {run["retries"] for run in runs} == {0}
        assert {run["headers"]["x-tenant"] for run in runs} == {"acme"}
        for key in keys:
            mine = sorted((run["began"], run["ended"]) for run in runs if run["key"] == key)
            assert overlaps(mine) == 0
        return [
            [retry["when"] for retry in fleet.noted(f"retry:{result.id}") if retry["why"] == "LockTimeout"]
            for result in results
        ]

    def test_two_keys_two_tasks(self, pair: Published) -> None:
        one, other = name(), name()
        results = [pair("meet", one, other), pair("meet", other, one)]
        assert [result.get(PATIENCE) for result in results] == [None, None]

    def test_the_check_above_can_fail(self) -> None:
        assert overlaps([(0, 1), (1, 2), (2, 3)]) == 0
        assert overlaps([(0, 1), (0.9, 2), (2, 3)]) == 1

    def test_a_key_is_free_as_soon_as_its_task_was_ended(
        self, fleet: Fleet, pair: Published, celery_gov: GovRedis
    ) -> None:
        """The lease is of 1,000 s: it was released, and has not run out."""
        revoked, softly, hard = (name() for _ in range(3))
        results = {
            revoked: pair("hold", revoked),
            # Long enough for a task to say that it holds the key, also where the machine stalls for 5 s.
            softly: pair("hold", softly, soft_time_limit=8),
            hard: pair("hold", hard, time_limit=8),
        }
        eventually(lambda: all(fleet.noted(f"holding:{key}") for key in results), what="all of them run")
        assert taken(celery_gov, f"hold:{revoked}")
        conflict = pair("alone_or_error", revoked)
        assert pair("alone_or_not", revoked).get(PATIENCE) is None
        with pytest.raises(LockTimeout, match=revoked):
            conflict.get(PATIENCE)
        assert not fleet.noted(f"retry:{conflict.id}")
        pair.app.control.revoke(results[revoked].id, terminate=True, signal="SIGTERM")
        for key in results:
            eventually(lambda key=key: not taken(celery_gov, f"hold:{key}"), what=f"{key} is free")
        followers = [pair("follow", key) for key in results]
        assert [follower.get(PATIENCE) for follower in followers] == [None] * 3
        assert results[softly].get(PATIENCE) == "ended softly"
        with pytest.raises(TaskRevokedError):
            results[revoked].get(PATIENCE)
        with pytest.raises(TimeLimitExceeded):
            results[hard].get(PATIENCE)

    def test_the_key_of_a_killed_worker_is_free_within_the_ttl(
        self, fleet: Fleet, pair: Published, short: Published, celery_gov: GovRedis
    ) -> None:
        key = name()
        short("hold_shortly", key)
        eventually(lambda: fleet.noted(f"holding:{key}"), what="it runs")
        waiting = pair("follow", key)
        eventually(lambda: fleet.noted(f"retry:{waiting.id}"), what="the other one waits")
        assert not fleet.noted(f"followed:{key}")
        assert fleet.noted(f"retry:{waiting.id}")[0]["why"] == "LockTimeout"
        lease_ms = redis_of(celery_gov).call("PTTL", f"lock:hold:{key}")
        assert 0 < lease_ms <= 10_000, "nobody renews it any more once it is killed"
        killed = time.monotonic()
        fleet.processes["short"].kill()
        eventually(lambda: not taken(celery_gov, f"hold:{key}"), what="it is free")
        assert waiting.get(PATIENCE) is None
        assert fleet.noted(f"followed:{key}")[0]["at"] > killed
        fleet.again("short")
        fleet.wait_ready("short")

    def test_the_key_of_a_killed_process_is_free_on_its_host_for_its_own_task_and_for_others(
        self, fleet: Fleet, pair: Published, celery_gov: GovRedis
    ) -> None:
        """Its lease is of 1,000 s. It is delivered again at once, to either worker."""
        key = name()
        tasks = [pair("hold_late", key) for _ in range(3)]
        seen = f"holding:{key}"
        eventually(lambda: fleet.noted(seen), what="it runs")
        for killed in range(2):
            # SIGKILL, to the process of the pool that runs it, in this fleet.
            os.kill(fleet.noted(seen)[killed]["pid"], signal.SIGKILL)
            eventually(lambda killed=killed: len(fleet.noted(seen)) > killed + 1, what="one of them runs")
            with pytest.raises(LockTimeout, match=key):
                pair("alone_or_error", key).get(PATIENCE)
            assert pair("alone_or_not", key).get(PATIENCE) is None
        runs = fleet.noted(seen)
        assert len({run["pid"] for run in runs}) == 3
        tokens = [run["token"] for run in runs]
        assert tokens == sorted(set(tokens))

        fleet.evidence.set(f"end:{key}", 1)
        assert all(task.get(PATIENCE) for task in tasks), "the killed ones too"
        eventually(lambda: not taken(celery_gov, f"hold:{key}"), what="it is free")


def taken(gov: GovRedis, lock: str) -> bool:
    return bool(redis_of(gov).call("EXISTS", f"lock:{lock}"))


def overlaps(intervals: Sequence[tuple[float, float]]) -> int:
    return sum(ended > began for (_, ended), (began, _) in pairwise(intervals))


# -- the Redis of limits and locks is away ---------------------------------------------------------------------------


def test_tasks_that_wait_for_redis_run_when_it_is_back(
    fleet: Fleet,
    mortal: Published,
    mortal_cache: RedisServer,
    celery_settings: dict[str, Any],
    make_gov: Callable[..., GovRedis],
) -> None:
    gov = make_gov(**{**celery_settings, "redis_url": mortal_cache.url})
    agent = name()
    gov.metadata.set(agent, "old")
    # beat is in the worker: its messages are here.
    eventually(lambda: mortal_cache.command("XLEN", "govredis:health") > 1, what="a heartbeat and snapshots")
    eventually(lambda: beat_status(gov) == "pass", what="beat is seen")
    stored = "SELECT count(*) FROM govredis_health_snapshots"
    before = gov.postgres.fetch(stored)[0][0]

    mortal_cache.kill()
    locked = mortal("alone", name(), 7)
    invalidation = mortal("govredis.invalidate_metadata", agent)
    # NotAsked is the BackendUnavailable of a breaker that is open.
    for result, why in ((locked, {"LockUnavailable"}), (invalidation, {"BackendUnavailable", "NotAsked"})):
        eventually(lambda result=result: len(fleet.noted(f"retry:{result.id}")) > 1, what="it waits")
        assert {retry["why"] for retry in fleet.noted(f"retry:{result.id}")} <= why
        assert not result.ready()
    for retry in fleet.noted(f"retry:{invalidation.id}"):
        assert 2 <= retry["when"] <= 2.5
    eventually(lambda: gov.postgres.fetch(stored)[0][0] > before + 1, what="snapshots go to PostgreSQL")

    mortal_cache.restart()
    assert locked.get(PATIENCE) == 7
    assert invalidation.get(PATIENCE) is None
    eventually(lambda: gov.health.check().checks[0].status == "pass", what="this process is back")
    assert gov.metadata.get(agent) is None
    assert len([run for run in fleet.noted("alone") if run["n"] == 7 and run["node"] == "mortal"]) == 1
    length = mortal_cache.command("XLEN", "govredis:health")
    eventually(lambda: mortal_cache.command("XLEN", "govredis:health") > length + 1, what="snapshots go to Redis again")
    eventually(lambda: beat_status(gov) == "pass", what="beat is seen again")
    report = json.loads(mortal_cache.command("XREVRANGE", "govredis:health", "+", "-", "COUNT", "1")[0][1]["report"])
    assert {"redis", "postgres", "counters"} <= report["checks"].keys()


def beat_status(gov: GovRedis) -> str:
    return next((check.status for check in gov.health.check().checks if check.name == "beat"), "never seen")


def beat_every(gov: GovRedis) -> float | None:
    return next((check.data["every"] for check in gov.health.check().checks if check.name == "beat"), None)


# -- beat ------------------------------------------------------------------------------------------------------------


def test_a_beat_that_is_gone_is_warned_of(fleet: Fleet, celery_settings: dict[str, Any], celery_gov: GovRedis) -> None:
    assert beat_every(celery_gov) != 0.3, "PostgreSQL remembers that of `mortal`"
    intervals = {"govredis_heartbeat_interval": 0.3, "govredis_snapshot_interval": 0.3, "govredis_purge_interval": 0.3}
    beat = fleet.beat("beat", queue="pair", conf={**intervals, "beat_max_loop_interval": 0.1})
    eventually(lambda: (beat_status(celery_gov), beat_every(celery_gov)) == ("pass", 0.3), what="beat is seen")
    history = eventually(lambda: redis_of(celery_gov).call("XLEN", "govredis:health"), what="snapshots")
    eventually(lambda: redis_of(celery_gov).call("XLEN", "govredis:health") > history, what="more of them")

    beat.kill()

    def missed() -> tuple[str, Check] | None:
        report = celery_gov.health.check()
        check = next((check for check in report.checks if check.name == "beat"), None)
        return (report.status, check) if check and check.output.startswith("no heartbeat for ") else None

    status, check = eventually(missed, what="beat is missed")
    assert (status, check.status) == ("warn", "warn")
    assert "beat is gone, or every worker" in check.output
    assert check.data["every"] == 0.3
    assert check.data["seconds_since"] > 0.6

    fleet.again("beat")
    eventually(lambda: beat_status(celery_gov) == "pass", what="beat is seen again")
    text = fleet.processes["beat"].text()
    for task in ("heartbeat", "health_snapshot", "purge"):
        assert f"(govredis.{task})" in text
    fleet.processes["beat"].kill()


# -- invalidation ----------------------------------------------------------------------------------------------------


def test_other_processes_read_the_changed_metadata(
    fleet: Fleet, pair: Published, celery_settings: dict[str, Any], celery_gov: GovRedis
) -> None:
    agent = name()
    reader = Reader(**celery_settings)
    sql = psycopg2.connect(celery_settings["database_url"])
    sql.autocommit = True

    def read() -> Any:
        seen = reader.eval(f"gov.metadata.get_or_load({agent!r}, gov.agents.get)['metadata']['step']")
        return seen, reader.eval("gov.metadata.stats().get('hits', 0)")

    def invalidated() -> int:
        return celery_gov.metadata.stats().get("invalidated", 0)

    def write(text: str, *params: Any) -> None:
        with sql.cursor() as cursor:
            cursor.execute(text, params)

    try:
        celery_gov.agents.create(agent, {"step": 1})
        assert read() == (1, 0)
        assert read() == (1, 1), "cached"

        celery_gov.agents.update_metadata(agent, step=2)
        assert read() == (2, 1), "by the invalidation of the writer"

        write("UPDATE govredis_agents SET metadata = '{\"step\": 3}' WHERE agent_id = %s", agent)
        assert read() == (2, 2), "nobody was told"
        assert pair("govredis.invalidate_metadata", agent).get(PATIENCE) is None
        assert read() == (3, 2)

        count = invalidated()
        write(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'refused'; END $$;"
            "CREATE TRIGGER refuse BEFORE UPDATE ON govredis_agents FOR EACH ROW EXECUTE FUNCTION refuse()"
        )
        with pytest.raises(Exception, match="refused"):
            celery_gov.agents.update_metadata(agent, step=4)
        assert celery_gov.agents.update_metadata(name(), step=4) is None
        with pytest.raises(ValueError, match="exists already"):
            celery_gov.agents.create(agent)
        assert (invalidated(), read()) == (count, (3, 3)), "nothing was written: nothing is invalidated"
    finally:
        write("DROP FUNCTION IF EXISTS refuse CASCADE")
        sql.close()
        reader.close()


# -- forks -----------------------------------------------------------------------------------------------------------


def test_children_of_a_parent_that_used_everything(fleet: Fleet, celery_gov: GovRedis) -> None:
    publish = Published(fleet, "warm")
    answers = [result.get(PATIENCE) for result in [publish("use", n) for n in range(80)]]
    (parent,) = fleet.noted("warm")
    assert parent["pid"] == fleet.processes["warm"].pid
    assert parent["sockets"]
    children = {answer["pid"] for answer in answers}
    assert len(children) >= 80 / 5
    assert parent["pid"] not in children
    for answer in answers:
        assert (answer["allowed"], answer["bound"], answer["session"]) == (True, "agent", "agent")
        assert (answer["loaded"], answer["away"]) == ({"a": 1}, 0)
    assert len({answer["token"] for answer in answers}) == 80
    for what in ("clients", "sockets"):
        owner = dict.fromkeys(parent[what], parent["pid"])
        for answer in answers:
            for one in answer[what]:
                assert owner.setdefault(one, answer["pid"]) == answer["pid"], f"one of {what} has two owners"
    # No child released a lock of the parent; the parent goes on renewing it.
    kept = f"lock:kept-by-{parent['pid']}"
    left = redis_of(celery_gov).call("PTTL", kept)
    assert left > 0
    eventually(lambda: redis_of(celery_gov).call("PTTL", kept) > left, what="it is renewed")
    fleet.needed.remove("warm")
    assert fleet.processes["warm"].stop() == 0
    log = fleet.processes["warm"].text()
    for bad in ("ERROR", "CRITICAL", "Traceback", "WARNING/ForkPoolWorker"):
        assert bad not in log


# -- killed workers --------------------------------------------------------------------------------------------------


def test_nothing_of_a_killed_worker_is_lost(
    fleet: Fleet, short: Published, short_broker: RedisServer, celery_gov: GovRedis
) -> None:
    agent = name()
    limited = [short("late_limited", agent, n) for n in range(20)]
    eventually(lambda: sum(bool(fleet.noted(f"retry:{task.id}")) for task in limited) == 10, what="half of them wait")
    for n in range(20):
        short("late", n)
    # Nothing may be on its way from the broker to the worker: that the Redis transport does lose.
    eventually(lambda: short_broker.command("LLEN", "short") == 0 and len(fleet.noted("late")) > 3, what="it has all")
    fleet.processes["short"].kill()
    assert len({line["n"] for line in fleet.noted("late")}) < 20, "killed too late to show anything"
    assert len({line["n"] for line in fleet.noted("late_limited")}) < 20, "killed too late to show anything"
    # Else it takes an hour until the broker delivers again, and until the limit has room.
    for message in short_broker.command("ZRANGE", "unacked_index", 0, -1):
        short_broker.command("ZADD", "unacked_index", "XX", 0, message)
    celery_gov.limits.reset(agent, operation="late")
    assert celery_gov.internal.parked.lot(short_broker.url).flush() == 10  # type: ignore[union-attr]
    fleet.again("short")
    for task in ("late", "late_limited"):
        eventually(lambda task=task: {line["n"] for line in fleet.noted(task)} == set(range(20)), what=f"all {task}")


def test_a_task_that_cannot_be_published_anew_is_not_lost(
    fleet: Fleet, short: Published, short_broker: RedisServer, celery_gov: GovRedis
) -> None:
    fleet.evidence.delete("gate-open")
    key = name()
    with celery_gov.locks.acquire(f"gated:{key}"):
        late, early = short("gated_late", key), short("gated_early", key)
        eventually(lambda: all(fleet.noted(f"gate:{one.id}") for one in (late, early)), what="both wait for the gate")
        short_broker.command("ACL", "SETUSER", "writer", "off")
        short_broker.command("CLIENT", "KILL", "USER", "writer")
        fleet.evidence.set("gate-open", 1)
        try:
            # It was acknowledged when it began: only it can say that it did not run.
            eventually(lambda: early.state == "FAILURE", what="the one says so")
            assert type(early.result).__name__ == "OperationalError"
            eventually(lambda: int(fleet.evidence.get(f"deliveries:{late.id}")) > 1, what="the late one is handed back")
            assert not late.ready()
        finally:
            short_broker.command("ACL", "SETUSER", "writer", "on")
    assert late.get(PATIENCE) is None
    assert len(fleet.noted(f"ran:{late.id}")) == 1
    assert not fleet.noted(f"ran:{early.id}")


# -- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("govredis_redis_url", "redis://user:hunter2@h:port/0", "govredis_redis_url is 'redis://user:***@h:port/0'"),
        ("govredis_redis_ulr", "redis://user:hunter2@h/0", "govredis_redis_ulr is no setting"),
        ("govredis_heartbeat_interval", "often", "govredis_heartbeat_interval is 'often'"),
    ],
)
def test_a_worker_does_not_start_with_a_wrong_setting(fleet: Fleet, setting: str, value: str, words: str) -> None:
    worker = fleet.worker(f"wrong-{setting}", "-c", "1", conf={setting: value})
    assert worker.wait() != 0
    assert words in worker.text()
    assert "hunter2" not in worker.text()
    assert not fleet.evidence.exists(f"ready:wrong-{setting}")


# -- the flood -------------------------------------------------------------------------------------------------------


def most_within(window_us: int, times: Sequence[int]) -> int:
    """The most of `times`, in microseconds, that lie within any window (t - window, t]."""
    most, first, times = 0, 0, sorted(times)
    for last, time_us in enumerate(times):
        while times[first] <= time_us - window_us:
            first += 1
        most = max(most, last - first + 1)
    return most


def test_most_within_can_fail() -> None:
    steady = [n * 100_000 for n in range(200)]
    assert most_within(2_000_000, steady) == 20
    assert most_within(2_000_000, [*steady, 5_000_001]) == 21
    assert most_within(2_000_000, [*steady[:50], 10_000_000 - 1, *steady[50:]]) == 21
    assert most_within(2_000_000, [7] * 30) == 30


def test_a_flood_is_limited_over_all_workers_and_nothing_of_it_is_lost(
    fleet: Fleet, flood: list[AsyncResult], celery_gov: GovRedis
) -> None:
    assert [result.get(PATIENCE) for result in flood] == list(range(FLOOD))
    runs = fleet.noted("flood")
    assert sorted(run["n"] for run in runs) == list(range(FLOOD)), "each once"
    assert {(run["retries"], run["max_retries"], run["override"]) for run in runs} == {(0, 0, None)}
    assert {run["node"] for run in runs} == {"first", "second"}
    assert len({run["pid"] for run in runs}) > 2
    scores = redis_of(celery_gov).call("ZRANGE", "rate_limit:flood:swarm", "0", "-1", "WITHSCORES")[1::2]
    admitted = [round(float(score) * 1_000_000) for score in scores]
    assert len(admitted) == FLOOD, "each run was admitted, once"
    assert most_within(2_000_000, admitted) <= 20
    refused = [retry for result in flood for retry in fleet.noted(f"retry:{result.id}")]
    assert {(retry["why"], retry["degraded"]) for retry in refused} == {("RateLimitExceeded", False)}
