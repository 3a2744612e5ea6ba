"""Locks on a Redis Cluster: each on the node of its slot, also while nodes are away and slots are on their way."""

from __future__ import annotations

import itertools
import json
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from support import PATIENCE

from govredis import BackendUnavailable, Config, GovRedis, HeldLock, LockTimeout, LockUnavailable
from govredis._acl import rights
from govredis.cli import main
from govredis.client import NotServedHere, RedisClient, slot_of
from govredis.client.cluster import cluster_client
from govredis.keys import Keys
from govredis.locks import DistributedLock, acquisition
from govredis.locks.held_list import HeldLockList
from govredis.testing.servers import RedisCluster, RedisServer

pytestmark = [pytest.mark.once, pytest.mark.one_redis]

MakeGov = Callable[..., GovRedis]
Eventually = Callable[..., Any]

KINDS: dict[str, Callable[..., HeldLock]] = {
    "lock": lambda locks, name, **options: locks.acquire(name, **options),
    "read": lambda locks, name, **options: locks.rwlock(name).read(**options),
    "write": lambda locks, name, **options: locks.rwlock(name).write(**options),
    "semaphore": lambda locks, name, **options: locks.semaphore(name, slots=1).acquire(**options),
}


@pytest.fixture(scope="module")
def calm(redis_binary: str) -> Iterator[RedisCluster]:
    config = ["cluster-node-timeout 60000"]
    with RedisCluster(replicas=0, binary=redis_binary, config=config) as started:
        yield started


@pytest.fixture
def cluster(calm: RedisCluster) -> RedisCluster:
    """Three masters without replicas, which all run; empty."""
    for node in calm.nodes:
        node.command("FLUSHALL")
    return calm


@pytest.fixture
def mortal_cluster(redis_binary: str) -> Iterator[RedisCluster]:
    """The same, to kill and pause; a node that is away keeps the others from nothing."""
    config = ["cluster-node-timeout 1000", "cluster-require-full-coverage no"]
    with RedisCluster(replicas=0, binary=redis_binary, config=config) as started:
        yield started


@pytest.fixture
def locks(make_gov: MakeGov, cluster: RedisCluster) -> DistributedLock:
    return make_gov(redis_url=cluster.url).locks


@pytest.fixture
def far(make_gov: MakeGov, cluster: RedisCluster, tmp_path: Path) -> DistributedLock:
    """On another host: with lock files of its own."""
    return make_gov(redis_url=cluster.url, lock_folder=str(tmp_path / "far")).locks


def names_on(cluster: RedisCluster, node: RedisServer) -> Iterator[str]:
    """Names of locks, of every kind, whose keys that node has."""
    return (f"x{n}" for n in itertools.count() if cluster.master_of(slot_of(f"lock:x{n}")) is node)


def names_in(slot: int) -> Iterator[str]:
    return (f"x{n}" for n in itertools.count() if slot_of(f"lock:x{n}") == slot)


def a_name_for_each(cluster: RedisCluster) -> list[str]:
    return [next(names_on(cluster, node)) for node in cluster.masters]


def another(cluster: RedisCluster, node: RedisServer) -> RedisServer:
    return next(other for other in cluster.masters if other is not node)


def client_of(locks: DistributedLock) -> RedisClient:
    assert locks._redis is not None
    return locks._redis


# -- the lists -------------------------------------------------------------------------------------------------------


def test_the_list_of_a_lock_lies_in_the_256_slots_of_the_lock() -> None:
    of_cluster = HeldLockList(SimpleNamespace(has_slots=True), Keys("app:"))  # type: ignore[arg-type]
    assert len(set(of_cluster.keys)) == 64
    seen = set()
    for n in range(20_000):
        key = f"app:lock:{n}"
        listed = of_cluster.key_for(key)
        assert slot_of(listed) // 256 == slot_of(key) // 256
        seen.add(listed)
    assert seen == set(of_cluster.keys)
    of_one = HeldLockList(SimpleNamespace(has_slots=False), Keys("app:"))  # type: ignore[arg-type]
    assert of_one.keys == ("app:govredis:locks",)
    assert of_one.key_for("app:lock:1") == "app:govredis:locks"


def test_the_acl_of_a_cluster_has_the_lists() -> None:
    assert "govredis:locks:{*}" in rights(Config(redis_url="redis+cluster://h"), ["locks"]).patterns
    assert "govredis:locks" in rights(Config(), ["locks"]).patterns


