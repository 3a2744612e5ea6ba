"""Config: each variable with a good and a bad value, and no password anywhere."""

from __future__ import annotations

import dataclasses
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from govredis import Config, ConfigurationError
from govredis.config import redact

# variable: field, default, {given: parsed}, [bad], what the message says it may hold
SETTINGS: dict[str, tuple[str, Any, dict[Any, Any], list[Any], str]] = {
    "REDIS_URL": (
        "redis_url",
        "redis://localhost:6379/0",
        {
            url: url
            for url in (
                "redis://h",
                "redis://h:1/15",
                "rediss://user:pw@h:6380/1?ssl_cert_reqs=none",
                "redis://[::1]:6379/0",
                "unix:///run/redis.sock?db=2",
                "redis://:pw@h/",
            )
        },
        [
            "localhost:6379",
            "http://h",
            "redis://",
            "redis://h:99999/0",
            "redis://h:70000",
            "redis://h/db",
            "redis://[::1/0",
            "redis://a..b/0",
            "unix://",
            b"redis://h",
            7,
        ],
        "redis://[user:password@]host[:port][/db]",
    ),
    "GOVREDIS_PARKING_URL": (
        "parking_url",
        None,
        {"redis://h:1/15": "redis://h:1/15", "unix:///run/redis.sock": "unix:///run/redis.sock"},
        ["amqp://h", "redis://", 7],
        "redis://[user:password@]host[:port][/db]",
    ),
    "REDIS_ENABLED": (
        "redis_enabled",
        True,
        {"0": False, "false": False, "NO": False, "off": False, "1": True, "Yes": True, " on ": True, 0: False},
        ["2", "maybe", "none", 2, 0.5],
        "1 or 0",
    ),
    "GOVREDIS_LOCAL_CACHE": ("local_cache", False, {"0": False, "1": True, True: True}, ["2", 2], "1 or 0"),
    "GOVREDIS_DATABASE_URL": (
        "database_url",
        None,
        {url: url for url in ("postgresql://u:p@h:5432/d", "postgres://h/d", "postgresql:///d?host=/tmp")},
        [
            "mysql://h/d",
            "postgresql://",
            "postgresql:///",
            "host=h dbname=d",
            "postgresql://h:99999/d",
            b"postgresql://h/d",
        ],
        "postgresql://[user[:password]@][host][:port]/database",
    ),
    "GOVREDIS_KEY_PREFIX": (
        "key_prefix",
        "",
        {"app:": "app:", "é": "é"},
        ["a{b", "a\nb", "x" * 600, b"app:", 5],
        "a str without '{', '}' or control characters",
    ),
    "GOVREDIS_SESSION_HASH_IDS": (
        "session_hash_ids",
        False,
        {"1": True, "off": False, True: True},
        ["many", "2"],
        "1 or 0 (also true/false, yes/no, on/off)",
    ),
    "GOVREDIS_LOCK_FALLBACK": ("lock_fallback", "file", {"fail": "fail"}, ["File", "none", 0], "one of file, fail"),
    "GOVREDIS_LIMIT_DENY_CACHE": ("limit_deny_cache", True, {"0": False, "on": True}, ["2", "maybe", 2], "1 or 0"),
    "GOVREDIS_LIMIT_FALLBACK": (
        "limit_fallback",
        "local",
        {"deny": "deny", "allow": "allow"},
        ["open", "LOCAL", True],
        "one of local, deny, allow",
    ),
    "GOVREDIS_LIMIT_MIRROR": (
        "limit_mirror",
        None,
        {"0.5": 0.5, 2: 2.0},
        ["0", 0, -1, "soon", "nan", True],
        "a number of seconds, at least 0.001 and less than 1e9, or left unset",
    ),
    "GOVREDIS_LOCK_FOLDER": (
        "lock_folder",
        None,
        {"/var/lock": "/var/lock", Path("/var/lock"): "/var/lock"},
        ["locks", "./locks", 5],
        "an absolute path",
    ),
    "REDIS_SENTINEL_HOSTS": ("sentinel_hosts", None, {}, ["a:26379,b:26379"], "left unset"),
    "REDIS_SENTINEL_MASTER": ("sentinel_master", None, {}, ["mymaster"], "left unset"),
    "REDIS_CLUSTER": ("cluster", False, {"0": False, False: False}, ["1", True, "many"], ""),
}
SECONDS = {
    "REDIS_SESSION_TTL": ("session_ttl", 3600.0),
    "REDIS_METADATA_TTL": ("metadata_ttl", 300.0),
    "REDIS_LOCK_TIMEOUT": ("lock_ttl", 30.0),
    "GOVREDIS_METADATA_STALENESS": ("metadata_staleness", 5.0),
    "GOVREDIS_SOCKET_TIMEOUT": ("socket_timeout", 0.2),
    "GOVREDIS_CONNECT_TIMEOUT": ("connect_timeout", 0.1),
    "GOVREDIS_POSTGRES_TIMEOUT": ("postgres_timeout", 2.0),
}
COUNTS = {
    "GOVREDIS_REDIS_CONNECTIONS": ("redis_connections", 128),
    "GOVREDIS_POSTGRES_CONNECTIONS": ("postgres_connections", 10),
    "GOVREDIS_METADATA_MAX_BYTES": ("metadata_max_bytes", 1_000_000),
    "GOVREDIS_LOCAL_ENTRIES": ("local_entries", 10_000),
}
for _variable, (_field, _number) in SECONDS.items():
    SETTINGS[_variable] = (
        _field,
        _number,
        {"0.5": 0.5, "45": 45.0, 7: 7.0, 0.25: 0.25},
        ["0", "-1", "soon", "nan", "inf", "1e9", "0.0001", 0.0001, True, 10**400, [1]],
        "a number of seconds, at least 0.001 and less than 1e9",
    )
