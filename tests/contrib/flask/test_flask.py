"""FlaskGovRedis in apps, by Flask's own client, on real servers."""

from __future__ import annotations

import functools
import gc
import inspect
import json
import math
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flask import Blueprint, Flask, Response, jsonify, make_response, request
from flask.testing import FlaskClient
from support import REDIS_AWAY

from govredis import (
    BackendUnavailable,
    ConfigurationError,
    GovRedis,
    Limit,
    LockUnavailable,
    RateLimitExceeded,
    SessionStoreUnavailable,
    configure,
)
from govredis.contrib.flask import FlaskGovRedis
from govredis.testing.servers import PostgresServer, RedisServer

pytestmark = pytest.mark.one_redis

AGENT = {"X-Agent": "agent-1"}
PAGES = "live", "ready", "health"


def by_header() -> str:
    return request.headers["X-Agent"]


@pytest.fixture
def away(make_gov: Callable[..., GovRedis]) -> GovRedis:
    """Neither a Redis nor a PostgreSQL."""
    return make_gov(redis_url=REDIS_AWAY)


@pytest.fixture
def close_apps() -> Iterator[list[Flask]]:
    """The apps that make a GovRedis of their own settings."""
    apps: list[Flask] = []
    yield apps
    for app in apps:
        gov_of(app).close()


def gov_of(app: Flask) -> GovRedis:
    with app.app_context():
        return FlaskGovRedis().gov


def items(field: str) -> list[str]:
    return field.split(", ")


def assert_problem(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status
    assert response.content_type == "application/problem+json"
    body: dict[str, Any] = json.loads(response.data)
    assert body["status"] == status
    assert body["type"] and body["title"] and body["detail"]
    return body


# -- whose GovRedis --------------------------------------------------------------------------------------------------


def test_the_argument_comes_before_the_settings_before_the_process_wide_one(
    gov: GovRedis, make_gov: Callable[..., GovRedis], close_apps: list[Flask]
) -> None:
    process_wide = make_gov(redis_url=REDIS_AWAY)
    configure(process_wide)
    given, own, plain = Flask("given"), Flask("own"), Flask("plain")
    given.config["GOVREDIS_KEY_PREFIX"] = own.config["GOVREDIS_KEY_PREFIX"] = "own:"
    FlaskGovRedis(given, gov)
    ext = FlaskGovRedis()
    for app in own, plain:
        ext.init_app(app)
    close_apps.append(own)
    assert gov_of(given) is gov
    assert gov_of(own).config.key_prefix == "own:"
    assert gov_of(plain) is process_wide
    later = make_gov(redis_url=REDIS_AWAY)
    configure(later)
    assert gov_of(plain) is later


def test_one_extension_serves_several_apps_each_with_its_own_settings(
    redis_server: RedisServer, close_apps: list[Flask], plain_redis: Any
) -> None:
    ext = FlaskGovRedis()
    views = Blueprint("views", __name__)

    @views.get("/")
    @ext.rate_limited("1/hour", key=by_header, operation="visit")
    def visit() -> str:
        return ext.gov.config.key_prefix

    def create_app(name: str) -> Flask:
        app = Flask(name)
        app.config.from_mapping(REDIS_URL=redis_server.url, GOVREDIS_KEY_PREFIX=f"{name}:")
        ext.init_app(app)
        app.register_blueprint(views)
        close_apps.append(app)
        return app

    one, two = create_app("one").test_client(), create_app("two").test_client()
    assert [c.get("/", headers=AGENT).status_code for c in (one, one, two, two)] == [200, 429, 200, 429]
    assert set(plain_redis.keys("*:rate_limit:visit:agent-1")) == {
        "one:rate_limit:visit:agent-1",
        "two:rate_limit:visit:agent-1",
    }


def test_settings_are_put_over_the_environments(
    app: Flask, monkeypatch: pytest.MonkeyPatch, close_apps: list[Flask]
) -> None:
    monkeypatch.setenv("REDIS_SESSION_TTL", "7")
    monkeypatch.setenv("GOVREDIS_KEY_PREFIX", "env:")
    app.config["GOVREDIS_KEY_PREFIX"] = "app:"
    FlaskGovRedis(app)
    close_apps.append(app)
    assert (gov_of(app).config.session_ttl, gov_of(app).config.key_prefix) == (7, "app:")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"REDIS_SESSION_TTL": "an hour"}, "^REDIS_SESSION_TTL is 'an hour'; it must be a number of seconds"),
        ({"GOVREDIS_SESSION_TTL": "7"}, "^GOVREDIS_SESSION_TTL is no setting; the name must be REDIS_SESSION_TTL$"),
        ({"GOVREDIS_REDIS_URL": "redis://h"}, "^GOVREDIS_REDIS_URL is no setting; the name must be REDIS_URL$"),
        (
            {"GOVREDIS_SESION_HEADER": "X-Sid"},
            "^GOVREDIS_SESION_HEADER is no setting; the name must be GOVREDIS_SESSION_HEADER$",
        ),
        ({"GOVREDIS_SESSION_HEADER": "X Sid"}, "GOVREDIS_SESSION_HEADER is 'X Sid'; it must be a name of letters"),
        ({"GOVREDIS_SESSION_COOKIE": 7}, "GOVREDIS_SESSION_COOKIE is 7; it must be a name of letters.*, or None"),
        (
            {"GOVREDIS_URL_PREFIX": "ops"},
            "GOVREDIS_URL_PREFIX is 'ops'; it must be a path such as .*, or None",
        ),
        ({"GOVREDIS_URL_PREFIX": "/"}, "GOVREDIS_URL_PREFIX is '/'"),
        ({"GOVREDIS_URL_PREFIX": "/<x>"}, "GOVREDIS_URL_PREFIX is '/<x>'"),
        ({"GOVREDIS_HEALTH_DETAILS": "no"}, "GOVREDIS_HEALTH_DETAILS is 'no'; it must be True, False or a plain call"),
        ({"GOVREDIS_HEALTH_DETAILS": lambda user: True}, "GOVREDIS_HEALTH_DETAILS is .* callable without arguments"),
        ({"GOVREDIS_WONDER": "x"}, "^GOVREDIS_WONDER is no setting; these are: .*GOVREDIS_SESSION_COOKIE.*REDIS_URL"),
        ({"REDIS_URL": "redis://u:hunter2@h:x"}, r"^REDIS_URL is 'redis://u:\*\*\*@h:x'"),
    ],
)
def test_wrong_settings_are_refused_by_init_app(app: Flask, settings: dict[str, Any], said: str) -> None:
    app.config.update(settings)
    with pytest.raises(ConfigurationError, match=said):
        FlaskGovRedis(app)
    assert "govredis" not in app.extensions
    assert not app.before_request_funcs and "govredis" not in app.blueprints


