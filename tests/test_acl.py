"""The ACL that `govredis doctor --acl` prints: each feature works under exactly it, and needs all of it."""

from __future__ import annotations

import ast
import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psycopg2
import pytest
import redis as redis_py
from click.testing import CliRunner
from flask import Flask
from support import PATIENCE, eventually, redis_of

import govredis
from govredis import BackendError, BackendUnavailable, Config, GovRedis, LockLost
from govredis._acl import _PARTS, FEATURES, Rights, look, rights, sources
from govredis.breaker import OutageNote
from govredis.cli import main
from govredis.client.commands import commands_in_script
from govredis.contrib.flask import FlaskGovRedis
from govredis.errors import NoRight
from govredis.keys import Keys, sibling
from govredis.limits.parked import Arrival
from govredis.metadata import entry_keys
from govredis.metadata.verify import verify
from govredis.sessions.binding import Unreadable
from govredis.testing.servers import PostgresServer, RedisServer

MakeGov = Callable[..., GovRedis]
PREFIXES = ["", "my-app*:"]


# -- all that a feature sends ----------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def long_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that stalls in a load ends no lease, which `metadata` waits to be renewed."""
    monkeypatch.setattr(entry_keys, "LEASE_MS", entry_keys._LONGEST_LEASE_MS)


def until_refused_or(admin: Any, condition: Callable[[], Any]) -> None:
    """Waits for the condition, or for an ACL to refuse a command."""
    eventually(lambda: condition() or admin.acl_log())


def sessions(gov: GovRedis, admin: Any) -> None:
    prefix = gov.config.key_prefix
    gov.sessions.bind("s", "ann", data={"n": 1})
    gov.sessions.get("s", touch=True)
    gov.sessions.update("s", {"n": 2})
    gov.sessions.rotate("s")
    gov.sessions.start("ann")
    gov.sessions.for_agent("ann")
    admin.delete(f"{prefix}session:planted", f"{prefix}agent_sessions:planted")
    admin.rpush(f"{prefix}session:planted", "x")
    admin.rpush(f"{prefix}agent_sessions:planted", "x")
    for asks in gov.sessions.get, gov.sessions.for_agent:
        with contextlib.suppress(Unreadable):  # with PostgreSQL the row counts
            asks("planted")
    gov.sessions.bind("planted", "ann")
    assert gov.sessions.unbind_agent("ann") == 3


WAITER = "waiter"


def locks(gov: GovRedis, admin: Any) -> None:
    with gov.locks.acquire("a") as held:
        held.extend(60)
        gov.locks.holder("a")
        waiter = threading.Thread(target=lambda: gov.locks.acquire("a", timeout=30).release(), name=WAITER)
        waiter.start()
        queue = "{" + gov.config.key_prefix + "lock:a}:queue"
        until_refused_or(admin, lambda: not waiter.is_alive() or admin.zcard(queue))
    waiter.join()
    with gov.locks.rwlock("a").write(), gov.locks.semaphore("a", slots=2).acquire() as slot:
        slot.extend(60)
        assert len(gov.locks.held()) == 2
        assert gov.locks.count_held()[1] == 0
        until_refused_or(admin, lambda: admin.zcard(f"{gov.config.key_prefix}govredis:locks") == 2)
        admin.script_flush()
    with contextlib.suppress(LockLost), gov.locks.acquire("b"):
        assert gov.locks.force_release("b")


def limits(gov: GovRedis, admin: Any) -> None:
    gov.limits.hit("a", "1/hour").refund()
    for rate in "2/hour", govredis.Limit(2, 3600, algorithm="sliding_window_counter"):
        gov.limits.hit_many([("a", rate)] * 4)
        gov.limits.peek("a", rate)
    admin.hset("{" + gov.config.key_prefix + "rate_limit:default:b}:counter", "planted", "x")
    assert gov.limits.hit("b", govredis.Limit(2, 3600, algorithm="sliding_window_counter")).refund()
    for algorithm in "sliding_window_log", "sliding_window_counter":
        gov.limits.hit_many([("e", govredis.Limit(100, 3600, algorithm, lease=100))])
        for _ in range(4):  # the third of them takes a lease, and `close` gives its rest back
            gov.limits.hit("e", govredis.Limit(100, 3600, algorithm, lease=100))
    gov.limits.get_count("a", 3600)
    assert gov.limits.stats("a")
    admin.zadd(gov.config.key_prefix + "rate_limit:default:d", {"planted": 1})
    gov.limits.hit("d", "1/hour")  # prunes
    gov.limits.close()  # tells Redis which identities were denied
    (denied,) = admin.keys("*denied*")
    admin.zadd(denied, {str(n): 1 for n in range(1000)})
    assert not gov.limits.hit("c", "1/hour", cost=1) or not gov.limits.hit("c", "1/hour")
    gov.limits.close()
    gov.limits.most_denied()
    gov.limits.reset("a")


