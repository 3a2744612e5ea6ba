"""What the responses of limited Flask views tell of their limits."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import quote

from flask import Response, after_this_request, request

from ..limits import Limit, RateLimitResult

#: An attribute of the request object; see _AGENT in flask.py.
_HITS = "govredis.hits"


@dataclass(slots=True)
class Hit:
    """One limit that this request met. Fields as in draft-ietf-httpapi-ratelimit-headers-11 (May 2026)."""

    operation: str
    limits: Sequence[Limit]
    result: RateLimitResult
    #: Gives it back where the response says so, and returns what a result would say then.
    settle: Callable[[Response, RateLimitResult], RateLimitResult]

    def name(self) -> str:
        """Of the policy that decided."""
        return _policy(self.operation, self.result.limit)[0]

    def policies(self) -> str:
        """Of RateLimit-Policy."""
        return ", ".join([_policy(self.operation, limit)[1] for limit in self.limits])

    def service_limit(self) -> str:
        """The item of RateLimit: of the limit that decided."""
        result = self.result
        t = math.ceil(result.reset_after if result.allowed else result.retry_after)
        return f'"{self.name()}";r={result.remaining};t={t}'


@functools.lru_cache(maxsize=1024)
def _policy(operation: str, limit: Limit) -> tuple[str, str]:
    """A policy's name, and its item of RateLimit-Policy.

    The name is fit for a String of RFC 9651 as it is, so that header and body have the same. A window of a part of a
    second has no `w`: the draft knows whole ones only.
    """
    name = quote(f"{operation}: {limit}", safe=" !#$&'()*+,/:;<=>?@[]^`{|}~")
    w = f";w={limit.window:.0f}" if limit.window == int(limit.window) else ""
    return name, f'"{name}";q={limit.count}{w}'


def note(hit: Hit) -> None:
    """Have the response tell of it, and of those before."""
    hits: list[Hit] | None = request.__dict__.get(_HITS)
    if hits is None:
        hits = request.__dict__[_HITS] = []
        after_this_request(_tell_limits)
    hits.append(hit)


def _tell_limits(response: Response) -> Response:
    hits = hits_of_request()
    for hit in hits:
        hit.result = hit.settle(response, hit.result)
    response.headers.add("RateLimit-Policy", ", ".join([hit.policies() for hit in hits]))
    response.headers.add("RateLimit", ", ".join([hit.service_limit() for hit in hits]))
    return response


def hits_of_request() -> list[Hit]:
    hits: list[Hit] = request.__dict__.get(_HITS, [])
    return hits