def test_init_app_twice_is_refused(app: Flask, ext: FlaskGovRedis) -> None:
    for again in ext, FlaskGovRedis():
        with pytest.raises(ValueError, match="app 'shop' has a FlaskGovRedis already"):
            again.init_app(app)


def test_an_app_without_init_app_says_so(app: Flask) -> None:
    with app.app_context(), pytest.raises(RuntimeError, match=r"app 'shop' has no FlaskGovRedis; call init_app\(app\)"):
        _ = FlaskGovRedis().gov
    with app.test_request_context(), pytest.raises(RuntimeError, match="has no FlaskGovRedis"):
        FlaskGovRedis().current_agent()
    with pytest.raises(RuntimeError, match="application context"):
        _ = FlaskGovRedis().gov


def test_an_app_can_be_forgotten(gov: GovRedis) -> None:
    ext = FlaskGovRedis(gov=gov)

    def create_app() -> weakref.ref[Flask]:
        app = Flask("short-lived")
        ext.init_app(app)

        @app.get("/")
        @ext.rate_limited("1/hour", key=by_header)
        def view() -> str:
            return ""

        return weakref.ref(app)

    made = create_app()
    gc.collect()
    assert made() is None


# -- limits ----------------------------------------------------------------------------------------------------------


def test_a_view_is_limited_and_says_so_in_the_fields_of_the_draft(
    app: Flask, ext: FlaskGovRedis, client: FlaskClient, gov: GovRedis
) -> None:
    ran = []

    @app.post("/discoveries")
    @ext.rate_limited("20/hour;2/minute", key=lambda: request.headers["X-Agent"], operation="kg_store")
    def discoveries() -> str:
        ran.append(1)
        return "stored"

    policy = '"kg_store: 20 per 3600 s";q=20;w=3600, "kg_store: 2 per 60 s";q=2;w=60'
    for left in 1, 0:
        admitted = client.post("/discoveries", headers=AGENT)
        assert (admitted.status_code, admitted.text) == (200, "stored")
        assert admitted.headers["RateLimit-Policy"] == policy
        assert admitted.headers["RateLimit"] == f'"kg_store: 2 per 60 s";r={left};t=60'
        assert "Retry-After" not in admitted.headers

    refused = client.post("/discoveries", headers=AGENT)
    body = assert_problem(refused, 429)
    wait = int(refused.headers["Retry-After"])
    assert 1 <= wait <= 60
    assert math.ceil(gov.limits.peek("agent-1", "2/minute", operation="kg_store").retry_after) in {wait, wait - 1}
    assert refused.headers["RateLimit-Policy"] == policy
    assert refused.headers["RateLimit"] == f'"kg_store: 2 per 60 s";r=0;t={wait}'
    assert body["type"] == "https://iana.org/assignments/http-problem-types#quota-exceeded"
    assert body["violated-policies"] == ["kg_store: 2 per 60 s"]
    assert "2 per 60 s" in body["detail"]
    assert len(ran) == 2
    assert client.post("/discoveries", headers={"X-Agent": "agent-2"}).status_code == 200


def test_the_effective_window_of_an_admission_lasts_until_the_limit_is_full_again(
    app: Flask, ext: FlaskGovRedis, client: FlaskClient
) -> None:
    @app.get("/")
    @ext.rate_limited("9/1.5 hours", key=by_header)
    def view() -> str:
        return ""

    assert client.get("/", headers=AGENT).headers["RateLimit"] == '"default: 9 per 5400 s";r=8;t=5400'


