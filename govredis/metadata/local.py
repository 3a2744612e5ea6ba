"""LocalTier: cached values in this process; Redis tells it when they change. tracking.py is how it hears of that.

Redis tells of every key under our prefixes that is changed, expires or is evicted (CLIENT TRACKING in broadcast mode).
Each node tells one thread of each process, over a RESP3 connection to that node. A value has two keys that count, its
own and its stamp's; "there is no value" stands in the stamp alone. Values that others have set have no stamp, and are
not kept. Three rules make a value in here as good as a value in Redis:

*A value is put only into a place that was there before Redis was asked for it*, when its node was tracked already. A
change that the node tells of meanwhile removes the place, and the value goes nowhere.

*Without news, values end.* The thread asks each node every 0.3 s. A reply shows that all changes have come that the
node had to tell when it answered the question *before*. (A change in the same turn of the server's loop may come after
the reply.) So all values of that node are valid for 1 s from when that earlier question was sent, on a clock that is
never set. A half-open connection, a server that stands still or a thread that stands still end them, and nobody has to
notice it.

*With PostgreSQL*, the question is for the node's freshness lease. All its values are valid no longer than the lease
that answered the question before, and in its epoch only. So a hit here is not further behind than a hit in Redis may
be. On a Cluster all end, too, when the lease covers other slots than before.

On a Cluster each value belongs to the node that it was read from. Where its slot moves, that node tells that the key is
gone. A primary that was demoted may be told by its successor, late. But the question is for a key: a replica does not
answer it, and the values end.

A new connection of this process may have reached another server: then that node's tracking connection is renewed, and
all is forgotten. So it is after a failure, FLUSHALL, a new epoch, and in a forked child.
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
from ..client import RedisClient, RedisNode
from ..errors import BackendError, BackendUnavailable
from ..keys import Keys, sibling
from ..outbox import FreshnessLease, FreshnessSnapshot
from .generation import Generation
from .tracking import GOOD_FOR, track

if TYPE_CHECKING:
    from ..client import PushStream

log: logging.Logger = logging.getLogger("govredis")

MISS: Any = object()

#: The end of a stamp's key; no key of a value has it.
_STAMP = sibling("", "stamp")[1:]


class TrackedSpan:
    """A time in which one node tells of all changes of these values, without a break and in one epoch.

    Attributes:
        until: the values that were read in it are valid so long, on `clock`; 0.0: not now.
        values: those that are tracked.
        connects: the node's, when the connection was begun that tracks them.
        epoch, slots: of its freshness lease; None: not known yet, or without PostgreSQL.
        before: when the last question was sent that was answered, and the freshness lease in that answer.
    """

    __slots__ = ("before", "connects", "epoch", "slots", "until", "values")

    def __init__(
        self, values: frozenset[LocalValues], connects: int, epoch: int | None = None, slots: int | None = None
    ) -> None:
        self.until: float = 0.0
        self.values: frozenset[LocalValues] = values
        self.connects: int = connects
        self.epoch: int | None = epoch
        self.slots: int | None = slots
        self.before: tuple[float, FreshnessSnapshot | None] | None = None

    def is_under(self, snapshot: FreshnessSnapshot) -> bool:
        """Is it this lease, for the same slots?"""
        return snapshot.epoch == self.epoch and snapshot.slots == self.slots


#: The span of a place without a value.
_NEVER = TrackedSpan(frozenset(), -1)


class Place:
    """A place for one value.

    Attributes:
        until: the end of the value's own TTL, on `clock`; 0.0 while there is none.
        span: in which it was read.
        spans: by node, those that had begun when the place was made.
    """

    __slots__ = ("span", "spans", "until", "value")

    def __init__(self, spans: dict[RedisNode, TrackedSpan]) -> None:
        self.value: Any = None
        self.until: float = 0.0
        self.span: TrackedSpan = _NEVER
        self.spans: dict[RedisNode, TrackedSpan] = spans


class LocalValues:
    """The places of one namespace, by id; those least recently used go first. Nothing here takes a lock."""

    def __init__(self, tier: LocalTier, generation: Generation, entries: int) -> None:
        self._tier = tier
        self.generation = generation
        self._entries = entries
        self.places: OrderedDict[str, Place] = OrderedDict()
        #: This, and the same values in other forms.
        self.forms: tuple[LocalValues, ...] = (self,)
        self._hits = itertools.count()
        self._times_read = 0

    def get(self, identity: str) -> Any:
        """The value, to be changed by nobody; MISS if there is none that is valid."""
        try:
            place = self.places[identity]
            until = place.span.until
            # Still there, after `until` was read: what is valid again by then has new places.
            if self.places[identity] is not place:
                return MISS
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
        self.places[identity] = place = Place(self._tier.spans)
        while len(self.places) > self._entries:
            try:
                self.places.popitem(last=False)
            except KeyError:  # another thread has
                break
        return place

    def fill(
        self,
        place: Place,
        value: Any,
        node: RedisNode,
        snapshot: FreshnessSnapshot,
        connects: int,
        seconds: float,
    ) -> None:
        """Put what was read from a node, and nobody can change, into its place.

        Args:
            snapshot: the freshness lease under which it was read.
            connects: the node's, after it was read.
            seconds: until its TTL is over.
        """
        span = place.spans.get(node, _NEVER)
        is_tracked = self in span.values and connects == span.connects
        if is_tracked and (self._tier.freshness is None or span.is_under(snapshot)):
            place.value = value
            place.until = clock() + seconds
            place.span = span  # last

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
        #: The open tracking connections.
        self.streams: set[PushStream] = set()
        self._thread: threading.Thread | None = None
        #: By node, those that go on. Replaced as a whole: places keep it.
        self.spans: dict[RedisNode, TrackedSpan] = {}
        self.renew_after_fork()
        renew_in_child(self)

    def renew_after_fork(self) -> None:
        self._lock = threading.RLock()  # a signal handler may read too
        self._stopped = Latch()
        self._thread = None
        self.forget()
        for stream in self.streams:
            stream.close()  # the child's descriptor only
        self.streams = set()

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
            self._thread = thread = make_daemon("govredis-local", track, weakref.ref(self), stopped)
            start(thread)

    def close(self) -> None:
        """End the thread, waiting for it. It starts again if values are read again."""
        self._stopped.set()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout=5)
        self.forget()

    def forget(self) -> None:
        """Nothing is valid, and what is being read will not be put here."""
        for node in list(self.spans):
            self.end(node)
        self._clear()

    # -- the thread's ----------------------------------------------------------------------------------------------

    def is_run_by_this_thread(self) -> bool:
        return self._thread is threading.current_thread()

    def nodes(self) -> list[RedisNode]:
        """The nodes to be tracked."""
        try:
            return list(self._redis.nodes())
        except BackendUnavailable:  # none is known
            return []

    def tracked(self) -> tuple[frozenset[LocalValues], tuple[str, ...]]:
        """All values that there are now, and the command that has a node tell of them."""
        namespaces = dict(self._namespaces)
        command = ["CLIENT", "TRACKING", "ON", "BCAST"]
        prefixes = {prefix for prefix, _ in namespaces}
        for prefix in (self._generations, *prefixes, *(f"{{{prefix}" for prefix in prefixes)):
            command += ["PREFIX", prefix]
        return frozenset(namespaces.values()), tuple(command)

    def begin(self, node: RedisNode, values: frozenset[LocalValues], connects: int) -> None:
        """From now on the node tells of changes."""
        self.spans = {**self.spans, node: TrackedSpan(values, connects)}

    def is_current(self, node: RedisNode) -> bool:
        """Is all of ours tracked, on the server that everybody here talks to?"""
        span = self.spans.get(node, _NEVER)
        return span.connects == node.connects and len(span.values) == len(self._namespaces)

    def questions(self, node: RedisNode) -> list[tuple[str, ...]]:
        """The commands that ask for its freshness lease, or whether it still tells of changes."""
        if self.freshness is not None:
            return self.freshness.questions(node)
        if not self._redis.has_slots:
            return [("PING",)]
        key = next(iter(self._namespaces.values())).generation.at(node).key
        return [("MGET", key)]  # a demoted primary would answer PING

    def answered(self, node: RedisNode, sent: float, replies: list[Any]) -> bool:
        """The node has replied to its questions. Returns False for the first time: values are valid from the second."""
        snapshot = None if self.freshness is None else self.freshness.answered(node, sent, replies)
        span = self.spans.get(node)
        if span is None:
            return False  # another thread has ended it, which `is_current` says too
        before = span.before
        if before is not None:
            span = self.extend(node, span, *before)
        span.before = sent, snapshot
        return before is not None

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
                elif values.generation.is_marked_by(text):
                    values.generation.forget()  # first: what is read from now on asks for it
                    values.clear()

    def extend(
        self, node: RedisNode, span: TrackedSpan, sent: float, snapshot: FreshnessSnapshot | None
    ) -> TrackedSpan:
        """All that the node had to tell when it answered what was sent then has been told. Returns its span."""
        until = sent + GOOD_FOR
        if self.freshness is not None:
            if snapshot is None:
                span.until = 0.0
                return span
            if not span.is_under(snapshot):
                # Before clearing: what comes under the old one is put nowhere.
                span.until = 0.0
                span = TrackedSpan(span.values, span.connects, snapshot.epoch, snapshot.slots)
                self.spans = {**self.spans, node: span}
                self._clear()
            until = min(until, snapshot.until)
        span.until = until
        return span

    def end(self, node: RedisNode, error: BackendError | None = None) -> None:
        """The node tells of changes no more; `error`: what forbids it."""
        span = self.spans.get(node)
        if span is not None:
            span.until = 0.0
            self.spans = {other: its for other, its in self.spans.items() if other is not node}
            self._clear()
        if error is not None and not self._warned:
            self._warned = True
            log.warning("no values are cached in this process: %s", error)

    def _clear(self) -> None:
        for values in list(self._namespaces.values()):
            values.places.clear()
