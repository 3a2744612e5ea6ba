"""Fleet: Celery's workers, beats and queues, as they tell of themselves.

A process that only reads the report, such as a Flask site, has no Celery app. So workers and beats write into Redis
that they live, and workers write what they find in the broker.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from .._context import Context
from .._fork import renew_in_child
from .._teller import Party
from ..client import Command, Script
from ..errors import BackendError, BackendUnavailable, check_ttl, printable
from .heartbeat import MISSED
from .probes.probe import answered
from .report import Check

_KINDS = "worker", "beat", "queues"
#: Seconds for which the hash is kept, and a beat that is gone; and for which a worker that is gone is warned of.
_KEPT, _MOURNED = 86_400.0, 600.0
#: Names in one warning.
_NAMED = 5


class _Entry(NamedTuple):
    """A process, or a broker's queues: the seconds since it was noted first and last, and what it told."""

    kind: str
    name: str
    first: float
    last: float
    every: float
    told: dict[str, Any]

    @property
    def lives(self) -> bool:
        return self.last <= self.every * MISSED

    @property
    def is_past(self) -> bool:
        """Is it gone for so long that nobody is told of it any more?"""
        return self.last > max(_KEPT if self.kind == "beat" else _MOURNED, 10 * self.every)


class Fleet(Party):
    """Notes, and is the probe that shows them.

    The last note of each worker and beat that Redis could not be told is told about a second after its return: so
    health does not take living processes for dead then.

    Its checks, each where there is something to show: "workers"; "beat", where there are two or it is gone or late;
    "celery", the queues; "broker", its unacknowledged messages.
    """

    name = "workers"

    def __init__(self, context: Context) -> None:
        self._redis = context.redis
        self._key = context.keys.fleet()
        self._counters = context.counters
        self._script = Script(__package__, "fleet_note.lua")
        self._teller = context.teller
        self.scripts: Sequence[Script] = (self._script,)
        self.renew_after_fork()
        renew_in_child(self)
        context.teller.join(self)
        self.commands: tuple[Command, ...] = (("HGETALL", self._key), ("TIME",))

    def renew_after_fork(self) -> None:
        #: By kind and name: the calls of the script that Redis has not answered. A child is neither worker nor beat.
        self._owed: dict[tuple[str, str], Command] = {}
        self._telling: dict[tuple[str, str], Command] = {}

    # -- noting --------------------------------------------------------------------------------------------------

    def note(self, kind: str, name: str, every: float, told: dict[str, Any], broker: str = "") -> float | None:
        """A worker or a beat lives, or (kind "queues") a broker was looked at. Raises nothing for a Redis that is away.

        Returns the seconds since this broker was looked at; None: never, or nobody knows.
        """
        if self._redis is None:
            return None
        text = json.dumps({"every": check_ttl(every, "every"), **told})
        kept = f"{max(_KEPT, 10 * every) * 1000:.0f}"
        args = f"{kind}:{name}", text, kept, f"queues:{broker}"
        self._owed.pop((kind, name), None)
        try:
            since = self._redis.run(self._script, (self._key,), *args)
        except BackendError as error:
            self._counters.add("health.degraded.fleet")
            if isinstance(error, BackendUnavailable) and kind != "queues":  # depths are old by then
                self._owed[kind, name] = self._script.call((self._key,), args)
                self._teller.wake()
            return None
        return None if since < 0 else int(since) / 1000

    def leave(self, kind: str, name: str) -> None:
        """It ends by itself, and is not missed. Raises nothing for a Redis that is away."""
        self._owed.pop((kind, name), None)
        if self._redis is not None:
            try:
                self._redis.call("HDEL", self._key, f"{kind}:{name}")
            except BackendError:
                self._counters.add("health.degraded.fleet")

    def has_pending(self) -> bool:
        return bool(self._owed)

    def take(self, *, last: bool) -> list[Command]:
        self._telling = {} if last else dict(self._owed)
        return list(self._telling.values())

    def told(self, replies: list[Any]) -> None:
        for whose, command in self._telling.items():
            if self._owed.get(whose) is command:  # no later note has failed meanwhile
                del self._owed[whose]

    def give_back(self, *, last: bool) -> None:
        """They are owed still."""

    def prune(self) -> None:
        """Forget the processes that are not shown any more. Raises BackendError."""
        if self._redis is None:
            return
        flat, (seconds, micros) = self._redis.at(self._key).pipeline(self.commands)
        now = int(seconds) + int(micros) / 1_000_000
        fields = zip(flat[::2], flat[1::2], strict=True)
        gone = [field for field, held in fields if (entry := _entry(field, held, now)) is None or entry.is_past]
        if gone:
            self._redis.call("HDEL", self._key, *gone)

    # -- showing -------------------------------------------------------------------------------------------------

    def check(self, replies: Sequence[Any]) -> list[Check]:
        flat, (seconds, micros) = answered(replies)
        now = int(seconds) + int(micros) / 1_000_000
        found: dict[str, list[_Entry]] = {kind: [] for kind in _KINDS}
        for field, held in zip(flat[::2], flat[1::2], strict=True):
            entry = _entry(field, held, now)
            if entry is None:
                self._counters.add("health.unreadable")
            elif not entry.is_past:
                found[entry.kind].append(entry)
        return [*_workers(found["worker"]), *_beats(found["beat"]), *_queues(found["queues"], found["worker"])]


