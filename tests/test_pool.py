"""Pool: last in first out, bounded, and whole again whatever an exception cut short."""

from __future__ import annotations

import gc
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

import pytest
from support import Background, eventually, in_child, in_threads

from govredis._pool import Pool, PoolExhausted
from govredis.errors import BackendUnavailable


class Connection:
    def __init__(self, number: int) -> None:
        self.number = number
        self.closed = False


class Server:
    """Makes the connections and notes what became of them."""

    def __init__(self) -> None:
        self.made = 0
        self.open = 0
        self.most_open = 0
        self.deadlines: list[float] = []
        self.connecting: Callable[[], None] = lambda: None
        self.lock = threading.Lock()

    def connect(self, deadline: float) -> Connection:
        with self.lock:
            self.made += 1
            self.open += 1
            self.most_open = max(self.most_open, self.open)
            self.deadlines.append(deadline)
            connection = Connection(self.made)
        try:
            self.connecting()
        except BaseException:
            with self.lock:
                self.open -= 1
            raise
        return connection

    def disconnect(self, connection: Connection) -> None:
        with self.lock:
            self.open -= not connection.closed
        connection.closed = True

    def pool(self, bound: int) -> Pool[Connection]:
        return Pool(self.connect, self.disconnect, bound, "the server")


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def no_gc() -> Iterator[None]:
    """Reference counts must do."""
    gc.disable()
    yield
    gc.enable()


def test_last_in_first_out(server: Server) -> None:
    pool = server.pool(5)
    one, two, three = (pool.take(0) for _ in range(3))
    for connection in (one, three, two):
        pool.give(connection)
    assert [pool.take(0) for _ in range(3)] == [two, three, one]
    assert server.made == 3


def test_full(server: Server) -> None:
    pool = server.pool(2)
    held = [pool.take(0), pool.take(0)]
    began = time.monotonic()
    with pytest.raises(BackendUnavailable, match=r"^all 2 connections to the server are in use by this process$"):
        pool.take(0.1)
    assert time.monotonic() - began >= 0.1
    assert server.made == len(held)


def test_connecting_gets_the_deadline_of_the_caller(server: Server) -> None:
    pool = server.pool(1)
    before = time.monotonic()
    pool.take(7)
    assert before + 7 <= server.deadlines[0] <= time.monotonic() + 7


def test_connecting_may_have_more_time_than_the_wait_for_a_place(server: Server) -> None:
    pool = server.pool(1)
    before = time.monotonic()
    held = pool.take(0, 7)
    assert before + 7 <= server.deadlines[0] <= time.monotonic() + 7
    with pytest.raises(PoolExhausted):
        pool.take(0, 7)
    waiter = Background(lambda: pool.take(20, 7))
    eventually(lambda: pool._bells)
    before = time.monotonic()
    pool.drop(held)
    waiter.result()
    assert server.deadlines[1] >= before + 7


