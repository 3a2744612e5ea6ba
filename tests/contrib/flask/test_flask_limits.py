"""Limits as Flask's users know them: defaults, shared ones, by method; and their errors, in the frameworks on Flask."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flask_restful
import flask_restx
import flask_smorest
import pytest
from flask import Blueprint, Flask
from flask.testing import FlaskClient
from flask.views import MethodView
from support import REDIS_AWAY
from werkzeug.exceptions import HTTPException
from werkzeug.middleware.proxy_fix import ProxyFix

from govredis import BackendUnavailable, GovRedis, RateLimitExceeded, SessionStoreUnavailable
from govredis.contrib.flask import FlaskGovRedis
from govredis.testing.servers import RedisServer

pytestmark = pytest.mark.one_redis

SECRET = "Redis at redis.internal:6379 is away (user:hunter2)"


@pytest.fixture
def gov(make_gov: Callable[..., GovRedis], redis_server: RedisServer) -> GovRedis:
    return make_gov(redis_url=redis_server.url)


@pytest.fixture(autouse=True)
def production(app: Flask) -> None:
    """As it is served: errors become answers there."""
    app.config.update(DEBUG=False, TESTING=False, PROPAGATE_EXCEPTIONS=False)


def statuses(client: FlaskClient, *paths: str, method: str = "GET", **options: Any) -> list[int]:
    found = []
    for path in paths:
        with client.open(path, method=method, **options) as response:  # a static file is open until its end
            found.append(response.status_code)
    return found


def one() -> str:
    return "one"


def two() -> str:
    return "two"


def policy(response: Any) -> str:
    found: str = response.headers["RateLimit-Policy"]
    return found


# -- default limits ------------------------------------------------------------------------------------------------


def test_an_apps_default_limit_counts_each_view_by_itself(app: Flask, ext: FlaskGovRedis, client: FlaskClient) -> None:
    ext.default_limit(app, "1/hour")
    app.add_url_rule("/one", view_func=one)
    app.add_url_rule("/two", view_func=two)
    assert statuses(client, "/one", "/two", "/one", "/two") == [200, 200, 429, 429]
    assert policy(client.get("/one")) == '"one: 1 per 3600 s";q=1;w=3600'


def test_a_default_limit_with_an_operation_counts_all_views_together(
    app: Flask, ext: FlaskGovRedis, client: FlaskClient
) -> None:
    ext.default_limit(app, "2/hour", operation="site")
    app.add_url_rule("/one", view_func=one)
    app.add_url_rule("/two", view_func=two)
    assert statuses(client, "/one", "/two", "/one") == [200, 200, 429]


def test_views_share_a_limit_by_its_operation(app: Flask, ext: FlaskGovRedis, client: FlaskClient) -> None:
    shared = ext.rate_limited("2/hour", operation="exports")
    app.add_url_rule("/one", view_func=shared(one))
    app.add_url_rule("/two", view_func=shared(two))
    assert statuses(client, "/one", "/two", "/one") == [200, 200, 429]


def test_the_nearest_limit_holds_alone(app: Flask, ext: FlaskGovRedis, client: FlaskClient) -> None:
    outer, inner = Blueprint("outer", __name__, url_prefix="/o"), Blueprint("inner", __name__, url_prefix="/i")
    plain = Blueprint("plain", __name__, url_prefix="/p")
    ext.default_limit(app, "4/hour")
    ext.default_limit(outer, "3/hour")
    ext.default_limit(inner, "2/hour")
    for place in app, outer, inner, plain:
        place.add_url_rule("/one", view_func=one)
        place.add_url_rule("/own", endpoint="own", view_func=ext.rate_limited("1/hour", operation=place.name)(two))
    outer.register_blueprint(inner)
    outer.register_blueprint(Blueprint("bare", __name__), name="bare")
    app.register_blueprint(outer)
    app.register_blueprint(plain)
    found = {path: policy(client.get(path)).split(": ")[1][0] for path in ("/one", "/o/one", "/o/i/one", "/p/one")}
    assert found == {"/one": "4", "/o/one": "3", "/o/i/one": "2", "/p/one": "4"}
    for path in "/own", "/o/own", "/o/i/own", "/p/own":
        response = client.get(path)
        assert policy(response).count(";q=1;") == policy(response).count(";q=") == 1
    assert "inner" in policy(client.get("/o/i/own"))


def test_a_blueprint_inside_a_limited_one_has_its_limit(app: Flask, ext: FlaskGovRedis, client: FlaskClient) -> None:
    outer, inner = Blueprint("outer", __name__), Blueprint("inner", __name__)
    ext.default_limit(outer, "1/hour", operation="outer")
    inner.add_url_rule("/one", view_func=one)
    outer.register_blueprint(inner)
    app.register_blueprint(outer)
    assert statuses(client, "/one", "/one") == [200, 429]


def test_an_exempt_view_has_no_default_limit(app: Flask, ext: FlaskGovRedis, client: FlaskClient) -> None:
    ext.default_limit(app, "1/hour", operation="site")

    @app.get("/free")
    @ext.exempt
    def free() -> str:
        return "free"

    @ext.exempt
    @app.get("/above")
    def above() -> str:
        return "above the route, too"

    @app.get("/own")
    @ext.exempt
    @ext.rate_limited("1/hour", operation="own")
    def own() -> str:
        return "own"

    @ext.exempt
    class Free(MethodView):
        def get(self) -> str:
            return "free"

    app.add_url_rule("/class", view_func=Free.as_view("class"))
    for path in "/free", "/above", "/class":
        assert statuses(client, path, path) == [200, 200]
        assert "RateLimit" not in client.get(path).headers
    assert statuses(client, "/own", "/own") == [200, 429]
    with pytest.raises(ValueError, match="the exempt object is 'free'"):
        ext.exempt("free")


def test_requests_that_reach_no_view_are_not_counted(app: Flask, ext: FlaskGovRedis, client: FlaskClient) -> None:
    app.static_folder = str(Path(__file__).parent)
    app.add_url_rule("/branch/", view_func=one)
    ext.default_limit(app, "1/hour", operation="site")
    assert statuses(client, "/nowhere", "/branch", "/govredis/live", "/govredis/ready") == [404, 308, 200, 200]
    assert statuses(client, "/branch/", method="POST") == [405]
    assert statuses(client, "/branch/", method="OPTIONS") == [200]
    assert statuses(client, "/static/conftest.py", "/static/conftest.py") == [200, 200]
    assert statuses(client, "/branch/", "/branch/") == [200, 429]


def test_a_scope_has_one_default_limit(app: Flask, ext: FlaskGovRedis) -> None:
    ext.default_limit(app, "1/hour")
    with pytest.raises(ValueError, match="'shop' has a default limit already"):
        ext.default_limit(app, "2/hour")
    with pytest.raises(ValueError, match="scope is 'shop'; it must be a Flask app or a Blueprint"):
        ext.default_limit("shop", "2/hour")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="names 'user'"):
        ext.default_limit(Blueprint("b", __name__), "2/hour", key="{user}")
    with pytest.raises(ValueError, match="rate is '2/fortnight'"):
        ext.default_limit(Blueprint("b", __name__), "2/fortnight")


def test_a_default_limit_may_come_before_the_app_does(gov: GovRedis) -> None:
    ext, app = FlaskGovRedis(gov=gov), Flask("later")
    ext.default_limit(app, "1/hour")
    app.add_url_rule("/one", view_func=one)
    ext.init_app(app)
    assert statuses(app.test_client(), "/one", "/one") == [200, 429]


# -- methods and classes -------------------------------------------------------------------------------------------


def test_methods_limits_these_alone(app: Flask, ext: FlaskGovRedis, client: FlaskClient) -> None:
    limit = ext.rate_limited("1/hour", operation="writes", methods=["post", "DELETE"])
    app.add_url_rule("/one", view_func=limit(one), methods=["GET", "POST", "DELETE"])
    ext.default_limit(app, "2/hour")
    assert statuses(client, "/one", method="POST") == [200]
    assert statuses(client, "/one", method="DELETE") == [429]
    assert statuses(client, "/one", "/one", "/one") == [200, 200, 429]  # by the default one


def test_a_default_limit_of_methods_leaves_the_others(app: Flask, ext: FlaskGovRedis, client: FlaskClient) -> None:
    ext.default_limit(app, "1/hour", methods=["GET"])
    app.add_url_rule("/one", view_func=one, methods=["GET", "POST"])
    assert statuses(client, "/one", "/one", method="POST") == [200, 200]
    assert statuses(client, "/one", method="HEAD") == [200], "HEAD is limited with GET"
    assert statuses(client, "/one") == [429]


@pytest.mark.parametrize("how", ["class", "decorators", "method", "Flask-RESTful's"])
def test_a_method_view_may_be_limited(app: Flask, ext: FlaskGovRedis, client: FlaskClient, how: str) -> None:
    limit = ext.rate_limited("1/hour", operation="views")
    ext.default_limit(app, "2/hour", operation="default")

    class View(flask_restful.Resource if how.startswith("Flask-RESTful") else MethodView):  # type: ignore[misc]
        if how == "decorators":
            decorators = [limit]
        if how.startswith("Flask-RESTful"):
            method_decorators = {"get": [limit]}

        def get(self) -> str:
            return "got"

        if how == "method":
            get = limit(get)

        def post(self) -> str:
            return "posted"

    view = limit(View) if how == "class" else View
    assert view is View
    app.add_url_rule("/", view_func=View.as_view("view"))
    assert statuses(client, "/", "/") == [200, 429]
    posts = [429] if how in ("class", "decorators") else [200]
    assert statuses(client, "/", method="POST") == posts


def test_a_method_view_may_need_a_login(app: Flask, ext: FlaskGovRedis, client: FlaskClient) -> None:
    @ext.login_required
    class View(MethodView):
        def get(self) -> str:
            return "got"

    app.add_url_rule("/", view_func=View.as_view("view"))
    assert statuses(client, "/") == [401]


# -- whose limit it is ---------------------------------------------------------------------------------------------


@pytest.fixture
def whose(app: Flask, ext: FlaskGovRedis, client: FlaskClient, gov: GovRedis) -> Callable[..., str]:
    """The identity for which a request without a `key` counts."""
    ext.default_limit(app, "99/hour", operation="whose")
    app.add_url_rule("/", view_func=one)
    counted: set[str] = set()

    def ask(session: str | None = None, **options: Any) -> str:
        headers = {"X-Session-Id": session} if session else {}
        assert client.get("/", headers={**headers, **options.pop("headers", {})}, **options).status_code == 200
        keys = {key.decode() for key in _keys(gov)}
        (new,) = keys - counted
        counted.update(keys)
        return new.removeprefix("rate_limit:whose:")

    return ask


def _keys(gov: GovRedis) -> list[bytes]:
    client = gov.internal.context.redis
    assert client is not None
    found: list[bytes] = client.call("KEYS", "rate_limit:whose:*")
    return found


def test_without_a_key_it_is_the_agents_or_else_the_addresses(
    gov: GovRedis, app: Flask, whose: Callable[..., str]
) -> None:
    for session, agent in ("s-1", "ada"), ("s-2", "address:10.0.0.1"), ("s-3", "agent:ada"):
        gov.sessions.bind(session, agent)
    assert whose("s-1") == "ada"
    assert whose("nobody's") == "address:127.0.0.1"
    assert whose(environ_base={"REMOTE_ADDR": "10.0.0.1"}) == "address:10.0.0.1"
    assert whose("s-2") == "agent:address:10.0.0.1", "no agent is an address"
    assert whose("s-3") == "agent:agent:ada", "nor another agent"
    app.wsgi_app = ProxyFix(app.wsgi_app)  # type: ignore[method-assign]
    assert whose(headers={"X-Forwarded-For": "192.0.2.7"}) == "address:192.0.2.7"
    assert whose(environ_base={"REMOTE_ADDR": "2001:db8::1"}) == "address:2001:db8::1"


def test_a_client_without_an_address_is_a_400(app: Flask, ext: FlaskGovRedis, client: FlaskClient) -> None:
    ext.default_limit(app, "1/hour")
    app.add_url_rule("/", view_func=one)
    assert statuses(client, "/", environ_base={"REMOTE_ADDR": ""}) == [400]


def test_where_nobody_can_say_who_it_is_it_is_the_addresses(
    app: Flask, client: FlaskClient, make_gov: Callable[..., GovRedis]
) -> None:
    ext = FlaskGovRedis(app, make_gov(redis_url=REDIS_AWAY))
    ext.default_limit(app, "1/hour")
    app.add_url_rule("/", view_func=one)
    headers = {"X-Session-Id": "unknown"}
    assert statuses(client, "/", "/", headers=headers) == [200, 429]
    assert statuses(client, "/", environ_base={"REMOTE_ADDR": "10.0.0.1"}, headers=headers) == [200]


# -- errors --------------------------------------------------------------------------------------------------------

FRAMEWORKS = "Flask", "MethodView", "RESTful", "RESTX", "Smorest"


@pytest.fixture(params=FRAMEWORKS)
def served(request: pytest.FixtureRequest, app: Flask, ext: FlaskGovRedis) -> Iterator[FlaskClient]:
    """`/limited` is limited, `/require` limits itself, `/away` finds a server away; the framework may come later."""

    def require() -> Any:
        ext.gov.limits.require("i", "1/hour", operation="require")
        return {"fine": True}

    def away() -> Any:
        raise SessionStoreUnavailable(SECRET)

    views = {"limited": ext.rate_limited("1/hour")(lambda: {"fine": True}), "require": require, "away": away}
    api: Any = None
    if request.param == "RESTful":
        api = flask_restful.Api(app)
    elif request.param == "RESTX":
        api = flask_restx.Api(app)
    elif request.param == "Smorest":
        app.config.update(API_TITLE="shop", API_VERSION="1", OPENAPI_VERSION="3.0.2")
        api = flask_smorest.Api(app)
        blueprint = flask_smorest.Blueprint("things", "things")
    for name, view in views.items():
        base = {"RESTful": flask_restful.Resource, "RESTX": flask_restx.Resource}.get(request.param, MethodView)
        kind = type(name, (base,), {"get": lambda self, view=view: view()})
        if request.param in ("RESTful", "RESTX"):
            api.add_resource(kind, f"/{name}")
        elif request.param == "Smorest":
            blueprint.route(f"/{name}")(kind)
        elif request.param == "MethodView":
            app.add_url_rule(f"/{name}", view_func=kind.as_view(name))
        else:
            app.add_url_rule(f"/{name}", name, view)
    if request.param == "Smorest":
        api.register_blueprint(blueprint)
    yield app.test_client()


def test_a_refusal_is_a_429_with_retry_after_in_every_framework(served: FlaskClient) -> None:
    for path in "/limited", "/require":
        assert served.get(path).status_code == 200
        refused = served.get(path)
        assert refused.status_code == 429
        assert 0 < int(refused.headers["Retry-After"]) <= 3600
    assert served.get("/limited").headers["RateLimit-Policy"] == '"default: 1 per 3600 s";q=1;w=3600'


def test_a_server_that_is_away_is_a_503_that_says_no_more_in_every_framework(served: FlaskClient) -> None:
    answer = served.get("/away")
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert "internal" not in answer.text and "hunter2" not in answer.text


@pytest.fixture
def refusing(app: Flask, ext: FlaskGovRedis, gov: GovRedis) -> FlaskClient:
    """Its page `/` is limited, and the limit is used up; its page `/away` finds a server away."""
    app.add_url_rule("/", view_func=ext.rate_limited("1/hour", key="all")(one))

    @app.get("/away")
    def away() -> str:
        raise BackendUnavailable(SECRET)

    assert gov.limits.hit("all", "1/hour")
    return app.test_client()


@pytest.mark.parametrize("what", [429, HTTPException, RateLimitExceeded])
def test_an_error_handler_of_the_apps_answers_and_our_headers_stay(
    app: Flask, refusing: FlaskClient, what: int | type[Exception]
) -> None:
    app.register_error_handler(what, lambda error: (f"mine: {error}", 429))
    refused = refusing.get("/")
    assert refused.text.startswith("mine: rate limit exceeded: 1 per 3600 s, retry after ")
    assert 0 < int(refused.headers["Retry-After"]) <= 3600
    assert refused.headers["RateLimit"].startswith('"default: 1 per 3600 s";r=0;t=')


def test_the_nearest_error_handler_is_ours_before_werkzeugs(app: Flask, refusing: FlaskClient) -> None:
    app.register_error_handler(HTTPException, lambda error: (f"http {error.description}", error.code))
    app.register_error_handler(BackendUnavailable, lambda error: ("ours", 503))
    assert refusing.get("/away").text == "ours"
    assert refusing.get("/nowhere").text.startswith("http ")


def test_a_handler_of_http_exceptions_as_flasks_documentation_writes_it(app: Flask, refusing: FlaskClient) -> None:
    @app.errorhandler(HTTPException)
    def handle(error: HTTPException) -> Any:
        response = error.get_response()
        response.data = json.dumps({"code": error.code, "name": error.name, "description": error.description})
        response.content_type = "application/json"
        return response

    away = refusing.get("/away")
    assert away.json == {
        "code": 503,
        "name": "Service Unavailable",
        "description": "a service that this request needs is away for the moment",
    }
    assert away.headers["Retry-After"] == "1"
    assert refusing.get("/").json["code"] == 429


def test_another_status_of_a_handler_has_no_retry_after(app: Flask, refusing: FlaskClient) -> None:
    app.register_error_handler(BackendUnavailable, lambda error: "an older page")
    assert refusing.get("/away").status_code == 200
    assert "Retry-After" not in refusing.get("/away").headers


def test_an_error_that_left_its_view_is_still_the_error(app: Flask, ext: FlaskGovRedis, client: FlaskClient) -> None:
    seen: list[Any] = []

    @app.get("/")
    def view() -> str:
        ext.gov.limits.require("i", "1/hour", cost=1)
        return "in"

    app.register_error_handler(RateLimitExceeded, lambda error: (seen.append(error), ("", 429))[1])
    client.get("/")
    client.get("/")
    (error,) = seen
    assert error.result.retry_after > 0
    copied = pickle.loads(pickle.dumps(error))
    assert (type(copied), copied.result, str(copied)) == (RateLimitExceeded, error.result, str(error))


ANSWERS = {
    None: "application/problem+json",
    "*/*": "application/problem+json",
    "application/json": "application/problem+json",
    "application/json, text/plain, */*": "application/problem+json",
    "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8": "text/html; charset=utf-8",
    "text/plain": "text/plain; charset=utf-8",
    "image/png": "application/problem+json",
}


@pytest.mark.parametrize(("accept", "kind"), ANSWERS.items(), ids=map(str, ANSWERS))
def test_the_body_is_of_the_kind_that_the_client_prefers(refusing: FlaskClient, accept: str | None, kind: str) -> None:
    headers = {} if accept is None else {"Accept": accept}
    for path, status, title in ("/", 429, "Too Many Requests"), ("/away", 503, "Service Unavailable"):
        answer = refusing.get(path, headers=headers)
        assert (answer.status_code, answer.content_type) == (status, kind)
        assert "Accept" in answer.vary
        if kind == "application/problem+json":
            assert answer.get_json(force=True)["status"] == status
        else:
            assert f"{status} {title}" in answer.text


def test_a_page_holds_no_markup_of_strangers(app: Flask, ext: FlaskGovRedis, client: FlaskClient) -> None:
    @app.get("/")
    def view() -> str:
        raise RateLimitExceeded("<script>")

    page = client.get("/", headers={"Accept": "text/html"})
    assert page.status_code == 429
    assert "<script>" not in page.text and "&lt;script&gt;" in page.text


# -- the list ------------------------------------------------------------------------------------------------------


def by_plan() -> str:
    return "9/hour"


def test_the_list_of_routes_says_how_each_is_limited(app: Flask, ext: FlaskGovRedis) -> None:
    ext.default_limit(app, "100/hour;5/second")
    app.add_url_rule("/one", view_func=one)
    app.add_url_rule("/free", endpoint="free", view_func=ext.exempt(lambda: "free"))
    limit = ext.rate_limited(by_plan, key="{user}", operation="writes", methods=["POST"])
    app.add_url_rule("/users/<user>", view_func=limit(lambda user: user), endpoint="user", methods=["GET", "POST"])
    account = ext.rate_limited("1/day", key=ext.current_agent, operation="account")
    app.add_url_rule("/account", view_func=account(two))
    done = app.test_cli_runner().invoke(args=["govredis", "routes"])
    assert done.exit_code == 0, done.output
    rows = [line.split(maxsplit=2) for line in done.output.splitlines()]
    default = "100 per 3600 s and 5 per 1 s of each agent or address"
    assert rows == [
        ["Methods", "Route", "Limits"],
        ["GET", "/account", f"1 per 86400 s of each {FlaskGovRedis.__module__}.FlaskGovRedis.current_agent(): account"],
        ["GET", "/free", "none"],
        ["GET", "/govredis/health", "none"],
        ["GET", "/govredis/live", "none"],
        ["GET", "/govredis/metrics", "none"],
        ["GET", "/govredis/ready", "none"],
        ["GET", "/one", f"{default}: one"],
        ["GET", "/static/<path:filename>", "none"],
        ["GET", "/users/<user>", f"{default}: user"],
        ["POST", "/users/<user>", f"{__name__}.by_plan() of each {{user}}: writes"],
    ]
