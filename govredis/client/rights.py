"""The right that an ACL does not give us, found by the commands that we sent and Redis's answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from ..errors import BackendError, NoRight
from .commands import CONTAINERS, SOURCES, commands_in_script, unpack_commands

#: Redis refuses a script's own commands in other words, which up to 7.0 do not name them.
_REFUSED = re.compile(r"has no permissions to|The user executing the script can't")
_OF_KEYS = re.compile(r"can't access|permissions to access")
_OF_COMMAND = re.compile(r"run the '([^']+)' command")
#: All arguments of these commands are keys.
_OF_SEVERAL_KEYS = {"DEL", "EXISTS", "MGET"}


def error_of_text(name: str, text: str, packed: bytes, pattern: Callable[[str], str]) -> BackendError:
    """An error reply, in our words, by its text: NoRight where an ACL has refused.

    Args:
        name: the server's.
        packed: the commands; the answer is to one of them.
        pattern: gives the glob of all keys of a key's kind.
    """
    if not _REFUSED.search(text):
        return BackendError(f"{name} answered: {text}")
    needed = _missing(text, packed, pattern)
    lacks = "does not allow this"
    if needed:
        lacks = f"lacks one or more of {needed}" if " " in needed else f"lacks {needed}"
    return NoRight(
        f"{name} answered: {text}: the ACL of our user {lacks};"
        " `govredis doctor --acl` prints the rights that each feature needs;"
        " give it --namespace for each cache of yours"
    )


def _missing(text: str, packed: bytes, pattern: Callable[[str], str]) -> str:
    """The rights in the words of ACL SETUSER, one or more of them missing; "" where the answer does not tell."""
    commands = [[word.decode(errors="replace") for word in command] for command in unpack_commands(packed)]
    if _OF_KEYS.search(text):
        found = {f"~{pattern(key)}" for command in commands for key in _keys(command)}
    elif named := _OF_COMMAND.search(text):
        # Redis 6 does not name the second word.
        known = {name for command in commands if (name := _name(command)).partition("|")[0] == named[1].lower()}
        found = {f"+{name}" for name in known or {named[1]}}
    else:
        sources = [source for command in commands if (source := _script(command)) is not None]
        found = {f"+{name}" for source in sources for name in commands_in_script(source)}
    return " ".join(sorted(found))


def _keys(command: list[str]) -> Iterator[str]:
    name, *words = command
    if name in {"EVAL", "EVALSHA"}:
        yield from words[2 : 2 + int(words[1])]
    elif name in _OF_SEVERAL_KEYS:
        yield from words
    elif name not in CONTAINERS:
        yield from words[:1]


def _name(command: list[str]) -> str:
    return "|".join(command[: 1 + (command[0] in CONTAINERS)]).lower()


def _script(command: list[str]) -> str | None:
    if command[0] == "EVALSHA":
        return SOURCES.get(command[1])
    return command[1] if command[0] == "EVAL" else None
