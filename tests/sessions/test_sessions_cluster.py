"""SessionCache on a Redis Cluster, without PostgreSQL and with it: each node for its own keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from shards import FAILING_OVER, SHAPE, Shards, closed
from support import PATIENT, client_of, eventually

from govredis import BackendUnavailable, GovRedis, SessionStoreUnavailable
from govredis.keys import Keys
from govredis.sessions.backends.row_cache import _catch_up
from govredis.testing.servers import PostgresServer, RedisCluster

pytestmark = [pytest.mark.once]

KEYS = Keys()


@pytest.fixture(scope="module")
def running(one_redis_binary: str) -> Iterator[Shards]:
    with RedisCluster(binary=one_redis_binary, **SHAPE) as cluster:
        yield Shards(cluster)


@pytest.fixture
def shards(running: Shards) -> Shards:
    running.revive()
    return running


@pytest.fixture
def gov(make_gov: Callable[..., GovRedis], shards: Shards) -> GovRedis:
    return make_gov(redis_url=shards.url, metadata_staleness=60, **PATIENT)


@pytest.fixture
def other(make_gov: Callable[..., GovRedis], shards: Shards) -> GovRedis:
    """Another process, in effect."""
    return make_gov(redis_url=shards.url, metadata_staleness=60, **PATIENT)


@pytest.fixture
def durable(make_gov: Callable[..., GovRedis], shards: Shards, postgres_server: PostgresServer) -> GovRedis:
    return make_gov(redis_url=shards.url, database_url=postgres_server.url, metadata_staleness=60, **PATIENT)


def agent_on(shards: Shards, node: int) -> str:
    return shards.ids(KEYS.agent_sessions, "agent")[node]


class TestWithoutPostgres:
    def test_sessions_of_an_agent_lie_on_all_nodes(self, gov: GovRedis, shards: Shards) -> None:
        sessions, ids = gov.sessions, shards.ids(KEYS.session)
        for sid in ids:
            assert sessions.bind(sid, "a", data={"n": sid}).backend == "redis"
            assert sessions.update(sid, {"m": 1}).data == {"m": 1}
            assert sessions.touch(sid, ttl=9000)
        assert sessions.for_agent("a") == sorted(ids)
        new = sessions.rotate(ids[0])
        assert new is not None
        assert sessions.for_agent("a") == sorted([*ids[1:], new])
        assert sessions.unbind(ids[1])
        assert sessions.unbind_agent("a") == 2
        assert [sessions.get(sid) for sid in (*ids, new)] == [None] * 4

    def test_a_node_that_is_away_costs_its_own_sessions(self, gov: GovRedis, shards: Shards) -> None:
        ids, agents = shards.ids(KEYS.session), shards.ids(KEYS.agent_sessions, "agent")
        for sid in ids:
            gov.sessions.bind(sid, agents[0])
        shards.cluster.nodes[2].kill()
        for sid in ids[:2]:
            found = gov.sessions.get(sid, touch=True)
            assert found is not None
            assert found.backend == "redis"
            assert gov.sessions.bind(sid, agents[1]).backend == "redis"
            assert gov.sessions.unbind(sid)
            assert gov.sessions.get(sid) is None
        with pytest.raises(SessionStoreUnavailable):
            gov.sessions.get(shards.ids(KEYS.session, "unknown")[2])
        found = gov.sessions.get(ids[2])
        assert found is not None
        assert found.backend == "local"
        assert {name for name in gov.counters.read() if "degraded" in name} == {"sessions.degraded.get"}

    def test_a_revocation_is_told_at_the_return_while_others_work(
        self, gov: GovRedis, other: GovRedis, shards: Shards
    ) -> None:
        ids = shards.ids(KEYS.session)
        for sid in ids:
            gov.sessions.bind(sid, agent_on(shards, 0))
        shards.cluster.nodes[1].kill()
        assert gov.sessions.unbind(ids[1])
        client_of(gov).replay_soon("a test", KEYS.session(ids[0]))
        closed(gov, [KEYS.session(ids[0])])
        for _ in range(20):
            found = gov.sessions.get(ids[0])
            assert found is not None
            assert found.backend == "redis", "the debt is that node's"
        shards.start(shards.cluster.nodes[1])
        closed(gov, [KEYS.session(ids[1])])
        assert gov.sessions.get(ids[1]) is None
        eventually(lambda: client_of(other).at(KEYS.session(ids[1])).breaker.closed)
        assert other.sessions.get(ids[1]) is None
        assert other.sessions.get(ids[2]) is not None

    @pytest.mark.parametrize("dead", [0, 1], ids=["the index's node", "a session's node"])
    def test_an_agent_is_revoked_on_all_nodes_once_they_are_back(
        self, gov: GovRedis, other: GovRedis, shards: Shards, dead: int
    ) -> None:
        agent, ids, bystander = agent_on(shards, 0), shards.ids(KEYS.session), agent_on(shards, 2)
        mine = [*ids, *shards.ids(KEYS.session, "second")]
        for sid in mine:
            other.sessions.bind(sid, agent)
        for sid in shards.ids(KEYS.session, "bystander"):
            other.sessions.bind(sid, bystander)
        gov.sessions.get(ids[0])
        shards.cluster.nodes[dead].kill()
        gov.sessions.unbind_agent(agent)
        assert gov.sessions.get(ids[2]) is None
        living = KEYS.session(ids[2]), KEYS.session(ids[1 - dead])
        closed(gov, living)
        assert _backend(gov, shards.ids(KEYS.session, "bystander")[2]) == "redis"
        assert all(client_of(gov).at(key).breaker.closed for key in living), "the debt is the dead node's"
        shards.start(shards.cluster.nodes[dead])
        closed(gov, map(KEYS.session, ids))
        eventually(lambda: not other.sessions.for_agent(agent) if _is_back(other, ids) else False)
        for sid in mine:
            assert gov.sessions.get(sid) is None
            assert other.sessions.get(sid) is None
        assert len(other.sessions.for_agent(bystander)) == 3
        assert not gov.sessions._memory._to_unbind_agents
        assert not gov.sessions._memory._to_unbind

    def test_who_logs_in_after_the_revocation_stays(self, gov: GovRedis, other: GovRedis, shards: Shards) -> None:
        agent, ids = agent_on(shards, 0), shards.ids(KEYS.session)
        for sid in ids:
            other.sessions.bind(sid, agent)
        shards.cluster.nodes[1].kill()
        gov.sessions.unbind_agent(agent)
        new = shards.ids(KEYS.session, "new")[2]
        assert other.sessions.bind(new, agent).backend == "redis"
        found = gov.sessions.get(new)
        assert found is not None
        shards.start(shards.cluster.nodes[1])
        closed(gov, map(KEYS.session, ids))
        eventually(lambda: other.sessions.for_agent(agent) == [new] if _is_back(other, ids) else False)

    @pytest.mark.parametrize("dead", [0, 1], ids=["the index's node", "the session's node"])
    def test_a_binding_is_told_with_its_index(self, gov: GovRedis, other: GovRedis, shards: Shards, dead: int) -> None:
        agent, sid = agent_on(shards, 0), shards.ids(KEYS.session)[1]
        shards.cluster.nodes[dead].kill()
        assert gov.sessions.bind(sid, agent, data=[1]).backend == "local"
        found = gov.sessions.get(sid)
        assert found is not None
        assert found.data == [1]
        shards.start(shards.cluster.nodes[dead])
        eventually(lambda: not gov.sessions._memory._to_bind)
        closed(gov, [KEYS.session(sid), KEYS.agent_sessions(agent)])
        eventually(lambda: _is_back(other, [sid]))
        found = other.sessions.get(sid)
        assert found is not None
        assert (found.agent_id, found.data, found.backend) == (agent, [1], "redis")
        assert other.sessions.for_agent(agent) == [sid]

    def test_an_index_never_names_too_few(self, gov: GovRedis, shards: Shards) -> None:
        """A node without the index takes no binding, and no longer life."""
        agent, sid = agent_on(shards, 0), shards.ids(KEYS.session)[1]
        gov.sessions.bind(sid, agent, ttl=100)
        shards.cluster.nodes[0].kill()
        gov.sessions.get(sid, touch=True)
        assert shards.cluster.nodes[1].command("PTTL", KEYS.session(sid)) <= 100_000
        assert gov.counters.get("sessions.degraded.touch") == 1
        new = shards.ids(KEYS.session, "new")[1]
        gov.sessions.bind(new, agent)
        assert not shards.cluster.nodes[1].command("EXISTS", KEYS.session(new))

    def test_an_update_is_told_at_the_return(self, gov: GovRedis, other: GovRedis, shards: Shards) -> None:
        sid = shards.ids(KEYS.session)[1]
        gov.sessions.bind(sid, "a", data=1)
        shards.cluster.nodes[1].kill()
        assert gov.sessions.update(sid, 2).backend == "local"
        shards.start(shards.cluster.nodes[1])
        closed(gov, [KEYS.session(sid)])
        eventually(lambda: _is_back(other, [sid]))
        found = other.sessions.get(sid)
        assert found is not None
        assert found.data == 2

    def test_a_mark_between_the_two_halves_of_a_bind_stops_it(
        self, gov: GovRedis, other: GovRedis, shards: Shards, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        agent, sid = agent_on(shards, 0), shards.ids(KEYS.session)[1]
        client = client_of(gov)
        pipeline = client.pipeline

        def slow(commands: Any, scripts: Any = (), **how: Any) -> Any:
            replies = pipeline(commands, scripts, **how)
            if any(KEYS.agent_sessions(agent) in command for command in commands):
                other.sessions.unbind_agent(agent)  # it finds the session in the index
            return replies

        monkeypatch.setattr(client, "pipeline", slow)
        gov.sessions.bind(sid, agent)
        monkeypatch.undo()
        assert gov.counters.get("sessions.overtaken") == 1
        assert other.sessions.get(sid) is None

    def test_sessions_bear_a_slot_that_moves(self, gov: GovRedis, shards: Shards) -> None:
        sid = shards.ids(KEYS.session)[0]
        gov.sessions.bind(sid, "a")
        slot = shards.cluster.nodes[0].command("CLUSTER", "KEYSLOT", KEYS.session(sid))
        first, second = shards.cluster.nodes[:2]
        shards.cluster.move_slots([slot], second)
        try:
            found = gov.sessions.get(sid, touch=True)
            assert found is not None
            assert found.backend == "redis"
            assert gov.sessions.unbind(sid)
        finally:
            shards.cluster.move_slots([slot], first)
        assert gov.sessions.get(sid) is None

    def test_a_slot_that_was_left_half_moved_costs_its_own_sessions(
        self, gov: GovRedis, other: GovRedis, shards: Shards
    ) -> None:
        sid, neighbour = shards.ids(KEYS.session)[0], shards.ids(KEYS.session, "neighbour")[0]
        gov.sessions.bind(sid, "a")
        gov.sessions.bind(neighbour, "a")
        first, second = shards.cluster.nodes[:2]
        slot = first.command("CLUSTER", "KEYSLOT", KEYS.session(sid))
        try:
            with shards.cluster.moving(slot, second):
                assert gov.sessions.unbind(sid)
                assert gov.sessions.get(sid) is None
                for _ in range(20):
                    assert _backend(gov, neighbour) == "redis"
                assert _backend(other, sid) == "redis", "nobody could tell it"
            eventually(lambda: other.sessions.get(sid) is None)
        finally:
            shards.cluster.move_slots([slot], first)

    def test_what_is_pending_is_told_to_the_replica_that_is_promoted(
        self, make_gov: Callable[..., GovRedis], one_redis_binary: str
    ) -> None:
        with RedisCluster(binary=one_redis_binary, **FAILING_OVER) as cluster:
            gov, other = (make_gov(redis_url=cluster.url, **PATIENT) for _ in range(2))
            ids = [f"s{n}" for n in range(12)]
            for sid in ids:
                gov.sessions.bind(sid, "a")
            first = cluster.master_of(KEYS.session(ids[0]))
            first.kill()
            gov.sessions.unbind_agent("a")
            assert [gov.sessions.get(sid) for sid in ids] == [None] * 12
            eventually(lambda: not gov.sessions._memory._to_unbind_agents and not gov.sessions._memory._to_unbind)
            assert cluster.master_of(KEYS.session(ids[0])) is not first
            eventually(lambda: _is_back(other, ids))
            assert [other.sessions.get(sid) for sid in ids] == [None] * 12


class TestWithPostgres:
    def test_a_node_that_is_away_costs_its_own_sessions(self, durable: GovRedis, shards: Shards) -> None:
        ids = shards.ids(KEYS.session)
        for sid in ids:
            durable.sessions.bind(sid, agent_on(shards, 0))
        assert [_backend(durable, sid) for sid in ids] == ["redis"] * 3
        shards.cluster.nodes[1].kill()
        assert [_backend(durable, sid) for sid in ids] == ["redis", "postgres", "redis"]
        assert durable.sessions.for_agent(agent_on(shards, 0)) == sorted(ids)

    def test_a_revocation_of_an_agent_is_told_to_each_node_before_its_use(
        self, durable: GovRedis, shards: Shards
    ) -> None:
        agent, ids = agent_on(shards, 0), shards.ids(KEYS.session)
        for sid in ids:
            assert durable.sessions.bind(sid, agent).backend == "redis"
        shards.cluster.nodes[1].kill()
        assert durable.sessions.unbind_agent(agent) == 3
        assert shards.cluster.nodes[0].command("EXISTS", KEYS.session(ids[0])) == 0
        assert [durable.sessions.get(sid) for sid in ids] == [None] * 3
        assert durable.counters.get("sessions.degraded.untold") == 1
        shards.start(shards.cluster.nodes[1])
        closed(durable, map(KEYS.session, ids))
        assert [durable.sessions.get(sid) for sid in ids] == [None] * 3, "no copy is believed"

    def test_a_node_that_cannot_be_told_yet_is_not_used(self, durable: GovRedis, shards: Shards) -> None:
        """It may answer the probe, and nothing else until it has heard of the other nodes."""
        node = client_of(durable).at(KEYS.session(shards.ids(KEYS.session)[1]))
        assert durable.internal.freshness is not None
        lease = durable.internal.freshness.of(node)
        lease.drain()
        shards.cluster.nodes[1].kill()
        with pytest.raises(BackendUnavailable):
            _catch_up(lease)

    def test_without_the_index_no_copy_is_put_and_an_older_one_goes(self, durable: GovRedis, shards: Shards) -> None:
        sid, agents = shards.ids(KEYS.session)[1], shards.ids(KEYS.agent_sessions, "agent")
        durable.sessions.bind(sid, agents[2])
        shards.cluster.nodes[0].kill()
        assert durable.sessions.bind(sid, agents[0]).backend == "postgres"
        assert shards.cluster.nodes[1].command("EXISTS", KEYS.session(sid)) == 0
        found = durable.sessions.get(sid)
        assert found is not None
        assert found.agent_id == agents[0]
        assert durable.counters.get("sessions.degraded.index") == 1

    def test_a_copy_in_a_slot_that_has_moved_is_not_believed_unseen(self, durable: GovRedis, shards: Shards) -> None:
        sid = shards.ids(KEYS.session)[0]
        durable.sessions.bind(sid, "a")
        assert _backend(durable, sid) == "redis"
        slot = shards.cluster.nodes[0].command("CLUSTER", "KEYSLOT", KEYS.session(sid))
        first, second = shards.cluster.nodes[:2]
        shards.cluster.move_slots([slot], second)
        try:
            assert durable.sessions.get(sid) is not None
            assert durable.sessions.unbind(sid)
            assert durable.sessions.get(sid) is None
        finally:
            shards.cluster.move_slots([slot], first)
        assert durable.sessions.get(sid) is None


def _backend(gov: GovRedis, sid: str) -> str:
    found = gov.sessions.get(sid)
    return "" if found is None else found.backend


def _is_back(gov: GovRedis, ids: list[str]) -> bool:
    """Are the nodes of these sessions used by that process again? They are probed in the background."""
    client = client_of(gov)
    return all(client.at(KEYS.session(sid)).breaker.closed for sid in ids)