def metadata(gov: GovRedis, admin: Any) -> None:
    cache = gov.metadata
    for _ in range(2):
        cache.get_or_load("a", lambda i: {"of": i})
    cache.get_many(["a", "b"], lambda ids: {i: {"of": i} for i in ids})
    cache.set("c", 1)
    cache.get("c")
    cache.invalidate("a")
    with GovRedis(gov.config) as other:
        waiting = threading.Thread(target=lambda: other.metadata.get_or_load("d", lambda _: 1), daemon=True)

        def load(_: str) -> int:
            """Until its lease was renewed, and another process has looked for it."""
            waiting.start()
            until_refused_or(admin, lambda: {"cmdstat_pexpire", "cmdstat_pttl"} <= admin.info("commandstats").keys())
            return 1

        admin.config_resetstat()
        cache.get_or_load("d", load)
        waiting.join()
    cache.invalidate_all()
    cache.get("a")


def events(gov: GovRedis, admin: Any) -> None:
    listener = gov.events.listen("agent")
    gov.events.publish("agent", 1)
    assert listener.get(20)
    with contextlib.suppress(ZeroDivisionError), gov.events.consume("g", "a", "agent") as first:
        assert first.get(20)
        raise ZeroDivisionError
    with gov.events.consume("g", "a", "agent", deliveries=2) as again:
        assert again.get(20)
        assert again.get(0) is None
    with contextlib.suppress(ZeroDivisionError), gov.events.consume("h", "a", "agent") as first:
        assert first.get(20)
        raise ZeroDivisionError
    with gov.events.consume("h", "a", "agent", deliveries=1) as again:
        assert again.get(0) is None
    assert gov.events.dead("agent")
    if gov.config.database_url is not None:
        with contextlib.closing(psycopg2.connect(gov.config.database_url)) as connection, connection:
            gov.events.publish("agent", 2, connection)
        eventually(lambda: gov.events.deliver() or admin.acl_log() or listener.get(0))


def health(gov: GovRedis, admin: Any) -> None:
    gov.internal.heartbeat.note_published(15, "celery")
    for name in "a", "b":
        gov.internal.fleet.note("worker", name, 15, {})
    gov.internal.fleet.leave("worker", "a")
    gov.health.beat(15)
    report = gov.health.snapshot()
    assert (report.stored, report.status) == ("redis", "pass")
    assert len(gov.health.history()) == 1
    # Under its own rights it may not see the keys of other features in Redis, and says so.
    unknown = {check.name for check in report.checks if check.output.startswith("unknown: ")}
    assert unknown == {"locks", "parked"}


def celery(gov: GovRedis, admin: Any) -> None:
    assert gov.internal.parked is not None
    lot = gov.internal.parked.lot("broker")
    for run in "a", "b":
        lot.arrived(Arrival(run))
        assert lot.park(Arrival(run), 0, b"message")
    lot.flush()
    taken, _ = lot.take()
    lot.put_aside(taken[0].entry, "why")
    gov.internal.parked.waiting()
    lot.postpone(taken[0].entry, 1)
    lot.remove(taken[0].entry)
    lot.arrived(Arrival("a", times=1, publication="1"))
    lot.arrived(Arrival("a"))


SCENARIOS = {
    "sessions": sessions,
    "locks": locks,
    "limits": limits,
    "metadata": metadata,
    "events": events,
    "health": health,
    "celery": celery,
}


def outage(gov: GovRedis) -> None:
    """Send the commands that the client sends by itself."""
    redis_of(gov)._probe()
    redis_of(gov)._measure()
    account = gov.internal.account
    note = OutageNote(time.time() - 1, "refused")
    account._log._note("redis", note)
    account.flush()
    note.ended = time.time()
    account.flush()
    account.totals()
    account.outages(datetime.now(timezone.utc), datetime.now(timezone.utc))


_WORD = re.compile(r'"((?:[^"\\]|\\.)*)"')