for _variable, (_field, _whole) in COUNTS.items():
    SETTINGS[_variable] = (
        _field,
        _whole,
        {"5": 5, 6.0: 6},
        ["0", "-1", "1.5", "many", 1.5, True, float("inf"), float("nan")],
        "a whole number of at least 1",
    )

GOOD = [(variable, given) for variable, setting in SETTINGS.items() for given in setting[2]]
BAD = [(variable, given) for variable, setting in SETTINGS.items() for given in setting[3]]


def test_the_table_above_has_every_setting() -> None:
    assert {f.metadata["variable"]: f.name for f in dataclasses.fields(Config)} == {
        variable: setting[0] for variable, setting in SETTINGS.items()
    }


def test_the_defaults() -> None:
    for name, default, *_ in SETTINGS.values():
        assert getattr(Config(), name) == default
        assert type(getattr(Config(), name)) is type(default)
    assert Config.from_mapping({}) == Config()


@pytest.mark.parametrize(("variable", "given"), GOOD)
def test_a_good_value(variable: str, given: Any) -> None:
    name, _, parsed, *_ = SETTINGS[variable]
    for config in (Config.from_mapping({variable: given}), Config(**{name: given})):
        assert getattr(config, name) == parsed[given]
        assert type(getattr(config, name)) is type(parsed[given])


@pytest.mark.parametrize(("variable", "given"), BAD)
def test_a_bad_value_is_named_with_what_it_held_and_what_it_may_hold(variable: str, given: Any) -> None:
    name, *_, allowed = SETTINGS[variable]
    with pytest.raises(ConfigurationError) as from_mapping:
        Config.from_mapping({variable: given})
    assert str(from_mapping.value).startswith(f"{variable} is {given!r}; it must be ")
    assert allowed in str(from_mapping.value)
    with pytest.raises(ConfigurationError) as typed:
        Config(**{name: given})
    assert str(typed.value).startswith(f"{name} is {given!r}; it must be ")
    assert isinstance(typed.value, ValueError)


def test_empty_and_foreign_variables_are_ignored() -> None:
    held = dict.fromkeys(SETTINGS, "") | {"DATABASE_URL": "postgresql://the/apps", "GOVREDIS_FUTURE": "x"}
    assert Config.from_mapping(held) == Config()
    assert Config.from_mapping(dict.fromkeys(SETTINGS)) == Config()


def test_from_env_reads_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in SETTINGS:
        monkeypatch.delenv(variable, raising=False)
    assert Config.from_env() == Config()
    monkeypatch.setenv("REDIS_SESSION_TTL", "60")
    monkeypatch.setenv("DATABASE_URL", "postgresql://the/apps")
    assert Config.from_env() == Config(session_ttl=60.0)
    monkeypatch.setenv("REDIS_SESSION_TTL", "an hour")
    with pytest.raises(ConfigurationError, match=r"^REDIS_SESSION_TTL is 'an hour'"):
        Config.from_env()


@pytest.mark.parametrize("prefix", ["govredis_", "GOVREDIS_"])
def test_from_app_puts_an_applications_settings_over_the_environments(
    monkeypatch: pytest.MonkeyPatch, prefix: str
) -> None:
    for variable in SETTINGS:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("REDIS_SESSION_TTL", "60")
    monkeypatch.setenv("REDIS_LOCK_TIMEOUT", "7")
    assert Config.from_app({}, prefix) == Config.from_env() == Config(session_ttl=60, lock_ttl=7)

    def named(**settings: Any) -> dict[str, Any]:
        return {prefix + (name.upper() if prefix.isupper() else name): value for name, value in settings.items()}

    held = named(session_ttl=5, redis_url="redis://app", redis_enabled="0", metadata_ttl=None, heartbeat_interval=9)
    assert Config.from_app(held, prefix) == Config(
        session_ttl=5, lock_ttl=7, redis_url="redis://app", redis_enabled=False
    )
    assert Config.from_app({"REDIS_URL": "redis://other", "redis_url": "redis://other"}, prefix).redis_url == (
        Config().redis_url
    ), "the names without the prefix are not ours there"
    other_case = {name.swapcase(): value for name, value in named(session_ttl=5).items()}
    assert Config.from_app(other_case, prefix).session_ttl == 60
    with pytest.raises(ConfigurationError) as caught:
        Config.from_app(named(redis_url="redis://u:hunter2@h:port"), prefix)
    (name,) = named(redis_url=0)
    assert str(caught.value).startswith(f"{name} is 'redis://u:***@h:port'; it must be redis://")
    monkeypatch.setenv("REDIS_SESSION_TTL", "an hour")
    with pytest.raises(ConfigurationError, match=r"^REDIS_SESSION_TTL is 'an hour'"):
        Config.from_app({}, prefix)


