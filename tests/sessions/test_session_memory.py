"""MemorySessionBackend: the sessions that a process remembers, its pending writes, and the bounds of both."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta, timezone

import pytest

from govredis import SessionBinding, SessionStoreUnavailable
from govredis.sessions.backends.memory_backend import MemorySessionBackend
from govredis.sessions.binding import BindRequest

NOW = datetime(2026, 1, 1, tzinfo=timezone.utc)


class Memory(MemorySessionBackend):
    def __init__(self, entries: int = 3, primary: str | None = "Redis") -> None:
        self.at = NOW
        super().__init__(entries, now=lambda: self.at, primary=primary)


def binding(sid: str, agent: str = "a", ttl: float = 60) -> SessionBinding:
    return SessionBinding(sid, agent, NOW, NOW + timedelta(seconds=ttl), 1, None, "redis")


def bind(memory: MemorySessionBackend, sid: str, agent: str = "a", ttl: float = 60) -> SessionBinding:
    made, _ = memory.bind(BindRequest(sid, agent, NOW, int(ttl * 1000), None, False))
    return made


def pending(memory: MemorySessionBackend) -> tuple[list[str], list[str], list[str]]:
    sessions, agents, bindings = memory.pending()
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


def test_the_session_used_longest_ago_is_forgotten_beyond_the_bound() -> None:
    memory = Memory(3)
    for sid in ("a", "b", "c"):
        memory.remember(binding(sid))
    memory.remember(binding("a"))
    memory.remember(binding("d"))
    assert [memory.knows(sid) for sid in "abcd"] == [True, False, True, True]


def test_pending_writes_are_never_forgotten_and_one_without_room_is_refused() -> None:
    memory = Memory(2)
    bind(memory, "a")
    bind(memory, "b")
    memory.remember(binding("c"))
    assert memory.knows("a")
    assert memory.knows("b")
    with pytest.raises(SessionStoreUnavailable, match="2 changes of this process wait"):
        bind(memory, "d")
    assert not memory.knows("d")
    bind(memory, "a", "other")
    memory.unbind("a")
    memory.unbind("x")
    with pytest.raises(SessionStoreUnavailable):
        memory.unbind("y")
    memory.unbind_agent("1")
    memory.unbind_agent("2")
    with pytest.raises(SessionStoreUnavailable):
        memory.unbind_agent("3")
    assert pending(memory) == (["a", "x"], ["1", "2"], ["b"])


def test_nothing_is_pending_without_a_server() -> None:
    memory = Memory(2, primary=None)
    for sid in "abc":
        bind(memory, sid)
        memory.unbind("x" + sid)
        memory.unbind_agent("y" + sid)
    assert pending(memory) == ([], [], [])
    assert [memory.knows(sid) for sid in "abc"] == [False, True, True]


def test_a_revocation_cancels_a_pending_binding_and_a_later_binding_follows_it() -> None:
    memory = Memory(9)
    bind(memory, "s")
    memory.unbind("s")
    assert pending(memory) == (["s"], [], [])
    bind(memory, "s", "b")
    assert pending(memory) == (["s"], [], ["s"])
    bind(memory, "t", "b")
    assert memory.unbind_agent("b") == 2
    assert pending(memory) == (["s", "t"], ["b"], [])


def test_a_write_made_anew_while_it_is_told_is_still_pending() -> None:
    """unbind, bind; Redis is being told; unbind again: the second revocation must not be taken for the first."""
    memory = Memory(9)
    memory.unbind("s")
    memory.unbind_agent("a")
    bind(memory, "s")
    sessions, agents, bindings = memory.pending()
    memory.unbind("s")
    memory.unbind_agent("a")
    bind(memory, "s")
    for writes in (sessions, agents, [write for write, _ in bindings]):
        memory.told(writes)
    assert pending(memory) == (["s"], ["a"], ["s"])


def test_a_touch_during_the_telling_leaves_nothing_pending() -> None:
    memory = Memory()
    bind(memory, "s")
    _, _, bindings = memory.pending()
    assert memory.get("s", touch=100_000) is not None
    memory.told([write for write, _ in bindings])
    assert pending(memory) == ([], [], [])


def test_a_pending_binding_that_ended_does_not_hinder_the_rest() -> None:
    memory = Memory()
    bind(memory, "short", ttl=1)
    bind(memory, "long")
    memory.unbind("x")
    memory.at += timedelta(seconds=2)
    assert pending(memory) == (["x"], [], ["long"])


def test_an_answer_from_before_the_outage_overrides_nothing_since() -> None:
    """A reply that was on its way while another thread already changed something here."""
    memory = Memory(9)
    memory.unbind("revoked")
    memory.remember(binding("revoked"))
    assert memory.get("revoked") is None
    memory.unbind_agent("b")
    memory.remember(binding("of-b", "b"))
    assert memory.get("of-b") is None
    bind(memory, "bound", "mine")
    memory.remember(binding("bound", "theirs"))
    memory.forget("bound")
    memory.forget_agent("mine")
    found = memory.get("bound")
    assert found is not None
    assert found.agent_id == "mine"


def test_a_revocation_is_known_until_the_outage_in_which_it_was_told_is_over() -> None:
    memory = Memory(2)
    for sid in ("s", "t"):
        memory.unbind(sid)
    memory.told(memory.pending()[0], outage=7)
    assert memory.knows("s", 7)
    assert not memory.knows("s", 8), "somebody may have bound it since"
    memory.remember(binding("s", ttl=1))
    bind(memory, "t", ttl=1)
    memory.at += timedelta(seconds=2)
    assert not memory.knows("s", 7)
    assert not memory.knows("t", 7)
    for sid in ("u", "v"):
        memory.unbind(sid)
    memory.told(memory.pending()[0], outage=7)
    memory.unbind("w")
    memory.told(memory.pending()[0], outage=7)
    assert [memory.knows(sid, 7) for sid in "uvw"] == [False, True, True], "bounded"


def test_rebinding_counts() -> None:
    memory = Memory()
    memory.remember(replace(binding("s"), bind_count=4))
    assert bind(memory, "s", "b").bind_count == 5
    assert bind(memory, "new").bind_count == 1


def test_a_child_has_no_pending_writes() -> None:
    memory = Memory()
    bind(memory, "s")
    memory.unbind("t")
    memory.unbind_agent("u")
    memory.renew_after_fork()
    assert pending(memory) == ([], [], [])
    assert memory.knows("s")