def test_the_effective_window_of_a_refusal_ends_with_it(
    app: Flask, ext: FlaskGovRedis, client: FlaskClient, plain_redis: Any
) -> None:
    @app.get("/")
    @ext.rate_limited("2/minute", key=by_header)
    def view() -> str:
        return ""

    seconds, _ = plain_redis.time()
    plain_redis.zadd("rate_limit:default:agent-1", {"somebody else's": seconds - 30})
    admitted, refused = client.get("/", headers=AGENT), client.get("/", headers=AGENT)
    assert admitted.headers["RateLimit"] == '"default: 2 per 60 s";r=0;t=60'
    wait = int(refused.headers["Retry-After"])
    assert 20 <= wait <= 31
    assert refused.headers["RateLimit"] == f'"default: 2 per 60 s";r=0;t={wait}'


def test_a_window_of_no_whole_number_of_seconds_has_no_w(app: Flask, ext: FlaskGovRedis, client: FlaskClient) -> None:
    @app.get("/")
    @ext.rate_limited([Limit(9, 0.5), Limit(9, 1.5), Limit(9, 2)], key=by_header)
    def view() -> str:
        return ""

    policies = items(client.get("/", headers=AGENT).headers["RateLimit-Policy"])
    assert policies == ['"default: 9 per 0.5 s";q=9', '"default: 9 per 1.5 s";q=9', '"default: 9 per 2 s";q=9;w=2']


def test_retry_after_is_never_less_than_a_second(app: Flask, ext: FlaskGovRedis, client: FlaskClient) -> None:
    @app.get("/")
    @ext.rate_limited(Limit(1, 0.9), key=by_header)
    def view() -> str:
        return ""

    answers = [client.get("/", headers=AGENT) for _ in range(2)]
    assert [a.headers.get("Retry-After") for a in answers if a.status_code == 429] == ["1"]


def test_a_policys_name_is_safe_in_a_field_and_the_same_in_the_body(
    app: Flask, ext: FlaskGovRedis, client: FlaskClient
) -> None:
    @app.get("/")
    @ext.rate_limited("1/hour", key=by_header, operation='a "b\\ 100% né')
    def view() -> str:
        return ""

    client.get("/", headers=AGENT)
    refused = client.get("/", headers=AGENT)
    name = "a %22b%5C 100%25 n%C3%A9: 1 per 3600 s"
    assert refused.headers["RateLimit-Policy"] == f'"{name}";q=1;w=3600'
    assert refused.headers["RateLimit"].startswith(f'"{name}";r=0;t=')
    assert refused.get_json()["violated-policies"] == [name]


def test_every_response_of_a_limited_view_has_the_fields_and_no_other(
    app: Flask, ext: FlaskGovRedis, client: FlaskClient
) -> None:
    @app.get("/<kind>")
    @ext.rate_limited("9/hour", key="{kind}")
    def view(kind: str) -> Response:
        if kind == "missing":
            response = make_response("not here", 404)
            response.headers["RateLimit-Policy"] = '"of the view itself";q=1'
            return response
        raise ZeroDivisionError

    @app.get("/free/of/limits")
    def free() -> str:
        return ""

    missing, crashed, free_of_it = (client.get(f"/{path}") for path in ("missing", "crashed", "free/of/limits"))
    assert (missing.status_code, crashed.status_code, free_of_it.status_code) == (404, 500, 200)
    for response in missing, crashed:
        assert response.headers["RateLimit"] == '"default: 9 per 3600 s";r=8;t=3600'
    assert missing.headers.getlist("RateLimit-Policy") == [
        '"of the view itself";q=1',
        '"default: 9 per 3600 s";q=9;w=3600',
    ]
    assert "RateLimit" not in free_of_it.headers and "RateLimit-Policy" not in free_of_it.headers


def test_several_on_one_view_are_all_listed_and_decide_from_the_outermost(
    app: Flask, ext: FlaskGovRedis, client: FlaskClient, gov: GovRedis
) -> None:
    @app.get("/")
    @ext.rate_limited("5/hour", key=lambda: "everybody", operation="all")
    @ext.rate_limited("1/hour", key=by_header, operation="one")
    def view() -> str:
        return ""

    admitted, refused = client.get("/", headers=AGENT), client.get("/", headers=AGENT)
    assert (admitted.status_code, refused.status_code) == (200, 429)
    for response in admitted, refused:
        assert response.headers["RateLimit-Policy"] == '"all: 5 per 3600 s";q=5;w=3600, "one: 1 per 3600 s";q=1;w=3600'
    assert items(refused.headers["RateLimit"])[0].startswith('"all: 5 per 3600 s";r=3;')
    assert items(refused.headers["RateLimit"])[1].startswith('"one: 1 per 3600 s";r=0;')
    assert refused.get_json()["violated-policies"] == ["one: 1 per 3600 s"]
    assert gov.limits.get_count("everybody", 3600, operation="all") == 2  # taken also where the inner one refused


