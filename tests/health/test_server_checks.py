"""The facts that Redis and PostgreSQL tell about themselves, and the faults among them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import psycopg2
import pytest
from support import PATIENT, eventually, redis_of

from govredis import BackendUnavailable, GovRedis
from govredis.health import Check, verdict
from govredis.testing.servers import PostgresServer, RedisSentinel, RedisServer

pytestmark = pytest.mark.one_redis

MakeGov = Callable[..., GovRedis]


@pytest.fixture
def mortal(make_gov: MakeGov, mortal_redis: RedisServer) -> GovRedis:
    return make_gov(redis_url=mortal_redis.url, **PATIENT)


def checks(gov: GovRedis) -> dict[str, Check]:
    gov.health.renew_after_fork()  # what was seen last is forgotten
    return {check.name: check for check in gov.health.check().checks}


def faults(info: dict[str, str], **data: Any) -> list[tuple[str, str]]:
    """The checks of an INFO with these fields, without the words."""
    fine = {"maxmemory": "0", "maxmemory_policy": "noeviction", "role": "master"}
    return [(check.name, check.status) for check in verdict.of_info({**fine, **info}, data)]


def test_sentinels_that_do_not_answer_or_refuse_us_are_named(make_gov: MakeGov, redis_binary: str) -> None:
    with RedisSentinel(binary=redis_binary) as group:
        gov = make_gov(redis_url=group.url, **PATIENT)
        assert "sentinels" not in checks(gov)
        (away, strict, _), primary = group.sentinel_servers, group.master.port
        away.kill()
        strict.command("SENTINEL", "REMOVE", "mymaster")
        names = sorted(f"127.0.0.1:{sentinel.port}" for sentinel in (away, strict))

        def found() -> Check | None:
            return checks(gov).get("sentinels")

        said = eventually(lambda: (check := found()) and all(name in check.output for name in names) and check)
        assert said.status == "warn"
        assert said.output == f"no answer, or a refusal, from 2 of 3 Sentinels: {', '.join(names)}"
        assert said.data == {"unanswered": names}
        assert checks(gov)["redis"].status == "pass"
        away.start()
        strict.command("SENTINEL", "MONITOR", "mymaster", "127.0.0.1", primary, 2)
        eventually(lambda: found() is None)


class TestRedisFacts:
    def test_are_in_the_report(self, mortal: GovRedis, mortal_redis: RedisServer) -> None:
        mortal_redis.command("SET", "a", "1")
        mortal_redis.command("SET", "b", "1", "EX", "1000")
        data = checks(mortal)["redis"].data
        assert (data["keys"], data["expiring_keys"], data["role"]) == (2, 1, "master")
        assert isinstance(data["mem_fragmentation_ratio"], float)
        assert data["maxclients"] > data["connected_clients"] >= 1
        assert (data["rdb_last_bgsave_status"], data["aof_enabled"], data["connected_slaves"]) == ("ok", 0, 0)
        assert data["last_save_age"] >= 0
        json.dumps(data, allow_nan=False)

    def test_expiring_keys_are_those_of_our_database(self, make_gov: MakeGov, mortal_redis: RedisServer) -> None:
        mortal_redis.command("SET", "a", "1", "EX", "1000")
        other = make_gov(redis_url=f"{mortal_redis.url.rsplit('/', 1)[0]}/3", **PATIENT)
        assert checks(other)["redis"].data["expiring_keys"] == 0

    def test_evictions_have_a_rate(self, mortal: GovRedis, mortal_redis: RedisServer) -> None:
        assert "evicted_per_second" not in checks(mortal)["redis"].data
        used = int(mortal_redis.command("MEMORY", "STATS")[3])
        mortal_redis.command("CONFIG", "SET", "maxmemory-policy", "allkeys-random")
        mortal_redis.command("CONFIG", "SET", "maxmemory", str(used + 300_000))
        for n in range(100):
            mortal_redis.command("SET", f"k{n}", "x" * 10_000)
        assert checks(mortal)["redis"].data["evicted_per_second"] > 0


class TestRedisFaults:
    def test_memory_that_is_nearly_full(self, mortal: GovRedis, mortal_redis: RedisServer) -> None:
        checks(mortal)
        mortal_redis.command(
            "CONFIG", "SET", "maxmemory", str(int(mortal_redis.command("MEMORY", "STATS")[3]) * 101 // 100)
        )
        found = checks(mortal)["memory"]
        assert found.status == "warn"
        assert "Redis refuses to write: raise maxmemory" in found.output
        mortal_redis.command("CONFIG", "SET", "maxmemory", "0")
        assert "memory" not in checks(mortal)
        evicts = {"maxmemory": "100", "maxmemory_policy": "volatile-lru"}
        # It evicts then, and takes writes.
        assert faults(evicts, used_memory=100, maxmemory=100, maxmemory_policy="volatile-lru") == [("eviction", "warn")]

    @pytest.mark.parametrize(
        ("used", "ratio", "warns"),
        [(10**9, 1.6, True), (10**9, 1.4, False), (10**6, 9.0, False), (10**9, 0.8, True), (10**9, 0.95, False)],
    )
    def test_memory_that_is_fragmented_or_swapped_out(self, used: int, ratio: float, warns: bool) -> None:
        assert faults({}, used_memory=used, mem_fragmentation_ratio=ratio) == [("memory", "warn")] * warns

    @pytest.mark.parametrize(
        ("info", "warns"),
        [
            ({"rdb_last_bgsave_status": "err"}, True),
            ({"aof_last_write_status": "err"}, True),
            ({"aof_last_bgrewrite_status": "err"}, True),
            ({"rdb_last_bgsave_status": "ok", "aof_last_write_status": "ok"}, False),
        ],
    )
    def test_saves_that_failed(self, info: dict[str, str], warns: bool) -> None:
        assert faults(info) == [("persistence", "warn")] * warns

    def test_a_replica(self, mortal: GovRedis, mortal_redis: RedisServer) -> None:
        mortal_redis.command("REPLICAOF", "127.0.0.1", "1")
        found = checks(mortal)["replication"]
        assert found.status == "warn"
        assert found.output.endswith("takes no writes; its link to the master is down")

    def test_a_replica_that_is_behind(self) -> None:
        assert faults({}, replica_lag=10) == []
        assert faults({}, replica_lag=11) == [("replication", "warn")]

    def test_a_redis_that_does_not_write_for_want_of_replicas(self, make_gov: MakeGov, one_redis_binary: str) -> None:
        with RedisServer(binary=one_redis_binary, config=["min-replicas-to-write 1"]) as server:
            gov = make_gov(redis_url=server.url)
            with pytest.raises(BackendUnavailable, match="NOREPLICAS"):
                redis_of(gov).call("SET", "k", "v")
            (found,) = [check for check in gov.health.check().checks if check.name == "replication"]
            assert (found.status, "takes no writes" in found.output) == ("warn", True)

    def test_the_lag_of_the_last_replica_counts(
        self, make_gov: MakeGov, mortal: GovRedis, mortal_redis: RedisServer
    ) -> None:
        with RedisServer() as replica:
            replica.command("REPLICAOF", "127.0.0.1", str(mortal_redis.port))
            lag = eventually(lambda: checks(mortal)["redis"].data.get("replica_lag") is not None, what="it is seen")
            assert lag
            assert checks(mortal)["redis"].data["connected_slaves"] == 1

    def test_connections_that_are_nearly_used_up(self) -> None:
        assert faults({}, connected_clients=89, maxclients=100) == []
        assert faults({}, connected_clients=90, maxclients=100) == [("clients", "warn")]

    def test_a_command_that_was_slow(self) -> None:
        assert verdict.of_slowlog(0.19, "KEYS", 0.2) == []
        (found,) = verdict.of_slowlog(0.25, "KEYS", 0.2)
        assert (found.name, found.status) == ("slowlog", "warn")
        assert found.output.startswith("KEYS kept Redis from all other calls for 0.250 s")

    def test_slow_commands_are_counted_without_their_arguments(
        self, mortal: GovRedis, mortal_redis: RedisServer
    ) -> None:
        assert checks(mortal)["redis"].data["slow_commands"] == 0
        mortal_redis.command("CONFIG", "SET", "slowlog-log-slower-than", "0")
        mortal_redis.command("GET", "session:tenant-secret")
        report = json.dumps(mortal.health.check().as_dict())
        data = checks(mortal)["redis"].data
        assert data["slow_commands"] >= 2
        assert data["slowest_seconds"] >= 0
        assert data["slowest_command"] in {
            "INFO",
            "CONFIG",
            "GET",
            "SLOWLOG",
            "DBSIZE",
            "SCAN",
            "AUTH",
            "CLIENT",
            "HELLO",
        }
        assert "tenant-secret" not in report + repr(mortal.health.check())

    def test_a_refused_slowlog_is_unknown(self, make_gov: MakeGov, mortal_redis: RedisServer) -> None:
        mortal_redis.command("ACL", "SETUSER", "ann", "on", ">pw", "~*", "+@all", "-slowlog")
        found = checks(make_gov(redis_url=mortal_redis.url.replace("//", "//ann:pw@"), **PATIENT))
        assert found["redis"].status == found["slowlog"].status == "pass"
        assert found["slowlog"].output.startswith("unknown: ")
        assert "slow_commands" not in found["redis"].data


class TestPostgresActivity:
    def test_is_in_the_report(self, gov: GovRedis, postgres_server: PostgresServer) -> None:
        data = checks(gov)["postgres"].data
        assert 1 <= data["connections"] < data["max_connections"]
        connection = psycopg2.connect(postgres_server.url)
        try:
            connection.cursor().execute("SELECT 1")
            eventually(lambda: checks(gov)["postgres"].data["oldest_transaction"] > 0.01, what="it is seen")
        finally:
            connection.close()

    def test_that_is_at_fault_is_warned_of(self) -> None:
        assert verdict.of_activity({"connections": 89, "max_connections": 100, "oldest_transaction": 3600.0}) == []
        found = verdict.of_activity({"connections": 90, "max_connections": 100, "oldest_transaction": 7201.0})
        assert [(check.name, check.status) for check in found] == [("connections", "warn"), ("transactions", "warn")]
        assert "2.0 hours" in found[1].output
        assert verdict.of_activity({}) == []

    def test_a_fault_of_the_server_makes_the_report_warn(self, gov: GovRedis, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(verdict, "_NEARLY", 0.0)
        found = checks(gov)
        assert {found["clients"].status, found["connections"].status} == {"warn"}
        assert gov.health.check().status == "warn"


class TestLocks:
    def test_the_lock_that_is_held_longest_is_named(self, gov: GovRedis, plain_redis: Any) -> None:
        assert "locks" not in checks(gov)
        with gov.locks.acquire("first", ttl=1000), gov.locks.semaphore("gpu", slots=2).acquire(ttl=1000):
            eventually(lambda: plain_redis.zcard("govredis:locks") == 2, what="both are listed")
            plain_redis.zadd("govredis:locks", {"x": 10**15, "[1]": 10**15, '["lock", "a", "b", "x"]': 10**15})
            found = checks(gov)["locks"]
        assert (found.status, found.data["held"], found.data["outside"]) == ("pass", 5, 0)
        assert found.data["longest"].startswith("lock 'first' of ")
        assert 0 < found.data["longest_seconds"] < 10_000
