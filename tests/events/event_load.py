"""A load of events through a group of consumer processes, two of them killed.

`python tests/events/event_load.py 100000` runs it with so many.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from support import PATIENT, Child, client_of, eventually

from govredis import Config, GovRedis
from govredis.testing.servers import RedisServer

CONSUMERS, KILLED = 4, 2


class Outcome(NamedTuple):
    """Attributes:
    missing: events that no body has done.
    again: how many were done more than once.
    unasked: those of them that no killed consumer had unfinished. There must be none.
    """

    events: int
    missing: int
    again: int
    unasked: int
    seconds: float
    by_consumer: tuple[int, ...]

    def __str__(self) -> str:
        return (
            f"{self.events} events, {CONSUMERS} consumers, {KILLED} killed: {self.missing} lost,"
            f" {self.again} done again, {self.unasked} of them without need;"
            f" {self.seconds:.1f} s, {self.events / self.seconds:.0f}/s,"
            f" by consumer {self.by_consumer}"
        )


def work(url: str, name: str, file: Path) -> None:
    """Do events, each with a line in the file, until it is killed."""
    with (
        GovRedis(Config(redis_url=url, **PATIENT)) as gov,
        file.open("ab", buffering=0) as done,
        gov.events.consume("group", name, "load", claim_after=2) as events,
    ):
        for event in events:
            done.write(b"%d %s\n" % (event.payload, event.position.encode()))


def load(url: str, count: int) -> Outcome:
    with (
        tempfile.TemporaryDirectory() as folder,
        GovRedis(Config(redis_url=url, events_kept=2 * count, **PATIENT)) as gov,
        ExitStack() as living,
    ):
        files = [Path(folder, str(n)) for n in range(CONSUMERS)]
        for file in files:
            file.touch()
        began = time.monotonic()
        children = [Child(lambda n=n: work(url, f"c{n}", files[n])) for n in range(CONSUMERS)]  # type: ignore[misc]
        for child in children:
            living.callback(child.kill)

        def publish() -> None:
            for n in range(count):
                gov.events.publish("load.x", n)

        publishing = threading.Thread(target=publish)
        publishing.start()

        def lines() -> list[tuple[str, str]]:
            return [(n, at) for file in files for n, at in map(str.split, file.read_text().splitlines())]

        unfinished: set[str] = set()
        for killed in range(KILLED):
            eventually(lambda n=killed: files[n].stat().st_size and len(lines()) > count * (n + 1) / 4, 600)  # type: ignore[misc]
            children[killed].kill()
            left = client_of(gov).call("XPENDING", "events:load", "group", "-", "+", "10", f"c{killed}")
            unfinished |= {position.decode() for position, *_ in left}
        publishing.join()
        eventually(lambda: len({n for n, _ in lines()}) == count, 600, "all events were done")
        seconds = time.monotonic() - began
        eventually(lambda: client_of(gov).call("XPENDING", "events:load", "group")[0] == 0, 60)
        living.close()
        found, shares = lines(), tuple(len(file.read_text().splitlines()) for file in files)
    times = Counter(found)
    again = {position for (_, position), n in times.items() if n > 1}
    done = {int(n) for n, _ in found}
    return Outcome(count, len(set(range(count)) - done), len(again), len(again - unfinished), seconds, shares)


if __name__ == "__main__":
    with RedisServer() as server:
        print(load(server.url, int(sys.argv[1])))  # noqa: T201
