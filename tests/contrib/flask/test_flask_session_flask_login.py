"""Flask-Login on our flask.session: login_user, logout_user, fresh logins, remember-me."""

from __future__ import annotations

from typing import Any

import pytest
from flask import Flask, jsonify, session
from flask.testing import FlaskClient
from flask_login import (
    LoginManager,
    UserMixin,
    current_user,
    fresh_login_required,
    login_required,
    login_user,
    logout_user,
)

from govredis import GovRedis
from govredis.contrib.flask import FlaskGovRedis

pytestmark = [
    pytest.mark.one_redis,
    pytest.mark.filterwarnings("ignore:datetime.datetime.utcnow:DeprecationWarning"),  # Flask-Login's
]

COOKIE = "__Host-govredis_session"


class User(UserMixin):  # type: ignore[misc]
    def __init__(self, name: str) -> None:
        self.id = name


@pytest.fixture
def ext(gov: GovRedis) -> FlaskGovRedis:
    return FlaskGovRedis(gov=gov)


@pytest.fixture
def app(ext: FlaskGovRedis) -> Flask:
    app = Flask("shop")
    app.config.update(TESTING=False, PROPAGATE_EXCEPTIONS=False, SECRET_KEY="for remember-me")
    ext.init_app(app)
    ext.use_for_flask_session()
    manager = LoginManager(app)
    manager.user_loader(User)

    @app.post("/cart/<key>/<value>")
    def put(key: str, value: str) -> str:
        session[key] = value
        return ""

    @app.get("/cart")
    def cart() -> Any:
        return jsonify(session.get("n"))

    @app.post("/login/<name>")
    def login(name: str) -> str:
        login_user(User(name))
        return ""

    @app.post("/remembered/<name>")
    def remembered(name: str) -> str:
        login_user(User(name), remember=True)
        return ""

    @app.post("/both/<name>")
    def both(name: str) -> str:
        ext.login(name)
        login_user(User(name))
        return ""

    @app.post("/logout")
    def logout() -> str:
        logout_user()
        return ""

    @app.get("/me")
    @login_required
    def me() -> Any:
        return jsonify(current_user.id, ext.current_agent())

    @app.get("/fresh")
    @fresh_login_required
    def fresh() -> str:
        return "fresh"

    return app


def carried(client: FlaskClient) -> str | None:
    cookie = client.get_cookie(COOKIE)
    return None if cookie is None else cookie.value


def browser(app: Flask, session_id: str | None) -> FlaskClient:
    client = app.test_client()
    client.set_cookie(COOKIE, str(session_id))
    return client


def test_a_login_gets_a_new_id_and_keeps_the_content(app: Flask, gov: GovRedis) -> None:
    client = app.test_client()
    client.post("/cart/n/1")
    planted = carried(client)
    client.post("/login/ada")
    assert carried(client) != planted
    assert client.get("/me").json == ["ada", None]
    assert client.get("/cart").json == "1"
    assert client.get("/fresh").text == "fresh"
    assert browser(app, planted).get("/me").status_code == 401
    assert gov.sessions.get(str(planted)) is None
    mine = carried(client)
    client.post("/cart/n/2")
    assert carried(client) == mine
    client.post("/login/bob")
    assert carried(client) != mine
    assert client.get("/me").json == ["bob", None]


def test_a_logout_keeps_the_rest_of_the_content(app: Flask, gov: GovRedis) -> None:
    client = app.test_client()
    client.post("/cart/n/1")
    client.post("/login/ada")
    client.post("/logout")
    assert client.get("/me").status_code == 401
    assert client.get("/cart").json == "1"


def test_a_remembered_user_is_known_without_a_session_but_not_fresh(app: Flask) -> None:
    client = app.test_client()
    client.post("/remembered/ada")
    client.delete_cookie(COOKIE)
    assert client.get("/me").json == ["ada", None]
    assert carried(client) is not None  # they note there that the login is not fresh
    assert client.get("/fresh").status_code == 401
    client.post("/logout")
    assert client.get("/me").status_code == 401


def test_both_logins_are_one_session(app: Flask, gov: GovRedis) -> None:
    client = app.test_client()
    client.post("/cart/n/1")
    client.post("/both/ada")
    assert client.get("/me").json == ["ada", "ada"]
    assert gov.sessions.for_agent("ada") == [carried(client)]
    gov.sessions.unbind_agent("ada")
    assert client.get("/me").status_code == 401
