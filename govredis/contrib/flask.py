"""Flask: a GovRedis for each app, limited views, the agent of a request's session, health endpoints and commands."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Any, ParamSpec, TypeVar, cast
from weakref import WeakSet, WeakValueDictionary

import click
from flask import Blueprint, Flask, Response, current_app, request
from flask.cli import AppGroup, with_appcontext
from werkzeug.exceptions import BadRequest

from .._commands import COMMANDS, work_on
from ..api import GovRedis, get_gov
from ..errors import BackendUnavailable, ConfigurationError, RateLimitExceeded, refuse
from ..keys import check_id
from ..limits import RateLimitResult
from ..limits.calls import LimitedCalls
from ..limits.rates import Rate, parse_rate
from ._hits import Hit, hits_of_request, note
from ._settings import gov_of_settings

__all__ = ["FlaskGovRedis"]

P = ParamSpec("P")
R = TypeVar("R")

_EXTENSION = "govredis"
_HEADER, _COOKIE = "GOVREDIS_SESSION_HEADER", "GOVREDIS_SESSION_COOKIE"
#: What RFC 9110 and RFC 6265 both call a token: the name of a header, or of a cookie.
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")

#: An attribute of the request object: flask.g is shared by the requests of a test that holds an app context open, and
#: the environ by a request and those that are made of it.
_AGENT = "govredis.agent"

_QUOTA_EXCEEDED = "https://iana.org/assignments/http-problem-types#quota-exceeded"


@dataclass(slots=True)
class _App:
    """What an app has of us, in its `extensions`. `gov`: None for the process-wide one."""

    gov: GovRedis | None
    #: Its views that run without the limit put above their route; None before the first request: more may come.
    unlimited: list[str] | None = None


class FlaskGovRedis:
    """govredis in Flask apps. One may serve several apps, and come before them (`init_app`).

    Each app gets:

    - `/govredis/live` (200, touches nothing), `/govredis/ready` (503 only where health says fail) and
      `/govredis/health` (the same with the whole report, which names hosts: not for the public), as
      application/health+json, never cached;
    - RateLimitExceeded out of any view as 429, and BackendUnavailable (SessionStoreUnavailable and LockUnavailable are
      such) as 503, with Retry-After and an application/problem+json body (RFC 9457). An `errorhandler` of the app's own
      for one of the two stands, whichever comes first;
    - the commands `flask govredis migrate` and `flask govredis health`.

    Settings, in the app's configuration: `GOVREDIS_` and the name of a field of Config in capitals, put over the
    environment's; `GOVREDIS_SESSION_HEADER` ("X-Session-Id") and `GOVREDIS_SESSION_COOKIE` (None), for `current_agent`.

    Works under prefork servers, `--preload` included, and threads: nothing is held but what a GovRedis holds. While
    Redis is away requests go on, on the fallbacks of each feature.

    Args:
        app: one to start with; the same as `init_app(app)`.
        gov: what its apps use; None: of each app one made of its settings if it has any of Config's, else the
            process-wide one.
    """

    def __init__(self, app: Flask | None = None, gov: GovRedis | None = None) -> None:
        self._gov = gov
        self._apps: WeakSet[Flask] = WeakSet()
        #: What `rate_limited` was put on, by id, for not all can be hashed. As a view by itself it would run unlimited.
        self._bare: WeakValueDictionary[int, Callable[..., Any]] = WeakValueDictionary()
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Serve `app` too: its settings are read now. Nothing is connected.

        Raises ConfigurationError for wrong settings, and for one with our prefix that is none of ours; ValueError for
        an app that has a FlaskGovRedis already.
        """
        if _EXTENSION in app.extensions:
            raise ValueError(f"app {app.name!r} has a FlaskGovRedis already; init_app is called once for an app")
        also = [name.removeprefix("GOVREDIS_").lower() for name in (_HEADER, _COOKIE)]
        made = gov_of_settings(app.config, "GOVREDIS_", also)
        for name, default in (_HEADER, "X-Session-Id"), (_COOKIE, None):
            held = app.config.setdefault(name, default)
            if held is not None and not (isinstance(held, str) and _TOKEN.fullmatch(held)):
                raise ConfigurationError(
                    f"{name} is {held!r}; it must be a name of letters, digits and any of !#$%&'*+-.^_`|~, or None"
                )
        app.register_blueprint(_endpoints)
        for error, handler in (RateLimitExceeded, _too_many), (BackendUnavailable, _unavailable):
            if error not in app.error_handler_spec[None][None]:
                app.register_error_handler(error, handler)
        state = app.extensions[_EXTENSION] = _App(self._gov or made)
        app.before_request(lambda: self._refuse_unlimited(app, state))
        app.cli.add_command(_commands)
        self._apps.add(app)

    @property
    def gov(self) -> GovRedis:
        """The GovRedis of the current app. Raises RuntimeError for an app without `init_app`, and outside of any."""
        return _gov()

    def current_agent(self) -> str | None:
        """The agent of the session whose id this request carries: in the header GOVREDIS_SESSION_HEADER, else in the
        cookie GOVREDIS_SESSION_COOKIE. Its TTL slides (`sessions.get(..., touch=True)`). Redis is asked once a request:
        what is bound or unbound in the same request is not seen.

        Returns None where no id came, where what came can be none, and where the session is bound to nobody.

        Raises SessionStoreUnavailable where nobody can be asked and this process does not know the session: that is not
        the same as logged out. A view that lets it pass is a 503.
        """
        if _AGENT not in request.__dict__:
            request.__dict__[_AGENT] = self._find_agent()
        return cast("str | None", request.__dict__[_AGENT])

    def _find_agent(self) -> str | None:
        gov = self.gov
        header, cookie = current_app.config[_HEADER], current_app.config[_COOKIE]
        session_id: Any = request.headers.get(header) if header else None
        if not session_id and cookie:
            session_id = request.cookies.get(cookie)
        try:
            check_id(session_id)
        except ValueError:
            return None
        return gov.sessions.get_agent_id(session_id, touch=True)

    def rate_limited(
        self,
        rate: Rate | Callable[[], Rate],
        *,
        key: str | Callable[[], str | None],
        operation: str = "default",
        cost: int | Callable[[], int] = 1,
        exempt: Callable[[], bool] | None = None,
        count_when: Callable[[Response], bool] | None = None,
    ) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Limit the requests of a view, over all processes. Put it between the route and the function.

        Args:
            rate: as in `RateLimiter.hit`, or a callable without arguments that reads flask.request and returns one: by
                a plan, say. It holds from the next request on.
            key: whom to limit: a template of the view's arguments, those of its URL, "{agent_id}"; or a callable
                without arguments that reads flask.request, such as `current_agent`.
            operation: what is limited.
            cost: as in `RateLimiter.hit`, or a callable without arguments that returns one.
            exempt: a callable without arguments; a request for which it returns True is let through, unasked and
                uncounted, and needs no identity.
            count_when: a callable that gets the view's response, that of an error handler included; where it returns
                False the request is given back (`RateLimitResult.refund`): only failed logins count, say. Until then it
                counts, so that requests at one time are within the limit too. What its store, gone away meanwhile,
                cannot give back stays counted.

        A refused request is a RateLimitExceeded, and so a 429. Every response of the view, a 429 and an error included,
        has RateLimit-Policy with all limits and RateLimit with the one that decided, as in
        draft-ietf-httpapi-ratelimit-headers-11 (May 2026); one that was given back says what is left without it. A
        policy's name is "{operation}: {limit}", with what is not printable ASCII, and `"`, `%` and `\\`,
        percent-encoded. With several of these on a view each decides in turn, outermost first, and its place is taken
        also where an inner one refuses; give each an operation of its own, or their policies have one name.

        A request without an identity is a 400, never unlimited: `key` gives None or a str that can stand in no key, or
        raises KeyError or ValueError. Anything else that it gives is a TypeError. What is promised when Redis is away
        is as for `RateLimiter.hit`.

        Raises ValueError at decoration for a bad argument, for an async view, and above the route of an app that this
        has seen: the limit would never be asked there. What can only be found later (a blueprint, an app to come) has
        that app refuse every request with that ValueError.
        """
        for what, given in ("rate", rate), ("key", key), ("cost", cost), ("exempt", exempt):
            _refuse_arguments(what, given)
        calls = LimitedCalls(_without(rate), _without(key), operation, _without(cost), _without(exempt))
        if count_when is not None and not _takes(count_when, None):
            raise refuse("count_when", count_when, "a callable of one argument, the response")

        def decorate(function: Callable[P, R]) -> Callable[P, R]:
            if not callable(function):
                raise refuse("what is decorated", function, "the function of a view")
            if inspect.iscoroutinefunction(function):
                raise ValueError(f"{_name(function)} is async; @rate_limited is for synchronous views")
            identify = calls.identify(function)
            for layer in _layers(function):
                with contextlib.suppress(TypeError):  # an object of a class with slots cannot be watched
                    self._bare[id(layer)] = layer
            for app in self._apps:
                if unlimited := self._unlimited(app):
                    raise _above_the_route(unlimited)

            @functools.wraps(function)
            def limited(*args: P.args, **kwargs: P.kwargs) -> R:
                limits = self.gov.limits
                if calls.exempts(args, kwargs):
                    return function(*args, **kwargs)
                try:
                    found = identify(args, kwargs)
                    if found is not None and not isinstance(found, str):
                        raise TypeError(f"key of {_name(function)} gave {found!r}; it must give a str, or None")
                    identity = check_id(cast(str, found))
                except (KeyError, ValueError) as error:  # KeyError: of request.headers[...] and its like
                    said = "this request carries no identity for its limit"
                    raise BadRequest(said, _problem(HTTPStatus.BAD_REQUEST, said)) from error
                now, taken = calls.terms(args, kwargs)
                result = limits.hit(identity, now, operation=operation, cost=taken)

                def settle(response: Response, result: RateLimitResult) -> RateLimitResult:
                    if count_when is None or not result.allowed or count_when(response):
                        return result
                    try:
                        result.refund()
                    except BackendUnavailable:
                        return result
                    left = limits.peek(identity, now, operation=operation, cost=taken)
                    # What is left is said as if another were to come.
                    return replace(left, remaining=left.remaining + taken) if left.allowed else left

                note(Hit(operation, parse_rate(now), result, settle))
                if not result.allowed:
                    raise RateLimitExceeded(result)
                return function(*args, **kwargs)

            return limited

        return decorate

    def _unlimited(self, app: Flask) -> list[str]:
        called = [*app.view_functions.values(), *itertools.chain(*app.before_request_funcs.values())]
        return sorted({_name(function) for function in called if id(_plain(function)) in self._bare})

    def _refuse_unlimited(self, app: Flask, state: _App) -> None:
        if state.unlimited is None:
            state.unlimited = self._unlimited(app)
        if state.unlimited:
            raise _above_the_route(state.unlimited)


def _app() -> _App:
    try:
        return cast(_App, current_app.extensions[_EXTENSION])
    except KeyError:
        raise RuntimeError(f"app {current_app.name!r} has no FlaskGovRedis; call init_app(app) first") from None


def _gov() -> GovRedis:
    return _app().gov or get_gov()


# -- decoration ----------------------------------------------------------------------------------------------------


def _refuse_arguments(what: str, given: Any) -> None:
    if callable(given) and (inspect.iscoroutinefunction(given) or not _takes(given)):
        raise refuse(what, given, "a plain callable without arguments, which reads flask.request")


def _takes(given: Any, *args: Any) -> bool:
    try:
        inspect.signature(given).bind(*args)
    except TypeError:
        return False
    return True


def _without(given: Any) -> Any:
    """A callable that is not told the view's arguments; what is none as it is."""
    return (lambda *args, **kwargs: given()) if callable(given) else given


