"""Commands as they are sent, and scripts."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import TypeAlias

import hiredis

# No numbers: if a signal handler raises while hiredis (3.5) makes a number a text, the process ends with a segmentation
# fault.
Arg: TypeAlias = str | bytes
Command: TypeAlias = tuple[Arg, ...]

# Its stub says a tuple of one.
pack_command: Callable[[Command], bytes] = hiredis.pack_command  # type: ignore[assignment]


def names_of(packed: bytes) -> list[bytes]:
    """The names of the commands in `packed`."""
    return [command[0] for command in unpack_commands(packed)]


def unpack_commands(packed: bytes) -> list[list[bytes]]:
    """The commands in `packed`, with their arguments."""
    reader = hiredis.Reader()
    reader.feed(packed)
    return list(iter(reader.gets, False))


#: Commands whose second word is part of the name, for an ACL too.
CONTAINERS = {"CLIENT", "CLUSTER", "SCRIPT", "SLOWLOG"}
_IN_SCRIPT = re.compile(r"redis\.p?call\(\s*['\"](\w+)['\"]")
#: The source of each script that this process has made, by its digest.
SOURCES: dict[str, str] = {}


def commands_in_script(source: str) -> set[str]:
    """The commands that a script runs, in small letters: an ACL must allow these too."""
    return {name.lower() for name in _IN_SCRIPT.findall(source)}


@functools.cache
def _read(feature: str, filename: str) -> str:
    """Each GovRedis makes all scripts: reading them anew took most of that time."""
    return (files(feature) / "lua" / filename).read_text(encoding="utf-8")


class Script:
    """A Lua script of a feature.

    Args:
        package: the `__package__` of the module that runs it: the feature's, or a package within the feature. Scripts
            lie in the feature's folder `lua`.
        filenames: the .lua files that make it up, in order.
    """

    __slots__ = ("sha", "source")

    def __init__(self, package: str, *filenames: str) -> None:
        feature = ".".join(package.split(".")[:2])
        self.source: str = "\n".join(_read(feature, filename) for filename in filenames)
        self.sha: str = hashlib.sha1(self.source.encode(), usedforsecurity=False).hexdigest()
        SOURCES[self.sha] = self.source

    def call(self, keys: Sequence[str], args: Sequence[Arg]) -> Command:
        """The EVALSHA command."""
        return ("EVALSHA", self.sha, str(len(keys)), *keys, *args)


def with_source(command: Command) -> Command:
    """A script's command, with EVAL and the source in place of EVALSHA and the digest."""
    return ("EVAL", SOURCES[str(command[1])], *command[2:])


def with_sources(packed: Sequence[bytes], scripts: Sequence[Script], *, always: bool) -> list[bytes]:
    """The commands, with EVAL and the source in place of EVALSHA and the digest of these scripts.

    Args:
        always: False: only at the first run of each script; the server knows it from then on.
    """
    sources = {script.sha.encode(): script.source for script in scripts}
    changed = []
    for command in packed:
        ((name, *arguments),) = unpack_commands(command)
        if name == b"EVALSHA" and arguments[0] in sources:
            source = sources[arguments[0]] if always else sources.pop(arguments[0])
            command = pack_command(("EVAL", source, *arguments[1:]))
        changed.append(command)
    return changed
