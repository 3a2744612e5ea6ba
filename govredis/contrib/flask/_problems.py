"""Responses of RFC 9457 (application/problem+json) in place of our errors."""

from __future__ import annotations

import json
import math
from http import HTTPStatus
from typing import Any

from flask import Response

from ...errors import BackendUnavailable, RateLimitExceeded
from ._limit_headers import met_limits

_QUOTA_EXCEEDED = "https://iana.org/assignments/http-problem-types#quota-exceeded"


def too_many(error: RateLimitExceeded) -> Response:
    violated, headers = [], {}
    if error.result is not None:
        # The operation is known for the decorator's limits alone: `require` in a view does not tell it.
        names = [met.name() for met in met_limits() if met.result is error.result]
        violated = names or [str(error.result.limit)]
        headers["Retry-After"] = str(max(1, math.ceil(error.result.retry_after)))
    return problem(
        HTTPStatus.TOO_MANY_REQUESTS,
        str(error),
        headers,
        type=_QUOTA_EXCEEDED,
        title="Request cannot be satisfied as assigned quota has been exceeded",
        **{"violated-policies": violated},
    )


def unavailable(error: BackendUnavailable) -> Response:
    # The text of the error names hosts.
    said = "a service that this request needs is away for the moment"
    return problem(HTTPStatus.SERVICE_UNAVAILABLE, said, {"Retry-After": "1"})


def problem(status: HTTPStatus, detail: str, headers: dict[str, str] | None = None, **members: Any) -> Response:
    """A response of RFC 9457."""
    body = {"type": "about:blank", "title": status.phrase, "status": status, "detail": detail, **members}
    return Response(json.dumps(body), status, headers, content_type="application/problem+json")
