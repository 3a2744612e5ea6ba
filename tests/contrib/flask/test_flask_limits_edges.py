"""Limits where apps are built in unusual ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import flask_restful
import pytest
from flask import Blueprint, Flask, request
from flask.testing import FlaskClient
from flask.views import MethodView, View
from werkzeug.routing import Rule

from govredis import GovRedis
from govredis.contrib.flask import FlaskGovRedis
from govredis.testing.servers import RedisServer

pytestmark = pytest.mark.one_redis


@pytest.fixture
def gov(make_gov: Callable[..., GovRedis], redis_server: RedisServer) -> GovRedis:
    return make_gov(redis_url=redis_server.url)


def statuses(client: FlaskClient, *paths: str, method: str = "GET", **options: Any) -> list[int]:
    return [client.open(path, method=method, **options).status_code for path in paths]


def policy(response: Any) -> str:
    found: str = response.headers["RateLimit-Policy"]
    return found


def one() -> str:
    return "one"


# -- the names of endpoints ----------------------------------------------------------------------------------------

ODD = "a:b", "a-b", "{x}", "[x]", "x" * 600, "x" * 601, "a\nb", "caf\u00e9", "\ud800"


def test_a_default_limit_takes_endpoints_that_are_no_operations(
    app: Flask, ext: FlaskGovRedis, client: FlaskClient
) -> None:
    ext.default_limit(app, "1/hour")
    for n, endpoint in enumerate(ODD):
        app.add_url_rule(f"/{n}", endpoint, one)
    paths = [f"/{n}" for n in range(len(ODD))]
    assert statuses(client, *paths, *paths) == [200] * len(ODD) + [429] * len(ODD), "each has windows of its own"
    assert policy(client.get("/0")).startswith('"a-b '), "it can be read"


class Dispatching(Flask):
    """It serves some endpoints without functions."""

    def dispatch_request(self) -> Any:
        return "here" if request.endpoint == "here" else super().dispatch_request()


@pytest.mark.parametrize("limited", [False, True])
def test_an_app_may_dispatch_endpoints_without_functions(gov: GovRedis, limited: bool) -> None:
    app = Dispatching("shop")
    ext = FlaskGovRedis(app, gov)
    if limited:
        ext.default_limit(app, "1/hour")
    app.url_map.add(Rule("/", endpoint="here", methods=["GET"]))
    assert statuses(app.test_client(), "/", "/") == ([200, 429] if limited else [200, 200])
    assert "here" in app.test_cli_runner().invoke(args=["govredis", "routes"]).output or not limited


def test_a_view_named_static_is_no_static_file(gov: GovRedis) -> None:
    app, files = Flask("shop", static_folder=None), Blueprint("files", __name__)
    ext = FlaskGovRedis(app, gov)
    ext.default_limit(app, "1/hour")
    app.add_url_rule("/static", "static", one)
    files.add_url_rule("/files/static", "static", one)
    app.register_blueprint(files)
    client = app.test_client()
    assert statuses(client, "/static", "/static") == [200, 429]
    assert statuses(client, "/files/static", "/files/static") == [200, 429]


def test_the_static_files_of_a_blueprint_have_no_default_limit(
    app: Flask, ext: FlaskGovRedis, client: FlaskClient
) -> None:
    files = Blueprint("files", __name__, static_folder=".", static_url_path="/files")
    ext.default_limit(app, "1/hour")
    app.register_blueprint(files)
    assert statuses(client, "/files/none", "/files/none") == [404, 404]


@pytest.mark.parametrize("automatic", [True, False])
def test_options_count_where_the_view_answers_them(
    app: Flask, ext: FlaskGovRedis, client: FlaskClient, automatic: bool
) -> None:
    ext.default_limit(app, "1/hour")
    app.add_url_rule("/", view_func=one, methods=["GET"] if automatic else ["GET", "OPTIONS"])
    assert statuses(client, "/", "/", method="OPTIONS") == [200, 200 if automatic else 429]


# -- methods and classes -------------------------------------------------------------------------------------------


def test_head_may_be_limited_by_its_name(app: Flask, ext: FlaskGovRedis, client: FlaskClient) -> None:
    app.add_url_rule("/", view_func=ext.rate_limited("1/hour", key="k", methods=["HEAD"])(one))
    assert statuses(client, "/", "/", method="HEAD") == [200, 429]
    assert statuses(client, "/", "/") == [200, 200]


def test_a_blueprints_limit_of_some_methods_leaves_the_others_to_the_app(
    app: Flask, ext: FlaskGovRedis, client: FlaskClient
) -> None:
    blueprint = Blueprint("b", __name__)
    ext.default_limit(app, "1/hour", operation="site")
    ext.default_limit(blueprint, "2/hour", methods=["POST"])
    blueprint.add_url_rule("/", view_func=one, methods=["GET", "POST"])
    app.register_blueprint(blueprint)
    assert statuses(client, "/", "/", "/", method="POST") == [200, 200, 429]
    assert statuses(client, "/", "/") == [200, 429]


def test_the_dispatch_of_a_class_of_views_may_be_limited(app: Flask, ext: FlaskGovRedis, client: FlaskClient) -> None:
    class Page(View):
        @ext.rate_limited("1/hour", operation="own")
        def dispatch_request(self) -> str:
            return "page"

    ext.default_limit(app, "9/hour", operation="site")
    app.add_url_rule("/", view_func=Page.as_view("page"))
    assert "site" not in policy(client.get("/"))
    assert statuses(client, "/") == [429]


def test_decorators_of_get_are_not_called_for_head(app: Flask, ext: FlaskGovRedis, client: FlaskClient) -> None:
    class Thing(flask_restful.Resource):  # type: ignore[misc]
        method_decorators = {"get": [ext.rate_limited("9/hour", operation="own")]}

        def get(self) -> str:
            return "thing"

    ext.default_limit(app, "1/hour", operation="site")
    app.add_url_rule("/", view_func=Thing.as_view("thing"))
    assert "own" in policy(client.get("/"))
    assert statuses(client, "/", "/", method="HEAD") == [200, 429], "by the default limit"


def test_decorators_that_only_an_instance_knows_break_nothing(
    app: Flask, ext: FlaskGovRedis, client: FlaskClient
) -> None:
    class Thing(flask_restful.Resource):  # type: ignore[misc]
        @property
        def method_decorators(self) -> list[Any]:
            return []

        def get(self) -> str:
            return "thing"

    ext.default_limit(app, "1/hour")
    app.add_url_rule("/", view_func=Thing.as_view("thing"))
    assert statuses(client, "/", "/") == [200, 429]


def test_a_view_that_is_a_method_may_be_exempt(app: Flask, ext: FlaskGovRedis, client: FlaskClient) -> None:
    class Pages:
        def page(self) -> str:
            return "page"

    pages = Pages()
    ext.default_limit(app, "1/hour")
    app.add_url_rule("/", view_func=ext.exempt(pages.page))
    assert statuses(client, "/", "/") == [200, 200]


def test_a_method_of_a_class_of_views_may_be_exempt(app: Flask, ext: FlaskGovRedis, client: FlaskClient) -> None:
    class Page(MethodView):
        @ext.exempt
        def get(self) -> str:
            return "got"

        def post(self) -> str:
            return "posted"

    ext.default_limit(app, "1/hour")
    app.add_url_rule("/", view_func=Page.as_view("page"))
    assert statuses(client, "/", "/") + statuses(client, "/", method="HEAD") == [200, 200, 200]
    assert statuses(client, "/", "/", method="POST") == [200, 429]


def test_a_head_of_a_views_own_is_not_limited_with_its_get(app: Flask, ext: FlaskGovRedis, client: FlaskClient) -> None:
    class Page(MethodView):
        @ext.rate_limited("9/hour", operation="own")
        def get(self) -> str:
            return "got"

        def head(self) -> str:
            return ""

    ext.default_limit(app, "1/hour", operation="site")
    app.add_url_rule("/", view_func=Page.as_view("page"))
    assert "own" in policy(client.get("/"))
    assert statuses(client, "/", "/", method="HEAD") == [200, 429], "by the default limit"


def test_limits_of_a_class_are_its_own_and_decide_outermost_first(
    app: Flask, ext: FlaskGovRedis, client: FlaskClient
) -> None:
    class Base(MethodView):
        decorators: ClassVar[list[Any]] = []

        def get(self) -> str:
            return "got"

    @ext.rate_limited("1/hour", operation="outer")
    @ext.rate_limited("2/hour", operation="inner")
    class Limited(Base):
        pass

    app.add_url_rule("/base", view_func=Base.as_view("base"))
    app.add_url_rule("/limited", view_func=Limited.as_view("limited"))
    assert "RateLimit-Policy" not in client.get("/base").headers
    assert policy(client.get("/limited")) == '"outer: 1 per 3600 s";q=1;w=3600, "inner: 2 per 3600 s";q=2;w=3600'


def test_an_app_of_another_extension_takes_no_default_limit(app: Flask, ext: FlaskGovRedis) -> None:
    with pytest.raises(ValueError, match="'shop' is served by another FlaskGovRedis"):
        FlaskGovRedis().default_limit(app, "1/hour")


def test_apps_of_one_extension_have_default_limits_of_their_own(app: Flask, ext: FlaskGovRedis) -> None:
    second = Flask("second")
    ext.init_app(second)
    shared = Blueprint("shared", __name__)
    shared.add_url_rule("/shared", view_func=one)
    ext.default_limit(shared, "3/hour")
    for place, rate in (app, "1/hour"), (second, "2/hour"):
        ext.default_limit(place, rate, operation=place.name)
        place.add_url_rule("/", view_func=one)
        place.register_blueprint(shared)
    for place, rate in (app, "1"), (second, "2"):
        assert policy(place.test_client().get("/")).startswith(f'"{place.name}: {rate} per')
        assert policy(place.test_client().get("/shared")).startswith('"shared.one: 3 per')


# -- whose limit it is ---------------------------------------------------------------------------------------------


def test_no_agent_is_locked_out_for_a_long_name(
    app: Flask, ext: FlaskGovRedis, client: FlaskClient, gov: GovRedis
) -> None:
    ext.default_limit(app, "1/hour")
    app.add_url_rule("/", view_func=one)
    for session, agent in enumerate(
        [f"{word}:".ljust(511, "x") + end for word in ("agent", "address") for end in "ab"]
    ):
        gov.sessions.bind(f"s-{session}", agent)
        assert statuses(client, "/", "/", headers={"X-Session-Id": f"s-{session}"}) == [200, 429], "and not another's"
