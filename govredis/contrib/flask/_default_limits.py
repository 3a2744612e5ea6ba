"""The default limits of an app and of its blueprints."""

from __future__ import annotations

import hashlib
import re
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from flask import Blueprint, Flask, request

from ...errors import refuse
from ...keys import check_name
from ._state import EXTENSION, current_app_itself
from ._view_limits import ShownLimit, ViewLimit, shown


class _Default(NamedTuple):
    limit: ViewLimit
    #: None: each view has windows of its own, under its endpoint.
    operation: str | None
    identify: Any


class DefaultLimits:
    """By app and blueprint. The nearest one of a request's method holds: the view's own, its blueprint's, the app's."""

    def __init__(self) -> None:
        self._of: WeakKeyDictionary[Flask | Blueprint, _Default] = WeakKeyDictionary()

    def add(self, scope: Flask | Blueprint, limit: ViewLimit, operation: str | None) -> None:
        """Raises ValueError for a wrong scope, one that has a default, and for a key that names arguments."""
        if not isinstance(scope, Flask | Blueprint):
            raise refuse("scope", scope, "a Flask app or a Blueprint")
        served = scope.extensions.get(EXTENSION) if isinstance(scope, Flask) else None
        if served is not None and served.defaults is not self:
            raise ValueError(f"{scope.name!r} is served by another FlaskGovRedis; its default limits are that one's")
        if scope in self._of:
            raise ValueError(f"{scope.name!r} has a default limit already; join several limits by ';'")

        def view() -> None:
            """Whose arguments nobody knows."""

        self._of[scope] = _Default(limit, operation, limit.spec.identify(view))

    def meet(self) -> None:
        """Count this request by its default limit, if there is one."""
        rule, endpoint = request.url_rule, request.endpoint
        if rule is None or endpoint is None:
            return  # a 404, or a redirect to another URL
        if request.method == "OPTIONS" and getattr(rule, "provide_automatic_options", False):
            return  # Flask answers it
        default = self._found(current_app_itself(), endpoint, request.method)
        if default is not None:
            operation = _operation(default, endpoint)
            default.limit.meet(endpoint, operation, default.identify, (), request.view_args or {})

    def of(self, app: Flask, endpoint: str, method: str) -> list[ShownLimit]:
        """The limits that a request of an app meets: the view's own, else the default."""
        default = self._found(app, endpoint, method)
        if default is not None:
            return [ShownLimit(default.limit, _operation(default, endpoint))]
        return shown(app.view_functions.get(endpoint), method)[0]

    def _found(self, app: Flask, endpoint: str, method: str) -> _Default | None:
        if not self._of:
            return None
        # An app that dispatches in a way of its own may have no function for an endpoint.
        own, exempt = shown(app.view_functions.get(endpoint), method)
        if own or exempt:
            return None
        scopes: list[Any] = [app]
        name = endpoint
        while "." in name:  # of a blueprint, and of the blueprints around it
            name = name.rpartition(".")[0]
            scopes.insert(-1, app.blueprints.get(name))
        if endpoint.rpartition(".")[2] == "static" and getattr(scopes[0], "has_static_folder", False):
            return None
        found = (self._of[scope] for scope in scopes if scope in self._of)
        return next((default for default in found if default.limit.limits_method(method)), None)


def _operation(default: _Default, endpoint: str) -> str:
    return _name(endpoint) if default.operation is None else default.operation


def _name(endpoint: str) -> str:
    """The endpoint; or, if that cannot be an operation, a name that no other endpoint has."""
    try:
        return check_name(endpoint, "endpoint")
    except ValueError:
        told_apart = hashlib.sha256(endpoint.encode(errors="surrogatepass")).hexdigest()[:16]
        readable = re.sub(r"[^-.\w]", "-", endpoint)[:64]
        return f"{readable} {told_apart}"