def test_the_requests_of_one_app_context_do_not_share_what_they_met(
    app: Flask, ext: FlaskGovRedis, client: FlaskClient, gov: GovRedis
) -> None:
    gov.sessions.bind("s-1", "agent-1")

    @app.get("/")
    @ext.rate_limited("9/hour", key=lambda: "everybody")
    def view() -> str:
        return repr(ext.current_agent())

    with app.app_context():
        assert client.get("/", headers={"X-Session-Id": "s-1"}).text == "'agent-1'"
        second = client.get("/")
    assert second.text == "None"
    assert len(items(second.headers["RateLimit"])) == 1


def test_require_in_a_view_is_a_429_too(app: Flask, ext: FlaskGovRedis, client: FlaskClient) -> None:
    @app.get("/")
    @ext.rate_limited("9/hour", key=by_header, operation="outer")
    def view() -> str:
        ext.gov.limits.require("agent-1", "1/minute", operation="inner")
        return ""

    @app.get("/plain")
    def plain() -> str:
        raise RateLimitExceeded

    assert client.get("/", headers=AGENT).status_code == 200
    refused = client.get("/", headers=AGENT)
    assert assert_problem(refused, 429)["violated-policies"] == ["1 per 60 s"]
    assert 59 <= int(refused.headers["Retry-After"]) <= 60
    assert len(items(refused.headers["RateLimit"])) == 1  # the decorator's
    body = assert_problem(client.get("/plain"), 429)
    assert body["violated-policies"] == [] and body["detail"] == "rate limit exceeded"


def test_key_and_rate_may_be_callables_that_read_the_request(
    app: Flask, ext: FlaskGovRedis, client: FlaskClient
) -> None:
    @app.get("/<name>")
    @ext.rate_limited(lambda: request.headers["X-Rate"], key=by_header)
    def view(name: str) -> str:
        return name

    assert client.get("/a", headers={**AGENT, "X-Rate": "1/hour"}).text == "a"
    assert client.get("/b", headers={**AGENT, "X-Rate": "1/hour"}).status_code == 429
    assert client.get("/c", headers={**AGENT, "X-Rate": "5/hour"}).text == "c"
    assert client.get("/d", headers={**AGENT, "X-Rate": "5/fortnight"}).status_code == 500  # ours to see, not theirs


def test_key_may_be_a_template_of_the_urls_arguments(
    app: Flask, ext: FlaskGovRedis, client: FlaskClient, plain_redis: Any
) -> None:
    @app.get("/<team>/<int:agent_id>")
    @ext.rate_limited("1/hour", key="{team}.{agent_id}", operation="visit")
    def view(team: str, agent_id: int) -> str:
        return f"{team} {agent_id}"

    answers = [client.get(path) for path in ("/a/1", "/a/2", "/a/1")]
    assert [(a.status_code, a.text) for a in answers[:2]] == [(200, "a 1"), (200, "a 2")]
    assert answers[2].status_code == 429
    assert "rate_limit:visit:a.:int=1" in plain_redis.keys("*")


def test_a_key_that_gives_no_id_is_a_mistake_to_be_seen(app: Flask, ext: FlaskGovRedis, client: FlaskClient) -> None:
    @app.get("/")
    @ext.rate_limited("1/hour", key=lambda: 7.5)  # type: ignore[arg-type,return-value]
    def view() -> str:
        raise AssertionError("it ran")

    app.testing = True
    with pytest.raises(TypeError, match=r"key of \S*view gave 7\.5; it must give a str, an int or a UUID, or None"):
        client.get("/")


@pytest.mark.parametrize("identity", [None, "", "a{b", "a\x85", "x" * 513])
def test_a_request_without_an_identity_is_a_400_and_nothing_is_sent(
    app: Flask, ext: FlaskGovRedis, client: FlaskClient, plain_redis: Any, identity: Any
) -> None:
    @app.get("/")
    @ext.rate_limited("9/hour", key=lambda: identity)
    def view() -> str:
        raise AssertionError("it ran")

    body = assert_problem(client.get("/"), 400)
    assert body["detail"] == "this request carries no identity for its limit"
    assert plain_redis.keys() == []


def test_a_key_that_cannot_be_made_of_the_request_is_a_400(app: Flask, ext: FlaskGovRedis, client: FlaskClient) -> None:
    @app.get("/number")
    @ext.rate_limited("9/hour", key=lambda: str(int(request.headers["X-Number"])))
    def number() -> str:
        return ""

    @app.get("/agents", defaults={"agent_id": None})
    @app.get("/agents/<agent_id>")
    @ext.rate_limited("9/hour", key="{agent_id}")
    def agents(agent_id: str | None) -> str:
        return ""

    assert_problem(client.get("/number", headers={"X-Number": "many"}), 400)
    assert_problem(client.get("/number"), 400)
    assert client.get("/number", headers={"X-Number": "7"}).status_code == 200
    assert_problem(client.get("/agents"), 400)
    assert client.get("/agents/a").status_code == 200


