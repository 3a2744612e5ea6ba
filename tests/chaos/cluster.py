"""A Redis Cluster: each fault befalls one of its primaries, or the slots that the processes use."""

from __future__ import annotations

import contextlib
import random
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence

import redis

from govredis.client.slots import SLOTS, slot_of
from govredis.keys import Keys
from govredis.testing.servers import RedisCluster, RedisServer, ServerError

from .faults import OF_A_SERVER, OF_OTHERS
from .history import now
from .parts import AGENTS, RATES
from .replicated import OF_REPLICATED, SETTLED, Primaries, Replicated

#: A busy machine does not run a node for a second, now and then.
CONFIG = ("cluster-node-timeout 2000", "cluster-require-full-coverage no")


class Cluster(Replicated):
    parts = {
        "redis": (
            *OF_REPLICATED, *OF_A_SERVER, "handed over", "slots moved", "slots moved", "slot half moved",
        ),
        **OF_OTHERS,
    }  # fmt: skip

    def start_servers(self, stack: contextlib.ExitStack) -> None:
        self.group = stack.enter_context(RedisCluster(persistent=True, config=CONFIG))

    def url(self, worker: int) -> str:
        return self.group.url

    def servers(self) -> Sequence[RedisServer]:
        return self.group.nodes

    def look(self) -> Primaries | None:
        words: list[tuple[int, int, list[str]]] = []
        for server in self.servers():
            for line in (self.ask(server.port, "CLUSTER", "NODES") or "").splitlines():
                _, address, flags, _, _, _, epoch, _, *ranges = line.split(" ")
                if "master" in flags and address.startswith("127"):
                    words.append((int(epoch), int(address.split("@")[0].split(":")[1]), ranges))
        owners = [0] * SLOTS
        for _, port, ranges in sorted(words):
            for first, last in _parsed(ranges):
                owners[first : last + 1] = [port] * (last + 1 - first)
        found: dict[int, list[tuple[int, int]]] = defaultdict(list)
        begins = 0
        for slot in range(1, SLOTS + 1):
            if slot == SLOTS or owners[slot] != owners[begins]:
                found[owners[begins]].append((begins, slot - 1))
                begins = slot
        found.pop(0, None)
        return dict(found) or None

    def has_settled(self) -> bool:
        views = [self.ask(server.port, "CLUSTER", "SLOTS") for server in self.servers()]
        if None in views or len({_view(view) for view in views}) > 1 or any(len(range_) < 4 for range_ in views[0]):
            return False
        for server in self.servers():
            role = self.ask(server.port, "ROLE")
            if role is None or (role[0] != "master" and role[3] != "connected"):
                return False
            if "cluster_state:ok" not in (self.ask(server.port, "CLUSTER", "INFO") or ""):
                return False
        return True

    # -- faults --------------------------------------------------------------------------------------------------

    def handed_over(self, dice: random.Random) -> None:
        """To a replica, by order: its primary waits until the replica has everything."""
        self.settle()
        self.hands_over = self.cache.port
        self.group.failover(self.cache)
        self.until(lambda: self.cache.port not in self.primaries, SETTLED, "a primary did not hand over")
        self.hands_over = 0
        self.settle()

    def slots_moved(self, dice: random.Random) -> None:
        """There, and perhaps back again, before or after a run of the relay."""
        slots = dice.sample(self._used(), dice.choice([1, 3, 20]))
        self.settle()
        homes = {slot: self.group.master_of(slot) for slot in slots}
        away = {slot: self._another(dice, home) for slot, home in homes.items()}
        self._move(away)
        if dice.random() < 0.5:
            time.sleep(dice.choice([0, dice.uniform(0, 4)]))
            self._move(homes)
        self.settle()

    def slot_half_moved(self, dice: random.Random) -> None:
        slot = dice.choice(self._used())
        self.settle()
        home = self.group.master_of(slot)
        to = self._another(dice, home)
        keys = home.command("CLUSTER", "GETKEYSINSLOT", slot, 10)
        try:
            with self.group.moving(slot, to, dice.sample(keys, len(keys) // 2)):
                time.sleep(dice.uniform(0.1, 3))
        except (redis.RedisError, ServerError):
            self._move({slot: to})
        self.settle()

    def _used(self) -> list[int]:
        """Slots whose keys the processes use: of some sessions, and all others."""
        keys = Keys()
        sids = (self.folder / "sids").read_bytes()[: 10 * 64]
        sessions = [sids[at : at + 64].split(b" ")[0].decode(errors="replace") for at in range(0, len(sids), 64)]
        used = [
            *map(keys.lock, "ab"), *(keys.rate_limit("default", identity) for identity in RATES),
            *(keys.cached("agent_meta", agent) for agent in AGENTS),
            *(keys.session(sid) for sid in sessions if sid.strip("\0")),
        ]  # fmt: skip
        return sorted(set(map(slot_of, used)))

    def _another(self, dice: random.Random, home: RedisServer) -> RedisServer:
        return dice.choice([one for one in self.servers() if one.port in self.primaries and one is not home])

    def _move(self, to: dict[int, RedisServer]) -> None:
        """Again, where a node was replaced meanwhile."""
        ends, left = now() + SETTLED, dict(to)
        while left:
            server = next(iter(left.values()))
            some = [slot for slot, its in left.items() if its is server]
            try:
                self.group.move_slots(some, server)
            except (redis.RedisError, ServerError):
                if now() > ends:
                    raise
                self.settle()
                # The keys of a node that is a replica now are its primary's: the slots go there.
                left = {slot: self._replacement(its) for slot, its in left.items()}
            else:
                for slot in some:
                    del left[slot]

    def _replacement(self, gone: RedisServer) -> RedisServer:
        of = self.ask(gone.port, "ROLE")
        port = int(of[2]) if of and of[0] == "slave" else 0
        return next((server for server in self.servers() if server.port == port), gone)


def _parsed(ranges: Sequence[str]) -> Iterator[tuple[int, int]]:
    for each in ranges:
        if not each.startswith("["):  # else it is on its way
            first, _, last = each.partition("-")
            yield int(first), int(last or first)


def _view(slots: Sequence[Sequence[object]]) -> str:
    return str(sorted((first, last, master[1], sorted(r[1] for r in rest)) for first, last, master, *rest in slots))  # type: ignore[index]
