"""Teller: tells Redis of what this process counts, once a second at most, in one round trip and in the background."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from ._counters import Counters
from ._daemon import forks_beside_threads, make_daemon, start
from ._exit import write_at_exit
from ._fork import notice_fork, renew_in_child
from ._latch import Latch
from ._uncopied import Uncopied
from .client import Command, RedisClient, Script
from .client.commands import with_source
from .errors import BackendError, BackendUnavailable

#: Seconds between two exchanges of a process, at least.
INTERVAL = 1.0

#: A node's name and connects, and the script's digest.
_KnownScript = tuple[str, int, str]


class Party(ABC):
    """A part of this process that has something to tell. The teller calls these in one thread at a time.

    All keys of a party are in one Cluster slot: their node has its commands, or all of them are given back.
    """

    #: Those among the commands that `take` returns.
    scripts: Sequence[Script] = ()

    @abstractmethod
    def has_pending(self) -> bool:
        """Is there something to tell, or on its way just now?"""

    @abstractmethod
    def take(self, *, last: bool) -> list[Command]:
        """The commands that tell it. If an exception strikes before the answer, neither of the next two is called.

        Args:
            last: this process ends, or closes its GovRedis.
        """

    @abstractmethod
    def told(self, replies: list[Any]) -> None:
        """Redis has answered: its replies, in order; a BackendError in the place of a command that was refused."""

    @abstractmethod
    def give_back(self, *, last: bool) -> None:
        """Redis is away, and may have been told all the same."""


class Teller(Uncopied):
    """Its parties' counts go to Redis together.

    `counters` wakes it: the first addition starts a thread, which tells a second later, and again each second for as
    long as there is something new. Then it ends, and an idle process sends nothing. A process that ends by itself tells
    its last second too, if Redis answers within a second. A forked child tells what it counts itself.

    Where no thread can run, in a uWSGI master that forks beside threads, and with the Redis of `GovRedis.in_memory()`,
    which needs none, all is told at the end.
    """

    def __init__(self, redis: RedisClient | None, counters: Counters) -> None:
        self._redis = redis
        self._counters = counters
        self._parties: list[Party] = []
        self._has_thread = redis is not None and not redis.in_process
        self.renew_after_fork()
        renew_in_child(self)
        write_at_exit(self)

    def renew_after_fork(self) -> None:
        self._lock = threading.RLock()  # a signal handler may make calls of its own
        self._telling = threading.RLock()
        self._thread: threading.Thread | None = None
        self._stopped = Latch()
        #: The scripts that each node knows, by what it was told over its last connection.
        self._known: set[_KnownScript] = set()
        self._sleep()

    def join(self, party: Party) -> None:
        self._parties.append(party)

    # -- the thread ----------------------------------------------------------------------------------------------

    def _sleep(self) -> None:
        self._counters.on_add = self.wake if self._has_thread else None

    def wake(self) -> None:
        """There is something to tell: see that a thread does it."""
        notice_fork()
        if not self._has_thread or forks_beside_threads():
            return
        with self._lock:
            if self._thread is not None and self._thread.is_alive():
                self._counters.on_add = None
                return
            self._stopped = Latch()
            thread = self._thread = make_daemon("govredis-teller", self._run, self._stopped)
            if start(thread):
                self._counters.on_add = None  # last: an exception before it leaves the next addition to try again

    def _run(self, stopped: Latch) -> None:
        try:
            while not self._wait(stopped) and self._tells_on(stopped):
                pass
        except BaseException:
            with self._lock:
                if stopped is self._stopped:
                    self._thread = None  # it lives on for a moment
                self._sleep()  # the next addition starts another thread
            raise

    def _tells_on(self, stopped: Latch) -> bool:
        """Tell. Returns whether this thread has to tell again a second later."""
        self.flush()
        with self._lock:
            if stopped is not self._stopped:
                return False
            self._sleep()  # first: what is added from now on is seen below, or wakes another thread
            if not self.has_pending():
                self._thread = None
                return False
            self._counters.on_add = None
            return True

    def _wait(self, stopped: Latch) -> bool:
        """Returns whether the thread has to end."""
        return stopped.wait(INTERVAL)

    # -- telling -------------------------------------------------------------------------------------------------

    def has_pending(self) -> bool:
        return self._redis is not None and any(party.has_pending() for party in self._parties)

    def flush(self, *, last: bool = False) -> None:
        """Tell Redis now. Where it is away, the parties keep what they have, and nothing is raised."""
        notice_fork()
        if self._redis is None:
            return
        with self._telling:
            taken = [(party, party.take(last=last)) for party in self._parties]
            taken = [(party, commands) for party, commands in taken if commands]
            if taken:
                self._tell(self._redis, taken, last)

    def _tell(self, redis: RedisClient, taken: list[tuple[Party, list[Command]]], last: bool) -> None:
        scripts = [script for party, _ in taken for script in party.scripts]
        try:
            known, commands = self._with_sources(redis, [command for _, mine in taken for command in mine])
            replies = redis.pipeline(commands, scripts, each=True)
        except BackendUnavailable:
            for party, _ in taken:
                party.give_back(last=last)
            return
        except BackendError as error:
            replies = [error] * sum(len(mine) for _, mine in taken)
        else:
            self._known = known
        for party, mine in taken:
            answers = replies[: len(mine)]
            del replies[: len(mine)]
            if any(isinstance(answer, BackendUnavailable) for answer in answers):
                party.give_back(last=last)  # the node that has its keys is away; others may have answered
            else:
                party.told(answers)

    def _with_sources(self, redis: RedisClient, commands: list[Command]) -> tuple[set[_KnownScript], list[Command]]:
        """The commands, with the sources of scripts that a node may not know, and the scripts that all know then.

        A script that a node does not know has all of a pipeline sent twice, and some count twice then.
        """
        connects = {node.name: node.connects for node in redis.nodes()}
        known = {each for each in self._known if connects.get(each[0]) == each[1]}
        changed = []
        for command in commands:
            if command[0] == "EVALSHA":
                try:
                    node = redis.at(command[3])
                except BackendUnavailable:  # its reply says so
                    changed.append(command)
                    continue
                script = node.name, node.connects, str(command[1])
                if script not in known:
                    known.add(script)
                    command = with_source(command)
            changed.append(command)
        return known, changed

    def write_pending(self) -> None:
        self.flush(last=True)

    def close(self) -> None:
        """`flush`, and end the thread: it must not wake a client that was closed. The next addition starts another."""
        notice_fork()
        with self._lock:
            self._stopped.set()
            thread, self._thread = self._thread, None
            self._sleep()
        if self.has_pending():
            self.flush(last=True)
        if thread is not None and thread.is_alive() and thread is not threading.current_thread():
            thread.join(timeout=5)
