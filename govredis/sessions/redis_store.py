"""Sessions in Redis alone: records, the agents' indexes, and the marks that revocations leave.

A bind takes two round trips, so that none that was begun before a revocation survives it, however late it is carried
out. The first notes the session in its agent's index and reads the session's mark; the second writes the record unless
a newer mark is there. So `unbind` leaves a mark that stops it; and `unbind_agent`, which reads the index, either finds
the session named there and leaves it such a mark, or came before the bind. Such binds compare marks that the server
made: no clock has to agree with another. A bind made while Redis was away, and told later, has seen no mark: its
bound_at, by its process's clock, is compared with the mark, which is when the session was revoked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta

from .._counters import Counters
from ..client import Command, RedisClient, Script
from ..errors import BackendError, BackendUnavailable
from ..keys import Keys, sibling
from .binding import Order, Record, SessionBinding, decode, encode, iso, microseconds
from .local import Debt


class RedisSessions:
    """See stores.Sessions. Raises BackendError, too, where Redis answers with an error."""

    def __init__(
        self, keys: Keys, client: RedisClient, *, ttl: float, counters: Counters, now: Callable[[], datetime]
    ) -> None:
        self._keys = keys
        self._client = client
        self._ttl_ms = int(ttl * 1000)
        self._counters = counters
        self._now = now
        self._bind = Script(__package__, "bind.lua")
        self._touch = Script(__package__, "touch.lua")
        self._unbind = Script(__package__, "unbind.lua")
        self.index = Script(__package__, "index.lua")

    def bind(self, order: Order) -> tuple[SessionBinding, bool]:
        _, mark = self._client.pipeline((self.indexing(order), self.mark(order.session_id)), (self.index,))
        command = self._binding(order, (mark or b"0").decode())
        ((status, raw, ttl_ms),) = self._client.pipeline((command,), (self._bind,))
        if status < 0:
            return order.binding("redis"), False
        return decode(order.session_id, raw, ttl_ms, self._now()).binding, True

    def get(self, session_id: str, touch: bool) -> SessionBinding | None:
        record = self.read(session_id)
        if record is None:
            return None
        return self.touched(record) if touch else record.binding

    def read(self, session_id: str) -> Record | None:
        key = self._keys.session(session_id)
        raw, ttl_ms = self._client.pipeline((("GET", key), ("PTTL", key)))
        return None if raw is None else decode(session_id, raw, ttl_ms, self._now())

    def read_many(self, session_ids: Sequence[str]) -> dict[str, Record]:
        """Those that can be read."""
        raws = self._client.pipeline([("GET", self._keys.session(sid)) for sid in session_ids])
        found = {}
        for sid, raw in zip(session_ids, raws, strict=True):
            with contextlib.suppress(BackendError):
                if raw is not None:
                    found[sid] = decode(sid, raw, -1, self._now())
        return found

    def touched(self, record: Record) -> SessionBinding:
        """The record's binding with its whole TTL again, if a tenth of that has passed."""
        binding = record.binding
        if not 0 <= record.ttl_ms <= 0.9 * self._ttl_ms:
            return binding
        ttl_ms = str(self._ttl_ms)
        try:
            _, existed = self._client.pipeline(
                (
                    # First: an index may name a session too many, never one too few.
                    self.index.call((self._keys.agent_sessions(binding.agent_id),), (binding.session_id, ttl_ms)),
                    self._touch.call((self._keys.session(binding.session_id),), (ttl_ms,)),
                ),
                (self.index, self._touch),
            )
        except BackendUnavailable:
            self._counters.add("sessions.degraded.touch")
            return binding
        return replace(binding, expires_at=self._now() + timedelta(milliseconds=self._ttl_ms)) if existed else binding

    def unbind(self, session_id: str) -> bool:
        return bool(self._client.pipeline((self._unbinding(session_id),), (self._unbind,))[0])

    def for_agent(self, agent_id: str) -> list[str]:
        named = self.named(agent_id)
        if not named:
            return []
        records = self._client.pipeline([("GET", self._keys.session(sid)) for sid in named])
        return sorted(
            sid
            for sid, raw in zip(named, records, strict=True)
            if raw is not None and decode(sid, raw, -1, self._now()).binding.agent_id == agent_id
        )

    def unbind_agent(self, agent_id: str) -> int:
        return self.unbind_of(agent_id, self.named(agent_id))

    def unbind_of(self, agent_id: str, session_ids: Sequence[str], at: str = "") -> int:
        """End those of these sessions that are the agent's. Returns how many there were."""
        commands = [self._unbinding(sid, agent_id, at) for sid in session_ids]
        return sum(self._client.pipeline(commands, (self._unbind,))) if commands else 0

    def tell_unbound(self, debts: Sequence[Debt]) -> None:
        commands = [self._unbinding(sid, at=_us(token.at)) for sid, token in debts]
        self._client.pipeline(commands, (self._unbind,))

    def tell_agent_unbound(self, debt: Debt) -> None:
        agent_id, token = debt
        self.unbind_of(agent_id, self.named(agent_id), _us(token.at))

    def tell_bound(self, debts: Sequence[tuple[Debt, Order]]) -> list[SessionBinding | None]:
        commands = []
        for _, order in debts:
            commands += [self.indexing(order), self._binding(order, _us(order.bound_at))]
        replies = self._client.pipeline(commands, (self.index, self._bind))[1::2]
        return [
            decode(order.session_id, raw, ttl_ms, self._now()).binding if status == 0 else None
            for (_, order), (status, raw, ttl_ms) in zip(debts, replies, strict=True)
        ]

    def named(self, agent_id: str) -> list[str]:
        """The sessions that the agent's index names: perhaps some that have ended."""
        return [sid.decode() for sid in self._client.call("ZRANGE", self._keys.agent_sessions(agent_id), "0", "-1")]

    def indexing(self, order: Order) -> Command:
        return self.index.call((self._keys.agent_sessions(order.agent_id),), (order.session_id, str(order.ttl_ms)))

    def count(self, session_id: str, raw: bytes) -> int:
        """How often a session was bound whose record is no copy of a row; 0 for a copy."""
        try:
            record = decode(session_id, raw, -1, self._now())
        except BackendError:
            return 1  # what nobody can read is somebody's nevertheless
        return record.binding.bind_count if record.stamp is None else 0

    def mark(self, session_id: str) -> Command:
        return ("GET", sibling(self._keys.session(session_id), "revoked"))

    # -- inside --------------------------------------------------------------------------------------------------

    def _binding(self, order: Order, newest_mark: str) -> Command:
        key = self._keys.session(order.session_id)
        head = encode(order.agent_id, order.bound_at, order.data)
        return self._bind.call(
            (key, sibling(key, "revoked")),
            (head, order.agent_id, iso(order.bound_at), str(order.ttl_ms), str(int(order.if_absent)), newest_mark),
        )

    def _unbinding(self, session_id: str, agent_id: str = "", at: str = "") -> Command:
        key = self._keys.session(session_id)
        return self._unbind.call(
            (key, sibling(key, "revoked"), sibling(key, "lease")), (agent_id, at, str(self._ttl_ms))
        )


def _us(at: datetime) -> str:
    return str(microseconds(at))
