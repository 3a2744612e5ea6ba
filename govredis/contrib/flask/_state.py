"""The extension's part of an app: its GovRedis, and the names of its settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from flask import current_app

from ...api import GovRedis, get_gov

EXTENSION = "govredis"
HEADER, COOKIE, SECURE = "GOVREDIS_SESSION_HEADER", "GOVREDIS_SESSION_COOKIE", "GOVREDIS_SESSION_COOKIE_SECURE"
PREFIX, DETAILS = "GOVREDIS_URL_PREFIX", "GOVREDIS_HEALTH_DETAILS"


@dataclass(slots=True)
class AppState:
    """Our part of an app's `extensions`. `gov`: None for the process-wide GovRedis."""

    gov: GovRedis | None
    #: Why its requests are refused: a decorator that does nothing above its route. "" for no reason; None before the
    #: first request, as more views may come.
    refusal: str | None = None


def app_state() -> AppState:
    try:
        return cast(AppState, current_app.extensions[EXTENSION])
    except KeyError:
        raise RuntimeError(f"app {current_app.name!r} has no FlaskGovRedis; call init_app(app) first") from None


def app_gov() -> GovRedis:
    return app_state().gov or get_gov()
