"""The errors of redis-py, in our words. This file alone decides which of them mean "Redis is away"."""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable

import redis

from .._secrets import Secrets
from ..breaker import CircuitBreaker, Rejected
from ..errors import BackendError, BackendUnavailable, NotTaken
from .rights import error_of_text
from .wire import NoCredentials, SentinelMistake

# Answers of a server that is up but cannot serve now. Redis 6.2 wraps the errors of a script's commands in
# "ERR Error running script ... -READONLY ..."; 7.0 and newer pass them through.
_CANNOT_SERVE_NOW = re.compile(
    r"(?:^|[\s@:-])(LOADING|READONLY|MISCONF|OOM|CLUSTERDOWN|MASTERDOWN|TRYAGAIN|NOREPLICAS|BUSY|UNBLOCKED) "
)
_CANNOT_WRITE = {"READONLY", "MISCONF", "OOM", "NOREPLICAS"}
# redis-py takes the first word off the errors that it knows.
_CANNOT_WRITE_CLASSES = (redis.exceptions.ReadOnlyError, redis.exceptions.OutOfMemoryError)
_CANNOT_SERVE_CLASSES = (
    *_CANNOT_WRITE_CLASSES,
    redis.exceptions.ClusterDownError,  # MasterDownError is one
    redis.exceptions.TryAgainError,
)

# Answers of a proxy that cannot reach Redis: twemproxy, in the system's words, and Envoy.
_PROXY_ALONE = re.compile(
    r"(?:ERR )?(?:Connection (?:refused|reset by peer|timed out)|Broken pipe|Host is down|No route to host"
    r"|Network is unreachable|no upstream host|upstream failure)"
)

#: The answer to a command that a proxy does not take, Envoy's to BLPOP say, or that redis.conf has renamed.
_UNKNOWN = re.compile(r"(?:ERR )?unknown command ")

#: Redis's answer to a client beyond maxclients.
TOO_MANY = "max number of clients"
#: Redis's answer, instead of NOAUTH, to more than ten arguments from a client that has not logged in.
_UNAUTHENTICATED = re.compile(r"unauthenticated (?:multi)?bulk length")

REJECTED = (redis.exceptions.AuthenticationError, redis.exceptions.AuthorizationError)


class NoScript(BackendError):
    """The server does not know the script yet. Never leaves this package."""


class RedisErrorMapping:
    """Maps the errors of one client, and tells its breaker.

    Args:
        name: the server's, for the errors.
        secrets: the passwords that no error may show.
        breaker: hears that there was no answer.
        pattern: gives the glob of all keys of a key's kind.
        tls: is the connection encrypted?
    """

    def __init__(
        self, name: str, secrets: Secrets, breaker: CircuitBreaker, pattern: Callable[[str], str], *, tls: bool
    ) -> None:
        self._name = name
        self._pattern = pattern
        self._secrets = secrets
        self._breaker = breaker
        self._tls = tls

    def said(self, error: redis.RedisError) -> str:
        return self._secrets.text_of(error, redis.RedisError)

    def of_reply(self, error: redis.ResponseError, packed: bytes = b"") -> BackendError:
        """An error reply to these commands, in our words."""
        if isinstance(error, redis.exceptions.NoScriptError):
            return NoScript()
        text = self.said(error)
        if isinstance(error, redis.exceptions.AskError):  # MovedError is one
            return self._of_cluster("MOVED" if isinstance(error, redis.exceptions.MovedError) else "ASK", text)
        if _UNAUTHENTICATED.search(text):
            return Rejected(f"{self._name} rejected our credentials: Authentication required.")
        if _PROXY_ALONE.fullmatch(text):
            # The probe will hear it too.
            self._breaker.failed(self._breaker.period, text, timed_out=True, kind="refused")
            return BackendUnavailable(f"{self._name} is away: the proxy before it says: {text}")
        found = _CANNOT_SERVE_NOW.search(text)
        if found or isinstance(error, _CANNOT_SERVE_CLASSES):
            writes = isinstance(error, _CANNOT_WRITE_CLASSES) or (found is not None and found[1] in _CANNOT_WRITE)
            self._breaker.cannot_serve("cannot write" if writes else "cannot serve")
            return BackendUnavailable(f"{self._name} cannot serve: {text}")
        if _UNKNOWN.match(text):
            return NotTaken(f"{self._name} answered: {text}")
        return error_of_text(self._name, text, packed, self._pattern)

    def _of_cluster(self, word: str, text: str) -> BackendError:
        """The keys of this node would work, for as long as they stay there. That is no way to start."""
        why = (
            f"{self._name} is a node of a Redis Cluster (it answered {word} {text}): REDIS_CLUSTER must be 1, or the"
            " URL must begin with redis+cluster:// or rediss+cluster://"
        )
        self._breaker.give_up(why)
        return Rejected(why)

    def of_connection(self, error: redis.RedisError, period: int | None) -> BackendError:
        """The error of a call that got no answer, or an answer that ended its connection.

        Args:
            period: of the breaker, which is told; None: it is not.
        """
        text = self.said(error)
        if isinstance(error, REJECTED):
            return Rejected(f"{self._name} rejected our credentials: {text}")
        if isinstance(error, SentinelMistake):
            return Rejected(f"{self._name}: {text}")
        if isinstance(error, redis.InvalidResponse):
            return BackendError(f"{self._name} does not speak Redis: {text}")
        if self._is_tls_mistake(error):
            return Rejected(f"{self._name} cannot be trusted, or does not trust us: {text}")
        if period is not None:
            timed_out = isinstance(error, redis.TimeoutError) or answered(error)
            kind = "hung" if isinstance(error, redis.TimeoutError) else "refused"
            self._breaker.failed(period, text, timed_out=timed_out, kind=kind)
        return BackendUnavailable(f"{self._name} is away: {text}")

    def _is_tls_mistake(self, error: redis.RedisError) -> bool:
        """Is a certificate wrong, or the file that has it? Waiting mends neither."""
        if not self._tls or isinstance(error, NoCredentials):
            return False
        cause = error.__cause__ or error.__context__
        if isinstance(cause, ssl.SSLError):
            return not isinstance(cause, ssl.SSLEOFError | ssl.SSLZeroReturnError | ssl.SSLSyscallError)
        return isinstance(cause, FileNotFoundError | PermissionError | IsADirectoryError)


def answered(error: redis.RedisError) -> bool:
    """Did the server itself say that it cannot be used, in a way that the probe will hear too?"""
    return isinstance(error, redis.exceptions.BusyLoadingError) or is_too_many(error)


def is_too_many(error: redis.RedisError) -> bool:
    """Does the server take no more connections?"""
    return TOO_MANY in str(error)
