"""Threads that use a client of a Cluster, and an oracle that judges each answer."""

from __future__ import annotations

import functools
import hashlib
import itertools
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

from support import WatchedSocket, eventually

from govredis import BackendUnavailable
from govredis.client import RedisClient, Script
from govredis.client.commands import SOURCES
from govredis.client.slots import slot_of
from govredis.testing.servers import RedisCluster, RedisServer

#: Puts one number into three keys, and returns those of before.
_THREE = """
local before = redis.call('MGET', KEYS[1], KEYS[2], KEYS[3])
for _, key in ipairs(KEYS) do redis.call('SET', key, ARGV[1]) end
return before
"""


class ThreeKeys(Script):
    """A script of three keys of a slot."""

    def __init__(self) -> None:
        self.source = _THREE
        self.sha = hashlib.sha1(_THREE.encode()).hexdigest()
        SOURCES[self.sha] = self.source


THREE = ThreeKeys()

_loads = itertools.count()


@functools.cache
def _tags() -> dict[int, str]:
    tags: dict[int, str] = {}
    n = 0
    while len(tags) < 16384:
        tags.setdefault(slot_of(f"t{n}"), f"t{n}")
        n += 1
    return tags


def key_in(slot: int, name: str = "") -> str:
    """A key of a slot."""
    return f"{{{_tags()[slot]}}}{name}"


def slots_of(cluster: RedisCluster, node: RedisServer, count: int) -> list[int]:
    """Some slots of a master."""
    mine = [
        slot
        for first, last, owner, *_ in node.command("CLUSTER", "SLOTS")
        if owner[1] == node.port
        for slot in range(first, last + 1)
    ]
    return random.Random(1).sample(mine, count)


class Record:
    """A number that one thread writes: what may be read of it."""

    def __init__(self) -> None:
        self.acknowledged = self.tried = 0

    def fits(self, raw: bytes | None) -> bool:
        """A number no older than acknowledged, nor younger than tried."""
        try:
            return self.acknowledged <= int(raw or 0) <= self.tried
        except ValueError:
            return False


class LoadThread(threading.Thread):
    """Uses keys of its own in each slot, one call after the other.

    Attributes:
        done: by slot, calls that succeeded.
        failed: by slot, calls that raised BackendUnavailable.
        wrong: answers that cannot be.
        timeouts: of its sockets, that ran out: its slow calls.
    """

    def __init__(self, client: RedisClient, slots: Sequence[int], name: str) -> None:
        super().__init__(daemon=True)
        self._client = client
        self._slots = list(slots)
        self._name = name
        self._random = random.Random(name)
        self._single = {slot: Record() for slot in slots}
        self._triple = {slot: Record() for slot in slots}
        self.stop = threading.Event()
        self.step = threading.Lock()
        self.done: Counter[int] = Counter()
        self.failed: Counter[int] = Counter()
        self.errors: dict[str, int] = {}
        self.wrong: list[str] = []
        self.timeouts = 0

    def run(self) -> None:
        steps = self._set, self._get, self._three
        try:
            while not self.stop.is_set():
                with self.step:
                    if self._random.random() < 0.1:
                        self._pipeline()
                        continue
                    slot = self._random.choice(self._slots)
                    try:
                        self._random.choice(steps)(slot)
                    except BackendUnavailable as error:
                        self._note(slot, error)
                    else:
                        self.done[slot] += 1
        except BaseException as error:  # noqa: BLE001 - for the test
            self.wrong.append(f"{type(error).__name__}: {error}")
        self.timeouts = len(WatchedSocket.waits.timeouts)

    def _note(self, slot: int, error: BackendUnavailable) -> None:
        self.failed[slot] += 1
        self.errors[str(error)] = slot

    def _set(self, slot: int) -> None:
        record = self._single[slot]
        record.tried += 1
        self._client.call("SET", key_in(slot, self._name), str(record.tried))
        record.acknowledged = record.tried

    def _get(self, slot: int) -> None:
        self._judge(slot, self._single[slot], self._client.call("GET", key_in(slot, self._name)))

    def _judge(self, slot: int, record: Record, raw: Any) -> None:
        if not record.fits(raw):
            self.wrong.append(f"slot {slot}: {raw!r}, acknowledged {record.acknowledged}, tried {record.tried}")

    def _three(self, slot: int) -> None:
        record = self._triple[slot]
        record.tried += 1
        found = self._client.run(THREE, [key_in(slot, self._name + part) for part in "abc"], str(record.tried))
        for raw in found:
            self._judge(slot, record, raw)
        if len(set(found)) != 1:
            self.wrong.append(f"slot {slot}: torn, {found}")
        record.acknowledged = record.tried

    def _pipeline(self) -> None:
        """All slots: a SET and a GET of each."""
        commands: list[tuple[str, ...]] = []
        for slot in self._slots:
            record, key = self._single[slot], key_in(slot, self._name)
            record.tried += 1
            commands += [("SET", key, str(record.tried)), ("GET", key)]
        try:
            replies = self._client.pipeline(commands, each=True)
        except BackendUnavailable as error:
            replies = [error] * len(commands)
        for slot, told, found in zip(self._slots, replies[::2], replies[1::2], strict=True):
            record = self._single[slot]
            if told == b"OK":
                record.acknowledged = record.tried
            if isinstance(found, BackendUnavailable):
                self._note(slot, found)
            elif isinstance(found, Exception):
                self.wrong.append(repr(found))
            else:
                self._judge(slot, record, found)
                self.done[slot] += told == b"OK"


class ClusterLoad:
    """`with ClusterLoad(client, slots) as load: ...`: its threads use these slots. After it, none was wrong."""

    def __init__(self, client: RedisClient, slots: Sequence[int], threads: int = 4) -> None:
        load = next(_loads)  # the keys of a load before have other values
        self.threads = [LoadThread(client, slots, f"load{load}:{n}") for n in range(threads)]

    def __enter__(self) -> ClusterLoad:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        for thread in self.threads:
            thread.stop.set()
        for thread in self.threads:
            thread.join(60)
        if kind is None:
            assert not any(thread.is_alive() for thread in self.threads)
            wrong = [wrong for thread in self.threads for wrong in thread.wrong]
            assert wrong == [], wrong

    def failures(self, slots: Sequence[int]) -> dict[str, int]:
        """The errors of these slots, each with a slot."""
        found = {text: slot for thread in self.threads for text, slot in list(thread.errors.items())}
        return {text: slot for text, slot in found.items() if slot in slots}

    def goes_on(self, slots: Sequence[int], times: int = 3) -> None:
        """Waits until each thread has succeeded a few times more in each of these slots."""
        self._more(lambda thread: thread.done, slots, times)

    def fails(self, slots: Sequence[int], times: int = 1) -> None:
        """Waits until each thread has failed once more in each of these slots."""
        self._more(lambda thread: thread.failed, slots, times)

    def _more(self, count: Callable[[LoadThread], Counter[int]], slots: Sequence[int], times: int) -> None:
        wanted = [(thread, slot, count(thread)[slot] + times) for thread in self.threads for slot in slots]
        eventually(
            lambda: (
                any(thread.wrong for thread in self.threads)
                or all(count(thread)[slot] >= least for thread, slot, least in wanted)
            )
        )

    @contextmanager
    def standing(self) -> Iterator[None]:
        """No call is made in the body."""
        with ExitStack() as stack:
            for thread in self.threads:
                stack.enter_context(thread.step)
            yield
