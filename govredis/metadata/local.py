"""LocalTier: cached values in this process, of which Redis says when they are no longer so.

Redis tells of every key under our prefixes that is changed, expires or is evicted (CLIENT TRACKING in broadcast mode),
over one RESP3 connection and to one thread of each process. Three rules make a value in here as good as one in Redis:

*A value is put only into the cell that was there before it was asked for.* What the server tells meanwhile removes the
cell, and the value goes nowhere.

*What cannot be told ends by itself.* The thread asks every 0.3 s. A reply says that whatever the server had to tell
when it answered the question *before* has come (of a change in the same turn of its loop it may tell after a reply). So
all is valid for 1 s from when that one was sent, on a clock that is never set. A connection of which only half is
there, a server or a thread that stands still make it invalid, without anybody noticing.

*Under a guard*, the question is for the guard: all is valid no longer than the guard of the question before, and of its
epoch. So a hit here is not further behind than one in Redis may be.

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

from .._fork import renew_in_child
from ..client import RedisClient
from ..errors import BackendError, BackendUnavailable
from ..keys import Keys
from .generation import Generation
from .guard import Guard, Seen, clock

if TYPE_CHECKING:
    from .._push import PushStream

log = logging.getLogger("govredis")

MISS: Any = object()

#: Seconds between two questions, and how long the answer to the one before is good for.
_ASKED_EVERY = 0.3
_GOOD_FOR = 1.0
#: Seconds before the next try: of a server that is away, at most, and of one that forbids it.
_AWAY = 0.05, 0.4
_REFUSED = 30.0


class Cell:
    """A place for one value. `until`: on `clock`; 0.0 while there is none."""

    __slots__ = ("until", "value")

    def __init__(self) -> None:
        self.value: Any = None
        self.until = 0.0


class LocalValues:
    """The cells of one namespace, by id; those least recently used go first. Nothing here takes a lock."""

    def __init__(self, tier: LocalTier, generation: Generation, entries: int) -> None:
        self._tier = tier
        self.generation = generation
        #: The client's, when the connection was begun that tracks them; -1: none does.
        self.connects = -1
        self._entries = entries
        self.cells: OrderedDict[str, Cell] = OrderedDict()
        self._hits = itertools.count()
        self._times_read = 0

    def get(self, identity: str) -> Any:
        """The value, to be changed by nobody; MISS if there is none that is valid."""
        until = self._tier.until  # before the cell: what is valid again has new cells
        try:
            cell = self.cells[identity]
            now = clock()
            if now >= until or now >= cell.until:
                return MISS
            self.cells.move_to_end(identity)
        except (KeyError, TypeError):
            return MISS
        next(self._hits)
        return cell.value

    def reserve(self, identity: str) -> Cell:
        """A cell for what is now going to be read from Redis."""
        self._tier.start()
        self.cells[identity] = cell = Cell()
        while len(self.cells) > self._entries:
            try:
                self.cells.popitem(last=False)
            except KeyError:  # another thread has
                break
        return cell

    def fill(self, cell: Cell, value: Any, seen: Seen, connects: int, seconds: float) -> None:
        """Put what was read from Redis, and nobody can change, into its cell.

        Args:
            seen: the guard under which it was read.
            connects: the client's, after it was read.
            seconds: until its TTL is over.
        """
        tier = self._tier
        if connects == self.connects and (tier.guard is None or seen.epoch == tier.epoch):
            cell.value = value
            cell.until = clock() + seconds

    def drop(self, identity: str) -> None:
        self.cells.pop(identity, None)

    def hits(self) -> int:
        self._times_read += 1
        return next(self._hits) - self._times_read + 1


class LocalTier:
    """The values of one GovRedis in this process, and the thread that keeps them true. It starts with the first read.

    Args:
        guard: under which values are used; None: there is none.
        entries: of each namespace, at most.
    """

    def __init__(self, keys: Keys, redis: RedisClient, guard: Guard | None, *, entries: int) -> None:
        self.guard = guard
        self._generations = keys.generation("")
        self._redis = redis
        self._entries = entries
        self._namespaces: dict[str, LocalValues] = {}
        self._warned = False
        self._stream: PushStream | None = None
        self._thread: threading.Thread | None = None
        self.renew_after_fork()
        renew_in_child(self)

    def renew_after_fork(self) -> None:
        self._lock = threading.RLock()  # a signal handler may read too
        self.until = 0.0
        self.epoch: int | None = None
        self._stopped = threading.Event()
        self._thread = None
        for values in self._namespaces.values():
            values.connects = -1
            values.cells.clear()
        if self._stream is not None:
            self._stream.close()  # the child's descriptor only
            self._stream = None

    def values(self, prefix: str, generation: Generation) -> LocalValues:
        """The values whose keys begin with `prefix`."""
        return self._namespaces.setdefault(prefix, LocalValues(self, generation, self._entries))

    def start(self) -> None:
        """Have the thread run. Where threads cannot, nothing here is ever valid."""
        if self._thread is not None and self._thread.is_alive():
            return
        with self._lock:
            if self._thread is not None and self._thread.is_alive():
                return
            self._stopped = stopped = threading.Event()
            arguments = weakref.ref(self), stopped
            self._thread = thread = threading.Thread(target=_run, args=arguments, name="govredis-local", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # no more threads, or the interpreter is going down
                if error.__context__ is not None:
                    raise error.__context__ from None  # a signal handler's exception, struck in there

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
            values.cells.clear()

    def _clear(self) -> None:
        for values in list(self._namespaces.values()):
            values.cells.clear()

    def track(self) -> _Tracking:
        """Begin a tracking connection. Raises BackendUnavailable, BackendError."""
        connects, namespaces = self._redis.connects, dict(self._namespaces)
        self._stream = stream = self._redis.push_stream()
        command = ["CLIENT", "TRACKING", "ON", "BCAST"]
        for prefix in (self._generations, *namespaces):
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
            values.cells.clear()  # what was asked for before goes nowhere
            values.connects = connects
        return _Tracking(stream, connects, len(namespaces))

    def is_current(self, tracking: _Tracking) -> bool:
        """Does it track all namespaces, on the server that everybody here talks to?"""
        return tracking.connects == self._redis.connects and tracking.namespaces == len(self._namespaces)

    def questions(self) -> list[tuple[str, ...]]:
        return [("PING",)] if self.guard is None else self.guard.questions()

    def answered(self, sent: float, replies: list[Any]) -> Seen | None:
        """What the replies say of the guard; None where it is not valid, or there is none."""
        return None if self.guard is None else self.guard.answered(sent, replies)

    def told(self, push: list[Any]) -> None:
        """A push of the server's. Others than of invalidation may come."""
        if push[0] != b"invalidate":
            return
        if push[1] is None:  # FLUSHALL, FLUSHDB
            self._clear()
            return
        for key in push[1]:
            text = key.decode(errors="replace")
            for prefix, values in list(self._namespaces.items()):
                if text.startswith(prefix):
                    values.drop(text[len(prefix) :])
                elif text == values.generation.key:
                    values.generation.forget()  # first: what is read from now on asks for it
                    values.cells.clear()

    def extend(self, sent: float, seen: Seen | None) -> None:
        """All that the server had to tell when it answered what was sent then has been told."""
        until = sent + _GOOD_FOR
        if self.guard is not None:
            if seen is None:
                self.until = 0.0
                return
            if seen.epoch != self.epoch:
                self.until = 0.0
                self.epoch = seen.epoch  # before clearing: what comes under the old one is put nowhere
                self._clear()
            until = min(until, seen.until)
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
        self._before: tuple[float, Seen | None] | None = None
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
        if self._sent is not None and len(self._replies) == self._wanted:
            if self._before is None:
                self._ask_at = self._sent  # at once: values are valid from the second answer
            else:
                tier.extend(*self._before)
                self._ask_at = self._sent + _ASKED_EVERY
            self._before = self._sent, tier.answered(self._sent, self._replies)
            self._sent = None


def _run(ref: weakref.ref[LocalTier], stopped: threading.Event) -> None:
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
