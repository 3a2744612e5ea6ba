"""LocalTier: cached values in this process; Redis tells it when they change.

Redis tells of every key under our prefixes that is changed, expires or is evicted (CLIENT TRACKING in broadcast mode).
It tells one thread of each process, over one RESP3 connection. A value has two keys that count, its own and its
stamp's; "there is no value" stands in the stamp alone. Values that others have set have no stamp, and are not kept.
Three rules make a value in here as good as a value in Redis:

*A value is put only into a place that was there before Redis was asked for it.* A change that the server tells of
meanwhile removes the place, and the value goes nowhere.

*Without news, values end.* The thread asks every 0.3 s. A reply shows that all changes have come that the server had to
tell when it answered the question *before*. (A change in the same turn of the server's loop may come after the reply.)
So all values are valid for 1 s from when that earlier question was sent, on a clock that is never set. A half-open
connection, a server that stands still or a thread that stands still end them, and nobody has to notice it.

*With PostgreSQL*, the question is for the freshness lease. All values are valid no longer than the lease that answered
the question before, and in its epoch only. So a hit here is not further behind than a hit in Redis may be.

A new connection of this process may have reached another server: then the tracking connection is renewed, and all is
forgotten. So it is after a failure, FLUSHALL, a new epoch, and in a forked child.
"""

from __future__ import annotations

import itertools
import logging
import threading
import weakref
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from .._boottime import clock
from .._daemon import make_daemon, start
from .._fork import renew_in_child
from .._latch import Latch
from ..client import RedisClient
from ..errors import BackendError, BackendUnavailable
from ..keys import Keys, sibling
from ..outbox import FreshnessLease, FreshnessSnapshot
from .generation import Generation

if TYPE_CHECKING:
    from ..client import PushStream

log: logging.Logger = logging.getLogger("govredis")

MISS: Any = object()

#: The end of a stamp's key; no key of a value has it.
_STAMP = sibling("", "stamp")[1:]

#: Seconds between two questions, and how long the answer to the one before is good for.
_ASKED_EVERY = 0.3
_GOOD_FOR = 1.0
#: Seconds before the next try: of a server that is away, at most; and of a server that forbids it.
_AWAY = 0.05, 0.4
_REFUSED = 30.0


class Place:
    """A place for one value. `until`: on `clock`; 0.0 while there is none."""

    __slots__ = ("until", "value")

    def __init__(self) -> None:
        self.value: Any = None
        self.until: float = 0.0


class LocalValues:
    """The places of one namespace, by id; those least recently used go first. Nothing here takes a lock."""

    def __init__(self, tier: LocalTier, generation: Generation, entries: int) -> None:
        self._tier = tier
        self.generation = generation
        #: The client's, when the connection was begun that tracks them; -1: none does.
        self.connects = -1
        self._entries = entries
        self.places: OrderedDict[str, Place] = OrderedDict()
        #: This, and the same values in other forms.
        self.forms: tuple[LocalValues, ...] = (self,)
        self._hits = itertools.count()
        self._times_read = 0

    def get(self, identity: str) -> Any:
        """The value, to be changed by nobody; MISS if there is none that is valid."""
        until = self._tier.until  # before the place: what is valid again has new places
        try:
            place = self.places[identity]
            now = clock()
            if now >= until or now >= place.until:
                return MISS
            self.places.move_to_end(identity)
        except (KeyError, TypeError):
            return MISS
        next(self._hits)
        return place.value

    def reserve(self, identity: str) -> Place:
        """A place for what is now going to be read from Redis."""
        self._tier.start()
        self.places[identity] = place = Place()
        while len(self.places) > self._entries:
            try:
                self.places.popitem(last=False)
            except KeyError:  # another thread has
                break
        return place

    def fill(self, place: Place, value: Any, snapshot: FreshnessSnapshot, connects: int, seconds: float) -> None:
        """Put what was read from Redis, and nobody can change, into its place.

        Args:
            snapshot: the freshness lease under which it was read.
            connects: the client's, after it was read.
            seconds: until its TTL is over.
        """
        tier = self._tier
        if connects == self.connects and (tier.freshness is None or snapshot.epoch == tier.epoch):
            place.value = value
            place.until = clock() + seconds

    def drop(self, identity: str) -> None:
        """Drop a value, in whatever form this process has it."""
        for values in self.forms:
            values.places.pop(identity, None)

    def clear(self) -> None:
        """Drop all of the namespace."""
        for values in self.forms:
            values.places.clear()

    def hits(self) -> int:
        self._times_read += 1
        return next(self._hits) - self._times_read + 1


