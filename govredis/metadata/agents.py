"""AgentStore: the agents' records in PostgreSQL, with the cache invalidated after each commit."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypedDict, cast

from .._uncopied import Uncopied
from ..errors import BackendUnavailable, GovRedisError, refuse
from ..keys import Id, Keys, id_text
from .cache import MetadataCache
from .values import Codec, Versioned

if TYPE_CHECKING:
    from ..postgres import Postgres, Row

__all__ = ["AgentRecord", "AgentStore"]

_COLUMNS = "agent_id, metadata, status, version"
#: NUL and lone surrogates, as they stand in JSON.
_UNSTORABLE = re.compile(r"\\u0000|\\ud[89ab]..(?!\\ud[c-f])|(?<!\\ud[89ab]..)\\ud[c-f]..")


def _no_form(value: Any) -> Any:
    raise TypeError(f"{type(value).__name__} has no form in JSON")


#: An agent's metadata comes back as it was written: nothing is made a str on the way.
_CODEC = Codec(default=_no_form)


class AgentRecord(TypedDict):
    """An agent. `version` rises with every write, over deletion and re-creation too."""

    agent_id: str
    metadata: dict[str, Any]
    status: str  # "active" or "archived"
    version: int


class AgentStore(Uncopied):
    """Agents in the table `govredis_agents`: PostgreSQL is the record, nothing here reads from the cache.

    For cached reads give its readers to the cache: `gov.metadata.get_or_load(id, gov.agents.get)` and
    `gov.metadata.get_many(ids, gov.agents.get_many)`.

    Each write is one transaction; after its commit, and never after a rollback, the agent's cached value is
    invalidated. While Redis is away the write succeeds all the same: this process carries out
    its invalidation when Redis is back, before it reads from Redis again. A trigger has also written it to the outbox,
    in the same transaction. So the old value is served for `metadata_staleness` at most, also where this process ends
    before, or another can reach Redis meanwhile. The same holds where a hung PostgreSQL, on waking, applies a write
    that was given up here.

    Every method raises BackendUnavailable when PostgreSQL is away; a write may then have been applied. It raises
    BackendError where a server answers with an error: if that is Redis, which refuses the invalidation, the write is
    committed. It raises ConfigurationError when `govredis migrate` has not been run, and ValueError for a bad id or
    metadata before anything is sent.
    """

    def __init__(self, keys: Keys, postgres: Postgres, cache: MetadataCache) -> None:
        self._keys = keys
        self._postgres = postgres
        self._cache = cache

    def create(self, agent_id: Id, metadata: Mapping[str, Any] | None = None) -> AgentRecord:
        """Make an active agent. Returns its record. Raises ValueError if an agent has that id."""
        record = self._write(
            agent_id,
            f"INSERT INTO @schema@.govredis_agents (agent_id, metadata) VALUES (%s, %s)"
            f" ON CONFLICT DO NOTHING RETURNING {_COLUMNS}",
            (self._keys.row(agent_id, "agent_id"), _json({} if metadata is None else metadata)),
        )
        if record is None:
            raise ValueError(f"agent {agent_id!r} exists already; update_metadata changes it")
        return record

    def get(self, agent_id: Id) -> AgentRecord | None:
        """The agent's record, archived ones included; None if there is none."""
        return self.get_many([agent_id]).get(id_text(agent_id))

    def get_many(self, agent_ids: Iterable[Id]) -> dict[str, AgentRecord]:
        """The records of those that exist, by id, in one statement."""
        if isinstance(agent_ids, str | bytes) or not isinstance(agent_ids, Iterable):
            raise refuse("agent_ids", agent_ids, "an iterable of ids")
        ids = [self._keys.row(agent_id, "agent_id") for agent_id in agent_ids]
        rows = self._postgres.fetch(f"SELECT {_COLUMNS} FROM @schema@.govredis_agents WHERE agent_id = ANY(%s)", (ids,))
        records = map(self._record, rows)
        return {record["agent_id"]: record for record in records}

    def update_metadata(self, agent_id: Id, /, **fields: Any) -> AgentRecord | None:
        """Set fields of the agent's metadata; the others stay. Returns the new record, or None if no such agent."""
        return self._write(
            agent_id,
            "UPDATE @schema@.govredis_agents SET metadata = metadata || %s::jsonb WHERE agent_id = %s"
            f" RETURNING {_COLUMNS}",
            (_json(fields), self._keys.row(agent_id, "agent_id")),
        )

    def archive(self, agent_id: Id) -> AgentRecord | None:
        """Mark the agent archived. Returns the new record; None if there is no such agent."""
        return self._write(
            agent_id,
            f"UPDATE @schema@.govredis_agents SET status = 'archived' WHERE agent_id = %s RETURNING {_COLUMNS}",
            (self._keys.row(agent_id, "agent_id"),),
        )

    def delete(self, agent_id: Id) -> bool:
        """Delete the agent. True if there was one."""
        deleted = self._write(
            agent_id,
            # Its version would be that of the write before.
            "DELETE FROM @schema@.govredis_agents WHERE agent_id = %s"
            f" RETURNING {_COLUMNS}, nextval('@schema@.govredis_versions')",
            (self._keys.row(agent_id, "agent_id"),),
        )
        return deleted is not None

    def _write(self, agent_id: Id, sql: str, params: tuple[Any, ...]) -> AgentRecord | None:
        try:
            # One statement outside of a transaction block: when it has answered, it is committed.
            rows = self._postgres.fetch(sql, params)
            if not rows:
                return None
            version = rows[0][-1]
            record = self._record(rows[0][:4])
            self._cache.invalidate_committed(agent_id, version=version)
            return record
        except BaseException as error:
            # Without an answer (a deadline, a signal handler's exception) it may have been committed: an invalidation
            # too many is harmless, one too few is not.
            if isinstance(error, BackendUnavailable) or not isinstance(error, GovRedisError):
                self._cache.invalidate_committed(agent_id)
            raise

    def _record(self, row: Row) -> AgentRecord:
        key, metadata, status, version = row
        record = AgentRecord(agent_id=self._keys.id_of(key), metadata=metadata, status=status, version=version)
        return cast(AgentRecord, Versioned(record))


def _json(metadata: Mapping[str, Any]) -> Any:
    from ..postgres import Json

    if not isinstance(metadata, Mapping) or not all(isinstance(name, str) for name in metadata):
        raise refuse("metadata", metadata, "a mapping with str keys")
    metadata = dict(metadata)
    unstorable = _UNSTORABLE.search(_CODEC.encode(metadata).replace("\\\\", "-"))
    if unstorable:
        raise ValueError(f"metadata has the character {unstorable[0]}, which PostgreSQL cannot store")
    return Json(metadata)