@pytest.mark.parametrize("kind", KINDS)
def test_a_lock_is_listed_on_its_own_node_until_its_release(
    locks: DistributedLock, far: DistributedLock, cluster: RedisCluster, eventually: Eventually, kind: str
) -> None:
    names = a_name_for_each(cluster)
    held = [KINDS[kind](locks, name, ttl=1000) for name in names]
    eventually(lambda: far.count_held().held == 3)
    for node in cluster.masters:
        (key,) = node.command("KEYS", "govredis:locks*")
        assert node.command("ZCARD", key) == 1
    found = far.held()
    assert found.unanswered == ()
    assert {(holder.name, holder.kind, holder.token) for holder in found} == {(h.name, kind, h.token) for h in held}
    assert all(500 < (holder.remaining or 0) <= 1000.01 for holder in found)
    assert [holder.owner for holder in far.glance()] == [holder.owner for holder in found]
    assert far.count_held()[:2] == (3, 0)
    assert all(lock.release() for lock in held)
    assert [node.command("KEYS", "govredis:locks*") for node in cluster.masters] == [[], [], []]
    assert far.held() == []


def test_locks_from_outside_are_found_on_every_node(
    locks: DistributedLock, cluster: RedisCluster, eventually: Eventually
) -> None:
    names = a_name_for_each(cluster)
    for name in names:
        cluster.master_of(f"lock:{name}").command("SET", f"lock:{name}", "async", "EX", 600)
    assert [(h.name, h.owner, h.token) for h in locks.held()] == [(name, "async", None) for name in sorted(names)]
    eventually(lambda: locks.count_held().outside == 3)
    assert [holder.name for holder in locks.glance()] == sorted(names)


def test_of_many_locks_the_one_held_longest_is_named(locks: DistributedLock, eventually: Eventually) -> None:
    held = [locks.acquire(f"x{n}", ttl=1000) for n in range(100)]
    eventually(lambda: locks.count_held().held == 100)
    counts = locks.count_held()
    assert counts.longest is not None
    assert (counts.longest.name, counts.longest.token) == ("x0", held[0].token)
    assert len(locks.glance()) == len(locks.held()) == 100
    assert all(lock.release() for lock in held)
    assert locks.held() == []


# -- a node that is away -----------------------------------------------------------------------------------------------


def of_nodes(cluster: RedisCluster, make_gov: MakeGov) -> tuple[DistributedLock, RedisServer, str, str]:
    """Locks, a node, a name there, and a name elsewhere."""
    locks = make_gov(redis_url=cluster.url, socket_timeout=1, connect_timeout=1).locks
    node = cluster.masters[0]
    return locks, node, next(names_on(cluster, node)), next(names_on(cluster, another(cluster, node)))


def test_a_release_pending_for_a_node_that_is_away_keeps_nobody_from_the_others(
    make_gov: MakeGov, mortal_cluster: RedisCluster, eventually: Eventually
) -> None:
    locks, node, there, here = of_nodes(mortal_cluster, make_gov)
    redis = client_of(locks)
    held = locks.acquire(there, ttl=1000)
    node.pause()
    assert held.release() is True, "it is released later"
    assert locks._backend.pending_releases
    for _ in range(20):
        with locks.acquire(here, timeout=0) as other:
            assert not other.degraded
    assert not redis.at(f"lock:{there}").breaker.closed
    with locks.acquire(there, timeout=PATIENCE) as alone:
        assert alone.degraded
    node.resume()
    eventually(lambda: not locks._backend.pending_releases)
    assert node.command("GET", f"lock:{there}") is None
    eventually(lambda: redis.at(f"lock:{there}").breaker.closed)
    with locks.acquire(there, timeout=0) as again:
        assert not again.degraded


@pytest.mark.usefixtures("renewed_soon")
def test_a_node_that_hangs_keeps_no_other_nodes_locks_from_their_renewals(
    make_gov: MakeGov, mortal_cluster: RedisCluster, eventually: Eventually
) -> None:
    locks, node, there, here = of_nodes(mortal_cluster, make_gov)
    away, held = locks.acquire(there, ttl=60), locks.acquire(here, ttl=60)
    node.pause()
    eventually(lambda: locks.counters.get("locks.renewals_missed"))
    for _ in range(5):
        before = held._lease.deadline, away._lease.deadline
        eventually(lambda before=before: held._lease.deadline > before[0])
        assert away._lease.deadline == before[1]
    node.resume()
    before = held._lease.deadline, away._lease.deadline
    eventually(lambda: away._lease.deadline > before[1])
    assert locks.counters.get("locks.lost") == 0
    assert away.release() and held.release()