class Recorder:
    """All that a server is sent meanwhile, by others than `admin`: a script's own commands, too."""

    def __init__(self, server: RedisServer, admin: Any) -> None:
        self._server = server
        self._admin = admin
        self.commands: set[str] = set()
        self.keys: set[str] = set()

    def __enter__(self) -> Recorder:
        self._seen: list[list[str]] = []
        own = f" {self._admin.client_info()['addr']}] "
        ready = threading.Event()

        def watch() -> None:
            with redis_py.Redis.from_url(self._server.url) as client, client.monitor() as monitor:
                ready.set()
                while True:
                    line = monitor.connection.read_response().decode()
                    words = [re.sub(r"\\(.)", r"\1", word) for word in _WORD.findall(line)]
                    if words == ["ECHO", "over"]:
                        return
                    if own not in line:
                        self._seen.append(words)

        self._thread = threading.Thread(target=watch, daemon=True)
        self._thread.start()
        ready.wait()
        return self

    def __exit__(self, *_: Any) -> None:
        self._admin.echo("over")
        self._thread.join()
        if any(name.startswith("cmdstat_slowlog") for name in self._admin.info("commandstats")):
            self.commands.add("slowlog|get")  # MONITOR does not show it
        for command in self._seen:
            name = command[0].lower()
            if name in {"auth", "hello"}:  # which no ACL forbids
                continue
            self.commands.add("|".join(command[:2]).lower() if name in {"client", "script", "slowlog"} else name)
            if len(command) == 1:
                continue
            try:
                self.keys |= set(self._server.command("COMMAND GETKEYS", *command))
            except redis_py.ResponseError as error:
                assert "no key arguments" in str(error), (command, error)


@pytest.fixture
def admin(mortal_redis: RedisServer) -> Iterator[Any]:
    with redis_py.Redis.from_url(mortal_redis.url) as client:
        yield client


@pytest.fixture
def under(make_gov: MakeGov, mortal_redis: RedisServer, admin: Any) -> Callable[..., GovRedis]:
    """Makes a GovRedis whose user has these rights."""

    def make(config: Config, granted: Rights) -> GovRedis:
        admin.flushall()
        admin.script_flush()
        admin.execute_command("ACL", "SETUSER", "ann", "on", ">pw", *granted.rules().split(" "))
        admin.execute_command("ACL", "LOG", "RESET")
        settings = {name: getattr(config, name) for name in ("database_url", "key_prefix", "local_cache")}
        url = config.redis_url.replace(
            Config().redis_url[:-2], mortal_redis.url.replace("//", "//ann:pw@").rsplit("/", 1)[0]
        )
        return make_gov(redis_url=url, limit_deny_cache=False, **settings)

    return make


def refusals(admin: Any) -> list[str]:
    return [entry["object"] for entry in admin.acl_log()]


def check_exactly(sent: Recorder, granted: Rights, config: Config) -> None:
    patterns = {Keys(config.key_prefix).pattern(key) for key in sent.keys}
    assert sorted(granted.commands - sent.commands) + sorted(granted.patterns - patterns) == [], "granted, and not used"
    assert sorted(sent.commands - granted.commands) + sorted(patterns - granted.patterns) == [], "used, and not granted"


@pytest.mark.parametrize("prefix", PREFIXES, ids=["bare", "prefix"])
@pytest.mark.parametrize("feature", FEATURES)
def test_each_feature_works_under_exactly_its_rights(
    under: Callable[..., GovRedis], mortal_redis: RedisServer, admin: Any, feature: str, prefix: str
) -> None:
    config = Config(key_prefix=prefix)
    granted = rights(config, [feature])
    gov = under(config, granted)
    with Recorder(mortal_redis, admin) as sent:
        SCENARIOS[feature](gov, admin)
        outage(gov)
    # Nor is a change of the health published without the rights of "events".
    not_of_health = {"zcount", f"{prefix}govredis:locks", "smembers", "xrevrange"}
    assert set(refusals(admin)) == (not_of_health if feature == "health" else set())
    check_exactly(sent, granted, config)


def test_with_postgresql_events_need_the_rights_of_their_relay(
    under: Callable[..., GovRedis], mortal_redis: RedisServer, postgres_server: PostgresServer, admin: Any
) -> None:
    config = Config(database_url=postgres_server.url)
    granted = rights(config, ["events"])
    gov = under(config, granted)
    with Recorder(mortal_redis, admin) as sent:
        SCENARIOS["events"](gov, admin)
    assert refusals(admin) == []
    of_relay = granted.commands - rights(Config(), ["events"]).commands
    assert of_relay
    assert of_relay <= sent.commands


