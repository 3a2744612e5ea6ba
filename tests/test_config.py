"""Config: each variable with a good and a bad value, and no password anywhere."""

from __future__ import annotations

import dataclasses
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from govredis import Config, ConfigurationError
from govredis._redact import redact
from govredis._redis_urls import Sentinels
from govredis.config import address_of, variables

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
                "redis+sentinel://a/mymaster",
                "redis+sentinel://u:p%40@a:1,[::1]:2,c/the%20service/3?sentinel_username=s&sentinel_password=pw",
                "rediss+sentinel://a,b/m?ssl_ca_certs=/ca.pem",
                "redis+cluster://a",
                "rediss+cluster://u:p%40@a:1,[::1]:2,c/0?ssl_ca_certs=/ca.pem",
            )
        }
        | {"REDIS://H:1": "redis://H:1", "Rediss://h": "rediss://h", "UNIX:///Run/r": "unix:///Run/r"},
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
            "redis+sentinel://a",
            "redis+sentinel:///mymaster",
            "redis+sentinel://a,/mymaster",
            "redis+sentinel://a:99999/mymaster",
            "redis+sentinel://a/mymaster/db",
            "redis+sentinel://a/mymaster/0/1",
            "redis+cluster://",
            "redis+cluster://a,",
            "redis+cluster://a/1",
            "redis+cluster://a:99999",
            "redis://a:1,b:2/0",
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
        {
            url: url
            for url in (
                "postgresql://u:p@h:5432/d",
                "postgres://h/d",
                "postgresql:///d?host=/tmp",
                "postgresql://%2Ftmp/d",
                "postgresql://u:p@h1:5432,[::1]:5433,h3/d?target_session_attrs=read-write",
                "postgresql://u:p#?w%40@h/d",
                "postgresql://?service=mine",
                "host=h1,h2 port=5432,5433 dbname=d password='it\\'s'",
                "host=h\ndbname=d",
                "service=mine",
            )
        }
        | {"PostgreSQL://H/D": "postgresql://H/D"},
        [
            "mysql://h/d",
            "postgresql://",
            "postgresql:///",
            "hunter2",
            "postgresql+psycopg2://h/d?a=b",
            "postgresql://h:99999/d",
            "postgresql://h1:5432,h2:99999/d",
            "host=h port=x",
            "host=h\0",
            b"postgresql://h/d",
        ],
        "postgresql://[user[:password]@][host][:port][,host[:port]...]/database",
    ),
    "GOVREDIS_KEY_PREFIX": (
        "key_prefix",
        "",
        {"app:": "app:", "é": "é", "locks:": "locks:", "my-lock:": "my-lock:", "session": "session"},
        ["a{b", "a\nb", "x" * 600, b"app:", 5, "session:", "app:lock:", "lock:x", "a:govredis:b:"],
        "a str of at most 512 bytes of UTF-8, without '{', '}' or control characters, and without a kind of our keys",
    ),
    "GOVREDIS_SCHEMA": (
        "schema",
        "public",
        {"govredis": "govredis", "My-own_1": "My-own_1", "user": "user", "x" * 63: "x" * 63},
        ["a b", 'a"b', "a$$b", "a%b", "1a", "-a", "é", "pg_own", "x" * 64, "a;b", "a'b", "a\nb", b"public", 5],
        "at most 63 letters of ASCII, digits, '_' and '-'",
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
    "GOVREDIS_CONFIRM": ("confirm", False, {"0": False, "on": True}, ["2", "maybe", 2], "1 or 0"),
    "GOVREDIS_LOCK_FOLDER": (
        "lock_folder",
        None,
        {"/var/lock": "/var/lock", Path("/var/lock"): "/var/lock"},
        ["locks", "./locks", 5],
        "an absolute path",
    ),
    "REDIS_SENTINEL_HOSTS": (
        "sentinel_hosts",
        None,
        {text: text for text in ("a", "a:26379,b:26380", "10.0.0.1:1, [::1]:2")},
        ["a,", "a:b", "a:99999", "redis://a", "u@a", 26379],
        "host[:port][,host[:port]...]",
    ),
    "REDIS_SENTINEL_MASTER": ("sentinel_master", None, {"other": "other"}, [7, b"mymaster"], "a str"),
    "REDIS_SENTINEL_USERNAME": ("sentinel_username", None, {"watcher": "watcher"}, [7], "a str"),
    "REDIS_SENTINEL_TLS": ("sentinel_tls", None, {"0": False, "yes": True, False: False}, ["2", "maybe"], "1 or 0"),
    "REDIS_SENTINEL_PASSWORD": ("sentinel_password", None, {"pw": "pw"}, [], "a str"),
    "REDIS_CLUSTER": ("cluster", False, {"0": False, "1": True, True: True}, ["2", "many"], "1 or 0"),
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
    "GOVREDIS_EVENTS_KEPT": ("events_kept", 100_000),
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

#: The settings that a setting needs beside it.
BESIDE = {"GOVREDIS_LIMIT_MIRROR": {"GOVREDIS_DATABASE_URL": "postgresql://h/d"}}
for _name in ("MASTER", "USERNAME", "PASSWORD", "TLS"):
    BESIDE[f"REDIS_SENTINEL_{_name}"] = {"REDIS_SENTINEL_HOSTS": "a"}
GOOD = [(variable, given) for variable, setting in SETTINGS.items() for given in setting[2]]
BAD = [(variable, given) for variable, setting in SETTINGS.items() for given in setting[3]]


def test_the_table_above_has_every_setting() -> None:
    assert {f.metadata["variable"]: f.name for f in dataclasses.fields(Config)} == {
        None: "credential_provider",  # an object
        **{variable: setting[0] for variable, setting in SETTINGS.items()},
    }


def test_the_defaults() -> None:
    for name, default, *_ in SETTINGS.values():
        assert getattr(Config(), name) == default
        assert type(getattr(Config(), name)) is type(default)
    assert Config.from_mapping({}) == Config()


@pytest.mark.parametrize(("variable", "given"), GOOD)
def test_a_good_value(variable: str, given: Any) -> None:
    name, _, parsed, *_ = SETTINGS[variable]
    beside = BESIDE.get(variable, {})
    fields_beside = {SETTINGS[other][0]: value for other, value in beside.items()}
    for config in (Config.from_mapping({variable: given, **beside}), Config(**{name: given, **fields_beside})):
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
    held = dict.fromkeys(SETTINGS, "") | {"DATABASE_URL": "postgresql://the/apps", "REDIS_HOST": "h"}
    assert Config.from_mapping(held) == Config()
    assert Config.from_mapping(dict.fromkeys(SETTINGS, " ")) == Config()
    assert Config.from_mapping(dict.fromkeys(SETTINGS)) == Config()


def test_blanks_around_a_value_do_not_count() -> None:
    """A secret that was read from a file ends with a newline."""
    held = {"REDIS_URL": " redis://h:1\n", "REDIS_ENABLED": " TRUE\n", "GOVREDIS_LOCK_FALLBACK": "fail "}
    assert Config.from_mapping(held) == Config(redis_url="redis://h:1", lock_fallback="fail")


@pytest.mark.parametrize(
    ("given", "right"),
    {
        "GOVREDIS_SOCKET_TIMEOUTS": "GOVREDIS_SOCKET_TIMEOUT",
        "GOVREDIS_SESSION_TTL": "REDIS_SESSION_TTL",
        "GOVREDIS_LOCK_TIMEOUT": "REDIS_LOCK_TIMEOUT",
        "GOVREDIS_REDIS_URL": "REDIS_URL",
        "GOVREDIS_ENABLED": "REDIS_ENABLED",
        "GOVREDIS_DATABASE": "GOVREDIS_DATABASE_URL",
        "GOVREDIS_LIMIT_FALBACK": "GOVREDIS_LIMIT_FALLBACK",
    }.items(),
)
def test_a_name_that_is_nearly_a_settings_is_refused_with_the_right_one(given: str, right: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^{given} is no setting; the name must be {right}$"):
        Config.from_mapping({given: "5"})


def test_a_name_that_is_nearly_a_shared_one_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    held = {"REDIS_SESION_TTL": "5", "REDIS_PASSWORD": "p", "REDIS_HOST": "h", "REDIS_URL_SERVICE_HOST": "10.0.0.11"}
    for _ in range(2):
        assert Config.from_mapping(held) == Config()
    assert [r.getMessage() for r in caplog.records] == [
        "REDIS_SESION_TTL is no setting that this govredis reads from the environment: it is ignored;"
        " is REDIS_SESSION_TTL meant?"
    ]


def test_other_names_of_ours_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        assert Config.from_mapping({"GOVREDIS_FUTURE_WONDER": "x"}) == Config()
    assert [record.getMessage() for record in caplog.records] == [
        "GOVREDIS_FUTURE_WONDER is no setting that this govredis reads from the environment: it is ignored"
    ]


def test_variables_of_kubernetes_for_a_service_of_our_name_are_no_settings(caplog: pytest.LogCaptureFixture) -> None:
    links = {
        "GOVREDIS_SERVICE_HOST": "10.0.0.11",
        "GOVREDIS_SERVICE_PORT": "6379",
        "GOVREDIS_SERVICE_PORT_REDIS": "6379",
        "GOVREDIS_PORT": "tcp://10.0.0.11:6379",
        "GOVREDIS_PORT_6379_TCP": "tcp://10.0.0.11:6379",
        "GOVREDIS_PORT_6379_TCP_PROTO": "tcp",
        "GOVREDIS_PORT_6379_TCP_PORT": "6379",
        "GOVREDIS_PORT_6379_TCP_ADDR": "10.0.0.11",
        "GOVREDIS_LOCK_FOLDER_SERVICE_HOST": "10.0.0.12",
    }
    assert Config.from_mapping(links) == Config()
    assert not caplog.records


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


#: By field, the names of the settings in an application's configuration: Flask's, and Celery's.
APPS = {"flask": variables(), "celery": {f.name: f"govredis_{f.name}" for f in dataclasses.fields(Config)}}


@pytest.fixture
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in SETTINGS:
        monkeypatch.delenv(variable, raising=False)


@pytest.mark.usefixtures("bare_environment")
@pytest.mark.parametrize("names", APPS.values(), ids=APPS)
class TestFromApp:
    def named(self, names: dict[str, str], **settings: Any) -> dict[str, Any]:
        return {names[field]: value for field, value in settings.items()}

    def test_puts_an_applications_settings_over_the_environments(
        self, monkeypatch: pytest.MonkeyPatch, names: dict[str, str]
    ) -> None:
        monkeypatch.setenv("REDIS_SESSION_TTL", "60")
        monkeypatch.setenv("REDIS_LOCK_TIMEOUT", "7")
        held = self.named(names, session_ttl=5, redis_url=" redis://app\n", redis_enabled="0", metadata_ttl=None)
        assert Config.from_app(held, names) == Config(
            session_ttl=5, lock_ttl=7, redis_url="redis://app", redis_enabled=False
        )
        assert Config.from_app(self.named(names, session_ttl=" "), names) == Config(lock_ttl=7), "blank: the default"

    def test_is_none_where_it_has_none(self, names: dict[str, str]) -> None:
        own = f"{names['key_prefix'][:9]}own"
        held = {own: 5, "SECRET_KEY": "x", "DATABASE_URL": "postgresql://the/apps"}
        assert Config.from_app(held, names, [own]) is None
        assert Config.from_app(self.named(names, session_ttl=None), names) is None

    def test_bears_no_other_case(self, names: dict[str, str]) -> None:
        assert Config.from_app({name.swapcase(): "5" for name in names.values()}, names) is None

    def test_names_a_wrong_value_as_it_stands_there(
        self, monkeypatch: pytest.MonkeyPatch, names: dict[str, str]
    ) -> None:
        with pytest.raises(ConfigurationError) as caught:
            Config.from_app(self.named(names, redis_url="redis://u:hunter2@h:port"), names)
        assert str(caught.value).startswith(f"{names['redis_url']} is 'redis://u:***@h:port'; it must be redis://")
        monkeypatch.setenv("REDIS_SESSION_TTL", "an hour")
        with pytest.raises(ConfigurationError, match=r"^REDIS_SESSION_TTL is 'an hour'"):
            Config.from_app(self.named(names, metadata_ttl=5), names)

    def test_refuses_a_near_miss_with_the_right_name(self, names: dict[str, str]) -> None:
        prefix = names["key_prefix"][:9]
        misses = {names["socket_timeout"] + prefix[0]: names["socket_timeout"]}
        for written, field in {
            "lock_timeout": "lock_ttl",
            "redis_urls": "redis_url",
            "session_ttls": "session_ttl",
        }.items():
            misses[prefix + (written.upper() if prefix.isupper() else written)] = names[field]
        for miss, right in misses.items():
            with pytest.raises(ConfigurationError, match=f"^{miss} is no setting; the name must be {right}$"):
                Config.from_app({miss: "5"}, names)

    def test_refuses_any_other_name_that_begins_as_ours_do(self, names: dict[str, str]) -> None:
        prefix = names["key_prefix"][:9]
        with pytest.raises(ConfigurationError, match=f"^{prefix}wonder is no setting; these are: .*{prefix}own"):
            Config.from_app({f"{prefix}wonder": "5"}, names, [f"{prefix}own"])
        near = f"{prefix}session_heater"
        with pytest.raises(
            ConfigurationError, match=f"^{near} is no setting; the name must be {prefix}session_header$"
        ):
            Config.from_app({near: "5"}, names, [f"{prefix}session_header"])


@pytest.mark.usefixtures("bare_environment")
@pytest.mark.parametrize(("variable", "given"), GOOD)
def test_a_setting_has_one_name_in_the_environment_and_in_flask(variable: str, given: Any) -> None:
    name, _, parsed, *_ = SETTINGS[variable]
    held = {variable: given, **BESIDE.get(variable, {})}
    config = Config.from_app(held, APPS["flask"])
    assert config == Config.from_mapping(held)
    assert getattr(config, name) == parsed[given]


@pytest.mark.usefixtures("bare_environment")
def test_an_application_may_set_what_a_variable_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOVREDIS_LIMIT_MIRROR", "2")
    with pytest.raises(ConfigurationError, match="GOVREDIS_DATABASE_URL is not set"):
        Config.from_env()
    config = Config.from_app({"GOVREDIS_DATABASE_URL": "postgresql://h/d"}, APPS["flask"])
    assert config is not None
    assert config.limit_mirror == 2


@pytest.mark.usefixtures("bare_environment")
def test_a_whole_environment_may_be_an_applications_configuration() -> None:
    held = {"PATH": "/bin", "GOVREDIS_PORT_6379_TCP": "tcp://10.0.0.11:6379", "REDIS_LOCK_TIMEOUT": "7"}
    assert Config.from_app(held, APPS["flask"]) == Config(lock_ttl=7)


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


@pytest.mark.parametrize("where", ["REDIS_URL", "GOVREDIS_PARKING_URL"])
@pytest.mark.parametrize(
    ("variable", "parameter"),
    [("GOVREDIS_SOCKET_TIMEOUT", "socket_timeout"), ("GOVREDIS_CONNECT_TIMEOUT", "socket_connect_timeout")],
)
def test_a_timeout_in_a_url_must_be_the_settings_if_both_are_there(where: str, variable: str, parameter: str) -> None:
    held = {where: f"redis://h?{parameter}=5"}
    Config.from_mapping(held)
    Config.from_mapping({**held, variable: "5.0"})
    with pytest.raises(ConfigurationError) as caught:
        Config.from_mapping({**held, variable: "4"})
    assert str(caught.value) == (
        f"{parameter} in {where} is 5 and {variable} is 4; they must be the same, or one of them left out"
    )
    with pytest.raises(ConfigurationError, match=f"^{parameter} in {where} is 'soon'; it must be a number of seconds"):
        Config.from_mapping({where: f"redis://h?{parameter}=soon"})


class Provider:
    def get_credentials(self) -> tuple[str, str]:
        return "user", "hunter2"


def test_a_credential_provider() -> None:
    provider = Provider()
    assert Config(credential_provider=provider).credential_provider is provider
    assert "Provider" not in repr(Config(credential_provider=provider))
    with pytest.raises(ConfigurationError, match=r"^credential_provider is 'token'; it must be an object"):
        Config(credential_provider="token")
    for userinfo in ("user:hunter2", ":hunter2", "user"):
        with pytest.raises(ConfigurationError, match=r"^redis_url has a user or a password") as caught:
            Config(redis_url=f"redis://{userinfo}@h", credential_provider=provider)
        assert "hunter2" not in str(caught.value)


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
SECRET_PAIRS = [
    "host=h password=hunter2 dbname=d",
    "host=h password='a hunter2' dbname=d",
    "host=h password = hunter2",
    r"password='a\' hunter2'",
    "password=a'hunter2 host=h",
    'password=a"hunter2 host=h',
    "password=a&hunter2 host=h",
    r"password=a\ hunter2 host=h",
    "user='a pass=' password='b hunter2'",
    "host=h oauth_client_secret=hunter2",
    "host=h password=a hunter2",  # libpq refuses it; the quotes were forgotten
]
SECRET_DSNS = [
    *SECRET_PAIRS,
    "postgresql://user:hunter2@h/d",
    "postgresql://user:hunter2@h1:5432,h2:5433/d",
    "postgresql://user:a?hunter2@h/d",
    "postgresql://user:a#hunter2@h/d",
    "postgresql://h/d?user=u&password=hunter2",
    "postgresql://h/d?password=a'hunter2&user=u",
    "postgresql://h/d?p%61ssword=hunter2",
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
    "postgresql://h1:5432,user:hunter2/d",
    "postgresql://user:1/hunter2@h/d",
    "redis://us/er:hunter2@h/0",
    "redis://user:a\nhunter2@h/0/x",
    b"redis://user:hunter2@h/0",
    "redis://user:hunter2\udcff@h/0",  # of an environment that is not UTF-8
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


@pytest.mark.parametrize(
    ("variable", "held"),
    [(variable, held) for variable in ("REDIS_URL", "GOVREDIS_DATABASE_URL") for held in BAD_SECRETS]
    + [("REDIS_URL", held) for held in SECRET_PAIRS]
    + [("GOVREDIS_DATABASE_URL", held + " port=x") for held in SECRET_PAIRS],
    ids=repr,
)
def test_no_password_in_an_error(variable: str, held: Any) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Config.from_mapping({variable: held})
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_redact_leaves_the_place_in_a_script_with_which_redis_ends_an_error() -> None:
    error = "Redis at 127.0.0.1:6379 cannot serve: OOM command not allowed. script: 3c98a26, on @user_script:67."
    assert redact(error) == error
    assert redact("user:pw@user_script:67") == "user:***@user_script:67"


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


def test_a_url_and_settings_of_sentinels_mean_the_same() -> None:
    url = "rediss+sentinel://u:p%40w@a:1,[::1],b/other/3?ssl_cert_reqs=none&sentinel_username=s&sentinel_password=q"
    in_url = address_of(Config(redis_url=url))
    assert in_url.sentinels == Sentinels((("a", 1), ("::1", 26379), ("b", 26379)), "other", "s", "q")
    settings = Config(
        redis_url="rediss://u:p%40w@nobody/3?ssl_cert_reqs=none",
        sentinel_hosts="a:1, [::1] ,b",
        sentinel_master="other",
        sentinel_username="s",
        sentinel_password="q",
    )
    assert address_of(settings).sentinels == in_url.sentinels
    for address in in_url, address_of(settings):
        parts = urlsplit(address.url)
        assert (parts.scheme, parts.username, parts.password, parts.path, parts.query) == (
            "rediss", "u", "p%40w", "/3", "ssl_cert_reqs=none",
        )  # fmt: skip
    assert address_of(Config(sentinel_hosts="a")).sentinels == Sentinels((("a", 26379),), "mymaster")
    assert address_of(Config()) == ("redis://localhost:6379/0", None, ())


def test_a_url_and_the_setting_of_a_cluster_mean_the_same() -> None:
    in_url = address_of(Config(redis_url="rediss+cluster://u:p%40w@a:1,[::1],b/0?ssl_cert_reqs=none"))
    assert in_url.nodes == (("a", 1), ("::1", 6379), ("b", 6379))
    setting = address_of(Config(redis_url="rediss://u:p%40w@a:1/0?ssl_cert_reqs=none", cluster=True))
    assert setting.nodes == (("a", 1),)
    assert setting.sentinels is in_url.sentinels is None
    for address in in_url, setting:
        parts = urlsplit(address.url)
        assert (parts.scheme, parts.username, parts.password, parts.path, parts.query) == (
            "rediss", "u", "p%40w", "/0", "ssl_cert_reqs=none",
        )  # fmt: skip
    assert address_of(Config(redis_url="redis+cluster://a", cluster=True)).nodes == (("a", 6379),)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"redis_url": "redis+sentinel://b/m"}, "REDIS_CLUSTER is 1; Sentinels must be left out beside a Cluster"),
        ({"sentinel_hosts": "b"}, "REDIS_CLUSTER is 1; Sentinels must be left out"),
        ({"redis_url": "unix:///r"}, "REDIS_CLUSTER is 1; REDIS_URL must not be a unix socket"),
        ({"redis_url": "redis://a/1"}, "REDIS_CLUSTER is 1; the database in REDIS_URL must be 0"),
        ({"redis_url": "redis://a?db=1"}, "the database in REDIS_URL must be 0: a Cluster has no other"),
        (
            {"cluster": False, "redis_url": "redis+cluster://a", "sentinel_hosts": "b"},
            "REDIS_URL names nodes of a Cluster; Sentinels must be left out",
        ),
    ],
)
def test_settings_that_a_cluster_contradicts(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(said)):
        Config(**{"cluster": True, **settings})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sentinel_hosts": "a", "redis_url": "redis+sentinel://b/m"}, "names Sentinels; REDIS_SENTINEL_HOSTS must be"),
        (
            {"sentinel_hosts": "a", "redis_url": "unix:///r"},
            "is a unix socket; REDIS_SENTINEL_HOSTS must be left unset",
        ),
        ({"sentinel_master": "m"}, "REDIS_SENTINEL_MASTER is set; it must be left unset where no Sentinels are named"),
        ({"sentinel_tls": False}, "REDIS_SENTINEL_TLS is set; it must be left unset where no Sentinels are named"),
        ({"sentinel_password": "hunter2"}, "REDIS_SENTINEL_PASSWORD is set; it must be left unset"),
        ({"sentinel_master": "n", "redis_url": "redis+sentinel://b/m"}, "REDIS_SENTINEL_MASTER and REDIS_URL differ"),
        (
            {"sentinel_password": "hunter2", "redis_url": "redis+sentinel://b/m?sentinel_password=hunter3"},
            "REDIS_SENTINEL_PASSWORD and REDIS_URL differ; they must be the same, or one of them left out",
        ),
    ],
)
def test_settings_of_sentinels_that_contradict_each_other(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said) as caught:
        Config(**settings)
    assert "hunter" not in str(caught.value)


@pytest.mark.parametrize("hosts", ["a;b", "a b", "a:0", "a:1;b:2"])
def test_hosts_of_sentinels_that_are_none_are_refused(hosts: str) -> None:
    """Celery's URLs have a semicolon there. A port 0 was taken for the default."""
    with pytest.raises(ConfigurationError, match=r"it must be host\[:port\]\[,host"):
        Config(sentinel_hosts=hosts)
    with pytest.raises(ConfigurationError, match="must be redis://"):
        Config(redis_url=f"redis+sentinel://{hosts}/m")


def test_no_password_of_a_sentinel_is_shown() -> None:
    shown = repr(Config(sentinel_hosts="a", sentinel_password="hunter2", sentinel_username="u"))
    assert "hunter2" not in shown
    assert "sentinel_password=" in shown
    url = "redis+sentinel://u:hunter2@a:1,b:2/m/0?sentinel_password=hunter3"
    assert "hunter" not in repr(Config(redis_url=url))
    for bad in (7234567, b"hunter2"):
        with pytest.raises(ConfigurationError) as caught:
            Config(sentinel_hosts="a", sentinel_password=bad)  # type: ignore[arg-type]
        assert str(caught.value) == "sentinel_password is ***; it must be a str"
