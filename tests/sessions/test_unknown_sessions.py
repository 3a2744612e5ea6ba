"""Unknown ids: the cost of each, that it leaves nothing behind, and that a later bind is seen at once."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import Any

import pytest

from govredis import GovRedis, SessionChanged
from govredis.sessions.backends import row_cache
from govredis.sessions.backends.row_cache import RowCache
from govredis.testing.servers import PostgresServer, RedisServer

pytestmark = [pytest.mark.once, pytest.mark.one_redis]

MakeGov = Callable[..., GovRedis]
STRANGERS = 200


@pytest.fixture
def other(make_gov: MakeGov, redis_server: RedisServer, postgres_server: PostgresServer) -> GovRedis:
    """Another process, as far as sessions go."""
    return make_gov(redis_url=redis_server.url, database_url=postgres_server.url)


def changed(gov: GovRedis, sid: str) -> Any:
    with pytest.raises(SessionChanged):
        gov.sessions.update(sid, 1)


CALLS: dict[str, Callable[[GovRedis, str], Any]] = {
    "get": lambda gov, sid: gov.sessions.get(sid),
    "touch": lambda gov, sid: gov.sessions.touch(sid) or None,
    "get_agent_id": lambda gov, sid: gov.sessions.get_agent_id(sid, touch=True),
    "rotate": lambda gov, sid: gov.sessions.rotate(sid),
    "exists": lambda gov, sid: gov.sessions.exists(sid) or None,
    "update": lambda gov, sid: changed(gov, sid),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_unknown_ids_cost_one_statement_each_and_leave_nothing(
    gov: GovRedis, plain_redis: Any, call: Callable[..., Any]
) -> None:
    gov.sessions.bind("warm", "a")
    gov.sessions.get("warm")
    keys, statements = set(plain_redis.keys("*")), gov.postgres.statements
    plain_redis.config_resetstat()
    for _ in range(STRANGERS):
        assert call(gov, secrets.token_urlsafe(32)) is None
    assert gov.postgres.statements - statements == STRANGERS
    commands = {name.removeprefix("cmdstat_") for name in plain_redis.info("commandstats")}
    assert not commands & {"set", "eval", "evalsha", "script|load"}, "nothing is written, for however short a time"
    assert set(plain_redis.keys("*")) <= keys
    assert gov.sessions._backends.primary._cache._checked == {}  # type: ignore[union-attr]
    assert list(gov.sessions._memory._known) == ["warm"]


def test_a_session_bound_after_being_unknown_is_seen_at_once(gov: GovRedis, other: GovRedis, plain_redis: Any) -> None:
    for n in range(20):
        assert gov.sessions.get(f"s{n}") is None
        other.sessions.bind(f"s{n}", "a")
        assert gov.sessions.get_agent_id(f"s{n}") == "a"
        plain_redis.delete(f"session:s{n}")
        assert gov.sessions.get_agent_id(f"s{n}") == "a"


class TestTheLeaseComesAfterTheRow:
    """Events between the two, which must leave no old copy."""

    @pytest.fixture
    def between(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], None]:
        """Have it done once the row was read, and before the lease is taken."""

        def at_the_next(meanwhile: Callable[[], Any]) -> None:
            lease = RowCache.lease

            def late(self: RowCache, *args: Any) -> Any:
                monkeypatch.setattr(RowCache, "lease", lease)
                meanwhile()
                return lease(self, *args)

            monkeypatch.setattr(RowCache, "lease", late)

        return at_the_next

    def test_a_revocation(self, gov: GovRedis, other: GovRedis, plain_redis: Any, between: Any) -> None:
        for end in (lambda: other.sessions.unbind("s"), lambda: other.sessions.unbind_agent("a")):
            gov.sessions.bind("s", "a")
            plain_redis.delete("session:s")
            between(end)
            gov.sessions.get("s")
            assert not plain_redis.exists("session:s")
            assert gov.sessions.get("s") is None

    def test_a_bind_to_another(self, gov: GovRedis, other: GovRedis, plain_redis: Any, between: Any) -> None:
        gov.sessions.bind("s", "a")
        plain_redis.delete("session:s")
        between(lambda: other.sessions.bind("s", "b"))
        gov.sessions.get("s")
        for process in (gov, other):
            assert process.sessions.get_agent_id("s") == "b"
        plain_redis.delete("session:s", "{session:s}:version")
        between(lambda: (other.sessions.bind("s", "c"), plain_redis.delete("session:s")))
        gov.sessions.get("s")
        assert gov.sessions.get_agent_id("s") == "c"

    @pytest.mark.parametrize("late", [False, True], ids=["at once", "in the next epoch"])
    def test_a_revocation_that_redis_has_lost(
        self, late: bool, make_gov: MakeGov, redis_server: RedisServer, postgres_server: PostgresServer, between: Any
    ) -> None:
        """The copy is put: its epoch is over, so it is believed no longer than metadata_staleness."""
        x = 0.3
        one, two = (
            make_gov(redis_url=redis_server.url, database_url=postgres_server.url, metadata_staleness=x)
            for _ in range(2)
        )
        one.sessions.bind("s", "a")
        redis_server.command("DEL", "session:s")

        def lose() -> None:
            two.sessions.unbind("s")
            redis_server.command("FLUSHALL")
            if late:
                time.sleep(x * 1.1)
                two.sessions.get("t")
                assert one.sessions._backends.primary._cache.epoch("s") > 1  # type: ignore[union-attr]

        between(lose)
        one.sessions.get("s")
        assert redis_server.command("EXISTS", "session:s") == 1
        if not late:
            time.sleep(x * 1.1)
        assert one.sessions.get("s") is None
        assert two.sessions.get("s") is None

    def test_more_time_than_versions_are_remembered_for(
        self, gov: GovRedis, plain_redis: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gov.sessions.bind("s", "a")
        plain_redis.delete("session:s")
        with monkeypatch.context() as late:
            late.setattr(row_cache, "_LATE", -1.0)
            assert gov.sessions.get_agent_id("s") == "a"
            assert not plain_redis.exists("session:s"), "answered, and not put"
        assert gov.sessions.get_agent_id("s") == "a"
        assert plain_redis.exists("session:s")
        seconds = int(row_cache._LEASE_MS) / 1000 + row_cache._LATE
        assert seconds < int(row_cache._VERSION_MS) / 1000
