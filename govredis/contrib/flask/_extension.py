"""FlaskGovRedis, the extension."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from http import HTTPStatus
from typing import Any, ParamSpec, TypeVar
from weakref import WeakSet

from flask import Blueprint, Flask, Response
from flask.views import View
from werkzeug.exceptions import Unauthorized

from ...api import GovRedis
from ...config import Config, variables
from ...errors import refuse
from ...events import Event
from ...keys import Id
from ...limits.rates import Rate
from ...sessions import SessionBinding
from . import _logins, _problems, _session_interface
from ._dashboard import dashboard
from ._decoration import BareViews, name_of
from ._default_limits import DefaultLimits
from ._endpoints import commands, endpoints
from ._events import event_stream
from ._problems import problem
from ._settings import read_settings
from ._state import COOKIE, DASHBOARD, DETAILS, EXTENSION, HEADER, PREFIX, SECURE, AppState, app_gov
from ._view_limits import ViewLimit, agent_or_address, show
from ._view_limits import exempt as exempt_view

__all__ = ["FlaskGovRedis"]

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class FlaskGovRedis:
    """govredis in Flask apps. An extension may serve several apps, and be made before them (`init_app`).

    Each app gets:

    - `/govredis/live` (200, touches nothing), `/govredis/ready` (503 only where health says fail) and
      `/govredis/health` (the same; for those who may see it, the whole report, which names hosts). They are
      application/health+json, and never cached;
    - `/govredis/metrics` for Prometheus, for those who may see the whole report, else 403; with the extra `prometheus`;
    - `/govredis/dashboard`, where GOVREDIS_DASHBOARD enables it: a page for people on call;
    - status 429 for RateLimitExceeded out of any view, and 503 for BackendUnavailable (SessionStoreUnavailable and
      LockUnavailable too). Both have Retry-After and an application/problem+json body (RFC 9457); or a page or a text,
      where the request's Accept prefers that. Outside the view the two are werkzeug's HTTPExceptions as well. So the
      app's own `errorhandler` is called, for the error, its status or HTTPException, and its answer gets Retry-After.
      The text of that 503 names no host; its `__cause__` is the error as it was raised;
    - `flask govredis`: the commands of `govredis`, except `demo`, under the app's settings; and `routes`, which lists
      the limits of the app's views.

    Settings, in the app's configuration:

    - all settings of the environment under the same names (`REDIS_URL`, `GOVREDIS_KEY_PREFIX`, ...), which override it;
    - `GOVREDIS_SESSION_HEADER` ("X-Session-Id") and `GOVREDIS_SESSION_COOKIE` ("__Host-govredis_session"): the names of
      the header and of the cookie that carry a session's id; None for none. Browsers take a cookie whose name begins
      with `__Host-` from this host alone, and only over https;
    - `GOVREDIS_SESSION_COOKIE_SECURE` (True): False for development without https. The cookie is then named
      "govredis_session", if you gave it no name;
    - `GOVREDIS_URL_PREFIX` ("/govredis"), the path of the endpoints; None: there are none;
    - `GOVREDIS_HEALTH_DETAILS` (False), for the whole report and the metrics: True for everybody, or a callable without
      arguments that reads flask.request.
    - `GOVREDIS_DASHBOARD` (False: there is none): a callable without arguments that reads flask.request, and returns
      True for those who may see the dashboard. Others get a 403, unless it aborts with an answer of its own.

    Works under prefork servers, `--preload` included, and with threads. While Redis is away requests go on, on the
    fallbacks of each feature.

    Args:
        app: a first app; the same as `init_app(app)`.
        gov: the GovRedis of its apps. None: an app whose settings have any of Config's gets a GovRedis of its own, and
            any other app the process-wide one.
    """

    def __init__(self, app: Flask | None = None, gov: GovRedis | None = None) -> None:
        self._gov = gov
        self._apps: WeakSet[Flask] = WeakSet()
        self._defaults = DefaultLimits()
        self._limited = BareViews("rate_limited", "limit")
        self._protected = BareViews("login_required", "protect")
        self._is_flask_session = False
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Serve `app` too: its settings are read now. Nothing is connected.

        Raises ConfigurationError for wrong settings, and for an unknown setting that begins as ours do; ValueError for
        an app that has a FlaskGovRedis already.
        """
        if EXTENSION in app.extensions:
            raise ValueError(f"app {app.name!r} has a FlaskGovRedis already; init_app is called once for an app")
        config = Config.from_app(app.config, variables(), (HEADER, COOKIE, SECURE, PREFIX, DETAILS, DASHBOARD))
        read_settings(app)
        if self._is_flask_session:
            _session_interface.check(app)
        if (prefix := app.config[PREFIX]) is not None:
            app.register_blueprint(endpoints, url_prefix=prefix)
        if app.config[DASHBOARD]:
            app.register_blueprint(dashboard, url_prefix=f"{prefix}/dashboard")
        made = self._gov or (None if config is None else GovRedis(config))
        state = app.extensions[EXTENSION] = AppState(made, self._defaults)
        app.before_request(lambda: self._refuse_unreached(app, state))
        app.before_request(self._defaults.meet)
        _logins.watch(app)
        _problems.watch(app)
        app.cli.add_command(commands)
        if self._is_flask_session:
            _session_interface.install(app)
        self._apps.add(app)

    @property
    def gov(self) -> GovRedis:
        """The GovRedis of the current app. Raises RuntimeError without an app, and for an app without `init_app`."""
        return app_gov()

    def login(
        self, agent_id: Id, *, ttl: float | None = None, data: Any = None, remember: bool = False
    ) -> SessionBinding:
        """Begin an agent's session, once you know that it is the agent. The response gets its cookie.

        The session has a new, unguessable id. Every session that the request came with ends, so that an id from before
        the login is worth nothing. If a request logs in several times, the last login counts. From then on
        `current_agent` is the agent.

        The cookie is named by GOVREDIS_SESSION_COOKIE. It is HttpOnly, SameSite=Lax, for the path / and for this host
        alone; and Secure, unless GOVREDIS_SESSION_COOKIE_SECURE is False. The response that has it gets
        `Cache-Control: no-store`.

        Args:
            agent_id: the agent: a user's id, say.
            ttl: seconds, above REDIS_SESSION_TTL: a session that ends sooner gets that by its next request.
            data: as in `SessionCache.start`; with `use_for_flask_session` a dict, which joins the content.
            remember: keep the cookie for the ttl. False: until the browser ends.

        If the view raises an error afterwards, the new session ends and no cookie is set. `abort(redirect(...))` is no
        error.

        Returns the SessionBinding. Its session_id is for clients that send it in the header. Raises ValueError for a
        bad argument, RuntimeError where the response has been made already, and SessionStoreUnavailable as
        `SessionCache.start` does: a 503, and the old session stands.
        """
        if not isinstance(remember, bool):
            raise refuse("remember", remember, "True or False")
        if remember and ttl is None:
            raise refuse("remember", remember, "False where there is no ttl")
        return _logins.login(agent_id, ttl, data, remember)

    def logout(self) -> bool:
        """End the session that the request came with, or that it has begun, and delete the cookie.

        An id that nobody has bound leaves nothing in Redis. From then on `current_agent` is None.

        Returns False if there was no session to end. Raises RuntimeError where the response has been made already, and
        SessionStoreUnavailable as `current_agent` does: a 503, and the cookie stays, as the session may go on.
        """
        return _logins.logout()

    def login_required(self, function: Callable[P, R]) -> Callable[P, R]:
        """Answer 401 to requests without an agent (`current_agent`). Put it between the route and the function.

        The 401 is a werkzeug Unauthorized with an application/problem+json body: the app's `errorhandler(401)` may
        redirect to a login page. While nobody can say who it is, the answer is 503.

        Raises ValueError for an async view, and for a place above the route, in the same way as `rate_limited`.
        """
        if _decorates_class(function, self.login_required):
            return function
        self._protected.check(function)
        self._protected.add(function, self._apps)

        @functools.wraps(function)
        def protected(*args: P.args, **kwargs: P.kwargs) -> R:
            if _logins.current_agent() is None:
                said = "this request needs a login"
                raise Unauthorized(said, problem(HTTPStatus.UNAUTHORIZED, said))
            return function(*args, **kwargs)

        return protected

    def use_for_flask_session(self) -> None:
        """Have `flask.session` keep its content in our sessions, in all apps of this extension, later ones included.

        The content is the `data` of the session that `login` begins and `current_agent` reads: a request has one
        session, and its cookie is that of `login`. It is read at its first use. Once the response is made, those keys
        are saved that the request has changed, also within a value. If requests at the same time change different keys,
        all of them count; of the same key the later one does.

        A stranger who gets content gets a session, whose `current_agent` is None. `login` takes the content along under
        a new id, and `logout` ends it. A session gets a new id too when Flask-Login's `login_user` changes its user,
        and by `app.session_interface.regenerate(session)`. If nothing is left in a stranger's session, it ends.

        Values are those of Flask's own session: JSON, tuples, bytes, datetimes, UUIDs and Markup. Any other is a
        ValueError that names its key, when the response is made: a 500. So is content of more than 64 KiB.

        A session with `session.permanent` and its cookie have `PERMANENT_SESSION_LIFETIME`. Once a tenth of it has
        passed, a request that uses the session gives it the whole again, unless `SESSION_REFRESH_EACH_REQUEST` is
        False. `SESSION_COOKIE_SAMESITE` holds for our cookie.

        While nobody can say what is in the session, its use raises SessionStoreUnavailable: a 503. If it cannot be
        saved, the answer is that 503 instead of the view's. A session that was ended meanwhile stays ended.

        Raises ConfigurationError for an app whose settings are at odds with it: no GOVREDIS_SESSION_COOKIE, or one of
        Flask's SESSION_COOKIE_* that our cookie cannot follow; ValueError for an app with another session_interface.
        """
        for app in self._apps:
            _session_interface.check(app)
        for app in self._apps:
            _session_interface.install(app)
        self._is_flask_session = True

    def current_agent(self) -> str | None:
        """The agent of this request's session, by the session id in the header, or else in the cookie.

        GOVREDIS_SESSION_HEADER and GOVREDIS_SESSION_COOKIE name the two. The session's TTL slides
        (`sessions.get(..., touch=True)`). Redis is asked once per request, which sees its own `login` and `logout`, but
        no other bind or unbind.

        Returns None if the request has no session id or a malformed one, or if the session is bound to nobody.

        Raises SessionStoreUnavailable where no server can be asked and this process does not know the session: the user
        may be logged in. A view that does not catch it answers 503.
        """
        return _logins.current_agent()

    def rate_limited(
        self,
        rate: Rate | Callable[[], Rate],
        *,
        key: str | Callable[[], Id | None] | None = None,
        operation: str = "default",
        cost: int | Callable[[], int] = 1,
        exempt: Callable[[], bool] | None = None,
        count_when: Callable[[Response], bool] | None = None,
        methods: Collection[str] | None = None,
    ) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Limit the requests of a view, over all processes. Put it between the route and the function.

        A MethodView takes it on the class, on its methods, and in `decorators`.

        Args:
            rate: as in `RateLimiter.hit`, or a callable without arguments that reads flask.request and returns a rate:
                by a plan, say. A change holds from the next request on.
            key: the identity to limit: a template of the view's arguments from its URL, "{agent_id}"; or a callable
                without arguments that reads flask.request, such as `current_agent`. None: the agent; or the client's
                address (`request.remote_addr`) for a request without one, and where no server can say who it is.
                Behind a proxy the address is the client's only with werkzeug's ProxyFix.
            operation: the limited operation. Views with the same operation share their windows.
            cost: as in `RateLimiter.hit`, or a callable without arguments that returns a cost.
            exempt: a callable without arguments. If it returns True, the request goes through without a limit, is not
                counted, and needs no identity.
            count_when: a callable that gets the response of the view or of its error handler. If it returns False, the
                request is given back (`RateLimitResult.refund`): only failed logins count, say. Until then it counts,
                so that simultaneous requests are within the limit too. If the backend has gone away meanwhile, the
                request stays counted.
            methods: the HTTP methods that are limited, as ["POST"]; requests of others go through. GET includes HEAD.
                None: all.

        A refused request raises RateLimitExceeded, and so is a 429. Every response of the view, a 429 or an error
        included, has RateLimit-Policy with all limits and RateLimit with the decisive one, as in
        draft-ietf-httpapi-ratelimit-headers-11 (May 2026). After a request was given back, they say what is left
        without it. The name of a policy is "{operation}: {limit}", percent-encoded where it is not printable ASCII, and
        at `"`, `%` and `\\`.

        Several limits on a view decide in turn, outermost first. A limit that was passed has counted the request even
        if an inner one refuses. Give each an operation of its own, or their policies have one name.

        A request without an identity is a 400, never unlimited: `key` gives None or an id that cannot stand in a key,
        or raises KeyError or ValueError. If `key` is `current_agent` and gives None, it is a 401. A result of another
        type is a TypeError. The promises while Redis is away are
        those of `RateLimiter.hit`.

        Raises ValueError at decoration for a bad argument, for an async view, and above the route of an app that this
        extension has seen: the limit would never run there. If the mistake shows only later (in a blueprint, or an app
        to come), that app refuses every request with the same ValueError.
        """
        limit = self._limit(rate, key, operation, cost, exempt, count_when, methods)

        def decorate(function: Callable[P, R]) -> Callable[P, R]:
            if _decorates_class(function, decorate):
                return function
            self._limited.check(function)
            identify = limit.spec.identify(function)
            self._limited.add(function, self._apps)

            @functools.wraps(function)
            def limited(*args: P.args, **kwargs: P.kwargs) -> R:
                limit.meet(name_of(function), operation, identify, args, kwargs)
                return function(*args, **kwargs)

            show(limited, limit, operation)
            return limited

        show(decorate, limit, operation)
        return decorate

    def default_limit(
        self,
        scope: Flask | Blueprint,
        rate: Rate | Callable[[], Rate],
        *,
        key: str | Callable[[], Id | None] | None = None,
        operation: str | None = None,
        cost: int | Callable[[], int] = 1,
        exempt: Callable[[], bool] | None = None,
        count_when: Callable[[Response], bool] | None = None,
        methods: Collection[str] | None = None,
    ) -> None:
        """Limit the requests of all views of an app or a blueprint that have no limit of their own.

        The nearest limit of a request's method holds, alone: the view's own (`rate_limited`), else its blueprint's
        default, else that of the blueprint around it, else the app's. A view may have none: `exempt`. Static files, the
        endpoints of govredis, URLs that lead to no view, and OPTIONS requests that Flask answers have no default limit.

        A decorator above `rate_limited` or `exempt` hides these, unless it uses functools.wraps. Then the default limit
        holds too.

        A request is counted before its view, and before hooks that were registered after `init_app`.

        Args:
            scope: a Flask app that this extension serves or will serve, or a Blueprint of such apps.
            operation: the limited operation, shared by all these views. None: each view has its own, its endpoint;
                or a text like that, where the endpoint cannot be an operation, as "a:b".
            rate, cost, exempt, count_when, methods: as in `rate_limited`.
            key: as in `rate_limited`, but for templates, since views differ in their arguments. With `current_agent`
                the view of the login must be exempt, or nobody gets in.

        Raises ValueError for a bad argument, for a scope that has a default limit already, and for an app of another
        FlaskGovRedis.
        """
        limit = self._limit(rate, key, "default" if operation is None else operation, cost, exempt, count_when, methods)
        self._defaults.add(scope, limit, operation)

    def events(self, topic: str, *, only: Callable[[Event], bool] | None = None, heartbeat: float = 15.0) -> Response:
        """A response that sends events as they come (Server-Sent Events): return it from a view of yours.

        The view decides who may see the topic. A browser that comes again with Last-Event-ID gets what it has missed.
        Each response keeps a thread, or greenlet, until its client has gone.

        Args:
            topic: as in `EventBus.listen`.
            only: gets each event, outside of the request; where it returns False, the event is not sent.
            heartbeat: seconds after which something is sent, so that a client that has gone is noticed.

        While Redis is away the response stays open, and goes on behind the last event. Raises ValueError for bad
        arguments, and BackendUnavailable (a 503) where Redis is disabled.
        """
        return event_stream(app_gov(), topic, only, heartbeat)

    def exempt(self, target: T) -> T:
        """A view, or the class of a MethodView, for which no default limit holds. Its own limits hold.

        Put it anywhere among the decorators of a view, if those above it use functools.wraps. Returns the target.

        Raises ValueError for an object that is not callable.
        """
        if not callable(target):
            raise refuse("the exempt object", target, "the function or the class of a view")
        return exempt_view(target)

    def _limit(
        self,
        rate: Rate | Callable[[], Rate],
        key: str | Callable[[], Id | None] | None,
        operation: str,
        cost: int | Callable[[], int],
        exempt: Callable[[], bool] | None,
        count_when: Callable[[Response], bool] | None,
        methods: Collection[str] | None,
    ) -> ViewLimit:
        needs_login = getattr(key, "__func__", None) is FlaskGovRedis.current_agent
        found = agent_or_address if key is None else key
        return ViewLimit(rate, found, operation, cost, exempt, count_when, methods, needs_login=needs_login)

    def _refuse_unreached(self, app: Flask, state: AppState) -> None:
        if state.refusal is None:
            state.refusal = self._protected.refusal(app) or self._limited.refusal(app)
        if state.refusal:
            raise ValueError(state.refusal)


def _decorates_class(target: Any, decorator: Callable[..., Any]) -> bool:
    """Is it the class of views? Then its views are decorated as they are made of it."""
    if not (isinstance(target, type) and issubclass(target, View)):
        return False
    target.decorators = [*target.decorators, decorator]
    return True
