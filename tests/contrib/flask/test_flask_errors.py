"""The errors of limits and of servers that are away, as HTTP tells them: what they disclose, and what they keep."""

from __future__ import annotations

import gc
import traceback
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from flask import Blueprint, Flask, jsonify
from flask.testing import FlaskClient
from werkzeug.exceptions import HTTPException, ImATeapot
from werkzeug.test import EnvironBuilder

from govredis import BackendUnavailable, GovRedis, RateLimitExceeded, SessionStoreUnavailable
from govredis.contrib.flask import FlaskGovRedis
from govredis.sessions import SessionCache
from govredis.testing.servers import RedisServer

pytestmark = pytest.mark.one_redis

SECRET = "Redis at redis.internal:6379 is away (user:hunter2)"


@pytest.fixture
def gov(make_gov: Callable[..., GovRedis], redis_server: RedisServer) -> GovRedis:
    return make_gov(redis_url=redis_server.url)


def one() -> str:
    return "one"


@pytest.mark.parametrize("what", [503, HTTPException, BackendUnavailable, Exception])
def test_an_answer_made_of_the_errors_text_names_no_host(
    app: Flask, ext: FlaskGovRedis, client: FlaskClient, what: int | type[Exception]
) -> None:
    causes: list[Any] = []

    @app.get("/")
    def view() -> str:
        raise SessionStoreUnavailable(SECRET)

    @app.errorhandler(what)
    def handle(error: Exception) -> Any:
        causes.append(error.__cause__)
        return jsonify(error=str(error), all=repr(error)), 503

    answer = client.get("/")
    assert answer.status_code == 503
    assert "internal" not in answer.text and "a service that this request needs is away" in answer.text
    (cause,) = causes
    assert str(cause) == SECRET, "a log may have it"


@pytest.mark.parametrize("handled", [False, True])
@pytest.mark.parametrize("kind", [RateLimitExceeded, BackendUnavailable, None])
def test_a_refused_request_leaves_nothing_to_the_garbage_collector(
    app: Flask, ext: FlaskGovRedis, monkeypatch: pytest.MonkeyPatch, kind: type[Exception] | None, handled: bool
) -> None:
    """Else a flood of refusals keeps all that their views have held. None: nobody can say who it is."""

    def unavailable(*args: Any, **kwargs: Any) -> Any:
        raise SessionStoreUnavailable(
            SECRET
        )  # not by a server that is away: redis-py's errors hold frames of their own

    monkeypatch.setattr(SessionCache, "get_agent_id", unavailable)

    class Held:
        pass

    held: list[weakref.ref[Held]] = []

    @app.get("/")
    def view() -> str:
        mine = Held()
        held.append(weakref.ref(mine))
        if kind is None:
            return ext.current_agent() or ""
        raise kind("no")

    if handled:
        app.register_error_handler(kind or SessionStoreUnavailable, lambda error: error)
    environ = EnvironBuilder("/", headers={"X-Session-Id": "unknown"}).get_environ()
    gc.disable()
    try:
        # Not the test client, which keeps the last request.
        body = app.wsgi_app(environ, lambda *args: lambda data: None)
        list(body)
        body.close()  # type: ignore[attr-defined]
        assert [mine() for mine in held] == [None]
    finally:
        gc.enable()


class Described(RateLimitExceeded):
    @property
    def description(self) -> str:
        return "of the app's"


class WithoutSubclass(RateLimitExceeded):
    def __init_subclass__(cls) -> None:
        raise TypeError("no")


class Made(RateLimitExceeded):
    def __new__(cls, *, by: str) -> Made:
        return super().__new__(cls)

    def __init__(self, *, by: str) -> None:
        super().__init__(f"too many for {by}")


@pytest.mark.parametrize(
    "make",
    [lambda: Described("no"), lambda: WithoutSubclass("no"), lambda: Made(by="us")],
    ids=["described", "final", "made"],
)
@pytest.mark.parametrize("handled", [False, True])
def test_an_error_of_a_class_of_the_apps_is_a_429(
    app: Flask, ext: FlaskGovRedis, client: FlaskClient, make: Callable[[], RateLimitExceeded], handled: bool
) -> None:
    @app.get("/")
    def view() -> str:
        raise make()

    if handled:
        app.register_error_handler(RateLimitExceeded, lambda error: ("mine", 429))
    answer = client.get("/")
    assert answer.status_code == 429
    assert handled == (answer.text == "mine")


