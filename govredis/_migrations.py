"""Migrations: the numbered files of schema/, applied in order, each once, to the schema that the settings name."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from typing import Any

from .errors import ConfigurationError

#: Runs a statement, in which @schema@ stands for our schema; returns its rows.
Fetch = Callable[..., list[tuple[Any, ...]]]

#: Serialises the migrations of all processes. Any constant would do that no other program uses: "govredis" in ASCII.
_LOCK = 0x676F767265646973

#: For the transaction. Without it a function or operator of others, in "public" say, might fit a call better than the
#: built-in does, and would run with our rights.
PINNED = "SET LOCAL search_path = pg_catalog, pg_temp; "

_DEFAULT_SCHEMA = '"public"'
# The schema in which the search_path has our tables, when our schema has none.
_ELSEWHERE = """
SELECT c.relnamespace::regnamespace::text FROM pg_class c
WHERE c.oid = to_regclass('govredis_migrations') AND to_regclass('@schema@.govredis_migrations') IS NULL
"""
# Another role's table of that name could run its code when we write to it.
_NOT_OURS = """
SELECT c.oid::regclass::text, pg_get_userbyid(c.relowner) FROM pg_class c
WHERE c.relnamespace = '@schema@'::regnamespace AND c.relname = 'govredis_migrations'
AND pg_get_userbyid(c.relowner) <> current_user
"""
# The owner of a schema may drop other roles' tables, and put tables of the same names there, with triggers: our
# functions would run these with the rights of the migrating role.
_FOREIGN = """
SELECT r.rolname FROM pg_namespace n JOIN pg_roles r ON r.oid = n.nspowner
WHERE n.oid = '@schema@'::regnamespace AND NOT r.rolsuper AND r.rolname NOT IN (current_user, 'pg_database_owner')
AND (NOT pg_has_role(current_user, r.oid, 'MEMBER') OR (SELECT rolsuper FROM pg_roles WHERE rolname = current_user))
"""
# Functions and operators of others in our schema with the names of built-ins. If their arguments fit better, a
# migration with unqualified names would run them, with the rights of the migrating role.
_STANDING_IN = """
SELECT found.name, r.rolname FROM (
    SELECT p.oid::regprocedure::text, p.proowner FROM pg_proc p WHERE p.pronamespace = '@schema@'::regnamespace
        AND p.proname IN (SELECT proname FROM pg_proc WHERE pronamespace = 'pg_catalog'::regnamespace)
    UNION ALL
    SELECT o.oid::regoperator::text, o.oprowner FROM pg_operator o WHERE o.oprnamespace = '@schema@'::regnamespace
        AND o.oprname IN (SELECT oprname FROM pg_operator WHERE oprnamespace = 'pg_catalog'::regnamespace)
    ) found (name, owner) JOIN pg_roles r ON r.oid = found.owner
WHERE r.rolname <> current_user AND NOT r.rolsuper LIMIT 1
"""


# No row where the schema is missing.
_MAY_CREATE = "SELECT has_schema_privilege(oid, 'CREATE') FROM pg_namespace WHERE oid = to_regnamespace('@schema@')"


class Migrations:
    """The migrations of the database of `server`, for one schema and one key prefix.

    Args:
        server: its name, for errors.
        schema: quoted.
    """

    def __init__(self, server: str, schema: str, prefix: str) -> None:
        self._server = server
        self._schema = schema
        self._prefix = prefix
        #: The note that the rows of the prefix have the form of 0012_prefixes.sql; rows of "" need none.
        self._adopted = [f"prefix {prefix}"] if prefix else []

    def apply(self, fetch: Fetch) -> list[str]:
        """Apply the missing ones in one transaction, which `fetch` runs in. See Postgres.migrate."""
        if self._schema == _DEFAULT_SCHEMA:
            self._refuse(
                fetch(_ELSEWHERE),
                "GOVREDIS_SCHEMA is left unset, and our tables in {server} are in schema {}, by the search_path of an"
                " earlier version; it must name that",
            )
        fetch(PINNED)
        if fetch(_MAY_CREATE) == [(False,)]:
            self._refuse(
                [tuple(missing)] if (missing := self.missing(fetch)) else [],
                "{} is missing in schema {schema} of {server}, where this role may not CREATE; `govredis migrate` must"
                " run as the role that ran it first",
            )
            return []
        fetch("SET LOCAL standard_conforming_strings = on")  # a database's own may be off
        fetch("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
        done = self._prepare(fetch)
        applied = []
        for name, sql in read_files():
            if name in done:
                continue
            if "@schema@" in sql:
                fetch(PINNED)
            else:
                fetch("SET LOCAL search_path = @schema@, pg_temp")
                self._refuse(
                    fetch(_STANDING_IN),
                    "schema {schema} of {server} has {}, of {}, which would stand in for a built-in; it must be"
                    " dropped, or GOVREDIS_SCHEMA name a schema of our own",
                )
            fetch(sql)
            fetch("INSERT INTO @schema@.govredis_migrations (name) VALUES (%s)", (name,))
            applied.append(name)
        for name in self._adopted:
            if name not in done:
                fetch("SELECT @schema@.govredis_adopt(%s::text)", (self._prefix,))
                fetch("INSERT INTO @schema@.govredis_migrations (name) VALUES (%s)", (name,))
                applied.append(name)
        return applied

    def missing(self, fetch: Fetch) -> list[str]:
        """The names of the migrations that have not been applied."""
        done: set[str] = set()
        if fetch("SELECT to_regclass('@schema@.govredis_migrations')")[0][0] is not None:
            done = {name for (name,) in fetch("SELECT name FROM @schema@.govredis_migrations")}
        return [name for name in [name for name, _ in read_files()] + self._adopted if name not in done]

    def _prepare(self, fetch: Fetch) -> set[str]:
        """Make the schema and the table of migrations if missing. Returns the names of those that have been applied."""
        ((encoding,),) = fetch("SHOW server_encoding")
        if encoding != "UTF8":
            raise ConfigurationError(
                f"the encoding of {self._server} is {encoding}, which cannot hold every id; it must be UTF8:"
                " CREATE DATABASE ... ENCODING 'UTF8' TEMPLATE template0"
            )
        if fetch("SELECT to_regnamespace('@schema@')")[0][0] is None:
            fetch("CREATE SCHEMA @schema@")
        self._refuse(
            fetch(_FOREIGN),
            "schema {schema} of {server} belongs to {}, who may replace what is in it; `govredis migrate` must run as"
            " that role, or GOVREDIS_SCHEMA name another schema",
        )
        fetch(
            "CREATE TABLE IF NOT EXISTS @schema@.govredis_migrations"
            " (name text PRIMARY KEY, applied_at timestamptz NOT NULL DEFAULT now())"
        )
        self._refuse(
            fetch(_NOT_OURS),
            "{} in {server} belongs to {}; `govredis migrate` must run as that role, or GOVREDIS_SCHEMA name another"
            " schema",
        )
        return {name for (name,) in fetch("SELECT name FROM @schema@.govredis_migrations")}

    def _refuse(self, found: list[tuple[Any, ...]], why: str) -> None:
        if found:
            raise ConfigurationError(why.format(*found[0], server=self._server, schema=self._schema))


def read_files() -> list[tuple[str, str]]:
    """Each migration's name and statements, in order."""
    folder = files("govredis").joinpath("schema")
    names = sorted(f.name for f in folder.iterdir() if f.name.endswith(".sql"))
    return [(name, folder.joinpath(name).read_text(encoding="utf-8")) for name in names]