class LocalTier:
    """The values of one GovRedis in this process, and the thread that keeps them true. It starts with the first read.

    Args:
        freshness: under which values are used; None: they are used until their TTL.
        entries: of each namespace, at most.
    """

    def __init__(self, keys: Keys, redis: RedisClient, freshness: FreshnessLease | None, *, entries: int) -> None:
        self.freshness = freshness
        self._generations = keys.generation("")
        self._redis = redis
        self._entries = entries
        self._namespaces: dict[tuple[str, object], LocalValues] = {}
        self._warned = False
        self._stream: PushStream | None = None
        self._thread: threading.Thread | None = None
        self.renew_after_fork()
        renew_in_child(self)

    def renew_after_fork(self) -> None:
        self._lock = threading.RLock()  # a signal handler may read too
        self.until: float = 0.0
        self.epoch: int | None = None
        self._stopped = Latch()
        self._thread = None
        for values in self._namespaces.values():
            values.connects = -1
            values.places.clear()
        if self._stream is not None:
            self._stream.close()  # the child's descriptor only
            self._stream = None

    def values(self, prefix: str, generation: Generation, form: object = None) -> LocalValues:
        """The values whose keys begin with `prefix`, in one of the forms in which they are handed out."""
        with self._lock:
            made = self._namespaces.setdefault((prefix, form), LocalValues(self, generation, self._entries))
            forms = tuple(values for (other, _), values in self._namespaces.items() if other == prefix)
            for values in forms:
                values.forms = forms
            return made

    def start(self) -> None:
        """Have the thread run. Where threads cannot, nothing here is ever valid."""
        if self._thread is not None and self._thread.is_alive():
            return
        with self._lock:
            if self._thread is not None and self._thread.is_alive():
                return
            self._stopped = stopped = Latch()
            self._thread = thread = make_daemon("govredis-local", _run, weakref.ref(self), stopped)
            start(thread)

    def close(self) -> None:
        """End the thread, waiting for it. It starts again if values are read again."""
        self._stopped.set()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout=5)
        self.forget()

    # -- the thread's ----------------------------------------------------------------------------------------------

    def is_run_by_this_thread(self) -> bool:
        return self._thread is threading.current_thread()

    def forget(self) -> None:
        """Nothing is valid, and what is being read will not be put here."""
        self.until = 0.0
        for values in list(self._namespaces.values()):
            values.connects = -1
            values.places.clear()

    def _clear(self) -> None:
        for values in list(self._namespaces.values()):
            values.places.clear()

    def track(self) -> _Tracking:
        """Begin a tracking connection. Raises BackendUnavailable, BackendError."""
        connects, namespaces = self._redis.connects, dict(self._namespaces)
        self._stream = stream = self._redis.push_stream()
        command = ["CLIENT", "TRACKING", "ON", "BCAST"]
        prefixes = {prefix for prefix, _ in namespaces}
        for prefix in (self._generations, *prefixes, *(f"{{{prefix}" for prefix in prefixes)):
            command += ["PREFIX", prefix]
        try:
            stream.send([tuple(command)])
            deadline = clock() + _GOOD_FOR
            while not stream.read(deadline - clock())[0]:
                if clock() >= deadline:
                    raise BackendUnavailable("CLIENT TRACKING was not answered")
        except BaseException:
            stream.close()
            raise
        for values in namespaces.values():
            values.places.clear()  # what was asked for before goes nowhere
            values.connects = connects
        return _Tracking(stream, connects, len(namespaces))

    def is_current(self, tracking: _Tracking) -> bool:
        """Does it track all namespaces, on the server that everybody here talks to?"""
        return tracking.connects == self._redis.connects and tracking.namespaces == len(self._namespaces)

    def questions(self) -> list[tuple[str, ...]]:
        return [("PING",)] if self.freshness is None else self.freshness.questions()

    def answered(self, sent: float, replies: list[Any]) -> FreshnessSnapshot | None:
        """The freshness lease in the replies; None where it is not valid, or without PostgreSQL."""
        return None if self.freshness is None else self.freshness.answered(sent, replies)

    def told(self, push: list[Any]) -> None:
        """A push of the server's. Others than of invalidation may come."""
        if push[0] != b"invalidate":
            return
        if push[1] is None:  # FLUSHALL, FLUSHDB
            self._clear()
            return
        for key in push[1]:
            text = key.decode(errors="replace")
            if text.startswith("{"):
                if not text.endswith(_STAMP):  # a lease, say
                    continue
                text = text[1 : -len(_STAMP)]
            for (prefix, _), values in list(self._namespaces.items()):
                if text.startswith(prefix):
                    values.drop(text[len(prefix) :])
                elif text == values.generation.key:
                    values.generation.forget()  # first: what is read from now on asks for it
                    values.clear()

    def extend(self, sent: float, snapshot: FreshnessSnapshot | None) -> None:
        """All that the server had to tell when it answered what was sent then has been told."""
        until = sent + _GOOD_FOR
        if self.freshness is not None:
            if snapshot is None:
                self.until = 0.0
                return
            if snapshot.epoch != self.epoch:
                self.until = 0.0
                self.epoch = snapshot.epoch  # before clearing: what comes under the old one is put nowhere
                self._clear()
            until = min(until, snapshot.until)
        self.until = until

    def warn(self, error: BackendError) -> None:
        if not self._warned:
            self._warned = True
            log.warning("no values are cached in this process: %s", error)


