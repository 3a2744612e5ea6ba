"""flask.session: round trips, outages, settings, and sessions that are permanent."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from http.cookies import SimpleCookie
from typing import Any

import pytest
from flask import Flask, jsonify, session
from flask.sessions import SecureCookieSessionInterface
from flask.testing import FlaskClient
from flask_restful import Api, Resource
from support import REDIS_AWAY, eventually

from govredis import ConfigurationError, GovRedis, SessionStoreUnavailable
from govredis.contrib.flask import FlaskGovRedis
from govredis.testing.servers import PostgresServer, RedisServer

pytestmark = pytest.mark.one_redis

COOKIE = "__Host-govredis_session"


def site(gov: GovRedis, **settings: Any) -> tuple[Flask, FlaskGovRedis]:
    app = Flask("shop", static_folder="/usr/share", static_url_path="/static")
    app.config.update(TESTING=False, PROPAGATE_EXCEPTIONS=False, **settings)
    ext = FlaskGovRedis(app, gov)
    ext.use_for_flask_session()

    @app.get("/")
    def untouched() -> str:
        return "home"

    @app.get("/cart")
    def cart() -> Any:
        return jsonify(dict(session))

    @app.post("/cart/<key>/<value>")
    def put(key: str, value: str) -> str:
        session[key] = value
        return "put"

    @app.post("/permanent/<int:is_so>")
    def permanent(is_so: int) -> str:
        session.permanent = bool(is_so)
        return ""

    @app.post("/login/<agent>")
    def login(agent: str) -> str:
        ext.login(agent)
        return agent

    return app, ext


def browser(app: Flask, session_id: str) -> FlaskClient:
    client = app.test_client()
    client.set_cookie(COOKIE, session_id)
    return client


def set_cookie(response: Any) -> Any:
    """The one Set-Cookie field of a response, as a Morsel; None where it has none."""
    fields = response.headers.getlist("Set-Cookie")
    assert len(fields) <= 1, fields
    return next(iter(SimpleCookie(fields[0]).values())) if fields else None


def carried(client: FlaskClient) -> str:
    cookie = client.get_cookie(COOKIE)
    assert cookie is not None
    return cookie.value


def assert_unavailable(response: Any) -> None:
    assert response.status_code == 503
    assert response.headers["Retry-After"] == "1"
    assert response.content_type == "application/problem+json"
    assert "Set-Cookie" not in response.headers


# -- round trips -----------------------------------------------------------------------------------------------------


def test_round_trips(make_gov: Callable[..., GovRedis], redis_server: RedisServer, plain_redis: Any) -> None:
    """As the server counts them: Redis alone."""
    app, ext = site(make_gov(redis_url=redis_server.url))

    @app.get("/all")
    def everything() -> Any:
        return jsonify(session.get("n"), len(session), ext.current_agent(), session.new)

    def trips(request: Callable[[], Any]) -> int:
        before = plain_redis.info("stats")["total_reads_processed"]
        assert request().status_code in (200, 404)
        return int(plain_redis.info("stats")["total_reads_processed"] - before - 1)  # less that of `info` itself

    client = app.test_client()
    client.post("/cart/n/1")  # connects, and loads the scripts
    client.post("/cart/n/2")
    stranger = browser(app, "unknown")
    assert [trips(lambda path=path: client.get(path)) for path in ("/", "/static/nothing", "/nowhere")] == [0, 0, 0]
    assert [trips(lambda path=path: client.get(path)) for path in ("/cart", "/all")] == [1, 1]
    assert trips(lambda: app.test_client().get("/cart")) == 0
    assert trips(lambda: stranger.get("/cart")) == 1
    assert trips(lambda: client.post("/cart/n/2")) == 1  # it is 2 already
    assert trips(lambda: client.post("/cart/n/3")) == 3  # reads; and looks and sets, as `update` does
    assert trips(lambda: app.test_client().post("/cart/n/1")) == 2  # a bind


# -- a server is away ------------------------------------------------------------------------------------------------


def test_with_redis_away_known_sessions_go_on_and_unknown_ones_are_unavailable(
    make_gov: Callable[..., GovRedis], persistent_redis: RedisServer
) -> None:
    mine, _ = site(make_gov(redis_url=persistent_redis.url))
    others, _ = site(make_gov(redis_url=persistent_redis.url))
    known, elsewhere = mine.test_client(), others.test_client()
    for client in known, elsewhere:
        client.post("/cart/n/1")
    unknown = browser(mine, carried(elsewhere))
    persistent_redis.kill()
    assert known.post("/cart/m/2").status_code == 200
    assert known.get("/cart").json == {"n": "1", "m": "2"}
    for request in (lambda: unknown.get("/cart")), (lambda: unknown.post("/cart/m/2")):
        assert_unavailable(request())
    assert unknown.get("/").text == "home"
    stranger = mine.test_client()
    assert stranger.post("/cart/s/1").status_code == 200
    assert stranger.get("/cart").json == {"s": "1"}
    assert_unavailable(browser(others, carried(stranger)).get("/cart"))
    persistent_redis.restart()
    eventually(lambda: unknown.get("/cart").json == {"n": "1"})
    for client, content in (known, {"n": "1", "m": "2"}), (stranger, {"s": "1"}):
        there = browser(others, carried(client))
        eventually(lambda there=there, content=content: there.get("/cart").json == content)


def test_with_redis_away_the_rows_have_it(make_gov: Callable[..., GovRedis], postgres_server: PostgresServer) -> None:
    def process() -> Flask:
        return site(make_gov(redis_url=REDIS_AWAY, database_url=postgres_server.url))[0]

    client = process().test_client()
    client.post("/cart/n/1")
    session_id = carried(client)
    assert browser(process(), session_id).post("/cart/m/2").status_code == 200
    assert client.get("/cart").json == {"n": "1", "m": "2"}
    client.post("/login/ada")
    assert browser(process(), carried(client)).get("/cart").json == {"n": "1", "m": "2"}
    assert browser(process(), session_id).get("/cart").json == {}


def test_content_that_cannot_be_saved_is_a_503(make_gov: Callable[..., GovRedis], tmp_path: Any) -> None:
    """This process has no room for another change that waits for Redis."""
    gov = make_gov(redis_url=REDIS_AWAY, local_entries=1)
    app, _ = site(gov)
    torn: list[BaseException | None] = []
    app.teardown_request(torn.append)

    class Rest(Resource):  # type: ignore[misc]
        def post(self) -> str:
            session["n"] = 1
            return "put"

    Api(app).add_resource(Rest, "/rest")
    first = app.test_client()
    assert first.post("/cart/n/1").status_code == 200
    del torn[:]
    assert_unavailable(app.test_client().post("/cart/n/1"))
    assert isinstance(torn[0], SessionStoreUnavailable)
    rest = app.test_client().post("/rest")
    assert (rest.status_code, rest.headers["Retry-After"], set_cookie(rest)) == (503, "1", None)
    assert "127.0.0.1" not in rest.text
    assert first.get("/cart").json == {"n": "1"}
    with pytest.raises(SessionStoreUnavailable), app.test_client().session_transaction() as sess:
        sess["n"] = 1


def test_the_apps_own_handler_answers_what_cannot_be_saved(make_gov: Callable[..., GovRedis]) -> None:
    app, _ = site(make_gov(redis_url=REDIS_AWAY, local_entries=1))
    fails: list[Exception] = []

    @app.errorhandler(503)
    def page(error: Exception) -> Any:
        session["not"] = "kept"
        if fails:
            raise fails[0]
        return "away", 503

    @app.after_request
    def mark(response: Any) -> Any:
        response.headers["X-Hook"] = "yes"
        return response

    app.test_client().post("/cart/n/1")
    response = app.test_client().post("/cart/n/1")
    assert (response.status_code, response.text, response.headers["X-Hook"]) == (503, "away", "yes")
    assert response.headers["Retry-After"] == "1"
    fails.append(RuntimeError("bug"))
    assert app.test_client().post("/cart/n/1").status_code == 500


def test_a_login_whose_content_cannot_be_saved_is_undone(gov: GovRedis, monkeypatch: pytest.MonkeyPatch) -> None:
    app, ext = site(gov)

    @app.post("/both")
    def both() -> str:
        ext.login("ada")
        session["n"] = 1
        return ""

    def unavailable(session_id: str, data: Any) -> Any:
        raise SessionStoreUnavailable("Redis is away")

    monkeypatch.setattr(gov.sessions, "update", unavailable)
    assert_unavailable(app.test_client().post("/both"))
    assert gov.sessions.for_agent("ada") == []


def test_a_new_id_reaches_its_browser_also_where_the_rest_fails(gov: GovRedis, monkeypatch: pytest.MonkeyPatch) -> None:
    app, _ = site(gov)

    @app.post("/moves")
    def moves() -> str:
        app.session_interface.regenerate(session)  # type: ignore[attr-defined]
        session["m"] = 2
        return ""

    client = app.test_client()
    client.post("/cart/n/1")
    old = carried(client)

    def unavailable(session_id: str, data: Any) -> Any:
        raise SessionStoreUnavailable("Redis is away")

    with monkeypatch.context() as patched:
        patched.setattr(gov.sessions, "update", unavailable)
        response = client.post("/moves")
    assert response.status_code == 503
    assert set_cookie(response).value == carried(client) != old
    assert client.get("/cart").json == {"n": "1"}


# -- permanent sessions ----------------------------------------------------------------------------------------------


def left(gov: GovRedis, session_id: str) -> float:
    """Seconds that a session had at its beginning."""
    found = gov.sessions.get(session_id)
    assert found is not None and found.expires_at is not None
    return (found.expires_at - found.bound_at).total_seconds()


@pytest.mark.parametrize("redis_only", [False, True])
def test_a_permanent_session_has_its_lifetime(
    make_gov: Callable[..., GovRedis], gov: GovRedis, redis_server: RedisServer, redis_only: bool
) -> None:
    gov = make_gov(redis_url=redis_server.url) if redis_only else gov
    app, _ = site(gov, PERMANENT_SESSION_LIFETIME=timedelta(days=2))
    client = app.test_client()
    for begin in "/cart/n/1", "/login/ada":
        assert set_cookie(client.post(begin))["max-age"] == ""
        session_id = carried(client)
        assert left(gov, session_id) < 86400
        cookie = set_cookie(client.post("/permanent/1"))
        assert (cookie.value, cookie["max-age"]) == (session_id, "172800")
        assert left(gov, session_id) > 86400
        assert set_cookie(client.post("/permanent/1")) is None
        assert client.get("/cart").json == {"n": "1", "_permanent": True}
        assert set_cookie(client.post("/permanent/0"))["max-age"] == ""
    client.post("/permanent/1")
    assert set_cookie(client.post("/login/ada"))["max-age"] == "172800"
    assert left(gov, carried(client)) > 86400


def test_a_permanent_session_that_is_used_goes_on(gov: GovRedis) -> None:
    app, _ = site(gov, PERMANENT_SESSION_LIFETIME=timedelta(days=10))
    fixed, _ = site(gov, PERMANENT_SESSION_LIFETIME=timedelta(days=10), SESSION_REFRESH_EACH_REQUEST=False)
    for days, site_of_it, is_refreshed in (9.5, app, False), (8.5, fixed, False), (8.5, app, True):
        begun = gov.sessions.start("ada", ttl=days * 86400, data={"_permanent": True}).session_id
        client = browser(site_of_it, begun)
        cookie = set_cookie(client.get("/cart"))
        assert (cookie is not None) is is_refreshed
        assert (left(gov, begun) > 9.9 * 86400) is is_refreshed
        if cookie is not None:
            assert (cookie.value, cookie["max-age"]) == (begun, "864000")
            assert set_cookie(client.get("/cart")) is None
        assert set_cookie(client.get("/")) is None


def test_the_cookie_of_a_short_lifetime_is_set_at_each_use(gov: GovRedis) -> None:
    app, _ = site(gov, PERMANENT_SESSION_LIFETIME=timedelta(minutes=30))
    client = app.test_client()
    client.post("/cart/n/1")
    client.post("/permanent/1")
    assert [set_cookie(client.get("/cart"))["max-age"] for _ in range(2)] == ["1800", "1800"]
    assert set_cookie(client.get("/")) is None


# -- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("GOVREDIS_SESSION_COOKIE", None, "is None, and flask.session needs a cookie"),
        ("SESSION_COOKIE_NAME", "sid", "is 'sid', which our cookie cannot follow; it must be 'session'"),
        ("SESSION_COOKIE_DOMAIN", "example.org", "is 'example.org', which"),
        ("SESSION_COOKIE_PATH", "/shop", "is '/shop', which"),
        ("SESSION_COOKIE_HTTPONLY", False, "is False, which"),
        ("SESSION_COOKIE_PARTITIONED", True, "is True, which"),
        ("SESSION_COOKIE_SAMESITE", "lax?", "is 'lax\\?', which"),
    ],
)
def test_settings_that_the_cookie_cannot_follow_are_refused(
    make_gov: Callable[..., GovRedis], name: str, value: Any, said: str
) -> None:
    gov = make_gov(redis_url=REDIS_AWAY)
    app = Flask("shop")
    app.config[name] = value
    own = app.session_interface
    ext = FlaskGovRedis(app, gov)
    with pytest.raises(ConfigurationError, match=f"^{name} {said}"):
        ext.use_for_flask_session()
    assert app.session_interface is own
    later = FlaskGovRedis(gov=gov)
    later.use_for_flask_session()
    another = Flask("another")
    another.config[name] = value
    with pytest.raises(ConfigurationError, match=f"^{name} {said}"):
        later.init_app(another)
    assert "govredis" not in another.extensions


def test_secure_follows_our_setting(make_gov: Callable[..., GovRedis]) -> None:
    gov = make_gov(redis_url=REDIS_AWAY)
    with pytest.raises(ConfigurationError, match="SESSION_COOKIE_SECURE is True"):
        site(gov, SESSION_COOKIE_SECURE=True, GOVREDIS_SESSION_COOKIE_SECURE=False)
    app, _ = site(gov, SESSION_COOKIE_SAMESITE="Strict", GOVREDIS_SESSION_COOKIE_SECURE=False)
    for path in "/cart/n/1", "/login/ada":
        cookie = set_cookie(app.test_client().post(path))
        assert (cookie.key, cookie["secure"], cookie["samesite"]) == ("govredis_session", "", "Strict")
    assert app.session_interface.get_cookie_name(app) == "govredis_session"
    assert app.session_interface.get_cookie_path(app) == "/"
    assert app.session_interface.get_cookie_secure(app) is False
    assert site(gov, SESSION_COOKIE_SECURE=True)[0].session_interface.get_cookie_secure(app) is False


def test_it_is_for_all_apps_of_the_extension(make_gov: Callable[..., GovRedis]) -> None:
    gov = make_gov(redis_url=REDIS_AWAY)
    app, ext = site(gov)
    interface = app.session_interface
    ext.use_for_flask_session()
    assert app.session_interface is interface
    later = Flask("later")
    ext.init_app(later)
    assert type(later.session_interface) is type(interface)
    assert later.session_interface is not interface


def test_another_interface_is_not_replaced(make_gov: Callable[..., GovRedis]) -> None:
    class Own(SecureCookieSessionInterface):
        pass

    app = Flask("shop")
    app.session_interface = Own()
    ext = FlaskGovRedis(app, make_gov(redis_url=REDIS_AWAY))
    with pytest.raises(ValueError, match="app 'shop' has another session_interface already, Own"):
        ext.use_for_flask_session()


def test_logins_go_on_where_another_interface_took_its_place(make_gov: Callable[..., GovRedis]) -> None:
    app, _ = site(make_gov(redis_url=REDIS_AWAY))
    app.session_interface = SecureCookieSessionInterface()
    assert set_cookie(app.test_client().post("/login/ada")).key == COOKIE


@pytest.mark.parametrize("hash_ids", [False, True])
def test_clients_that_send_the_header(
    make_gov: Callable[..., GovRedis], redis_server: RedisServer, hash_ids: bool
) -> None:
    gov = make_gov(redis_url=redis_server.url, session_hash_ids=hash_ids)
    app, _ = site(gov)
    mine = {"X-Session-Id": gov.sessions.start("ada", data={"n": "1"}).session_id}
    client = app.test_client()
    assert set_cookie(client.post("/cart/m/2", headers=mine)) is None
    assert client.get("/cart", headers=mine).json == {"n": "1", "m": "2"}
    assert client.get("/cart").json == {}
