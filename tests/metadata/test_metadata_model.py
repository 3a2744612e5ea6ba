"""Every order of events around one cached value, in a model of leases, invalidations and the outbox relay.

The model has these parts:

- Two writes of PostgreSQL's row.
- A reader, whose hits are judged, and a second one, which loads and fills beside it.
- An outbox relay.
- An async service, which sets and deletes the value, however late.
- Redis, which loses its data, or is replaced by a server with older data, once.

Any step may be the last of its process: that is a crash, or an invalidation that is lost. Time passes in units; X is
one of them. (relay.py is stricter: a freshness lease is valid only once PostgreSQL knows of it, and a run whose relay
died after it told Redis is not lost data.)

Checked in every state that can be reached: no hit is older than the last invalidation completed before the read began
(on the server that keeps its data), and none older than any write committed X before that. Each rule is taken away in
turn, and is missed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import pytest

pytestmark = pytest.mark.once

X = 1
NONE = -1
#: The epoch of a foreign value.
FOREIGN = -2

RULES = [
    "a fill needs its lease",
    "a lease is taken before the load",
    "an invalidation takes the lease away",
    "an invalidation keeps only a value as new",
    "a hit has the freshness lease's epoch",
    "a foreign value is no hit",
    "a fill carries the epoch from before its lease",
    "a hit needs a freshness lease that is valid",
    "a snapshot ends with a new connection",
    "a value that was read over a new connection is read again",
    "the relay notices that data was lost",
    "the relay takes the time before it reads the rows",
    "the relay reads all rows",
    "the relay invalidates the rows that it acknowledges",
    "only rows that were read are acknowledged",
    "only the relay acknowledges",
    "rows are acknowledged after Redis has answered",
]
#: Instead of leases: fills are never refused, and an invalidation deletes once more, a unit of time later.
DOUBLE_DELETE = "delayed double delete"


class Broken(Exception):
    pass


class Redis(NamedTuple):
    """The contents of a server. Epochs and leases are names, given anew where in use nowhere."""

    value: int = 0
    value_epoch: int = 0
    lease: int = NONE
    epoch: int = 0
    #: The run whose number it stores: the last that PostgreSQL knows of, one sent since, one that a late script
    #: expects, another.
    run: str = "last"
    #: How long the freshness lease is still valid.
    left: int = X


class FreshnessKey(NamedTuple):
    """As a reader has it in its process."""

    epoch: int
    left: int
    server: int


class Script(NamedTuple):
    """A run of the relay: rows to invalidate, the stored run that it expects, and the time since it took the time."""

    rows: frozenset[int]
    since: int
    expects: str = "last"


class State(NamedTuple):
    redis: Redis = Redis()
    #: The older data that a failover may bring, and how many servers there were before.
    older: Redis | None = None
    server: int = 0
    #: PostgreSQL: the time since each commit, the outbox.
    ages: tuple[int, ...] = ()
    rows: frozenset[int] = frozenset()
    #: The writers' own invalidations: those to be repeated, in how long; the newest that has been completed.
    again: tuple[tuple[int, int], ...] = ()
    done: int = 0
    #: A run of the relay: what it will send, or has sent. And a script that its sender has given up, still on its way.
    sends: Script | None = None
    sent: Script | None = None
    late: Script | None = None
    #: The reader's snapshot of the freshness lease, and what it read over a connection that is newer than that.
    snapshot: FreshnessKey | None = None
    read: tuple[int, int, int] | None = None
    #: The others: nothing, or a lease's epoch, its name and what was loaded.
    fills: tuple[tuple[int, ...], ...] = ()


class Scope(NamedTuple):
    """The most that there is of each part. All of it at once would be millions of states."""

    fillers: int
    writes: int
    failover: bool
    late: bool


SCOPES = Scope(2, 2, False, False), Scope(1, 2, True, False), Scope(0, 1, True, True)


def unused(*taken: int) -> int:
    return next(n for n in range(len(taken) + 1) if n not in taken)


def _names(found: Iterable[int]) -> dict[int, int]:
    names = {NONE: NONE}
    for name in found:
        names.setdefault(name, len(names) - 1)
    return names


class Model:
    def __init__(self, scope: Scope, without: str = "") -> None:
        assert without in ("", DOUBLE_DELETE, *RULES)
        self._scope = scope
        self._without = without

    def _rule(self, name: str) -> bool:
        return name != self._without

    # -- the scripts

    def _invalidated(self, redis: Redis, version: int) -> Redis:
        keeps = (redis.value >= version and redis.value_epoch != FOREIGN) or not self._rule(
            "an invalidation keeps only a value as new"
        )
        if not keeps:
            redis = redis._replace(value=NONE, value_epoch=NONE)
        return redis._replace(lease=NONE) if self._rule("an invalidation takes the lease away") else redis

    def _filled(self, redis: Redis, epoch: int, lease: int, version: int) -> Redis:
        if self._leases() and redis.lease != lease:
            return redis
        if not self._rule("a fill carries the epoch from before its lease"):
            epoch = redis.epoch
        return redis._replace(value=version, value_epoch=epoch, lease=NONE)

    def _told(self, s: State, script: Script, run: str) -> State:
        redis = s.redis
        if redis.run != script.expects and self._rule("the relay notices that data was lost"):
            in_use = [redis.value_epoch, redis.epoch, *(fill[0] for fill in s.fills if len(fill) == 3)]
            if s.older:
                in_use += [s.older.value_epoch, s.older.epoch]
            if s.snapshot:
                in_use.append(s.snapshot.epoch)
            if s.read:
                in_use.append(s.read[1])
            redis = redis._replace(epoch=unused(*in_use))
        elif self._rule("the relay invalidates the rows that it acknowledges"):
            for version in sorted(script.rows):
                redis = self._invalidated(redis, version)
        since = script.since if self._rule("the relay takes the time before it reads the rows") else 0
        return s._replace(redis=redis._replace(run=run, left=X - since))

    # -- the steps

    def after(self, s: State) -> Iterator[State]:
        yield from self._time(s)
        yield from self._writer(s)
        yield from self._reader(s)
        yield from self._fillers(s)
        yield from self._others(s)
        yield from self._relay(s)
        yield from self._failures(s)

    def _time(self, s: State) -> Iterator[State]:
        def less(left: int) -> int:
            return max(0, left - 1)

        def older(script: Script | None) -> Script | None:
            return script and script._replace(since=min(X, script.since + 1))

        yield s._replace(
            redis=s.redis._replace(left=less(s.redis.left)),
            older=s.older and s.older._replace(left=less(s.older.left)),
            ages=tuple(min(X, age + 1) for age in s.ages),
            again=tuple((version, less(wait)) for version, wait in s.again),
            sends=older(s.sends),
            sent=older(s.sent),
            late=older(s.late),
            snapshot=s.snapshot._replace(left=less(s.snapshot.left))
            if s.snapshot and self._valid(s.snapshot.left - 1)
            else None,
        )

    def _writer(self, s: State) -> Iterator[State]:
        version = len(s.ages) + 1
        if version <= self._scope.writes:
            yield s._replace(ages=(*s.ages, 0), rows=s.rows | {version})
        for version in range(1, len(s.ages) + 1):  # at any time, or never, or twice
            then = s._replace(redis=self._invalidated(s.redis, version))
            if not self._rule("only the relay acknowledges"):
                then = then._replace(rows=s.rows - {version})
            if self._rule(DOUBLE_DELETE):
                yield then._replace(done=max(s.done, version))
            elif version not in dict(s.again):
                yield then._replace(again=(*s.again, (version, 1)))
        for version, wait in s.again:
            if not wait:
                again = tuple(one for one in s.again if one[0] != version)
                redis = self._invalidated(s.redis, version)
                yield s._replace(redis=redis, again=again, done=max(s.done, version))

    def _reader(self, s: State) -> Iterator[State]:
        """Asking for the freshness lease is one step; a read under it is another, and all that it does is judged."""
        asked = FreshnessKey(s.redis.epoch, s.redis.left, s.server) if self._valid(s.redis.left) else None
        if s.read is not None:
            if asked is not None:
                self._judge(s.read, asked.epoch)
            yield s._replace(snapshot=asked, read=None)
            return
        if asked is not None:
            yield s._replace(snapshot=asked)
        if s.snapshot is not None and s.redis.value != NONE:
            needs = max([v for v, age in enumerate(s.ages, 1) if age >= X], default=0)
            found = s.redis.value, s.redis.value_epoch, max(needs, s.done)
            if s.snapshot.server == s.server or not self._rule("a snapshot ends with a new connection"):
                self._judge(found, s.snapshot.epoch)
            elif not self._rule("a value that was read over a new connection is read again"):
                yield s._replace(read=found)

    def _valid(self, left: int) -> bool:
        return left > 0 or not self._rule("a hit needs a freshness lease that is valid")

    def _judge(self, found: tuple[int, int, int], epoch: int) -> None:
        version, value_epoch, needs = found
        if version < needs and self._is_hit(value_epoch, [epoch]):
            raise Broken(f"a hit is {version} and must not be older than {needs}")

    def _is_hit(self, value_epoch: int, epochs: list[int]) -> bool:
        if value_epoch == FOREIGN:
            return not self._rule("a foreign value is no hit")
        return value_epoch in epochs or not self._rule("a hit has the freshness lease's epoch")

    def _others(self, s: State) -> Iterator[State]:
        """They delete it, or set what they read, now or long ago."""
        yield s._replace(redis=s.redis._replace(value=NONE, value_epoch=NONE))
        for version in range(len(s.ages) + 1):
            yield s._replace(redis=s.redis._replace(value=version, value_epoch=FOREIGN))

    def _fillers(self, s: State) -> Iterator[State]:
        idle = [()] if len(s.fills) < self._scope.fillers else []
        for fill in {*s.fills, *idle}:
            fills, redis = list(s.fills), s.redis
            if fill:
                fills.remove(fill)
            if len(fill) == 3:
                redis = self._filled(redis, *fill)
            elif fill:
                redis, lease = self._leased(s)
                fills.append((redis.epoch, lease, fill[0]))
            elif self._rule("a lease is taken before the load"):
                redis, lease = self._leased(s)
                fills.append((redis.epoch, lease, len(s.ages)))  # at once: what is loaded later is only newer
            else:
                fills.append((len(s.ages),))
            yield s._replace(redis=redis, fills=tuple(sorted(fills)))

    def _leased(self, s: State) -> tuple[Redis, int]:
        if s.redis.lease != NONE:
            return s.redis, s.redis.lease
        held = [fill[1] for fill in s.fills if len(fill) == 3]
        lease = unused(*held, *([s.older.lease] if s.older else []))
        return s.redis._replace(lease=lease), lease

    def _relay(self, s: State) -> Iterator[State]:
        if s.sends is None and s.sent is None:
            rows = s.rows if self._rule("the relay reads all rows") else frozenset(sorted(s.rows)[:1])
            yield s._replace(sends=Script(rows, 0))
        elif s.sends:
            then = s
            if not self._rule("rows are acknowledged after Redis has answered"):
                then = s._replace(rows=s.rows - s.sends.rows)
            yield self._told(then, s.sends, "sent")._replace(sends=None, sent=s.sends)
            if self._scope.late and s.late is None:
                yield then._replace(sends=None, late=s.sends)  # nobody waits for it any more
        elif s.sent:
            rows = s.rows - s.sent.rows if self._rule("only rows that were read are acknowledged") else frozenset()
            expected = "late" if s.late and s.late.expects == "last" else "other"
            late = s.late and s.late._replace(expects="late")
            yield self._named(s._replace(rows=rows, sent=None, late=late), {"sent": "last", "last": expected})
            yield self._named(s._replace(sent=None), {"sent": "other"})  # the relay is dead, or the reply was lost
        if s.late:
            names = {} if s.late.expects == "last" else {"late": "other"}
            yield self._named(self._told(s, s.late, "other")._replace(late=None), names)

    def _named(self, s: State, names: dict[str, str]) -> State:
        """With the runs that the servers store under other names."""

        def named(redis: Redis) -> Redis:
            return redis._replace(run=names.get(redis.run, redis.run))

        return s._replace(redis=named(s.redis), older=s.older and named(s.older))

    def _failures(self, s: State) -> Iterator[State]:
        if s.server or not self._scope.failover:
            return
        if s.older is None:
            yield s._replace(older=s.redis)
        for redis in (s.older, Redis(NONE, NONE, NONE, NONE, "other", 0)):
            if redis is not None:
                yield s._replace(redis=redis, older=None, server=1, done=0)

    def seen_as(self, s: State) -> State:
        """The same without what can have no effect any more, and with the names in order."""
        if s.older:  # its successor comes: what it serves until then is judged where none does
            lease = s.redis.lease if s.redis.lease == s.older.lease else NONE
            s = s._replace(redis=s.redis._replace(value=NONE, value_epoch=NONE, lease=lease), done=0)
        servers = [s.redis, s.older] if s.older else [s.redis]
        epochs = [server.epoch for server in servers] + ([s.snapshot.epoch] if s.snapshot else [])
        leases = [server.lease for server in servers]
        fills = [fill for fill in s.fills if len(fill) != 3 or self._may_fill(fill, epochs, leases)]
        epoch = _names([*epochs, *(f[0] for f in fills if len(f) == 3)])
        lease = _names([token for token in leases if any(token == fill[1] for fill in fills if len(fill) == 3)])

        def bare(redis: Redis) -> Redis:
            valid = self._is_hit(redis.value_epoch, epochs)
            return redis._replace(
                value=redis.value if valid else NONE,
                value_epoch=FOREIGN if valid and redis.value_epoch == FOREIGN else epoch.get(redis.value_epoch, NONE),
                epoch=epoch[redis.epoch],
                lease=lease.get(redis.lease, NONE),
            )

        fills = [(epoch[f[0]], lease.get(f[1], NONE), f[2]) if len(f) == 3 else f for f in fills]
        return s._replace(
            redis=bare(s.redis),
            older=s.older and bare(s.older),
            snapshot=s.snapshot and s.snapshot._replace(epoch=epoch[s.snapshot.epoch]),
            fills=tuple(sorted(fills)),
        )

    def _may_fill(self, fill: tuple[int, ...], epochs: list[int], leases: list[int]) -> bool:
        return fill[0] in epochs and (fill[1] in leases or not self._leases())

    def _leases(self) -> bool:
        return self._rule("a fill needs its lease") and self._rule(DOUBLE_DELETE)


def explore(scope: Scope, without: str = "") -> int:
    model = Model(scope, without)
    met, seen, new = {State()}, {State()}, deque([State()])
    while new:
        for then in model.after(new.popleft()):
            if then not in met:
                met.add(then)
                then = model.seen_as(then)
                if then not in seen:
                    seen.add(then)
                    new.append(then)
    return len(seen)


@pytest.mark.parametrize("scope", SCOPES)
def test_the_protocol_keeps_its_promises_in_every_state(scope: Scope) -> None:
    assert explore(scope) > 1000


@pytest.mark.parametrize("rule", [*RULES, DOUBLE_DELETE])
def test_each_rule_is_missed(rule: str) -> None:
    with pytest.raises(Broken):
        for scope in (Scope(1, 1, True, False), *SCOPES):  # the smallest first
            explore(scope, rule)
