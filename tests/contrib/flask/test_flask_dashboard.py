"""The dashboard of a Flask app: off unless enabled, and never without the app's own authorisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask, abort, redirect, request

from govredis import GovRedis
from govredis.contrib.flask import FlaskGovRedis
from govredis.errors import ConfigurationError
from govredis.health.dashboard.page import HEADERS

pytestmark = pytest.mark.one_redis
PATHS = "/govredis/dashboard", "/govredis/dashboard/dashboard.css", "/govredis/dashboard/dashboard.js"


@pytest.fixture
def served(app: Flask, gov: GovRedis) -> Callable[..., Any]:
    def serve(allowed: Any, **settings: Any) -> Any:
        app.config.update(GOVREDIS_DASHBOARD=allowed, **settings)
        ext = FlaskGovRedis(app, gov)
        ext.default_limit(app, "1/hour", key="all")
        return app.test_client()

    return serve


@pytest.mark.parametrize("off", [False, None])
def test_it_is_off_unless_enabled(served: Callable[..., Any], off: bool | None) -> None:
    client = served(off)
    assert [client.get(path).status_code for path in PATHS] == [404, 404, 404]


def test_it_is_off_by_default(app: Flask, gov: GovRedis) -> None:
    FlaskGovRedis(app, gov)
    assert app.test_client().get("/govredis/dashboard").status_code == 404


async def asynchronous() -> bool:
    return True


@pytest.mark.parametrize("given", [True, "yes", 1, lambda user: True, asynchronous])
def test_it_is_refused_without_an_authorisation(app: Flask, gov: GovRedis, given: Any) -> None:
    app.config["GOVREDIS_DASHBOARD"] = given
    with pytest.raises(ConfigurationError, match=r"callable .* returns True for those who may see it\. The page names"):
        FlaskGovRedis(app, gov)


def test_it_is_refused_without_a_url(app: Flask, gov: GovRedis) -> None:
    app.config.update(GOVREDIS_DASHBOARD=lambda: True, GOVREDIS_URL_PREFIX=None)
    with pytest.raises(ConfigurationError, match="GOVREDIS_URL_PREFIX is None"):
        FlaskGovRedis(app, gov)


def test_who_may_see_it_sees_it(served: Callable[..., Any]) -> None:
    client = served(lambda: request.headers.get("X-User") == "admin", GOVREDIS_URL_PREFIX="/ops")
    mine = {"X-User": "admin"}
    page = client.get("/ops/dashboard?span=day", headers=mine)
    assert page.status_code == 200
    assert 'href="?span=day" aria-current="page"' in page.text
    assert HEADERS.items() <= dict(page.headers).items()
    for part, kind in ("dashboard.css", "text/css"), ("dashboard.js", "text/javascript"), ("pass.svg", "image/svg+xml"):
        found = client.get(f"/ops/dashboard/{part}", headers=mine)
        assert (found.status_code, found.mimetype) == (200, kind)
        assert HEADERS.items() <= dict(found.headers).items()
    assert client.get("/ops/dashboard/page.py", headers=mine).status_code == 404
    assert client.get("/ops/dashboard", headers=mine).status_code == 200, "the app's default limit does not hold"
    for path in "", "/dashboard.css", "/dashboard.js", "/nothing":
        refused = client.get(f"/ops/dashboard{path}")
        assert refused.status_code == 403
        assert b"dashboard" in refused.data and b"Redis" not in refused.data
        assert HEADERS.items() <= dict(refused.headers).items()


def test_none_is_no(served: Callable[..., Any]) -> None:
    assert served(lambda: None).get(PATHS[0]).status_code == 403


class Anonymous:
    """As Flask-Login's `current_user`, where nobody is logged in: an object, and so true."""


@pytest.mark.parametrize("answer", [Anonymous(), "agent-1", 1])
def test_an_answer_that_is_no_yes_shows_nothing(served: Callable[..., Any], answer: object) -> None:
    response = served(lambda: answer).get(PATHS[0])
    assert response.status_code == 500
    assert b"Redis" not in response.data


def test_the_authorisation_may_answer_itself(served: Callable[..., Any]) -> None:
    client = served(lambda: abort(redirect("/login")))
    assert client.get(PATHS[0]).location == "/login"


def test_two_apps_have_each_their_own(gov: GovRedis) -> None:
    ext, apps = FlaskGovRedis(gov=gov), [Flask("one"), Flask("two")]
    apps[0].config["GOVREDIS_DASHBOARD"] = lambda: True
    for app in apps:
        ext.init_app(app)
    assert [app.test_client().get(PATHS[0]).status_code for app in apps] == [200, 404]
