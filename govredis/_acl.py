"""The rights that a user of Redis needs for each feature, in the words of Redis's ACLs.

There is no list to keep: the sources of each feature have their commands, scripts and kinds of keys as literals. A
script has its commands, which an ACL must allow too. A test compares the result with all commands that are really sent.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.resources import files
from inspect import signature
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import parse_qs, urlsplit

from .client.commands import CONTAINERS, commands_in_script
from .config import Config, address_of
from .keys import Keys, check_namespace, sibling

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable  # of Python 3.11 and newer

#: Each feature is a folder, except Celery's parked tasks.
FEATURES = ("sessions", "locks", "limits", "metadata", "events", "health", "celery")

#: Files of a feature's folder that another part of the deployment needs: "outbox" and "relay" with PostgreSQL, "local"
#: with GOVREDIS_LOCAL_CACHE, "shard" on a Cluster, "celery" for tasks under limits, "account" in any case.
_PARTS = {
    "events/relay.py": "relay",
    "health/account.py": "account",
    "health/account_redis.py": "account",
    "limits/parked.py": "celery",
    "metadata/local.py": "local",
    "metadata/tracking.py": "local",
    "metadata/verify.py": "outbox",
    "outbox/shard.py": "shard",
    "sessions/backends/row_cache.py": "outbox",
}
#: The part of the client that a Cluster needs.
_CLUSTER = "client/cluster/"
_COMMAND = re.compile(r"[A-Z]{2,}")
_SCRIPT = re.compile(r"\w+\.lua")
#: The names of a client in the sources.
_CLIENTS = {"redis", "_redis", "client", "_client", "node", "_node"}


class Named(NamedTuple):
    """The commands and keys that a piece of source names."""

    commands: frozenset[str]
    scripts: frozenset[str] = frozenset()
    kinds: frozenset[str] = frozenset()
    #: Methods of the client.
    calls: frozenset[str] = frozenset()

    def __or__(self, other: Named) -> Named:
        return Named(*(mine | theirs for mine, theirs in zip(self, other, strict=True)))


class Rights(NamedTuple):
    """The rights of a user: the names of commands, in small letters, and the globs of keys."""

    commands: frozenset[str]
    patterns: frozenset[str]

    def rules(self) -> str:
        """The rules of ACL SETUSER, for Redis 6.2 and newer. We use no channels.

        No rule begins with a minus: redis-cli --cluster takes such a word for an option of its own.
        """
        patterns = " ".join(f"~{pattern}" for pattern in sorted(self.patterns))
        commands = " ".join(f"+{command}" for command in sorted(self.commands))
        return f"resetkeys {patterns} resetchannels nocommands {commands}"


def rights(config: Config, features: Iterable[str] = FEATURES, namespaces: Iterable[str] = ("agent_meta",)) -> Rights:
    """The rights that these features need under these settings.

    Args:
        namespaces: of the caches, where "metadata" is among the features.

    With PostgreSQL, "sessions" and "metadata" need each other's rights: the process that tells Redis of changes tells
    of both.
    """
    address, parts = address_of(config), {*features, "account"}
    if config.database_url is not None and parts & {"sessions", "metadata"}:
        parts |= {"sessions", "metadata", "outbox"} | ({"shard"} if address.nodes else set())
    if config.database_url is not None and "events" in parts:
        parts.add("relay")
    if config.local_cache and "metadata" in parts:
        parts.add("local")
    named = _of_client("") | Named(frozenset(), kinds=frozenset({"probe"}))
    for part in parts:
        named |= _of_part(part)
    for method in named.calls - (set() if config.confirm else {"run_confirmed"}):
        named |= _of_client(method)
    commands = set(named.commands)
    if named.scripts:
        commands.add("evalsha")
    if _database(address.url):
        commands.add("select")
    if address.sentinels is not None:
        commands.add("role")
    if address.nodes:
        commands |= _of_cluster().commands
    keys, names = Keys(config.key_prefix), [check_namespace(name) for name in namespaces]
    tag = "x" if address.nodes else ""
    patterns = (_patterns(keys, kind, names, tag) for kind in named.kinds)
    return Rights(frozenset(commands), frozenset().union(*patterns))


def _database(url: str) -> bool:
    """Does the URL name another database than 0, so that SELECT is needed?"""
    parts = urlsplit(url)
    named = parse_qs(parts.query).get("db", [""])[0] or ("" if parts.scheme == "unix" else parts.path.strip("/"))
    return named not in ("", "0")


def _patterns(keys: Keys, kind: str, namespaces: list[str], tag: str) -> set[str]:
    made = getattr(keys, kind)
    declared = signature(made)
    given_for = {"namespace": namespaces, "tag": [tag]}
    taken = [given_for.get(name, ["x"]) for name in declared.parameters]
    plain = [made(*given) for given in itertools.product(*taken)]
    if declared.return_annotation == "Tag":
        plain = [f"{{{key}}}" for key in plain]
        beside = [f"{key}:x" for key in plain]
    elif declared.return_annotation == "Siblings":
        plain, beside = [], [sibling(key, "x") for key in plain]
    else:
        beside = [sibling(key, "x") for key in plain if declared.return_annotation == "KeyAndSiblings"]
    return set(map(keys.pattern, [*plain, *beside]))


#: The methods of Keys that make keys in Redis.
_KINDS = {
    name
    for name, method in vars(Keys).items()
    if callable(method) and signature(method).return_annotation in {"Key", "KeyAndSiblings", "Siblings", "Tag"}
}


# -- reading sources -------------------------------------------------------------------------------------------------


def sources() -> Iterator[tuple[str, str, str]]:
    """The sources of all features: the part, the path and the text of each."""
    for feature in ("sessions", "locks", "limits", "outbox", "metadata", "events", "health"):
        for path, file in _python_files(files(__package__) / feature, feature):
            yield _PARTS.get(path, feature), path, file.read_text(encoding="utf-8")


def _python_files(folder: Traversable, path: str) -> Iterator[tuple[str, Traversable]]:
    """The .py files of a folder and of the folders in it, with their paths; `path` is the folder's own."""
    found = [file for file in folder.iterdir() if file.name.endswith(".py")]
    if not found:
        raise RuntimeError(f"the sources of {path} are missing: the rights that they need cannot be read from them")
    for file in found:
        yield f"{path}/{file.name}", file
    for inner in folder.iterdir():
        if inner.is_dir() and inner.name not in ("lua", "__pycache__"):
            yield from _python_files(inner, f"{path}/{inner.name}")


