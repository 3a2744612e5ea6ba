"""LocalSessions: what one process remembers, what it owes, and its bounds."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta, timezone

import pytest

from govredis import SessionBinding, SessionStoreUnavailable
from govredis.sessions.local import LocalSessions

NOW = datetime(2026, 1, 1, tzinfo=timezone.utc)


class Memory(LocalSessions):
    def __init__(self, entries: int = 3, owed_to: str | None = "Redis") -> None:
        self.at = NOW
        super().__init__(entries, lambda: self.at, owed_to)


def binding(sid: str, agent: str = "a", ttl: float = 60) -> SessionBinding:
    return SessionBinding(sid, agent, NOW, NOW + timedelta(seconds=ttl), 1, None, "redis")


def owed(memory: LocalSessions) -> tuple[list[str], list[str], list[str]]:
    sessions, agents, bindings = memory.debts()
    return [s for s, _ in sessions], [a for a, _ in agents], [b.session_id for _, b in bindings]


def test_a_session_ends_at_its_expiry() -> None:
    memory = Memory()
    memory.remember(binding("s"))
    memory.at = NOW + timedelta(seconds=59.9)
    found = memory.get("s")
    assert found is not None
    assert found.backend == "local"
    assert memory.for_agent("a") == ["s"]
    memory.at = NOW + timedelta(seconds=60)
    assert memory.get("s") is None
    assert not memory.knows("s")
    assert memory.for_agent("a") == []
    memory.remember(replace(binding("forever"), expires_at=None))
    memory.at += timedelta(days=1000)
    assert memory.knows("forever")


def test_forgets_the_session_used_longest_ago_beyond_its_bound() -> None:
    memory = Memory(3)
    for sid in ("a", "b", "c"):
        memory.remember(binding(sid))
    memory.remember(binding("a"))
    memory.remember(binding("d"))
    assert [memory.knows(sid) for sid in "abcd"] == [True, False, True, True]


def test_never_forgets_what_it_owes_and_refuses_what_it_could_not_keep() -> None:
    memory = Memory(2)
    memory.bind(binding("a"))
    memory.bind(binding("b"))
    memory.remember(binding("c"))
    assert memory.knows("a")
    assert memory.knows("b")
    with pytest.raises(SessionStoreUnavailable, match="owes it 2 changes"):
        memory.bind(binding("d"))
    assert not memory.knows("d")
    memory.bind(binding("a", "other"))
    memory.unbind("a")
    memory.unbind("x")
    with pytest.raises(SessionStoreUnavailable):
        memory.unbind("y")
    memory.unbind_agent("1")
    memory.unbind_agent("2")
    with pytest.raises(SessionStoreUnavailable):
        memory.unbind_agent("3")
    assert owed(memory) == (["a", "x"], ["1", "2"], ["b"])


def test_owes_nothing_where_there_is_nobody_to_tell() -> None:
    memory = Memory(2, owed_to=None)
    for sid in "abc":
        memory.bind(binding(sid))
        memory.unbind("x" + sid)
        memory.unbind_agent("y" + sid)
    assert owed(memory) == ([], [], [])
    assert [memory.knows(sid) for sid in "abc"] == [False, True, True]


def test_a_revocation_cancels_what_was_owed_before_and_a_binding_follows_it() -> None:
    memory = Memory(9)
    memory.bind(binding("s"))
    memory.unbind("s")
    assert owed(memory) == (["s"], [], [])
    memory.bind(binding("s", "b"))
    assert owed(memory) == (["s"], [], ["s"])
    memory.bind(binding("t", "b"))
    assert memory.unbind_agent("b") == 2
    assert owed(memory) == (["s", "t"], ["b"], [])


def test_what_is_owed_anew_while_being_told_is_owed_still() -> None:
    """unbind, bind; Redis is being told; unbind again: the second revocation must not be taken for the first."""
    memory = Memory(9)
    memory.unbind("s")
    memory.unbind_agent("a")
    memory.bind(binding("s"))
    sessions, agents, bindings = memory.debts()
    memory.unbind("s")
    memory.unbind_agent("a")
    memory.bind(binding("s"))
    for debts in (sessions, agents, [debt for debt, _ in bindings]):
        memory.paid(debts)
    assert owed(memory) == (["s"], ["a"], ["s"])


def test_a_touch_while_being_told_leaves_no_debt_behind() -> None:
    memory = Memory()
    memory.bind(binding("s"))
    _, _, bindings = memory.debts()
    assert memory.touch("s", 100)
    memory.paid([debt for debt, _ in bindings])
    assert owed(memory) == ([], [], [])


def test_an_owed_binding_that_ended_does_not_hinder_the_rest() -> None:
    memory = Memory()
    memory.bind(binding("short", ttl=1))
    memory.bind(binding("long"))
    memory.unbind("x")
    memory.at += timedelta(seconds=2)
    assert owed(memory) == (["x"], [], ["long"])


def test_what_redis_said_before_it_was_away_overrides_nothing_since() -> None:
    """A reply that was on its way while another thread already changed something here."""
    memory = Memory(9)
    memory.unbind("revoked")
    memory.remember(binding("revoked"))
    assert memory.get("revoked") is None
    memory.unbind_agent("b")
    memory.remember(binding("of-b", "b"))
    assert memory.get("of-b") is None
    memory.bind(binding("bound", "mine"))
    memory.remember(binding("bound", "theirs"))
    memory.forget("bound")
    memory.forget_agent("mine")
    found = memory.get("bound")
    assert found is not None
    assert found.agent_id == "mine"


def test_a_revocation_is_known_until_the_outage_in_which_redis_was_told_is_over() -> None:
    memory = Memory(2)
    for sid in ("s", "t"):
        memory.unbind(sid)
    memory.paid(memory.debts()[0], outage=7)
    assert memory.knows("s", 7)
    assert not memory.knows("s", 8), "somebody may have bound it since"
    memory.remember(binding("s", ttl=1))
    memory.bind(binding("t", ttl=1))
    memory.at += timedelta(seconds=2)
    assert not memory.knows("s", 7)
    assert not memory.knows("t", 7)
    for sid in ("u", "v"):
        memory.unbind(sid)
    memory.paid(memory.debts()[0], outage=7)
    memory.unbind("w")
    memory.paid(memory.debts()[0], outage=7)
    assert [memory.knows(sid, 7) for sid in "uvw"] == [False, True, True], "bounded"


def test_rebinding_counts() -> None:
    memory = Memory()
    memory.remember(replace(binding("s"), bind_count=4))
    assert memory.bind(binding("s", "b")).bind_count == 5
    assert memory.bind(binding("new")).bind_count == 1


def test_a_child_owes_nothing() -> None:
    memory = Memory()
    memory.bind(binding("s"))
    memory.unbind("t")
    memory.unbind_agent("u")
    memory.renew_after_fork()
    assert owed(memory) == ([], [], [])
    assert memory.knows("s")
