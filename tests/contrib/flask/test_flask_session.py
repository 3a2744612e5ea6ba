"""flask.session on our sessions: its content, its cookie, and who gets a session. As in production: TESTING is off."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from http.cookies import SimpleCookie
from typing import Any
from uuid import UUID

import pytest
from flask import (
    Flask,
    Response,
    flash,
    jsonify,
    redirect,
    render_template_string,
    request,
    session,
    stream_with_context,
)
from flask.testing import FlaskClient
from markupsafe import Markup
from support import Background

from govredis import GovRedis
from govredis.contrib.flask import FlaskGovRedis
from govredis.testing.servers import RedisServer

pytestmark = pytest.mark.one_redis

COOKIE = "__Host-govredis_session"


@pytest.fixture
def app() -> Flask:
    """A cart that everybody may fill, beside logins."""
    app = Flask("shop", static_folder="/usr/share", static_url_path="/static")
    app.config.update(TESTING=False, PROPAGATE_EXCEPTIONS=False, PREFERRED_URL_SCHEME="https")

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

    @app.post("/drop/<key>")
    def drop(key: str) -> str:
        session.pop(key, None)
        return "dropped"

    @app.post("/clear")
    def clear() -> str:
        session.clear()
        return "cleared"

    return app


@pytest.fixture
def ext(app: Flask, gov: GovRedis) -> FlaskGovRedis:
    return with_session(app, gov)


def with_session(app: Flask, gov: GovRedis) -> FlaskGovRedis:
    ext = FlaskGovRedis(app, gov)
    ext.use_for_flask_session()

    @app.post("/login/<agent>")
    def login(agent: str) -> str:
        ext.login(agent)
        return agent

    @app.post("/logout")
    def logout() -> Any:
        return jsonify(ext.logout())

    @app.get("/me")
    @ext.login_required
    def me() -> str:
        return str(ext.current_agent())

    return ext


@pytest.fixture
def client(app: Flask, ext: FlaskGovRedis) -> FlaskClient:
    return app.test_client()


def browser(app: Flask, session_id: str) -> FlaskClient:
    client = app.test_client()
    client.set_cookie(COOKIE, session_id)
    return client


def set_cookie(response: Any) -> Any:
    """The one Set-Cookie field of a response, as a Morsel; None where it has none."""
    fields = response.headers.getlist("Set-Cookie")
    assert len(fields) <= 1, fields
    return SimpleCookie(fields[0])[COOKIE] if fields else None


def carried(client: FlaskClient) -> str | None:
    cookie = client.get_cookie(COOKIE)
    return None if cookie is None else cookie.value


# -- strangers -------------------------------------------------------------------------------------------------------


def test_a_stranger_who_writes_nothing_leaves_nothing(client: FlaskClient, plain_redis: Any) -> None:
    for known in (None, "made-up", "a{b}", "x" * 600):
        if known is not None:
            client.set_cookie(COOKIE, known)
        for path in "/", "/cart", "/static/nothing":
            response = client.get(path)
            assert set_cookie(response) is None
        assert client.get("/cart").json == {}
        for path in "/clear", "/drop/n":
            assert set_cookie(client.post(path)) is None
    assert [key for key in plain_redis.keys("*") if not key.startswith("govredis:")] == []


def test_a_stranger_who_writes_gets_a_session_that_is_nobodys(client: FlaskClient, gov: GovRedis) -> None:
    response = client.post("/cart/n/1")
    cookie = set_cookie(response)
    assert (cookie["httponly"], cookie["secure"], cookie["samesite"], cookie["path"]) == (True, True, "Lax", "/")
    assert (cookie["domain"], cookie["max-age"], cookie["expires"]) == ("", "", "")
    assert response.headers["Cache-Control"] == "no-store"
    assert len(cookie.value) == 43  # 32 random bytes
    found = gov.sessions.get(cookie.value)
    assert found is not None and found.data == {"n": "1"}
    assert found.agent_id.startswith("flask-anonymous:")
    assert client.get("/cart").json == {"n": "1"}
    assert client.get("/me").status_code == 401
    again = client.post("/cart/m/2")
    assert set_cookie(again) is None and "Cache-Control" not in again.headers
    assert client.get("/cart").json == {"n": "1", "m": "2"}


def test_each_stranger_is_another_agent(app: Flask, ext: FlaskGovRedis, gov: GovRedis) -> None:
    ids = [set_cookie(app.test_client().post("/cart/n/1")).value for _ in range(2)]
    assert len({gov.sessions.get_agent_id(session_id) for session_id in ids}) == 2


@pytest.mark.parametrize("emptied", ["/clear", "/drop/n"])
def test_an_emptied_session_of_a_stranger_ends(client: FlaskClient, gov: GovRedis, emptied: str) -> None:
    client.post("/cart/n/1")
    session_id = str(carried(client))
    cookie = set_cookie(client.post(emptied))
    assert (cookie.value, cookie["max-age"]) == ("", "0")
    assert gov.sessions.get(session_id) is None
    assert client.get("/cart").json == {}


def test_nobody_logs_in_as_a_stranger(client: FlaskClient) -> None:
    assert client.post("/login/flask-anonymous:x").status_code == 500
    assert carried(client) is None


def test_a_limit_without_a_key_counts_strangers_by_address(app: Flask, ext: FlaskGovRedis) -> None:
    @app.post("/limited")
    @ext.rate_limited("1/minute", operation="limited")
    def limited() -> str:
        session["n"] = 1
        return ""

    assert [app.test_client().post("/limited").status_code for _ in range(2)] == [200, 429]
    assert app.test_client().post("/limited", environ_base={"REMOTE_ADDR": "127.0.0.9"}).status_code == 200


def test_the_permanence_of_all_sessions_gives_strangers_none(app: Flask, ext: FlaskGovRedis) -> None:
    @app.before_request
    def permanent() -> None:
        session.permanent = True

    client = app.test_client()
    assert set_cookie(client.get("/")) is None
    assert set_cookie(client.post("/cart/n/1"))["max-age"] == str(31 * 86400)
    assert set_cookie(client.post("/drop/n")).value == ""


# -- logins ----------------------------------------------------------------------------------------------------------


def test_a_login_takes_the_content_along_under_a_new_id(app: Flask, client: FlaskClient, gov: GovRedis) -> None:
    client.post("/cart/n/1")
    planted = str(carried(client))
    assert set_cookie(client.post("/login/ada")).value != planted
    assert client.get("/cart").json == {"n": "1"}
    assert client.get("/me").text == "ada"
    thief = browser(app, planted)
    assert (thief.get("/me").status_code, thief.get("/cart").json) == (401, {})
    assert gov.sessions.get(planted) is None
    assert gov.sessions.for_agent("ada") == [carried(client)]


def test_content_of_before_and_after_the_login_in_one_request(app: Flask, ext: FlaskGovRedis, gov: GovRedis) -> None:
    @app.post("/both")
    def both() -> str:
        session["before"] = (1, 2)
        found = ext.login("ada", data={"by": "password"})
        assert found.data == {"before": {" t": [1, 2]}, "by": "password"}
        session["after"] = session["by"]
        del session["before"]
        return ""

    client = app.test_client()
    client.post("/both")
    assert client.get("/cart").json == {"by": "password", "after": "password"}
    said = r"data is 'str'; it must be a dict, which flask\.session gets"
    with app.test_request_context(), pytest.raises(ValueError, match=said):
        ext.login("ada", data="x")


def test_a_logout_ends_all_of_it(client: FlaskClient, gov: GovRedis) -> None:
    client.post("/cart/n/1")
    client.post("/login/ada")
    session_id = str(carried(client))
    response = client.post("/logout")
    assert (response.json, set_cookie(response).value) == (True, "")
    assert gov.sessions.get(session_id) is None
    assert client.get("/cart").json == {}
    client.post("/cart/n/1")
    assert client.post("/logout").json is True  # a stranger's, too
    assert client.get("/cart").json == {}


def test_what_is_written_after_a_logout_begins_another_session(app: Flask, ext: FlaskGovRedis, gov: GovRedis) -> None:
    @app.post("/bye")
    def bye() -> Any:
        assert session["n"] == "1"
        ext.logout()
        flash("bye")
        return jsonify(dict(session).keys() == {"_flashes"})

    client = app.test_client()
    client.post("/cart/n/1")
    client.post("/login/ada")
    old = carried(client)
    response = client.post("/bye")
    assert response.json is True
    assert set_cookie(response).value not in ("", old)
    assert client.get("/me").status_code == 401
    assert client.get("/cart").json == {"_flashes": [["message", "bye"]]}
    assert gov.sessions.for_agent("ada") == []


def test_an_agent_with_an_empty_session_stays_logged_in(client: FlaskClient) -> None:
    client.post("/login/ada")
    client.post("/cart/n/1")
    assert set_cookie(client.post("/clear")) is None
    assert client.get("/cart").json == {}
    assert client.get("/me").text == "ada"


def test_a_login_that_an_error_undoes_takes_its_content_along(app: Flask, ext: FlaskGovRedis, gov: GovRedis) -> None:
    @app.errorhandler(LookupError)
    def failed(_: Exception) -> str:
        flash("try again")
        return ""

    @app.post("/fails")
    def fails() -> str:
        ext.login("ada", data={"rights": "all"})
        session["more"] = "rights"
        raise LookupError

    client = app.test_client()
    client.post("/fails")
    assert client.get("/me").status_code == 401
    assert client.get("/cart").json == {"_flashes": [["message", "try again"]]}
    assert gov.sessions.for_agent("ada") == []


def test_a_session_can_get_another_id(app: Flask, client: FlaskClient, gov: GovRedis) -> None:
    @app.post("/regenerate")
    def regenerate() -> str:
        app.session_interface.regenerate(session)  # type: ignore[attr-defined]
        return ""

    @app.post("/too-much")
    def too_much() -> str:
        app.session_interface.regenerate(session)  # type: ignore[attr-defined]
        session["much"] = "x" * 65536
        return ""

    assert set_cookie(client.post("/regenerate")) is None  # there is none
    for begin in "/cart/n/1", "/login/ada":
        client.post(begin)
        old, content = str(carried(client)), client.get("/cart").json
        new = set_cookie(client.post("/regenerate")).value
        assert new != old and gov.sessions.get(old) is None
        assert client.get("/cart").json == content == {"n": "1"}
        failed = client.post("/too-much")
        assert (failed.status_code, set_cookie(failed).value == new) == (500, False)
        assert client.get("/cart").json == content


def test_an_ended_session_is_not_brought_back(app: Flask, ext: FlaskGovRedis, gov: GovRedis) -> None:
    """Nor is its browser given another: it may have a newer one by now."""

    @app.post("/ends/<how>")
    def ends(how: str) -> str:
        old = session["n"]
        gov.sessions.unbind(str(request.cookies.get(COOKIE)))
        if how == "moved":
            app.session_interface.regenerate(session)  # type: ignore[attr-defined]
        if how == "emptied":
            session.clear()
        else:
            session["n"] = f"{old}, again"
        return ""

    for how in "written", "moved", "emptied":
        client = app.test_client()
        session_id = set_cookie(client.post("/cart/n/1")).value
        response = client.post(f"/ends/{how}")
        assert (response.status_code, set_cookie(response)) == (200, None)
        assert gov.sessions.get(session_id) is None
        assert client.get("/cart").json == {}


# -- content ---------------------------------------------------------------------------------------------------------

VALUES = {
    "tuple": (1, "a", (None,)),
    "bytes": b"\xff\x00",
    "uuid": UUID(int=7),
    "at": datetime.datetime(2026, 11, 29, 12, 30, tzinfo=datetime.timezone.utc),
    "markup": Markup("<b>x</b>"),
    "dict": {" t": [1]},
    "deep": {"list": [{"t": (1,)}], "n": 1.5},
    " t": [1],
    "none": None,
}


@pytest.mark.parametrize("redis_only", [False, True])
def test_values_of_flasks_own_session_survive(
    app: Flask, make_gov: Callable[..., GovRedis], gov: GovRedis, redis_server: RedisServer, redis_only: bool
) -> None:
    with_session(app, make_gov(redis_url=redis_server.url) if redis_only else gov)
    read: list[dict[str, Any]] = []

    @app.post("/values")
    def write() -> str:
        session.update(VALUES)
        return ""

    @app.get("/values")
    def values() -> str:
        read.append(session.copy())
        return ""

    client = app.test_client()
    client.post("/values")
    client.get("/values")
    assert read == [VALUES]
    assert {key: type(value) for key, value in read[0].items()} == {key: type(value) for key, value in VALUES.items()}


def test_flashed_messages(app: Flask, client: FlaskClient) -> None:
    @app.post("/flash")
    def flashing() -> Response:
        flash("saved", "info")
        flash("twice", "info")
        return redirect("/flashes")  # type: ignore[return-value]

    @app.get("/flashes")
    def flashes() -> str:
        shown = "{% for c, m in get_flashed_messages(with_categories=true) %}{{ c }}:{{ m }} {% endfor %}"
        return render_template_string(shown)

    assert client.post("/flash", follow_redirects=True).text == "info:saved info:twice "
    assert client.get("/flashes").text == ""
    assert carried(client) is None  # nothing was left in it


def test_a_change_within_a_value_is_saved(app: Flask, client: FlaskClient) -> None:
    @app.post("/add/<item>")
    def add(item: str) -> Any:
        session.setdefault("items", []).append(item)
        return jsonify(session.new)

    assert [client.post(f"/add/{item}").json for item in "abc"] == [True, False, False]
    assert client.get("/cart").json == {"items": ["a", "b", "c"]}


def test_a_change_of_type_alone_is_saved(app: Flask, client: FlaskClient) -> None:
    @app.post("/is/<value>")
    def put_one(value: str) -> str:
        session["n"] = {"one": 1, "true": True, "float": 1.0}[value]
        return ""

    @app.get("/is")
    def show() -> str:
        return repr(session["n"])

    for value, shown in ("one", "1"), ("true", "True"), ("float", "1.0"):
        client.post(f"/is/{value}")
        assert client.get("/is").text == shown


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("cart", object(), r"flask\.session\['cart'\] cannot be stored as JSON: Object of type object is not JSON"),
        ("day", datetime.date(2026, 1, 1), r"flask\.session\['day'\] cannot be stored as JSON"),
        ("n", float("nan"), r"flask\.session\['n'\] cannot be stored as JSON"),
        (7, "x", r"a key of flask\.session is 7; it must be a str"),
        ("much", "x" * 65536, r"65\d\d\d bytes of JSON"),
    ],
)
def test_a_value_that_cannot_be_kept_is_an_error_that_names_it(
    app: Flask, client: FlaskClient, caplog: pytest.LogCaptureFixture, key: Any, value: Any, said: str
) -> None:
    @app.post("/bad")
    def bad() -> str:
        session["good"] = 1
        session[key] = value
        return "done"

    client.post("/cart/n/1")
    response = client.post("/bad")
    assert (response.status_code, response.text == "done") == (500, False)
    assert caplog.text.count("Exception on /bad [POST]") == 1
    assert "Request finalizing failed" not in caplog.text
    with pytest.raises(ValueError, match=said):
        raise caplog.records[-1].exc_info[1]  # type: ignore[index, misc]
    assert client.get("/cart").json == {"n": "1"}


def test_data_of_others(app: Flask, ext: FlaskGovRedis, gov: GovRedis, caplog: pytest.LogCaptureFixture) -> None:
    strange = {" u": "no uuid"}
    client = browser(app, gov.sessions.start("ada", data={"id": strange, "n": 1}).session_id)
    assert client.get("/cart").json == {"id": strange, "n": 1}
    client.post("/cart/m/2")
    assert client.get("/cart").json == {"id": strange, "n": 1, "m": "2"}
    client = browser(app, gov.sessions.start("ada", data=["secret"]).session_id)
    assert client.get("/cart").status_code == 500
    assert "the data of the session is 'list'; it must be a dict" in caplog.text and "secret" not in caplog.text
    assert client.get("/me").text == "ada"


# -- requests side by side -------------------------------------------------------------------------------------------


def test_requests_side_by_side_that_change_different_keys_all_count(app: Flask, ext: FlaskGovRedis) -> None:
    @app.post("/beside")
    def beside() -> str:
        session_id = str(request.cookies[COOKIE])
        assert session["both"] == "0"
        inner = Background(lambda: [browser(app, session_id).post(f"/cart/{key}/inner") for key in ("inner", "both")])
        assert [response.status_code for response in inner.result()] == [200, 200]
        session["outer"] = session["both"] = "outer"
        del session["gone"]
        return ""

    client = app.test_client()
    client.post("/cart/both/0")
    client.post("/cart/gone/0")
    client.post("/beside")
    assert client.get("/cart").json == {"both": "outer", "inner": "inner", "outer": "outer"}


def test_a_request_that_only_read_overwrites_nothing(app: Flask, ext: FlaskGovRedis) -> None:
    @app.get("/reads")
    def reads() -> str:
        session_id = str(request.cookies[COOKIE])
        assert session["n"] == "1"
        Background(lambda: browser(app, session_id).post("/cart/n/2")).result()
        return str(session["n"])

    client = app.test_client()
    client.post("/cart/n/1")
    assert client.get("/reads").text == "1"
    assert client.get("/cart").json == {"n": "2"}


def test_a_strangers_session_that_one_request_empties_keeps_what_another_adds(app: Flask, ext: FlaskGovRedis) -> None:
    @app.post("/empties")
    def empties() -> str:
        session_id = str(request.cookies[COOKIE])
        session.clear()
        Background(lambda: browser(app, session_id).post("/cart/m/2")).result()
        return ""

    client = app.test_client()
    client.post("/cart/n/1")
    assert set_cookie(client.post("/empties")) is None
    assert client.get("/cart").json == {"m": "2"}


# -- steps of a request ----------------------------------------------------------------------------------------------


def test_hooks_redirects_error_handlers_and_aborts_save_it(app: Flask, ext: FlaskGovRedis) -> None:
    @app.before_request
    def gate() -> Any:
        if request.path == "/gated":
            session["gate"] = 1
            return redirect("/")
        return None

    @app.after_request
    def late(response: Response) -> Response:
        if request.path == "/hook":
            session["late"] = 1
        return response

    @app.errorhandler(404)
    @app.errorhandler(500)
    def failed(error: Any) -> Any:
        session[f"error {error.code}"] = 1
        return "failed", error.code

    @app.get("/broken")
    def broken() -> str:
        session["broken"] = 1
        raise RuntimeError("bug")

    client = app.test_client()
    assert [client.get(path).status_code for path in ("/gated", "/hook", "/broken")] == [302, 404, 500]
    assert client.get("/cart").json == {"gate": 1, "late": 1, "error 404": 1, "broken": 1, "error 500": 1}


def test_streams_read_it_and_a_late_change_is_logged(
    app: Flask, client: FlaskClient, caplog: pytest.LogCaptureFixture
) -> None:
    @app.get("/stream/<key>")
    def stream(key: str) -> Any:
        session["first"] = 1

        def lines() -> Any:
            yield session[key]
            if key == "m":
                session["late"] = 1
            yield "!"

        return stream_with_context(lines())

    client.post("/cart/n/1")
    client.post("/cart/m/2")
    assert client.get("/stream/n").text == "1!"
    assert "changed after the response was made" not in caplog.text
    assert client.get("/stream/m").text == "2!"
    assert "flask.session was changed after the response was made" in caplog.text
    assert client.get("/cart").json == {"n": "1", "m": "2", "first": 1}


def test_teardown_reads_it(app: Flask, client: FlaskClient) -> None:
    seen = []
    app.teardown_request(lambda _: seen.append(session.get("n")))
    client.post("/cart/n/1")
    client.get("/")
    assert seen == ["1", "1"]


def test_the_test_clients_transactions(app: Flask, client: FlaskClient, gov: GovRedis) -> None:
    with client.session_transaction() as sess:
        sess["n"] = 1
        assert sess.new and "FlaskSession {'n': 1}" in repr(sess)
    assert client.get("/cart").json == {"n": 1}
    client.post("/login/ada")
    with client.session_transaction() as sess:
        assert "not read yet" in repr(sess)
        assert dict(sess) == {"n": 1}
        sess["n"] = 2
    assert client.get("/cart").json == {"n": 2}
    assert client.get("/me").text == "ada"


def test_a_response_that_is_kept_carries_no_session_to_others(app: Flask, ext: FlaskGovRedis) -> None:
    kept = Response("ok")

    @app.get("/kept/<write>")
    def view(write: str) -> Response:
        if write == "yes":
            session["n"] = 1
        return kept

    assert set_cookie(app.test_client().get("/kept/yes")) is not None
    assert set_cookie(app.test_client().get("/kept/no")) is None
    assert "Set-Cookie" not in kept.headers


def test_a_response_that_depends_on_it_says_so_to_caches(client: FlaskClient) -> None:
    assert set(client.get("/cart").vary) == {"X-Session-Id", "Cookie"}
    assert not client.get("/").vary
    assert not client.get("/static/nothing").vary
