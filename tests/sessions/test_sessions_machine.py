"""Random operations in two processes, with outages and losses of Redis's data, against a plain dict."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import redis as redis_py
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from support import redis_of

from govredis import GovRedis, SessionAlreadyBound
from govredis._sole import SoleMark, nobody
from govredis.testing.servers import PostgresServer, RedisServer

pytestmark = [pytest.mark.once, pytest.mark.one_redis]

#: X, in seconds: how long the machine waits where it counts.
X = 0.2

SIDS = st.sampled_from(["s", "t", "u"])
AGENTS = st.sampled_from(["a", "b"])
WHO = st.integers(0, 1)


class SessionMachine(RuleBasedStateMachine):
    """The dict has each session's agent, bind count and data."""

    make: Callable[[], GovRedis]
    server: RedisServer

    def __init__(self) -> None:
        super().__init__()
        self.govs = [self.make() for _ in range(2)]
        self.away = [False, False]
        self.plain = redis_py.Redis.from_url(self.server.url)
        self.plain.flushall()
        self.expected: dict[str, tuple[str, int, Any]] = {}
        self.rotated = 0
        self.old: dict[bytes, tuple[bytes, int]] = {}
        self.old_since = 0.0

    def teardown(self) -> None:
        for who in range(2):
            self.comes_back(who)
        for gov in self.govs:
            gov.sessions.unbind_agent("a")
            gov.sessions.unbind_agent("b")
            gov.close()
        self.plain.close()

    def changed(self) -> None:
        """Another process sees within X the changes that a process made without Redis."""
        if any(self.away):
            time.sleep(X * 1.1)

    @rule(who=WHO, sid=SIDS, agent=AGENTS, data=st.sampled_from([None, [], {"x": 1}]))
    def bind(self, who: int, sid: str, agent: str, data: Any) -> None:
        count = self.expected.get(sid, ("", 0, None))[1] + 1
        bound = self.govs[who].sessions.bind(sid, agent, data=data)
        assert (bound.agent_id, bound.bind_count, bound.data) == (agent, count, data)
        self.expected[sid] = agent, count, data
        self.changed()

    @rule(who=WHO, sid=SIDS, agent=AGENTS)
    def bind_if_absent(self, who: int, sid: str, agent: str) -> None:
        held = self.expected.get(sid)
        try:
            bound = self.govs[who].sessions.bind(sid, agent, if_absent=True)
        except SessionAlreadyBound as refused:
            assert held is not None
            assert refused.existing is not None
            assert refused.existing.agent_id == held[0] != agent
            return
        if held is None:
            held = self.expected[sid] = agent, 1, None
        assert (bound.agent_id, bound.bind_count, bound.data) == held
        self.changed()

    @rule(who=WHO, sid=SIDS)
    def unbind(self, who: int, sid: str) -> None:
        assert self.govs[who].sessions.unbind(sid) is (self.expected.pop(sid, None) is not None)
        self.changed()

    @rule(who=WHO, agent=AGENTS)
    def unbind_agent(self, who: int, agent: str) -> None:
        mine = [sid for sid, held in self.expected.items() if held[0] == agent]
        assert self.govs[who].sessions.unbind_agent(agent) == len(mine)
        for sid in mine:
            del self.expected[sid]
        self.changed()

    @rule(who=WHO, sid=SIDS)
    def rotate(self, who: int, sid: str) -> None:
        new = self.govs[who].sessions.rotate(sid)
        held = self.expected.pop(sid, None)
        assert (new is None) is (held is None)
        if new is not None and held is not None:
            self.expected[new] = held[0], 1, held[2]
        self.changed()

    @rule(who=WHO, sid=SIDS)
    def touch(self, who: int, sid: str) -> None:
        assert self.govs[who].sessions.touch(sid) is (sid in self.expected)

    @rule(who=WHO)
    def goes_away(self, who: int) -> None:
        """Redis, as this process sees it."""
        if not self.away[who]:
            self.away[who] = True
            breaker = redis_of(self.govs[who]).breaker
            breaker._probing.holder = SoleMark  # somebody is at it: no probe of its own
            breaker.trip("a test")

    @rule(who=WHO)
    def comes_back(self, who: int) -> None:
        if self.away[who]:
            self.away[who] = False
            breaker = redis_of(self.govs[who]).breaker
            breaker._try_probe()
            breaker._probing.holder = nobody
            assert breaker.closed

    @rule()
    def loses_all(self) -> None:
        self.plain.flushall()

    @rule()
    def is_saved(self) -> None:
        keys: Any = self.plain.keys("*")
        self.old_since = time.monotonic()
        found: Any = {key: (self.plain.dump(key), self.plain.pttl(key)) for key in keys}
        self.old = {key: (value, ttl) for key, (value, ttl) in found.items() if value is not None}

    @precondition(lambda self: self.old)
    @rule()
    def has_older_data_back(self) -> None:
        """Like a server restarted with its last RDB: clients connect anew, and keys past their end are gone."""
        passed = int((time.monotonic() - self.old_since) * 1000)
        with self.plain.pipeline(transaction=True) as at_once:  # whatever threads of ours do meanwhile
            at_once.flushall()
            for key, (value, ttl) in self.old.items():
                if ttl < 0 or ttl > passed:
                    at_once.restore(key, max(ttl - passed, 0) if ttl > 0 else 0, value)
            at_once.client_kill_filter(_type="normal", skipme=True)
            at_once.execute()
        time.sleep(X * 1.1)

    @invariant()
    def everybody_says_the_same(self) -> None:
        for gov in self.govs:
            for sid in {"s", "t", "u", *self.expected}:
                found = gov.sessions.get(sid)
                assert (found and (found.agent_id, found.bind_count, found.data)) == self.expected.get(sid)
            for agent in ("a", "b"):
                mine = sorted(sid for sid, held in self.expected.items() if held[0] == agent)
                assert gov.sessions.for_agent(agent) == mine


def test_two_processes_agree_with_a_dict(
    make_gov: Callable[..., GovRedis], redis_server: RedisServer, postgres_server: PostgresServer
) -> None:
    SessionMachine.make = staticmethod(  # type: ignore[method-assign]
        lambda: make_gov(redis_url=redis_server.url, database_url=postgres_server.url, metadata_staleness=X)
    )
    SessionMachine.server = redis_server
    run_state_machine_as_test(
        SessionMachine,
        settings=settings(max_examples=8, stateful_step_count=20, suppress_health_check=list(HealthCheck)),
    )
