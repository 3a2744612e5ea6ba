"""Our errors as HTTP tells them: problems of RFC 9457, or a page or a text for a client that asks for one."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, ParamSpec, TypeVar

from flask import Flask, Response, request
from markupsafe import escape
from werkzeug.exceptions import HTTPException, ServiceUnavailable, TooManyRequests

from ...errors import BackendUnavailable, GovRedisError, RateLimitExceeded
from ._limit_headers import met_limits

P = ParamSpec("P")
R = TypeVar("R")

_PROBLEM, _HTML, _TEXT = "application/problem+json", "text/html", "text/plain"
#: As a client may name them in Accept, the first of equals first. A problem is JSON.
_OFFERED = _PROBLEM, "application/json", _HTML, _TEXT
_QUOTA_EXCEEDED = "https://iana.org/assignments/http-problem-types#quota-exceeded"
#: An attribute of the request object: the status that an error of ours gave it, and its Retry-After.
_REFUSED = "govredis.refused"


class _AsHttp:
    """The part of the classes below that stands before the error's own class: `original` is that error."""

    original: GovRedisError
    description: str
    response: Response

    def __str__(self) -> str:
        # Handlers of HTTPException put it into their answers; the text of `original` may name hosts.
        return self.description

    def __reduce__(self) -> Any:
        return self.original.__reduce__()


@functools.cache
def _http_class(kind: Any, http: type[HTTPException]) -> type[Any]:
    """A class of both kinds, so that the app's error handlers of either are called, ours before HTTPException's."""
    return type(kind.__name__, (_AsHttp, kind, http), {})


def watch(app: Flask) -> None:
    """Have our errors leave the app's views and hooks as werkzeug's, and their responses keep Retry-After.

    Extensions as Flask-RESTful handle errors in ways of their own, but all of them know an HTTPException.
    """
    for step in "preprocess_request", "dispatch_request":
        setattr(app, step, telling(getattr(app, step)))
    handle = app.handle_http_exception

    def handle_ours(error: HTTPException) -> Any:
        # Flask keeps its result in a frame. An error there, which holds that frame, would live on with the locals of
        # the view until the garbage collector comes.
        found = handle(error)
        return found.response if isinstance(found, _AsHttp) else found

    setattr(app, "handle_http_exception", handle_ours)  # noqa: B010 - a method, to mypy
    app.after_request(_keep_retry_after)


def telling(step: Callable[P, R]) -> Callable[P, R]:
    """A step of a request, whose errors of ours are werkzeug's as well."""

    @functools.wraps(step)
    def told_step(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return step(*args, **kwargs)
        except (RateLimitExceeded, BackendUnavailable) as error:
            if isinstance(error, HTTPException):
                raise
            told = _told(error)
        # Not within `except`: the error would stand twice in the traceback.
        try:
            raise told from told.original
        finally:
            del told  # which holds this frame

    return told_step


def _told(error: RateLimitExceeded | BackendUnavailable) -> Any:
    http: type[HTTPException]
    seconds: int | None
    if isinstance(error, RateLimitExceeded):
        seconds = None if error.result is None else max(1, math.ceil(error.result.retry_after))
        http, response, description = TooManyRequests, _too_many(error, seconds), str(error)
    else:
        seconds = 1
        http, response, description = ServiceUnavailable, _unavailable(seconds), _UNAVAILABLE
    told = {"original": error, "description": description, "response": response, "retry_after": seconds}
    try:
        found = _twin(error, type(error), http, told)
    except (AttributeError, TypeError):  # a class of the app's that takes no subclass, say: a 429 all the same
        found = _twin(error, RateLimitExceeded if http is TooManyRequests else BackendUnavailable, http, told)
    request.__dict__[_REFUSED] = response.status_code, seconds
    return found.with_traceback(error.__traceback__)


def _twin(error: GovRedisError, original: Any, http: Any, told: dict[str, Any]) -> Any:
    kind = _http_class(original, http)
    found = kind.__new__(kind, *error.args)
    for name, value in (*error.__dict__.items(), *told.items()):
        setattr(found, name, value)
    return found


def _keep_retry_after(response: Response) -> Response:
    status, seconds = request.__dict__.get(_REFUSED, (None, None))
    if response.status_code == status and seconds is not None:
        response.headers.setdefault("Retry-After", str(seconds))
    return response


def _too_many(error: RateLimitExceeded, seconds: int | None) -> Response:
    violated = []
    if error.result is not None:
        # The operation is known for the decorator's limits alone: `require` in a view does not tell it.
        names = [met.name() for met in met_limits() if met.result is error.result]
        violated = names or [str(error.result.limit)]
    return problem(
        HTTPStatus.TOO_MANY_REQUESTS,
        str(error),
        seconds,
        type=_QUOTA_EXCEEDED,
        title="Request cannot be satisfied as assigned quota has been exceeded",
        **{"violated-policies": violated},
    )


#: The text of the error names hosts.
_UNAVAILABLE = "a service that this request needs is away for the moment"


def _unavailable(seconds: int) -> Response:
    return problem(HTTPStatus.SERVICE_UNAVAILABLE, _UNAVAILABLE, seconds)


def problem(status: HTTPStatus, detail: str, retry_after: int | None = None, **members: Any) -> Response:
    """A response of RFC 9457, or the same as a page or a text, by Accept. `retry_after`: seconds."""
    kind = request.accept_mimetypes.best_match(_OFFERED, _PROBLEM)
    if kind == _HTML:
        title = escape(f"{status.value} {status.phrase}")
        body = f"<!doctype html>\n<html lang=en>\n<title>{title}</title>\n<h1>{title}</h1>\n<p>{escape(detail)}</p>\n"
    elif kind == _TEXT:
        body = f"{status.value} {status.phrase}: {detail}\n"
    else:
        kind = _PROBLEM
        body = json.dumps(
            {"type": "about:blank", "title": status.phrase, "status": status, "detail": detail, **members}
        )
    headers = {"Vary": "Accept"} if retry_after is None else {"Vary": "Accept", "Retry-After": str(retry_after)}
    return Response(body, status, headers, content_type=kind if kind == _PROBLEM else f"{kind}; charset=utf-8")
