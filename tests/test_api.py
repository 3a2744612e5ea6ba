"""GovRedis and the process-wide one."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import REDIS_AWAY, Child, eventually, redis_of

import govredis
from govredis import Config, ConfigurationError, GovRedis, api, configure
from govredis._redact import redact
from govredis.testing.servers import PostgresServer, RedisServer

pytestmark = pytest.mark.one_redis

MakeGov = Callable[..., GovRedis]
VARIABLES = [f.metadata["variable"] for f in Config.__dataclass_fields__.values() if f.metadata["variable"]]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """None of our variables set, and no process-wide GovRedis before or after."""
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    configure(None)
    yield
    configure(None)


def test_every_getter_is_the_feature_of_one_gov(gov: GovRedis) -> None:
    configure(gov)
    assert api.get_gov() is gov
    assert govredis.get_session_cache() is gov.sessions
    assert govredis.get_distributed_lock() is gov.locks
    assert govredis.get_rate_limiter() is gov.limits
    assert govredis.get_metadata_cache() is gov.metadata
    assert govredis.get_health_monitor() is gov.health
    assert isinstance(govredis.get_agent_store(), type(gov.agents))
    assert govredis.get_agent_store().create("a1", {"x": 1}) == gov.agents.get("a1")


def test_the_process_wide_one_is_made_once_from_the_environment(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_URL", redis_server.url)
    monkeypatch.setenv("GOVREDIS_KEY_PREFIX", "made:")
    monkeypatch.setenv("GOVREDIS_SOCKET_TIMEOUT", "10")
    found: list[GovRedis] = []
    barrier = threading.Barrier(8)

    def get() -> None:
        barrier.wait(20)
        found.append(api.get_gov())

    threads = [threading.Thread(target=get) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(map(id, found))) == 1
    with found[0] as gov:
        assert gov.config == Config(redis_url=redis_server.url, key_prefix="made:", socket_timeout=10)
        govredis.get_session_cache().bind("s1", "a1")
        assert redis_server.command("EXISTS", "made:session:s1") == 1


def test_configure_replaces_and_forgets(make_gov: MakeGov) -> None:
    one, other = make_gov(redis_enabled=False), make_gov(redis_enabled=False)
    configure(one)
    assert govredis.get_session_cache() is one.sessions
    configure(other)
    assert govredis.get_session_cache() is other.sessions
    configure(None)
    assert api.get_gov() not in (one, other)


def test_a_bad_environment_is_told_and_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_LOCK_TIMEOUT", "forever")
    with pytest.raises(ConfigurationError, match=r"^REDIS_LOCK_TIMEOUT is 'forever'"):
        govredis.get_rate_limiter()
    monkeypatch.setenv("REDIS_LOCK_TIMEOUT", "5")
    assert api.get_gov().config.lock_ttl == 5


def test_settings_reach_the_features(
    make_gov: MakeGov, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_URL", redis_server.url)
    monkeypatch.setenv("REDIS_SESSION_TTL", "60")
    monkeypatch.setenv("REDIS_METADATA_TTL", "30")
    monkeypatch.setenv("GOVREDIS_KEY_PREFIX", "app:")
    monkeypatch.setenv("GOVREDIS_SOCKET_TIMEOUT", "10")
    with GovRedis.from_env() as gov:
        gov.sessions.bind("s1", "a1")
        gov.metadata.set("a1", {"x": 1})
        assert 0 < redis_server.command("PTTL", "app:session:s1") <= 60_000
        assert 0 < redis_server.command("PTTL", "app:agent_meta:a1") <= 30_000


def test_creating_connects_to_nothing() -> None:
    nowhere = Config(redis_url=REDIS_AWAY, database_url="postgresql://127.0.0.1:1/none")
    with GovRedis(nowhere) as gov:
        assert not redis_of(gov)._pool.live
        assert not gov.postgres._pool.live


def test_agents_need_postgres(make_gov: MakeGov) -> None:
    gov = make_gov(redis_enabled=False)
    for use in (lambda: gov.agents, lambda: gov.postgres):
        with pytest.raises(ConfigurationError, match=r"^GOVREDIS_DATABASE_URL is not set; it must be postgresql://"):
            use()
    configure(gov)
    with pytest.raises(ConfigurationError, match="GOVREDIS_DATABASE_URL"):
        govredis.get_agent_store()


def test_one_cache_per_namespace_and_ttl(make_gov: MakeGov) -> None:
    gov = make_gov(redis_url=REDIS_AWAY, metadata_ttl=77)
    assert gov.cache("report", ttl=60) is gov.cache("report", ttl=60.0)
    assert gov.cache("report") is gov.cache("report", ttl=77)
    assert gov.cache("report", ttl=60) is not gov.cache("report", ttl=61)
    assert gov.cache("report", ttl=60) is not gov.cache("other", ttl=60)
    assert gov.cache("agent_meta") is gov.metadata
    assert gov.cache("report", ttl=60).ttl == 60
    assert gov.cache("report").ttl == 77
    made = len(redis_of(gov)._replays)
    gov.cache("report")
    assert len(redis_of(gov)._replays) == made


@pytest.mark.parametrize("namespace", ["", "session", "a:b", "a{b", None])
def test_a_bad_namespace_is_refused(make_gov: MakeGov, namespace: str) -> None:
    with pytest.raises(ValueError, match=r"^namespace is"):
        make_gov(redis_enabled=False).cache(namespace)


def test_a_bad_ttl_is_refused(make_gov: MakeGov) -> None:
    with pytest.raises(ValueError, match=r"^ttl is -1"):
        make_gov(redis_enabled=False).cache("report", ttl=-1)


def test_disabled_runs_on_fallbacks_and_says_nothing(
    make_gov: MakeGov, redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    gov = make_gov(redis_url=redis_server.url, redis_enabled=False)
    assert gov.sessions.bind("s1", "a1").backend == "local"
    assert gov.sessions.get_agent_id("s1") == "a1"
    assert [bool(gov.limits.hit("a1", "2/hour", operation="op")) for _ in range(3)] == [True, True, False]
    with gov.locks.acquire("l1", timeout=5) as held:
        assert held.degraded
    assert gov.metadata.get_or_load("a1", lambda _: {"x": 1}) == {"x": 1}
    report = gov.health.check()
    assert next(c for c in report.checks if c.name == "redis").output == "disabled"
    assert redis_server.command("DBSIZE") == 0
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


def test_several_side_by_side(make_gov: MakeGov, redis_server: RedisServer) -> None:
    one = make_gov(redis_url=redis_server.url, key_prefix="one:")
    other = make_gov(redis_url=redis_server.url, key_prefix="other:")
    one.sessions.bind("s", "a1")
    assert other.sessions.get("s") is None
    one.close()
    other.sessions.bind("s", "a2")
    assert other.sessions.get_agent_id("s") == "a2"


def test_the_repr_shows_no_password(redis_server: RedisServer, postgres_server: PostgresServer) -> None:
    url = redis_server.url.replace("//", "//:hunter2@")
    with GovRedis(Config(redis_url=url, database_url=postgres_server.url)) as gov:
        assert repr(gov).startswith("GovRedis(Config(redis_url='redis://:***@")
        assert "hunter2" not in repr(gov)
        assert redact(postgres_server.url) in repr(gov)
        assert postgres_server.url not in repr(gov)


def test_created_before_a_fork_and_used_after(gov: GovRedis) -> None:
    gov.sessions.bind("s1", "a1")
    gov.agents.create("a1", {"x": 1})
    configure(gov)

    def use(n: int) -> None:
        mine = api.get_gov()
        assert mine is gov
        assert mine.sessions.get_agent_id("s1") == "a1"
        mine.agents.update_metadata("a1", **{f"child{n}": n})
        with mine.locks.acquire("shared", timeout=20):
            assert mine.limits.hit("a1", "100/hour", operation="op")
        mine.close()

    children = [Child(lambda n=n: use(n)) for n in range(3)]  # type: ignore[misc]
    for _ in range(20):
        assert gov.sessions.get_agent_id("s1") == "a1"
        assert gov.agents.get("a1") is not None
    for child in children:
        child.result()
    assert gov.agents.get("a1")["metadata"] == {"x": 1, "child0": 0, "child1": 1, "child2": 2}  # type: ignore[index]
    assert gov.limits.get_count("a1", window=3600, operation="op") == 3


def test_no_thread_or_descriptor_leaks(
    make_gov: MakeGov, redis_server: RedisServer, postgres_server: PostgresServer
) -> None:
    def descriptors() -> int:
        gc.collect()  # what other tests have left
        # That of the lock folder ends by itself. Not joined: it may be about to start.
        eventually(lambda: "govredis-sweep" not in threads(), what="no thread sweeps")
        return len(list(Path("/proc/self/fd").iterdir()))

    def use() -> None:
        with make_gov(redis_url=redis_server.url, database_url=postgres_server.url) as gov:
            gov.sessions.bind("s1", "a1")
            gov.limits.hit("a1", "100/hour", operation="op")
            with gov.locks.acquire("l1", timeout=5):
                gov.health.check()
            gov.postgres.fetch("SELECT 1")

    def threads() -> Counter[str]:
        return Counter(thread.name for thread in threading.enumerate())

    use()  # the renewal thread outlives the last lock for a while; where this takes long there is another one then
    running, before = threads(), descriptors()
    for _ in range(5):
        use()
    # A thread or descriptor that is still being closed goes by itself; a leaked one stays.
    eventually(lambda: descriptors() <= before, what="as many descriptors as before")
    eventually(lambda: threads() <= running, what="as many threads as before")


def test_without_the_postgres_extra_the_install_line_is_said() -> None:
    code = """
import sys
sys.modules["psycopg2"] = None
import govredis
govredis.GovRedis(govredis.Config(database_url="postgresql://h/d"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("pip install 'govredis[postgres]'")
