"""Every order of events among three clients that want a lock, in a model.

It models queue.lua, acquire.lua, release.lua and acquisition.py. These hold in every state that can be reached:

- There is one holder at most, and Redis knows it.
- The longest waiter that lives is granted the lock.
- A waiter that was handed the lock was woken.
- Every waiter gets it if nobody else acts.
- A client that has gone has left nothing.

Each rule is taken away in turn, and the check fails.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

pytestmark = pytest.mark.once

CLIENTS = range(3)
WAITING = "waits", "woken"
RULES = [
    "only the first is granted a free lock",
    "a caller that notices a free lock hands it to the first",
    "a release hands over",
    "only the holder's release ends it",
    "a hand-over wakes",
    "a hand-over takes out of the queue",
    "a hand-over ends if not confirmed",
    "dead waiters are passed over",
    "a retry keeps its place",
    "a waiter that gives up leaves the queue",
    "a waiter that gives up hands the lock on",
    "a caller that does not wait is not queued",
    "queueing up empties the list",
    "a waiter that wakes up late asks anew",
    "a confirmation grants nothing anew",
]


class Broken(Exception):
    pass


@dataclass(frozen=True)
class State:
    #: Known to Redis: the holder, whether it has confirmed, the queue, waiters not seen lately, and those with a list.
    holder: int | None = None
    confirmed: bool = False
    queue: tuple[int, ...] = ()
    unseen: frozenset[int] = frozenset()
    woken: frozenset[int] = frozenset()
    #: The clients whose list holds a token of an earlier turn, and those whose confirmation is on its way.
    stale: frozenset[int] = frozenset()
    confirming: frozenset[int] = frozenset()
    #: The truth: whether each client is out, waits, was woken, holds, has lost the lock or is dead; and the waiters
    #: that live, by arrival, without those passed over.
    doing: tuple[str, ...] = ("out",) * len(CLIENTS)
    arrived: tuple[int, ...] = ()

    def does(self, client: int, what: str) -> State:
        doing = tuple(what if c == client else d for c, d in enumerate(self.doing))
        arrived = self.arrived if what in WAITING else _without(self.arrived, client)
        if what == "waits" and client not in arrived:
            arrived += (client,)
        return replace(self, doing=doing, arrived=arrived)


def _without(queue: tuple[int, ...], client: int) -> tuple[int, ...]:
    return tuple(c for c in queue if c != client)


class Model:
    def __init__(self, without: str = "") -> None:
        self._without = without

    def _rule(self, name: str) -> bool:
        assert name in RULES
        return name != self._without

    # -- the scripts

    def _first(self, s: State) -> tuple[State, int | None]:
        while s.queue:
            if s.queue[0] not in s.unseen or not self._rule("dead waiters are passed over"):
                return s, s.queue[0]
            s = replace(s, queue=s.queue[1:], arrived=_without(s.arrived, s.queue[0]))
        return s, None

    def _hand(self, s: State, client: int) -> State:
        queue = _without(s.queue, client) if self._rule("a hand-over takes out of the queue") else s.queue
        woken = s.woken | {client} if self._rule("a hand-over wakes") else s.woken
        return replace(s, holder=client, confirmed=False, queue=queue, woken=woken)

    def acquire(self, s: State, me: int, waits: bool = True) -> tuple[State, bool]:
        if s.holder is None:
            s, first = self._first(s)
            if first is not None and first != me and self._rule("only the first is granted a free lock"):
                if not self._rule("a caller that notices a free lock hands it to the first"):
                    return s, False
                s = self._hand(s, first)
        if s.holder not in (None, me):
            if waits or not self._rule("a caller that does not wait is not queued"):
                keeps = me in s.queue and self._rule("a retry keeps its place")
                queue = s.queue if keeps else (*_without(s.queue, me), me)
                if me in s.woken and not self._rule("queueing up empties the list"):
                    s = replace(s, stale=s.stale | {me})
                s = replace(s, queue=queue, unseen=s.unseen - {me}, woken=s.woken - {me})
            return s, False
        queue = s.queue if s.holder == me else _without(s.queue, me)
        return replace(s, holder=me, confirmed=True, queue=queue, woken=s.woken - {me}), True

    def release(self, s: State, me: int) -> State:
        if s.holder != me and self._rule("a waiter that gives up leaves the queue"):
            s = replace(s, queue=_without(s.queue, me))
        if s.holder not in (None, me) and self._rule("only the holder's release ends it"):
            return s
        s, first = self._first(s)
        if first is not None and self._rule("a release hands over"):
            return self._hand(s, first)
        return replace(s, holder=None, confirmed=False)

    # -- what can happen

    def _asked(self, s: State, me: int) -> State:
        """Acquired, and got the reply."""
        s, granted = self.acquire(s, me)
        return s.does(me, "holds" if granted else "waits")

    def _confirmed(self, s: State, me: int) -> State:
        """It has arrived, perhaps after the release."""
        if s.holder == me or not self._rule("a confirmation grants nothing anew"):
            s, _ = self.acquire(s, me, waits=False)
        return replace(s, confirming=s.confirming - {me})

    def after(self, s: State) -> list[State]:
        found: list[State] = []
        for me, does in enumerate(s.doing):
            if does == "out":
                found.append(self._asked(s, me))
                tried, granted = self.acquire(s, me, waits=False)
                found.append(tried.does(me, "holds") if granted else tried)
            if does == "waits":
                found.append(self._asked(s, me))
                then, granted = self.acquire(s, me)
                if granted:
                    found.append(then)  # its reply was lost: it goes on waiting
                found.append(replace(s, woken=s.woken - {me}))  # an element lost with its connection
                if me in s.woken:
                    found.append(replace(s, woken=s.woken - {me}).does(me, "woken"))
                if me in s.stale:
                    found.append(replace(s, stale=s.stale - {me}, confirming=s.confirming | {me}).does(me, "holds"))
                found.append(replace(s, unseen=s.unseen | {me}))  # stopped for a second
            if does == "woken":
                if s.holder == me or not self._rule("a waiter that wakes up late asks anew"):
                    found.append(replace(s, confirming=s.confirming | {me}).does(me, "holds"))
                found.append(self._asked(s, me))
            if does in WAITING:
                gone = self.release(s, me) if self._rule("a waiter that gives up hands the lock on") else s
                if gone is s and self._rule("a waiter that gives up leaves the queue"):
                    gone = replace(s, queue=_without(s.queue, me))
                found.append(gone.does(me, "out"))
            if does in ("holds", "lost"):
                released = self.release(s, me).does(me, "out")
                found.append(released)
                found.append(self.release(released, me))  # it arrived twice
            if does in (*WAITING, "holds", "lost"):
                found.append(s.does(me, "dead"))
                found.append(replace(s.does(me, "dead"), unseen=s.unseen | {me}))
            if does == "dead" and me not in s.unseen:
                found.append(replace(s, unseen=s.unseen | {me}))
            if me in s.confirming:
                found.append(self._confirmed(s, me))
        if (ended := self.expire(s)) is not s:
            found.append(ended)
        return found

    def expire(self, s: State) -> State:
        """A lease that nobody renews, or a hand-over that nobody confirms."""
        if s.holder is None:
            return s
        holds = s.doing[s.holder]
        if not s.confirmed and self._rule("a hand-over ends if not confirmed"):
            if holds == "holds":
                return replace(s.does(s.holder, "lost"), holder=None)  # its own clock says so no later
            return replace(s, holder=None, arrived=_without(s.arrived, s.holder))
        return replace(s, holder=None, confirmed=False) if s.confirmed and holds in ("dead", "lost") else s

    # -- what must be so

    def check(self, before: State, s: State) -> None:
        holds = [c for c in CLIENTS if s.doing[c] == "holds"]
        if len(holds) > 1:
            raise Broken(f"{holds} hold it")
        if holds and (s.holder != holds[0] or (not s.confirmed and holds[0] not in s.confirming)):
            raise Broken(f"{holds} holds it, and Redis does not know")
        if s.holder not in (None, before.holder):
            # A waiter that was passed over in this very step, and queued up anew, stands in the new order only.
            order = s.arrived if s.holder in s.arrived else before.arrived
            waited = [c for c in order if c in s.arrived or c == s.holder]
            if waited and waited[0] != s.holder and s.doing[s.holder] != "dead":
                raise Broken(f"{s.holder} got it before {waited[0]}")
            if not s.confirmed and s.holder in before.unseen:
                raise Broken(f"{s.holder} was handed it, and has not been seen")
            if not s.confirmed and s.holder not in s.woken and s.doing[s.holder] != "woken":
                raise Broken(f"{s.holder} was handed it and not woken")
        if s.holder is None and s.queue and before.holder is not None and s.doing[before.holder] == "out":
            raise Broken(f"{before.holder} released it, and {s.queue} were not told")
        for c in CLIENTS:
            if s.doing[c] == "out" and (c in s.queue or s.holder == c):
                raise Broken(f"{c} has left something")
        if s.holder in s.queue:
            raise Broken(f"{s.holder} holds it and queues")
        if not holds and not s.confirming and any(d in WAITING for d in s.doing):
            self._somebody_gets_it(s)

    def _somebody_gets_it(self, s: State) -> None:
        """Within two rounds of slices, the ends of leases, and the second after which the dead are passed over."""
        s = replace(s, unseen=s.unseen | {c for c in CLIENTS if s.doing[c] == "dead"})
        for _ in range(3):
            for me in CLIENTS:
                if s.doing[me] in WAITING:
                    s, granted = self.acquire(s, me)
                    if granted:
                        return
            if s.holder is not None and s.doing[s.holder] not in WAITING:
                s = self.expire(s)
        raise Broken(f"nobody gets it: {s}")


def but_for_names(s: State) -> object:
    """The same for states that differ only in who is who: the clients are all alike."""

    def about(client: int) -> tuple[object, ...]:
        places = (queue.index(client) if client in queue else -1 for queue in (s.queue, s.arrived))
        marks = (client in marked for marked in (s.unseen, s.woken, s.stale, s.confirming))
        return s.doing[client], s.holder == client, *places, *marks

    return s.confirmed, *sorted(map(about, CLIENTS))


def explore(model: Model) -> int:
    seen, new = {but_for_names(State())}, [State()]
    while new:
        s = new.pop()
        for then in model.after(s):
            model.check(s, then)
            name = but_for_names(then)
            if name not in seen:
                seen.add(name)
                new.append(then)
    return len(seen)


def test_the_protocol_keeps_its_promises_in_every_state() -> None:
    assert explore(Model()) > 1000


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_is_missed(rule: str) -> None:
    with pytest.raises(Broken):
        explore(Model(rule))
