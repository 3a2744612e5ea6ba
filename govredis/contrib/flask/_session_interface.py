"""Flask's SessionInterface on our sessions."""

from __future__ import annotations

import functools
from datetime import datetime, timedelta, timezone
from typing import Any

from flask import Flask, Request, Response, request
from flask.json.tag import TaggedJSONSerializer
from flask.sessions import SecureCookieSessionInterface, SessionInterface, SessionMixin

from ...errors import ConfigurationError, SessionChanged
from ...sessions import SessionBinding, SessionCache
from . import _logins, _problems
from ._flask_session import PERMANENT, Changes, FlaskSession
from ._state import COOKIE, SECURE, gov_of, state_of

#: How often the same agent's session may be bound anew, by the async service, while it is saved.
_TRIES = 3


def check(app: Flask) -> None:
    """Raises ConfigurationError for settings that our cookie cannot follow, and ValueError for another interface."""
    config = app.config
    if config[COOKIE] is None:
        raise ConfigurationError(f"{COOKIE} is None, and flask.session needs a cookie; it must be a name")
    followed: tuple[tuple[str, tuple[Any, ...]], ...] = (
        ("SESSION_COOKIE_NAME", ("session",)),
        ("SESSION_COOKIE_DOMAIN", (None, False)),
        ("SESSION_COOKIE_PATH", (None, "/")),
        ("SESSION_COOKIE_HTTPONLY", (True,)),
        ("SESSION_COOKIE_SECURE", (False, config[SECURE])),
        ("SESSION_COOKIE_PARTITIONED", (None, False)),
        ("SESSION_COOKIE_SAMESITE", (None, "Lax", "Strict", "None")),
    )
    for name, allowed in followed:
        if (held := config.get(name)) not in allowed:
            values = " or ".join(map(repr, dict.fromkeys(allowed)))
            raise ConfigurationError(
                f"{name} is {held!r}, which our cookie cannot follow; it must be {values}; {COOKIE} names the cookie"
            )
    if type(app.session_interface) not in (SecureCookieSessionInterface, GovRedisSessionInterface):
        raise ValueError(
            f"app {app.name!r} has another session_interface already, {type(app.session_interface).__name__};"
            " remove that, or do not call use_for_flask_session"
        )


def install(app: Flask) -> None:
    check(app)
    if isinstance(app.session_interface, GovRedisSessionInterface):
        return
    app.session_interface = state_of(app).session_interface = GovRedisSessionInterface()
    process = app.process_response

    @functools.wraps(process)
    def process_own(response: Response) -> Response:
        return process(_logins.own(response))

    setattr(app, "process_response", process_own)  # noqa: B010 - a method, to mypy


class GovRedisSessionInterface(SessionInterface):
    """flask.session as the data of our session.

    Attributes:
        serializer: may be given tags for more types, as Flask's own interface's.
    """

    def __init__(self) -> None:
        self.serializer: TaggedJSONSerializer = TaggedJSONSerializer()

    def get_cookie_name(self, app: Flask) -> str:
        return str(app.config[COOKIE])

    def get_cookie_path(self, app: Flask) -> str:
        return "/"

    def get_cookie_secure(self, app: Flask) -> bool:
        return bool(app.config[SECURE])

    def open_session(self, app: Flask, request: Request) -> FlaskSession:
        return FlaskSession(functools.partial(_logins.find, app, request), self.serializer)

    def regenerate(self, session: SessionMixin) -> None:
        """Have a session saved under another id. `FlaskGovRedis.login` does so by itself."""
        session.is_moved = True  # type: ignore[attr-defined]

    def save_session(self, app: Flask, session: SessionMixin, response: Response) -> None:
        assert isinstance(session, FlaskSession)
        visit = _logins.visit_of(request)
        session.is_saved = True
        if session.accessed:
            _logins.vary(app, response)
        if visit.unsaved is None:
            try:
                _save(app, visit, session)
            except Exception as error:
                visit.unsaved = error
                raise
        _logins.set_cookie(app, request, response)


@_problems.telling
def _save(app: Flask, visit: _logins.Visit, session: FlaskSession) -> None:
    if not session.is_open and not session.is_moved:
        return
    changes, gov = session.changes(), gov_of(app)
    sessions, binding, session_id = gov.sessions, visit.binding, visit.session_id
    ttl, max_age = _logins.permanent_ttl(app) if session.permanent else (None, None)
    if binding is None or session_id is None:
        if not session.is_empty:
            visit.begin(sessions.start(_logins.anonymous_agent(), ttl=ttl, data=session.data()))
            visit.max_age = max_age
            session.settle()
        return
    if changes and session.is_empty and _logins.is_anonymous(binding):
        found = _update(sessions, session_id, binding, changes)
        if found is not None and not (found.data or {}).keys() - {PERMANENT}:  # else another request has added some
            sessions.unbind(session_id)
            visit.end()
            visit.ended = True
            session.forget()
        return
    renews = PERMANENT in changes.changed or PERMANENT in changes.removed or _is_aging(app, session, binding)
    if session.needs_new_id(changes) and visit.issued is None:
        # First, so that nobody who knows the old id gets into what is written now.
        moved = sessions.rotate(session_id)
        if moved is None:
            return  # it was ended meanwhile, and stays so
        session_id, renews = moved, True
        visit.issued, visit.max_age = moved, max_age  # also where the rest fails: the old id is over
    if renews:
        if ttl is not None and not sessions.touch(session_id, ttl=ttl):
            return
        visit.issued, visit.max_age = session_id, max_age
    if changes:
        _update(sessions, session_id, binding, changes)
    session.settle()


def _update(
    sessions: SessionCache, session_id: str, binding: SessionBinding, changes: Changes
) -> SessionBinding | None:
    """Returns None where the session was ended meanwhile: it stays so. Another one, with a cookie, could log out an
    agent who has just logged in, in a request beside this one.
    """
    for left in reversed(range(_TRIES)):
        try:
            return sessions.update(session_id, changes.merged)
        except SessionChanged as error:
            if error.existing is None or error.existing.agent_id != binding.agent_id:
                return None
            if not left:
                raise
    return None


def _is_aging(app: Flask, session: FlaskSession, binding: SessionBinding) -> bool:
    """Is it time to give a permanent session, and its cookie, the lifetime again?"""
    if not session.permanent or not app.config["SESSION_REFRESH_EACH_REQUEST"]:
        return False
    ttl, lifetime = _logins.permanent_ttl(app)
    if ttl > lifetime:
        return True  # the session's end does not tell how old its cookie is
    left = None if binding.expires_at is None else binding.expires_at - datetime.now(timezone.utc)
    return left is not None and left < timedelta(seconds=0.9 * lifetime)