def _entry(field: bytes, held: bytes, now: float) -> _Entry | None:
    """None for something that govredis has not written."""
    try:
        kind, _, name = field.decode().partition(":")
        first, last, text = held.split(b" ", 2)
        told = json.loads(text)
        told["queues"] = [str(queue) for queue in told.get("queues", ())]
        told["depths"] = {str(queue): int(depth) for queue, depth in told.get("depths", {}).items()}
        every = check_ttl(told["every"], "every")
        ages = [max(0.0, now - int(at) / 1000) for at in (first, last)]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        return None
    return _Entry(kind, printable(name), ages[0], ages[1], every, told) if kind in _KINDS else None


def _workers(workers: list[_Entry]) -> list[Check]:
    alive = [worker for worker in workers if worker.lives]
    lost = [worker for worker in workers if not worker.lives]
    if not workers:
        return []
    data = {"alive": len(alive), "lost": len(lost)}
    if not lost:
        return [Check("workers", "pass", "", data)]
    output = f"{_named(lost)}: killed, cut off from Redis, or stuck"
    return [Check("workers", "warn", output, data)]


def _beats(beats: list[_Entry]) -> list[Check]:
    alive = [beat for beat in beats if beat.lives]
    both = [beat for beat in alive if any(_beside(beat, other) for other in alive if other is not beat)]
    if both:
        names = " and ".join(sorted(beat.name for beat in both)[:_NAMED])
        output = f"{len(both)} beats run, and publish each periodic task so often: {names}; stop all but one"
        return [Check("beat", "warn", output, {"beats": len(both)})]
    if not alive:
        if not beats:
            return []
        latest = min(beats, key=lambda beat: beat.last)
        output = f"beat {_named([latest])}: it is gone, stuck, or cannot publish"
        return [Check("beat", "warn", output, {"beats": 0})]
    latest = min(alive, key=lambda beat: beat.last)
    lag = latest.told.get("lag")
    if not isinstance(lag, int | float) or not math.isfinite(lag):
        return []
    data = {"beats": len(alive), "lag": round(float(lag), 3)}
    if lag <= latest.every:
        return [Check("beat", "pass", "", data)]
    output = f"beat {latest.name} was {lag:.1f} s late with its last heartbeat: its schedule lags"
    return [Check("beat", "warn", output, data)]


def _beside(one: _Entry, other: _Entry) -> bool:
    """Has each been heard since the other began? A beat that was started anew begins after the end of the last."""
    return min(one.first, other.first) > max(one.last, other.last)


def _queues(brokers: list[_Entry], workers: list[_Entry]) -> list[Check]:
    depths: dict[str, int] = {}
    unread: dict[str, int] = {}
    without_worker: set[str] = set()
    data: dict[str, Any] = {}
    unknown = []
    for broker in brokers:
        if not broker.lives:
            continue
        data["age"] = round(max(broker.last, data.get("age", 0.0)), 3)
        if "unknown" in broker.told:
            unknown.append(f"unknown: {broker.name}: {broker.told['unknown']!s}")
            continue
        read = {str(q) for w in workers if w.lives and w.told.get("broker") == broker.name for q in w.told["queues"]}
        for name, depth in broker.told["depths"].items():
            shown = printable(name)
            depths[shown] = depths.get(shown, 0) + depth
            if name not in read:
                without_worker.add(shown)
                if depth:
                    unread[shown] = depths[shown]
        for name in ("unacked", "oldest_unacked"):
            if broker.told.get(name) is not None:
                data[name] = broker.told[name]
    checks = []
    if data:
        checks.append(Check("broker", "pass", "; ".join(unknown), data))
    if depths:
        names = sorted(unread)[:_NAMED]
        output = ", ".join(f"queue {name!r} holds {unread[name]} messages" for name in names)
        output += f", and no worker reads {'it' if len(names) == 1 else 'them'} (-Q)" if names else ""
        shown_data = {name: {"depth": depth, "read": name not in without_worker} for name, depth in depths.items()}
        checks.append(Check("celery", "warn" if unread else "pass", output, shown_data))
    return checks


def _named(entries: list[_Entry]) -> str:
    shown = [f"{entry.name} was last heard {entry.last:.0f} s ago" for entry in sorted(entries)[:_NAMED]]
    more = len(entries) - len(shown)
    return ", ".join(shown) + (f", and {more} more" if more else "")
