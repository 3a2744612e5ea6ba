"""The rights of our user of Redis, and of our role of PostgreSQL."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..._acl import Rights, rights
from ...api import GovRedis
from ...client import RedisNode
from ...errors import BackendError, BackendUnavailable
from ._diagnosis import Diagnosis, Fact

if TYPE_CHECKING:
    from ...postgres import Postgres

_COMMAND_REFUSED = re.compile(r"to run|can't run|no permissions.*command", re.IGNORECASE)

#: The grants of docs/metadata.md that the role lacks: the kind of object, its name, and the privilege.
_LACKING = """
SELECT 'SCHEMA', n.nspname::text, 'USAGE' FROM pg_catalog.pg_namespace n
WHERE n.nspname = %s AND NOT pg_catalog.has_schema_privilege(n.oid, 'USAGE')
UNION ALL
SELECT 'TABLE', c.relname::text, p.name FROM pg_catalog.pg_class c
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
CROSS JOIN pg_catalog.unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) p(name)
WHERE n.nspname = %s AND c.relname LIKE 'govredis\\_%%' AND c.relkind IN ('r', 'p') AND NOT c.relispartition
    AND NOT pg_catalog.has_table_privilege(c.oid, p.name)
UNION ALL
SELECT 'SEQUENCE', c.relname::text, 'USAGE' FROM pg_catalog.pg_class c
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = %s AND c.relname LIKE 'govredis\\_%%'
    AND CASE WHEN c.relkind = 'S' THEN NOT pg_catalog.has_sequence_privilege(c.oid, 'USAGE') END
