"""The extension's own settings, in an app's configuration: their defaults, and the values that are refused."""

from __future__ import annotations

import re

from flask import Flask

from ...errors import ConfigurationError
from ._decoration import is_plain
from ._state import COOKIE, DASHBOARD, DETAILS, HEADER, PREFIX, SECURE

#: A token of RFC 9110 and RFC 6265: the name of a header or a cookie.
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_PATH = re.compile(r"(?:/[0-9A-Za-z._~-]+)+")
#: Browsers take a cookie of such a name only with Secure; of the first only for one host, too, and for all its paths.
_SECURE_NAMES = "__host-", "__secure-"


def read_settings(app: Flask) -> None:
    """Put the defaults into the app's configuration. Raises ConfigurationError for a wrong value."""
    secure = app.config.setdefault(SECURE, True)
    if not isinstance(secure, bool):
        raise ConfigurationError(f"{SECURE} is {secure!r}; it must be True, or False for development without https")
    cookie = "__Host-govredis_session" if secure else "govredis_session"
    for name, default in (HEADER, "X-Session-Id"), (COOKIE, cookie):
        held = app.config.setdefault(name, default)
        if held is not None and not (isinstance(held, str) and _TOKEN.fullmatch(held)):
            raise ConfigurationError(
                f"{name} is {held!r}; it must be a name of letters, digits and any of !#$%&'*+-.^_`|~, or None"
            )
    named = app.config[COOKIE]
    if not secure and named is not None and named.lower().startswith(_SECURE_NAMES):
        raise ConfigurationError(
            f"{COOKIE} is {named!r}, which browsers take only with Secure; it must be another name, or {SECURE} True"
        )
    if named is not None and named == app.config.get("SESSION_COOKIE_NAME"):
        raise ConfigurationError(
            f"{COOKIE} is {named!r}, the name of Flask's own session cookie; it must be another name"
        )
    prefix, details = app.config.setdefault(PREFIX, "/govredis"), app.config.setdefault(DETAILS, False)
    if prefix is not None and not (isinstance(prefix, str) and _PATH.fullmatch(prefix)):
        raise ConfigurationError(f"{PREFIX} is {prefix!r}; it must be a path such as '/govredis', or None")
    if not isinstance(details, bool) and not (callable(details) and is_plain(details)):
        raise ConfigurationError(
            f"{DETAILS} is {details!r}; it must be True, False or a plain callable without arguments"
        )
    dashboard = app.config.setdefault(DASHBOARD, False)
    if dashboard is None or dashboard is False:
        return
    if not (callable(dashboard) and is_plain(dashboard)):
        raise ConfigurationError(
            f"{DASHBOARD} is {dashboard!r}; it must be False for no dashboard, or a plain callable without arguments"
            " that reads flask.request and returns True for those who may see it. The page names hosts, agents and"
            " locks, and behind a proxy every request seems to come from this host"
        )
    if prefix is None:
        raise ConfigurationError(f"{DASHBOARD} is set, and {PREFIX} is None, so that it has no URL; give it a path")
