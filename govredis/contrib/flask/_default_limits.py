"""The default limits of an app and of its blueprints."""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from flask import Blueprint, Flask, request

from ...errors import refuse
from ._state import current_app_itself
from ._view_limits import ShownLimit, ViewLimit, shown


class _Default(NamedTuple):
    limit: ViewLimit
    #: None: each view has windows of its own, under its endpoint.
    operation: str | None
    identify: Any


class DefaultLimits:
    """By app and blueprint. The nearest one holds for a request: the view's own, its blueprint's, the app's."""

    def __init__(self) -> None:
        self._of: WeakKeyDictionary[Flask | Blueprint, _Default] = WeakKeyDictionary()

    def add(self, scope: Flask | Blueprint, limit: ViewLimit, operation: str | None) -> None:
        """Raises ValueError for a scope that is neither, or that has a default; and for a key that names arguments."""
        if not isinstance(scope, Flask | Blueprint):
            raise refuse("scope", scope, "a Flask app or a Blueprint")
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
        return shown(app.view_functions[endpoint], method)[0]

    def _found(self, app: Flask, endpoint: str, method: str) -> _Default | None:
        own, exempt = shown(app.view_functions[endpoint], method)
        if own or exempt or endpoint == "static" or endpoint.endswith(".static"):
            return None
        scopes: list[Any] = [app]
        name = endpoint
        while "." in name:  # of a blueprint, and of the blueprints around it
            name = name.rpartition(".")[0]
            scopes.insert(-1, app.blueprints.get(name))
        nearest = next((self._of[scope] for scope in scopes if scope in self._of), None)
        return nearest if nearest is not None and nearest.limit.limits_method(method) else None


def _operation(default: _Default, endpoint: str) -> str:
    return endpoint if default.operation is None else default.operation
