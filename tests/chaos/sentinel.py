"""A primary with two replicas, and the three Sentinels that watch it."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Sequence

from govredis.testing.servers import RedisSentinel, RedisServer

from .faults import OF_A_SERVER, OF_OTHERS
from .replicated import OF_REPLICATED, Primaries, Replicated


class Sentinel(Replicated):
    """A failover by order is left out: it loses the writes of a second, as docs/sentinel.md says, and more of them than
    one loss of the counters would excuse."""

    #: A round of questions lasts for the connect timeout of a second, where one Sentinel hangs, and its answer counts
    #: for a second. An old primary that woke up within that time took writes, and let 8 in where 6 may.
    heard_after = 2.0
    parts = {
        "redis": (*OF_REPLICATED, *OF_A_SERVER),
        "sentinels": ("sentinel stopped", "sentinel killed"),
        **OF_OTHERS,
    }

    def start_servers(self, stack: contextlib.ExitStack) -> None:
        self.group = stack.enter_context(RedisSentinel(persistent=True))

    def url(self, worker: int) -> str:
        return self.group.url

    def servers(self) -> Sequence[RedisServer]:
        return self.group.nodes

    def look(self) -> Primaries | None:
        words = [self._word(sentinel.port) for sentinel in self.group.sentinel_servers]
        found = [word for word in words if word is not None]
        return {max(found)[1]: None} if found else None

    def _word(self, port: int) -> tuple[int, int] | None:
        state = self._state(port)
        address = self.ask(port, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.group.master_name)
        return None if not state or address is None else (int(state["config-epoch"]), int(address[1]))

    def _state(self, port: int) -> dict[str, str]:
        reply = self.ask(port, "SENTINEL", "MASTER", self.group.master_name) or ()
        return dict(zip(reply[::2], reply[1::2], strict=True))

    def has_settled(self) -> bool:
        words = {self._word(sentinel.port) for sentinel in self.group.sentinel_servers}
        word = words.pop()
        if words or word is None:
            return False
        for server in self.servers():
            role = self.ask(server.port, "ROLE")
            if role is None or (role[0] == "master") != (server.port == word[1]):
                return False
            if role[0] != "master" and (int(role[2]) != word[1] or role[3] != "connected"):
                return False
        # None of them takes a failover to be under way, or the primary to be away.
        states = [self._state(sentinel.port) for sentinel in self.group.sentinel_servers]
        return all(state.get("flags") == "master" and state["num-slaves"] == "2" for state in states)

    # -- faults --------------------------------------------------------------------------------------------------

    def sentinel_stopped(self, dice: random.Random) -> None:
        sentinel = dice.choice(self.group.sentinel_servers)
        sentinel.pause()
        time.sleep(dice.choice([0.3, dice.uniform(1, 4)]))
        sentinel.resume()

    def sentinel_killed(self, dice: random.Random) -> None:
        sentinel = dice.choice(self.group.sentinel_servers)
        sentinel.kill()
        time.sleep(dice.uniform(0, 3))
        sentinel.restart("empty")  # its configuration, all that it has, stays
