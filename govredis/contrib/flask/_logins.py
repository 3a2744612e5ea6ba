"""The session of a request: read once, begun by a login, ended by a logout, and carried by a cookie."""

from __future__ import annotations

import contextlib
import copy
import functools
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar, cast

import flask
from flask import Flask, Request, Response, request
from werkzeug.exceptions import HTTPException

from ...errors import BackendError, GovRedisError, refuse
from ...keys import Id, check_id, is_id
from ...sessions import SessionBinding
from ._flask_session import FlaskSession
from ._state import COOKIE, HEADER, SECURE, app_gov, current_app_itself, gov_of, has_flask_session

P = ParamSpec("P")
R = TypeVar("R")

#: Attributes of the request object. flask.g is shared by the requests of a test that holds an app context open; the
#: environ is shared by a request and the requests that are made of it.
_VISIT, _ANSWERED = "govredis.visit", "govredis.answered"


#: Ids of one request that are looked at: each costs a question to Redis.
_CARRIED = 8


#: How the agents of anonymous sessions begin. Each such session has an agent of its own: an index that all shared would
#: grow without end.
_ANONYMOUS = "flask-anonymous:"


@dataclass(slots=True)
class Visit:
    """A request, and its knowledge of its session.

    Attributes:
        asked: somebody wanted to know the agent, so that the response depends on it.
        known: `binding` was found, or `error` in its place.
        issued: the id of the session that this request has begun, for the cookie.
        max_age: seconds that its cookie stays; None: until the browser ends.
        has_login: the session was begun by a login, so that an error undoes it.
        ended: this request has ended the session that it carried.
        unsaved: flask.session could not be saved, for this reason.
    """

    asked: bool = False
    known: bool = False
    binding: SessionBinding | None = None
    error: GovRedisError | None = None
    issued: str | None = None
    max_age: int | None = None
    has_login: bool = False
    ended: bool = False
    unsaved: Exception | None = None

    @property
    def agent(self) -> str | None:
        binding = self.binding
        return None if binding is None or is_anonymous(binding) else binding.agent_id

    @property
    def session_id(self) -> str | None:
        """The living session of this request."""
        return self.issued or (None if self.binding is None else self.binding.session_id)

    def begin(self, started: SessionBinding) -> None:
        """A session has begun, and the request's own is over."""
        self.known, self.binding, self.error, self.issued = True, started, None, started.session_id
        self.max_age = None

    def end(self) -> None:
        self.known, self.binding, self.error, self.issued, self.has_login = True, None, None, None, False


def is_anonymous(binding: SessionBinding) -> bool:
    return binding.agent_id.startswith(_ANONYMOUS)


def anonymous_agent() -> str:
    return f"{_ANONYMOUS}{secrets.token_urlsafe(16)}"


def find(app: Flask, visitor: Request) -> SessionBinding | None:
    """The binding of a request's session. Asks once. Outside of the request, too."""
    visit = visit_of(visitor)
    if visit.error is not None:
        raise visit.error.with_traceback(None)
    if not visit.known:
        sessions, carried = gov_of(app).sessions, _carried(app, visitor)
        try:
            # A header that is no id is nobody's: the cookie beside it is not looked at.
            if carried and is_id(carried[0]):
                visit.binding = sessions.get(carried[0], touch=True)
        except GovRedisError as error:
            visit.error = error
            raise
        visit.known = True
    return visit.binding


def current_agent() -> str | None:
    visit = visit_of(request)
    visit.asked = True
    find(current_app_itself(), request)
    return visit.agent


def login(agent_id: Id, ttl: float | None, data: Any, remember: bool) -> SessionBinding:
    visit = visit_of(request)
    _refuse_late("login")
    if check_id(agent_id, "agent_id").startswith(_ANONYMOUS):
        raise refuse("agent_id", agent_id, f"an id that does not begin with {_ANONYMOUS!r}, as those of strangers do")
    sessions = app_gov().sessions
    session = flask_session()
    content, lifetime = data, None
    if session is not None:
        if data is not None and not isinstance(data, dict):
            raise refuse("data", type(data).__name__, "a dict, which flask.session gets; or None")
        content = session.data(data)
        if ttl is None and session.permanent:
            ttl, lifetime = permanent_ttl(current_app_itself())
    if visit.issued is not None:
        old = [visit.issued]
    else:
        old = [sid for sid in _carried(current_app_itself(), request) if is_id(sid)]
    started = sessions.start(agent_id, replacing=old[0] if old else None, ttl=ttl, data=content)
    visit.begin(started)  # before the rest, which may fail: the login is undone then
    visit.has_login = True
    if session is not None:
        session.settle(data)
    for session_id in old[1:]:
        if sessions.exists(session_id):
            sessions.unbind(session_id)
    visit.max_age = max(1, int(ttl)) if remember and ttl is not None else lifetime
    return started


def logout() -> bool:
    visit = visit_of(request)
    _refuse_late("logout")
    sessions = app_gov().sessions
    ended = False
    if visit.issued is not None:
        ended = sessions.unbind(visit.issued)
    elif not visit.ended:
        visit.asked = True
        app = current_app_itself()
        for n, session_id in enumerate(_carried(app, request)):
            # `unbind` would leave a mark of an id that a stranger made up.
            if is_id(session_id) and (find(app, request) is not None if n == 0 else sessions.exists(session_id)):
                ended |= sessions.unbind(session_id)
    visit.end()
    visit.ended = True
    session = flask_session()
    if session is not None:
        session.forget()
    return ended


