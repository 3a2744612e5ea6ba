"""A Redis whose primary is replaced by a replica when it is away; and each replacement, noted as it is seen."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from govredis.testing.servers import RedisServer

from .faults import World
from .history import now

#: Seconds between two looks at who is a primary.
OFTEN = 0.15
#: Seconds that a primary is away for its replacement, at most: less than checks.LATE.
AWAY = 8.0
#: Seconds after which the servers have settled; only what is broken takes so long.
SETTLED = 90.0

#: Primaries by port, with their slots; all keys where there are none.
Primaries = dict[int, Sequence[tuple[int, int]] | None]


class Replicated(World):
    """Replacements, wanted or not, are what may lose data. Each is a fault of its own in the history, "failed over".

    It began when its predecessor was last seen as the primary, and ended when it was seen itself. A busy machine may
    have a primary replaced for nothing: that is why they are watched for, and not taken for granted.
    """

    #: Seconds for which processes may go on with the old primary, should it be back at once.
    heard_after = 0.0

    def start(self, stack: contextlib.ExitStack) -> None:
        self.start_servers(stack)
        self._clients: dict[int, Any] = {}
        self.primaries = self.look() or {}
        #: The port of the primary that hands its keys over in good order: nothing is lost by that.
        self.hands_over = 0
        over = threading.Event()
        watch = threading.Thread(target=self._watch, args=(over,), daemon=True)
        watch.start()
        stack.callback(watch.join)
        stack.callback(over.set)

    @abstractmethod
    def start_servers(self, stack: contextlib.ExitStack) -> None: ...

    @abstractmethod
    def servers(self) -> Sequence[RedisServer]:
        """All that have data."""

    @abstractmethod
    def look(self) -> Primaries | None:
        """The primaries, by the newest word of those that answer; None where nobody does."""

    @abstractmethod
    def has_settled(self) -> bool:
        """Is each primary replicated, and does everybody agree?"""

    # -- watching ------------------------------------------------------------------------------------------------

    def _watch(self, over: threading.Event) -> None:
        looked = now()
        while not over.wait(OFTEN):
            looks = now()
            seen = self.look()
            if seen is None:
                continue
            for port in seen.keys() - self.primaries.keys():
                gone = self.primaries.keys() - seen.keys()
                args = {"name": "failed over", "part": "redis", "loses": int(gone != {self.hands_over}), "evicts": 0}
                if seen[port] is not None:
                    args["slots"] = seen[port]
                line = {"began": looked, "ended": now() + self.heard_after, "outcome": "ok", "args": args}
                self.recorder.write(self.recorder.number(), "fault", **line)
            self.primaries, looked = seen, looks

    def ask(self, port: int, *command: str) -> Any:
        """The reply; None where none comes in 0.3 s."""
        if port not in self._clients:
            how: dict[str, Any] = {"socket_timeout": 0.3, "socket_connect_timeout": 0.3, "decode_responses": True}
            self._clients[port] = redis.Redis(port=port, protocol=2, retry=Retry(NoBackoff(), 0), **how)
        try:
            return self._clients[port].execute_command(*command)
        except redis.RedisError:
            return None

    # -- faults --------------------------------------------------------------------------------------------------

    def aim(self, dice: random.Random) -> None:
        self.cache = dice.choice([server for server in self.servers() if server.port in self.primaries])

    def slots(self) -> Sequence[tuple[int, int]] | None:
        return self.primaries.get(self.cache.port)

    def settle(self) -> None:
        self.until(self.has_settled, SETTLED, "the servers of Redis did not settle")

    def until(self, condition: Callable[[], bool], seconds: float, otherwise: str = "") -> None:
        ends = now() + seconds
        while not condition():
            if now() > ends:
                if otherwise:
                    raise RuntimeError(otherwise)
                return
            time.sleep(0.1)

    def _until_replaced(self) -> None:
        self.until(lambda: self.cache.port not in self.primaries, AWAY)

    def redis_stopped(self, dice: random.Random) -> None:
        """For too short to be replaced, as a rule."""
        self.cache.pause()
        time.sleep(dice.choice([0.05, 0.3, dice.uniform(0.3, 1)]))
        self.cache.resume()
        self.settle()

    def redis_killed(self, dice: random.Random) -> None:
        """It is back before it is replaced, as a rule."""
        self.cache.kill()
        self.cache.restart("keep")
        self.settle()

    def redis_emptied(self, dice: random.Random) -> None:
        """It is back before it is replaced, as a rule, and its replicas lose everything, too."""
        self.cache.kill()
        self.cache.restart("empty")
        self.settle()

    def primary_hung(self, dice: random.Random) -> None:
        """It wakes up as the primary, for a moment, while another one is."""
        self.cache.pause()
        self._until_replaced()
        time.sleep(dice.choice([0, dice.uniform(0, 1.5)]))
        self.cache.resume()
        self.settle()

    def primary_killed(self, dice: random.Random) -> None:
        self.cache.kill()
        self._until_replaced()
        time.sleep(dice.choice([0, dice.uniform(0, 3)]))
        self.cache.restart("keep")
        self.settle()

    def all_killed(self, dice: random.Random) -> None:
        self._restart_all(dice, "keep")

    def all_emptied(self, dice: random.Random) -> None:
        self._restart_all(dice, "empty")

    def _restart_all(self, dice: random.Random, data: Any) -> None:
        for server in self.servers():
            server.kill()
        time.sleep(dice.uniform(0, 1))
        for server in self.servers():
            server.restart(data)
        self.settle()


#: The faults of a Redis with replicas.
OF_REPLICATED = (
    "redis stopped", "redis killed", "redis emptied", "primary hung", "primary killed", "all killed", "all emptied",
)  # fmt: skip
