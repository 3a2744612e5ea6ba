"""AgentStore: records in PostgreSQL, versions, and the cache invalidated after each commit and never on rollback."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support import PATIENCE, PATIENT, POSTGRES_AWAY, redis_of

from govredis import BackendError, BackendUnavailable, ConfigurationError, GovRedis
from govredis.keys import sibling
from govredis.testing.servers import PostgresServer, RedisServer

pytestmark = pytest.mark.one_redis

TOMBSTONE = sibling("agent_meta:a", "tombstone")


@pytest.fixture
def failing_commit(sql: Callable[..., Any]) -> Iterator[None]:
    """Writes of agents succeed, and fail when they are committed."""
    sql(
        "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'no commit'; END $$;"
        "CREATE CONSTRAINT TRIGGER fail AFTER INSERT OR UPDATE OR DELETE ON govredis_agents"
        " DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION fail()"
    )
    yield
    sql("DROP FUNCTION fail CASCADE")


def record(metadata: dict[str, Any], version: Any, status: str = "active") -> dict[str, Any]:
    return {"agent_id": "a", "metadata": metadata, "status": status, "version": version}


class TestRecords:
    def test_create_get_update_archive_delete(self, gov: GovRedis) -> None:
        agents = gov.agents
        assert agents.get("a") is None
        made = agents.create("a", {"name": "x", "tags": []})
        assert made == record({"name": "x", "tags": []}, made["version"])
        assert agents.get("a") == made
        updated = agents.update_metadata("a", name="y", agent_id="z", self=1)
        assert updated is not None
        assert updated == record({"name": "y", "tags": [], "agent_id": "z", "self": 1}, updated["version"])
        archived = agents.archive("a")
        assert archived is not None
        assert archived == {**updated, "status": "archived", "version": archived["version"]}
        assert agents.get("a") == archived, "archived ones included"
        assert agents.delete("a") is True
        assert agents.get("a") is None
        assert (agents.delete("a"), agents.archive("a"), agents.update_metadata("a", x=1)) == (False, None, None)

    def test_create_without_metadata_and_twice(self, gov: GovRedis) -> None:
        assert gov.agents.create("a")["metadata"] == {}
        with pytest.raises(ValueError, match="'a' exists already"):
            gov.agents.create("a", {"x": 1})
        found = gov.agents.get("a")
        assert found is not None
        assert found["metadata"] == {}

    def test_get_many_is_one_statement(self, gov: GovRedis) -> None:
        made = {i: gov.agents.create(i, {"n": i}) for i in ("a", "b", "c")}
        before = gov.postgres.statements
        assert gov.agents.get_many(["c", "a", "none"]) == {"a": made["a"], "c": made["c"]}
        assert gov.postgres.statements == before + 1
        assert gov.agents.get_many([]) == {}

    def test_versions_rise_with_every_write_of_anybody(self, gov: GovRedis, sql: Callable[..., Any]) -> None:
        versions = [gov.agents.create("a")["version"]]

        def note() -> None:
            found = gov.agents.get("a")
            assert found is not None
            versions.append(found["version"])

        gov.agents.update_metadata("a", x=1)
        note()
        sql("UPDATE govredis_agents SET metadata = '{}', version = 1")
        note()
        gov.agents.archive("a")
        note()
        gov.agents.delete("a")
        gov.agents.create("a")
        note()
        sql(
            "DELETE FROM govredis_agents;"
            "INSERT INTO govredis_agents (agent_id, metadata, version) VALUES ('a', '{}', 1)"
        )
        note()
        assert versions == sorted(set(versions))
        assert len(versions) == 6

    @pytest.mark.parametrize(
        "metadata",
        [
            [],
            "",
            0,
            [("a", 1)],
            "x",
            {1: 2},
            {"a": float("nan")},
            {"a": float("inf")},
            {"a": "nul \x00"},
            {"\x00": 1},
            {"a": {1, 2}},
            {"a": Ellipsis},
            {"a": b"x"},
            {"a": "\ud83d"},
            {"a": ["\ude00x"]},
            {"a": "\\\x00"},
            {"a": "\ude00\ud83d"},
            {"a": "\ud83d\\\ude00"},
        ],
        ids=ascii,
    )
    def test_bad_metadata_is_refused_before_anything_is_sent(self, gov: GovRedis, metadata: Any) -> None:
        with pytest.raises(ValueError, match=r"metadata|value"):
            gov.agents.create("a", metadata)
        if isinstance(metadata, dict) and all(isinstance(name, str) for name in metadata):
            with pytest.raises(ValueError, match=r"metadata|value"):
                gov.agents.update_metadata("a", **metadata)
        assert gov.postgres.statements == 0

    @pytest.mark.parametrize(
        "metadata",
        [{"a": None}, {"": {}}, {"re": "\\u0000"}, {"a": "🎉"}, {"a": "\\🎉"}, {"a": "\\\\ud83d"}, {"deep": [[[]]]}],
        ids=ascii,
    )
    def test_good_metadata_comes_back_as_it_was(self, gov: GovRedis, metadata: Any) -> None:
        assert gov.agents.create("a", metadata)["metadata"] == metadata
        found = gov.agents.get("a")
        assert found is not None
        assert found["metadata"] == metadata

    @pytest.mark.parametrize("bad", ["", "{a}", "a\x00", "a" * 513, b"a", None], ids=repr)
    def test_bad_ids_are_refused_before_anything_is_sent(self, gov: GovRedis, bad: Any) -> None:
        agents = gov.agents
        for refused in (
            lambda: agents.create(bad),
            lambda: agents.get(bad),
            lambda: agents.get_many(["a", bad]),
            lambda: agents.update_metadata(bad, x=1),
            lambda: agents.archive(bad),
            lambda: agents.delete(bad),
        ):
            with pytest.raises(ValueError, match="agent_id is"):
                refused()
        assert gov.postgres.statements == 0


WRITES: dict[str, Callable[[GovRedis], Any]] = {
    "create": lambda gov: gov.agents.create("new"),
    "update": lambda gov: gov.agents.update_metadata("a", x=2),
    "archive": lambda gov: gov.agents.archive("a"),
    "delete": lambda gov: gov.agents.delete("a"),
}


@pytest.fixture(params=WRITES)
def write(request: pytest.FixtureRequest) -> Callable[[GovRedis], Any]:
    return WRITES[request.param]


class TestInvalidation:
    def test_each_write_invalidates_after_its_commit(
        self, gov: GovRedis, write: Callable[[GovRedis], Any], sql: Callable[..., Any], plain_redis: Any
    ) -> None:
        if write is not WRITES["create"]:
            gov.agents.create("a", {"x": 1})
        target = "new" if write is WRITES["create"] else "a"
        plain_redis.flushdb()
        gov.metadata.get_or_load(target, lambda _: {"stale": True})
        seen = []
        invalidate = gov.metadata.invalidate

        def look(identity: str, **options: Any) -> None:
            seen.append(sql(f"SELECT status, metadata FROM govredis_agents WHERE agent_id = '{identity}'"))
            invalidate(identity, **options)

        gov.metadata.invalidate = look  # type: ignore[method-assign]
        before = sql(f"SELECT status, metadata FROM govredis_agents WHERE agent_id = '{target}'")
        write(gov)
        assert len(seen) == 1
        assert seen[0] != before, "committed: others see it"
        assert gov.metadata.get(target) is None
        assert int(plain_redis.get(sibling(f"agent_meta:{target}", "tombstone"))) > 0, "with the write's version"

    def test_a_failed_commit_does_not(
        self, gov: GovRedis, write: Callable[[GovRedis], Any], sql: Callable[..., Any], plain_redis: Any,
        request: pytest.FixtureRequest,
    ) -> None:  # fmt: skip
        sql("INSERT INTO govredis_agents (agent_id, metadata) VALUES ('a', '{\"x\": 1}')")
        request.getfixturevalue("failing_commit")
        for target in ("a", "new"):
            gov.metadata.set(target, {"cached": True})
        with pytest.raises(BackendError, match="no commit"):
            write(gov)
        assert gov.metadata.get_many(["a", "new"]) == {"a": {"cached": True}, "new": {"cached": True}}
        assert not plain_redis.keys("*tombstone")
        assert sql("SELECT agent_id, status, metadata FROM govredis_agents") == [("a", "active", {"x": 1})]

    def test_a_call_that_changes_nothing_invalidates_nothing(self, gov: GovRedis, plain_redis: Any) -> None:
        gov.agents.update_metadata("a", x=1)
        gov.agents.archive("a")
        gov.agents.delete("a")
        assert not plain_redis.exists(TOMBSTONE)

    def test_the_readers_of_the_cache(self, gov: GovRedis) -> None:
        gov.agents.create("a", {"x": 1})
        first = gov.metadata.get_or_load("a", gov.agents.get)
        before = gov.postgres.statements
        assert gov.metadata.get_or_load("a", gov.agents.get) == first == gov.metadata.get_many(["a"])["a"]
        assert gov.postgres.statements == before
        gov.agents.update_metadata("a", x=2)
        assert gov.metadata.get_many(["a", "none"], gov.agents.get_many)["a"]["metadata"] == {"x": 2}

    @pytest.mark.parametrize("error", [BackendUnavailable("no answer"), KeyboardInterrupt(), TimeoutError()], ids=repr)
    def test_a_write_without_an_answer_invalidates(
        self, gov: GovRedis, write: Callable[[GovRedis], Any], error: BaseException, plain_redis: Any
    ) -> None:
        """The statement was carried out, and its answer cut off."""
        gov.agents.create("a")
        plain_redis.flushdb()
        for target in ("a", "new"):
            gov.metadata.get_or_load(target, lambda _: {"stale": True})
        fetch = gov.postgres.fetch

        def cut_off(*args: Any, **options: Any) -> Any:
            fetch(*args, **options)
            raise error

        gov.postgres.fetch = cut_off  # type: ignore[method-assign]
        with pytest.raises(type(error)):
            write(gov)
        gov.postgres.fetch = fetch  # type: ignore[method-assign]
        found = gov.metadata.get_many(["a", "new"])
        assert list(found) == ["a" if write is WRITES["create"] else "new"]

    def test_a_write_while_redis_is_away_succeeds_and_its_invalidation_is_pending(
        self, make_gov: Callable[..., GovRedis], mortal_redis: RedisServer, postgres_server: PostgresServer
    ) -> None:
        where = {"redis_url": mortal_redis.url, "database_url": postgres_server.url, **PATIENT}
        gov, other = (make_gov(**where) for _ in range(2))
        gov.agents.create("a", {"x": 1})
        other.metadata.get_or_load("a", other.agents.get)
        mortal_redis.command("REPLICAOF", "127.0.0.1", "1")
        assert gov.agents.update_metadata("a", x=2) is not None
        found = gov.metadata.get_or_load("a", gov.agents.get)
        assert found is not None
        assert found["metadata"] == {"x": 2}
        mortal_redis.command("REPLICAOF", "NO", "ONE")
        deadline = time.monotonic() + PATIENCE
        while not redis_of(gov).breaker.closed:
            assert gov.metadata.get("a") is None
            assert time.monotonic() < deadline
        found = other.metadata.get_or_load("a", other.agents.get)
        assert found is not None
        assert found["metadata"] == {"x": 2}


class TestAway:
    def test_postgres_away(self, make_gov: Callable[..., GovRedis], redis_server: RedisServer) -> None:
        gov = make_gov(redis_url=redis_server.url, database_url=POSTGRES_AWAY)
        for call in (*WRITES.values(), lambda g: g.agents.get("a"), lambda g: g.agents.get_many(["a"])):
            with pytest.raises(BackendUnavailable) as raised:
                call(gov)
            assert "secret" not in str(raised.value)
        gov.metadata.set("c", {"cached": True})
        assert gov.metadata.get_or_load("c", gov.agents.get) == {"cached": True}
        with pytest.raises(BackendUnavailable):
            gov.metadata.get_or_load("a", gov.agents.get)

    def test_no_postgres_configured(self, make_gov: Callable[..., GovRedis]) -> None:
        with pytest.raises(ConfigurationError, match="GOVREDIS_DATABASE_URL"):
            _ = make_gov(redis_enabled=False).agents

    def test_missing_tables(self, make_gov: Callable[..., GovRedis], postgres_server: PostgresServer) -> None:
        gov = make_gov(redis_enabled=False, database_url=postgres_server.url.rsplit("/", 1)[0] + "/template1")
        with pytest.raises(ConfigurationError, match="govredis migrate"):
            gov.agents.get("a")


def test_two_prefixes_share_a_database_but_no_agent(
    make_gov: Callable[..., GovRedis], redis_server: RedisServer, postgres_server: PostgresServer
) -> None:
    urls = {"redis_url": redis_server.url, "database_url": postgres_server.url}
    one, two = make_gov(**urls, key_prefix="one:"), make_gov(**urls, key_prefix="two:")
    one.agents.create("a", {"of": 1})
    two.agents.create("a", {"of": 2})
    assert (one.agents.get("a") or {})["agent_id"] == "a"
    one.agents.update_metadata("a", of=11)
    assert two.metadata.get_or_load("a", two.agents.get)["metadata"] == {"of": 2}
    assert one.agents.delete("a")
    assert two.agents.get_many(["a"])["a"]["metadata"] == {"of": 2}
