"""A Redis alone, which half of the processes reach through an unreliable proxy."""

from __future__ import annotations

import contextlib
import random
import time
from typing import Any

from govredis.testing.servers import RedisServer
from tests.cutting_proxy import CuttingProxy

from .faults import OF_A_SERVER, OF_OTHERS, World


class UnreliableProxy(CuttingProxy):
    """Cuts a connection when a reply comes, sends the reply twice, or is late with it.

    Attributes:
        trouble: which of "cut", "double", "late"; "" for none.
        chance: with which a reply meets it.
    """

    trouble, chance = "", 0.02

    def _deliver(self, receiver: Any, found: bytes, *, is_reply: bool) -> bool:
        if is_reply and self.trouble and random.random() < self.chance:
            if self.trouble == "cut":
                return False
            if self.trouble == "late":
                time.sleep(random.uniform(0, 0.3))
            elif self.trouble == "double":
                found *= 2
        return super()._deliver(receiver, found, is_reply=is_reply)


class OneServer(World):
    parts = {
        "redis": (
            "redis stopped", "redis killed", "redis emptied", "redis set back", "redis read only",
            *(name for name in OF_A_SERVER if name != "redis unreplicated"),
        ),
        "proxy": ("replies cut", "replies doubled", "replies late"),
        **OF_OTHERS,
    }  # fmt: skip

    def start(self, stack: contextlib.ExitStack) -> None:
        self.cache = stack.enter_context(RedisServer(persistent=True))
        self.proxy = UnreliableProxy(self.cache.port)
        stack.callback(self.proxy.close)

    def url(self, worker: int) -> str:
        return self.proxy.url if worker % 2 else self.cache.url

    def aim(self, dice: random.Random) -> None:
        pass

    def redis_stopped(self, dice: random.Random) -> None:
        self.cache.pause()
        time.sleep(dice.choice([0.05, 0.3, dice.uniform(1, 4)]))
        self.cache.resume()

    def _restart(self, dice: random.Random, data: Any) -> None:
        self.cache.kill()
        time.sleep(dice.uniform(0, 3))
        self.cache.restart(data)

    def redis_killed(self, dice: random.Random) -> None:
        self._restart(dice, "keep")

    def redis_emptied(self, dice: random.Random) -> None:
        self._restart(dice, "empty")

    def redis_set_back(self, dice: random.Random) -> None:
        self.cache.snapshot_data()
        time.sleep(dice.uniform(0.5, 4))
        self._restart(dice, "old")

    def redis_read_only(self, dice: random.Random) -> None:
        if dice.random() < 0.5:
            self.cache.command("REPLICAOF", "127.0.0.1", "1")
            time.sleep(dice.uniform(0.5, 3))
            self.cache.command("REPLICAOF", "NO", "ONE")
        else:
            self.redis_unreplicated(dice)

    # -- the proxy -----------------------------------------------------------------------------------------------

    def _trouble(self, dice: random.Random, kind: str) -> None:
        self.proxy.chance, self.proxy.trouble = dice.choice([0.005, 0.05]), kind
        time.sleep(dice.uniform(0.5, 3))
        self.proxy.trouble = ""

    def replies_cut(self, dice: random.Random) -> None:
        self._trouble(dice, "cut")

    def replies_doubled(self, dice: random.Random) -> None:
        self._trouble(dice, "double")

    def replies_late(self, dice: random.Random) -> None:
        self._trouble(dice, "late")
