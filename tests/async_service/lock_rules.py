"""Locks: one holder among both sides; theirs is seen by us, and what they take by force is lost to us, not restored."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from govredis import HeldLock, LockLost
from govredis.locks.renewal import renew_together

from .world import WHO, Beside, World, operation

NAMES = ("x", "y")
OWNERS = ("worker-1", "worker-2")


class Holder(NamedTuple):
    #: Which of our processes, or None.
    who: int | None
    #: The text at the key.
    owner: str
    held: HeldLock | None


class LockRules(Beside):
    def __init__(self, world: World) -> None:
        super().__init__(world)
        #: The holder of each lock.
        self.holders: dict[str, Holder] = {}
        #: Handles of ours whose lock somebody took by force, and which have not been released.
        self.robbed: list[tuple[int, str, HeldLock]] = []

    def end(self) -> None:
        for holder in self.holders.values():
            if holder.held is not None:
                holder.held.release()
        for _, _, held in self.robbed:
            held.release()
        super().end()

    def is_as_expected(self, name: str) -> None:
        """Both sides and Redis say of the lock what the model says."""
        holder, key = self.holders.get(name), self.name(name)
        owner = None if holder is None else holder.owner
        assert self.service.locks.holder(key) == owner
        for gov in self.present:
            assert gov.locks.is_locked(key) is (holder is not None)
            seen = gov.locks.holder(key)
            assert (None if seen is None else seen.owner) == owner
            if seen is not None and holder is not None:
                assert seen.token == (None if holder.held is None else holder.held.token)

    def take_by_force(self, name: str) -> None:
        """The model's part of it."""
        holder = self.holders.pop(name, None)
        if holder is not None and holder.who is not None and holder.held is not None:
            self.robbed.append((holder.who, name, holder.held))

    def held_by_us(self, name: str) -> HeldLock | None:
        """The handle of one of ours that is not cut off."""
        holder = self.holders.get(name)
        return None if holder is None or holder.who is None or self.away[holder.who] else holder.held

    def robbed_of(self, name: str) -> list[HeldLock]:
        return [held for who, robbed_name, held in self.robbed if robbed_name == name and not self.away[who]]

    @operation(who=WHO, name=NAMES)
    def we_try_to_acquire(self, who: int, name: str) -> None:
        held = self.govs[who].locks.try_acquire(self.name(name))
        if name in self.holders:
            assert held is None
        elif held is None:
            # On a host on which a handle is still used whose lock was taken by force, nobody else goes in.
            assert any(robbed[:2] == (who, name) for robbed in self.robbed)
        else:
            self.holders[name] = Holder(who, held._lease.owner, held)
        self.is_as_expected(name)

    @operation(name=NAMES, owner=OWNERS)
    def they_try_to_acquire(self, name: str, owner: str) -> None:
        assert self.service.locks.acquire(self.name(name), owner) is (name not in self.holders)
        self.holders.setdefault(name, Holder(None, owner, None))
        self.is_as_expected(name)

    @operation(name=NAMES)
    def we_release(self, name: str) -> None:
        if (held := self.held_by_us(name)) is not None:
            assert held.release() is True
            del self.holders[name]
        self.is_as_expected(name)

    @operation(name=NAMES, owner=OWNERS)
    def they_release(self, name: str, owner: str) -> None:
        holder = self.holders.get(name)
        is_theirs = holder is not None and holder.owner == owner
        assert self.service.locks.release(self.name(name), owner) is is_theirs
        if is_theirs:
            del self.holders[name]
        self.is_as_expected(name)

    @operation(name=NAMES)
    def they_take_it_by_force(self, name: str) -> None:
        assert self.service.locks.force_release(self.name(name)) is (name in self.holders)
        self.take_by_force(name)
        self.is_as_expected(name)

    @operation(who=WHO, name=NAMES)
    def we_take_it_by_force(self, who: int, name: str) -> None:
        assert self.govs[who].locks.force_release(self.name(name)) is (name in self.holders)
        self.take_by_force(name)
        self.is_as_expected(name)

    @operation(name=NAMES)
    def ours_are_renewed(self, name: str) -> None:
        """As the renewal thread does when they are due: those that were taken by force are lost."""
        if (held := self.held_by_us(name)) is not None:
            renew(held)
            held.raise_if_lost()
        for held in self.robbed_of(name):
            renew(held)
            with pytest.raises(LockLost):
                held.raise_if_lost()
        self.is_as_expected(name)

    @operation(name=NAMES)
    def ours_are_extended(self, name: str) -> None:
        if (held := self.held_by_us(name)) is not None:
            held.extend(40)
        for held in self.robbed_of(name):
            with pytest.raises(LockLost):
                held.extend(40)
        self.is_as_expected(name)

    @operation(name=NAMES)
    def the_robbed_let_go(self, name: str) -> None:
        """They release nothing of anybody else's."""
        for held in self.robbed_of(name):
            assert held.release() is False
            self.robbed = [robbed for robbed in self.robbed if robbed[2] is not held]
        self.is_as_expected(name)

    @operation(who=WHO)
    def who_holds_what(self, who: int) -> None:
        listed = {holder.name: holder.owner for holder in self.govs[who].locks.held()}
        mine = {name: listed[name] for name in map(self.name, ("x", "y")) if name in listed}
        expected = {self.name(name): holder.owner for name, holder in self.holders.items()}
        assert mine == expected


def renew(held: HeldLock) -> None:
    """As the renewal thread does, now."""
    lease: Any = held._lease
    with lease._mutex:
        lease._next = 0.0
    renew_together(lease.backend, [lease])
