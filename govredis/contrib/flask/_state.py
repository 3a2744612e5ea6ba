"""The extension's part of an app: its GovRedis, and the names of its settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from flask import Flask, current_app
from flask.sessions import SessionInterface

from ...api import GovRedis, get_gov

if TYPE_CHECKING:
    from ._default_limits import DefaultLimits

EXTENSION = "govredis"
HEADER, COOKIE, SECURE = "GOVREDIS_SESSION_HEADER", "GOVREDIS_SESSION_COOKIE", "GOVREDIS_SESSION_COOKIE_SECURE"
PREFIX, DETAILS, DASHBOARD = "GOVREDIS_URL_PREFIX", "GOVREDIS_HEALTH_DETAILS", "GOVREDIS_DASHBOARD"


@dataclass(slots=True)
class AppState:
    """Our part of an app's `extensions`. `gov`: None for the process-wide GovRedis."""

    gov: GovRedis | None
    defaults: DefaultLimits
    #: Why its requests are refused: a decorator that does nothing above its route. "" for no reason; None before the
    #: first request, as more views may come.
    refusal: str | None = None
    #: The one that we gave the app; another extension may give it another.
    session_interface: SessionInterface | None = None


def state_of(app: Flask) -> AppState:
    try:
        return cast(AppState, app.extensions[EXTENSION])
    except KeyError:
        raise RuntimeError(f"app {app.name!r} has no FlaskGovRedis; call init_app(app) first") from None


def app_state() -> AppState:
    return state_of(current_app)


def current_app_itself() -> Flask:
    """Not the proxy, which is another object to a weak reference."""
    found: Flask = current_app._get_current_object()  # type: ignore[attr-defined]
    return found


def gov_of(app: Flask) -> GovRedis:
    return state_of(app).gov or get_gov()


def app_gov() -> GovRedis:
    return gov_of(current_app)


def has_flask_session(app: Flask) -> bool:
    """Is the app's flask.session ours?"""
    ours = state_of(app).session_interface
    return ours is not None and app.session_interface is ours
