"""The Redis of the demo: one server, a primary with Sentinels, or a Cluster; and how it is taken away."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from ..testing.servers import RedisCluster, RedisSentinel, RedisServer, ServerError

#: Seconds for a replica to take over: a machine that stalls holds it up.
_PATIENCE = 120.0
#: A key whose primary is taken away.
_KEY = "agent_meta:agent-0"


class DemoRedis:
    """One that goes away and comes back, empty after a kill.

    Attributes:
        primary: the server that goes away next.
        url: for GovRedis.
        phases: name, share of the time, whether it is away, or its primary.
    """

    phases: tuple[tuple[str, float, bool], ...] = (
        ("healthy", 5.0, False),
        ("killed (-9)", 6.5, True),
        ("back, empty", 4.5, False),
        ("hung (SIGSTOP)", 4.5, True),
        ("awake again", 3.5, False),
    )
    #: Whether its data is lost with the server: no replica has it.
    is_alone: bool = True

    def __init__(self, url: str, primary: Callable[[], RedisServer]) -> None:
        self.url = url
        self._find_primary = primary
        self.primary: RedisServer = primary()

    def kill(self) -> None:
        self.primary.kill()

    def restart(self) -> None:
        self.primary.restart("empty")

    def hang(self) -> None:
        self.primary.pause()

    def go_on(self) -> None:
        self.primary.resume()


class ReplicatedRedis(DemoRedis):
    """One whose replicas take over. The old primary comes back as a replica, after that."""

    phases: tuple[tuple[str, float, bool], ...] = (
        ("healthy", 5.0, False),
        ("its primary killed (-9)", 6.5, True),
        ("the old primary back", 4.5, False),
        ("a primary hung (SIGSTOP)", 6.5, True),
        ("awake again", 3.5, False),
    )
    is_alone: bool = False

    def restart(self) -> None:
        # Sooner, it would be the primary again, and its replicas would lose their data, too.
        self._wait_for_failover()
        self.primary.restart("empty")

    def hang(self) -> None:
        self.primary: RedisServer = self._find_primary()
        super().hang()

    def go_on(self) -> None:
        self._wait_for_failover()
        super().go_on()

    def _wait_for_failover(self) -> None:
        deadline = time.monotonic() + _PATIENCE
        while self._find_primary() is self.primary:
            if time.monotonic() > deadline:
                raise ServerError(f"no replica has taken over within {_PATIENCE:g} s")
            time.sleep(0.1)


@contextlib.contextmanager
def _one_server() -> Iterator[DemoRedis]:
    with RedisServer() as server:
        yield DemoRedis(server.url, lambda: server)


@contextlib.contextmanager
def _sentinel() -> Iterator[DemoRedis]:
    with RedisSentinel() as group:
        yield ReplicatedRedis(group.url, lambda: group.master)


@contextlib.contextmanager
def _cluster() -> Iterator[DemoRedis]:
    # With full coverage, which is the default, a Cluster refuses all keys until a replica has taken over.
    with RedisCluster(config=["cluster-require-full-coverage no"]) as cluster:
        yield ReplicatedRedis(cluster.url, lambda: cluster.master_of(_KEY))


#: By the name that `govredis demo --topology` takes.
TOPOLOGIES: dict[str, Callable[[], contextlib.AbstractContextManager[DemoRedis]]] = {
    "server": _one_server,
    "sentinel": _sentinel,
    "cluster": _cluster,
}