class _Tracking:
    """One tracking connection, and what was asked over it."""

    def __init__(self, stream: PushStream, connects: int, namespaces: int) -> None:
        self.stream = stream
        self.connects = connects
        self.namespaces = namespaces
        self._sent: float | None = None
        self._replies: list[Any] = []
        self._before: tuple[float, FreshnessSnapshot | None] | None = None
        self._ask_at = 0.0
        self._wanted = 0

    def ask(self, tier: LocalTier) -> float:
        """Ask if it is time to. Returns for how many seconds to listen. Raises BackendUnavailable."""
        now = clock()
        if self._sent is None and now >= self._ask_at:
            questions = tier.questions()
            self._sent, self._wanted, self._replies = now, len(questions), []
            self.stream.send(questions)
        elif self._sent is not None and now >= self._sent + _GOOD_FOR:
            raise BackendUnavailable("the tracking connection is not answered")
        return _ASKED_EVERY if self._sent is not None else max(0.001, self._ask_at - now)

    def heard(self, tier: LocalTier, replies: list[Any], pushes: list[list[Any]]) -> None:
        for push in pushes:
            tier.told(push)
        self._replies += replies
        if len(self._replies) > self._wanted:
            raise BackendUnavailable("the tracking connection has answered more than it was asked")
        if self._sent is not None and len(self._replies) == self._wanted:
            if self._before is None:
                self._ask_at = self._sent  # at once: values are valid from the second answer
            else:
                tier.extend(*self._before)
                self._ask_at = self._sent + _ASKED_EVERY
            self._before = self._sent, tier.answered(self._sent, self._replies)
            self._sent, self._wanted, self._replies = None, 0, []


def _run(ref: weakref.ref[LocalTier], stopped: Latch) -> None:
    """The thread. While it waits it keeps no tier alive."""
    tracking: _Tracking | None = None
    wait, pause = 0.0, _AWAY[0]
    try:
        while not stopped.wait(wait):
            wait = 0.0
            tier = ref()
            try:
                if tier is None or not tier.is_run_by_this_thread():
                    return  # an exception struck `start` just when it had started this one: there is another
                if tracking is None:
                    tracking = tier.track()
                    pause = _AWAY[0]
                seconds = tracking.ask(tier)
                tier = None
                replies, pushes = tracking.stream.read(seconds)
                tier = ref()
                if tier is None:
                    return
                tracking.heard(tier, replies, pushes)
                if not tier.is_current(tracking):
                    tracking = _end(tracking, tier)
            except BackendUnavailable:
                wait, pause = pause, min(_AWAY[1], 2 * pause)
                tracking = _end(tracking, ref())
            except BackendError as error:
                wait = _REFUSED
                tracking = _end(tracking, ref(), error)
            tier = None
    finally:
        if tracking is not None:
            tracking.stream.close()


def _end(tracking: _Tracking | None, tier: LocalTier | None, error: BackendError | None = None) -> _Tracking | None:
    if tier is not None:
        tier.forget()
        if error is not None:
            tier.warn(error)
    if tracking is not None:
        tracking.stream.close()
    return None
