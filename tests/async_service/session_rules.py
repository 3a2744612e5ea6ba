"""Sessions: the newest binding wins, no matter which side made it, and each side reads what the other wrote.

The model is a dict of the sessions and their agents. Where a promise leaves two ways open, the session is `doubtful`
until somebody looks: it may then be as the model says, or over.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from govredis import SessionAlreadyBound, SessionBinding, SessionChanged
from govredis._sole import SoleMark, nobody
from govredis.sessions.backends.redis_backend import RedisSessionBackend
from govredis.sessions.backends.rows import SessionRows

from .world import WHO, Beside, World, operation

SIDS = ("s", "t")
AGENTS = ("a", "b")
#: Their agents: one cannot be an id of ours.
THEIR_AGENTS = ("a", "b", "a", "b", "{c}")
TTLS = (None, 600, 7200, 86_400)
DATA = (None, {"n": 1}, [2])
#: Members that the async service alone writes.
MEMBERS = (
    {},
    {"api_key_hash": "5e88", "label": "x"},
    {"display_agent_id": "Agent A", "public_agent_id": "A", "spawn_reason": None, "trajectory_required": False},
    {"api_key_hash": "9a1f", "bind_ip_ua": {"ip": "127.0.0.1", "ua": []}},
)
#: Members of a record that we know.
KNOWN = {"agent_id", "bound_at", "bind_count", "data", "__govredis__"}
SESSION_TTL = 3600
#: Seconds after which a session of ours is over that they keep alive.
_MOMENT = 0.02


@dataclass
class Bound:
    agent: str
    #: How often bound; None: that was left out, and is anybody's guess.
    count: int | None
    data: Any = None
    #: Members of the async service's own.
    members: dict[str, Any] = field(default_factory=dict)
    #: Which of our processes have seen it.
    seen: set[int] = field(default_factory=set)
    #: It is revoked, and Redis will be told.
    revoked: bool = False
    #: It may be over: the next look of ours says.
    doubtful: bool = False


class SessionRules(Beside):
    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.bound: dict[str, Bound] = {}
        self.tracked = [self.name("s"), self.name("t")]
        #: As one of ours has seen or made each last, which its row says, until one of ours ends it.
        self.rows: dict[str, Bound] = {}
        #: The sessions that each of our processes has revoked while it was cut off.
        self.pending_revocations: list[dict[str, Bound]] = [{}, {}]
        #: The same, of what it has not seen as it was then: it has only clocks to tell what was bound since.
        self.blind: list[set[str]] = [set(), set()]

    def end(self) -> None:
        for who in range(2):
            self.return_of(who)
        self.relay(who=0)
        for sid in self.tracked:
            self.read(0, sid)
            self.read(1, sid)
            self.looks_right(sid)
        super().end()

    # -- the model -----------------------------------------------------------------------------------------------

    def record(self, sid: str) -> dict[str, Any] | None:
        """The record that they read."""
        found: dict[str, Any] | None = self.service.sessions.get(sid)
        return found

    def ttl(self, sid: str) -> float:
        """Seconds; infinite without an end, 0 where there is no key."""
        left = self.redis.pttl(f"session:{sid}")
        return math.inf if left == -1 else max(0.0, left / 1000)

    def looks_right(self, sid: str) -> None:
        """Do they read what the model says? Changes nothing."""
        bound, record = self.bound.get(sid), self.record(sid)
        if bound is None:
            assert record is None, record
        elif record is None:
            assert bound.doubtful or bound.revoked
        else:
            assert (record["agent_id"], record.get("data")) == (bound.agent, bound.data)
            assert bound.count in (None, record.get("bind_count"))
            assert {name: record[name] for name in record.keys() - KNOWN} == bound.members

    def matches(self, binding: SessionBinding, bound: Bound) -> None:
        assert (binding.agent_id, binding.data) == (bound.agent, bound.data)
        assert binding.bind_count == bound.count or (bound.count is None and binding.bind_count >= 1)

    def is_seen(self, who: int, sid: str, bound: Bound) -> None:
        bound.seen.add(who)
        bound.doubtful = False
        self.rows[sid] = replace(bound)

    def made(self, who: int, sid: str, bound: Bound) -> None:
        self.bound[sid] = bound
        self.is_seen(who, sid, bound)

    def over(self, sid: str) -> None:
        """One of ours has ended it."""
        self.bound.pop(sid, None)
        self.rows.pop(sid, None)

    def read(self, who: int, sid: str) -> bool:
        """One of ours looks, and says whether it has found one."""
        binding, bound = self.govs[who].sessions.get(sid), self.bound.get(sid)
        if bound is None:
            assert binding is None
        elif binding is not None:
            self.matches(binding, bound)
            if not bound.revoked:
                self.is_seen(who, sid, bound)
        elif not bound.revoked:
            assert bound.doubtful
            self.over(sid)
        return binding is not None

    def there(self, who: int, sid: str) -> bool:
        """May one of ours be asked for more than a look? Then nothing is in doubt."""
        bound = self.bound.get(sid)
        if bound is not None and bound.revoked:
            return False
        if bound is not None and bound.doubtful:
            self.read(who, sid)
        return True

    def all_there(self, who: int) -> bool:
        return sum(self.there(who, sid) for sid in self.tracked) == len(self.tracked)

    def kept(self, sid: str, before: float, began: float) -> None:
        """Nothing was taken from its TTL."""
        assert self.ttl(sid) >= before - (time.monotonic() - began) - 0.01

    def stale(self, agent: str) -> set[str]:
        """Sessions whose rows say that they are the agent's, though they have bound it anew."""
        if not self.world.durable:
            return set()
        return {sid for sid, row in self.rows.items() if row.agent == agent}

    # -- theirs --------------------------------------------------------------------------------------------------

    @operation(sid=SIDS, agent=THEIR_AGENTS, ttl=TTLS, counted=(False, True), members=MEMBERS)
    def they_bind(self, sid: str, agent: str, ttl: int | None, counted: bool, members: dict[str, Any]) -> None:
        sid, agent = self.name(sid), self.name(agent)
        record = self.service.sessions.bind(sid, agent, ttl=ttl, counted=counted, **members)
        bound = self.bound[sid] = Bound(agent, record.get("bind_count"), None, members)
        bound.revoked = self.service.skew < 0 and any(sid in blind for blind in self.blind)
        self.looks_right(sid)

    @operation(sid=SIDS, ttl=(600, 86_400))
    def they_extend(self, sid: str, ttl: int) -> None:
        sid = self.name(sid)
        self.service.sessions.extend(sid, ttl)
        self.looks_right(sid)

    @operation(who=WHO, sid=SIDS)
    def they_delete(self, who: int, sid: str) -> None:
        """With PostgreSQL it may come back from its row, which they have not ended, as one of ours saw it last."""
        sid = self.name(sid)
        if not self.there(who, sid):
            return
        self.service.sessions.delete(sid)
        self.bound.pop(sid, None)
        assert self.record(sid) is None
        row = self.rows.get(sid)
        binding = self.govs[who].sessions.get(sid)
        if binding is None:
            self.over(sid)
        else:
            assert self.world.durable
            assert row is not None
            members = {name: value for name, value in (self.record(sid) or {}).items() if name not in KNOWN}
            assert members.items() <= row.members.items()
            self.made(who, sid, replace(row, members=members, seen=set()))
            self.matches(binding, row)
        self.looks_right(sid)

    @operation(sid=SIDS)
    def they_look(self, sid: str) -> None:
        self.looks_right(self.name(sid))

    # -- ours ----------------------------------------------------------------------------------------------------

    @operation(who=WHO, sid=SIDS, agent=AGENTS, ttl=TTLS, data=DATA)
    def we_bind(self, who: int, sid: str, agent: str, ttl: int | None, data: Any) -> None:
        sid, agent = self.name(sid), self.name(agent)
        if not self.there(who, sid):
            return
        began, left = time.monotonic(), self.ttl(sid)
        bound = self.bound_by_us(sid, agent, data)
        binding = self.govs[who].sessions.bind(sid, agent, ttl=ttl, data=data)
        self.matches(binding, bound)
        bound.count = binding.bind_count
        self.made(who, sid, bound)
        self.looks_right(sid)
        if ttl is None:
            self.kept(sid, max(left, SESSION_TTL), began)
        else:
            assert self.ttl(sid) <= ttl + 0.01
            self.kept(sid, ttl, began)

    def bound_by_us(self, sid: str, agent: str, data: Any) -> Bound:
        before = self.bound.get(sid)
        if before is None:
            return Bound(agent, 1, data)
        count = None if before.count is None else before.count + 1
        return Bound(agent, count, data, before.members if before.agent == agent else {})

    @operation(who=WHO, sid=SIDS, agent=AGENTS)
    def we_bind_if_absent(self, who: int, sid: str, agent: str) -> None:
        sid, agent = self.name(sid), self.name(agent)
        if not self.there(who, sid):
            return
        began, before, left = time.monotonic(), self.bound.get(sid), self.ttl(sid)
        if before is not None and before.agent != agent:
            with pytest.raises(SessionAlreadyBound) as refused:
                self.govs[who].sessions.bind(sid, agent, if_absent=True)
            assert refused.value.existing is not None
            self.matches(refused.value.existing, before)
        else:
            binding = self.govs[who].sessions.bind(sid, agent, if_absent=True)
            before = before or Bound(agent, 1)
            self.matches(binding, before)
        self.made(who, sid, before)
        self.looks_right(sid)
        self.kept(sid, left, began)

    @operation(who=WHO, sid=SIDS, agent=AGENTS, theirs=AGENTS, ttl=TTLS, members=MEMBERS, if_absent=(False, True))
    def they_bind_while_we_bind(
        self, who: int, sid: str, agent: str, theirs: str, ttl: int | None, members: dict[str, Any], if_absent: bool
    ) -> None:
        """Between our look and our write, which comes after theirs."""
        sid, agent, theirs = self.name(sid), self.name(agent), self.name(theirs)
        if not self.there(who, sid) or any(self.blind) or (if_absent and sid in self.bound):
            return
        owner, name = (SessionRows, "bind") if self.world.durable else (RedisSessionBackend, "binding")
        step, began, left = getattr(owner, name), time.monotonic(), 0.0
        with pytest.MonkeyPatch.context() as patch:

            def late(*args: Any) -> Any:
                nonlocal left
                patch.undo()
                record = self.service.sessions.bind(sid, theirs, ttl=ttl, **members)
                left = self.ttl(sid)
                self.bound[sid] = Bound(theirs, record.get("bind_count"), None, members)
                return step(*args)

            patch.setattr(owner, name, late)
            if if_absent and theirs != agent:
                with pytest.raises(SessionAlreadyBound):
                    self.govs[who].sessions.bind(sid, agent, if_absent=True)
                bound = self.bound[sid]
            else:
                binding = self.govs[who].sessions.bind(sid, agent, if_absent=if_absent)
                bound = self.bound[sid] if if_absent else self.bound_by_us(sid, agent, None)
                self.matches(binding, bound)
        self.made(who, sid, bound)
        self.looks_right(sid)
        self.kept(sid, left, began)

    @operation(who=WHO, sid=SIDS)
    def we_get(self, who: int, sid: str) -> None:
        sid = self.name(sid)
        began, left = time.monotonic(), self.ttl(sid)
        if self.read(who, sid):
            self.kept(sid, left, began)
        self.looks_right(sid)

    @operation(who=WHO, sid=SIDS)
    def we_touch(self, who: int, sid: str) -> None:
        sid = self.name(sid)
        if not self.there(who, sid):
            return
        began, left, bound = time.monotonic(), self.ttl(sid), self.bound.get(sid)
        assert self.govs[who].sessions.touch(sid) is (bound is not None)
        if bound is not None:
            self.is_seen(who, sid, bound)
            self.kept(sid, max(left, 0.9 * SESSION_TTL), began)
        self.looks_right(sid)

    @operation(who=WHO, sid=SIDS, data=DATA)
    def we_update(self, who: int, sid: str, data: Any) -> None:
        sid = self.name(sid)
        if not self.there(who, sid):
            return
        began, bound, left = time.monotonic(), self.bound.get(sid), self.ttl(sid)
        if bound is None:
            with pytest.raises(SessionChanged):
                self.govs[who].sessions.update(sid, data)
        else:
            binding = self.govs[who].sessions.update(sid, data)
            bound.data = data
            self.is_seen(who, sid, bound)
            self.matches(binding, bound)
            self.kept(sid, left, began)
        self.looks_right(sid)

    @operation(who=WHO, sid=SIDS)
    def we_rotate(self, who: int, sid: str) -> None:
        sid = self.name(sid)
        if not self.there(who, sid):
            return
        began, old, left = time.monotonic(), self.bound.get(sid), self.ttl(sid)
        if old is not None and "{" in old.agent:
            return  # to which we bind nothing
        new = self.govs[who].sessions.rotate(sid)
        assert (new is None) is (old is None)
        if new is None or old is None:
            return
        self.over(sid)
        self.tracked.append(new)
        self.made(who, new, Bound(old.agent, 1, old.data, old.members))
        self.looks_right(sid)
        self.looks_right(new)
        self.kept(new, left, began)
        assert self.ttl(new) <= left + 0.01

    @operation(who=WHO, sid=SIDS)
    def we_unbind(self, who: int, sid: str) -> None:
        sid = self.name(sid)
        if not self.there(who, sid):
            return
        assert self.govs[who].sessions.unbind(sid) is (sid in self.bound)
        self.over(sid)
        self.looks_right(sid)

    @operation(who=WHO, agent=AGENTS)
    def we_unbind_agent(self, who: int, agent: str) -> None:
        """Ends all that one of us has seen; of theirs that nobody has, it may know."""
        agent = self.name(agent)
        if not self.all_there(who):
            return
        mine = {sid for sid, bound in self.bound.items() if bound.agent == agent}
        seen = {sid for sid in mine if self.bound[sid].seen}
        count = self.govs[who].sessions.unbind_agent(agent)
        assert len(seen) <= count <= len(mine | self.stale(agent))
        for sid in mine:
            if sid in seen or self.record(sid) is None:
                row = self.rows.get(sid)
                self.over(sid)
                if row is not None and row.agent != agent:
                    self.rows[sid] = row  # which nobody finds any more, and which may be counted
        for sid in self.tracked:
            self.looks_right(sid)

    @operation(who=WHO, agent=AGENTS)
    def we_list(self, who: int, agent: str) -> None:
        agent = self.name(agent)
        if not self.all_there(who):
            return
        listed = set(self.govs[who].sessions.for_agent(agent))
        mine = {sid for sid, bound in self.bound.items() if bound.agent == agent}
        seen = {sid for sid in mine if self.bound[sid].seen}
        assert seen <= listed <= mine | self.stale(agent)

    @operation(who=WHO, sid=SIDS, agent=AGENTS)
    def ours_ends_and_theirs_lives(self, who: int, sid: str, agent: str) -> None:
        """Bound by us for a moment, kept alive by their EXPIRE."""
        sid, agent = self.name(sid), self.name(agent)
        if not self.there(who, sid):
            return
        bound = self.bound_by_us(sid, agent, None)
        self.govs[who].sessions.bind(sid, agent, ttl=_MOMENT)
        if self.service.sessions.extend(sid, 600):
            self.made(who, sid, bound)
        else:  # this machine has slept
            self.over(sid)
        time.sleep(1.2 * _MOMENT)
        self.read(who, sid)
        self.looks_right(sid)

    # -- cut off -------------------------------------------------------------------------------------------------

    @operation(cut_off=True, who=WHO)
    def one_is_cut_off(self, who: int) -> None:
        """From Redis."""
        if not self.away[who]:
            self.away[who] = True
            breaker = self.govs[who].internal.context.redis.breaker  # type: ignore[union-attr]
            breaker._probing.holder = SoleMark  # somebody is at it: no probe of its own
            breaker.trip("a test")
            breaker._drained.set()  # nobody waits for that probe

    @operation(cut_off=True, who=WHO, sid=SIDS)
    def one_that_is_cut_off_unbinds(self, who: int, sid: str) -> None:
        """The bindings it knows are over once Redis is told: with PostgreSQL by the relay, else by its return."""
        sid = self.name(sid)
        if not self.away[who]:
            return
        bound = self.bound.get(sid)
        self.govs[who].sessions.unbind(sid)
        if bound is not None:
            bound.revoked = True
        if bound is not None and who in bound.seen and not bound.doubtful:
            self.pending_revocations[who][sid] = bound
        else:
            self.blind[who].add(sid)
        self.rows.pop(sid, None)

    @operation(cut_off=True, who=WHO)
    def one_is_back(self, who: int) -> None:
        self.return_of(who)
        self.relay(who)  # which it may do by itself
        for sid in self.tracked:
            self.looks_right(sid)

    def return_of(self, who: int) -> None:
        if self.away[who]:
            self.away[who] = False
            breaker = self.govs[who].internal.context.redis.breaker  # type: ignore[union-attr]
            breaker._try_probe()
            breaker._probing.holder = nobody
            assert breaker.closed
            if not self.world.durable:
                self.told(who)

    def told(self, who: int) -> None:
        """Redis is told of the sessions that a process has revoked. A session that was bound since stays bound."""
        for sid, revoked in self.pending_revocations[who].items():
            if self.bound.get(sid) is revoked:
                self.over(sid)
                self.looks_right(sid)
        self.pending_revocations[who].clear()
        self.blind[who].clear()
        if not any(self.pending_revocations) and not any(self.blind):
            for bound in self.bound.values():
                if bound.revoked:  # by one that did not know of it
                    bound.revoked, bound.doubtful = False, True

    def relayed(self) -> None:
        super().relayed()
        for who in range(2):
            self.told(who)
        for sid in self.tracked:
            self.looks_right(sid)
