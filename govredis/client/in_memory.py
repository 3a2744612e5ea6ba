"""InMemoryRedisClient: the RedisNode of `GovRedis.in_memory()`, over a fakeredis of its own in place of a server.

Scripts, pipelines, errors, the breaker and the replays are those of RedisNode. The connections alone differ.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import redis

from .._clock import Clock
from ..breaker import CircuitBreaker
from ..config import Config
from ..errors import ConfigurationError
from .commands import Arg, Command, Script
from .node import RedisNode
from .push import PushStream

_HOST = "in-memory"
_AWAY = "it was made unreachable by a test"
#: Seconds between two looks at an empty list.
_LOOK = 0.01
#: Seconds, more than a float of this century's time may be off.
_MOMENT = 1e-6
#: How often the probe may run before a server that is back must be in use: a replay may note something for another.
_PROBES = 10


class InMemoryRedisClient(RedisNode):
    """For this process alone: a forked child goes on with a copy of the data.

    The breaker has no thread, and none is needed: `come_back` probes. Waiting for a list's element is `clock.sleep`.

    Args:
        config: redis_connections, key_prefix. Other settings of a server mean nothing here.
        clock: what the server's TIME, its TTLs and the breaker go by.

    Raises ConfigurationError where fakeredis, or its Lua, is not installed.
    """

    in_process: bool = True

    def __init__(self, config: Config, clock: Clock) -> None:
        try:
            import fakeredis
            import lupa  # noqa: F401 - fakeredis runs scripts by it
        except ImportError as error:
            raise ConfigurationError(
                f"a Redis in memory needs fakeredis and its Lua ({error}): pip install 'govredis[testing]'"
            ) from error
        self._clock = clock
        self._time_of_server = _ServerTime(clock)
        self._server = fakeredis.FakeServer()
        fake = fakeredis.FakeRedis(server=self._server, protocol=2, decode_responses=False)
        self._connections = fake.connection_pool
        if clock is not time:
            _follow_clocks()
        super().__init__(replace(config, redis_url=f"redis://{_HOST}", credential_provider=None))

    def _make_breaker(self, name: str) -> CircuitBreaker:
        return CircuitBreaker(name, self._probe, clock=self._clock.monotonic, threads=False)

    def _connect(self) -> Any:
        return _InMemoryConnection(self._connections, self._server, self._time_of_server)

    def _open(self, connection: Any) -> None:
        connection.connect()
        self.connects: int = next(self._connects)

    def run_confirmed(self, script: Script, keys: Sequence[str], *args: Arg) -> tuple[Any, bool]:
        return self.run(script, keys, *args), True  # it has no failover

    def pop(self, key: str, seconds: float) -> Any:
        deadline = self._clock.monotonic() + seconds
        while True:
            element = self.call("LPOP", key)
            left = deadline - self._clock.monotonic()
            if element is not None or left <= 0:
                return element
            # A clock that is set by hand is moved by this call, so nobody comes meanwhile.
            self._clock.sleep(min(left, _LOOK) if self._clock is time else left)

    def block(self, command: Command, seconds: float) -> Any:
        deadline = self._clock.monotonic() + seconds
        while True:
            found = self.call(*command)
            left = deadline - self._clock.monotonic()
            if found or left <= 0:
                return found
            self._clock.sleep(min(left, _LOOK) if self._clock is time else left)

    def push_stream(self) -> PushStream:
        raise ConfigurationError("a Redis in memory does not push: leave GOVREDIS_LOCAL_CACHE off")

    def go_away(self) -> None:
        """From now on connections are refused. The breaker opens at once."""
        self._server.connected = False
        self.breaker.failed(self.breaker.period, _AWAY, timed_out=True)

    def come_back(self) -> None:
        """Be there again with all data, and return when the replays have run."""
        self._server.connected = True
        for _ in range(_PROBES):
            if self.breaker.closed:
                return
            self.breaker.probe_now()


class _InMemoryConnection:
    """The part of redis-py's connection that RoundTrips uses, over a connection of fakeredis."""

    def __init__(self, connections: Any, server: Any, server_time: _ServerTime) -> None:
        self._connections, self._server, self._time = connections, server, server_time
        #: None, or the connection of fakeredis.
        self._sock: Any = None

    def connect(self) -> None:
        self._refuse_while_away()
        self._sock = self._connections.make_connection()
        self._sock.connect()

    def disconnect(self) -> None:
        connected, self._sock = self._sock, None
        if connected is not None:
            connected.disconnect()

    def send_packed_command(self, packed: tuple[bytes], _: bool) -> None:
        """Runs the commands; `read_response` gives their replies, in order."""
        self._refuse_while_away()
        self._time.look()
        _in_force.time = self._time
        try:
            self._sock.get_socket().sendall(packed[0])
        finally:
            _in_force.time = None

    def read_response(self) -> Any:
        return self._sock.read_response()

    def unread(self) -> bool:
        return False

    left_over = unread

    def _refuse_while_away(self) -> None:
        if not self._server.connected:
            raise redis.ConnectionError(_AWAY)


class _ServerTime:
    """The time of one server, by its clock.

    Redis keeps a key up to and including the moment when its TTL is over. A clock that is set by hand stands still at
    such a moment, so the TTLs are always a little ahead of a clock that has moved.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._seen = clock.time()
        self._ahead = 0.0

    def look(self) -> None:
        now = self._clock.time()
        if now != self._seen:
            self._seen = now
            self._ahead += _MOMENT

    def exact(self) -> float:
        return self._seen

    def of_ttls(self) -> float:
        return self._seen + self._ahead


class _InForce(threading.local):
    """The time of the server whose command this thread runs in fakeredis."""

    time: _ServerTime | None = None


_in_force = _InForce()


class _FollowingTime:
    """Stands for the module `time` within fakeredis, which has no clock of its own to be set."""

    def __init__(self, read: Callable[[_ServerTime], float]) -> None:
        self._read = read

    def time(self) -> float:
        return time.time() if _in_force.time is None else self._read(_in_force.time)

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


_EXACT, _OF_TTLS = _FollowingTime(_ServerTime.exact), _FollowingTime(_ServerTime.of_ttls)


def _follow_clocks() -> None:
    """Have fakeredis ask `_in_force` for the time. Its other users in this process get the real one, as before."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "fakeredis" and getattr(module, "time", None) is time:
            tells = name.endswith("server_mixin")  # has the command TIME
            module.time = _EXACT if tells else _OF_TTLS  # type: ignore[attr-defined]