@pytest.mark.parametrize("feature", ["sessions", "metadata"])
def test_with_postgresql_the_two_that_share_its_outbox_need_one_anothers_rights(
    under: Callable[..., GovRedis],
    mortal_redis: RedisServer,
    postgres_server: PostgresServer,
    admin: Any,
    eventually: Any,
    feature: str,
) -> None:
    local = feature == "metadata"
    config = Config(database_url=postgres_server.url, local_cache=local, redis_url="redis://localhost:6379/3")
    granted = rights(config, [feature])
    assert ("client|tracking" in granted.commands) == local
    gov = under(config, granted)
    assert gov.internal.freshness is not None
    there = redis_py.Redis.from_url(f"{mortal_redis.url.rsplit('/', 1)[0]}/3")
    with there, Recorder(mortal_redis, there) as sent:
        sessions(gov, there)
        gov.agents.create("a", {"n": 1})
        gov.metadata.get_or_load("a", gov.agents.get)
        gov.agents.update_metadata("a", n=2)
        metadata(gov, there)
        verify(gov.internal.context.keys, redis_of(gov), gov.metadata, gov.agents, samples=9, staleness=0)
        there.script_flush()
        gov.sessions.bind("t", "ann")
        gov.internal.freshness.drain()
        with GovRedis(replace(gov.config, database_url="postgresql://127.0.0.1:1/x")) as without:
            without.sessions.bind("u", "ann")
        if local:
            eventually(lambda: gov.metadata.get_or_load("l", lambda _: 1) and gov.metadata.stats()["local_hits"])
            sent.commands.add("client|tracking")  # else there is no such hit; the MONITOR of Redis 6 does not show it
        outage(gov)
    assert refusals(admin) == []
    check_exactly(sent, granted, config)


@pytest.mark.one_redis
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("feature", FEATURES)
def test_without_any_one_of_its_rights_a_feature_is_refused(
    under: Callable[..., GovRedis], admin: Any, feature: str
) -> None:
    granted = rights(Config(), [feature])
    #: Commands that the client itself sends: without these it works, but takes a Redis for back that is not.
    own = {"ping", "govredis:probe"}
    unmissed = []
    for right in sorted(granted.commands | granted.patterns - own):
        gov = under(Config(), Rights(granted.commands - {right}, granted.patterns - {right}))
        try:
            SCENARIOS[feature](gov, admin)
            outage(gov)
        except Exception:
            if not refusals(admin):
                raise
        if not refusals(admin):
            unmissed.append(right)
        # A waiter of this round must not take the lock of the next.
        admin.execute_command("ACL", "SETUSER", "ann", "allkeys", "allcommands")
        admin.flushall()
        for thread in threading.enumerate():
            if thread.name == WAITER:
                thread.join(PATIENCE)
                assert not thread.is_alive()
        gov.close()
    assert unmissed == []


# -- the sources -----------------------------------------------------------------------------------------------------


def test_every_source_that_names_a_command_is_of_a_feature() -> None:
    parts = {path: part for part, path, _ in sources()}
    assert _PARTS.items() <= parts.items(), "a file that is not there any more"
    assert set(parts.values()) == {*FEATURES, "outbox", "shard", "relay", "local", "account"}
    package = Path(govredis.__file__).parent
    elsewhere = ["client", "demo", "_commands", "testing"]  # the client's own are read, and the others need no ACL
    for path in package.rglob("*.py"):
        name = path.relative_to(package).as_posix()
        if name not in parts and name.partition("/")[0] not in elsewhere:
            found = look(ast.parse(path.read_text()))
            assert not found.commands and not found.scripts, name


def test_the_reader_of_sources() -> None:
    source = """
redis.call("GET", key)
self._client.pipeline((("MGET", a), ["ZADD", b]), (script,))
words = ["CLIENT", "TRACKING", "ON"]
words += ["PREFIX", p]
dict.pop("x"); redis.pop("x", 1)
x = Script(__package__, "a.lua"), self._keys.lock(name), keys.items(), ("Not", "one"), ("A", "b")
"""
    found = look(ast.parse(source))
    assert found.commands == {"get", "mget", "zadd", "client|tracking"}
    assert found.scripts == {"a.lua"}
    assert found.kinds == {"lock"}
    assert found.calls == {"call", "pipeline", "pop"}