def test_an_error_handler_of_the_users_may_take_the_400(app: Flask, ext: FlaskGovRedis, client: FlaskClient) -> None:
    @app.get("/")
    @ext.rate_limited("9/hour", key=lambda: None)
    def view() -> str:
        return ""

    app.register_error_handler(400, lambda error: (f"mine: {error.description}", 400))
    assert client.get("/").text == "mine: this request carries no identity for its limit"


def test_name_and_signature_stay(ext: FlaskGovRedis) -> None:
    def view(agent_id: str, *, page: int = 1) -> str:
        """What it does."""
        return agent_id

    limited = ext.rate_limited("1/hour", key="{agent_id}")(view)
    assert (limited.__name__, limited.__doc__) == ("view", "What it does.")
    assert inspect.signature(limited) == inspect.signature(view)


def test_without_redis_and_postgres_the_fallback_limits(app: Flask, client: FlaskClient, away: GovRedis) -> None:
    ext = FlaskGovRedis(app, away)

    @app.get("/")
    @ext.rate_limited("2/hour", key=by_header)
    def view() -> str:
        return ""

    assert [client.get("/", headers=AGENT).status_code for _ in range(3)] == [200, 200, 429]


def test_one_limit_holds_across_threads(app: Flask, ext: FlaskGovRedis) -> None:
    @app.get("/")
    @ext.rate_limited("10/hour", key=by_header)
    def view() -> str:
        return ""

    seen: list[int] = []

    def visit() -> None:
        client = app.test_client()
        seen.extend(client.get("/", headers=AGENT).status_code for _ in range(5))

    threads = [threading.Thread(target=visit) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (seen.count(200), seen.count(429)) == (10, 20)


# -- what is refused at decoration -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"rate": "20/fortnight", "key": "{agent_id}"}, "rate is '20/fortnight'"),
        ({"rate": "20/hour", "key": 5}, "key is 5; it must be a template"),
        ({"rate": "20/hour", "methods": "POST"}, r"methods is 'POST'; it must be a list of HTTP methods"),
        ({"rate": "20/hour", "methods": []}, r"methods is \[\]; it must be a list of HTTP methods"),
        ({"rate": "20/hour", "key": "agent_id"}, "key 'agent_id' of .*view is the name of an argument"),
        ({"rate": "20/hour", "key": "{agnet_id}"}, "names 'agnet_id'; the function's arguments are agent_id"),
        ({"rate": "20/hour", "key": "{agent_id}", "operation": "a:b"}, "operation is 'a:b'"),
        (
            {"rate": "20/hour", "key": lambda agent_id: agent_id},
            "key is .*; it must be a plain callable without arguments",
        ),
        (
            {"rate": lambda agent_id: "1/hour", "key": by_header},
            "rate is .*; it must be a plain callable without arguments",
        ),
    ],
)
def test_a_bad_argument_is_refused_at_decoration(ext: FlaskGovRedis, arguments: dict[str, Any], said: str) -> None:
    def view(agent_id: str) -> str:
        return agent_id

    with pytest.raises(ValueError, match=said):
        ext.rate_limited(**arguments)(view)


def test_an_async_view_is_refused(ext: FlaskGovRedis) -> None:
    async def view() -> str:
        return ""

    with pytest.raises(ValueError, match=r"<locals>\.view is async; @rate_limited is for synchronous views"):
        ext.rate_limited("1/hour", key=by_header)(view)
    with pytest.raises(ValueError, match="the decorated object is 7; it must be the function of a view"):
        ext.rate_limited("1/hour", key=by_header)(7)  # type: ignore[arg-type]


def logged(function: Any) -> Any:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize("between", [lambda function: function, logged])
def test_above_a_route_of_an_app_it_knows_it_is_refused_at_decoration(
    app: Flask, ext: FlaskGovRedis, between: Callable[..., Any]
) -> None:
    def view() -> str:
        return "unlimited"

    with pytest.raises(ValueError, match=r"@rate_limited does not limit \S*<locals>\.view: it stands above a route"):
        ext.rate_limited("1/hour", key=by_header)(between(app.get("/")(view)))


def test_above_a_route_of_a_blueprint_every_request_is_refused(gov: GovRedis) -> None:
    ext = FlaskGovRedis(gov=gov)
    views = Blueprint("views", __name__)

    @views.get("/fine")
    @ext.rate_limited("9/hour", key=by_header)
    def fine() -> str:
        return ""

    def create_app() -> Flask:
        app = Flask("late")
        ext.init_app(app)
        app.register_blueprint(views)
        app.testing = True
        return app

    assert create_app().test_client().get("/fine", headers=AGENT).status_code == 200

    views = Blueprint("views", __name__)

    @ext.rate_limited("9/hour", key=by_header)
    @views.get("/bare")
    def bare() -> str:
        raise AssertionError("it ran")

    client = create_app().test_client()
    for path in "/bare", "/elsewhere", "/bare", "/govredis/live":
        with pytest.raises(ValueError, match=r"does not limit \S*<locals>\.bare: it stands above a route"):
            client.get(path, headers=AGENT)
    client.application.testing = False
    assert client.get("/bare", headers=AGENT).status_code == 500


