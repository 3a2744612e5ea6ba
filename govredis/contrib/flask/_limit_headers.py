"""The RateLimit headers of limited Flask views."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import quote

from flask import Response, after_this_request, request

from ...limits import Limit, RateLimitResult

#: An attribute of the request object; see _VISIT in _logins.py.
_MET = "govredis.met_limits"


@dataclass(slots=True)
class MetLimit:
    """A limit that this request met. Headers as in draft-ietf-httpapi-ratelimit-headers-11 (May 2026)."""

    operation: str
    limits: Sequence[Limit]
    result: RateLimitResult
    #: Gives the hit back where the response says so, and returns the result to report then.
    settle: Callable[[Response, RateLimitResult], RateLimitResult]

    def name(self) -> str:
        """The name of the policy that decided."""
        return _policy(self.operation, self.result.limit)[0]

    def policies(self) -> str:
        """Its items of RateLimit-Policy."""
        return ", ".join([_policy(self.operation, limit)[1] for limit in self.limits])

    def service_limit(self) -> str:
        """Its item of RateLimit, which reports the limit that decided."""
        result = self.result
        t = math.ceil(result.reset_after if result.allowed else result.retry_after)
        return f'"{self.name()}";r={result.remaining};t={t}'


@functools.lru_cache(maxsize=1024)
def _policy(operation: str, limit: Limit) -> tuple[str, str]:
    """A policy's name, and its item of RateLimit-Policy.

    The name is fit for a String of RFC 9651 as it is, so that header and body have the same. A window that is no whole
    number of seconds has no `w`: the draft knows whole seconds only.
    """
    name = quote(f"{operation}: {limit}", safe=" !#$&'()*+,/:;<=>?@[]^`{|}~")
    w = f";w={limit.window:.0f}" if limit.window == int(limit.window) else ""
    return name, f'"{name}";q={limit.count}{w}'


def report(met: MetLimit) -> None:
    """Have the response report it, after those that the request met before."""
    all_met: list[MetLimit] | None = request.__dict__.get(_MET)
    if all_met is None:
        all_met = request.__dict__[_MET] = []
        after_this_request(_add_headers)
    all_met.append(met)


def _add_headers(response: Response) -> Response:
    all_met = met_limits()
    for met in all_met:
        met.result = met.settle(response, met.result)
    response.headers.add("RateLimit-Policy", ", ".join([met.policies() for met in all_met]))
    response.headers.add("RateLimit", ", ".join([met.service_limit() for met in all_met]))
    return response


def met_limits() -> list[MetLimit]:
    """The limits that this request has met so far."""
    found: list[MetLimit] = request.__dict__.get(_MET, [])
    return found
