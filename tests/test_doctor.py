"""`govredis doctor` on deployments that are well, and on some that are ill in one way each."""

from __future__ import annotations

import json
import os
import re
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import psycopg2
import pytest
import trustme
from click.testing import CliRunner, Result
from support import REDIS_AWAY, eventually
from tls_proxy import TlsProxy

import govredis
from govredis import Config, GovRedis
from govredis._acl import rights
from govredis._commands._doctor import _health, _remedies, _servers
from govredis._commands._doctor._servers import Measured
from govredis.cli import main
from govredis.health import Check
from govredis.testing.servers import PostgresServer, RedisServer

pytestmark = [pytest.mark.once, pytest.mark.one_redis]


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, patience: dict[str, float]) -> dict[str, str]:
    for field in Config.__dataclass_fields__.values():
        if field.metadata["variable"] is not None:
            monkeypatch.delenv(field.metadata["variable"], raising=False)
    patient = {f"GOVREDIS_{what}_TIMEOUT": "10" for what in ("SOCKET", "CONNECT", "POSTGRES")}
    return {"GOVREDIS_LOCK_FOLDER": str(tmp_path / "locks"), "REDIS_LOCK_TIMEOUT": "60", **patient}


class Said:
    """The answer of a doctor, by what each finding is about."""

    def __init__(self, result: Result) -> None:
        assert isinstance(result.exception, SystemExit | None), result.exception
        assert result.exit_code in (0, 1), result.output
        self.code = result.exit_code
        data = json.loads(result.stdout)
        self.faults: dict[str, dict[str, str]] = {each["about"]: each for each in data["faults"]}
        self.notes: dict[str, dict[str, str]] = {each["about"]: each for each in data["notes"]}
        self.facts: dict[str, str] = {each["about"]: each["seen"] for each in data["facts"]}
        assert self.code == bool(self.faults)
        for each in data["faults"]:
            assert each["what"] and each["why"], each
        assert result.stderr == ""


Ask = Callable[..., Said]


@pytest.fixture
def ask(variables: dict[str, str]) -> Ask:
    return lambda *args, **more: Said(CliRunner().invoke(main, ["doctor", "--json", *args], env={**variables, **more}))


@pytest.fixture
def both(redis_server: RedisServer, postgres_server: PostgresServer) -> dict[str, str]:
    return {"REDIS_URL": redis_server.url, "GOVREDIS_DATABASE_URL": postgres_server.url}


def test_nothing_is_wrong_with_what_is_well(ask: Ask, variables: dict[str, str], both: dict[str, str]) -> None:
    said = ask(**both)
    assert (said.faults, said.notes) == ({}, {})
    assert said.facts.keys() == {"versions", "lock folder", "redis", "acl", "postgres", "grants"}
    assert re.search(r"govredis \S+, Python 3\.\d+\.\d+.*, redis \d", said.facts["versions"])
    assert re.search(
        r"^Redis [67]\.[\d.]+, 127\.0\.0\.1:\d+: a round trip takes \S+ ms, its clock ", said.facts["redis"]
    )
    assert re.search(r"^PostgreSQL \d+\.\d+, 127\.0\.0\.1:\d+/postgres: a round trip", said.facts["postgres"])
    assert said.facts["lock folder"] == variables["GOVREDIS_LOCK_FOLDER"]
    shown = CliRunner().invoke(main, ["doctor"], env={**variables, **both})
    assert shown.exit_code == 0
    assert shown.stdout.startswith("LOOKED AT")
    assert shown.stdout.endswith("\n\nnothing is wrong\n")


