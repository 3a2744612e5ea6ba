"""The promises that a history must keep: a function for each group of them, which yields its violations.

Each check errs on the side of the library: of an operation that took from `began` to `ended`, it supposes whatever
moment in between excuses most; of one whose outcome is unknown, both outcomes. So a violation is one for certain.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from govredis.client.slots import SLOTS, slot_of
from govredis.keys import Keys

from .history import Op

#: The keys under which Redis has the limits and the values.
KEYS = Keys()
ALL_SLOTS = [(0, SLOTS - 1)]

#: With PostgreSQL no cached value is staler, and no revoked session is found: the workers' metadata_staleness.
X = 3.0
#: In the process, without hearing from Redis, a value is believed for so long.
LOCAL = 1.0
#: A hung server may carry out on waking the commands that it was sent: no fault lasts longer.
LATE = 10.0
#: Nothing takes longer: not while a server hangs, and not on a busy machine.
HUNG = 90.0

#: The exceptions that good calls may raise. A BackendError besides, say, would be an error answer to one.
DOCUMENTED = {
    "BackendUnavailable", "LockTimeout", "LockLost", "LockUnavailable", "RateLimitExceeded", "SessionStoreUnavailable",
    "SessionChanged",
}  # fmt: skip


class Violation(NamedTuple):
    promise: str
    at: float
    text: str


class Faults:
    """The faults of a history, and whether there were any in a stretch of time."""

    def __init__(self, ops: Iterable[Op]) -> None:
        self.all = [op for op in ops if op.what == "fault"]

    def between(self, began: float, ended: float, kind: str = "", key: str = "") -> int:
        """How many were at work; with a `kind`, how often they did that ("loses" data, "evicts") to the key.

        On a Cluster, where a fault befalls a primary, only the keys are concerned whose slots it had then.
        """
        slot = slot_of(key)
        return sum(
            int(fault.args.get(kind, 0)) if kind else 1
            for fault in self.all
            if fault.began <= ended
            and fault.ended >= began
            and (not kind or any(first <= slot <= last for first, last in fault.args.get("slots", ALL_SLOTS)))
        )


def check(ops: Sequence[Op]) -> list[Violation]:
    """All violations of a history, by instant."""
    faults = Faults(ops)
    found = [violation for one in CHECKS for violation in one(ops, faults)]
    return sorted(found, key=lambda violation: violation.at)


def errors(ops: Sequence[Op], faults: Faults) -> Iterator[Violation]:
    for op in ops:
        if op.outcome == "failed" and op.what == "back":
            yield Violation("in use again after healing", op.ended, f"{op.who}: {op.value}")
        elif op.outcome == "failed" and str(op.value).split(":")[0] not in DOCUMENTED:
            yield Violation("only documented exceptions", op.ended, f"{op.who}: {op.what} {op.args}: {op.value}")
        if math.isfinite(op.ended) and op.ended - op.began > HUNG and op.what not in ("hold", "fault", "back"):
            text = f"{op.who}: {op.what} {op.args} took {op.ended - op.began:.0f} s"
            yield Violation("nothing hangs", op.ended, text)


# -- locks -----------------------------------------------------------------------------------------------------------


class Hold(NamedTuple):
    """A stretch of time in which a holder had its lock for certain: its lease was looked at, and had not ended."""

    begins: float
    ends: float
    op: Op

    def __str__(self) -> str:
        return f"{self.op.who} ({self.op.args['kind']}, token {self.op.value}, {self.begins:.4f} to {self.ends:.4f})"


def _holds(ops: Iterable[Op]) -> dict[tuple[str, str], list[Hold]]:
    """Holds by family and name, in the order of their beginning."""
    found: dict[tuple[str, str], list[Hold]] = defaultdict(list)
    for op in ops:
        if op.what == "hold" and op.args["until"] > op.args["entered"]:
            family = "rwlock" if op.args["kind"] in ("read", "write") else op.args["kind"]
            # If the holder was killed inside, only the moment when it came in is known.
            ends = min(op.args.get("left", op.args["entered"]), op.args["until"])
            found[family, op.args["name"]].append(Hold(op.args["entered"], ends, op))
    for holds in found.values():
        holds.sort(key=lambda hold: hold.begins)
    return found


def locks(ops: Sequence[Op], faults: Faults) -> Iterator[Violation]:
    for (family, name), holds in _holds(ops).items():
        inside: list[Hold] = []
        last: Hold | None = None
        for hold in holds:
            inside = [other for other in inside if other.ends > hold.begins]
            kind = hold.op.args["kind"]
            others = [o for o in inside if kind != "read" or o.op.args["kind"] != "read"]
            if len(others) >= hold.op.args.get("slots", 1):
                text = f"{family} {name}: {hold} came in beside {', '.join(map(str, others))}"
                yield Violation("holders on one host never overlap", hold.begins, text)
            inside.append(hold)
            if kind in ("lock", "write"):
                if last is not None and last.op.value >= hold.op.value:
                    yield Violation("fencing tokens rise", hold.begins, f"{family} {name}: {last}, then {hold}")
                last = hold
    for op in ops:
        if op.what == "register":
            tokens, values = [token for token, _ in op.value], [value for _, value in op.value]
            if tokens != sorted(set(tokens)) or values != [*range(1, len(values) + 1)]:
                text = f"{op.args['name']}: the resource took a stale write, or lost one"
                yield Violation("a resource that checks tokens takes no stale write", op.began, text)


# -- limits ----------------------------------------------------------------------------------------------------------


def limits(ops: Sequence[Op], faults: Faults) -> Iterator[Violation]:
    hits: dict[str, list[Op]] = defaultdict(list)
    for op in ops:
        if op.what == "hit":
            hits[op.args["id"]].append(op)
    for identity, some in hits.items():
        stores: dict[str, list[Op]] = defaultdict(list)
        for op in some:
            # A hit that was given back, or may have been, does not count.
            if op.ok and op.value[0] and not op.args.get("refund"):
                stores[op.value[1] if op.value[1] != "local" else f"{op.who}'s own"].append(op)
        for store, admitted in stores.items():
            for count, window in some[0].args["rate"]:
                mortal = KEYS.rate_limit("default", identity) if store == "redis" else None
                yield from _too_many(f"{identity} by {store}", admitted, count, window, faults, mortal)
        if not any(op.args.get("waited") for op in some):
            yield from _refused_for_nothing(some)


def _too_many(
    whose: str, admitted: list[Op], count: int, window: float, faults: Faults, mortal: str | None
) -> Iterator[Violation]:
    """`mortal`: the key whose loss forgets the admissions; None: they are where no fault reaches them."""
    for first, op in enumerate(admitted):
        until = op.began + window - 0.002  # the servers' clocks count in their own milliseconds
        total = 0
        for other in admitted[first:]:
            if other.began > until:
                break
            if other.ended <= until:
                total += other.args["cost"]
        if total <= count or (mortal and faults.between(op.began, until, "evicts", mortal)):
            continue
        # A failover loses what the replica did not have yet: N and that, so 2 N at most.
        losses = faults.between(op.began, until, "loses", mortal) if mortal else 0
        if total > count * (1 + losses):
            text = f"{whose}: {total} within {window:g} s of {op.began:.4f}, of {count}; {losses} losses of data"
            yield Violation("at most N within any window, a store and loss of data", op.began, text)
            return


def _refused_for_nothing(hits: list[Op]) -> Iterator[Violation]:
    began = [op.began for op in hits]
    for op in hits:
        if not op.ok or op.value[0] or op.value[1] not in ("redis", "postgres"):
            continue
        window = op.value[2]
        count = next(count for count, seconds in op.args["rate"] if seconds == window)
        # The hits that may stand in the window, in any store: a denial is repeated for a second from memory.
        since = op.began - window - 1 - LATE
        may_stand = [
            other.args["cost"]
            for other in hits[bisect_left(began, since - HUNG) : bisect_right(began, op.ended)]
            if other is not op
            and other.ended >= since
            and not (other.ok and not other.value[0] and other.value[1] == "redis")
        ]
        if sum(may_stand) + op.args["cost"] <= count:
            text = f"{op.args['id']}: {op.who} was refused by {op.value[1]} with {sum(may_stand)} of {count} taken"
            yield Violation("none is refused while within N", op.began, text)


# -- sessions --------------------------------------------------------------------------------------------------------


def sessions(ops: Sequence[Op], faults: Faults) -> Iterator[Violation]:
    agent_of: dict[str, str] = {}
    live_since: dict[str, float] = {}  # that it was bound, in PostgreSQL, is certain from then on
    of_agent: dict[str, list[Op]] = defaultdict(list)
    of_session: dict[str, list[Op]] = defaultdict(list)
    bound: dict[str, float] = {}  # with or without PostgreSQL
    for op in ops:
        if op.what == "session.bind":
            agent_of[op.args["sid"]] = op.args["agent"]
            if op.ok:
                bound[op.args["sid"]] = op.ended
                if not op.flagged("sessions.degraded.bind"):
                    live_since[op.args["sid"]] = op.ended
        elif op.what == "session.unbind":
            of_session[op.args["sid"]].append(op)
        elif op.what == "session.unbind_agent":
            of_agent[op.args["agent"]].append(op)
        elif op.what in ("session.rotate", "session.start") and (old := op.args.get("sid")):
            of_session[old].append(op)
    for op in ops:  # the new ids, once the agents of the old ones are known; one may be rotated again
        if op.what in ("session.rotate", "session.start") and op.ok and op.value:
            agent_of[op.value] = op.args["agent"]
            bound[op.value] = op.ended
            if not op.flagged("sessions.degraded.bind", "sessions.degraded.unbind"):
                live_since[op.value] = op.ended

    def ends(sid: str) -> Iterator[Op]:
        """The operations that have certainly ended the session if they are `ok`, and may have ended it if not."""
        yield from of_session[sid]
        yield from of_agent[agent_of.get(sid, "")]

    def revoked(sid: str, op: Op) -> Iterator[Op]:
        """Revocations that were over, and that PostgreSQL knew of, before `op` began."""
        for end in ends(sid):
            whole = end.what != "session.unbind_agent" or bound.get(sid, math.inf) < end.began
            told = not end.flagged("sessions.degraded.unbind", "sessions.degraded.unbind_agent")
            rotated = end.what != "session.rotate" or end.value  # None: there was no such session
            if end.ok and whole and told and rotated and end.ended < op.began:
                yield end

    for op in ops:
        if not op.ok:
            continue
        if op.what == "session.get":
            sid = op.args["sid"]
            if op.value is None:
                if live_since.get(sid, math.inf) < op.began and all(end.began > op.ended for end in ends(sid)):
                    text = f"{op.who} found none for {sid}, bound at {live_since[sid]:.4f} and ended by nobody"
                    yield Violation("a live session is never logged out", op.began, text)
                continue
            agent, backend, of = op.value
            if sid in agent_of and not agent == of == agent_of[sid]:
                text = f"{op.who} was told that {sid}, of {agent_of[sid]}, is {agent}'s, with data of {of}"
                yield Violation("never another user's session", op.began, text)
            if backend == "local" or op.flagged("sessions.degraded.unguarded", "sessions.degraded.get"):
                continue
            for end in revoked(sid, op):
                since = op.began - end.ended
                calm = not end.flags and not op.flags and not faults.between(end.began - X - 1, op.ended)
                if since > X or calm:
                    text = f"{op.who} found {sid} by {backend} {since:.3f} s after {end.what} by {end.who}"
                    yield Violation("a revoked session is found nowhere", op.began, text)
                    break
        elif op.what == "session.for_agent":
            agent = op.args["agent"]
            for sid in op.value:
                if agent_of.get(sid, agent) != agent:
                    text = f"{op.who}: {sid}, of {agent_of[sid]}, is listed as {agent}'s"
                    yield Violation("never another user's session", op.began, text)


# -- metadata --------------------------------------------------------------------------------------------------------


def metadata(ops: Sequence[Op], faults: Faults) -> Iterator[Violation]:
    writes: dict[str, list[Op]] = defaultdict(list)
    by_text: dict[tuple[str, int], Op] = {}
    for op in ops:
        if op.what == "write":
            by_text[op.who, op.args["of"]] = op
            if op.ok:
                writes[op.args["agent"]].append(op)
    committed = {agent: _Newest(some) for agent, some in writes.items()}
    told = {
        agent: _Newest([w for w in some if not w.args.get("psql") and not w.flagged("agent_meta.invalidations_owed")])
        for agent, some in writes.items()
    }
    for op in ops:
        if op.what != "read" or not op.ok or op.value is None:
            continue
        agent, (version, by, of, named) = op.args["agent"], op.value
        if by:
            write = by_text.get((by, of))
            if named != agent or write is None or write.args["agent"] != agent or (write.ok and write.value != version):
                text = f"{op.who} read {op.value} of {agent}, and what was written was {write}"
                yield Violation("a value is one that was written for its id", op.began, text)
                continue
        if agent not in writes or op.flagged("agent_meta.degraded.unguarded"):
            continue
        newer = committed[agent].before(op.began - X)
        if newer is not None and newer.value > version:
            text = f"{op.who} read {version} of {agent} {op.began - newer.ended:.3f} s after {newer.value}"
            yield Violation("no hit is staler than X", op.began, text)
            continue
        newer = told[agent].before(op.began - (LOCAL if op.args["local"] else 0.0))
        if (
            newer is not None
            and newer.value > version
            and not faults.between(newer.began - X - 1, op.ended, "loses", KEYS.cached("agent_meta", agent))
            and not faults.between(newer.began - X - 1, op.ended, "evicts", KEYS.cached("agent_meta", agent))
        ):
            text = f"{op.who} read {version} of {agent} {op.began - newer.ended:.3f} s after {newer.value} was told"
            yield Violation("after invalidate no hit is older", op.began, text)


class _Newest:
    """Which of some writes was the newest that was over at an instant."""

    def __init__(self, writes: list[Op]) -> None:
        writes = sorted(writes, key=lambda op: op.ended)
        self._ended = [op.ended for op in writes]
        self._newest: list[Op] = []
        for op in writes:
            last = self._newest[-1] if self._newest else op
            self._newest.append(op if op.value >= last.value else last)

    def before(self, instant: float) -> Op | None:
        place = bisect_left(self._ended, instant)
        return self._newest[place - 1] if place else None


# -- Celery ----------------------------------------------------------------------------------------------------------


def jobs(ops: Sequence[Op], faults: Faults) -> Iterator[Violation]:
    ran = {(op.args["task"], op.args["of"]) for op in ops if op.what == "run" and op.ok}
    for op in ops:
        if op.what == "publish" and op.ok and (op.args["task"], op.args["of"]) not in ran:
            text = f"{op.args['task']} {op.args['of']} was published, and did not run"
            yield Violation("no task is lost", op.ended, text)
    alone: dict[str, list[Op]] = defaultdict(list)
    for op in ops:
        if op.what == "run" and op.args["task"] == "alone":
            alone[op.args["key"]].append(op)
    for key, runs in alone.items():
        ends, before = -math.inf, ""
        for op in runs:
            if op.began < ends:
                text = f"{key}: {op.who} began {op.args['of']} at {op.began:.4f}; {before} ended at {ends:.4f}"
                yield Violation("exclusive tasks never overlap", op.began, text)
            if math.isfinite(op.ended) and op.ended > ends:  # else it was killed
                ends, before = op.ended, op.who


CHECKS: tuple[Callable[[Sequence[Op], Faults], Iterator[Violation]], ...] = (
    errors, locks, limits, sessions, metadata, jobs,
)  # fmt: skip
