"""Metadata: each side reads what the other stored, and nothing that an invalidation of either has dropped.

The source of the values is a table with PostgreSQL (that of `gov.agents`), else a dict. The model is what stands at the
key, and who has put it there.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, NamedTuple

from .blocking import Agent
from .world import WHO, Beside, World, operation

IDS = ("m", "n")
#: For so long after an invalidation of ours nothing of theirs is a value for us, and nothing of `set` is stored.
_TOMBSTONE = 10
#: The steps of the others while one of ours loads.
_CHANGES = ("they set", "they delete", "the other invalidates", "they write")
MEANWHILE = [(), *((one,) for one in _CHANGES), *itertools.product(_CHANGES, repeat=2)]


class Held(NamedTuple):
    value: Agent
    #: None: both have stored the very same, and nobody can tell.
    ours: bool | None


class MetadataRules(Beside):
    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.source: dict[str, Agent] = {}
        self.held: dict[str, Held] = {}
        #: When each was last invalidated by us, with nothing loaded by us since; by the monotonic clock.
        self.tombs: dict[str, float] = {}
        #: By us, ever: what was loaded since does not let `set` store at once.
        self.invalidated_once: set[str] = set()
        #: The values that they have read from the source, and store later.
        self.late: dict[str, Agent] = {}
        #: Written, and not yet told by the outbox's relay.
        self.pending: set[str] = set()
        #: The values that we stored last: where they store the very same, nobody can tell.
        self.filled: dict[str, Agent] = {}
        for short in ("m", "n"):
            self.write_source(self.name(short))
            if self.world.durable:
                self.pending.add(self.name(short))

    # -- the source ----------------------------------------------------------------------------------------------

    def write_source(self, identity: str) -> None:
        """A write by anybody, which tells no cache."""
        if self.world.durable:
            rows = self.world.sql(
                "INSERT INTO govredis_agents (agent_id, metadata) VALUES (%s, '{}')"
                " ON CONFLICT (agent_id) DO UPDATE SET metadata = govredis_agents.metadata || '{\"n\": 1}'"
                " RETURNING agent_id, metadata, status, version",
                identity,
            )
            self.source[identity] = Agent(*rows[0])
            self.pending.add(identity)
        else:
            before = self.source.get(identity)
            self.source[identity] = Agent(identity, {"n": 1}, version=1 if before is None else before.version + 1)

    def loader(self, who: int) -> Callable[[str], Any]:
        if self.world.durable:
            return self.govs[who].agents.get
        return lambda identity: asdict(self.source[identity])

    # -- the model -----------------------------------------------------------------------------------------------

    def stands(self, identity: str) -> Agent | None:
        """Their reading of the key. Raises TypeError if the value is no Agent of theirs."""
        found: Agent | None = self.service.metadata.get(identity)
        return found

    def looks_right(self, identity: str) -> None:
        held = self.held.get(identity)
        assert self.stands(identity) == (None if held is None else held.value)

    def entombed(self, identity: str) -> bool | None:
        """Whether there is a tombstone of ours; None for perhaps."""
        at = self.tombs.get(identity)
        if at is None:
            return False
        return True if time.monotonic() - at < _TOMBSTONE - 5 else None

    def is_hit(self, identity: str) -> bool | None:
        """Does one of ours find what stands there? None: it may."""
        held = self.held.get(identity)
        if held is None:
            return False
        if held.ours is not False:
            return held.ours
        if self.world.durable:
            return None if self.filled.get(identity) == held.value else False
        if self.entombed(identity):
            return False
        # For a while it may have been loaded before our invalidation, whatever we have loaded since.
        return None if identity in self.invalidated_once else True

    def filled_by_us(self, identity: str, value: Agent) -> None:
        self.held[identity] = Held(value, True)
        self.filled[identity] = value
        self.tombs.pop(identity, None)

    # -- ours ----------------------------------------------------------------------------------------------------

    @operation(who=WHO, identity=IDS)
    def we_read(self, who: int, identity: str) -> None:
        identity = self.name(identity)
        loads: list[str] = []

        def load(asked: str) -> Any:
            loads.append(asked)
            return self.loader(who)(asked)

        hit, held = self.is_hit(identity), self.held.get(identity)
        value = Agent(**self.govs[who].metadata.get_or_load(identity, load))
        assert hit is None or hit is not bool(loads)
        if loads:
            assert value == self.source[identity]
            self.filled_by_us(identity, value)
        else:
            assert held is not None
            assert value == held.value
        self.looks_right(identity)

    @operation(who=WHO, identity=IDS, meanwhile=MEANWHILE)
    def we_load_while_others_change_it(self, who: int, identity: str, meanwhile: tuple[str, ...]) -> None:
        identity = self.name(identity)
        stood = self.held.get(identity)
        loaded: list[Agent] = []
        overtaken: list[str] = []

        def load(asked: str) -> Any:
            value = self.loader(who)(asked)
            loaded.append(Agent(**value))
            for what in meanwhile:
                if what == "they set":
                    self.they_store(identity, self.source[identity])
                    overtaken.append("set")
                elif what == "they delete":
                    self.service.metadata.invalidate(identity)
                    # A DEL of what is not there leaves no trace.
                    if self.held.pop(identity, None) is not None:
                        overtaken.append("deleted" if stood is not None else "unset")
                elif what == "the other invalidates":
                    if not self.away[1 - who]:
                        self.invalidated(1 - who, identity)
                        overtaken.append("invalidated")
                else:
                    self.write_source(identity)
            return value

        value = Agent(**self.govs[who].metadata.get_or_load(identity, load))
        if not loaded:
            assert stood is not None
            assert value == stood.value
            return
        theirs, found = self.held.get(identity), self.stands(identity)
        assert value == loaded[-1] or (theirs is not None and value == theirs.value)
        standing = None if theirs is None else theirs.value
        if "invalidated" in overtaken or "deleted" in overtaken:
            allowed = [standing]
        elif "set" in overtaken and standing is not None:
            allowed = [standing]
            if stood is not None and standing == stood.value:
                allowed.append(loaded[-1])  # the same again: nobody can tell
        elif "unset" in overtaken:
            allowed = [None, loaded[-1]]
        else:
            allowed = [loaded[-1]]
        assert found in allowed
        if (found == loaded[-1] and found != standing) or not overtaken:
            self.filled_by_us(identity, loaded[-1])
        elif found == loaded[-1]:
            self.held[identity] = Held(loaded[-1], None)

    @operation(who=WHO, identity=IDS)
    def we_get(self, who: int, identity: str) -> None:
        identity = self.name(identity)
        value, hit = self.govs[who].metadata.get(identity), self.is_hit(identity)
        assert hit is None or hit is (value is not None)
        assert value is None or Agent(**value) == self.held[identity].value
        self.looks_right(identity)

    @operation(who=WHO)
    def we_get_many(self, who: int) -> None:
        ids = [self.name("m"), self.name("n")]
        load = self.loader(who)
        hits = {identity: self.is_hit(identity) for identity in ids}
        loaded: list[str] = []

        def load_many(missing: list[str]) -> dict[str, Any]:
            loaded.extend(missing)
            return {identity: load(identity) for identity in missing}

        values = self.govs[who].metadata.get_many(ids, load_many)
        for identity in ids:
            assert hits[identity] is None or hits[identity] is (identity not in loaded)
            value = Agent(**values[identity])
            if identity in loaded:
                assert value == self.source[identity]
                self.filled_by_us(identity, value)
            else:
                assert value == self.held[identity].value
            self.looks_right(identity)

    @operation(who=WHO, identity=IDS)
    def we_set(self, who: int, identity: str) -> None:
        """A set of ours, refused for a while after an invalidation, except for a record that is as new."""
        identity = self.name(identity)
        entombed = self.entombed(identity)
        stored = self.govs[who].metadata.set(identity, asdict(self.source[identity]))
        if entombed:
            assert not stored
        elif entombed is False and identity not in self.invalidated_once:
            assert stored
        if stored:
            self.filled_by_us(identity, self.source[identity])
        self.looks_right(identity)

    @operation(who=WHO, identity=IDS)
    def we_write(self, who: int, identity: str) -> None:
        """And invalidate, which AgentStore does itself."""
        identity = self.name(identity)
        if self.world.durable:
            written = self.govs[who].agents.update_metadata(identity, by=f"process {who}")
            assert written is not None
            self.source[identity] = Agent(**written)
            self.pending.add(identity)
            self.entomb(identity)
        else:
            self.write_source(identity)
            self.invalidated(who, identity)
        self.looks_right(identity)

    @operation(who=WHO, identity=IDS)
    def we_invalidate(self, who: int, identity: str) -> None:
        self.invalidated(who, self.name(identity))
        self.looks_right(self.name(identity))

    def invalidated(self, who: int, identity: str) -> None:
        self.govs[who].metadata.invalidate(identity)
        self.entomb(identity)

    def entomb(self, identity: str) -> None:
        self.held.pop(identity, None)
        self.tombs[identity] = time.monotonic()
        self.invalidated_once.add(identity)

    @operation(who=WHO)
    def we_invalidate_all(self, who: int) -> None:
        """Invalidates every value that is there, for both sides."""
        self.govs[who].metadata.invalidate_all()
        for identity in self.source:
            self.held.pop(identity, None)
            self.looks_right(identity)
            self.tombs[identity] = -1e9  # perhaps
            self.invalidated_once.add(identity)
        for gov in self.govs:
            gov.metadata._generation.forget()  # which each does within a second

    # -- theirs --------------------------------------------------------------------------------------------------

    def they_store(self, identity: str, agent: Agent) -> None:
        self.service.metadata.set(agent)
        self.held[identity] = Held(agent, False)

    @operation(identity=IDS)
    def they_read(self, identity: str) -> None:
        identity = self.name(identity)
        self.looks_right(identity)
        if identity not in self.held:
            self.they_store(identity, self.source[identity])

    @operation(identity=IDS)
    def they_begin_to_load(self, identity: str) -> None:
        identity = self.name(identity)
        self.late[identity] = self.source[identity]

    @operation(identity=IDS)
    def they_store_what_they_loaded(self, identity: str) -> None:
        """It may be old by then: they have no leases."""
        identity = self.name(identity)
        if identity in self.late:
            self.they_store(identity, self.late.pop(identity))

    @operation(identity=IDS)
    def they_write(self, identity: str) -> None:
        """And invalidate, by DEL."""
        identity = self.name(identity)
        self.write_source(identity)
        assert self.service.metadata.invalidate(identity) is (self.held.pop(identity, None) is not None)
        self.looks_right(identity)

    @operation(identity=IDS)
    def somebody_writes(self, identity: str) -> None:
        """With psql, say: no cache is told, but by the outbox."""
        if self.world.durable:
            self.write_source(self.name(identity))

    def relayed(self) -> None:
        """A value that is older than its last write is gone; any other may be."""
        super().relayed()
        for identity in self.pending:
            held, found = self.held.get(identity), self.stands(identity)
            if held is not None and found is None:
                del self.held[identity]
            assert found is None or found == self.source[identity]
            self.tombs[identity] = -1e9  # perhaps
            self.invalidated_once.add(identity)
        self.pending.clear()