@pytest.mark.parametrize("where", ["before_request", "a blueprint's before_request", "url_value_preprocessor"])
def test_an_error_of_a_hook_before_the_view_is_told_too(
    app: Flask, ext: FlaskGovRedis, client: FlaskClient, where: str
) -> None:
    blueprint = Blueprint("b", __name__)
    blueprint.add_url_rule("/", view_func=one)

    def hook(*args: Any) -> None:
        raise BackendUnavailable(SECRET)

    if where == "url_value_preprocessor":
        app.url_value_preprocessor(hook)
    else:
        (blueprint if "blueprint" in where else app).before_request(hook)
    app.register_blueprint(blueprint)
    answer = client.get("/")
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert "internal" not in answer.text


def test_a_head_request_is_refused_without_a_body(app: Flask, ext: FlaskGovRedis, client: FlaskClient) -> None:
    app.add_url_rule("/", view_func=ext.rate_limited("1/hour", key="k")(one))
    client.get("/")
    refused = client.head("/")
    assert (refused.status_code, refused.data) == (429, b"")
    assert int(refused.headers["Retry-After"]) > 0


ODD_ACCEPTS = (
    ",",
    ";",
    "a",
    "*/json",
    "text/html;q=x",
    "text/html;q=1e400",
    'text/html;a="b',
    "/",
    "text/",
    "a/b;c*0*=x''%ff",
)


@pytest.mark.parametrize("accept", ODD_ACCEPTS)
def test_an_odd_accept_is_answered(app: Flask, ext: FlaskGovRedis, client: FlaskClient, accept: str) -> None:
    @app.get("/")
    def view() -> str:
        raise BackendUnavailable(SECRET)

    answer = client.get("/", headers={"Accept": accept})
    assert (answer.status_code, answer.content_type) == (503, "application/problem+json")


def test_a_handler_finds_on_the_error_all_that_it_was_raised_with(
    app: Flask, ext: FlaskGovRedis, client: FlaskClient
) -> None:
    seen: list[Any] = []

    @app.get("/")
    def view_that_raises() -> str:
        error = BackendUnavailable(SECRET, "more")
        error.note = "mine"  # type: ignore[attr-defined]
        raise error

    app.register_error_handler(503, lambda error: (seen.append(error), ("", 503))[1])
    client.get("/")
    (error,) = seen
    assert (error.args, error.note, error.retry_after) == ((SECRET, "more"), "mine", 1)
    assert "view_that_raises" in [frame.name for frame in traceback.extract_tb(error.__traceback__)]


class Teapot(RateLimitExceeded, ImATeapot):
    pass


def test_an_error_that_is_werkzeugs_already_keeps_its_status(
    app: Flask, ext: FlaskGovRedis, client: FlaskClient
) -> None:
    @app.get("/")
    def view() -> str:
        raise Teapot("no coffee")

    assert client.get("/").status_code == 418


def test_a_retry_after_of_the_handlers_stays(app: Flask, ext: FlaskGovRedis, client: FlaskClient) -> None:
    @app.get("/")
    def view() -> str:
        raise BackendUnavailable(SECRET)

    app.register_error_handler(503, lambda error: ("", 503, {"Retry-After": "77"}))
    assert client.get("/").headers.getlist("Retry-After") == ["77"]


def test_a_refusal_without_a_result_names_no_time(app: Flask, ext: FlaskGovRedis, client: FlaskClient) -> None:
    @app.get("/")
    def view() -> str:
        raise RateLimitExceeded("not today")

    answer = client.get("/")
    assert (answer.status_code, answer.headers.get("Retry-After")) == (429, None)
    assert set(answer.vary) == {"Accept"}
    assert answer.get_json(force=True)["violated-policies"] == []


@pytest.mark.parametrize(("seconds", "said"), [(0.0, "1"), (0.25, "1"), (1.25, "2")])
def test_a_client_that_obeys_retry_after_comes_late_enough(
    app: Flask, ext: FlaskGovRedis, client: FlaskClient, gov: GovRedis, seconds: float, said: str
) -> None:
    gov.limits.hit("i", "1/hour")
    result = gov.limits.hit("i", "1/hour")
    result.retry_after = seconds

    @app.get("/")
    def view() -> str:
        raise RateLimitExceeded(result)

    assert client.get("/").headers["Retry-After"] == said


@pytest.mark.parametrize(
    ("accept", "kind"),
    [("text/plain, text/html", "text/html"), ("text/html, application/json", "application/problem+json")],
)
def test_of_equals_the_richer_kind_is_sent(
    app: Flask, ext: FlaskGovRedis, client: FlaskClient, accept: str, kind: str
) -> None:
    @app.get("/")
    def view() -> str:
        raise BackendUnavailable(SECRET)

    assert client.get("/", headers={"Accept": accept}).mimetype == kind