def test_a_release_waits_for_no_list_that_is_on_another_node(
    make_gov: MakeGov, mortal_cluster: RedisCluster, eventually: Eventually
) -> None:
    """A Cluster may have parted the slots of a list."""
    locks, node, there, _ = of_nodes(mortal_cluster, make_gov)
    key = f"lock:{there}"
    held = locks.acquire(there, ttl=1000)
    eventually(lambda: locks.count_held().held == 1)
    to = another(mortal_cluster, node)
    mortal_cluster.move_slots([slot_of(key)], to)
    with pytest.raises(LockTimeout):
        locks.acquire(there, timeout=0)
    node.kill()
    assert held.release() is True
    assert to.command("GET", key) is None
    assert client_of(locks).at(key).breaker.times_opened == 0, "it was not pending for a moment either"


def test_an_error_of_the_list_costs_no_release(
    locks: DistributedLock, cluster: RedisCluster, eventually: Eventually
) -> None:
    held = locks.acquire("x", ttl=1000)
    eventually(lambda: locks.count_held().held == 1)
    for node in cluster.masters:
        for key in node.command("KEYS", "govredis:locks:*"):
            node.command("SET", key, "of another")
    assert held.release() is True
    assert cluster.master_of("lock:x").command("GET", "lock:x") is None


def test_held_says_which_nodes_did_not_answer(
    make_gov: MakeGov, mortal_cluster: RedisCluster, eventually: Eventually
) -> None:
    locks, node, there, here = of_nodes(mortal_cluster, make_gov)
    with locks.acquire(there, ttl=1000), locks.acquire(here, ttl=1000):
        eventually(lambda: locks.count_held().held == 2)
        node.kill()
        for look in locks.held, locks.glance:
            found = look()
            assert [holder.name for holder in found] == [here]
            assert found.unanswered == (f"Redis at 127.0.0.1:{node.port}",)
        counts = locks.count_held()
        assert (counts.held, counts.unanswered) == (1, (f"Redis at 127.0.0.1:{node.port}",))
        shown = CliRunner().invoke(main, ["locks", "--json"], env={"REDIS_URL": mortal_cluster.url})
        assert [holder["name"] for holder in json.loads(shown.stdout)] == [here]
        assert shown.exit_code == 3
        assert shown.stderr == f"Error: locks are missing: no answer from Redis at 127.0.0.1:{node.port}\n"
        for other in mortal_cluster.nodes:
            if other is not node:
                other.kill()
        for look in locks.held, locks.glance, locks.count_held:
            with pytest.raises(BackendUnavailable):
                look()


def test_the_locks_of_a_node_that_is_away_have_their_fallback_alone(
    make_gov: MakeGov, mortal_cluster: RedisCluster, eventually: Eventually
) -> None:
    locks, node, there, here = of_nodes(mortal_cluster, make_gov)
    locks.acquire(there).release()
    node.kill()
    with locks.acquire(there, timeout=PATIENCE) as held:
        assert held.degraded
        eventually(lambda: client_of(locks).away_for(f"lock:{there}") > acquisition.GRACE)
        assert client_of(locks).away_for(f"lock:{here}") == 0
        assert locks.try_acquire(there) is None
    with locks.acquire(here, timeout=0) as other:
        assert not other.degraded
    failing = make_gov(redis_url=mortal_cluster.url, lock_fallback="fail", connect_timeout=1).locks
    with pytest.raises(LockUnavailable):
        failing.acquire(there, timeout=PATIENCE)
    failing.acquire(here, timeout=0).release()


def test_a_process_that_starts_while_no_node_answers_has_its_fallback(
    make_gov: MakeGov, mortal_cluster: RedisCluster
) -> None:
    for node in mortal_cluster.nodes:
        node.kill()
    locks = make_gov(redis_url=mortal_cluster.url, connect_timeout=1).locks
    with locks.acquire("x", timeout=PATIENCE) as held, locks.acquire("y", timeout=0) as at_once:
        assert held.degraded
        assert at_once.degraded, "once it has been away for a second"