def _layers(function: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """The function, and what it wraps: between the limit and a route below it another decorator may stand."""
    layer: Callable[..., Any] | None = function
    while layer is not None:
        yield _plain(layer)
        layer = getattr(layer, "__wrapped__", None)


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """Of a method, which is another object each time it is asked for, its function."""
    found: Callable[..., Any] = getattr(function, "__func__", function)
    return found


def _name(function: Callable[..., Any]) -> str:
    return f"{function.__module__}.{getattr(function, '__qualname__', function)}"


def _above_the_route(names: list[str]) -> ValueError:
    return ValueError(
        f"@rate_limited does not limit {', '.join(names)}: it stands above a route, or the function itself is also a"
        " view; put the route outermost, and give a view without the limit a function of its own"
    )


# -- responses -----------------------------------------------------------------------------------------------------


def _too_many(error: RateLimitExceeded) -> Response:
    violated, headers = [], {}
    if error.result is not None:
        # The operation of a limit is known of the decorator's only: `require` in a view does not tell.
        names = [hit.name() for hit in hits_of_request() if hit.result is error.result]
        violated = names or [str(error.result.limit)]
        headers["Retry-After"] = str(max(1, math.ceil(error.result.retry_after)))
    return _problem(
        HTTPStatus.TOO_MANY_REQUESTS,
        str(error),
        headers,
        type=_QUOTA_EXCEEDED,
        title="Request cannot be satisfied as assigned quota has been exceeded",
        **{"violated-policies": violated},
    )


def _unavailable(error: BackendUnavailable) -> Response:
    # What the error says names hosts.
    said = "a service that this request needs is away for the moment"
    return _problem(HTTPStatus.SERVICE_UNAVAILABLE, said, {"Retry-After": "1"})


def _problem(status: HTTPStatus, detail: str, headers: dict[str, str] | None = None, **members: Any) -> Response:
    """A response of RFC 9457."""
    body = {"type": "about:blank", "title": status.phrase, "status": status, "detail": detail, **members}
    return Response(json.dumps(body), status, headers, content_type="application/problem+json")


# -- endpoints and commands ----------------------------------------------------------------------------------------

_endpoints = Blueprint("govredis", __name__, url_prefix="/govredis")


@_endpoints.get("/live")
def live() -> Response:
    return _health({"status": "pass"})


@_endpoints.get("/ready")
def ready() -> Response:
    return _health({"status": _gov().health.check().status})


@_endpoints.get("/health")
def health() -> Response:
    return _health(_gov().health.check().as_dict())


def _health(body: dict[str, Any]) -> Response:
    status = HTTPStatus.SERVICE_UNAVAILABLE if body["status"] == "fail" else HTTPStatus.OK
    headers = {"Cache-Control": "no-store"}
    return Response(json.dumps(body), status, headers, content_type="application/health+json")


@with_appcontext
def _on_the_apps() -> None:
    try:
        work_on(_gov())
    except ConfigurationError as error:
        raise click.ClickException(str(error)) from error


_commands = AppGroup(
    "govredis", callback=_on_the_apps, commands=COMMANDS, help="govredis: the app's Redis and PostgreSQL."
)