def flask_session() -> FlaskSession | None:
    """flask.session, if it is one of ours."""
    if not has_flask_session(current_app_itself()):  # to touch another one has effects
        return None
    found = flask.session._get_current_object()  # type: ignore[attr-defined]
    return found if isinstance(found, FlaskSession) else None


def permanent_ttl(app: Flask) -> tuple[float, int]:
    """Seconds that a permanent session has from its beginning, and that its cookie has."""
    lifetime = max(1, int(app.permanent_session_lifetime.total_seconds()))
    return max(lifetime, gov_of(app).config.session_ttl), lifetime


def watch(app: Flask) -> None:
    """Have the app's responses carry the cookie, and its failing hooks and views undo their login."""
    # Flask tells nobody of an exception that an error handler turns into a response.
    for step in "preprocess_request", "dispatch_request":
        setattr(app, step, _undoing(getattr(app, step)))
    # All else that fails: a view's result that is no response, an error handler, a hook after the response.
    handle = app.handle_exception

    def handle_undone(error: Exception) -> Response:
        _undo()
        session = flask_session()
        if session is not None:
            session.is_saved = False  # there will be another response
        if visit_of(request).unsaved is error and isinstance(error, HTTPException):
            try:
                # As from the view: Flask makes a 500 of all errors that come later.
                answer = app.handle_user_exception(error)
            except Exception as other:  # noqa: BLE001 - the app's handler may raise any
                return handle(other)
            return app.finalize_request(answer, from_error_handler=True)
        return handle(error)

    setattr(app, "handle_exception", handle_undone)  # noqa: B010 - a method, to mypy
    app.after_request(_finish)
    app.teardown_request(_forget_error)


def _undoing(step: Callable[P, R]) -> Callable[P, R]:
    @functools.wraps(step)
    def undoing(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return step(*args, **kwargs)
        except Exception as error:
            if not _is_answer(error):
                _undo()
            raise

    return undoing


def _is_answer(error: Exception) -> bool:
    """Is it `abort(redirect(...))` or the like: no error, but a way to answer?"""
    if not isinstance(error, HTTPException):
        return False
    status = error.code if error.response is None else error.response.status_code
    return status is not None and status < 400


def _undo() -> None:
    visit: Visit | None = request.__dict__.get(_VISIT)
    if visit is None or visit.issued is None or not visit.has_login:
        return
    begun = visit.issued
    visit.end()
    session = flask_session()
    if session is not None:
        session.forget()
    with contextlib.suppress(BackendError):  # nobody has got its id, and it ends with its TTL
        app_gov().sessions.unbind(begun)


def _finish(response: Response) -> Response:
    if _ANSWERED in request.__dict__:  # an exception has discarded the response that had the cookie
        _undo()
    request.__dict__[_ANSWERED] = True
    visit: Visit | None = request.__dict__.get(_VISIT)
    if visit is None:
        return response
    app = current_app_itself()
    if visit.asked:
        vary(app, response)
    if has_flask_session(app):
        return response  # `save_session` may begin or end a session yet
    if visit.issued is not None:
        response = own(response)
    set_cookie(app, request, response)
    return response


def own(response: Response) -> Response:
    """A copy: a response that a view keeps, and returns to others too, must not carry this session to them."""
    found, found.headers = copy.copy(response), response.headers.copy()
    return found


def vary(app: Flask, response: Response) -> None:
    header, cookie = app.config[HEADER], app.config[COOKIE]
    response.vary.update([field for field, used in ((header, header), ("Cookie", cookie)) if used])


def set_cookie(app: Flask, visitor: Request, response: Response) -> None:
    """Have a response set or delete the cookie, if the request has begun or ended a session."""
    visit, cookie = visit_of(visitor), app.config[COOKIE]
    if cookie is None:
        return
    shape: dict[str, Any] = {
        "path": "/",
        "secure": app.config[SECURE],
        "httponly": True,
        "samesite": (has_flask_session(app) and app.config["SESSION_COOKIE_SAMESITE"]) or "Lax",
    }
    if visit.issued is not None:
        response.set_cookie(cookie, visit.issued, max_age=visit.max_age, **shape)
        response.headers["Cache-Control"] = "no-store"
    elif visit.ended and cookie in visitor.cookies:
        response.delete_cookie(cookie, **shape)
        response.headers["Cache-Control"] = "no-store"


def _forget_error(_: BaseException | None) -> None:
    """The error holds the frames of the view, and these hold this visit: all would stay until a garbage collection."""
    visit: Visit | None = request.__dict__.get(_VISIT)
    if visit is not None:
        visit.error = visit.unsaved = None


def _refuse_late(what: str) -> None:
    if _ANSWERED in request.__dict__:
        raise RuntimeError(f"{what} sets a cookie, and this request has its response already; call it in the view")


def visit_of(visitor: Request) -> Visit:
    return cast(Visit, visitor.__dict__.setdefault(_VISIT, Visit()))


def _carried(app: Flask, visitor: Request) -> list[str]:
    """The session ids that the request came with, of any form: the header's first, then the cookies'.

    Another path, or another host of the domain, may add cookies of a name without __Host-.
    """
    header, cookie = app.config[HEADER], app.config[COOKIE]
    sent = [visitor.headers.get(header) if header else None, *(visitor.cookies.getlist(cookie) if cookie else ())]
    return list(dict.fromkeys(session_id for session_id in sent if session_id))[:_CARRIED]