@cache
def _of_part(part: str) -> Named:
    named = Named(frozenset())
    for its_part, path, text in sources():
        if its_part == part:
            mine = look(ast.parse(text))
            folder = files(__package__) / path.partition("/")[0] / "lua"
            for script in mine.scripts:
                mine |= Named(frozenset(commands_in_script((folder / script).read_text(encoding="utf-8"))))
            named |= mine
    return named


@cache
def _of_client(method: str) -> Named:
    """The commands that a method of the client sends, itself or by others; "": those of connecting and of probes."""
    methods: dict[str, list[ast.AST]] = {}
    rest = Named(frozenset())
    for path, file in _python_files(files(__package__) / "client", "client"):
        if path.startswith(_CLUSTER):
            continue
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name in {"RedisNode", "RoundTrips"}:
                for each in node.body:
                    methods.setdefault(getattr(each, "name", ""), []).append(each)
            elif not isinstance(node, ast.ClassDef) or node.name not in {"Script", "Primary"}:  # that asks Sentinels
                rest |= look(node)

    def reach(name: str, seen: set[str]) -> None:
        if name not in seen and name in methods:
            seen.add(name)
            for each in itertools.chain(*map(ast.walk, methods[name])):
                if isinstance(each, ast.Attribute) and _name(each.value) == "self":
                    reach(each.attr, seen)

    called: set[str] = set()
    if method:
        reach(method, called)
        rest = Named(frozenset())
    else:
        public: set[str] = set()
        for name in methods:
            if name and not name.startswith("_"):
                reach(name, public)
        called = methods.keys() - public
    for name in called:
        for definition in methods[name]:
            rest |= Named(look(definition).commands)
    return rest


@cache
def _of_cluster() -> Named:
    """The commands that only a client of a Cluster sends."""
    named = Named(frozenset())
    for path, file in _python_files(files(__package__) / "client", "client"):
        if path.startswith(_CLUSTER):
            named |= look(ast.parse(file.read_text(encoding="utf-8")))
    return Named(named.commands)


def look(tree: ast.AST) -> Named:
    """The names in a piece of source: commands in tuples or in `call`, scripts, kinds of keys, methods of a client."""
    commands, scripts, kinds, calls = set(), set(), set(), set()
    more = {node.value for node in ast.walk(tree) if isinstance(node, ast.AugAssign)}  # words of a command before
    for node in ast.walk(tree):
        words: list[ast.expr] = []
        if isinstance(node, ast.Tuple | ast.List) and node not in more:
            words = node.elts
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner, method = _name(node.func.value), node.func.attr
            if owner in {"keys", "_keys"} and method in _KINDS:
                kinds.add(method)
            if owner in _CLIENTS and (method != "pipeline" or len(node.args) > 1):  # with scripts, which it loads
                calls.add(method)
                words = node.args if method == "call" else []
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and _SCRIPT.fullmatch(node.value):
            scripts.add(node.value)
        if words and (command := _command(words)):
            commands.add(command)
    return Named(*map(frozenset, (commands, scripts, kinds, calls)))


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _command(words: list[ast.expr]) -> str | None:
    first, *rest = [word.value if isinstance(word, ast.Constant) else None for word in words]
    if not isinstance(first, str) or not _COMMAND.fullmatch(first):
        return None
    return f"{first}|{rest[0]!s}".lower() if first in CONTAINERS else first.lower()