def test_a_script_names_its_commands() -> None:
    assert commands_in_script("x = redis.call('GET', k) redis.pcall( \"zadd\", k)") == {"get", "zadd"}


def test_another_database_is_selected() -> None:
    for url, needed in {
        "redis://h": False, "redis://h/0": False, "redis://h/3": True, "redis://h/0?db=2": True, "unix:///a/b": False,
        "unix:///a/b?db=1": True,
    }.items():  # fmt: skip
        assert ("select" in rights(Config(redis_url=url), ["locks"]).commands) == needed, url


def test_the_rights_of_namespaces() -> None:
    patterns = rights(Config(key_prefix="a:"), ["metadata"], ["report"]).patterns
    assert {"a:report:*", "{a:report:*}:*", "a:govredis:generation:report"} < patterns
    assert not any("agent_meta" in pattern for pattern in patterns)
    with pytest.raises(ValueError, match=r"^namespace is 'lock'"):
        rights(Config(), ["metadata"], ["lock"])


@pytest.mark.parametrize("prefix", ["my app:", "a*:", "b?[c]\\:", "'\":", "é:"])
def test_a_prefix_is_no_glob(mortal_redis: RedisServer, admin: Any, prefix: str) -> None:
    """Neither in a pattern, nor a second argument, nor the end of one."""
    keys = Keys(prefix)
    (command,) = invoke(GOVREDIS_KEY_PREFIX=prefix, feature="locks")
    admin.execute_command(*command.split(" "), "nopass")
    with redis_py.Redis.from_url(mortal_redis.url, username="govredis", password="x") as user:
        for key in keys.lock("a"), sibling(keys.lock("a"), "fence"), keys.held_locks():
            user.get(key)
        for key in f"{prefix[:-1]}x:lock:a", f"x{prefix}lock:a", keys.session("a"):
            with pytest.raises(redis_py.exceptions.NoPermissionError):
                user.get(key)


# -- what is said ----------------------------------------------------------------------------------------------------


def invoke(feature: str = "", **environment: str) -> list[str]:
    arguments = ["doctor", "--acl", *(["--feature", feature] if feature else [])]
    done = CliRunner().invoke(main, arguments, env={"REDIS_URL": "", **environment})
    assert done.exit_code == 0, done.output
    return done.output.splitlines()


def test_doctor_prints_what_acl_setuser_takes() -> None:
    expected = f"ACL SETUSER govredis on {rights(Config(), ['locks']).rules()}"
    assert invoke("locks") == [expected]
    (everything,) = invoke(REDIS_URL="redis://me:hunter2@h/1")
    assert everything == f"ACL SETUSER me on {rights(Config(redis_url='redis://h/1')).rules()}"
    here, _, there, parked = invoke(GOVREDIS_PARKING_URL="redis://p:hunter2@h")[0:4]
    assert (here, there) == ("# at REDIS_URL", "# at GOVREDIS_PARKING_URL")
    assert parked == f"ACL SETUSER p on {rights(Config(), ['celery']).rules()}"


def test_the_documentation_names_each_feature_and_shows_what_is_printed() -> None:
    page = (Path(__file__).parents[1] / "docs" / "deployment.md").read_text()
    for feature in FEATURES:
        assert f"--feature {feature}`" in page
    (shown,) = re.findall(
        r"^\$ GOVREDIS_KEY_PREFIX=app: govredis doctor --acl --feature locks\n(.*) \.\.\.$", page, re.M
    )
    (printed,) = invoke("locks", GOVREDIS_KEY_PREFIX="app:")
    assert printed.startswith(shown)


