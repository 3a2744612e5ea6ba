"""The session of a request: read once, begun by a login, ended by a logout, and carried by a cookie."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar, cast

from flask import Flask, Response, current_app, request
from werkzeug.exceptions import HTTPException

from ...errors import BackendError, GovRedisError
from ...keys import Id, is_id
from ...sessions import SessionBinding
from ._state import COOKIE, HEADER, SECURE, app_gov

P = ParamSpec("P")
R = TypeVar("R")

#: Attributes of the request object. flask.g is shared by the requests of a test that holds an app context open; the
#: environ is shared by a request and the requests that are made of it.
_VISIT, _ANSWERED = "govredis.visit", "govredis.answered"


#: Ids of one request that are looked at: each costs a question to Redis.
_CARRIED = 8


@dataclass(slots=True)
class Visit:
    """A request, and its knowledge of its session.

    Attributes:
        asked: somebody wanted to know the agent, so that the response depends on it.
        known: `agent` was found, or `error` in its place.
        started: the session that a login of this request has begun.
        max_age: seconds that its cookie stays; None: until the browser ends.
        ended: a logout of this request has ended what it carried.
    """

    asked: bool = False
    known: bool = False
    agent: str | None = None
    error: GovRedisError | None = None
    started: SessionBinding | None = None
    max_age: int | None = None
    ended: bool = False

    def settle(self, agent: str | None, started: SessionBinding | None) -> None:
        """A login, or a logout, has decided who it is."""
        self.known, self.agent, self.error, self.started = True, agent, None, started


def current_agent() -> str | None:
    visit = _visit()
    visit.asked = True
    if visit.error is not None:
        raise visit.error.with_traceback(None)
    if not visit.known:
        sessions, carried = app_gov().sessions, _carried()
        try:
            # A header that is no id is nobody's: the cookie beside it is not looked at.
            if carried and is_id(carried[0]):
                visit.agent = sessions.get_agent_id(carried[0], touch=True)
        except GovRedisError as error:
            visit.error = error
            raise
        visit.known = True
    return visit.agent


def login(agent_id: Id, ttl: float | None, data: Any, remember: bool) -> SessionBinding:
    visit = _visit()
    _refuse_late("login")
    sessions = app_gov().sessions
    if visit.started is not None:
        old = [visit.started.session_id]
    else:
        old = [sid for sid in _carried() if is_id(sid)]
    started = sessions.start(agent_id, replacing=old[0] if old else None, ttl=ttl, data=data)
    visit.settle(started.agent_id, started)  # before the rest, which may fail: the login is undone then
    for session_id in old[1:]:
        if sessions.exists(session_id):
            sessions.unbind(session_id)
    visit.max_age = max(1, int(ttl)) if remember and ttl is not None else None
    return started


def logout() -> bool:
    visit = _visit()
    _refuse_late("logout")
    sessions = app_gov().sessions
    ended = False
    if visit.started is not None:
        ended = sessions.unbind(visit.started.session_id)
    elif not visit.ended:
        for n, session_id in enumerate(_carried()):
            # `unbind` would leave a mark of an id that a stranger made up.
            if is_id(session_id) and (current_agent() is not None if n == 0 else sessions.exists(session_id)):
                ended |= sessions.unbind(session_id)
    visit.settle(None, None)
    visit.ended = True
    return ended


def watch(app: Flask) -> None:
    """Have the app's responses carry the cookie, and its failing hooks and views undo their login."""
    # Flask tells nobody of an exception that an error handler turns into a response.
    for step in "preprocess_request", "dispatch_request":
        setattr(app, step, _undoing(getattr(app, step)))
    # All else that fails: a view's result that is no response, an error handler, a hook after the response.
    handle = app.handle_exception

    def handle_undone(error: Exception) -> Response:
        _undo()
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
    if visit is None or visit.started is None:
        return
    started = visit.started
    visit.settle(None, None)
    with contextlib.suppress(BackendError):  # nobody has got its id, and it ends with its TTL
        app_gov().sessions.unbind(started.session_id)


def _finish(response: Response) -> Response:
    if _ANSWERED in request.__dict__:  # an exception has discarded the response that had the cookie
        _undo()
    request.__dict__[_ANSWERED] = True
    visit: Visit | None = request.__dict__.get(_VISIT)
    if visit is None:
        return response
    header, cookie = current_app.config[HEADER], current_app.config[COOKIE]
    if visit.asked:
        response.vary.update([field for field, used in ((header, header), ("Cookie", cookie)) if used])
    if cookie is None:
        return response
    shape: dict[str, Any] = {
        "path": "/",
        "secure": current_app.config[SECURE],
        "httponly": True,
        "samesite": "Lax",
    }
    if visit.started is not None:
        # A response that a view keeps, and returns to others too, must not carry this session to them.
        response, response.headers = copy.copy(response), response.headers.copy()
        response.set_cookie(cookie, visit.started.session_id, max_age=visit.max_age, **shape)
        response.headers["Cache-Control"] = "no-store"
    elif visit.ended and cookie in request.cookies:
        response.delete_cookie(cookie, **shape)
        response.headers["Cache-Control"] = "no-store"
    return response


def _forget_error(_: BaseException | None) -> None:
    """The error holds the frames of the view, and these hold this visit: all would stay until a garbage collection."""
    visit: Visit | None = request.__dict__.get(_VISIT)
    if visit is not None:
        visit.error = None


def _refuse_late(what: str) -> None:
    if _ANSWERED in request.__dict__:
        raise RuntimeError(f"{what} sets a cookie, and this request has its response already; call it in the view")


def _visit() -> Visit:
    return cast(Visit, request.__dict__.setdefault(_VISIT, Visit()))


def _carried() -> list[str]:
    """The session ids that the request came with, of any form: the header's first, then the cookies'.

    Another path, or another host of the domain, may add cookies of a name without __Host-.
    """
    header, cookie = current_app.config[HEADER], current_app.config[COOKIE]
    sent = [request.headers.get(header) if header else None, *(request.cookies.getlist(cookie) if cookie else ())]
    return list(dict.fromkeys(session_id for session_id in sent if session_id))[:_CARRIED]
