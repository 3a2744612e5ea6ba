"""The checker itself: a good history has no violations, and each kind of bad one is found."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from govredis.client.slots import slot_of

from . import checks
from .checks import HUNG, KEYS, LATE, LOCAL, Violation, X, check
from .history import Op, Recorder, read

OVERLAP = "holders on one host never overlap"
FENCES = "fencing tokens rise"
REGISTER = "a resource that checks tokens takes no stale write"
TOO_MANY = "at most N within any window, a store and loss of data"
FOR_NOTHING = "none is refused while within N"
LOGGED_OUT = "a live session is never logged out"
ANOTHERS = "never another user's session"
REVOKED = "a revoked session is found nowhere"
FOREIGN = "a value is one that was written for its id"
STALE = "no hit is staler than X"
TOLD = "after invalidate no hit is older"
LOST = "no task is lost"
TWO_TASKS = "exclusive tasks never overlap"
ERRORS = "only documented exceptions"
HANGS = "nothing hangs"
BACK = "in use again after healing"


def op(what: str, began: float, ended: float = math.inf, value: Any = None, **more: Any) -> Op:
    """An operation that was carried out, if it has ended."""
    outcome = more.pop("outcome", "ok" if ended < math.inf else "unknown")
    who, flags = more.pop("who", "one"), more.pop("flags", [])
    return Op(what, who, began, ended, outcome, value, flags, more)


def hold(began: float, left: float, token: int, kind: str = "lock", **more: Any) -> Op:
    until = more.pop("until", left + 1)
    return op("hold", began, left, token, kind=kind, name="a", entered=began, left=left, until=until, **more)


def hit(at: float, allowed: bool = True, **more: Any) -> Op:
    more = {"store": "redis", "cost": 1, "rate": [[3, 1], [5, 10]], "id": "i", **more}
    window = more.pop("window", 1)
    return op("hit", at, at + 0.01, [allowed, more.pop("store"), 0 if allowed else window, 0], **more)


def bind(ended: float = 1.0, **more: Any) -> Op:
    return op("session.bind", 0, ended, "redis", sid="s", agent="ann", **more)


def get(began: float, found: Any = ("ann", "redis", "ann"), **more: Any) -> Op:
    return op("session.get", began, began + 0.1, found and [*found], sid="s", **more)


def unbind(began: float = 2.0, ended: float = 2.1, **more: Any) -> Op:
    return op("session.unbind", began, ended, True, sid="s", **more)


def write(version: int, ended: float, **more: Any) -> Op:
    return op("write", ended - 0.1, ended, version, agent="a", of=version, **more)


def saw(version: int, began: float, agent: str = "a", local: bool = False, **more: Any) -> Op:
    of = more.pop("of", version)
    return op("read", began, began + 0.1, [version, "one", of, agent], agent=agent, local=local, **more)


def fault(began: float, ended: float, **args: Any) -> Op:
    return op("fault", began, ended, **{"loses": 0, "evicts": 0, **args})


def publish(of: int) -> Op:
    return op("publish", 0, 1, task="alone", of=of)


def ran(of: int, began: float, ended: float = math.inf, **more: Any) -> Op:
    return op("run", began, ended, task="alone", of=of, key="k", **more)


#: The slot of the limit in `hit`.
SLOT = slot_of(KEYS.rate_limit("default", "i"))
LATER = 2.1 + X + 0.1

GOOD: dict[str, list[Op]] = {
    "one after the other": [hold(1, 2, 1), hold(2.1, 3, 2)],
    "one whose lease had ended": [hold(1, 9, 1, until=2), hold(3, 4, 2)],
    "one that was killed inside": [
        op("hold", 1, value=1, kind="lock", name="a", entered=1, until=9),
        hold(2, 3, 2),
    ],
    "other locks": [hold(1, 2, 1), op("hold", 1, 2, 1, kind="lock", name="b", entered=1, left=2, until=3)],
    "readers": [hold(1, 3, 1, "read"), hold(2, 4, 2, "read"), hold(5, 6, 3, "write")],
    "as many as there are slots": [hold(1, 3, 1, "slot", slots=2), hold(2, 4, 2, "slot", slots=2)],
    "a register": [op("register", 1, 1, [[1, 1], [5, 2], [7, 3]], name="a")],
    "as many as N": [*map(hit, [0, 0.1, 0.2, 1.2, 1.3])],
    "N of each store": [*map(hit, [0, 0.1, 0.2]), *(hit(0.3 + n / 10, store="postgres") for n in range(3))],
    "N once more after a loss": [*map(hit, [0, 0.1, 0.2, 0.4, 0.5, 0.6]), fault(0.3, 0.3, loses=1)],
    "N once more after a failover of its node": [
        *map(hit, [0, 0.1, 0.2, 0.4, 0.5, 0.6]),
        fault(0.3, 0.3, loses=1, slots=[(0, 1), (SLOT, SLOT)]),
    ],
    "any number during evictions": [*(hit(n / 100) for n in range(30)), fault(0.1, 0.3, evicts=1)],
    "what was given back": [*map(hit, [0, 0.1, 0.2]), hit(0.3, refund=True)],
    "refused at N": [*map(hit, [0, 0.1, 0.2]), hit(0.3, False)],
    "refused for what may have been taken": [op("hit", 0, id="i", cost=3, rate=[[3, 1]]), hit(0.3, False)],
    "found while bound": [bind(), get(2)],
    "revoked": [bind(), unbind(), get(2.5, None)],
    "bound while PostgreSQL was away": [bind(flags=["sessions.degraded.bind"]), get(2, None)],
    "a bind that nobody knows of": [bind(math.inf), get(2, None)],
    "revoked just now, in a storm": [bind(), unbind(), fault(0, 9), get(2.2)],
    "revoked where nobody could be told": [bind(), unbind(flags=["sessions.degraded.unbind"]), get(LATER)],
    "believed without PostgreSQL": [bind(), unbind(), get(LATER, flags=["sessions.degraded.unguarded"])],
    "by its own memory": [bind(), unbind(), get(LATER, ("ann", "local", "ann"))],
    "of an agent, and bound later": [op("session.unbind_agent", 0, 0.5, 1, agent="ann"), bind(), get(9)],
    "of an agent, and ended": [bind(), op("session.unbind_agent", 2, 2.1, 1, agent="ann"), get(3, None)],
    "rotated": [bind(), op("session.rotate", 2, 2.1, "t", sid="s", agent="ann"), get(2.2, None)],
    "read as written": [write(1, 1), saw(1, 2)],
    "read a moment before it is told": [write(1, 1), write(2, 2), saw(1, 1.95)],
    "in the process for a second": [write(1, 1), write(2, 2), saw(1, 2 + LOCAL / 2, local=True)],
    "pending": [write(1, 1), write(2, 2, flags=["agent_meta.invalidations_owed"]), saw(1, 2.5)],
    "by psql": [write(1, 1), write(2, 2, psql=True), saw(1, 2.5)],
    "after data was lost": [write(1, 1), write(2, 2), fault(2.1, 2.1, loses=1), saw(1, 2.5)],
    "after a failover of its node": [write(1, 1), write(2, 2), fault(2, 2, loses=1, slots=[(0, 16383)]), saw(1, 2.5)],
    "without PostgreSQL": [write(1, 1), write(2, 2), saw(1, 9, flags=["agent_meta.degraded.unguarded"])],
    "a write that nobody knows of": [op("write", 1, agent="a", of=7), saw(7, 2)],
    "tasks": [publish(1), publish(2), ran(1, 2, 3), ran(2, 3.1, 4), ran(2, 4.1, 5)],
    "a task whose process was killed": [publish(1), ran(1, 2), ran(1, 3, 4)],
    "as documented": [op("acquire", 1, 2, "LockTimeout", outcome="failed")],
}  # fmt: skip

BAD: dict[str, tuple[str, list[Op]]] = {
    "two inside": (OVERLAP, [hold(1, 3, 1), hold(2, 4, 2)]),
    "one inside one that was long there": (OVERLAP, [hold(1, 9, 1), hold(2, 3, 2)]),
    "one that was killed inside another": (
        OVERLAP,
        [hold(1, 3, 1), op("hold", 2, value=2, kind="lock", name="a", entered=2, until=9)],
    ),
    "a reader beside a writer": (OVERLAP, [hold(1, 3, 1, "write"), hold(2, 4, 2, "read")]),
    "a writer beside readers": (OVERLAP, [hold(1, 3, 1, "read"), hold(2, 4, 2, "write")]),
    "more than slots": (OVERLAP, [hold(1 + n / 10, 3, n, "slot", slots=2) for n in range(3)]),
    "a token that falls": (FENCES, [hold(1, 2, 2), hold(3, 4, 1)]),
    "a token twice": (FENCES, [hold(1, 2, 2), hold(3, 4, 2)]),
    "a stale write": (REGISTER, [op("register", 1, 1, [[5, 1], [1, 2]], name="a")]),
    "a lost write": (REGISTER, [op("register", 1, 1, [[1, 1], [2, 1]], name="a")]),
    "one too many": (TOO_MANY, [*map(hit, [0, 0.1, 0.2, 0.3])]),
    "one too many in the longer window": (TOO_MANY, [hit(1.5 * n) for n in range(6)]),
    "a cost too many": (TOO_MANY, [hit(0), hit(0.1, cost=3)]),
    "2 N and one after a loss": (TOO_MANY, [*(hit(n / 10) for n in range(7)), fault(0.3, 0.3, loses=1)]),
    "a loss of other slots": (
        TOO_MANY,
        [*(hit(n / 10) for n in range(4)), fault(0.3, 0.3, loses=1, slots=[(0, SLOT - 1), (SLOT + 1, 16383)])],
    ),
    "evictions of other slots": (
        TOO_MANY,
        [*(hit(n / 10) for n in range(4)), fault(0.3, 0.3, evicts=1, slots=[(0, SLOT - 1)])],
    ),
    "2 N and one after a failover": (
        TOO_MANY,
        [*(hit(n / 10) for n in range(7)), fault(0.3, 0.3, loses=1, slots=[(SLOT, SLOT)])],
    ),
    "Redis's loss is not PostgreSQL's": (
        TOO_MANY,
        [*(hit(n / 10, store="postgres") for n in range(4)), fault(0.3, 0.3, loses=1)],
    ),
    "one too many in the process": (TOO_MANY, [*(hit(n / 10, store="local") for n in range(4))]),
    "refused within N": (FOR_NOTHING, [hit(0), hit(0.1), hit(0.3, False)]),
    "refused for what has long left": (FOR_NOTHING, [*map(hit, [0, 0.1, 0.2]), hit(3 + LATE, False)]),
    "logged out": (LOGGED_OUT, [bind(), get(2, None)]),
    "logged out after a flush": (LOGGED_OUT, [bind(), fault(1.5, 1.5, loses=1), get(2, None)]),
    "logged out before it was revoked": (LOGGED_OUT, [bind(), get(1.5, None), unbind()]),
    "a rotated one logged out": (
        LOGGED_OUT,
        [bind(), op("session.rotate", 2, 2.1, "t", sid="s", agent="ann"), op("session.get", 3, 3.1, sid="t")],
    ),
    "another's": (ANOTHERS, [bind(), get(2, ("bob", "redis", "bob"))]),
    "another's data": (ANOTHERS, [bind(), get(2, ("ann", "redis", "bob"))]),
    "another's in a list": (ANOTHERS, [bind(), op("session.for_agent", 2, 3, ["s"], agent="bob")]),
    "revoked, and found at once": (REVOKED, [bind(), unbind(), get(2.2)]),
    "revoked, and found by X and more": (REVOKED, [bind(), unbind(), fault(0, 9), get(LATER)]),
    "of a revoked agent": (REVOKED, [bind(), op("session.unbind_agent", 2, 2.1, 1, agent="ann"), get(LATER)]),
    "of an agent, where Redis is away": (
        REVOKED,
        [
            bind(),
            op("session.unbind_agent", 2, 2.1, 1, agent="ann", flags=["sessions.degraded.postgres"]),
            get(LATER),
        ],
    ),
    "of an agent, where Redis alone has it": (
        REVOKED,
        [
            bind(flags=["sessions.degraded.bind"]),
            op("session.unbind_agent", 2, 2.1, 1, agent="ann"),
            get(LATER),
        ],
    ),
    "of an agent, where Redis alone has it and is away": (
        REVOKED,
        [
            bind(flags=["sessions.degraded.bind"]),
            op("session.unbind_agent", 2, 2.1, 1, agent="ann", flags=["sessions.degraded.postgres"]),
            get(LATER),
        ],
    ),
    "rotated, and found": (
        REVOKED,
        [bind(), op("session.rotate", 2, 2.1, "t", sid="s", agent="ann"), fault(0, 9), get(LATER)],
    ),
    "stale by X and more": (STALE, [write(1, 1), write(2, 2), fault(0, 9), saw(1, 2 + X + 0.1)]),
    "stale by psql's": (STALE, [write(1, 1), write(2, 2, psql=True), saw(1, 2 + X + 0.1)]),
    "stale in the process": (STALE, [write(1, 1), write(2, 2, psql=True), saw(1, 2 + X + 0.1, local=True)]),
    "stale after it was told": (TOLD, [write(1, 1), write(2, 2), saw(1, 2.1)]),
    "stale after a failover of another node": (
        TOLD,
        [write(1, 1), write(2, 2), fault(2, 2, loses=1, slots=[(0, 0)]), saw(1, 2.1)],
    ),
    "stale in the process after it was told": (TOLD, [write(1, 1), write(2, 2), saw(1, 2.1 + LOCAL, local=True)]),
    "another id's value": (FOREIGN, [write(1, 1), op("read", 2, 3, [1, "one", 1, "a"], agent="b", local=False)]),
    "a value that nobody wrote": (FOREIGN, [write(1, 1), saw(9, 2)]),
    "another version's value": (FOREIGN, [write(1, 1), write(2, 2), saw(2, 3, of=1)]),
    "a lost task": (LOST, [publish(1), publish(2), ran(1, 2, 3)]),
    "a task that never ended": (LOST, [publish(1), ran(1, 2)]),
    "two tasks": (TWO_TASKS, [publish(1), publish(2), ran(1, 2, 4), ran(2, 3, 5)]),
    "a task beside one that was killed in it": (TWO_TASKS, [publish(1), ran(1, 2, 4), ran(2, 3)]),
    "another exception": (ERRORS, [op("hit", 1, 2, "KeyError: 1", outcome="failed", id="i", rate=[], cost=1)]),
    "an error of the server": (ERRORS, [op("peek", 1, 2, "BackendError", outcome="failed")]),
    "a call that took for ever": (HANGS, [op("peek", 1, 2 + HUNG)]),
    "never back": (BACK, [op("back", 1, 2, "limits still without Redis", outcome="failed")]),
}  # fmt: skip


def in_order(ops: list[Op]) -> list[Op]:
    return sorted(ops, key=lambda one: one.began)


@pytest.mark.parametrize("ops", GOOD.values(), ids=GOOD)
def test_a_good_history(ops: list[Op]) -> None:
    assert check(in_order(ops)) == []


@pytest.mark.parametrize(("promise", "ops"), BAD.values(), ids=BAD)
def test_a_bad_history(promise: str, ops: list[Op]) -> None:
    assert {violation.promise for violation in check(in_order(ops))} == {promise}


def test_each_promise_has_a_bad_history() -> None:
    promises = set(re.findall(r'Violation\("([^"]+)"', Path(checks.__file__).read_text()))
    assert promises == {promise for promise, _ in BAD.values()}


def test_violations_are_in_the_order_of_time() -> None:
    found = check(in_order([*BAD["never back"][1], *BAD["another's"][1], *BAD["two inside"][1]]))
    assert [type(violation) for violation in found] == [Violation] * 3
    assert [violation.at for violation in found] == sorted(violation.at for violation in found)


def test_the_last_record_of_an_operation_is_the_one_read(tmp_path: Path) -> None:
    recorder, other = Recorder(tmp_path, "one"), Recorder(tmp_path, "two")
    n = recorder.number()
    recorder.write(n, "session.bind", began=2.0, args={"sid": "s", "agent": "ann"})
    other.write(other.number(), "session.get", began=1.0, ended=3.0, outcome="ok", args={"sid": "s"}, flags=["f"])
    assert [one.outcome for one in read(tmp_path)] == ["ok", "unknown"]
    recorder.write(n, "session.bind", began=2.0, ended=2.5, outcome="ok", value="redis", args={"sid": "s"})
    with open(tmp_path / "one.jsonl", "ab") as file:  # it was killed in the midst of a line
        file.write(json.dumps({"n": 7, "what": "peek"}).encode())
    assert read(tmp_path) == [
        Op("session.get", "two", 1.0, 3.0, "ok", None, ["f"], {"sid": "s"}),
        Op("session.bind", "one", 2.0, 2.5, "ok", "redis", [], {"sid": "s"}),
    ]