def test_a_fault_is_shown_with_its_consequence_and_the_remedy(variables: dict[str, str], both: dict[str, str]) -> None:
    shown = CliRunner().invoke(main, ["doctor"], env={**variables, **both, "REDIS_URL": REDIS_AWAY})
    assert shown.exit_code == 1
    assert "note" not in shown.stdout, "a server that is away is named once"
    title, fault, why, change = shown.stdout.partition("1 fault")[2].splitlines()
    assert title == ":"
    assert fault.startswith("redis: Redis at 127.0.0.1:1 is away: ")
    assert why == "  why: every call takes its fallback, or fails where there is none"
    assert change == "  change: start redis-server, or change REDIS_URL: nothing listens at the address that it names"


def test_a_wrong_setting_is_a_fault(ask: Ask) -> None:
    said = ask(REDIS_SESSION_TTL="an hour")
    assert said.faults["settings"]["what"].startswith("REDIS_SESSION_TTL is 'an hour'; it must be")


def test_faults_of_health_are_faults(ask: Ask, mortal_redis: RedisServer, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o700)
    where = {"REDIS_URL": mortal_redis.url, "GOVREDIS_LOCK_FOLDER": str(folder)}
    well = ask(**where)
    assert well.faults == {}
    assert well.notes.keys() == {"postgres", "persistence"}
    mortal_redis.command("CONFIG", "SET", "appendonly", "yes")
    assert ask(**where).notes.keys() == {"postgres"}

    mortal_redis.command("CONFIG", "SET", "maxmemory", "100mb")
    mortal_redis.command("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    folder.chmod(0o777)
    ill = ask(**where)
    assert ill.faults.keys() == {"eviction", "locks"}
    assert ill.faults["eviction"]["what"].startswith("maxmemory_policy is allkeys-lru: ")
    assert str(folder) in ill.faults["locks"]["what"]

    mortal_redis.command("ACL", "SETUSER", "app", "on", "nopass", "~*", "+@all", "-info")
    unknown = ask(**{**where, "REDIS_URL": mortal_redis.url.replace("redis://", "redis://app:x@")})
    assert "the ACL of our user lacks +info;" in unknown.faults["rights"]["what"]
    assert unknown.faults["acl"]["what"] == "the user app lacks +info"
    assert unknown.notes["eviction"]["what"].startswith("unknown: ")
    assert "version is unknown" in unknown.notes["redis"]["what"]


def test_the_commonest_faults_have_remedies(
    ask: Ask, mortal_redis: RedisServer, postgres_server: PostgresServer
) -> None:
    both = {"GOVREDIS_DATABASE_URL": postgres_server.url}
    at = mortal_redis.url.partition("//")[2].rpartition("/")[0]
    for url, remedy in (
        (f"redis://{at}/77", "name another database in REDIS_URL: this Redis lacks that one: 77"),
        (f"redis://:pw@{at}/0", "take the password out of REDIS_URL: this Redis has none"),
        (f"redis://nobody:pw@{at}/0", "correct the user and the password in REDIS_URL, or the ACL of that user"),
    ):
        assert ask(**both, REDIS_URL=url).faults["redis"]["change"] == remedy
    hasty = {"GOVREDIS_CONNECT_TIMEOUT": "0.2", "GOVREDIS_SOCKET_TIMEOUT": "0.2"}
    tls = ask(REDIS_URL=f"rediss://{at}/0", **hasty)
    assert "if that port does not speak TLS, REDIS_URL must begin with redis://" in tls.faults["redis"]["change"]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    with TlsProxy(mortal_redis.port, context) as proxy:
        plain = ask(REDIS_URL=f"redis://{proxy.netloc}/0")
    assert "if that port speaks TLS, REDIS_URL must begin with rediss://" in plain.faults["redis"]["change"]
    away = ask(REDIS_URL=mortal_redis.url, GOVREDIS_DATABASE_URL="postgresql://u:hunter2@127.0.0.1:1/d")
    assert away.faults.keys() == {"postgres"}
    assert "hunter2" not in json.dumps(away.faults)


@pytest.mark.parametrize(
    ("output", "hinted"),
    [
        ("Redis at h:1 is away: Error while reading from socket: [Errno 104] Connection reset by peer", True),
        ("Redis at h:1 is away: Connection closed by server.", True),
        ("Redis at h:1 is away: the proxy before it says: ERR Connection reset by peer", False),
    ],
)
def test_a_port_that_has_answered_in_plain_text_speaks_no_tls(output: str, hinted: bool) -> None:
    assert ("rediss://" in _remedies.remedy(Check("redis", "fail", output, {}), "redis://h:1")) is hinted


def test_each_check_of_health_has_a_reason_why_it_matters() -> None:
    sources = [path.read_text() for path in (Path(govredis.__file__).parent / "health").rglob("*.py")]
    names = {name for text in sources for name in re.findall(r'Check\("(\w+)"', text)}
    names |= {name for text in sources for name in re.findall(r'_nearly\("(\w+)"', text)}
    assert names >= {"redis", "workers", "clients"}
    assert names - _health._WHY.keys() == set()


def test_tables_that_are_missing_are_a_fault(ask: Ask, both: dict[str, str]) -> None:
    said = ask(**both, GOVREDIS_SCHEMA="nowhere")
    assert said.faults["postgres"]["change"] == "run `govredis migrate`"


def test_redis_is_told_of_changes_before_it_is_judged(
    ask: Ask, both: dict[str, str], make_gov: Callable[..., GovRedis]
) -> None:
    """A change that no reader has come for is no fault, with or without a beat."""
    gov = make_gov(redis_url=both["REDIS_URL"], database_url=both["GOVREDIS_DATABASE_URL"])

    def leave_an_old_change() -> None:
        gov.sessions.bind("s", "a")
        assert gov.sessions.get_agent_id("s") == "a"
        gov.sessions.unbind("s")
        gov.postgres.fetch("UPDATE @schema@.govredis_outbox SET at = at - interval '1 hour'")

    leave_an_old_change()
    before = gov.health.check()
    (outbox,) = [check for check in before.checks if check.name == "outbox"]
    assert "Redis has not been told of 1 change, the oldest 36" in outbox.output
    assert ask(**both).faults == {}

    leave_an_old_change()
    with psycopg2.connect(both["GOVREDIS_DATABASE_URL"]) as owner, owner.cursor() as cursor:
        cursor.execute("LOCK TABLE govredis_epochs IN EXCLUSIVE MODE")
        failed = ask(**both, GOVREDIS_POSTGRES_TIMEOUT="2")
    owner.close()
    assert "Redis has not been told of " in failed.faults["outbox"]["what"]
    assert "; telling it now has failed: " in failed.faults["outbox"]["what"]


# -- clocks, timeouts, versions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [100, -100])
def test_clocks_that_differ_are_a_fault(
    ask: Ask, both: dict[str, str], monkeypatch: pytest.MonkeyPatch, ahead: int
) -> None:
    shifted = SimpleNamespace(time=lambda: time.time() - ahead, perf_counter=time.perf_counter)
    monkeypatch.setattr(_servers, "time", shifted)
    result = CliRunner().invoke(main, ["doctor", "--json"], env=both)
    clocks = [each["what"] for each in json.loads(result.stdout)["faults"] if each["about"] == "clocks"]
    side = "ahead of" if ahead > 0 else "behind"
    assert [re.sub(r"(9\d|1\d\d)\.\d", "100", what) for what in clocks] == [
        f"{server}'s clock is 100 s {side} this host's" for server in ("Redis", "PostgreSQL")
    ]


def test_a_clock_is_not_blamed_for_a_long_round_trip() -> None:
    assert not list(_servers._clock("Redis", Measured(round_trip=2.0, ahead=2.9)))
    assert list(_servers._clock("Redis", Measured(round_trip=2.0, ahead=-3.1)))


def test_timeouts_near_a_round_trip_are_a_fault() -> None:
    timeouts = {"GOVREDIS_CONNECT_TIMEOUT": 0.1, "GOVREDIS_SOCKET_TIMEOUT": 0.2}
    assert not list(_servers._timeouts(timeouts, 0.033))
    (one,) = _servers._timeouts(timeouts, 0.05)
    assert one.what.endswith("GOVREDIS_CONNECT_TIMEOUT (0.1 s) is less than 3 times that")
    assert one.change == "set it to 0.3 or more"
    (two,) = _servers._timeouts(timeouts, 0.08)
    assert "GOVREDIS_CONNECT_TIMEOUT (0.1 s) and GOVREDIS_SOCKET_TIMEOUT (0.2 s)" in two.what


def test_the_timeouts_of_calls_are_judged(ask: Ask, both: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_servers, "_PATIENCE", 10**9)
    about = [line for line in CliRunner().invoke(main, ["doctor"], env=both).stdout.splitlines() if "a round" in line]
    assert {"GOVREDIS_SOCKET_TIMEOUT", "GOVREDIS_POSTGRES_TIMEOUT"} <= set(re.findall(r"GOVREDIS\w+", " ".join(about)))


def test_a_lease_that_a_renewal_may_outlast_is_a_fault(ask: Ask, both: dict[str, str]) -> None:
    said = ask(**both, REDIS_LOCK_TIMEOUT="30")
    assert said.faults["locks"]["what"] == "REDIS_LOCK_TIMEOUT is 30 s, and a single renewal may take 20 s"
    assert said.faults["locks"]["change"].startswith("set REDIS_LOCK_TIMEOUT to 60 or more")


def test_old_versions_are_a_fault(ask: Ask, both: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, newer in ("_REDIS", (99, 0)), ("_POSTGRES", 99), ("_REDIS_PY", (99, 0)):
        monkeypatch.setattr(_servers, name, newer)
    said = ask(**both)
    assert said.faults.keys() == {"redis", "postgres", "versions"}
    assert said.faults["versions"]["what"].startswith("redis-py is ")


def test_servers_that_are_not_used_are_notes(ask: Ask) -> None:
    said = ask(REDIS_ENABLED="0")
    assert (said.notes["redis"]["what"], said.notes["postgres"]["what"]) == (
        "REDIS_ENABLED is 0", "GOVREDIS_DATABASE_URL is not set"
    )  # fmt: skip


# -- rights ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def acl_of(ask: Ask, mortal_redis: RedisServer) -> Callable[..., Said]:
    """The answer about a user with such rules."""

    def acl(*rules: str, features: tuple[str, ...] = ("locks", "limits")) -> Said:
        mortal_redis.command("ACL", "SETUSER", "ann", "reset", "on", ">x", *rules)
        url = mortal_redis.url.replace("//", "//ann:x@")
        return ask(*(f"--feature={feature}" for feature in features), REDIS_URL=url)

    return acl


def granted(*features: str) -> list[str]:
    return rights(Config(), features).rules().split()


SEEN = {"getuser": ["+acl|whoami", "+acl|getuser", "+acl|cat"], "dryrun": ["+acl|whoami", "+acl|dryrun", "+command"]}


def needs_dryrun(server: RedisServer) -> None:
    if re.search(r"redis_version\W+6", str(server.command("INFO", "server"))):
        pytest.skip("Redis 6 has no ACL DRYRUN")


@pytest.mark.parametrize("way", SEEN)
def test_rights_that_are_missing_are_named_and_the_remedy_mends(
    acl_of: Callable[..., Said], mortal_redis: RedisServer, way: str
) -> None:
    if way == "dryrun":
        needs_dryrun(mortal_redis)
    health = granted("health")
    everything = [*granted("locks", "limits"), *health[1:], *SEEN[way]]
    everything = [rule for rule in everything if rule != "nocommands"]
    rules = ["nocommands", *everything]
    assert acl_of(*rules).facts["acl"] == "the user ann may do all of locks, limits"
    if way == "getuser":
        lacking, without = "+blpop +evalsha", [rule for rule in rules if rule not in ("+blpop", "+evalsha")]
    else:
        lacking = "+blpop ~rate_limit:*"
        without = [rule for rule in rules if rule not in ("+blpop", "~rate_limit:*")]
    ill = acl_of(*without).faults["acl"]
    assert ill["what"] == f"the user ann lacks {lacking}"
    assert ill["change"].startswith(f"ACL SETUSER ann {lacking};")
    assert "acl" not in acl_of(*without, *lacking.split()).faults


def test_only_the_features_in_use_are_asked_for(acl_of: Callable[..., Said]) -> None:
    rules = ["nocommands", *(rule for rule in granted("locks", "health") if rule != "nocommands"), *SEEN["getuser"]]
    assert acl_of(*rules, features=("locks", "health")).facts["acl"]
    assert "acl" in acl_of(*rules, "allkeys", features=("limits", "sessions")).faults


def test_categories_are_looked_up_and_wider_patterns_are_not_guessed_at(acl_of: Callable[..., Said]) -> None:
    health = ("locks", "limits", "health")
    said = acl_of("allkeys", "+@all", "-@dangerous", "-@blocking", *SEEN["getuser"], features=health)
    assert said.faults["acl"]["what"].startswith("the user ann lacks +blpop +info")
    blind = acl_of("allkeys", "+@read", "+info", "+acl|whoami", "+acl|getuser")
    assert "nobody knows" in blind.notes["acl"]["what"], "it may not look the category up"
    assert "nobody knows" in acl_of("~l*", "+@read", "+info", *SEEN["getuser"]).notes["acl"]["what"]
    assert "lacks +acl" in acl_of("allkeys", "+@all", "-acl").notes["acl"]["what"]


def test_grants_that_are_missing_are_named_and_the_remedy_mends(ask: Ask, both: dict[str, str]) -> None:
    url = both["GOVREDIS_DATABASE_URL"]
    owner = psycopg2.connect(url)
    owner.autocommit = True
    with owner.cursor() as cursor:
        cursor.execute("CREATE ROLE app LOGIN PASSWORD 'x'")
        try:
            as_app = {**both, "GOVREDIS_DATABASE_URL": re.sub(r"//[^@]*@", "//app:x@", url)}
            for grant in (
                "USAGE ON SCHEMA public",
                "SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public",
                "USAGE ON ALL SEQUENCES IN SCHEMA public",
                "EXECUTE ON ALL FUNCTIONS IN SCHEMA public",
            ):
                cursor.execute(f"GRANT {grant} TO app")
            assert ask(**as_app).facts["grants"] == "the role app has all of them in the schema public"
            cursor.execute("REVOKE UPDATE, DELETE ON govredis_sessions FROM app")
            cursor.execute("REVOKE USAGE ON govredis_versions FROM app")
            cursor.execute("REVOKE EXECUTE ON FUNCTION govredis_outbox_add FROM app")
            ill = ask(**as_app).faults["grants"]
            assert ill["what"] == (
                "the role app lacks EXECUTE on govredis_outbox_add; USAGE on govredis_versions;"
                " DELETE, UPDATE on govredis_sessions"
            )
            cursor.execute(ill["change"].partition(" as the role that runs")[0])
            assert ask(**as_app).faults == {}
        finally:
            cursor.execute("DROP OWNED BY app; DROP ROLE app")
    owner.close()


# -- Celery ------------------------------------------------------------------------------------------------------------

APP = """
from celery import Celery
app = Celery("shop", broker={broker!r}, set_as_current=False)
app.conf.broker_transport_options = {{"visibility_timeout": 600, **{options!r}}}
app.conf.beat_schedule = {{"rebuild": {{"task": "shop.slow", "schedule": 60, "options": {{"queue": "nightly"}}}}}}

@app.task(name="shop.slow", shared=False, acks_late=True, time_limit={limit!r})
def slow(): ...
"""


@pytest.fixture
def shop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, redis_server: RedisServer) -> Iterator[Callable[..., str]]:
    """Writes a Celery app, and returns its name."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, broker: str = redis_server.url, limit: float | None = 60, bounded: bool = True) -> str:
        options = {"socket_timeout": 9} if bounded else {}
        (tmp_path / f"{name}.py").write_text(APP.format(broker=broker, limit=limit, options=options))
        return f"{name}:app"

    yield write
    for name in [name for name in sys.modules if name.startswith("shop_")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("no_such:app", "cannot be loaded: ModuleNotFoundError"),
        ("../x", "cannot be loaded: TypeError"),
        ("shop_bad:app", "cannot be loaded: ZeroDivisionError: division by zero"),
        ("os:getcwd", "is no Celery app"),
    ],
)
def test_what_is_no_app_is_refused(shop: Callable[..., str], both: dict[str, str], name: str, why: str) -> None:
    Path("shop_bad.py").write_text("1 / 0")
    result = CliRunner().invoke(main, ["doctor", "-A", name], env=both)
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"{name!r} {why}" in result.stderr


def test_the_broker_and_queues_that_nobody_reads(
    ask: Ask, both: dict[str, str], shop: Callable[..., str], redis_server: RedisServer
) -> None:
    app = shop("shop_a", limit=900, bounded=False)
    redis_server.command("LPUSH", "nightly", "{}", "{}")
    said = ask(f"--app={app}", **both)
    result = CliRunner().invoke(main, ["doctor", "-A", app], env=both)
    found = result.stdout
    assert "nobody reads the queue celery, which has 0 messages" in found
    assert "nobody reads the queue nightly, which has 2 messages" in found
    assert said.faults["workers"]["what"] == "no worker answers"
    assert "visibility_timeout is 600 s, and tasks with acks_late may run longer: shop.slow (900 s)" in found
    assert 'broker_transport_options["visibility_timeout"] to 960 or more' in found
    assert "broker_transport_options has no socket_timeout" in found
    assert said.notes["celery"]["what"] == "the app has no tasks of govredis"
    unbounded = ask(f"--app={shop('shop_b', limit=None)}", **both)
    assert unbounded.notes["broker"]["what"] == "tasks with acks_late have no time limit: shop.slow"
    assert "broker" not in unbounded.faults


def test_a_worker_that_reads_all_queues_is_well(
    ask: Ask, both: dict[str, str], shop: Callable[..., str], tmp_path: Path
) -> None:
    app = shop("shop_c")
    command = [sys.executable, "-m", "celery", "-A", app, "worker", "-P", "solo", "-Q", "celery,nightly", "-l", "error"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    worker = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        eventually(lambda: ask(f"--app={app}", **both).faults == {}, what="the worker answers")
        assert ask(f"--app={app}", **both).facts["workers"].endswith(" read celery, nightly")
    finally:
        worker.terminate()
        worker.wait(120)


def test_a_broker_that_is_away_is_a_fault_without_its_password(
    ask: Ask, both: dict[str, str], shop: Callable[..., str]
) -> None:
    said = ask(f"--app={shop('shop_d', broker='redis://:hunter2hunter2@127.0.0.1:1/0')}", **both)
    assert said.faults["broker"]["what"].startswith("the broker does not answer: ")
    assert "hunter2" not in json.dumps([said.faults, said.notes, said.facts])


def test_a_broker_that_hangs_is_a_fault(
    ask: Ask, both: dict[str, str], shop: Callable[..., str], mortal_redis: RedisServer
) -> None:
    mortal_redis.pause()
    try:
        said = ask(f"--app={shop('shop_e', broker=mortal_redis.url, bounded=False)}", **both)
    finally:
        mortal_redis.resume()
    assert said.faults["broker"]["what"].startswith("the broker does not answer: ")