# -- a slot that is on its way -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_lock_whose_slot_is_on_its_way_waits_and_never_falls_to_lock_files(
    locks: DistributedLock, cluster: RedisCluster, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(acquisition, "GRACE", 0.0)
    monkeypatch.setattr(cluster_client, "_PATIENCE", 0.01)
    slot = 5000
    name = next(names_in(slot))
    source = cluster.master_of(slot)
    KINDS[kind](locks, name).release()  # the fence is left
    with ThreadPoolExecutor(1) as pool:
        with cluster.moving(slot, another(cluster, source)):
            for timeout in 0, 0.1:
                with pytest.raises(LockUnavailable, match=r"rehashing of slot|answered ASK") as caught:
                    KINDS[kind](locks, name, timeout=timeout)
                assert "lock files" not in str(caught.value)
            assert client_of(locks).at(f"lock:{name}").breaker.closed
            with locks.acquire(next(names_on(cluster, source)), timeout=0) as other:
                assert not other.degraded, "the node goes on"
            waits = pool.submit(KINDS[kind], locks, name, timeout=PATIENCE)
        with waits.result(PATIENCE) as held:
            assert not held.degraded
    assert locks.counters.get("locks.degraded_grants") == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_lock_released_while_its_slot_is_on_its_way_is_free_once_that_has_arrived(
    locks: DistributedLock, far: DistributedLock, cluster: RedisCluster, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(cluster_client, "_PATIENCE", 0.01)
    slot = 6000
    name = next(names_in(slot))
    source = cluster.master_of(slot)
    held = KINDS[kind](locks, name, ttl=1000)
    with cluster.moving(slot, another(cluster, source), [held._lease._resource.keys[1]]):
        assert held.release() is True
        assert client_of(locks).at(f"lock:{name}").breaker.closed, "that is no outage"
        with locks.acquire(next(names_on(cluster, source)), timeout=0) as other:
            assert not other.degraded
    with KINDS[kind](far, name, timeout=PATIENCE) as next_one:
        assert next_one.token > held.token


@pytest.mark.parametrize("kind", KINDS)
def test_a_waiter_gets_the_lock_after_its_slot_has_moved(
    locks: DistributedLock, far: DistributedLock, cluster: RedisCluster, eventually: Eventually, kind: str
) -> None:
    slot = 7000
    name = next(names_in(slot))
    held = KINDS[kind](locks, name, ttl=1000)
    queue = held._lease._resource.keys[2]
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(KINDS["write" if kind == "read" else kind], far, name, timeout=PATIENCE)
        eventually(lambda: cluster.master_of(slot).command("ZCARD", queue))
        cluster.move_slots([slot], another(cluster, cluster.master_of(slot)))
        assert held.release() is True
        with waits.result(PATIENCE) as mine:
            assert not mine.degraded
            assert mine.token > held.token


def test_a_lock_is_kept_while_its_slot_moves(
    locks: DistributedLock, far: DistributedLock, cluster: RedisCluster, renew_now: Any, eventually: Eventually
) -> None:
    slot = 8000
    held = locks.acquire(next(names_in(slot)), ttl=1000)
    for _ in range(3):
        cluster.move_slots([slot], another(cluster, cluster.master_of(slot)))
        before = held._lease.deadline
        renew_now([held])
        eventually(lambda before=before: held._lease.deadline > before)
        with pytest.raises(LockTimeout):
            far.acquire(held.name, timeout=0)
    held.extend(500)
    assert held.release() is True


def test_many_renewals_of_a_slot_that_is_on_its_way_wait_for_it_together(
    locks: DistributedLock, cluster: RedisCluster, monkeypatch: pytest.MonkeyPatch, renew_now: Any,
    eventually: Eventually,
) -> None:  # fmt: skip
    slot = 9000
    held = [locks.acquire(name, ttl=1000) for name in itertools.islice(names_in(slot), 10)]
    other = locks.acquire("x", ttl=1000)
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)

    clock = SimpleNamespace(monotonic=lambda: sum(slept), sleep=sleep)
    keys = [lock._lease._resource.keys[1] for lock in held]
    with cluster.moving(slot, another(cluster, cluster.master_of(slot)), keys):
        before = other._lease.deadline
        monkeypatch.setattr(cluster_client, "time", clock)
        renew_now([*held, other])
        eventually(lambda: other._lease.deadline > before)
        eventually(lambda: locks.counters.get("locks.renewals_missed") >= 10)
        assert sum(slept) < 2 * cluster_client._PATIENCE, "and not that for each"
        monkeypatch.undo()
    assert all(lock.release() for lock in (*held, other))