def test_above_a_route_of_a_factory_every_request_is_refused(gov: GovRedis) -> None:
    ext = FlaskGovRedis(gov=gov)

    def create_app() -> Flask:
        app = Flask("factory")

        @ext.rate_limited("9/hour", key=by_header)
        @app.get("/")
        def bare() -> str:
            raise AssertionError("it ran")

        ext.init_app(app)
        return app

    app = create_app()
    gc.collect()  # nobody holds the limited function any more
    assert app.test_client().get("/", headers=AGENT).status_code == 500


def test_above_before_request_it_is_refused(app: Flask, ext: FlaskGovRedis) -> None:
    def every() -> None:
        raise AssertionError("it ran")

    with pytest.raises(ValueError, match=r"@rate_limited does not limit \S*<locals>\.every"):
        ext.rate_limited("1/hour", key=by_header)(app.before_request(every))


def test_a_method_that_is_a_view_as_well_is_refused(app: Flask, ext: FlaskGovRedis) -> None:
    class Views:
        def view(self) -> str:
            raise AssertionError("it ran")

    views = Views()
    app.add_url_rule("/", "bare", views.view)
    with pytest.raises(ValueError, match=r"@rate_limited does not limit \S*Views\.view"):
        ext.rate_limited("1/hour", key=by_header)(views.view)


def test_a_request_made_of_another_ones_environ_is_another_request(
    app: Flask, ext: FlaskGovRedis, client: FlaskClient
) -> None:
    ext_gov = gov_of(app)
    for agent in "agent-1", "agent-2":
        ext_gov.sessions.bind(f"of-{agent}", agent)

    @app.get("/who")
    @ext.rate_limited("9/hour", key=by_header, operation="inner")
    def who() -> str:
        return str(ext.current_agent())

    @app.get("/batch")
    @ext.rate_limited("9/hour", key=by_header, operation="outer")
    def batch() -> dict[str, str]:
        first = str(ext.current_agent())
        environ = {**request.environ, "PATH_INFO": "/who", "HTTP_X_SESSION_ID": "of-agent-2"}
        with app.request_context(environ):
            inner = app.full_dispatch_request()
        return {"first": first, "second": inner.get_data(as_text=True), "policy": inner.headers["RateLimit-Policy"]}

    answer = client.get("/batch", headers={**AGENT, "X-Session-Id": "of-agent-1"})
    assert answer.json == {"first": "agent-1", "second": "agent-2", "policy": '"inner: 9 per 3600 s";q=9;w=3600'}
    assert answer.headers["RateLimit-Policy"] == '"outer: 9 per 3600 s";q=9;w=3600'


def test_below_a_decorator_that_another_is_above_of_it_is_fine(
    app: Flask, ext: FlaskGovRedis, client: FlaskClient
) -> None:
    @app.get("/")
    @logged
    @ext.rate_limited("1/hour", key=by_header)
    @logged
    def view() -> str:
        return ""

    assert [client.get("/", headers=AGENT).status_code for _ in range(2)] == [200, 429]


def test_a_view_that_cannot_be_hashed_is_no_obstacle(app: Flask, ext: FlaskGovRedis, client: FlaskClient) -> None:
    class View:
        __hash__ = None  # type: ignore[assignment]

        def __call__(self) -> str:
            return "ran"

    app.add_url_rule("/", "unhashable", View())
    assert client.get("/").text == "ran"


# -- the agent -------------------------------------------------------------------------------------------------------


@pytest.fixture
def whoami(app: Flask, ext: FlaskGovRedis) -> None:
    @app.get("/")
    def view() -> Any:
        return jsonify([ext.current_agent(), ext.current_agent()])


def test_the_agent_of_the_session_in_the_header(client: FlaskClient, whoami: None, gov: GovRedis) -> None:
    gov.sessions.bind("s-1", "agent-1")
    assert client.get("/", headers={"X-Session-Id": "s-1"}).get_json() == ["agent-1", "agent-1"]
    assert client.get("/", headers={"X-Session-Id": "s-2"}).get_json() == [None, None]
    assert client.get("/").get_json() == [None, None]
    client.set_cookie("session_id", "s-1")  # no cookie is configured
    assert client.get("/").get_json() == [None, None]


def test_the_header_and_the_cookie_are_the_users_choice(gov: GovRedis) -> None:
    gov.sessions.bind("s-1", "agent-1")
    gov.sessions.bind("s-2", "agent-2")

    def answer(settings: dict[str, Any], headers: dict[str, str], cookies: dict[str, str]) -> Any:
        app = Flask("choice")
        app.config.update(settings)
        ext = FlaskGovRedis(app, gov)
        app.add_url_rule("/", "view", lambda: jsonify(ext.current_agent()))
        client = app.test_client()
        for name, value in cookies.items():
            client.set_cookie(name, value)
        return client.get("/", headers=headers).get_json()

    both = {"GOVREDIS_SESSION_HEADER": "X-Sid", "GOVREDIS_SESSION_COOKIE": "sid"}
    assert answer(both, {"X-Sid": "s-1"}, {"sid": "s-2"}) == "agent-1"
    assert answer(both, {}, {"sid": "s-2"}) == "agent-2"
    assert answer(both, {"X-Sid": ""}, {"sid": "s-2"}) == "agent-2"
    assert answer(both, {"X-Session-Id": "s-1"}, {}) is None
    cookie_only = {"GOVREDIS_SESSION_HEADER": None, "GOVREDIS_SESSION_COOKIE": "sid"}
    assert answer(cookie_only, {"X-Session-Id": "s-1"}, {"sid": "s-2"}) == "agent-2"


