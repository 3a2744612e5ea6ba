"""Passwords: servers and proxies that quote them get them into no error, log, report or repr; words stay readable."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import pytest
from flask import Flask
from psycopg2.extensions import make_dsn
from quoting_server import QuotingPostgres, QuotingRedis, as_redis_does
from support import REDIS_AWAY, redis_of

from govredis import BackendError, Config, GovRedis
from govredis._secrets import Secrets, passwords_in
from govredis.contrib.flask import FlaskGovRedis

pytestmark = pytest.mark.one_redis

COMMAND = Path(sys.executable).with_name("govredis")
SPECIAL = "S3cr3t@:/?# +%'\"\\{\n}é€"
PASSWORDS = {
    "plain": "S3cr3t",
    "special": SPECIAL,
    "longer than what Redis quotes": "A-very-long-password/" * 12,
    "letters": "qzkvwmxplrta",
    "digits": "490217536608",
}


def forms(password: str) -> set[str]:
    """Everything that would tell it: written anew here, and not by the code that is tested."""
    doubled = password.replace("\\", "\\\\")
    return {
        password,
        quote(password, safe=""),
        quote_plus(password),
        password.replace("\n", " "),
        password.replace("'", "''"),
        repr(password)[1:-1],
        repr(password.encode())[2:-1],
        json.dumps(password)[1:-1],
        json.dumps(password, ensure_ascii=False)[1:-1],
        doubled,
        password[:60],
        password.encode()[:118].decode(errors="ignore"),
    }


def redis_url(server: QuotingRedis, password: str) -> str:
    return f"redis://ann:{quote(password, safe='')}@127.0.0.1:{server.port}/0"


@pytest.fixture
def outputs(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[GovRedis], str]]:
    """All that leaves a GovRedis, as text: what its calls raise, with traceback and chain, logs, reports, reprs."""
    caplog.set_level(logging.DEBUG)

    def of(gov: GovRedis) -> str:
        said = [repr(gov), str(gov), repr(gov.config)]
        for call in (
            lambda: redis_of(gov).call("GET", "k"),
            lambda: redis_of(gov).pipeline([("GET", "k"), ("GET", "l")]),
            lambda: redis_of(gov).pop("k", 0.01),
            lambda: redis_of(gov).push_stream().send([("PING",)]),
            lambda: redis_of(gov)._probe(),
            lambda: gov.sessions.get("s"),
            lambda: gov.locks.acquire("l").release(),
            lambda: gov.limits.hit("a", "1/s"),
            lambda: gov.metadata.get_or_load("a", lambda _: 1),
        ):
            try:
                call()
            except Exception as error:  # noqa: BLE001
                said.append("".join(traceback.format_exception(error)))
                each: BaseException | None = error
                while each is not None:
                    said += [str(each), repr(each), repr(each.args)]
                    each = each.__cause__ or each.__context__
        report = gov.health.check()
        said += [repr(report), json.dumps(report.as_dict()), json.dumps(report.as_dict(), ensure_ascii=False)]
        app = Flask("app")
        app.config.update(TESTING=True, GOVREDIS_HEALTH_DETAILS=True, GOVREDIS_DASHBOARD=lambda: True)
        FlaskGovRedis(app, gov)
        said += [app.test_client().get(f"/govredis/{page}").text for page in ("health", "dashboard")]
        return "\n".join([*said, caplog.text])

    yield of


@pytest.mark.parametrize("password", PASSWORDS.values(), ids=PASSWORDS.keys())
class TestNothingOfItLeaves:
    def test_no_refusal_of_auth_quotes_it(
        self, make_gov: Callable[..., GovRedis], outputs: Callable[[GovRedis], str], password: str
    ) -> None:
        with QuotingRedis() as server:
            said = outputs(make_gov(redis_url=redis_url(server, password)))
            assert password.encode() in server.heard
        assert "in answer to AUTH" in said
        assert "in answer to HELLO" in said
        assert "with args beginning with" not in said, "not quoted at all"
        assert not [form for form in forms(password) if form in said]

    @pytest.mark.parametrize(
        "shown",
        [
            lambda password: password.encode(),
            lambda password: quote(password, safe="").encode(),
            lambda password: re.sub("%..", lambda found: found[0].lower(), quote_plus(password)).encode(),
            lambda password: repr(password).encode(),
            lambda password: repr(password.encode()).encode(),
            lambda password: repr(["'", '"' + password]).encode(),
            lambda password: json.dumps(password).encode(),
            lambda password: json.dumps({"p": password}, ensure_ascii=False).encode(),
            lambda password: password.encode()[:118],
            lambda password: password.replace("\\", "\\\\").replace("'", "\\'").encode(),
            lambda password: password.replace("'", "''").encode(),
        ],
        ids=[
            "raw",
            "percent",
            "lower percent",
            "repr",
            "repr of bytes",
            "in a repr",
            "JSON",
            "in JSON",
            "cut",
            "libpq",
            "sql",
        ],
    )
    def test_no_refusal_quotes_it(
        self,
        make_gov: Callable[..., GovRedis],
        outputs: Callable[[GovRedis], str],
        password: str,
        shown: Callable[[str], bytes],
    ) -> None:
        text = shown(password).replace(b"\n", b" ").replace(b"\r", b" ")
        with QuotingRedis(lambda *_: b"ERR that was " + text + b" is what it was", accepts=True) as server:
            said = outputs(make_gov(redis_url=redis_url(server, password)))
            assert server.heard
        assert "that was" in said
        assert "is what it was" in said
        assert not [form for form in {*forms(password), text.decode(errors="ignore")} if form in said]

    def test_no_refusal_in_words_of_redis_quotes_it(
        self, make_gov: Callable[..., GovRedis], outputs: Callable[[GovRedis], str], password: str
    ) -> None:
        """The refusal quotes the password of AUTH, as a reply that is out of step does."""

        def out_of_step(command: list[bytes], sent: bytes) -> bytes:
            return as_redis_does([b"AUTH", b"ann", sent], sent)

        with QuotingRedis(out_of_step, accepts=True) as server:
            said = outputs(make_gov(redis_url=redis_url(server, password)))
        assert "with args beginning with" in said
        assert not [form for form in forms(password) if form in said]

    @pytest.mark.parametrize("where", ["url", "parameter", "environment", "pairs", "service", "file"])
    def test_no_error_of_postgres_quotes_it(
        self,
        make_gov: Callable[..., GovRedis],
        outputs: Callable[[GovRedis], str],
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        password: str,
        where: str,
    ) -> None:
        if where in ("service", "file"):  # which have a line for each
            password = password.replace("\n", "")
        with QuotingPostgres() as server:
            encoded = quote(password, safe="")
            url = {
                "url": f"postgresql://ann:{encoded}@127.0.0.1:{server.port}/d",
                "parameter": f"postgresql://ann@127.0.0.1:{server.port}/d?password={encoded}",
                "environment": f"postgresql://ann@127.0.0.1:{server.port}/d",
                "pairs": make_dsn(user="ann", password=password, host="127.0.0.1", port=server.port, dbname="d"),
                "service": "service=mine",
                "file": f"host=127.0.0.1 port={server.port} user=ann dbname=d passfile={tmp_path}/passwords",
            }[where]
            if where == "service":
                (tmp_path / "services").write_text(
                    f"[mine]\nhost=127.0.0.1\nport={server.port}\nuser=ann\ndbname=d\npassword={password}\n"
                )
                monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "services"))
            if where == "file":
                escaped = password.replace("\\", r"\\").replace(":", r"\:")
                (tmp_path / "passwords").write_text(f"*:*:*:*:{escaped}\n")
                (tmp_path / "passwords").chmod(0o600)
            if where == "environment":
                monkeypatch.setenv("PGPASSWORD", password)
            gov = make_gov(redis_url=REDIS_AWAY, database_url=url)
            said = outputs(gov)
            with pytest.raises(BackendError) as caught:
                gov.postgres.fetch("SELECT 1")
            said += "".join(traceback.format_exception(caught.value)) + repr(caught.value.__cause__)
            assert password.encode() in server.heard
        assert "password authentication failed" in said
        assert not [form for form in forms(password) if form in said]

    def test_by_the_command(self, password: str) -> None:
        with QuotingRedis() as server:
            done = subprocess.run(
                [COMMAND, "health"],
                env={**os.environ, "REDIS_URL": redis_url(server, password)},
                capture_output=True,
                text=True,
            )
        assert done.returncode == 1
        said = done.stdout + done.stderr
        assert "in answer to AUTH" in said
        assert not [form for form in forms(password) if form in said]

    def test_no_error_of_the_parking_server_quotes_it(
        self, make_gov: Callable[..., GovRedis], outputs: Callable[[GovRedis], str], password: str, redis_server: Any
    ) -> None:
        with QuotingRedis(lambda _, sent: b"ERR not " + sent.replace(b"\n", b" "), accepts=True) as server:
            gov = make_gov(redis_url=redis_server.url, parking_url=redis_url(server, password))
            said = outputs(gov)
            assert server.heard
        assert "answered: not ***" in said
        assert not [form for form in forms(password) if form in said]


@pytest.mark.parametrize("password", ["redis", "a", "localhost", "ann", "postgresql", "credentials"])
class TestAWordForAPassword:
    def test_leaves_messages_readable(self, make_gov: Callable[..., GovRedis], password: str) -> None:
        """And what is hidden tells nobody what the password is."""
        gov = make_gov(redis_url=f"redis://ann:{password}@localhost:1/0")
        with pytest.raises(BackendError) as caught:
            for _ in range(3):
                redis_of(gov).call("GET", "k")
        text = str(caught.value)
        assert text.startswith("Redis at localhost:1 is away: ")
        assert "***" not in text
        plain = make_gov(redis_url="redis://localhost:1/0").health.check()
        with_password = gov.health.check()
        assert with_password.checks[0].output == plain.checks[0].output

    def test_is_hidden_where_it_stands_alone_between_quotes_or_in_a_url(self, password: str) -> None:
        secrets = Secrets.of(Config(redis_url=f"redis://ann:{password}@localhost:6379/0"))
        for text, hidden in (
            (f"args: 'AUTH' '{password}'", "args: 'AUTH' '***'"),
            (f'"{password}"', '"***"'),
            (f"redis://ann:{password}@h/0", "redis://ann:***@h/0"),
            (f"password={password}", "password=***"),
            (f"a localhost, a redis, 127.0.0.1: {password}ly", f"a localhost, a redis, 127.0.0.1: {password}ly"),
        ):
            assert secrets.hide(text) == hidden

    def test_in_answer_to_auth_is_not_quoted(self, make_gov: Callable[..., GovRedis], password: str) -> None:
        with QuotingRedis(lambda _, sent: b"ERR it is not " + sent + b" here") as server:
            gov = make_gov(redis_url=redis_url(server, password))
            with pytest.raises(BackendError) as caught:
                redis_of(gov).call("GET", "k")
        for said in (str(caught.value), str(caught.value.__cause__)):
            assert f"it is not {password}" not in said
            assert said.endswith("an error in answer to AUTH")


class TestSecrets:
    def test_secrets_of_two_configs_are_not_mixed(self) -> None:
        one, other = (Secrets.of(Config(redis_url=f"redis://:{pw}@h/0")) for pw in ("f1rst-one", "sec0nd-one"))
        assert one.hide("f1rst-one sec0nd-one") == "*** sec0nd-one"
        assert other.hide("f1rst-one sec0nd-one") == "f1rst-one ***"

    def test_a_user_without_a_password_is_one_whose_colon_was_forgotten(self) -> None:
        assert Secrets(["redis://s3cr3t-word@h/0"]).hide("AUTH s3cr3t-word") == "AUTH ***"
        assert Secrets(["postgresql://my-us3r@h/0"]).hide("role my-us3r") == "role my-us3r"

    def test_nothing_is_left_of_one_that_begins_with_another(self) -> None:
        secrets = Secrets(passwords=["abc123", "abc123def456"])
        assert secrets.hide("abc123def456 abc123") == "*** ***"

    def test_a_beginning_that_names_the_host_too_is_none(self) -> None:
        secrets = Secrets(["redis://:production-cache-7f3a9@production-cache.example:6379/0"])
        assert secrets.hide("production-cache.example is away") == "production-cache.example is away"
        assert secrets.hide("production-cache-7f3a9") == "***"

    def test_in_the_leaves_of_what_is_serialised_then(self) -> None:
        secrets = Secrets(passwords=[SPECIAL])
        report = {"a": [{"b": f"x {SPECIAL} y"}, 5, None, True], "c": (SPECIAL,)}
        assert secrets.hide_in(report) == {"a": [{"b": "x *** y"}, 5, None, True], "c": ["***"]}

    def test_only_the_drivers_part_of_an_exception_is_changed(self) -> None:
        mine, driver = KeyError("s3cr3t-word"), OSError("s3cr3t-word")
        driver.__context__ = mine
        assert Secrets(passwords=["s3cr3t-word"]).text_of(driver, OSError) == "***"
        assert (driver.args, mine.args) == (("***",), ("s3cr3t-word",))

    def test_a_url_that_is_none_hides_by_form(self) -> None:
        assert Secrets(["amqp://[u:pw@h"]).hide("amqp://u:pw@h") == "amqp://u:***@h"


def test_passwords_of_options_are_found_in_options_of_theirs() -> None:
    options = {
        "master_name": "m",
        "password": "outer-pw",
        "sentinel_kwargs": {"password": "inner-pw", "socket_timeout": 1},
    }
    assert Secrets(passwords=passwords_in(options)).hide("m outer-pw inner-pw") == "m *** ***"