def test_a_waiter_gets_what_is_given_back(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("govredis._pool.SLICE", 1000.0)  # only being woken helps
    pool = server.pool(1)
    held = pool.take(0)
    waiting = Background(lambda: pool.take(1000))
    eventually(lambda: pool._bells)
    pool.give(held)
    assert waiting.result() is held


def test_a_waiter_gets_the_place_of_a_dropped_one(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("govredis._pool.SLICE", 1000.0)
    pool = server.pool(1)
    held = pool.take(0)
    waiting = Background(lambda: pool.take(1000))
    eventually(lambda: pool._bells)
    pool.drop(held)
    assert held.closed
    assert waiting.result() is not held
    assert server.made == 2


def test_a_waiter_gets_the_place_of_one_lost_to_an_exception(server: Server, no_gc: None) -> None:
    pool = server.pool(1)
    waiting = []

    def interrupted() -> None:
        connection = pool.take(0)
        waiting.append(Background(lambda: pool.take(1000)))
        eventually(lambda: pool._bells)
        raise KeyboardInterrupt(connection.number)

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert waiting[0].result().number == 2


def test_a_connection_lost_to_an_exception_frees_its_place(server: Server, no_gc: None) -> None:
    pool = server.pool(1)

    def interrupted() -> None:
        connection = pool.take(0)
        raise KeyboardInterrupt(connection.number)

    for _ in range(10):
        with pytest.raises(KeyboardInterrupt):
            interrupted()
    pool.take(0)


def test_a_failed_connect_frees_its_place_even_while_its_error_is_kept(server: Server, no_gc: None) -> None:
    pool = server.pool(1)

    def refuse() -> None:
        raise BackendUnavailable("refused")

    server.connecting = refuse
    kept = []
    for _ in range(3):
        with pytest.raises(BackendUnavailable, match=r"refused") as caught:
            pool.take(0)
        kept.append(caught)
    server.connecting = lambda: None
    pool.take(0)


def test_never_more_than_the_bound_though_connecting_takes_time(server: Server) -> None:
    pool = server.pool(3)
    gate = threading.Event()
    server.connecting = lambda: gate.wait(20) and None

    def use() -> None:
        connection = pool.take(20)
        time.sleep(0.001)
        pool.give(connection)

    users = [Background(use) for _ in range(12)]
    eventually(lambda: server.made == 3 and len(pool._bells) == 9)
    gate.set()
    for user in users:
        user.result()
    assert server.most_open == server.made == 3


def test_under_load_with_drops_and_losses(server: Server) -> None:
    pool = server.pool(4)
    owners: dict[int, int] = {}

    def use(thread: int) -> None:
        for n in range(300):
            connection = pool.take(30)
            assert owners.setdefault(connection.number, thread) == thread, "two owners"
            if n % 7 == 0:
                time.sleep(0.0002)
            del owners[connection.number]
            if n % 50 == 20:
                pool.drop(connection)
            elif n % 50 == 40:
                server.disconnect(connection)  # its destructor
                del connection
            else:
                pool.give(connection)

    in_threads(*[lambda t=t: use(t) for t in range(12)])  # type: ignore[misc]
    assert server.most_open <= 4
    assert len(pool.live) == len(pool.idle) <= 4
    assert not pool._bells


def test_drop_idle_leaves_those_in_use(server: Server) -> None:
    pool = server.pool(5)
    used, *others = (pool.take(0) for _ in range(3))
    for connection in others:
        pool.give(connection)
    pool.drop_idle()
    assert [c.closed for c in (used, *others)] == [False, True, True]
    pool.give(used)
    assert pool.take(0) is used


def test_renewed_after_a_fork(server: Server) -> None:
    pool = server.pool(1)
    held = pool.take(0)
    with pool._counting:  # another thread was taking when we forked
        assert in_child(lambda: (pool.renew(), pool.take(0) is not held, held.closed)) == (None, True, False)
    with pytest.raises(BackendUnavailable):
        pool.take(0)


def test_a_connection_that_is_made_while_the_pool_is_retired_does_not_disturb(server: Server) -> None:
    """A set that grows while it is read raises RuntimeError, and nothing would be retired."""
    pool, once = server.pool(10), [True]

    class Hooked(Connection):
        def __hash__(self) -> int:
            if retiring.is_set() and once:
                once.clear()
                taking.start()
                taking.join(0.2)  # which waits until the pool is retired
            return id(self)

    retiring = threading.Event()
    taking = threading.Thread(target=pool.take, args=(1,))
    pool._connect = lambda _: Hooked(0)
    used = [pool.take(1) for _ in range(3)]
    retiring.set()
    pool.retire()
    taking.join()
    for connection in used:
        pool.give(connection)
    assert all(connection.closed for connection in used)


def test_a_connection_that_comes_back_just_when_the_pool_is_retired_is_not_kept(server: Server) -> None:
    pool = server.pool(10)

    class Idle(deque[Connection]):
        def append(self, connection: Connection) -> None:
            pool.retire()
            super().append(connection)

    connection = pool.take(1)
    pool.idle = Idle()
    pool.give(connection)
    assert connection.closed
    assert not pool.idle