def test_redis_is_asked_once_a_request_and_the_session_slides(
    client: FlaskClient, whoami: None, gov: GovRedis, plain_redis: Any
) -> None:
    gov.sessions.bind("s-1", "agent-1")
    plain_redis.expire("session:s-1", 60)
    client.get("/", headers={"X-Session-Id": "s-1"})
    assert plain_redis.ttl("session:s-1") > 3500
    assert gov.counters.get("sessions.hits") == 1
    client.get("/", headers={"X-Session-Id": "s-2"})
    assert gov.counters.get("sessions.misses") == 1


@pytest.mark.parametrize("session_id", ["a{b}", "x" * 513, "tab\tbed", "\x85"])
def test_an_impossible_session_id_is_nobody_and_nothing_is_sent(
    app: Flask, client: FlaskClient, away: GovRedis, session_id: str
) -> None:
    ext = FlaskGovRedis(app, away)
    app.add_url_rule("/", "view", lambda: jsonify(ext.current_agent()))
    response = client.get("/", headers={"X-Session-Id": session_id})
    assert (response.status_code, response.get_json()) == (200, None)
    assert away.counters.get("sessions.degraded.get") == 0


def test_with_redis_away_a_session_that_is_not_known_is_a_503_not_logged_out(
    app: Flask, client: FlaskClient, away: GovRedis
) -> None:
    ext = FlaskGovRedis(app, away)
    away.sessions.bind("s-1", "agent-1")

    @app.get("/")
    def view() -> Any:
        return jsonify(ext.current_agent())

    @app.get("/caught")
    def caught() -> str:
        with pytest.raises(SessionStoreUnavailable):
            ext.current_agent()
        return "caught"

    known, unknown, caught_ = (
        client.get(path, headers={"X-Session-Id": sid})
        for path, sid in (("/", "s-1"), ("/", "s-2"), ("/caught", "s-2"))
    )
    assert (known.get_json(), caught_.text) == ("agent-1", "caught")
    assert_problem(unknown, 503)
    assert unknown.headers["Retry-After"] == "1"


def test_a_view_is_limited_by_the_agent(app: Flask, ext: FlaskGovRedis, client: FlaskClient, gov: GovRedis) -> None:
    gov.sessions.bind("s-1", "agent-1")
    gov.sessions.bind("s-2", "agent-1")

    @app.get("/")
    @ext.rate_limited("2/hour", key=ext.current_agent)
    def view() -> Any:
        return jsonify(ext.current_agent())

    answers = [client.get("/", headers={"X-Session-Id": sid}) for sid in ("s-1", "s-2", "s-1", "nobody's")]
    assert [a.status_code for a in answers] == [200, 200, 429, 401]
    assert_problem(answers[-1], 401)
    assert gov.counters.get("sessions.hits") == 3


# -- errors ----------------------------------------------------------------------------------------------------------


def test_a_backend_that_is_away_is_a_503_that_tells_nothing_else(
    app: Flask, ext: FlaskGovRedis, client: FlaskClient
) -> None:
    errors = {"b": BackendUnavailable, "l": LockUnavailable, "s": SessionStoreUnavailable}

    @app.get("/<name>")
    def view(name: str) -> str:
        raise errors[name]("Redis at redis.internal:6379 is away (user:hunter2)")

    for name in errors:
        response = client.get(f"/{name}")
        assert_problem(response, 503)
        assert response.headers["Retry-After"] == "1"
        assert "internal" not in response.text and "hunter2" not in response.text


@pytest.mark.parametrize("first", [True, False])
def test_an_error_handler_of_the_users_stands(app: Flask, client: FlaskClient, gov: GovRedis, first: bool) -> None:
    def register() -> None:
        app.register_error_handler(RateLimitExceeded, lambda error: ("slow down", 429))
        app.register_error_handler(BackendUnavailable, lambda error: ("closed", 503))

    if first:
        register()
    ext = FlaskGovRedis(app, gov)
    if not first:
        register()

    @app.get("/")
    @ext.rate_limited("1/hour", key=by_header)
    def view() -> str:
        raise BackendUnavailable

    assert [client.get("/", headers=AGENT).text for _ in range(2)] == ["closed", "slow down"]
    assert client.get("/", headers=AGENT).headers["RateLimit"].startswith('"default: 1 per 3600 s";r=0;')


# -- health ----------------------------------------------------------------------------------------------------------


def assert_health(client: FlaskClient, path: str, status: int) -> dict[str, Any]:
    response = client.get(f"/govredis/{path}")
    assert (response.status_code, response.content_type) == (status, "application/health+json")
    assert response.headers["Cache-Control"] == "no-store"
    body: dict[str, Any] = json.loads(response.data)
    return body