class TestRefusals:
    """Each names the right that is missing, as ACL SETUSER has it, and where all of them are printed."""

    @pytest.fixture
    def refused(self, make_gov: MakeGov, mortal_redis: RedisServer) -> Callable[..., BackendError]:
        def ask(call: Callable[[GovRedis], Any], *without: str) -> BackendError:
            mortal_redis.command("ACL", "SETUSER", "ann", "reset", "on", ">pw", "allkeys", "allcommands", *without)
            gov = make_gov(redis_url=mortal_redis.url.replace("//", "//ann:pw@"), key_prefix="a*:")
            with pytest.raises(BackendError) as caught:
                call(gov)
            assert not isinstance(caught.value, BackendUnavailable)
            assert "`govredis doctor --acl` prints the rights" in str(caught.value)
            assert "give it --namespace for each cache of yours" in str(caught.value)
            return caught.value

        return ask

    def needs(self, error: BackendError) -> str:
        found = re.search(r"the ACL of our user lacks (?:one or more of )?([^;]*);", str(error))
        assert found, str(error)
        return found[1]

    def test_a_command(self, refused: Callable[..., BackendError]) -> None:
        error = refused(lambda gov: redis_of(gov).call("TYPE", "a"), "-type")
        assert isinstance(error, NoRight)
        assert self.needs(error) == "+type"

    def test_a_command_of_two_words(self, refused: Callable[..., BackendError]) -> None:
        command = [("SCRIPT", "LOAD", "return 1")]
        error = refused(lambda gov: redis_of(gov).pipeline(command), "-script")
        assert self.needs(error) == "+script|load"

    def test_a_command_of_a_script(self, refused: Callable[..., BackendError]) -> None:
        error = refused(lambda gov: gov.limits.hit("a", "1/hour"), "-zcount")
        assert "+zcount" in self.needs(error).split(" ")
        assert {right[0] for right in self.needs(error).split(" ")} == {"+"}

    def test_a_key(self, refused: Callable[..., BackendError]) -> None:
        error = refused(lambda gov: gov.sessions.get("the-secret-id"), "resetkeys", "~lock:*")
        assert self.needs(error) == r"~a\*:session:*"
        assert "secret" not in str(error)

    def test_a_key_of_a_script(self, refused: Callable[..., BackendError]) -> None:
        error = refused(lambda gov: gov.locks.acquire("a"), "resetkeys", r"~a\*:lock:*")
        assert self.needs(error) == r"~a\*:lock:* ~{a\*:lock:*}:*"

    def test_several_commands_name_all_their_keys(self, refused: Callable[..., BackendError]) -> None:
        commands = [("GET", "a*:session:x"), ("DEL", "a*:govredis:guard", "{a*:lock:x}:fence")]
        error = refused(lambda gov: redis_of(gov).pipeline(commands), "resetkeys")
        assert self.needs(error) == r"~a\*:govredis:guard ~a\*:session:* ~{a\*:lock:*}:*"

    def test_the_database(self, make_gov: MakeGov, mortal_redis: RedisServer) -> None:
        mortal_redis.command("ACL", "SETUSER", "ann", "reset", "on", ">pw", "allkeys", "allcommands", "-select")
        gov = make_gov(redis_url=mortal_redis.url.replace("//", "//ann:pw@").rsplit("/", 1)[0] + "/3")
        with pytest.raises(BackendError, match=r"lacks \+select;"):
            gov.sessions.get("a")

    def test_tracking(self, make_gov: MakeGov, mortal_redis: RedisServer, eventually: Any, caplog: Any) -> None:
        mortal_redis.command("ACL", "SETUSER", "ann", "reset", "on", ">pw", "allkeys", "allcommands", "-client")
        gov = make_gov(redis_url=mortal_redis.url.replace("//", "//ann:pw@"), local_cache=True)
        gov.metadata.get_or_load("a", lambda _: 1)
        eventually(lambda: "lacks +client|tracking;" in caplog.text)


class TestHealth:
    def test_a_refused_dangerous_command_is_a_warning_only(self, make_gov: MakeGov, mortal_redis: RedisServer) -> None:
        mortal_redis.command("ACL", "SETUSER", "ann", "on", ">pw", "allkeys", "allcommands", "-@dangerous", "-dbsize")
        report = make_gov(redis_url=mortal_redis.url.replace("//", "//ann:pw@")).health.check()
        checks = {check.name: check for check in report.checks}
        assert (report.status, checks["redis"].status, checks["rights"].status) == ("warn", "pass", "warn")
        assert checks["rights"].output.startswith("not all can be looked at: INFO: ")
        assert "lacks +info;" in checks["rights"].output
        assert "; DBSIZE: " in checks["rights"].output
        assert "lacks +dbsize;" in checks["rights"].output

    def test_a_user_of_one_feature_is_no_failure(self, under: Callable[..., GovRedis], admin: Any) -> None:
        gov = under(Config(), rights(Config(), ["locks"]))
        report = gov.health.check()
        assert report.status == "warn"
        assert gov.locks.acquire("a").release()

    def test_flask_is_ready(self, under: Callable[..., GovRedis], admin: Any) -> None:
        app = Flask("acl")
        FlaskGovRedis(app, under(Config(), rights(Config(), ["locks", "sessions"])))
        assert app.test_client().get("/govredis/ready").status_code == 200