UNION ALL
SELECT 'FUNCTION', f.proname::text, 'EXECUTE' FROM pg_catalog.pg_proc f
JOIN pg_catalog.pg_namespace n ON n.oid = f.pronamespace
WHERE n.nspname = %s AND f.proname LIKE 'govredis\\_%%' AND NOT pg_catalog.has_function_privilege(f.oid, 'EXECUTE')
ORDER BY 1, 2, 3
"""


def of_redis_user(
    gov: GovRedis, redis: RedisNode, features: Sequence[str], namespaces: Sequence[str]
) -> Iterator[Fact | Diagnosis]:
    """The rights of `govredis doctor --acl` that our user lacks, as far as Redis tells. Raises BackendUnavailable."""
    here = [feature for feature in features if feature != "celery" or gov.config.parking_url is None]
    wanted = rights(gov.config, here, namespaces)
    try:
        user = redis.call("ACL", "WHOAMI").decode(errors="replace")
        lacking = _by_user(redis, user, wanted)
        if lacking is None:
            lacking = _by_trying(redis, user, wanted)
    except BackendUnavailable:
        raise
    except BackendError as error:
        yield Diagnosis(
            "acl",
            f"nobody knows whether our user may do all that it must: {error}",
            "a right that is missing shows at the first call that needs it",
            "compare ACL LIST with `govredis doctor --acl`, or allow our user +acl|whoami +acl|getuser +acl|cat",
            is_fault=False,
        )
        return
    if not lacking:
        yield Fact("acl", f"the user {user} may do all of {', '.join(here)}")
        return
    yield Diagnosis(
        "acl",
        f"the user {user} lacks {' '.join(lacking)}",
        f"a feature fails with BackendError at the first call that needs one; looked at: {', '.join(here)}",
        f"ACL SETUSER {user} {' '.join(lacking)}; or name the features in use, with --feature",
    )


def _by_user(redis: RedisNode, user: str, wanted: Rights) -> list[str] | None:
    """The missing rights, by the rules of the user; None where these do not tell."""
    try:
        reply = redis.call("ACL", "GETUSER", user)
        told: dict[str, Any] = {name.decode(): value for name, value in zip(reply[::2], reply[1::2], strict=True)}
        is_allowed = _allowed(redis, told.get("commands", b"").decode().split())
    except BackendUnavailable:
        raise
    except BackendError:
        return None
    keys = told.get("keys", b"")
    # Redis 6 has a list, without "~"; Redis 7 a text.
    patterns = [f"~{key.decode()}" for key in keys] if isinstance(keys, list) else keys.decode().split()
    if told.get("selectors"):
        return None
    if "~*" not in patterns and not {f"~{pattern}" for pattern in wanted.patterns} <= set(patterns):
        return None  # a wider pattern may have it
    return [f"+{name}" for name in sorted(wanted.commands) if not is_allowed(name)]


def _allowed(redis: RedisNode, rules: Iterable[str]) -> Callable[[str], bool]:
    """Whether the rules of a user allow a command. Raises BackendError where they name categories that we may not
    look up."""
    everything, added, removed = False, set[str](), set[str]()
    for rule in rules:
        sign, name = rule[:1], rule[1:].lower()
        names = {name}
        if name == "@all":
            everything, names = sign == "+", set()
            added.clear()
            removed.clear()
        elif name.startswith("@"):
            names = {each.decode() for each in redis.call("ACL", "CAT", name[1:])}
        gains, loses = (added, removed) if sign == "+" else (removed, added)
        gains |= names
        loses -= names

    def is_allowed(name: str) -> bool:
        words = {name, name.partition("|")[0]}
        return bool(words & added) or (everything and not words & removed)

    return is_allowed


def _by_trying(redis: RedisNode, user: str, wanted: Rights) -> list[str]:
    """The missing rights, by ACL DRYRUN of Redis 7, which carries nothing out. Raises BackendError."""
    lacking = []
    for name in sorted(wanted.commands):
        words = name.split("|")
        (about,) = redis.call("COMMAND", "INFO", name)
        least = len(words) if about is None else abs(about[1])
        if not _tried(redis, user, *words, *["1"] * (least - len(words)), of_command=True):
            lacking.append(f"+{name}")
    if "+evalsha" in lacking:
        return lacking  # keys are tried by it
    for pattern in sorted(wanted.patterns):
        if not _tried(redis, user, "EVALSHA", "0", "1", _key_of(pattern), of_command=False):
            lacking.append(f"~{pattern}")
    return lacking


def _tried(redis: RedisNode, user: str, *command: str, of_command: bool) -> bool:
    reply = redis.call("ACL", "DRYRUN", user, *command)
    return reply == b"OK" or bool(_COMMAND_REFUSED.search(reply.decode(errors="replace"))) is not of_command


def _key_of(pattern: str) -> str:
    """A key that the glob matches."""
    return re.sub(r"\\(.)", r"\1", pattern.replace("*", "x"))


def of_postgres_role(gov: GovRedis, postgres: Postgres) -> Iterator[Fact | Diagnosis]:
    """The grants of docs/metadata.md that our role lacks. Raises BackendError."""
    schema = gov.config.schema
    ((role,),) = postgres.fetch("SELECT current_user::text")
    lacking: dict[tuple[str, str], list[str]] = {}
    for kind, name, privilege in postgres.fetch(_LACKING, (schema,) * 4):
        lacking.setdefault((kind, name), []).append(privilege)
    if not lacking:
        yield Fact("grants", f"the role {role} has all of them in the schema {schema}")
        return
    named = [f"{', '.join(privileges)} on {name}" for (_, name), privileges in lacking.items()]
    yield Diagnosis(
        "grants",
        f"the role {role} lacks {'; '.join(named)}",
        "the calls that need one fail with BackendError: permission denied",
        " ".join(_grant(kind, schema, name, privileges, role) for (kind, name), privileges in lacking.items())
        + " as the role that runs `govredis migrate`",
    )


def _grant(kind: str, schema: str, name: str, privileges: Sequence[str], role: str) -> str:
    on = f'"{schema}"' if kind == "SCHEMA" else f'"{schema}".{name}'
    return f'GRANT {", ".join(privileges)} ON {kind} {on} TO "{role}";'