def test_health_passes(ext: FlaskGovRedis, client: FlaskClient, gov: GovRedis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gov.health, "_clock", lambda: 100.0)  # what was seen holds for a second: none passes
    assert assert_health(client, "live", 200) == {"status": "pass"}
    assert assert_health(client, "ready", 200) == {"status": "pass"}
    assert assert_health(client, "health", 200) == {"status": "pass"}


def test_strangers_get_the_status_and_no_more(app: Flask, client: FlaskClient, away: GovRedis) -> None:
    FlaskGovRedis(app, away)
    assert assert_health(client, "health", 503) == {"status": "fail"}
    assert "127.0.0.1" not in client.get("/govredis/health").text


def test_the_whole_report_is_for_those_who_may_see_it(
    app: Flask, client: FlaskClient, gov: GovRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gov.health, "_clock", lambda: 100.0)  # what was seen holds for a second: none passes
    app.config["GOVREDIS_HEALTH_DETAILS"] = lambda: request.headers.get("X-Ops") == "yes"
    FlaskGovRedis(app, gov)
    assert assert_health(client, "health", 200) == {"status": "pass"}
    shown = client.get("/govredis/health", headers={"X-Ops": "yes"})
    assert json.loads(shown.data) == gov.health.check().as_dict()


def test_the_endpoints_can_be_moved_and_switched_off(gov: GovRedis) -> None:
    def found(prefix: str | None) -> list[int]:
        app = Flask("shop")
        app.config["GOVREDIS_URL_PREFIX"] = prefix
        FlaskGovRedis(app, gov)
        client = app.test_client()
        return [client.get(f"{at}/{page}").status_code for at in ("/govredis", "/ops/gov") for page in PAGES]

    pages = len(PAGES)
    assert found("/ops/gov") == [404] * pages + [200] * pages
    assert found(None) == [404] * 2 * pages


def test_health_warns_with_200(
    app: Flask, client: FlaskClient, make_gov: Callable[..., GovRedis], postgres_server: PostgresServer
) -> None:
    app.config["GOVREDIS_HEALTH_DETAILS"] = True
    FlaskGovRedis(app, make_gov(redis_url=REDIS_AWAY, database_url=postgres_server.url))
    assert assert_health(client, "ready", 200) == {"status": "warn"}
    report = assert_health(client, "health", 200)
    assert report["status"] == "warn"
    assert "fallbacks are in use" in report["checks"]["redis"][0]["output"]


def test_live_touches_nothing(ext: FlaskGovRedis, client: FlaskClient, gov: GovRedis, plain_redis: Any) -> None:
    def touched() -> tuple[int, int]:
        return plain_redis.info("stats")["total_connections_received"], gov.postgres.statements

    before = touched()
    assert assert_health(client, "live", 200) == {"status": "pass"}
    assert touched() == before
    assert_health(client, "ready", 200)
    assert touched() > before


def test_health_fails_with_503_and_live_does_not(app: Flask, client: FlaskClient, away: GovRedis) -> None:
    FlaskGovRedis(app, away)
    assert assert_health(client, "live", 200) == {"status": "pass"}
    assert assert_health(client, "ready", 503) == {"status": "fail"}
    assert assert_health(client, "health", 503)["status"] == "fail"


# -- commands --------------------------------------------------------------------------------------------------------


def test_the_commands_work_on_the_apps_govredis(
    app: Flask, postgres_server: PostgresServer, redis_server: RedisServer, close_apps: list[Flask]
) -> None:
    app.config.from_mapping(REDIS_URL=redis_server.url, GOVREDIS_DATABASE_URL=postgres_server.url)
    FlaskGovRedis(app)
    close_apps.append(app)
    runner = app.test_cli_runner()
    shown = runner.invoke(args=["govredis", "health", "--json"])
    assert shown.exit_code == 0, shown.output
    assert set(json.loads(shown.output)["checks"]) >= {"redis", "postgres"}
    assert runner.invoke(args=["govredis", "migrate"]).output == "up to date\n"


def test_health_on_the_command_line_exits_with_1_on_fail(app: Flask, away: GovRedis) -> None:
    FlaskGovRedis(app, away)
    done = app.test_cli_runner().invoke(args=["govredis", "health", "--json"])
    assert (json.loads(done.output)["status"], done.exit_code) == ("fail", 1)


def test_an_error_on_the_command_line_is_one_sentence(app: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    configure(None)
    FlaskGovRedis(app)
    monkeypatch.setenv("REDIS_SESSION_TTL", "an hour")
    done = app.test_cli_runner().invoke(args=["govredis", "health"])
    assert done.exit_code == 3
    assert done.output.startswith("Error: REDIS_SESSION_TTL is 'an hour'")
    monkeypatch.setenv("REDIS_SESSION_TTL", "7")
    monkeypatch.delenv("GOVREDIS_DATABASE_URL", raising=False)
    done = app.test_cli_runner().invoke(args=["govredis", "migrate"])
    assert (done.exit_code, done.output[:46]) == (3, "Error: GOVREDIS_DATABASE_URL is not set; it mu")
    configure(None)
