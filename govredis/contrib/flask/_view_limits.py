"""ViewLimit: a limit on requests, of a view's own or a default of many; and the limits that a view shows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from http import HTTPStatus
from typing import Any, NamedTuple, TypeVar, cast

from flask import Response, request
from werkzeug.exceptions import BadRequest, Unauthorized

from ...errors import BackendUnavailable, RateLimitExceeded, SessionStoreUnavailable, refuse
from ...keys import Id, check_id, is_id
from ...limits import RateLimitResult
from ...limits.limit_spec import LimitSpec
from ...limits.rates import Rate, parse_rate
from . import _logins
from ._decoration import refuse_arguments, takes, without
from ._limit_headers import MetLimit, report
from ._problems import problem
from ._state import app_gov

T = TypeVar("T")

#: Attributes of a view's function, or of a view's class. functools.wraps gives them to the decorators above.
_LIMITS, _EXEMPT = "__govredis_limits__", "__govredis_exempt__"
#: How `agent_or_address` begins an identity. An agent whose id begins so gets one in front: no agent is an address.
_ADDRESS, _AGENT = "address:", "agent:"


def agent_or_address() -> str | None:
    """The request's agent, or its client's address where it has none, or where nobody can say who it is."""
    try:
        agent = _logins.current_agent()
    except SessionStoreUnavailable:
        agent = None
    if agent is not None and agent.startswith((_ADDRESS, _AGENT)):
        told = f"{_AGENT}{agent}"
        # No agent is locked out for its name: the longest ids have no room for the word.
        return told if is_id(told) else f"{_AGENT}{hashlib.sha256(agent.encode()).hexdigest()}"
    if agent is not None:
        return agent
    return f"{_ADDRESS}{request.remote_addr}" if request.remote_addr else None


class ViewLimit:
    """The arguments of `FlaskGovRedis.rate_limited`, checked.

    Args:
        needs_login: a request without an identity is a 401, not a 400.
    """

    def __init__(
        self,
        rate: Rate | Callable[[], Rate],
        key: str | Callable[[], Id | None],
        operation: str,
        cost: int | Callable[[], int],
        exempt: Callable[[], bool] | None,
        count_when: Callable[[Response], bool] | None,
        methods: Collection[str] | None,
        *,
        needs_login: bool,
    ) -> None:
        for what, given in ("rate", rate), ("key", key), ("cost", cost), ("exempt", exempt):
            refuse_arguments(what, given)
        if count_when is not None and not takes(count_when, None):
            raise refuse("count_when", count_when, "a callable of one argument, the response")
        if methods is not None and (
            isinstance(methods, str) or not methods or not all(isinstance(each, str) for each in methods)
        ):
            raise refuse("methods", methods, "a list of HTTP methods, as ['POST'], or None")
        self.spec = LimitSpec(without(rate), without(key), operation, without(cost), without(exempt))
        self.rate, self.key, self.methods = rate, key, None if methods is None else frozenset(map(str.upper, methods))
        self._count_when = count_when
        self._needs_login = needs_login

    def limits_method(self, method: str) -> bool:
        """HEAD is limited with GET: the same view answers both."""
        methods = self.methods
        return methods is None or method in methods or (method == "HEAD" and "GET" in methods)

    def meet(
        self,
        of: str,
        operation: str,
        identify: Callable[[tuple[Any, ...], Mapping[str, Any]], Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> None:
        """Count this request, and have the response report the limit. Raises RateLimitExceeded if it is refused.

        Args:
            of: the name of the view, for an error.
            operation: the operation.
            identify: gives the identity, by the view's arguments.
        """
        spec, limits = self.spec, app_gov().limits
        if not self.limits_method(request.method) or spec.exempts(args, kwargs):
            return
        identity = self._identity(of, lambda: identify(args, kwargs))
        now, taken = spec.terms(args, kwargs)
        result = limits.hit(identity, now, operation=operation, cost=taken)

        def settle(response: Response, result: RateLimitResult) -> RateLimitResult:
            if self._count_when is None or not result.allowed or self._count_when(response):
                return result
            try:
                result.refund()
                left = limits.peek(identity, now, operation=operation, cost=taken)
            except BackendUnavailable:
                return result
            # `left` is what the next request would leave.
            return replace(left, remaining=left.remaining + taken) if left.allowed else left

        report(MetLimit(operation, parse_rate(now), result, settle))
        if not result.allowed:
            raise RateLimitExceeded(result)

    def _identity(self, of: str, find: Callable[[], Any]) -> str:
        try:
            found = find()
            if found is None and self._needs_login:
                said = "this request needs a login"
                raise Unauthorized(said, problem(HTTPStatus.UNAUTHORIZED, said))
            if found is not None and not isinstance(found, str):
                wanted = "a str, an int or a UUID, or None"
                raise TypeError(f"key of {of} gave {found!r}; it must give {wanted}")
            return check_id(cast(str, found))
        except (KeyError, ValueError) as error:  # KeyError: of request.headers[...] and its like
            said = "this request carries no identity for its limit"
            raise BadRequest(said, problem(HTTPStatus.BAD_REQUEST, said)) from error


class ShownLimit(NamedTuple):
    """A limit as a view shows it, under the name of its operation."""

    limit: ViewLimit
    operation: str


def show(function: Any, limit: ViewLimit, operation: str) -> None:
    """Note on a decorated function that it has this limit, beside those that it shows."""
    setattr(function, _LIMITS, (ShownLimit(limit, operation), *getattr(function, _LIMITS, ())))


def exempt(target: T) -> T:
    """Note on a view's function, or on its class, that it has no default limit. Returns it."""
    setattr(getattr(target, "__func__", target), _EXEMPT, True)  # a method takes no attributes
    return target


def shown(view: Callable[..., Any] | None, method: str) -> tuple[list[ShownLimit], bool]:
    """The limits of a view's own for requests of a method, and whether it has no default one."""
    parts: list[Any] = [view]
    kind = getattr(view, "view_class", None)
    if kind is not None:
        handler = "get" if method == "HEAD" and not hasattr(kind, "head") else method.lower()
        # Flask-RESTful's, for all methods or for each; those for GET are not called for HEAD.
        more = getattr(kind, "method_decorators", ())
        if isinstance(more, Mapping):
            more = more.get(method.lower(), ())
        parts += [kind, kind.dispatch_request, getattr(kind, handler, None)]
        parts += more if isinstance(more, list | tuple) else ()
    # A decorator of a class is noted on the view that is made of it, too.
    limits = dict.fromkeys(each for part in parts for each in getattr(part, _LIMITS, ()))
    return [each for each in limits if each.limit.limits_method(method)], any(
        getattr(part, _EXEMPT, False) for part in parts
    )
