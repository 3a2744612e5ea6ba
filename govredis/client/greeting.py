"""The first commands of a connection: AUTH or HELLO, and SELECT. No password stands in their errors."""

from __future__ import annotations

import re
from typing import Any

import redis

from .._secrets import chain
from .mapping import TOO_MANY
from .wire import ClosedGreeting

#: The first words of Redis's errors, except those that redis-py takes off.
_ERROR_WORD = re.compile(
    r"(?:BUSY|CLUSTERDOWN|DENIED|ERR|LOADING|MASTERDOWN|MISCONF|NOAUTH|NOPERM|NOPROTO|OOM|READONLY|WRONGPASS)(?= |$)"
)
#: Texts of Redis's own in its answers, which hold no password.
_OWN_TEXTS = (
    "invalid username-password pair or user is disabled",
    "without any password configured for the default user",
)


def greet(connection: Any) -> None:
    """Have redis-py say AUTH, or HELLO, and SELECT.

    A reply to the first two may echo the password, or any part of it. Our errors quote no more of such a reply than
    texts of Redis's own and the first words of its errors.
    """
    asked: tuple[str, ...] = ("",)

    def send_command(*args: Any, **options: Any) -> None:
        nonlocal asked
        asked = args[:1] if args[0] == "AUTH" else (args[0], str(args[1]))
        send(*args, **options)

    send, connection.send_command = connection.send_command, send_command
    try:
        connection.on_connect()
    except redis.RedisError as error:
        if type(error) is redis.ConnectionError and TOO_MANY not in str(error):
            raise ClosedGreeting(asked, str(error)) from error
        if asked[0] in {"AUTH", "HELLO"}:
            for each in chain(error, redis.RedisError):
                _unquote(each, asked[0])
        raise
    finally:
        del connection.send_command


def greet_primary(connection: Any) -> None:
    """`greet`, and refuse a server that says it is a replica. An ACL may forbid the question: then it is believed."""
    greet(connection)
    try:
        connection.send_command("ROLE")
        role, *_ = connection.read_response()
    except redis.exceptions.NoPermissionError:
        return
    if role != b"master":
        raise redis.ConnectionError("it is a replica, or becomes one")


def _unquote(error: BaseException, asked: str) -> None:
    said = str(error)
    if TOO_MANY in said:
        error.args = (TOO_MANY,)
    elif type(error) not in {redis.ConnectionError, redis.TimeoutError}:  # these say how the connection ended
        word = _ERROR_WORD.match(said)
        own = next((f"{text}," for text in _OWN_TEXTS if text in said), None)
        error.args = (f"{own or (word[0] if word else 'an error')} in answer to {asked}",)