def test_it_is_frozen_keyword_only_and_pickles() -> None:
    config = Config(session_ttl=60)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.session_ttl = 5  # type: ignore[misc]
    with pytest.raises(TypeError):
        Config("redis://h")  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(config)) == config


def test_the_repr_shows_what_differs_from_the_default() -> None:
    assert repr(Config()) == "Config()"
    assert repr(Config(session_ttl=60, redis_url="redis://h/1")) == "Config(redis_url='redis://h/1', session_ttl=60.0)"


SECRETS = [
    "redis://:hunter2@h/0",
    "redis://user:hunter2@h:6379/0",
    "redis://user:a:hunter2:b@h/0",
    "rediss://h/0?password=hunter2",
    "redis://h/0?username=u&password=hunter2&db=1",
    "rediss://h/0?ssl_password=hunter2&ssl_cert_reqs=none",
    "unix://:hunter2@/run/redis.sock?db=0",
    "unix:///run/redis.sock?PASSWORD=hunter2",
]
SECRET_DSNS = [
    "postgresql://user:hunter2@h/d",
    "postgresql://h/d?user=u&password=hunter2",
    "postgresql://h/d?sslpassword=hunter2",
]
# Bad values, which go into the error's message.
BAD_SECRETS = [
    "redis://user:x@hunter2@h/0",  # libpq and urlsplit do not agree on which @ ends the password
    "postgresql://user:x@hunter2@h/0",
    "redis://user:hunter2",
    "postgresql://user:hunter2/d",
    "http://hunter2@h",
    "http://h/?passwd=hunter2",
    "http://user:hunter2@h",
    "redis://user:hunter2@h:port/0",
    "redis://user:hunter2/x@h/0",
    "redis://user:a?hunter2@h/0",
    "redis://user:a#hunter2@h/0",
    "redis://us/er:hunter2@h/0",
    "redis://user:a\nhunter2@h/0/x",
    "host=h password=hunter2 dbname=d",
    "host=h password='a hunter2' dbname=d",
    "host=h password = hunter2",
    r"password='a\' hunter2'",
    b"redis://user:hunter2@h/0",
    ["redis://user:hunter2@h/0"],
]


@pytest.mark.parametrize("url", SECRETS)
def test_no_password_in_the_repr(url: str) -> None:
    config = Config(redis_url=url)
    assert config.redis_url == url
    assert "hunter2" not in repr(config)
    assert "***" in repr(config)


@pytest.mark.parametrize("dsn", SECRET_DSNS)
def test_no_database_password_in_the_repr(dsn: str) -> None:
    assert "hunter2" not in repr(Config(database_url=dsn))


@pytest.mark.parametrize("held", BAD_SECRETS, ids=repr)
@pytest.mark.parametrize("variable", ["REDIS_URL", "GOVREDIS_DATABASE_URL"])
def test_no_password_in_an_error(variable: str, held: Any) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Config.from_mapping({variable: held})
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_redact_leaves_the_rest() -> None:
    assert redact("redis://user:pw@h:6379/0") == "redis://user:***@h:6379/0"
    assert redact("{'password': 'secret'}") == "{'password': ***}"
    assert redact("password:secret") == "password:***"
    assert redact("user:p@ss word@h:6379/0") == "user:***@h:6379/0"
    assert redact("redis://h:6379/0?password=a&db=1") == "redis://h:6379/0?password=***&db=1"
    assert redact("host=h password='a b' dbname=d") == "host=h password=*** dbname=d"
    for plain in ("redis://localhost:6379/0", "Error 111 connecting to localhost:6379. Connection refused."):
        assert redact(plain) == plain


def test_a_bad_environment_ends_a_program_with_one_clear_line() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import govredis; govredis.get_session_cache()"],
        env={**os.environ, "REDIS_URL": "redis://u:hunter2@h:port"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "REDIS_URL is 'redis://u:***@h:port'; it must be redis://" in done.stderr.splitlines()[-1]
    assert "hunter2" not in done.stderr
