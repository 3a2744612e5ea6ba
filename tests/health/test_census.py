"""The census: how many keys of each kind there are, counted in small steps by one process at a time."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support import REDIS_AWAY, in_threads

from govredis import BackendUnavailable, GovRedis
from govredis.health import Check, census
from govredis.health.census import KeyCensus, sort_key
from govredis.keys import Keys
from govredis.testing.servers import RedisServer

MakeGov = Callable[..., GovRedis]

#: Its own keys, which exist while it counts.
OWN = 1


@pytest.fixture(autouse=True)
def restless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(census, "REST_MS", 0)


@pytest.fixture
def gov(make_gov: MakeGov, redis_server: RedisServer, plain_redis: Any) -> GovRedis:
    return make_gov(redis_url=redis_server.url)


def go_round(gov: GovRedis, budget: float = 0.001) -> int:
    """Returns in how many steps."""
    steps = 1
    while not gov.health.count_keys(budget):
        steps += 1
        assert steps < 100_000
    return steps


def shown(gov: GovRedis, *names: str) -> list[dict[str, Any]]:
    gov.health.renew_after_fork()  # what was seen last is forgotten
    checks = {check.name: check for check in gov.health.check().checks}
    assert {checks[name].status for name in names} == {"pass"}
    return [checks[name].data for name in names]


def fill(redis: Any, keys: dict[str, float | None]) -> None:
    with redis.pipeline(transaction=False) as pipe:
        for key, ttl in keys.items():
            pipe.set(key, "x", ex=ttl)
        pipe.execute()


class TestCounts:
    def test_are_right_to_the_key_once_it_has_gone_round(self, gov: GovRedis, plain_redis: Any) -> None:
        keys: dict[str, int | None] = {}
        for n in range(700):
            keys |= {f"session:{n}": 600, f"{{session:{n}}}:revoked": 600, f"agent_sessions:{n}": 600}
            keys |= {f"lock:{n}": None if n < 3 else 600, f"agent_meta:{n}": 600, f"other:{n}": None, f"{n}": None}
            keys |= {f"events:{n}": None, f"rate_limit:o:{n}": 600, f"{{rate_limit:o:{n}}}:counter": 600}
            keys |= {f"report:{n}": 600, f"{{report:{n}}}:stamp": 600}
        fill(plain_redis, keys)
        assert go_round(gov) > 1
        counts, more = shown(gov, "keys", "census")
        each = dict.fromkeys(("session", "agent_sessions", "lock", "agent_meta", "events", "rate_limit", "report"), 700)
        assert counts == {**each, "other": 1400, "govredis": OWN}
        assert more["siblings"] == {"session": 700, "rate_limit": 700, "report": 700}
        assert more["without_ttl"] == {"lock": 3, "other": 1400, "events": 700, **more["without_ttl"]}
        assert more["without_ttl"].keys() <= {"lock", "other", "events", "govredis"}
        assert (more["ttl_unknown"], more["crowded"]) == (0, False)
        assert more["age"] >= 0
        assert more["took"] >= 0
        assert sum(counts.values()) + sum(more["siblings"].values()) == plain_redis.dbsize()

    def test_namespaces_are_those_made_here_and_those_with_stamps(self, gov: GovRedis, plain_redis: Any) -> None:
        gov.cache("made")
        fill(plain_redis, {"made:a": 60, "found:a": 60, "found:b": 60, "{found:a}:stamp": 60, "foreign:a": 60})
        fill(plain_redis, {"{x:a}:fence": 60, "tenant:session:a": 60, "{tenant:session:a}:stamp": 60})
        go_round(gov)
        (counts,) = shown(gov, "keys")
        assert {kind: n for kind, n in counts.items() if n} == {"made": 1, "found": 2, "other": 3, "govredis": OWN}

    def test_keys_of_other_prefixes_are_others(self, make_gov: MakeGov, gov: GovRedis, plain_redis: Any) -> None:
        fill(plain_redis, {"session:a": 60, "app:session:a": 60, "{app:session:a}:revoked": 60, "apps:session:a": 60})
        go_round(app := make_gov(redis_url=gov.config.redis_url, key_prefix="app:"))
        counts, more = shown(app, "keys", "census")
        assert (counts["session"], counts["other"], counts["govredis"]) == (1, 2, OWN)
        assert more["siblings"] == {"session": 1}

    def test_a_key_that_has_ended_does_not_count(
        self, gov: GovRedis, plain_redis: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fill(plain_redis, {"session:a": 60, "session:b": 60})
        pipeline = census.RedisNode.pipeline

        def ends(client: Any, commands: Any, *args: Any, **options: Any) -> Any:
            if commands and commands[0][0] == "PTTL":
                plain_redis.delete("session:b")
            return pipeline(client, commands, *args, **options)

        monkeypatch.setattr(census.RedisNode, "pipeline", ends)
        go_round(gov)
        assert shown(gov, "keys")[0]["session"] == 1

    def test_words_are_bounded(self, gov: GovRedis, plain_redis: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(census, "_MOST_WORDS", 20)
        fill(plain_redis, {f"word-{n}:x": None for n in range(100)})
        go_round(gov)
        counts, more = shown(gov, "keys", "census")
        assert (counts["other"], more["crowded"]) == (100, True)
        assert more["without_ttl"]["other"] == 100

    def test_words_of_others_that_look_like_namespaces_are_bounded_too(
        self, gov: GovRedis, plain_redis: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(census, "_MOST_WORDS", 20)
        fill(plain_redis, {f"{{word-{n}:x}}:stamp": None for n in range(100)})
        go_round(gov)
        counts, more = shown(gov, "keys", "census")
        assert len(counts) < 40
        assert (more["siblings"]["other"] >= 80, more["crowded"]) == (True, True)

    @given(st.binary(max_size=40), st.sampled_from(["", "app:", "{"]))
    @example(b"{session:a}:revoked", "")
    @example(b"{", "")
    @example(b"{}:", "")
    @example(b"\xff:\xff", "")
    def test_any_key_has_a_word(self, key: bytes, prefix: str) -> None:
        word, _ = sort_key(Keys(prefix), key)
        assert json.loads(json.dumps(word)) == word

    def test_the_kinds_are_those_of_our_keys(self) -> None:
        keys = Keys("app:")
        ours = {
            keys.session("x"): "session",
            keys.agent_sessions("x"): "agent_sessions",
            keys.lock("x:y"): "lock",
            keys.rate_limit("o", "x"): "rate_limit",
            keys.cached("agent_meta", "x"): "agent_meta",
            keys.cached("mine", "x"): "mine",
            keys.guard(): "govredis",
            f"{{{keys.denied()}}}:1": "govredis",
        }
        assert [sort_key(keys, key.encode())[0] for key in ours] == list(ours.values())


class TestSteps:
    def test_the_next_process_goes_on_where_one_has_stopped(
        self, make_gov: MakeGov, gov: GovRedis, plain_redis: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(census, "_MOST", 20)
        fill(plain_redis, {f"session:{n}": None for n in range(1000)})
        govs = [gov, make_gov(redis_url=gov.config.redis_url)]
        progress, steps = [], 0
        while not govs[steps % 2].health.count_keys(0.001):
            steps += 1
            (more,) = shown(gov, "census")
            progress.append(more["progress"])
        assert len(progress) > 1
        assert progress == sorted(progress)
        assert 0 < progress[0] < progress[-1] < 1
        counts, more = shown(gov, "keys", "census")
        assert counts["session"] == 1000
        assert "progress" not in more, "no round is under way"

    def test_one_process_counts_at_a_time(self, make_gov: MakeGov, gov: GovRedis, plain_redis: Any) -> None:
        fill(plain_redis, {f"session:{n}": None for n in range(3000)})
        others = [make_gov(redis_url=gov.config.redis_url) for _ in range(3)]
        while not any(in_threads(*(lambda g=g: g.health.count_keys(0.005) for g in others))):
            pass
        assert shown(gov, "keys")[0]["session"] == 3000

    def test_what_a_process_counted_that_was_overtaken_is_dropped(
        self, gov: GovRedis, plain_redis: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fill(plain_redis, {f"session:{n}": None for n in range(50)})
        scan = KeyCensus._scan

        def stall(*args: Any) -> bool:
            """Another process has taken it meanwhile."""
            ended = scan(*args)
            plain_redis.hset("govredis:census", "holder", "another")
            return ended

        monkeypatch.setattr(KeyCensus, "_scan", stall)
        assert gov.health.count_keys(60) is False
        assert plain_redis.hget("govredis:census", "last") is None
        monkeypatch.setattr(KeyCensus, "_scan", scan)
        assert gov.health.count_keys(60) is False, "it is the other's for now"
        plain_redis.hset("govredis:census", "free_at", "1")
        assert gov.health.count_keys(60)

    def test_no_round_begins_right_after_another(
        self, gov: GovRedis, plain_redis: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(census, "REST_MS", 1000_000)
        assert gov.health.count_keys(60)
        plain_redis.set("session:a", 1)
        assert not gov.health.count_keys(60)
        assert shown(gov, "keys")[0]["session"] == 0
        plain_redis.hincrby("govredis:census", "rests_until", -1000_000)
        assert gov.health.count_keys(60)
        assert shown(gov, "keys")[0]["session"] == 1

    def test_the_state_ends_without_steps(self, gov: GovRedis, plain_redis: Any) -> None:
        gov.health.count_keys(60)
        assert 80_000 < plain_redis.ttl("govredis:census") <= 86_400

    def test_a_scan_that_takes_long_is_followed_by_smaller_ones(
        self, gov: GovRedis, plain_redis: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fill(plain_redis, {f"session:{n}": None for n in range(5000)})
        monkeypatch.setattr(census, "_LONG", -1)
        go_round(gov, 60)
        slow = self.counts_asked(plain_redis, lambda: go_round(gov, 60))
        assert min(slow) == census._FEWEST
        assert slow == sorted(slow, reverse=True)
        monkeypatch.setattr(census, "_LONG", 10**9)
        monkeypatch.setattr(census, "_SHORT", 10**9)
        fast = self.counts_asked(plain_redis, lambda: go_round(gov, 60))
        assert fast == sorted(fast)
        assert max(fast) == census._MOST

    def counts_asked(self, plain_redis: Any, work: Callable[[], Any]) -> list[int]:
        pipeline, asked = census.RedisNode.pipeline, []

        def watched(client: Any, commands: Any, *args: Any, **options: Any) -> Any:
            asked.extend(int(command[3]) for command in commands if command[0] == "SCAN")
            return pipeline(client, commands, *args, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(census.RedisNode, "pipeline", watched)
            work()
        return asked

    def test_no_command_walks_all_keys(self, gov: GovRedis, plain_redis: Any) -> None:
        fill(plain_redis, {f"session:{n}": None for n in range(5000)})
        plain_redis.config_resetstat()
        go_round(gov, 60)
        stats = plain_redis.info("commandstats")
        assert "cmdstat_keys" not in stats
        assert stats["cmdstat_scan"]["calls"] >= 5
        assert stats["cmdstat_pttl"]["calls"] == 5000 + OWN

    def test_the_report_shows_a_round_that_has_just_ended(self, gov: GovRedis) -> None:
        assert "keys" not in {check.name for check in gov.health.check().checks}
        assert gov.health.count_keys(60)
        assert "keys" in {check.name for check in gov.health.check().checks}

    def test_snapshot_counts_too(self, gov: GovRedis, plain_redis: Any) -> None:
        plain_redis.set("session:a", 1)
        report = gov.health.snapshot()
        (keys,) = [check.data for check in report.checks if check.name == "keys"]
        assert keys["session"] == 1
        (point,) = gov.health.history()
        assert (point.values["keys.session"], point.values["census.without_ttl.session"]) == (1, 1)


class TestFaults:
    @pytest.mark.parametrize("planted", [b"\xff", b"[]", b"{}", b"[" * 100_000, b'[1,"x",1,1,1,1,1,{},[]]', b"[1,2]"])
    def test_a_state_that_govredis_has_not_written_begins_anew(
        self, gov: GovRedis, plain_redis: Any, planted: bytes
    ) -> None:
        plain_redis.set("session:a", 1)
        plain_redis.hset(
            "govredis:census", mapping={"round": planted, "last": planted, "free_at": "x", "rests_until": "y"}
        )
        assert "keys" not in {check.name for check in gov.health.check().checks}
        assert gov.counters.get("health.unreadable") == 1
        assert gov.health.count_keys(60)
        assert shown(gov, "keys")[0]["session"] == 1

    def test_a_key_of_another_type_is_said(self, gov: GovRedis, plain_redis: Any) -> None:
        plain_redis.set("govredis:census", "x")
        report = gov.health.snapshot()
        found = next(check for check in report.checks if check.name == "keys")
        assert (report.status, found.status) == ("warn", "warn")
        assert "WRONGTYPE" in found.output

    def test_rights_that_are_missing_hide_only_what_they_hide(
        self, make_gov: MakeGov, mortal_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        mortal_redis.command("ACL", "SETUSER", "ann", "on", ">pw", "~govredis:*", "~session:*", "+@all")
        for n in range(100):
            mortal_redis.command("SET", f"session:{n}", "x")
            mortal_redis.command("SET", f"other:{n}", "x")
        gov = make_gov(redis_url=mortal_redis.url.replace("//", "//ann:pw@"))
        pipeline, asked = census.RedisNode.pipeline, []

        def watched(client: Any, commands: Any, *args: Any, **options: Any) -> Any:
            asked.extend(command[1] for command in commands if command[0] == "PTTL")
            return pipeline(client, commands, *args, **options)

        monkeypatch.setattr(census.RedisNode, "pipeline", watched)
        go_round(gov, 60)
        assert 0 < len([key for key in asked if key.startswith(b"other")]) < 100, "ACL LOG is not filled"
        checks = {check.name: check.data for check in gov.health.check().checks}
        assert (checks["keys"]["session"], checks["keys"]["other"]) == (100, 100)
        assert checks["census"]["without_ttl"]["session"] == 100
        assert checks["census"]["ttl_unknown"] == 100
        assert "other" not in checks["census"]["without_ttl"]

    def test_redis_away_raises_and_a_snapshot_goes_on(self, make_gov: MakeGov) -> None:
        gov = make_gov(redis_url=REDIS_AWAY)
        with pytest.raises(BackendUnavailable):
            gov.health.count_keys()
        assert gov.health.snapshot().status == "fail"
        assert make_gov(redis_enabled=False).health.count_keys() is False

    @pytest.mark.parametrize("budget", [0, -1, float("nan"), "1", True])
    def test_a_bad_budget_is_refused(self, gov: GovRedis, budget: Any) -> None:
        with pytest.raises(ValueError, match="budget is"):
            gov.health.count_keys(budget)


def test_a_report_names_each_kind_once(gov: GovRedis) -> None:
    gov.health.snapshot()
    names: Counter[str] = Counter(check.name for check in gov.health.check().checks)
    assert max(names.values()) == 1
    assert Check("keys", "pass", "", {}) not in gov.health.check().checks