def test_no_token_of_an_earlier_turn_is_left_behind_where_a_slot_is_half_moved(
    locks: DistributedLock, cluster: RedisCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its list is missing on one node, and the others of the lock's keys on the other."""
    monkeypatch.setattr(cluster_client, "_PATIENCE", 0.01)
    slot = 11_000
    resource = locks._resource(next(names_in(slot)))
    key, fence, queue, waiters = resource.keys
    node = cluster.master_of(slot)
    for command in (
        ("SET", key, "another"),
        ("SET", fence, 1),
        ("ZADD", queue, 1, "other"),
        ("HSET", waiters, "other", 1),
    ):
        node.command(*command)
    node.command("RPUSH", f"{queue}:me", 1)
    to = another(cluster, node)
    with cluster.moving(slot, to, resource.keys), pytest.raises(NotServedHere):
        locks._backend.acquire(resource, "me", 60, 0, True)
    assert to.command("LRANGE", f"{queue}:me", 0, -1) == ["1"]
    assert locks._backend.acquire(resource, "me", 60, 0, True)[0] == 0
    assert to.command("LRANGE", f"{queue}:me", 0, -1) == []


@pytest.mark.parametrize("kind", ["lock", "write", "semaphore"])
def test_holders_exclude_each_other_while_their_slots_are_half_moved(
    locks: DistributedLock, far: DistributedLock, cluster: RedisCluster, kind: str
) -> None:
    slot = 10_000
    names = list(itertools.islice(names_in(slot), 3))
    inside: dict[str, list[int]] = {name: [] for name in names}
    wrong: list[str] = []
    enough = threading.Event()
    held: list[int] = []

    def work(of: DistributedLock, name: str) -> None:
        last = 0
        while not enough.is_set():
            try:
                lock = KINDS[kind](of, name, timeout=0.3, ttl=60)
            except (LockTimeout, LockUnavailable):
                continue
            inside[name].append(lock.token)
            if lock.degraded or len(inside[name]) != 1:
                wrong.append(f"{name}: {inside[name]}, {lock}")
            if lock.token <= last:
                wrong.append(f"{name}: token {lock.token} after {last}")
            last = lock.token
            inside[name].remove(lock.token)
            if not lock.release():
                wrong.append(f"{name}: {lock} was lost")
            held.append(1)

    with ThreadPoolExecutor(12) as pool:
        workers = [pool.submit(work, of, name) for name in names for of in (locks, far) for _ in range(2)]
        for _ in range(25):
            source = cluster.master_of(slot)
            keys = source.command("CLUSTER", "GETKEYSINSLOT", slot, 1000)
            before = len(held)
            with cluster.moving(slot, another(cluster, source), random.sample(keys, len(keys) // 2)):
                enough.wait(random.uniform(0, 0.1))
            while len(held) < before + 5 and not any(worker.done() for worker in workers):
                enough.wait(0.01)
        enough.set()
        for worker in workers:
            worker.result(PATIENCE)
    assert wrong == []


# -- failover ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def replicated(redis_binary: str) -> Iterator[RedisCluster]:
    with RedisCluster(binary=redis_binary, config=["cluster-require-full-coverage no"]) as started:
        yield started


def test_over_a_failover_a_lock_is_kept_and_tokens_rise(
    make_gov: MakeGov, replicated: RedisCluster, tmp_path: Path, eventually: Eventually
) -> None:
    cluster = replicated
    locks = make_gov(redis_url=cluster.url).locks
    far = make_gov(redis_url=cluster.url, lock_folder=str(tmp_path / "far")).locks
    node = cluster.masters[0]
    first, second = itertools.islice(names_on(cluster, node), 2)
    held = locks.acquire(first, ttl=1000)
    tokens = []
    for _ in range(2):
        for of in locks, far:
            with of.acquire(second) as short:
                tokens.append(short.token)
    replica = cluster.replicas_of(node)[0]
    eventually(lambda: replica.command("DBSIZE") == node.command("DBSIZE"))
    node.kill()
    eventually(lambda: cluster.master_of(f"lock:{first}") is not node)
    eventually(lambda: not is_away(locks, second) and not is_away(far, second))
    for of in locks, far:
        with of.acquire(second, timeout=PATIENCE) as short:
            assert not short.degraded
            tokens.append(short.token)
    assert tokens == sorted(set(tokens))
    with pytest.raises(LockTimeout):
        far.acquire(first, timeout=0)
    held.extend()
    assert held.release() is True


def is_away(locks: DistributedLock, name: str) -> bool:
    try:
        client_of(locks).call("GET", f"lock:{name}")
        return False
    except BackendUnavailable:
        return True
