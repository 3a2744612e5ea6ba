"""Logins in Flask: the cookie, the session that it names, and who may see a view. As in production: TESTING is off."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from http.cookies import SimpleCookie
from typing import Any
from uuid import UUID

import pytest
from flask import (
    Blueprint,
    Flask,
    Response,
    abort,
    after_this_request,
    jsonify,
    redirect,
    request,
)
from flask.testing import FlaskClient
from flask.views import MethodView
from support import REDIS_AWAY, eventually

from govredis import BackendError, ConfigurationError, GovRedis, SessionBinding, SessionStoreUnavailable
from govredis.contrib.flask import FlaskGovRedis
from govredis.testing.servers import PostgresServer, RedisServer

pytestmark = pytest.mark.one_redis

COOKIE = "__Host-govredis_session"
HTTPS = "https://localhost"


@pytest.fixture
def app() -> Flask:
    app = Flask("shop")
    app.config.update(TESTING=False, PROPAGATE_EXCEPTIONS=False)
    return app


@pytest.fixture
def away(make_gov: Callable[..., GovRedis]) -> GovRedis:
    """Neither a Redis nor a PostgreSQL."""
    return make_gov(redis_url=REDIS_AWAY)


def with_logins(app: Flask, ext: FlaskGovRedis) -> None:
    @app.post("/login/<agent>")
    def login(agent: str) -> str:
        ext.login(agent)
        return agent

    @app.post("/logout")
    def logout() -> Any:
        return jsonify(ext.logout(), ext.current_agent())

    @app.get("/me")
    @ext.login_required
    def me() -> str:
        return str(ext.current_agent())


@pytest.fixture
def shop(app: Flask, ext: FlaskGovRedis) -> Flask:
    with_logins(app, ext)
    return app


def browser(app: Flask, **cookies: str) -> FlaskClient:
    client = app.test_client()
    for name, value in cookies.items():
        client.set_cookie(name, value, secure=True)
    client.environ_base["wsgi.url_scheme"] = "https"
    return client


def post(client: FlaskClient, path: str, **options: Any) -> Any:
    return client.post(path, base_url=HTTPS, **options)


def get(client: FlaskClient, path: str, **options: Any) -> Any:
    return client.get(path, base_url=HTTPS, **options)


def cookies_of(response: Any) -> dict[str, Any]:
    """Its Set-Cookie fields, by name: the same name twice fails."""
    read: dict[str, Any] = {}
    for field in response.headers.getlist("Set-Cookie"):
        one = SimpleCookie(field)
        assert not one.keys() & read.keys(), field
        read.update(one)
    return read


def session_id_of(response: Any) -> str:
    return str(cookies_of(response)[COOKIE].value)


# -- the cookie ------------------------------------------------------------------------------------------------------


def test_a_login_sets_the_cookie_of_a_new_session(shop: Flask, gov: GovRedis) -> None:
    client = browser(shop)
    assert get(client, "/me").status_code == 401
    response = post(client, "/login/ada")
    (field,) = response.headers.getlist("Set-Cookie")
    value, *attributes = field.split("; ")
    assert sorted(attributes) == ["HttpOnly", "Path=/", "SameSite=Lax", "Secure"]
    session_id = session_id_of(response)
    assert value == f"{COOKIE}={session_id}"
    assert len(session_id) == 43  # 32 random bytes
    assert gov.sessions.get_agent_id(session_id) == "ada"
    assert response.headers["Cache-Control"] == "no-store"
    assert get(client, "/me").text == "ada"
    assert session_id_of(post(browser(shop), "/login/ada")) != session_id


@pytest.mark.parametrize(
    "answer",
    [
        lambda: "text",
        lambda: {"json": 1},
        lambda: ("", 204),
        lambda: Response("made", 201),
        lambda: redirect("/me"),
        lambda: ("no", 403),
        lambda: ("broken", 500),
        lambda: abort(redirect("/me")),
        lambda: iter(["a", "stream"]),
    ],
)
def test_the_cookie_is_on_the_response_whatever_the_view_returns(
    app: Flask, ext: FlaskGovRedis, gov: GovRedis, answer: Callable[[], Any]
) -> None:
    @app.get("/")
    def view() -> Any:
        ext.login("ada")
        return answer()

    assert gov.sessions.get_agent_id(session_id_of(get(browser(app), "/"))) == "ada"


def test_for_development_without_https_the_cookie_is_not_secure(app: Flask, gov: GovRedis) -> None:
    app.config["GOVREDIS_SESSION_COOKIE_SECURE"] = False
    with_logins(app, FlaskGovRedis(app, gov))
    client = app.test_client()
    (field,) = client.post("/login/ada").headers.getlist("Set-Cookie")
    value, *attributes = field.split("; ")
    assert value.startswith("govredis_session=")
    assert sorted(attributes) == ["HttpOnly", "Path=/", "SameSite=Lax"]
    assert client.get("/me").text == "ada"


def test_the_cookies_name_is_the_users_choice(app: Flask, gov: GovRedis) -> None:
    app.config["GOVREDIS_SESSION_COOKIE"] = "sid"
    with_logins(app, FlaskGovRedis(app, gov))
    client = browser(app)
    response = post(client, "/login/ada")
    assert cookies_of(response).keys() == {"sid"}
    assert "Secure" in response.headers["Set-Cookie"]
    assert get(client, "/me").text == "ada"


def test_without_a_cookie_the_login_returns_the_id_for_the_header(app: Flask, gov: GovRedis) -> None:
    app.config["GOVREDIS_SESSION_COOKIE"] = None
    ext = FlaskGovRedis(app, gov)
    with_logins(app, ext)

    @app.post("/token")
    def token() -> str:
        return ext.login("ada", ttl=86400, data={"from": "cli"}).session_id

    client = browser(app)
    response = post(client, "/token")
    mine = {"X-Session-Id": response.text}
    assert "Set-Cookie" not in response.headers
    assert get(client, "/me", headers=mine).text == "ada"
    found = gov.sessions.get(response.text)
    assert found is not None and found.data == {"from": "cli"}
    assert found.expires_at is not None and (found.expires_at - found.bound_at).total_seconds() > 80000
    assert post(client, "/logout", headers=mine).json == [True, None]
    assert get(client, "/me", headers=mine).status_code == 401


def test_only_a_remembered_login_outlives_the_browser(app: Flask, ext: FlaskGovRedis) -> None:
    @app.get("/<int:remember>")
    def view(remember: int) -> str:
        ext.login("ada", ttl=86400, remember=bool(remember))
        return ""

    ages = [cookies_of(get(browser(app), path))[COOKIE]["max-age"] for path in ("/0", "/1")]
    assert ages == ["", "86400"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"GOVREDIS_SESSION_COOKIE_SECURE": "no"}, "GOVREDIS_SESSION_COOKIE_SECURE is 'no'; it must be True, or False"),
        (
            {"GOVREDIS_SESSION_COOKIE": "__host-sid", "GOVREDIS_SESSION_COOKIE_SECURE": False},
            "GOVREDIS_SESSION_COOKIE is '__host-sid', which browsers take only with Secure; it must be another name",
        ),
        (
            {"GOVREDIS_SESSION_COOKIE": "session"},
            "GOVREDIS_SESSION_COOKIE is 'session', the name of Flask's own session cookie",
        ),
        (
            {"GOVREDIS_SESSION_COOKIE": "__Secure-sid", "GOVREDIS_SESSION_COOKIE_SECURE": False},
            "GOVREDIS_SESSION_COOKIE is '__Secure-sid'",
        ),
    ],
)
def test_a_cookie_that_browsers_would_drop_is_refused(app: Flask, settings: dict[str, Any], said: str) -> None:
    app.config.update(settings)
    with pytest.raises(ConfigurationError, match=said):
        FlaskGovRedis(app)


# -- whose session ---------------------------------------------------------------------------------------------------


def test_an_id_from_before_the_login_is_worth_nothing(shop: Flask, gov: GovRedis) -> None:
    planted = gov.sessions.start("mallory").session_id
    client = browser(shop, **{COOKIE: planted})
    assert get(client, "/me").text == "mallory"
    new = session_id_of(post(client, "/login/ada"))
    assert new != planted
    assert gov.sessions.get(planted) is None
    assert get(client, "/me").text == "ada"
    again = session_id_of(post(client, "/login/ada"))
    assert gov.sessions.for_agent("ada") == [again]


def test_a_login_replaces_the_sessions_of_header_and_cookie(shop: Flask, gov: GovRedis) -> None:
    one, two = gov.sessions.start("mallory").session_id, gov.sessions.start("mallory").session_id
    response = post(browser(shop, **{COOKIE: two}), "/login/ada", headers={"X-Session-Id": one})
    assert gov.sessions.for_agent("mallory") == []
    assert gov.sessions.for_agent("ada") == [session_id_of(response)]


@pytest.mark.parametrize("carried", ["a{b}", "x" * 600, "made-up"])
def test_a_login_works_whatever_the_cookie_holds(shop: Flask, gov: GovRedis, carried: str) -> None:
    client = browser(shop, **{COOKIE: carried})
    for headers in {}, {"X-Session-Id": gov.sessions.start("ada").session_id}:
        client.set_cookie(COOKIE, carried)
        response = post(client, "/login/ada", headers=headers)
        assert response.status_code == 200
        assert session_id_of(response) in gov.sessions.for_agent("ada")
    client.set_cookie(COOKIE, carried)
    assert post(client, "/logout", headers={"X-Session-Id": session_id_of(response)}).json == [True, None]


@pytest.mark.parametrize("given", [7, UUID(int=7)], ids=["int", "uuid"])
def test_an_agent_may_be_an_int_or_a_uuid(app: Flask, ext: FlaskGovRedis, given: Any) -> None:
    @app.get("/")
    def view() -> Any:
        ext.login(given)
        return jsonify(ext.current_agent())

    assert get(browser(app), "/").json == str(given)


def test_of_several_logins_in_a_request_the_last_counts(app: Flask, ext: FlaskGovRedis, gov: GovRedis) -> None:
    agents = []

    @app.get("/")
    def view() -> str:
        agents.append(ext.current_agent())
        for agent in "ada", "bob", "eve":
            ext.login(agent)
            agents.append(ext.current_agent())
        return ""

    response = get(browser(app), "/")
    assert agents == [None, "ada", "bob", "eve"]
    assert gov.sessions.get_agent_id(session_id_of(response)) == "eve"
    assert gov.sessions.for_agent("ada") == gov.sessions.for_agent("bob") == []


def test_a_logout_ends_the_session_and_deletes_the_cookie(shop: Flask, gov: GovRedis) -> None:
    client = browser(shop)
    stolen = session_id_of(post(client, "/login/ada"))
    response = post(client, "/logout")
    assert response.json == [True, None]
    (field,) = response.headers.getlist("Set-Cookie")
    attributes = field.split("; ")
    assert attributes[0] == f"{COOKIE}="
    assert {"Max-Age=0", "HttpOnly", "Path=/", "SameSite=Lax", "Secure"} < set(attributes)
    assert response.headers["Cache-Control"] == "no-store"
    assert gov.sessions.get(stolen) is None
    assert get(browser(shop, **{COOKIE: stolen}), "/me").status_code == 401
    again = post(client, "/logout")
    assert again.json == [False, None]
    assert "Set-Cookie" not in again.headers


def test_a_logout_ends_the_sessions_of_header_and_cookie(shop: Flask, gov: GovRedis) -> None:
    one, two = gov.sessions.start("ada").session_id, gov.sessions.start("ada").session_id
    assert post(browser(shop, **{COOKIE: two}), "/logout", headers={"X-Session-Id": one}).json == [True, None]
    assert gov.sessions.for_agent("ada") == []


def test_a_logout_with_a_made_up_id_leaves_nothing(shop: Flask, plain_redis: Any) -> None:
    both = post(browser(shop, **{COOKIE: "made-up"}), "/logout", headers={"X-Session-Id": "made-up-too"})
    assert both.json == [False, None]
    assert cookies_of(both)[COOKIE].value == ""  # it was worth nothing
    assert [key for key in plain_redis.keys("*") if "made-up" in key] == []


def test_a_login_and_a_logout_in_one_request(app: Flask, ext: FlaskGovRedis, gov: GovRedis) -> None:
    @app.get("/out")
    def out() -> Any:
        ext.login("ada")
        return jsonify(ext.logout(), ext.logout(), ext.current_agent())

    @app.get("/in")
    def in_() -> Any:
        return jsonify(ext.logout(), ext.login("bob").agent_id, ext.current_agent())

    response = get(browser(app), "/out")
    assert response.json == [True, False, None]
    assert "Set-Cookie" not in response.headers
    assert gov.sessions.for_agent("ada") == []
    old = gov.sessions.start("ada").session_id
    response = get(browser(app, **{COOKIE: old}), "/in")
    assert response.json == [True, "bob", "bob"]
    assert gov.sessions.for_agent("bob") == [session_id_of(response)]


def test_redis_is_asked_at_most_once_a_request(app: Flask, ext: FlaskGovRedis, gov: GovRedis) -> None:
    @app.get("/")
    @ext.login_required
    def view() -> Any:
        return jsonify(ext.current_agent())

    @app.get("/login")
    def login() -> Any:
        ext.login("ada")
        return jsonify(ext.current_agent())

    client = browser(app)
    assert get(client, "/login").json == "ada"
    assert gov.counters.get("sessions.hits") == gov.counters.get("sessions.misses") == 0
    assert get(client, "/").json == "ada"
    assert gov.counters.get("sessions.hits") == 1


def test_a_response_that_depends_on_the_agent_says_so_to_caches(shop: Flask) -> None:
    @shop.get("/public")
    def public() -> str:
        return "for all"

    client = browser(shop)
    post(client, "/login/ada")
    assert set(get(client, "/me").vary) == {"X-Session-Id", "Cookie"}
    assert set(get(browser(shop), "/me").vary) == {"X-Session-Id", "Cookie", "Accept"}
    assert not get(client, "/public").vary


# -- errors afterwards -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status"),
    [(RuntimeError("bug"), 500), (LookupError("handled"), 200), (BackendError("ours"), 500), (403, 403), (503, 503)],
)
def test_a_view_that_raises_after_the_login_logs_nobody_in(
    app: Flask, ext: FlaskGovRedis, gov: GovRedis, error: Exception | int, status: int
) -> None:
    begun: list[SessionBinding] = []

    @app.errorhandler(LookupError)
    def handled(_: Exception) -> Any:
        return jsonify(ext.current_agent())

    @app.get("/")
    def view() -> str:
        begun.append(ext.login("ada"))
        if isinstance(error, int):
            abort(error)
        raise error

    old = gov.sessions.start("bob").session_id
    response = get(browser(app, **{COOKIE: old}), "/")
    assert response.status_code == status
    assert "Set-Cookie" not in response.headers
    assert gov.sessions.get(begun[0].session_id) is None
    assert gov.sessions.get(old) is None
    assert status != 200 or response.json is None


def test_a_hook_that_raises_after_a_login_logs_nobody_in(app: Flask, ext: FlaskGovRedis, gov: GovRedis) -> None:
    @app.before_request
    def by_the_proxy() -> None:
        ext.login("ada")

    @app.before_request
    def is_banned() -> None:
        abort(403)

    response = get(browser(app), "/")
    assert (response.status_code, response.headers.get("Set-Cookie")) == (403, None)
    assert gov.sessions.for_agent("ada") == []


def test_a_response_lost_to_a_later_hook_takes_its_login_along(app: Flask, gov: GovRedis) -> None:
    begun: list[SessionBinding] = []

    @app.after_request  # hooks run in reverse order: after ours
    def broken(response: Response) -> Response:
        if response.status_code == 200:
            raise RuntimeError("bug")
        return response

    ext = FlaskGovRedis(app, gov)

    @app.get("/")
    def view() -> str:
        begun.append(ext.login("ada"))
        return ""

    response = get(browser(app), "/")
    assert response.status_code == 500
    assert "Set-Cookie" not in response.headers
    assert gov.sessions.get(begun[0].session_id) is None


def test_an_error_after_the_view_logs_nobody_in(app: Flask, ext: FlaskGovRedis, gov: GovRedis) -> None:
    def commit(response: Response) -> Response:
        raise RuntimeError("the commit of a hook")

    @app.post("/<how>")
    def login(how: str) -> Any:
        ext.login("ada")
        if how == "hook":
            after_this_request(commit)
        return None if how == "nothing" else "ok"

    for how in "nothing", "hook":
        answer = browser(app).post(f"/{how}", base_url=HTTPS)
        assert (answer.status_code, answer.headers.getlist("Set-Cookie")) == (500, [])
    assert gov.sessions.for_agent("ada") == []


def test_a_response_that_is_kept_carries_no_session_to_others(app: Flask, ext: FlaskGovRedis) -> None:
    kept = Response("ok")

    @app.post("/login")
    def login() -> Response:
        ext.login("ada")
        return kept

    @app.get("/")
    def index() -> Response:
        return kept

    assert browser(app).post("/login", base_url=HTTPS).headers.getlist("Set-Cookie")
    assert browser(app).get("/", base_url=HTTPS).headers.getlist("Set-Cookie") == []


def test_all_cookies_of_the_name_are_ended(app: Flask, gov: GovRedis) -> None:
    """Without __Host- another path or host may have added some."""
    app.config["GOVREDIS_SESSION_COOKIE"] = "sid"
    with_logins(app, FlaskGovRedis(app, gov))
    for path in "/login/eve", "/logout":
        carried = [gov.sessions.start("ada").session_id for _ in range(2)]
        sent = {"Cookie": "; ".join(f"sid={session_id}" for session_id in carried)}
        assert app.test_client(use_cookies=False).post(path, base_url=HTTPS, headers=sent).status_code == 200
        assert gov.sessions.for_agent("ada") == []


def test_a_login_that_fails_halfway_is_undone(app: Flask, ext: FlaskGovRedis, gov: GovRedis, monkeypatch: Any) -> None:
    with_logins(app, ext)
    client = browser(app)
    client.set_cookie(COOKIE, gov.sessions.start("ada").session_id, secure=True)
    sent = {"X-Session-Id": gov.sessions.start("ada").session_id}

    def fails(session_id: str) -> bool:
        raise SessionStoreUnavailable("away")

    monkeypatch.setattr(gov.sessions, "exists", fails)
    answer = client.post("/login/eve", base_url=HTTPS, headers=sent)
    assert (answer.status_code, answer.headers.getlist("Set-Cookie")) == (503, [])
    assert gov.sessions.for_agent("eve") == []


def test_a_login_or_logout_that_comes_too_late_for_its_cookie_is_refused(app: Flask, gov: GovRedis) -> None:
    said = []

    @app.after_request  # hooks run in reverse order: after ours
    def late(response: Response) -> Response:
        for call in (lambda: ext.login("ada")), ext.logout:
            with pytest.raises(RuntimeError) as caught:
                call()
            said.append(str(caught.value))
        return response

    ext = FlaskGovRedis(app, gov)
    get(browser(app), "/nowhere")
    assert said == [
        f"{name} sets a cookie, and this request has its response already; call it in the view"
        for name in ("login", "logout")
    ]
    assert gov.sessions.for_agent("ada") == []


def test_a_bad_argument_is_refused_before_anything_is_sent(app: Flask, away: GovRedis) -> None:
    ext = FlaskGovRedis(app, away)
    with app.test_request_context():
        with pytest.raises(ValueError, match="agent_id is ''"):
            ext.login("")
        with pytest.raises(ValueError, match="remember is 30; it must be True or False"):
            ext.login("ada", remember=30)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="remember is True; it must be False where there is no ttl"):
            ext.login("ada", remember=True)
        with pytest.raises(ValueError, match="ttl is 0"):
            ext.login("ada", ttl=0)
        assert ext.current_agent() is None
    assert away.counters.get("sessions.degraded.bind") == 0


# -- Redis away ------------------------------------------------------------------------------------------------------


def assert_unavailable(response: Any) -> None:
    assert response.status_code == 503
    assert response.headers["Retry-After"] == "1"
    assert response.content_type == "application/problem+json"
    assert "Set-Cookie" not in response.headers


def test_with_redis_away_nobody_is_logged_out(
    app: Flask, make_gov: Callable[..., GovRedis], persistent_redis: RedisServer
) -> None:
    with_logins(app, FlaskGovRedis(app, make_gov(redis_url=persistent_redis.url)))
    known = browser(app)
    post(known, "/login/ada")
    elsewhere = make_gov(redis_url=persistent_redis.url).sessions.start("bob").session_id  # by another process
    other = browser(app, **{COOKIE: elsewhere})
    persistent_redis.kill()
    for _ in range(3):
        assert_unavailable(get(other, "/me"))
        assert_unavailable(post(other, "/logout"))
        assert get(known, "/me").text == "ada"
        assert post(browser(app), "/login/eve").status_code == 200  # in this process's memory
    persistent_redis.restart()
    eventually(lambda: get(other, "/me").text == "bob")
    assert get(known, "/me").text == "ada"


def test_with_redis_away_and_a_postgres_logins_go_on(
    app: Flask, make_gov: Callable[..., GovRedis], postgres_server: PostgresServer
) -> None:
    def process() -> Flask:
        app = Flask("shop")
        with_logins(app, FlaskGovRedis(app, make_gov(redis_url=REDIS_AWAY, database_url=postgres_server.url)))
        return app

    mine = session_id_of(post(browser(process()), "/login/ada"))
    assert get(browser(process(), **{COOKIE: mine}), "/me").text == "ada"
    assert get(browser(process(), **{COOKIE: "unknown"}), "/me").status_code == 401
    assert post(browser(process(), **{COOKIE: mine}), "/logout").json == [True, None]
    assert get(browser(process(), **{COOKIE: mine}), "/me").status_code == 401


def test_an_outage_is_asked_about_once_a_request(app: Flask, away: GovRedis) -> None:
    ext = FlaskGovRedis(app, away)

    @app.get("/")
    @ext.login_required
    def view() -> str:
        return "never"

    @app.errorhandler(SessionStoreUnavailable)
    def page(error: SessionStoreUnavailable) -> Any:
        with pytest.raises(SessionStoreUnavailable) as again:
            ext.current_agent()
        return jsonify(again.value is error.__cause__), 503

    before = away.counters.get("sessions.unavailable")
    response = get(browser(app, **{COOKIE: "unknown"}), "/")
    assert (response.status_code, response.json) == (503, True)
    assert away.counters.get("sessions.unavailable") <= before + 1


def test_a_login_that_cannot_end_the_old_session_is_a_503_without_a_cookie(
    app: Flask, gov: GovRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_logins(app, FlaskGovRedis(app, gov))
    old = gov.sessions.start("bob").session_id
    client = browser(app, **{COOKIE: old})

    def unavailable(session_id: str) -> bool:
        raise SessionStoreUnavailable("Redis is away")

    monkeypatch.setattr(gov.sessions, "unbind", unavailable)
    assert_unavailable(post(client, "/login/ada"))
    assert_unavailable(post(client, "/logout"))
    assert get(client, "/me").text == "bob"


# -- who may see a view ----------------------------------------------------------------------------------------------


def test_a_stranger_gets_a_401(shop: Flask, gov: GovRedis) -> None:
    for client in browser(shop), browser(shop, **{COOKIE: "unknown"}), browser(shop, **{COOKIE: "a{b}"}):
        response = get(client, "/me")
        assert (response.status_code, response.content_type) == (401, "application/problem+json")
        assert response.json["detail"] == "this request needs a login"
        assert "Set-Cookie" not in response.headers


def test_the_apps_own_handler_may_redirect_a_stranger(shop: Flask) -> None:
    shop.register_error_handler(401, lambda error: redirect(f"/login?next={request.path}"))
    response = get(browser(shop), "/me")
    assert (response.status_code, response.location) == (302, "/login?next=/me")


def test_classes_of_views_and_blueprints_can_be_protected(app: Flask, ext: FlaskGovRedis, gov: GovRedis) -> None:
    class Things(MethodView):
        decorators = (ext.login_required,)

        def get(self) -> str:
            return "things"

    class Half(MethodView):
        def get(self) -> str:
            return "for all"

        @ext.login_required
        def post(self) -> str:
            return "changed"

    inner = Blueprint("inner", __name__, url_prefix="/inner")
    inner.before_request(ext.login_required(lambda: None))
    inner.add_url_rule("/", "page", lambda: "page")
    app.add_url_rule("/things", view_func=Things.as_view("things"))
    app.add_url_rule("/half", view_func=Half.as_view("half"))
    app.register_blueprint(inner)
    stranger, known = browser(app), browser(app, **{COOKIE: gov.sessions.start("ada").session_id})
    calls = [(get, "/things"), (get, "/half"), (post, "/half"), (get, "/inner/")]
    assert [call(stranger, path).status_code for call, path in calls] == [401, 200, 401, 401]
    assert [call(known, path).status_code for call, path in calls] == [200] * 4


def test_the_decorator_keeps_the_function(ext: FlaskGovRedis) -> None:
    def view(number: int) -> str:
        """A page."""
        return str(number)

    decorated = ext.login_required(view)
    assert (decorated.__name__, decorated.__doc__) == ("view", "A page.")
    assert inspect.signature(decorated) == inspect.signature(view)


def test_above_a_route_it_is_refused(app: Flask, ext: FlaskGovRedis) -> None:
    with pytest.raises(ValueError, match=r"^@login_required does not protect .*page: it stands above a route"):

        @ext.login_required
        @app.get("/page")
        def page() -> str:
            return "secret"


def test_above_a_blueprints_route_every_request_is_refused(app: Flask, ext: FlaskGovRedis) -> None:
    views = Blueprint("views", __name__)

    @ext.login_required
    @views.get("/page")
    def page() -> str:
        return "secret"

    app.register_blueprint(views)
    assert [get(browser(app), path).status_code for path in ("/page", "/page", "/nowhere")] == [500] * 3


def test_other_things_cannot_be_decorated(ext: FlaskGovRedis) -> None:
    async def view() -> str:
        return ""

    with pytest.raises(ValueError, match="view is async; @login_required is for synchronous views"):
        ext.login_required(view)
    with pytest.raises(ValueError, match="the decorated object is 'view'; it must be the function of a view"):
        ext.login_required("view")  # type: ignore[arg-type]


# -- secrets ---------------------------------------------------------------------------------------------------------


def test_no_session_id_is_ever_in_a_log(
    app: Flask, make_gov: Callable[..., GovRedis], mortal_redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    ext = FlaskGovRedis(app, make_gov(redis_url=mortal_redis.url))
    with_logins(app, ext)
    ids: list[str] = []

    @app.get("/bug")
    def bug() -> str:
        ids.append(ext.login("ada").session_id)
        raise RuntimeError("bug")

    client = browser(app)
    ids.append(session_id_of(post(client, "/login/ada")))
    ids.append("unknown-session")
    assert get(client, "/bug").status_code == 500
    mortal_redis.kill()
    assert get(browser(app, **{COOKIE: ids[1]}), "/me").status_code == 503
    assert post(browser(app), "/login/bob").status_code == 200
    assert "bug" in caplog.text and "is away" in caplog.text
    assert [session_id for session_id in ids if session_id in caplog.text] == []
