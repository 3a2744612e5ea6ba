"""RedisReplayTarget: a Redis, or a node of a Redis Cluster, that is told of pending writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..._counters import Counters
from ...client import Command, RedisNode, Script, TryAgain
from ...errors import BackendError
from ...keys import Keys
from ..binding import NO_END, BindRequest, SessionBinding, microseconds, same_binding
from ..pending import AgentRevocation, Revocation
from .redis_backend import Observed, RedisSessionBackend
from .replay_target import ReplayTarget

#: How often a record may change between look and write.
_TRIES = 100


class RedisReplayTarget(ReplayTarget):
    """See redis_backend.py for what late revocations and late binds are compared with."""

    def __init__(self, records: RedisSessionBackend, node: RedisNode, keys: Keys, counters: Counters) -> None:
        super().__init__()
        self.backend: RedisSessionBackend = records.on(node)
        self._node = node
        self._keys = keys
        self._counters = counters

    def has_session(self, session_id: str) -> bool:
        return self._node.covers(self._keys.session(session_id))

    def has_index(self, agent_id: str) -> bool:
        return self._node.covers(self._keys.agent_sessions(agent_id))

    def tell_unbound(self, pending: Sequence[tuple[str, Revocation]]) -> None:
        self._tell_ended({sid: (revocation, None) for sid, revocation in pending})

    def tell_agent_unbound(self, agent_id: str, revocation: AgentRevocation) -> None:
        if revocation.left is None:
            revocation.left = set(self.backend.named(agent_id)) - revocation.told
        # Replays of other nodes may take theirs out meanwhile.
        mine = [sid for sid in list(revocation.left) if self.has_session(sid)]
        unknown = Revocation(revocation.at)
        self._tell_ended(dict.fromkeys(mine, (unknown, agent_id)))
        revocation.left.difference_update(sid for sid in mine if sid not in self.late)

    def tell_indexed(self, requests: Sequence[BindRequest]) -> None:
        commands = [self.backend.indexing(request.agent_id, request.session_id, request.ttl_ms) for request in requests]
        self._node.pipeline(commands, (self.backend.index,))

    def tell_bound(self, requests: Sequence[BindRequest]) -> list[SessionBinding | None]:
        commands = []
        for request in requests:
            marks = f"{microseconds(request.bound_at)} {microseconds(request.bound_at)}"
            commands.append(self.backend.binding(request, marks, Observed(None, False), 1, None, request.ttl_ms))
        replies = self._pipeline([request.session_id for request in requests], commands, self.backend.bind_script)
        standing: list[SessionBinding | None] = []
        for request, reply in zip(requests, replies, strict=True):
            if reply is None:
                standing.append(None)
                continue
            status, raw, ttl_ms = reply
            record = self.backend.readable(request.session_id, raw, ttl_ms) if status == 0 else None
            if status == 0 and record is None:
                self._counters.add("sessions.replays_failed")
            mine = record is not None and same_binding(record.binding, request.binding("redis"))
            standing.append(None if record is None or mine else record.binding)
        return standing

    # -- inside --------------------------------------------------------------------------------------------------

    def _tell_ended(self, told: Mapping[str, tuple[Revocation, str | None]]) -> None:
        """Tell of revocations; with an agent, only where the session is that agent's."""
        waiting = dict(told)
        for _ in range(_TRIES):
            raws = self._node.pipeline([("MGET", self._keys.session(sid)) for sid in waiting])
            commands, asked = [], []
            for (sid, (revocation, agent_id)), (raw,) in zip(waiting.items(), raws, strict=True):
                record = None if raw is None else self.backend.readable(sid, raw, NO_END)
                if agent_id is not None and record is not None and record.binding.agent_id != agent_id:
                    continue
                is_over = record is None or revocation.ends(record.binding)
                at = str(microseconds(revocation.at))
                commands.append(self.backend.unbinding(sid, "", at, raw or b"", str(int(is_over))))
                asked.append(sid)
            replies = self._pipeline(asked, commands, self.backend.unbind_script)
            waiting = {sid: told[sid] for sid, reply in zip(asked, replies, strict=True) if reply == -1}
            if not waiting:
                return
        raise BackendError(f"{len(waiting)} sessions changed at each of {_TRIES} tries to end them")

    def _pipeline(self, session_ids: Sequence[str], commands: Sequence[Command], script: Script) -> list[Any]:
        """The reply for each session; None where it is late."""
        replies = self._node.pipeline(commands, (script,), each=True)
        for n, (sid, reply) in enumerate(zip(session_ids, replies, strict=True)):
            if isinstance(reply, TryAgain):
                self.late.add(sid)
                replies[n] = None
            elif isinstance(reply, BackendError):
                raise reply
        return replies
